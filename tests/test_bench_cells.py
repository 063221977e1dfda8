"""The matrix of a bench: from a TOML file or options to cells; what is unknown is refused with what is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from debackdoor.bench.cells import Cell, Matrix, read_matrix
from debackdoor.bench.methods import METHODS
from debackdoor.errors import DebackdoorError

Zoo = tuple[Path, Path]


def test_cells_are_everything_with_everything_model_by_model(small_zoo: Zoo) -> None:
    matrix = Matrix(
        zoo=small_zoo[0] / "tiny", models=["s*", "patch"], defenses=["rnp", "ft-0.01"], seeds=[1, 0], clean_images=[50]
    )
    assert matrix.cells() == [
        Cell(model, defense, seed, 50)
        for model in ("patch", "shifted")
        for seed in (1, 0)
        for defense in ("rnp", "ft-0.01")
    ]
    assert matrix.replaced(models=["*"], seeds=[0, 0], defenses=["rnp"]).cells() == [
        Cell(model, "rnp", 0, 50) for model in ("clean-1", "patch", "shifted")
    ]
    assert len({cell.file for cell in matrix.cells()}) == 8
    assert Cell("patch", "ft-0.01", 2, 50).file == Path("ft-0.01/patch-seed2-n50.json")


def test_a_file_sets_some_and_options_others(tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text('zoo = "zoo/full"\nseeds = [3, 4]\nmodels = ["a", "b-*"]\n')
    matrix = read_matrix(path)
    assert (matrix.zoo, list(matrix.seeds), list(matrix.models)) == (Path("zoo/full"), [3, 4], ["a", "b-*"])
    assert tuple(matrix.defenses) == tuple(METHODS)
    assert tuple(matrix.clean_images) == (500,)
    changed = matrix.replaced(seeds=[5], models=None)
    assert (list(changed.seeds), list(changed.models)) == ([5], ["a", "b-*"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zoo = 3", "expected zoo as the path of a folder, got 3"),
        ("[models]\na = 1", "expected models as a list of names, got {'a': 1}"),
        ('models = "badnets"', "expected models as a list of names, got 'badnets'"),
        ("models = []", "expected at least one entry in models, got none"),
        ("seeds = [true]", r"expected seeds as a list of whole numbers, got \[True\]"),
        ("seeds = [0.5]", r"expected seeds as a list of whole numbers, got \[0.5\]"),
        ("seeds = [0, -1]", "expected seeds of at least 0, got -1"),
        ("clean_images = [0]", "expected clean_images of at least 1, got 0"),
        ('defenses = ["rnp", "magic"]', "expected defenses out of rnp, .*, got 'magic'"),
        ("attacks = []", "expected keys out of zoo, models, defenses, seeds, clean_images, got 'attacks'"),
        ("models = ", "expected TOML, got an error"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    with pytest.raises(DebackdoorError, match=f"matrix.toml: {message}"):
        read_matrix(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DebackdoorError, match=r"no\.toml: expected a matrix, got an error \(No such file"):
        read_matrix(tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DebackdoorError, match="not text in UTF-8"):
        read_matrix(tmp_path / "bytes.toml")


def test_a_model_that_is_not_there_is_refused_with_those_that_are(small_zoo: Zoo) -> None:
    zoo = small_zoo[0] / "tiny"
    for name in ("blend", "x*"):
        with pytest.raises(DebackdoorError, match=r"expected models out of clean-1, patch, shifted, got"):
            Matrix(zoo=zoo, models=["patch", name]).cells()
    with pytest.raises(DebackdoorError, match="expected a folder with a zoo's cards, got none"):
        Matrix(zoo=zoo / "no").cells()
