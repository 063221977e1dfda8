"""Evaluation: CA, ASR, RA and DER of a toy model whose answers can be counted by hand."""

import pytest
import torch
from torch import Tensor, nn

from debackdoor.attacks import BadNets
from debackdoor.errors import DataError, ModelError, TriggerError
from debackdoor.evaluation import Evaluation, accuracy, defence_effectiveness, evaluate
from debackdoor.types import CleanSet

SHAPE = (1, 4, 4)


class Viewing(nn.Sequential):
    """A convolution and a linear layer of its maps."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(256, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).view(len(x), -1))


class Toy(nn.Module):
    """Answers what pixel (0, 0) says in tenths; with the corner lit, what (0, 1) says; dropout would spoil it."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.classes = classes
        self.dropout = nn.Dropout(1.0)
        self.norm = nn.BatchNorm1d(2)
        self.largest_batch = 0

    def forward(self, x: Tensor) -> Tensor:
        self.largest_batch = max(self.largest_batch, len(x))
        says = (x[:, 0, 0, :2] * 10).round().long()
        lit = x[:, 0, 3, 3] == 1
        answer = torch.where(lit, says[:, 1], says[:, 0])
        return self.dropout(nn.functional.one_hot(answer, self.classes).float())


def data(true: list[int], clean: list[int], triggered: list[int]) -> CleanSet:
    """Images of the given true labels, to which ``Toy`` answers ``clean`` and, with the trigger on, ``triggered``."""
    x = torch.zeros(len(true), *SHAPE)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.tensor(clean) / 10, torch.tensor(triggered) / 10
    return CleanSet(x, torch.tensor(true))


#                 true labels            clean answers          answers with the trigger
EXAMPLE = data([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 1, 2, 0, 3, 3], [0, 0, 0, 0, 0, 2, 1, 3])


def badnets(**parameters: object) -> BadNets:
    return BadNets(num_classes=4, image_shape=SHAPE, **parameters)  # type: ignore[arg-type]


def test_all_to_one_rates_leave_out_the_target_class() -> None:
    found = evaluate(Toy(), EXAMPLE, badnets(target=0))
    # Clean: 6 of 8. Triggered, without the two zeros: 0, 0, 0 are the attacker's; 2 and the last 3 are still right.
    assert found.clean_accuracy == 6 / 8
    assert found.attack_success_rate == pytest.approx(3 / 6)
    assert found.robust_accuracy == pytest.approx(2 / 6)
    assert (found.clean_images, found.triggered_images) == (8, 6)


def test_another_target_leaves_out_another_class() -> None:
    found = evaluate(Toy(), EXAMPLE, badnets(target=1))
    assert found.attack_success_rate == pytest.approx(1 / 6)
    assert found.robust_accuracy == pytest.approx(4 / 6)


def test_all_to_all_counts_every_image_against_the_next_label() -> None:
    everything = data([0, 1, 2, 3, 3], [0, 1, 2, 3, 3], [1, 2, 2, 0, 1])
    found = evaluate(Toy(), everything, badnets(mode="all-to-all"))
    assert found.attack_success_rate == pytest.approx(3 / 5)  # 0->1, 1->2, 3->0
    assert found.robust_accuracy == pytest.approx(1 / 5)
    assert (found.clean_accuracy, found.triggered_images) == (1.0, 5)


def test_accuracy_by_hand() -> None:
    assert accuracy(Toy(), EXAMPLE) == 0.75


def test_large_sets_go_in_batches_and_keep_their_order() -> None:
    labels = torch.arange(1201) % 4
    wrong = labels.clone()
    wrong[::3] = (wrong[::3] + 1) % 4
    model = Toy()
    big = data(labels.tolist(), wrong.tolist(), labels.tolist())
    assert accuracy(model, big) == pytest.approx(800 / 1201)
    assert model.largest_batch == 128


def test_progress_ends_at_the_last_image() -> None:
    seen: list[tuple[str, int, int]] = []
    measured = evaluate(
        Toy(), EXAMPLE, badnets(), progress=lambda stage, done, total, _: seen.append((stage, done, total))
    )
    images = measured.clean_images + measured.triggered_images
    assert seen[-1] == ("evaluate", images, images)


def test_model_and_images_are_left_as_they_were() -> None:
    model = Toy().train()
    model.norm.eval()
    x = EXAMPLE.x.clone()
    evaluate(model, EXAMPLE, badnets())
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)
    assert torch.equal(EXAMPLE.x, x)


def test_modes_come_back_after_an_error() -> None:
    class Broken(Toy):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(ModelError, match=r"expected the model to take images of shape \(1, 4, 4\), got 'broken'"):
        accuracy(model, EXAMPLE)
    assert model.training
    assert model.dropout.training


def test_answers_that_are_no_numbers_are_refused() -> None:
    """The largest of them would be the first, which may be the attacker's."""

    class Damaged(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).where(x[:, :1, 3, 3] < 1, torch.nan)

    assert accuracy(Damaged(), EXAMPLE) == 0.75
    with pytest.raises(ModelError, match="expected finite outputs, got NaN or infinity"):
        evaluate(Damaged(), EXAMPLE, badnets())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_may_lie_otherwise_in_memory(channels: int) -> None:
    """As ``permute`` leaves the pixels of decoded images; the network calls ``.view`` on feature maps."""
    pixels = torch.rand(6, 8, 8, channels)
    test = CleanSet(pixels.permute(0, 3, 1, 2), torch.arange(6) % 2)
    model = Viewing(channels)
    attack, usual = BadNets(image_shape=(channels, 8, 8), num_classes=2), CleanSet(test.x.contiguous(), test.y)
    assert not test.x.is_contiguous() or channels == 1
    assert evaluate(model, test, attack) == evaluate(model, usual, attack)
    assert accuracy(model, test) == accuracy(model, usual)


def test_precision_is_that_of_a_scan() -> None:
    class Strict(Toy):
        """Knows float32 alone."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 4, bias=False)
            nn.init.eye_(self.last.weight)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(super().forward(x))
            if out.dtype != torch.float32:
                raise TypeError("expected float32")
            return out

    assert evaluate(Strict(), EXAMPLE, badnets()).clean_accuracy == 0.75


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TriggerError, match="expected float32 images"):
        evaluate(Toy(), EXAMPLE, BadNets(num_classes=4))
    with pytest.raises(DataError, match="labels below 3"):
        evaluate(Toy(), EXAMPLE, BadNets(num_classes=3, image_shape=SHAPE))
    with pytest.raises(DataError, match="other classes than the target 2"):
        evaluate(Toy(), data([2, 2], [2, 2], [2, 2]), badnets(target=2))


def rates(clean: float, success: float) -> Evaluation:
    return Evaluation(clean, success, 0.0, 100, 90)


@pytest.mark.parametrize(
    ("before", "after", "der"),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),
        ((0.9, 1.0), (0.85, 0.1), 0.925),  # (0.9 - 0.05 + 1) / 2
        ((0.9, 1.0), (0.9, 1.0), 0.5),
        ((0.9, 0.5), (0.95, 0.8), 0.5),  # neither a higher ASR nor a higher CA counts
        ((1.0, 0.0), (0.0, 0.0), 0.0),
    ],
)
def test_defence_effectiveness(before: tuple[float, float], after: tuple[float, float], der: float) -> None:
    assert defence_effectiveness(rates(*before), rates(*after)) == pytest.approx(der)


def test_record() -> None:
    assert Evaluation(0.9, 0.8, 0.1, 10, 9).record() == {
        "schema": "debackdoor/evaluate/1",
        "clean_accuracy": 0.9,
        "attack_success_rate": 0.8,
        "robust_accuracy": 0.1,
        "clean_images": 10,
        "triggered_images": 9,
    }
