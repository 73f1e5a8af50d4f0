"""From the name of a source to its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from row_files import ROWS, as_json, write

from jetson_ft import hub
from jetson_ft.data import sources
from jetson_ft.data.sources import resolve_source
from jetson_ft.errors import UserError


def test_bundled_and_file_are_resolved(tmp_path: Path) -> None:
    for name, bundled in sources.BUNDLED.items():
        assert resolve_source(name).files == (bundled.train,)
    path = write(tmp_path, "a.json", "[]")
    assert resolve_source(str(path)).files == (path,)


def test_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "train_zh.json", "[]")
    with pytest.raises(UserError, match="Data file not found") as caught:
        resolve_source(str(tmp_path / "trian_zh.json"))
    assert f"Did you mean `{tmp_path / 'train_zh.json'}`?" in str(caught.value.fix)


def test_folder_is_refused_with_its_data_files(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "")
    with pytest.raises(UserError, match="folder") as caught:
        resolve_source(str(tmp_path))
    assert "a.jsonl" in str(caught.value.fix)


@pytest.mark.parametrize("name", ["no/such.json", "x" * 5000, "a\0b", "~nobody/x", "/no/x/y.csv"])
def test_unusable_name_is_refused(name: str) -> None:
    with pytest.raises(UserError):
        resolve_source(name)


class FakeHub:
    """Stands in for the hub: a list of files, and a folder to fetch them into."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
        self.folder, self.fetched = folder, []
        monkeypatch.chdir(folder)
        monkeypatch.setattr(hub, "list_files", lambda repo, kind: files)
        monkeypatch.setattr(hub, "fetch", self.fetch)

    def fetch(self, repo: str, kind: str, patterns: list[str]) -> Path:
        assert kind == "dataset"
        self.fetched += patterns
        for pattern in patterns:
            (self.folder / pattern).parent.mkdir(parents=True, exist_ok=True)
            write(self.folder, pattern, as_json(ROWS))
        return self.folder


@pytest.mark.parametrize(
    ("files", "name", "chosen"),
    [
        (["README.md", "dataset_infos.json", "zh.json"], "o/n", ["zh.json"]),
        (["test.json", "train.json"], "o/n", ["train.json"]),
        (["pictures.zip", "rows.jsonl.gz", "archive.tar.gz"], "o/n", ["rows.jsonl.gz"]),
        (["README.md", "rows.zip"], "o/n", ["rows.zip"]),
        (["constraints.json", "train.json"], "o/n", ["train.json"]),
        (
            ["d/train-00000-of-00002.parquet", "d/train-00001-of-00002.parquet", "d/test.parquet"],
            "o/n",
            ["d/train-00000-of-00002.parquet", "d/train-00001-of-00002.parquet"],
        ),
        (["a.json", "d/b.txt"], "o/n/d/b.txt", ["d/b.txt"]),
        (["notes.txt", "rows.jsonl"], "o/n", ["rows.jsonl"]),
        (["README.md", "test.txt", "train.txt"], "o/n", ["train.txt"]),
    ],
)
def test_hub_files_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], name: str, chosen: list[str]
) -> None:
    server = FakeHub(tmp_path, monkeypatch, files)
    source = resolve_source(name)
    assert source.name == name
    assert server.fetched == chosen
    assert source.files == tuple(tmp_path / file for file in chosen)


@pytest.mark.parametrize(
    ("files", "name", "what"),
    [
        (["a.json", "b.json"], "o/n", "has several files: a.json, b.json"),
        (["README.md"], "o/n", "no file of a supported type"),
        (["a.json"], "o/n/b.json", "File 'b.json' not found in this data set. Its files: a.json"),
        ([f"{number}.csv" for number in range(30)], "o/n", "and 10 more"),
    ],
)
def test_ambiguous_hub_data_set_is_refused_with_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], name: str, what: str
) -> None:
    FakeHub(tmp_path, monkeypatch, files)
    with pytest.raises(UserError, match=what):
        resolve_source(name)
