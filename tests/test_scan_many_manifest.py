"""Manifests: what is read from them, and one sentence for everything that is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from debackdoor.bench.manifest import read_manifest
from debackdoor.errors import DataError

HEAD = "path,arch,clean"
ROW = "a.pt,resnet18,digits"


def written(folder: Path, text: str | bytes, name: str = "models.csv") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def parquet(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "models.parquet")
    return folder / "models.parquet"


def test_every_column(tmp_path: Path) -> None:
    head = "name,seed,limit,std,mean,num_classes,clean,arch,path,owner"
    row = '007,3,60,0.5 0.25 1,"0.1,0.2,0.3",10,images,nets/net.py:make,sub/a.pt,me'
    (entry,) = read_manifest(written(tmp_path, f"{head}\n{row}\n"))
    assert (entry.name, entry.path, entry.arch) == ("007", f"{tmp_path}/sub/a.pt", f"{tmp_path}/nets/net.py:make")
    assert (entry.clean, entry.num_classes, entry.limit, entry.seed) == (f"{tmp_path}/images", 10, 60, 3)
    assert (entry.mean, entry.std) == ((0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    assert entry.as_given == ("sub/a.pt", "nets/net.py:make")


def test_what_may_be_left_out(tmp_path: Path) -> None:
    first, second = read_manifest(written(tmp_path, f"{HEAD},seed\n{ROW},\nb/my model (2).pt,vgg11,./digits,5\n"))
    assert (first.name, second.name) == ("a", "my-model-2")
    assert (first.num_classes, first.mean, first.std, first.limit, first.seed) == (None,) * 5
    assert second.seed == 5


def test_only_relative_paths_begin_at_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "/x/a.pt,hf:dir,digits", "b.pt,timm:resnet18,cifar10", "c.pt,pkg.net:make,/y", "d.pt,/z/n.py:f,./digits"
    written(tmp_path, "\n".join((HEAD, *rows)))
    monkeypatch.chdir(tmp_path)
    entries = read_manifest("models.csv")
    assert [entry.path for entry in entries] == ["/x/a.pt", *(f"{tmp_path}/{name}.pt" for name in "bcd")]
    assert [entry.arch for entry in entries] == [f"hf:{tmp_path}/dir", "timm:resnet18", "pkg.net:make", "/z/n.py:f"]
    assert [entry.clean for entry in entries] == ["digits", "cifar10", "/y", f"{tmp_path}/digits"]


def test_parquet_has_its_own_types(tmp_path: Path) -> None:
    path = parquet(
        tmp_path,
        path=["a.pt", "b.pt"],
        arch=["resnet18"] * 2,
        clean=["digits"] * 2,
        name=[1, 2],
        num_classes=pa.array([10.0, float("nan")]),
        mean=[[0.1, 0.2, 0.3], None],
        std=[[0.5, 0.5, 0.5], None],
        limit=pa.array([None, 60], pa.int32()),
        downloads=[1, 2],
    )
    first, second = read_manifest(path)
    assert (first.name, first.num_classes, first.mean, first.limit) == ("1", 10, (0.1, 0.2, 0.3), None)
    assert (second.name, second.num_classes, second.mean, second.limit) == ("2", None, None, 60)


@pytest.mark.parametrize(
    "text", ["\ufeff" + HEAD + "\n" + ROW, HEAD + "\r\n" + ROW + "\r\n", HEAD + "\n\n" + ROW + "\n\n"]
)
def test_csv_as_programs_write_it(tmp_path: Path, text: str) -> None:
    (entry,) = read_manifest(written(tmp_path, text))
    assert (entry.name, entry.arch, entry.clean) == ("a", "resnet18", "digits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a manifest of models, got an error (Empty CSV file); check the file"),
        (b"\xff\xfe\x00", "expected a manifest of models, got an error"),
        (f"{HEAD}\na.pt,resnet18\n", "got an error (CSV parse error: Expected 3 columns, got 2: a.pt,resnet18)"),
        ("path,arch,clean\nä,b,c\n".encode("latin-1"), "invalid UTF8"),
        ("path,arch,clean,größe\na,b,c,1\n".encode("latin-1"), "expected a manifest of models, got an error"),
        (f"{HEAD}\n{ROW}\n".encode("utf-16"), "expected a manifest of models, got an error"),
        (HEAD, "expected a manifest of models, got an error"),
        (f"{HEAD}\n", "expected at least one model, got none; add a row for each"),
        ("path,clean\na,b\n", "expected the columns path, arch, clean, got no arch among path, clean; add it"),
        ("path;arch;clean\na;b;c\n", "got no path among path;arch;clean"),
        (f"{HEAD},path\n{ROW},b\n", "expected one column path, got 2; remove all but one"),
        (f"{HEAD},classes\n{ROW},10\n", "got 'classes'; did you mean 'num_classes'?"),
        (f"{HEAD},Seed\n{ROW},1\n", "got 'Seed'; did you mean 'seed'?"),
        (f"{HEAD}\n{ROW}\nb.pt,,digits\n", "row 2, column arch: expected an architecture such as resnet18, got no"),
        (f"{HEAD}\n{ROW}\n ,resnet18,digits\n", "row 2, column path: expected a checkpoint's path, got nothing"),
        (f"{HEAD}\n{ROW}\nb.pt,resnet18,\n", "row 2, column clean: expected a folder or file of clean images"),
        (f"{HEAD}\n{ROW}\nx/a.pt,resnet18,digits\n", "row 2, column name: expected a name of its own, got 'a' as"),
        (f"{HEAD},name\n{ROW},m\nb,c,d,M\n", "row 2, column name: expected a name of its own, got 'M' as in row 1"),
        (f"{HEAD},name\n{ROW},../m\n", "row 1, column name: expected a name of letters, digits, - . and _"),
        (f"{HEAD},name\n{ROW},{101 * 'm'}\n", "row 1, column name: expected a name of letters"),
        (f"{HEAD},seed\n{ROW},-1\n", "row 1, column seed: expected a whole number from 0 to 2147483647, got '-1'"),
        (f"{HEAD},seed\n{ROW},1.5\n", "row 1, column seed: expected a whole number from 0 to 2147483647, got '1.5'"),
        (f"{HEAD},limit\n{ROW},0\n", "row 1, column limit: expected a whole number of at least 1, got '0'"),
        (f"{HEAD},limit\n{ROW},inf\n", "row 1, column limit: expected a whole number of at least 1, got 'inf'"),
        (f"{HEAD},num_classes\n{ROW},ten\n", "row 1, column num_classes: expected a whole number of at least 2, got"),
        (f"{HEAD},num_classes\n{ROW},1\n", "row 1, column num_classes: expected a whole number of at least 2, got '1'"),
        (f"{HEAD},mean,std\n{ROW},0.5;0.5,0.5\n", "row 1, column mean: expected numbers such as 0.49,0.48,0.45, got '"),
        (f"{HEAD},mean,std\n{ROW},nan,0.5\n", "row 1, column mean: expected numbers such as"),
        (f"{HEAD},mean,std\n{ROW},0.5,0\n", "row 1, column std: expected numbers above 0 such as"),
        (f"{HEAD},mean\n{ROW},0.5\n", "row 1, column std: expected mean and std together, got no std; give"),
        (f"{HEAD},mean,std\n{ROW},,0.5\n", "row 1, column mean: expected mean and std together, got no mean"),
        (f"{HEAD},mean,std\n{ROW},0 0 0,1 1\n", "row 1, column std: expected 3 numbers as in mean, got 2; correct one"),
    ],
)  # fmt: skip
def test_bad_csv(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"clean": [None]}, "row 1, column clean: expected a folder or file of clean images"),
        ({"arch": [18]}, "row 1, column arch: expected an architecture such as resnet18, got 18; correct it"),
        ({"seed": [True]}, "row 1, column seed: expected a whole number from 0 to 2147483647, got True"),
        ({"limit": [60.5]}, "row 1, column limit: expected a whole number of at least 1, got 60.5"),
        ({"limit": [[60]]}, "row 1, column limit: expected a whole number of at least 1, got [60]"),
        ({"mean": [[]], "std": [[1.0]]}, "row 1, column mean: expected numbers such as 0.49,0.48,0.45, got []"),
        ({"mean": [[None]], "std": [[1.0]]}, "row 1, column mean: expected numbers such as"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = parquet(tmp_path, **{"path": ["a.pt"], "arch": ["resnet18"], "clean": ["digits"], **columns})
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert f"{path} {message}" in str(caught.value)


def test_parquet_text_in_another_encoding(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"mod\xe8le.pt"]).buffers())
    path = tmp_path / "models.parquet"
    pq.write_table(pa.table({"path": texts, "arch": ["resnet18"], "clean": ["digits"]}), path)
    with pytest.raises(DataError, match=r"models.parquet: expected a manifest of models, got an error \('utf-8' codec"):
        read_manifest(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"models.txt: expected a .csv or .parquet file, got another suffix"):
        read_manifest(tmp_path / "models.txt")
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(DataError, match=f"{name}: expected a manifest of models, got no such file; check the path"):
            read_manifest(tmp_path / name)
    with pytest.raises(DataError, match="expected a manifest of models, got an error"):
        read_manifest(written(tmp_path, "path,arch,clean", "text.parquet"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="expected a manifest of models, got a folder or device"):
        read_manifest(tmp_path / "folder.csv")
