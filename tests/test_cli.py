"""The command line as a person meets it: real processes, plain messages, exit code 2."""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from jetson_ft import __version__, cli
from jetson_ft import recipe as recipes
from jetson_ft.device import doctor
from jetson_ft.device.boards import BOARDS
from jetson_ft.device.doctor import finding
from jetson_ft.errors import UserError
from jetson_ft.recipe import Recipe
from jetson_ft.runs import preview, rundir

HEAVY = (
    "torch", "gradio", "transformers", "peft", "datasets", "pydantic", "numpy", "pandas", "pyarrow",
    "huggingface_hub", "yaml", "jinja2", "accelerate", "sacrebleu",
)  # fmt: skip
Done = subprocess.CompletedProcess[str]
Jetson = Callable[..., Done]


def closed_port() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def run(*arguments: str, cwd: Path, **environment: str) -> Done:
    return subprocess.run(
        [sys.executable, "-m", "jetson_ft.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def jetson(tmp_path: Path) -> Jetson:
    """The real program in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return lambda *arguments, **environment: run(*arguments, cwd=folder, **environment)


def assert_plain_refusal(done: Done, *words: str) -> None:
    """One message with what, where and how to mend it."""
    assert done.returncode == 2, done.stdout + done.stderr
    first, *rest = done.stderr.strip().splitlines()
    assert first.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert any(line.startswith("  where: ") for line in rest)
    assert any(line.startswith("  fix: ") for line in rest)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


# Starting fast


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


def test_every_promised_command_is_there() -> None:
    help_text = CliRunner().invoke(cli.app, ["--help"]).output
    for command in ("train", "plan", "chat", "eval", "data", "recipe", "runs", "doctor"):
        assert command in help_text
    for group, commands in {
        "data": ["inspect"],
        "recipe": ["show", "validate", "schema"],
        "runs": ["list", "show", "describe", "zip", "delete"],
    }.items():
        text = CliRunner().invoke(cli.app, [group, "--help"]).output
        assert all(command in text for command in commands)


def test_the_version_is_said() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"jetson-ft {__version__}\n"


# Planning


@pytest.mark.slow
def test_a_job_is_planned_for_every_module_without_board_weights_or_network(
    jetson: Jetson, tmp_path: Path
) -> None:
    done = jetson(
        "plan", "phi-1_5-zh", COLUMNS="80", HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in (*BOARDS, "this machine"))
    assert "built-in lengths of llamafactory/alpaca_zh, 51,000 rows" in done.stdout
    assert "no board has run this yet" in done.stdout
    assert max(map(len, lines)) <= 84 and not list((tmp_path / "here").iterdir())


def test_planning_for_a_board_loads_no_torch() -> None:
    code = (
        "import sys; from jetson_ft import cli; sys.argv[0] = 'jetson-ft'\n"
        "try: cli.main()\n"
        "finally: print(*{'torch', 'gradio', 'peft'} & set(sys.modules), file=sys.stderr)"
    )
    arguments = ["plan", "phi-1_5-zh-qlora", "--device", "orin-nx-16gb", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    (device,) = json.loads(done.stdout)["devices"]
    assert device["fits"] and device["precision"] == "nf4/bf16"
    assert device["plan"]["peak_memory_bytes"] == sum(device["plan"]["parts"].values())
    assert done.stderr.strip() == ""


def test_a_board_that_is_too_small_is_told_with_what_would_fit(jetson: Jetson) -> None:
    done = jetson("plan", "phi-1_5-zh", "--device", "orin-nano-8gb", "-s", "precision=fp32")
    assert done.returncode == 0
    assert "orin-nano-8gb: would fit with precision: bf16 (" in done.stdout


def test_an_unknown_board_is_refused_with_the_nearest(jetson: Jetson) -> None:
    done = jetson("plan", "phi-1_5-zh", "--device", "orin-nano")
    assert_plain_refusal(done, "no such device", "Did you mean orin-nano-")


# The doctor


@pytest.mark.parametrize(("weight", "code", "verdict"), [
    (finding.warning, 0, "Training works here. Failures: 0, warnings: 1."),
    (finding.failure, 1, "Training would not work here. Failures: 1, warnings: 0."),
])  # fmt: skip
def test_the_doctors_word_is_its_exit_code(
    weight: Any, code: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [finding.ok("hub.there", address="here\x1b[2J"), weight("swap.zram", size="3.6")]
    monkeypatch.setattr(doctor, "examine", lambda machine: iter(found))
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == code
    assert done.output.splitlines() == [
        "ok       Hub: here\\x1b[2J answers",
        f"{found[1].status:8} Swap: 3.6 GiB of zram, which takes of the memory that the GPU needs",
        "         fix: sudo systemctl disable --now nvzramconfig", verdict,
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert done.exit_code == code
    assert [check["name"] for check in json.loads(done.output)["checks"]] == ["hub", "swap"]


@pytest.mark.slow
def test_this_machine_is_told_fit(jetson: Jetson) -> None:
    done = jetson("doctor", "--json", HF_HUB_OFFLINE="1")
    found = json.loads(done.stdout)
    assert found["schema"] == 1 and found["works"] and done.returncode == 0
    assert {"board", "memory", "disk", "sensors", "hub", "torch", "gpu", "bitsandbytes"} <= {
        check["name"] for check in found["checks"]
    }  # fmt: skip


# Bad input


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
        (["gone.yaml"], ["There is no such recipe", "gone.yaml", "quickstart-zh"]),
        (["bad.yaml"], ["3 mistakes", "line 2: `lora.rank`: must be at least 1", "line 3: unknown",
                        "line 4: `train.learning_rate`: must be greater than 0", "bad.yaml"]),
        (["quickstart-zh", "--set", "lora.rank=0"], ["--set: `lora.rank`: must be at least 1"]),
        (["quickstart-zh", "--set", "train.learning_rate=-1e-3"], ["must be greater than 0"]),
        (["quickstart-zh", "--set", "lora.rnak=8"], ["did you mean `lora.rank`?"]),
        (["quickstart-zh", "--set", "data.train=gone.json"], ["no such data file", "gone.json"]),
        (["quickstart-zh", "--set", "data.heldout=gone.json"], ["no such data file", "gone.json"]),
        (["quickstart-zh", "--set", "data.train=empty.json"], ["0 rows", "empty.json"]),
        (["quickstart-zh", "--set", "data.train=none.json"], ["0 rows", "none.json"]),
        (["quickstart-zh", "--set", "data.train=other.jsonl"], ["no known layout", "`foo`"]),
        (["quickstart-zh", "--set", "data.train=picture.json"], ["encoding", "picture.json"]),
        (["quickstart-zh", "--set", "model=./gone"], ["no such model", "./gone"]),
        (["quickstart-zh", "--set", "model=model"], ["No weights", "Safetensors"]),
        (["quickstart-zh", "--set", "output=empty.json/runs"], ["A file stands", "json/runs"]),
        (["quickstart-zh", "--set", "output=/proc/runs"], ["/proc/runs"]),
        (["--resume", "gone"], ["There is no run 'gone'"]),
        (["quickstart-zh", "--resume", "x"], ["keeps its own recipe"]),
        (["--resume", "x", "--dry-run"], ["can't be resumed dry"]),
    ],
)  # fmt: skip
def test_bad_input_gets_one_plain_message_and_leaves_nothing_behind(
    arguments: list[str], words: list[str], jetson: Jetson, tmp_path: Path
) -> None:
    _broken_files(tmp_path / "here")
    before = sorted((tmp_path / "here").rglob("*"))
    assert_plain_refusal(jetson("train", *arguments), *words)
    assert sorted((tmp_path / "here").rglob("*")) == before


@pytest.mark.parametrize("key", ["model", "data.train"])
def test_a_hub_out_of_reach_is_told_with_what_works_offline(
    key: str, jetson: Jetson, tmp_path: Path
) -> None:
    address = closed_port()
    done = jetson(
        "train", "quickstart-zh", "--set", f"{key}=owner/name",
        HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"), no_proxy="*",
    )  # fmt: skip
    assert_plain_refusal(
        done, "The hub is out of reach", address, "HF_ENDPOINT", "HF_TOKEN", "works offline"
    )
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


def test_a_full_disk_is_told_plainly_and_holds_no_half_made_run(
    full_disk: Path, jetson: Jetson
) -> None:
    runs = full_disk / "runs"
    done = jetson("train", "quickstart-zh", "--set", f"output={runs}")
    assert_plain_refusal(done, "The disk is full", str(runs), "--set output=FOLDER")
    assert [path.name for path in full_disk.rglob("*") if path.name != "runs"] == ["filling"]
    assert jetson("runs", "list", "--runs", str(runs)).stdout.startswith("No runs")


def test_a_full_cache_is_told_plainly(full_disk: Path, jetson: Jetson, tmp_path: Path) -> None:
    _broken_files(tmp_path / "here")
    done = jetson("data", "inspect", "other.jsonl", JETSON_FT_CACHE=str(full_disk / "cache"))
    assert_plain_refusal(done, "The disk is full", "JETSON_FT_CACHE")
    assert [path.name for path in full_disk.rglob("*") if path.is_file()] == ["filling"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "inspect", "gone.json"], ["no such data file"]),
        (["recipe", "show", "gone"], ["no such recipe"]),
        (["recipe", "validate", "bad.yaml"], ["3 mistakes"]),
        (["runs", "show"], ["no run 'latest'"]),
        (["eval"], ["no run 'latest'"]),
        (["chat"], ["no adapter to talk with"]),
    ],
)
def test_the_other_commands_refuse_as_plainly(
    arguments: list[str], words: list[str], jetson: Jetson, tmp_path: Path
) -> None:
    _broken_files(tmp_path / "here")
    assert_plain_refusal(jetson(*arguments), *words)


@pytest.mark.parametrize(
    "arguments",
    [["data", "inspect", "x", "--format", "foo"], ["data", "inspect", "x", "--max-length", "0"],
     ["train", "--nonsense"], ["nonsense"]],
)  # fmt: skip
def test_a_wrong_option_ends_with_exit_code_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_the_formats_offered_are_the_recipes() -> None:
    offered = get_type_hints(cli.data_inspect)["layout"]
    assert offered == dict(recipes.fields())["data.format"].annotation


def test_no_bars_are_drawn_where_there_is_no_terminal(
    jetson: Jetson, tmp_path: Path, tiny_phi: Path
) -> None:
    (tmp_path / "here" / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 3)
    done = jetson(
        "data", "inspect", "rows.jsonl", "--model", str(tiny_phi),
        JETSON_FT_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0
    assert "examples/s" not in done.stderr


def test_debug_shows_the_traceback_and_the_same_exit_code(jetson: Jetson) -> None:
    done = jetson("--debug", "train", "gone.yaml")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "error: There is no such recipe." in done.stderr


def test_a_dry_run_for_programs_tells_its_error_to_them_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error, what in (
        (UserError("No.", "x", "Do."), "No."),
        (KeyError("y"), "A fault in this program: KeyError: 'y'"),
    ):
        monkeypatch.setattr(preview, "dry_run", Mock(side_effect=error))
        done = CliRunner().invoke(cli.app, ["train", "quickstart-zh", "--dry-run", "--json"])
        told = json.loads(done.stdout)
        assert done.exception is error
        assert told["schema"] == 1 and told["error"]["what"] == what


def test_a_fault_of_ours_is_told_as_one_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipes, "load", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["jetson-ft", "recipe", "show", "x"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert "A fault in this program: ZeroDivisionError" in message
    assert "--debug" in message
    assert "Traceback" not in message


def test_control_characters_in_a_name_do_not_reach_the_terminal(jetson: Jetson) -> None:
    done = jetson("train", "\x1b[2Jx\udcff.yaml")
    assert_plain_refusal(done, "\\x1b[2Jx\\udcff.yaml")
    assert "\x1b" not in done.stderr


@pytest.mark.slow
def test_a_run_that_fails_later_is_told_as_plainly(
    jetson: Jetson, tiny_llama: Path, rows_file: Path
) -> None:
    done = jetson(
        "train", "quickstart-zh", "--set", f"model={tiny_llama}", "--set",
        f"data.train={rows_file}", "--set", "lora.targets=[nope]",
    )  # fmt: skip
    assert_plain_refusal(done, "no linear layer named nope", "q_proj")
    assert "log.txt" in done.stderr


# Recipes and runs


def test_a_recipe_is_shown_resolved_and_reads_back(jetson: Jetson) -> None:
    done = jetson("recipe", "show", "quickstart-zh", "--set", "lora.rank=8", "-s", "output=x")
    assert done.returncode == 0
    shown = recipes.parse(done.stdout)
    assert (shown.lora.rank, shown.lora.alpha, shown.output) == (8, 16, "x")
    assert shown == recipes.load("quickstart-zh", ["lora.rank=8", "output=x"])


def test_a_sound_recipe_is_called_so() -> None:
    found = CliRunner().invoke(cli.app, ["recipe", "validate", "quickstart-zh"])
    assert found.exit_code == 0
    assert found.output.startswith("ok: quickstart-zh")
    assert recipes.load("quickstart-zh").sha256()[:12] in found.output


def test_the_schema_is_printed_as_json() -> None:
    printed = json.loads(CliRunner().invoke(cli.app, ["recipe", "schema"]).output)
    assert set(printed["properties"]) == set(Recipe.model_fields)


def test_shipped_recipes_are_listed_with_what_they_are() -> None:
    lines = CliRunner().invoke(cli.app, ["recipe", "list"]).output.splitlines()
    assert {line.split()[0] for line in lines} == set(recipes.shipped())
    assert all(len(line.split()) > 4 for line in lines)


def make_run(root: Path, label: str, state: str = "finished") -> rundir.Run:
    made = rundir.create(Recipe(output=str(root)), label)
    made.write_state(state)
    return made


def invoke(*arguments: Any) -> str:
    found = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    return found.output


def test_runs_are_listed_and_a_damaged_one_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    sound, damaged = make_run(tmp_path, "sound", "stopped"), make_run(tmp_path, "damaged")
    (damaged.path / "recipe.yaml").write_text("model: [")
    done = run("runs", "list", "--runs", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0
    by_name = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert "stopped" in by_name[sound.name]
    assert "embedded" in by_name[sound.name]
    assert "damaged" in by_name[damaged.name].removeprefix(f" {damaged.name}")


def test_no_runs_are_told_as_such(tmp_path: Path) -> None:
    place = tmp_path / "none"
    assert invoke("runs", "list", "--runs", place) == f"No runs in {place} yet.\n"


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    stopped = make_run(tmp_path, "a", "stopped")
    done = run("runs", "show", stopped.name, "--runs", str(tmp_path), cwd=tmp_path)
    assert f"train --resume {stopped.path}" in done.stdout
    assert "stopped, nothing to stop" in invoke("runs", "stop", stopped.path)


def test_a_run_is_named_taken_away_and_deleted(tmp_path: Path) -> None:
    made = make_run(tmp_path, "a")
    said = invoke("runs", "describe", made.path, "--title", "first", "--notes", "rate too high")
    assert said == f"{made.name}: first\nrate too high\n"
    assert "first" in invoke("runs", "describe", made.path)
    made.adapter.mkdir()
    (made.adapter / "adapter_config.json").write_text("{}")
    assert invoke("runs", "zip", made.path, tmp_path / "a.zip") == f"{tmp_path / 'a.zip'}\n"
    kept = CliRunner().invoke(cli.app, ["runs", "delete", str(made.path)], input="n\n")
    assert kept.exit_code == 1 and made.path.exists()
    assert invoke("runs", "delete", made.path, "--yes") == f"{made.name}: deleted\n"
    assert not made.path.exists()
