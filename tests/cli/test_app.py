"""The program: help, bad input, errors and exit codes."""

from __future__ import annotations

import resource
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from program import Done, assert_refused, invoke, run
from typer.testing import CliRunner

from jetson_ft import __version__, cli
from jetson_ft import recipe as recipes
from jetson_ft.cli.app import app

HEAVY = (
    "torch", "gradio", "transformers", "peft", "datasets", "pydantic", "numpy", "pandas", "pyarrow",
    "huggingface_hub", "yaml", "jinja2", "accelerate", "sacrebleu",
)  # fmt: skip
Jetson = Callable[..., Done]


def closed_port() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_help_is_instant(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help", cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # The processor's time, so that a busy machine doesn't count.
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert statistics.median(seconds) < 0.5


@pytest.mark.parametrize(
    ("arguments", "own"),
    # typer itself takes pydantic to describe a command's options, where that is installed
    [(["--help"], set()), (["train", "--help"], {"pydantic"}), (["chat", "-h"], {"pydantic"})],
)
def test_help_loads_nothing_heavy(arguments: list[str], own: set[str]) -> None:
    code = (
        "import sys; from jetson_ft import cli; sys.argv[0] = 'jetson-ft'\n"
        "try: cli.main()\n"
        f"finally: print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert set(done.stderr.split()) <= own
    assert "Usage" in done.stdout


def test_help_lists_every_command() -> None:
    help_text = invoke("--help")
    for command in ("train", "plan", "chat", "eval", "data", "recipe", "runs", "doctor"):
        assert command in help_text
    for group, commands in {
        "data": ["inspect"],
        "recipe": ["show", "validate", "schema"],
        "runs": ["list", "show", "describe", "zip", "delete"],
    }.items():
        text = invoke(group, "--help")
        assert all(command in text for command in commands)


def test_version_is_printed() -> None:
    assert invoke("--version") == f"jetson-ft {__version__}\n"


def _broken_files(folder: Path) -> None:
    (folder / "empty.json").touch()
    (folder / "none.json").write_text("[]")
    (folder / "other.jsonl").write_text('{"foo": 1}\n')
    (folder / "picture.json").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / "bad.yaml").write_text("lora:\n  rank: 0\n  rnak: 3\ntrain: {learning_rate: -1e-4}\n")
    (folder / "model").mkdir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.yaml"], ["gone.yaml", "quickstart-zh"]),
        (["bad.yaml"], ["3 mistakes", "line 2: `lora.rank`: must be at least 1", "line 3: unknown",
                        "line 4: `train.learning_rate`: must be greater than 0", "bad.yaml"]),
        (["quickstart-zh", "--set", "lora.rank=0"], ["--set: `lora.rank`: must be at least 1"]),
        (["quickstart-zh", "--set", "train.learning_rate=-1e-3"], ["must be greater than 0"]),
        (["quickstart-zh", "--set", "lora.rnak=8"], ["did you mean `lora.rank`?"]),
        (["quickstart-zh", "--set", "data.train=gone.json"], ["gone.json"]),
        (["quickstart-zh", "--set", "data.heldout=gone.json"], ["gone.json"]),
        (["quickstart-zh", "--set", "data.train=empty.json"], ["0 rows", "empty.json"]),
        (["quickstart-zh", "--set", "data.train=none.json"], ["0 rows", "none.json"]),
        (["quickstart-zh", "--set", "data.train=other.jsonl"], ["no known layout", "`foo`"]),
        (["quickstart-zh", "--set", "data.train=picture.json"], ["encoding", "picture.json"]),
        (["quickstart-zh", "--set", "model=./gone"], ["./gone"]),
        (["quickstart-zh", "--set", "model=model"], ["No weights", "Safetensors"]),
        (["quickstart-zh", "--set", "output_dir=empty.json/runs"], ["empty.json/runs"]),
        (["quickstart-zh", "--set", "output_dir=/proc/runs"], ["/proc/runs"]),
        (["--resume", "gone"], ["gone"]),
        (["quickstart-zh", "--resume", "x"], ["keeps its own recipe"]),
        (["--resume", "x", "--dry-run"], ["can't be combined"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_one_message_and_leaves_no_files(
    arguments: list[str], words: list[str], jetson: Jetson, tmp_path: Path
) -> None:
    _broken_files(tmp_path / "here")
    before = sorted((tmp_path / "here").rglob("*"))
    assert_refused(jetson("train", *arguments), *words)
    assert sorted((tmp_path / "here").rglob("*")) == before


@pytest.mark.parametrize("key", ["model", "data.train"])
def test_unreachable_hub_is_refused_with_what_works_offline(
    key: str, jetson: Jetson, tmp_path: Path
) -> None:
    address = closed_port()
    done = jetson(
        "train", "quickstart-zh", "--set", f"{key}=owner/name",
        HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"), no_proxy="*",
    )  # fmt: skip
    assert_refused(done, address, "HF_ENDPOINT", "HF_TOKEN", "offline")
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        with pytest.raises(OSError), open(place / "filling", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_full_disk_is_refused_and_holds_no_part_of_a_run(full_disk: Path, jetson: Jetson) -> None:
    runs = full_disk / "runs"
    done = jetson("train", "quickstart-zh", "--set", f"output_dir={runs}")
    assert_refused(done, "The disk is full", str(runs), "--set output_dir=FOLDER")
    assert [path.name for path in full_disk.rglob("*") if path.name != "runs"] == ["filling"]
    assert jetson("runs", "list", "--runs", str(runs)).stdout.startswith("No runs")


def test_full_cache_is_refused(full_disk: Path, jetson: Jetson, tmp_path: Path) -> None:
    _broken_files(tmp_path / "here")
    done = jetson("data", "inspect", "other.jsonl", JETSON_FT_CACHE=str(full_disk / "cache"))
    assert_refused(done, "The disk is full", "JETSON_FT_CACHE")
    assert [path.name for path in full_disk.rglob("*") if path.is_file()] == ["filling"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "inspect", "gone.json"], ["gone.json"]),
        (["recipe", "show", "gone"], ["gone", "quickstart-zh"]),
        (["recipe", "validate", "bad.yaml"], ["3 mistakes"]),
        (["runs", "show"], ["latest"]),
        (["eval"], ["latest"]),
        (["chat"], ["runs", "`base`"]),
    ],
)
def test_other_commands_refuse_with_one_message(
    arguments: list[str], words: list[str], jetson: Jetson, tmp_path: Path
) -> None:
    _broken_files(tmp_path / "here")
    assert_refused(jetson(*arguments), *words)


@pytest.mark.parametrize(
    "arguments",
    [["data", "inspect", "x", "--format", "foo"], ["data", "inspect", "x", "--max-length", "0"],
     ["train", "--nonsense"], ["nonsense"]],
)  # fmt: skip
def test_wrong_option_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_without_a_terminal_no_bars_are_drawn(
    jetson: Jetson, tmp_path: Path, tiny_phi: Path
) -> None:
    (tmp_path / "here" / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 3)
    done = jetson(
        "data", "inspect", "rows.jsonl", "--model", str(tiny_phi),
        JETSON_FT_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0
    assert "examples/s" not in done.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(jetson: Jetson) -> None:
    done = jetson("--debug", "train", "gone.yaml")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "error: " in done.stderr


def test_debug_prints_the_log_to_stderr() -> None:
    code = (
        "import logging, sys; from jetson_ft import cli, recipe\n"
        "recipe.shipped = lambda: logging.getLogger('jetson_ft.x').debug('worked around') or {}\n"
        "sys.argv[1:] = [*sys.argv[1:], 'recipe', 'list']; cli.main()"
    )
    for options, expected in (([], ""), (["--debug"], "D jetson_ft.x: worked around\n")):
        command = [sys.executable, "-c", code, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", expected)


def test_fault_of_the_program_is_one_message_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipes, "load_recipe", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["jetson-ft", "recipe", "show", "x"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert "A fault in this program: ZeroDivisionError" in message
    assert "--debug" in message
    assert "Traceback" not in message


def test_control_characters_in_a_name_are_escaped(jetson: Jetson) -> None:
    done = jetson("train", "\x1b[2Jx\udcff.yaml")
    assert_refused(done, "\\x1b[2Jx\\udcff.yaml")
    assert "\x1b" not in done.stderr


@pytest.mark.slow
def test_run_that_fails_later_is_refused_with_one_message(
    jetson: Jetson, tiny_llama: Path, rows_file: Path
) -> None:
    done = jetson(
        "train", "quickstart-zh", "--set", f"model={tiny_llama}", "--set",
        f"data.train={rows_file}", "--set", "train.max_memory_gb=0.001",
    )  # fmt: skip
    assert_refused(done, "This job needs about", "max_memory_gb")
    assert "log.txt" in done.stderr
