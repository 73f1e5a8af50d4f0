"""A finished run put to use: talked with, and measured again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.inference.generate import Sampling
from jetson_ft.models import resolve
from jetson_ft.recipe import Recipe
from jetson_ft.runs import rundir
from jetson_ft.runs.rundir import Run
from jetson_ft.runs.talk import _base_of, begin, evaluate_run, find


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine is fast at."""
    from jetson_ft.device.probe import Device

    monkeypatch.setattr(Device, "precision", lambda self, wanted: "fp32")


def open_run(name: str, root: Path, **more: str) -> Any:
    return begin(find(name, root, **more))


def newest(finished: Run, tmp_path: Path) -> Path:
    """A runs root with the finished run in it and, later, one without an adapter."""
    root = tmp_path / "runs"
    shutil.copytree(finished.path, root / finished.name)
    (root / finished.name).rename(root / "20000101-000000-old")
    rundir.create(Recipe(output=str(root)), "new").write_state("queued")
    return root


@pytest.mark.parametrize("name", ["latest", "20000101-000000-old"])
def test_latest_is_the_newest_run_that_has_an_adapter(
    finished: Run, tmp_path: Path, name: str
) -> None:
    root = newest(finished, tmp_path)
    opened, title = open_run(name, root)
    assert opened.has_adapter
    assert str(root / "20000101-000000-old" / "adapter") in title and "fp32" in title
    assert "".join(opened.reply("你好", Sampling(max_new_tokens=3)))


def test_a_run_without_adapter_says_its_state(finished: Run, tmp_path: Path) -> None:
    root = newest(finished, tmp_path)
    with pytest.raises(UserError, match=r"has no adapter yet \(queued\)"):
        open_run(rundir.list_runs(root)[0].name, root)


def test_without_any_adapter_the_way_to_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter to talk with yet") as caught:
        open_run("latest", tmp_path)
    assert "chat base" in caught.value.fix


def test_any_base_is_talked_with_alone(tmp_path: Path, tiny_llama: Path) -> None:
    opened, title = open_run(str(tiny_llama), tmp_path)
    assert not opened.has_adapter and title.startswith(f"{tiny_llama} (fp32")


def test_names_of_bases_are_told_from_those_of_runs(
    finished: Run, tiny_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "runs").mkdir()
    bases = ["base", "embedded", "microsoft/phi-1_5", tiny_phi, tmp_path, tmp_path / "model.gguf"]
    others = [finished.name, finished.path, finished.adapter, "latest", "a-deleted-one",
              tmp_path / "runs" / "gone", "~nobody-here/x"]  # fmt: skip
    assert all(resolve.is_base(str(name)) for name in bases)
    assert not any(resolve.is_base(str(name)) for name in others)
    monkeypatch.chdir(tmp_path)
    assert not resolve.is_base("runs/gone"), "a path, even where there is no such run"
    (tmp_path / "base").mkdir()
    assert resolve.is_base("base"), "a folder of that name changes nothing"


def test_an_adapter_folder_finds_its_base(finished: Run, tmp_path: Path, tiny_phi: Path) -> None:
    opened, title = open_run(str(finished.adapter), tmp_path)
    assert opened.has_adapter and title.startswith(str(tiny_phi))


def test_a_foreign_adapters_base_is_the_one_it_names(finished: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))
    (folder / "base.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    for named, base in (("owner/name", "owner/name"), (None, "embedded")):
        config["base_model_name_or_path"] = named
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert _base_of(folder) == base


def test_an_adapter_of_another_base_is_explained(
    finished: Run, tmp_path: Path, tiny_llama: Path
) -> None:
    with pytest.raises(UserError, match="made for another base"):
        open_run(str(finished.path), tmp_path, model=str(tiny_llama))


def test_the_base_alone(tmp_path: Path, tiny_phi: Path) -> None:
    opened, title = open_run("base", tmp_path, model=str(tiny_phi))
    assert not opened.has_adapter and " with " not in title


def test_an_unknown_format_is_refused_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantize can't be 'int4'"):
        open_run("base", tmp_path, quantize="int4")


def quiet(side: str, part: str, done: int, of: int) -> None:
    """Nobody watches."""


def test_measured_again_a_run_gives_the_figures_of_its_report(finished: Run) -> None:
    report = json.loads((finished.path / "report.json").read_text())["eval"]
    again = evaluate_run(finished, None, quiet)["eval"]
    assert again["rows"] == report["rows"]
    for side in ("before", "after"):
        for key, value in report[side].items():
            expected = value if key == "samples" else pytest.approx(value, rel=1e-4)
            assert again[side][key] == expected


def test_other_rows_can_be_measured_on(finished: Run, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(
        '{"instruction": "你好", "output": "你也好"}\n' * 1
        + '{"instruction": "x", "output": "y"}\n'
    )
    heard: list[Any] = []
    found = evaluate_run(finished, str(path), lambda *told: heard.append(told))
    assert found["eval"]["rows"] == 2
    assert found["eval"]["after"]["samples"][0]["reference"] == "你也好"
    assert {(side, part) for side, part, *_ in heard} == {
        (side, part) for side in ("before", "after") for part in ("tokens", "replies")
    }
    assert [told[2:] for told in heard if told[1] == "replies"] == [(0, 2), (2, 2)] * 2


def test_without_an_adapter_nothing_is_measured(tmp_path: Path) -> None:
    run = rundir.create(Recipe(output=str(tmp_path)), "x")
    run.write_state("queued")
    with pytest.raises(UserError, match="has no adapter yet"):
        evaluate_run(run, None, quiet)
