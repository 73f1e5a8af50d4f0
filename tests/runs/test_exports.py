"""Exports of a run: complete or absent, one at a time, from the right base."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_disk import SmallDisk
from tiny_exports import save_tiny_model
from workbench import wait_for

from jetson_ft import adapter
from jetson_ft.errors import UserError
from jetson_ft.export import merge
from jetson_ft.files import DiskFull, sha256_file
from jetson_ft.hardware import detect
from jetson_ft.models.files import resolve_model
from jetson_ft.models.loading import WeightFormat, load_model, load_tokenizer
from jetson_ft.recipe import LoraRecipe
from jetson_ft.runs import exports, manager
from jetson_ft.runs.exports import find_export, list_exports, make_export
from jetson_ft.runs.store import Run


def copy_run(run: Run, root: Path) -> Run:
    shutil.copytree(run.path, root / run.name)
    return Run(root / run.name)


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A finished run on the tiny Phi, of the test's own."""
    return copy_run(finished, tmp_path / "runs")


def files_of(run: Run) -> list[str]:
    home = run.path / "export"
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


def test_merged_model_is_complete_and_described(run: Run) -> None:
    parts: dict[str, list[int]] = {}
    (folder,) = make_export(
        run, "merged", on_progress=lambda part, done, total: parts.setdefault(part, []).append(done)
    )
    assert folder == run.path / "export" / "merged"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "chat_template.jinja", "check.json", "export.json", "README.md",
    }  # fmt: skip
    export = find_export(run, "merged")
    assert export is not None and list_exports(run) == [export]
    listed = {file["name"]: file for file in export["files"]}
    assert listed.keys() == names - {"export.json"}
    for name, file in listed.items():
        path = folder / name
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256_file(path))
        assert path.stat().st_mode & 0o777 == 0o644
    assert (
        export["base"]["fingerprint"]
        == json.loads((run.adapter / adapter.BASE_FILE).read_text())["fingerprint"]
    )
    assert export["adapter"] == {"sha256": sha256_file(run.adapter / adapter.WEIGHTS_FILE)}
    assert export["merge"]["rows"] == 5 and export["merge"]["dtype"] == "bf16"
    assert 0 < export["merge"]["largest_logit_difference"] < 0.1
    assert export["check"]["passed"] and "transformers" in export["check"]["reader"]
    assert list(parts) == ["reading the rows", "merging", "comparing with the adapter", "writing"]
    assert all(done == sorted(done) and done[0] == 0 for done in parts.values())
    assert not list((run.path / "export").glob(".*"))


def test_export_without_check_needs_no_rows(run: Run, tmp_path: Path) -> None:
    recipe = (run.path / "recipe.yaml").read_text()
    rows = run.recipe().data.train_names()
    (run.path / "recipe.yaml").write_text(recipe.replace(rows, str(tmp_path / "gone.json")))
    with pytest.raises(UserError, match=r"gone\.json"):
        make_export(run, "merged")
    assert files_of(run) == []
    make_export(run, "merged", check=False)
    export = find_export(run, "merged")
    assert export and export["check"] == {"schema": 1, "checked": False}
    assert "largest_logit_difference" not in export["merge"]


def test_new_export_replaces_the_old_one_when_complete(run: Run) -> None:
    make_export(run, "merged", check=False)
    old = (run.path / "export" / "merged" / "model.safetensors").read_bytes()

    def fail(part: str, done: int, total: int) -> None:
        assert (run.path / "export" / "merged" / "model.safetensors").read_bytes() == old
        if part == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_export(run, "merged", dtype="fp16", check=False, on_progress=fail)
    assert [name for name in files_of(run) if "/" not in name] == ["merged"]
    assert find_export(run, "merged")["merge"]["dtype"] == "bf16"  # type: ignore[index]
    make_export(run, "merged", dtype="fp16", check=False)
    assert find_export(run, "merged")["merge"]["dtype"] == "fp16"  # type: ignore[index]
    assert [name for name in files_of(run) if "/" not in name] == ["merged"]


def test_replaced_export_survives_a_power_cut(run: Run) -> None:
    """Between the two renames, neither export has the name."""
    make_export(run, "merged", check=False)
    home = run.path / "export"
    (home / "merged").rename(home / ".replaced-merged")
    with pytest.raises(KeyboardInterrupt):
        make_export(run, "merged", dtype="fp16", check=False, on_progress=interrupt)
    assert find_export(run, "merged")["merge"]["dtype"] == "bf16"  # type: ignore[index]
    shutil.copytree(home / "merged", home / ".replaced-merged")  # or after them
    exports.delete_export(run, "merged")
    assert files_of(run) == []


def interrupt(part: str, done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_failed_rename_keeps_the_replaced_export(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make_export(run, "merged", check=False)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == Path(target).name == "merged":
            raise OSError("no")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match="an error: no"):
            make_export(run, "merged", dtype="fp16", check=False)
    assert find_export(run, "merged")["merge"]["dtype"] == "bf16"  # type: ignore[index]
    assert [name for name in files_of(run) if "/" not in name] == ["merged"]


def test_adapter_that_changes_meanwhile_is_refused(run: Run) -> None:
    def change(part: str, done: int, total: int) -> None:
        if part == "writing":
            tensors = load_file(run.adapter / adapter.WEIGHTS_FILE)
            changed = {name: tensor + 1 for name, tensor in tensors.items()}
            save_file(changed, run.adapter / adapter.WEIGHTS_FILE)

    with pytest.raises(UserError, match=r"adapter of .* has changed while it was exported"):
        make_export(run, "merged", check=False, on_progress=change)
    assert files_of(run) == []


def test_merge_that_lost_the_adapter_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(run.adapter / adapter.WEIGHTS_FILE)
    torch.manual_seed(0)
    changed = {name: tensor + torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(changed, run.adapter / adapter.WEIGHTS_FILE)
    base_only = functools.partial(merge.merge_adapter, apply=False)
    monkeypatch.setattr(merge, "merge_adapter", base_only)
    with pytest.raises(UserError, match=r"not the adapter's: its logits differ by \d"):
        make_export(run, "merged")
    assert files_of(run) == []


def test_run_without_adapter_or_in_training_is_refused(run: Run, finished: Run) -> None:
    with open(run.path / "worker.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is running: its adapter may change"):
            make_export(run, "merged")
    report = run.path / "report.json"
    report.rename(run.path / "kept")  # stopped while base and adapter were compared
    with pytest.raises(UserError, match=r"before its report was written(.|\n)*train --resume"):
        exports.plan_export(run, "merged", ["f16"], True)
    report.write_text("{")
    with pytest.raises(UserError, match=r"report\.json is damaged"):
        make_export(run, "merged")
    shutil.rmtree(run.adapter)
    run.write_state("stopped")
    with pytest.raises(UserError, match=r"has no adapter yet \(stopped\)"):
        make_export(run, "merged")
    assert files_of(run) == []


def test_base_that_is_missing_or_changed_is_refused(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(run.recipe().model, base)
    recipe = (run.path / "recipe.yaml").read_text()
    (run.path / "recipe.yaml").write_text(recipe.replace(run.recipe().model, str(base)))
    make_export(run, "merged", check=False)  # the same files in another place
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    largest = max(tensors, key=lambda name: tensors[name].numel())
    save_file(tensors | {largest: tensors[largest] + 1}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="made for another base"):
        make_export(run, "merged")
    (run.adapter / adapter.BASE_FILE).unlink()
    with pytest.raises(UserError, match="weights have changed since this run began"):
        make_export(run, "merged")
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"Model not found(.|\n)*base"):
        make_export(run, "merged")
    assert find_export(run, "merged")


def test_second_export_and_deletion_are_refused_meanwhile(run: Run) -> None:
    refused = []

    def interfere(part: str, done: int, total: int) -> None:
        if part == "writing":
            for action in (lambda: make_export(run, "merged"), lambda: manager.delete(run)):
                with pytest.raises(UserError, match=r"Another export of .* is at work") as error:
                    action()
                refused.append(error)

    make_export(run, "merged", check=False, on_progress=interfere)
    assert len(refused) == 2 and find_export(run, "merged")
    manager.delete(run)
    assert not run.path.exists()


def stop_in(part: str, path: str) -> None:
    """Export in this process until a part of it begins, then stand still."""

    def wait(name: str, _done: int, _total: int) -> None:
        if name == part:
            Path(path, "reached").touch()
            signal.pause()

    make_export(Run(Path(path)), "merged", on_progress=wait)


@pytest.mark.parametrize("part", ["merging", "comparing with the adapter", "writing"])
def test_killed_export_leaves_nothing_to_the_next(
    part: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = forked.context().Process(target=stop_in, args=(part, str(run.path)))
    process.start()
    wait_for((run.path / "reached").exists, 60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list_exports(run) == [] and not (run.path / "export" / "merged").exists()
    (left,) = (run.path / "export").iterdir()
    os.utime(left, (0, 0))  # as after some seconds
    make_export(run, "merged", check=False)
    assert [path.name for path in (run.path / "export").iterdir()] == ["merged"]


def test_disk_space_is_checked_first(
    run: Run, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "_SMALL_BYTES", 4 * 2**20)
    own = copy_run(run, small_disk.path)
    plan = exports.plan_export(own, "merged", ["f16"], True)
    small_disk.fill(leave=plan.disk - 2**20)
    with pytest.raises(DiskFull, match="the export with its intermediate files needs"):
        make_export(own, "merged")
    assert files_of(own) == []


@pytest.mark.parametrize(
    ("part", "leave"),
    [("merging", 0), ("comparing with the adapter", 0), ("comparing with the adapter", 1 << 14),
     ("writing", 0)],
)  # fmt: skip
def test_disk_that_fills_up_meanwhile(
    part: str, leave: int, run: Run, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy_run(run, small_disk.path)
    monkeypatch.setattr(exports, "_SMALL_BYTES", 0)

    def fill(name: str, done: int, total: int) -> None:
        if name == part and done == 0:
            small_disk.fill(leave)

    with pytest.raises(UserError, match="disk is full"):
        make_export(own, "merged", on_progress=fill)
    assert files_of(own) == []
    small_disk.empty()
    make_export(own, "merged")
    assert list_exports(own)


def test_memory_is_planned(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = exports.plan_export(run, "merged", ["f16"], True)
    assert plan.precision == "fp32" and plan.memory < plan.memory_free
    short = replace(detect.detect_device(), memory_available=2**20)
    monkeypatch.setattr(detect, "detect_device", lambda: short)
    with pytest.raises(
        UserError, match=r"needs \d\.\d GiB of memory; 0\.0 GiB are free(.|\n)*no-check"
    ):
        make_export(run, "merged")
    with pytest.raises(UserError) as error:
        make_export(run, "merged", check=False)
    assert "no-check" not in str(error.value)
    assert files_of(run) == []


def test_plan_has_what_the_adapter_alone_needs(run: Run) -> None:
    adapter_bytes = (run.adapter / adapter.WEIGHTS_FILE).stat().st_size
    parameters = sum(
        tensor.numel()
        for tensor in load_file(Path(run.recipe().model, "model.safetensors")).values()
    )
    checked, unchecked = (
        exports.plan_export(run, "lora", ["f16"], check) for check in (True, False)
    )
    assert unchecked.disk == exports._SMALL_BYTES + adapter_bytes
    assert checked.disk - unchecked.disk == 4 * parameters  # the base as fp16, and as GGUF
    assert unchecked.memory < checked.memory


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "onnx"}, r"can't be 'onnx'(.|\n)*--format(.|\n)*merged, gguf, lora"),
        ({"kind": "gguf", "quantize": ["f16", "q9"]}, r"can't be 'q9'(.|\n)*--quantize(.|\n)*q8_0"),
        ({"kind": "gguf", "quantize": []}, "can't be empty"),
        ({"kind": "merged", "dtype": "int8"}, "can't be 'int8'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], text: str, run: Run) -> None:
    with pytest.raises(UserError, match=text):
        make_export(run, **options)
    assert not (run.path / "export").exists()


def test_damaged_export_is_left_out_of_the_list(run: Run) -> None:
    make_export(run, "merged", check=False)
    (run.path / "export" / "other").mkdir()
    (run.path / "export" / "other" / "export.json").write_text("[]")
    assert [export["name"] for export in list_exports(run)] == ["merged"]
    with pytest.raises(UserError, match=r"export\.json"):
        find_export(run, "other")
    assert find_export(run, "gguf-f16") is None


def test_export_has_the_name_of_its_folder(run: Run) -> None:
    """The page makes addresses of it."""
    (folder,) = make_export(run, "merged", check=False)
    file = folder / "export.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "name": "x/../../../other"}))
    assert [export["name"] for export in list_exports(run)] == ["merged"]


@pytest.mark.parametrize("kind", ["gguf", "lora"])
def test_what_gguf_cannot_express_is_refused_before_anything_is_written(
    kind: str, run: Run
) -> None:
    """llama.cpp's converter knows a tokenizer by its hash, and not that of the tiny model."""
    with pytest.raises(UserError, match=r"doesn't know this tokenizer(.|\n)*--format merged"):
        make_export(run, kind)
    config = run.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    if kind == "lora":
        with pytest.raises(UserError, match=r"DoRA(.|\n)*--format gguf"):
            make_export(run, kind)
    assert files_of(run) == []


@pytest.fixture
def convertible_run(run: Run, tmp_path: Path) -> Run:
    """A finished run on a small model with a tokenizer that the converter knows."""
    base = resolve_model(str(save_tiny_model(tmp_path / "model", "llama")))
    recipe = (run.path / "recipe.yaml").read_text()
    (run.path / "recipe.yaml").write_text(recipe.replace(run.recipe().model, base.name))
    (run.path / "data.json").unlink()
    shutil.rmtree(run.adapter)
    model = load_model(base, WeightFormat("bf16"), "cpu")
    lora = LoraRecipe(rank=2, target_modules=["q_proj", "v_proj"])
    model = adapter.attach_adapter(model, lora, 0)
    adapter.save_adapter(model, load_tokenizer(base), base, run.adapter)
    return run


@pytest.mark.slow(minutes=0.3)
def test_gguf_of_several_types_shares_one_merge(convertible_run: Run) -> None:
    parts: list[str] = []
    folders = make_export(
        convertible_run, "gguf", quantize=["q4_0", "f16"], check=False,
        on_progress=lambda part, done, total: None if part in parts else parts.append(part),
    )  # fmt: skip
    home = convertible_run.path / "export"
    assert folders == [home / "gguf-q4_0", home / "gguf-f16"]
    assert parts == ["merging", "converting", "writing", "quantising q4_0"]
    for folder in folders:
        (path,) = folder.glob("*.gguf")
        assert path.name == f"{convertible_run.label}-{folder.name.removeprefix('gguf-')}.gguf"
        assert path.read_bytes()[:4] == b"GGUF"
        assert f"FROM ./{path.name}\n" in (folder / "Modelfile").read_text()
        export = find_export(convertible_run, folder.name)
        assert export and export["merge"]["dtype"] == "fp16"
        assert {file["name"] for file in export["files"]} == {
            path.name, "Modelfile", "README.md", "check.json",
        }  # fmt: skip
    (lora,) = make_export(convertible_run, "lora", check=False)
    assert [path.name for path in lora.glob("*.gguf")] == [f"{convertible_run.label}-lora.gguf"]
    assert sorted(path.name for path in home.iterdir()) == ["gguf-f16", "gguf-q4_0", "lora"]
