"""The set-up's choices, the pins and the Makefile's command lines; nothing is installed here."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; mypy brings this one
    import tomli as tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PINS = {name: ROOT / "constraints" / f"{name}.txt" for name in ("cpu", "jetpack6-py310")}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"scripts_{name}", ROOT / "scripts" / f"{name}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup: Any = load("setup")


def choose(**facts: Any) -> Any:
    return setup.choose(setup.Machine(**{"python": (3, 11), **facts}))


def test_without_a_gpu_torch_comes_from_the_ordinary_index() -> None:
    choice = choose()
    assert (choice.torch, choice.source, choice.cuda) == ("2.13.0", "", False)
    assert choice.pins == "constraints/cpu.txt"


def test_a_gpu_asks_for_a_cuda_build() -> None:
    choice = choose(gpu="NVIDIA RTX 4070")
    assert (choice.torch, choice.source, choice.cuda) == ("2.13.0", "", True)
    assert "RTX 4070" in choice.why


def test_jetpack_6_takes_its_own_torch_and_pins() -> None:
    choice = choose(python=(3, 10), jetson="NVIDIA Jetson Orin Nano", gpu="Orin (nvgpu)")
    assert (choice.torch, choice.source) == ("2.8.0", "https://pypi.jetson-ai-lab.io/jp6/cu126")
    assert choice.jetpack and choice.cuda
    assert choice.pins == "constraints/jetpack6-py310.txt"


@pytest.mark.parametrize(
    ("facts", "torch"),
    [
        ({}, "2.13.0"),
        ({"gpu": "any"}, "2.13.0"),
        ({"python": (3, 10), "jetson": "a Jetson"}, "2.8.0"),
        ({"python": (3, 12), "jetson": "a Jetson"}, "2.13.0"),  # JetPack 7
    ],
)
def test_torch_index_overrides_without_being_shown(facts: dict[str, Any], torch: str) -> None:
    index = "https://user:secret@example.org/simple"
    choice = choose(torch_index=index, **facts)
    assert (choice.torch, choice.source) == (torch, index)
    assert "secret" not in choice.why


def test_torch_index_holds_until_another_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "TORCH_INDEX", tmp_path / "torch.index")
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    assert setup.torch_index() == ""
    setup.remember_torch_index("https://example.org/cpu")
    assert setup.torch_index() == "https://example.org/cpu"
    assert setup.TORCH_INDEX.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("TORCH_INDEX", "")
    assert setup.torch_index() == ""


def test_a_jetson_with_another_python_is_told_what_to_do() -> None:
    with pytest.raises(setup.SetupError, match=r"Python 3\.12[\s\S]*PYTHON=python3\.10"):
        choose(python=(3, 12), jetson="NVIDIA Jetson AGX Orin")


def test_an_unfit_python_is_told_plainly() -> None:
    assert "3.10 to 3.13 is needed, this is 3.8" in setup.unfit_python("3.8")
    assert "apt install python3.11-venv" in setup.unfit_python("3.11", venv_missing=True)


@pytest.mark.parametrize("log, said", [
    ("OSError: [Errno 28] No space left on device", "disk is full"),
    ("WARNING: Retrying (Retry(total=0)) after NewConnectionError\n"
     "ERROR: No matching distribution found for torch==2.13.0", "can't be reached"),
    ("ERROR: No matching distribution found for torch==2.13.0", "doesn't serve torch==2.13.0"),
    ("ERROR: something new", "last lines are above"),
])  # fmt: skip
def test_a_failure_is_put_in_plain_words(
    log: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    setup.LOG.write_text(f"$ pip install a\nConnectionError of yesterday\n$ pip install b\n{log}\n")
    assert said in str(setup.failure(1))


@pytest.mark.parametrize("listed, settings", [
    ("", {}),
    ("global.index-url='https://mirror.example/simple'\n:env:.default-timeout='180'\n",
     {"UV_DEFAULT_INDEX": "https://mirror.example/simple"}),
    (":env:.index-url='https://b.example'\nglobal.index-url='https://a.example'\n"
     "install.trusted-host='a.example\\nb.example'\nglobal.find-links='/wheels\\n/more'\n"
     "list.format='columns'\n",
     {"UV_DEFAULT_INDEX": "https://b.example", "UV_INSECURE_HOST": "a.example b.example",
      "UV_FIND_LINKS": "/wheels,/more"}),
    ("global.no-index='true'\n", None),
    ("install.keyring-provider='subprocess'\n", None),
])  # fmt: skip
def test_uv_is_told_what_pip_is(
    listed: str, settings: dict[str, str] | None, tmp_path: Path
) -> None:
    (tmp_path / "listed").write_text(listed)
    python = program(tmp_path / "python", f"cat {tmp_path}/listed")
    assert setup.uv_settings(setup.pip_settings(python)) == settings


def program(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_what_uv_cannot_do_pip_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the programs: one notes its arguments, and fails as uv."""
    (tmp_path / "bin").mkdir()
    note = f'echo "$*" >> {tmp_path}/called'
    python = program(tmp_path / "bin" / "python", note, 'case "$*" in *" uv pip "*) exit 1; esac')
    program(tmp_path / "bin" / "uv")
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    monkeypatch.setattr(setup, "venv_python", lambda: python)
    for wanted in ("one==1", "two==2"):
        setup.install(0, "--no-deps", wanted)
    listed, *made = (tmp_path / "called").read_text().splitlines()
    assert listed.endswith("pip config list"), "asked once"
    assert [line.split()[-1] for line in made] == ["one==1", "one==1", "two==2", "two==2"]
    assert ["-m uv pip install" in line for line in made] == [True, False, True, False]


def test_a_terminal_sees_that_a_step_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with setup.step("quiet"):
        pass
    assert capsys.readouterr().out == "  quiet ... 0 s\n"
    monkeypatch.setattr(setup, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(setup, "received", iter(range(0, 10**12, 312_000_000)).__next__)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with setup.step("torch"):
        time.sleep(0.3)
    shown = capsys.readouterr().out
    assert "torch ... 0 s, 312 MB arrived" in shown and "624 MB" in shown
    assert shown.endswith("\r  torch ... \x1b[K0 s\n")


# --- pins ---


def pinned(name: str) -> list[Requirement]:
    lines = PINS[name].read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", PINS)
def test_pins_are_exact_and_name_no_place(name: str) -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pinned(name))
    assert not any(pin.url for pin in pinned(name))
    text = PINS[name].read_text()
    assert not re.search(r"://|--[a-z-]*(index|find-links)|(^|\s)/|nvidia-|triton", text, re.M)


@pytest.mark.parametrize("name", PINS)
def test_pins_cover_what_the_project_asks(name: str) -> None:
    versions: dict[str, list[str]] = {}
    for pin in pinned(name):
        versions.setdefault(setup.canonical(pin.name), []).append(str(pin.specifier)[2:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = project["optional-dependencies"]["dev"] if name == "cpu" else []  # none on a board
    for wanted in map(Requirement, project["dependencies"] + tools):
        found = versions.get(setup.canonical(wanted.name), [])
        assert found, f"{wanted.name} has no pin"
        assert all(wanted.specifier.contains(version) for version in found), wanted


def test_the_boards_pins_are_what_its_python_and_wheels_need() -> None:
    versions = {pin.name: str(pin.specifier)[2:] for pin in pinned("jetpack6-py310")}
    assert versions["torch"] == "2.8.0"
    assert versions["transformers"] == "5.20.2"
    assert versions["numpy"].startswith("1.")
    assert not any(pin.marker for pin in pinned("jetpack6-py310"))


# --- Makefile ---


def make(*arguments: str) -> str:
    if not shutil.which("make"):
        pytest.skip("make is not here")
    command = ["make", "-n", "-C", str(ROOT), "--no-print-directory", *arguments]
    env = {"PATH": os.environ["PATH"]}  # not what an outer make was given
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return run.stdout


def test_finetune_hands_recipe_and_settings_to_the_command_line() -> None:
    line = make("finetune", "RECIPE=recipes/my own.yaml", "SET=lora.rank=32 data.train=it's.json")
    assert line.splitlines()[0] == "python3 scripts/setup.py"
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line.splitlines()[1].removeprefix('exec ')}"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert words == [
        ".venv/bin/jetson-ft", "train", "recipes/my own.yaml",
        "--set", "lora.rank=32", "--set", "data.train=it's.json",
    ]  # fmt: skip


def test_without_a_recipe_the_command_line_chooses() -> None:
    assert make("finetune").splitlines()[1] == "exec .venv/bin/jetson-ft train"
    assert make("chat", "RUN=abc").splitlines()[1] == "exec .venv/bin/jetson-ft chat 'abc'"


def test_every_target_sets_up_first() -> None:
    for target in ("finetune", "chat", "test", "lint", "test-fast", "test-compat"):
        assert "scripts/setup.py" in make(target).splitlines()[0]


def test_set_up_starts_on_this_python() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "setup.py"), "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
