"""The recipe that is taken when nobody named one."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jetson_ft import cli, hub
from jetson_ft import recipe as recipes
from jetson_ft.runs import choice


@pytest.mark.parametrize(
    ("gpu", "reachable", "name", "words"),
    [
        (True, True, "phi-1_5-zh-quick", "at most 60 minutes"),
        (True, False, "quickstart-zh", "out of reach"),
        (False, True, "quickstart-zh", "no CUDA GPU here"),
        (False, False, "quickstart-zh", "no CUDA GPU here"),
    ],
)
def test_the_choice_follows_the_machine_and_says_why(
    gpu: bool, reachable: bool, name: str, words: str
) -> None:
    chosen, why = choice.choose_recipe(lambda: gpu, lambda: reachable)
    assert chosen == name
    assert words in why
    assert "\n" not in why


def test_the_address_that_is_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    _, why = choice.choose_recipe(lambda: True, lambda: False)
    assert "https://mirror.example" in why


def test_without_a_gpu_the_hub_is_not_asked() -> None:
    def never() -> bool:
        raise AssertionError("asked")

    choice.choose_recipe(lambda: False, never)


def test_what_may_be_chosen_is_shipped_and_keeps_its_word() -> None:
    assert recipes.load("quickstart-zh").model == "embedded"
    quick = recipes.load("phi-1_5-zh-quick")
    assert quick.model == "microsoft/phi-1_5"
    assert 0 < quick.train.max_minutes <= 60


def test_without_arguments_the_command_line_says_what_it_chose_and_how_to_choose_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice.choose_recipe, "__defaults__", (lambda: True, lambda: True))
    assert cli._chosen() == "phi-1_5-zh-quick"
    (line,) = capsys.readouterr().out.splitlines()
    for words in ("phi-1_5-zh-quick", "a CUDA GPU and the hub in reach", "RECIPE=", "train NAME"):
        assert words in line


def test_the_real_probes_are_what_is_asked_by_default() -> None:
    assert choice.choose_recipe.__defaults__ == (choice.has_cuda_gpu, hub.reachable)


def test_no_gpu_is_seen_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from jetson_ft.runs import choice; choice._GPU_NODES = ();"
        "print(choice.has_cuda_gpu(), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("usable", [True, False])
@pytest.mark.parametrize("sign", ["node", "program"])
def test_where_the_system_shows_a_gpu_torch_decides(
    sign: str, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    program = tmp_path / "nvidia-smi"
    program.touch()
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path if sign == "program" else tmp_path / "none"))
    monkeypatch.setattr(choice, "_GPU_NODES", (str(program),) if sign == "node" else ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    assert (shutil.which("nvidia-smi") is not None) == (sign == "program")
    assert choice.has_cuda_gpu() is usable
