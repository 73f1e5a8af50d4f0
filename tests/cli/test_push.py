"""`jetson-ft push`: the real client and program with a local server in the Hub's place."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import program
import pytest
from fake_hub import closed_port
from run_folders import copy_finished
from upload_hub import TOKEN, Repository, UploadHub

from jetson_ft.runs.report import card
from jetson_ft.runs.store import Run


@pytest.fixture
def run(here: Path) -> Run:
    return copy_finished(here / "runs")


def push(fake: UploadHub, here: Path, *options: str, **environment: str) -> program.Done:
    """Run the program in a new process, since the client reads the environment once."""
    command = [sys.executable, "-m", "jetson_ft.cli", "push", "finished", *options]
    return subprocess.run(
        command,
        cwd=here,
        env={"COLUMNS": "200", **fake.environment(here / "hf", **environment)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_adapter_arrives_byte_by_byte_in_a_private_repository(
    upload_hub: UploadHub, here: Path, run: Run
) -> None:
    done = push(upload_hub, here, "--to", "owner/new", "--yes")
    assert done.returncode == 0, done.stderr
    repository = upload_hub.repositories["owner/new"]
    assert repository.private and repository.commits == ["Add the adapter of finished"]
    files = repository.files
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert files[name] == (run.adapter / name).read_bytes()
    assert files["README.md"].decode() == card.model_card(run)
    base = json.loads((run.adapter / "base.json").read_text())
    assert json.loads(files["base.json"]) == {"name": "model", "fingerprint": base["fingerprint"]}
    assert not any(base["folder"].encode() in body for body in upload_hub.bodies)
    assert not any(str(here).encode() in body for body in upload_hub.bodies)
    assert f"to {upload_hub.address}/owner/new" in done.stdout
    assert "as owner; private, a new repository" in done.stdout
    for name, content in files.items():
        assert name in done.stdout
        assert name != "adapter_model.safetensors" or f"{len(content) / 1e3:,.1f} kB" in done.stdout
    assert f"{len(files)} files" in done.stdout and "quotes held-out rows" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    agents = {headers.get("user-agent", "") for _, _, headers in upload_hub.requests[1:]}
    assert agents and not any("torch" in agent for agent in agents), "telemetry"


def test_without_a_terminal_nothing_is_sent(upload_hub: UploadHub, here: Path, run: Run) -> None:
    done = push(upload_hub, here, "--to", "owner/new")
    program.assert_refused(done, "Nothing was sent", "--yes")
    assert "adapter_model.safetensors" in done.stdout, "what would have been sent"
    assert upload_hub.sent() == []


@pytest.mark.parametrize(("answer", "sends"), [("", False), ("y", True)])
def test_a_terminal_is_asked(
    upload_hub: UploadHub, here: Path, run: Run, answer: str, sends: bool
) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "jetson_ft.cli", "push", "finished", "--to", "owner/new"]
    command.append("--public")
    environment = upload_hub.environment(here / "hf")
    with subprocess.Popen(
        command, cwd=here, env=environment, stdin=theirs, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        assert process.stdout
        shown = ""
        while "Send these files?" not in shown and (character := process.stdout.read(1)):
            shown += character
        assert upload_hub.sent() == [], "nothing before the answer"
        os.write(ours, f"{answer}\n".encode())
        process.communicate(timeout=60)
    os.close(ours)
    assert (process.returncode == 0) is sends
    assert bool(upload_hub.sent()) is sends and "as owner; PUBLIC, a new repository" in shown
    assert [made.private for made in upload_hub.repositories.values()] == [False] * sends


def test_other_files_of_a_repository_stay(upload_hub: UploadHub, here: Path, run: Run) -> None:
    old = upload_hub.repositories["owner/old"] = Repository(True, {"kept.txt": b"x"})
    done = push(upload_hub, here, "--to", "owner/old", "--yes")
    assert done.returncode == 0, done.stderr
    assert "private, an existing repository" in done.stdout
    assert old.files["kept.txt"] == b"x" and "README.md" in old.files


def test_an_interrupted_upload_goes_on_and_nothing_half_sent_is_seen(
    upload_hub: UploadHub, here: Path, run: Run
) -> None:
    (run.adapter / "second.safetensors").write_bytes(b"x" * 5000)
    upload_hub.broken_puts = True
    done = push(upload_hub, here, "--to", "owner/new", "--yes")
    program.assert_refused(done, "Nothing was published", "error 400")
    assert upload_hub.repositories["owner/new"].files == {}
    upload_hub.broken_puts = False
    before = len([line for line in upload_hub.sent() if line.startswith("PUT")])
    done = push(upload_hub, here, "--to", "owner/new", "--yes")
    assert done.returncode == 0, done.stderr
    puts = [line for line in upload_hub.sent() if line.startswith("PUT")]
    assert len(puts) == before + 1, "one object had arrived"
    files = upload_hub.repositories["owner/new"].files
    assert files["second.safetensors"] == b"x" * 5000
    assert (
        files["adapter_model.safetensors"]
        == (run.adapter / "adapter_model.safetensors").read_bytes()
    )


# Each refusal, in one process: the client's import takes longer than all of them.
REFUSALS = """
import json, os, sys
import program
for repo, environment in json.loads(sys.argv[1]):
    before = dict(os.environ)
    os.environ.update(environment)
    done = program.main_here("push", "finished", "--to", repo, "--yes")
    print(json.dumps([done.returncode, done.stdout, done.stderr]))
    os.environ.clear()
    os.environ.update(before)
"""


def test_each_refusal_has_its_message(upload_hub: UploadHub, here: Path, run: Run) -> None:
    upload_hub.repositories["owner/old"] = Repository(private=False)
    cases: list[tuple[str, dict[str, str], tuple[str, ...]]] = [
        ("owner/new", {"HF_TOKEN": ""}, ("No access token", "hf auth login")),
        ("owner/new", {"HF_TOKEN": "hf_reader"}, ("token of owner may only read",)),
        ("owner/new", {"HF_TOKEN": "hf_wrong"}, ("access token may not write", "HF_TOKEN")),
        ("other/new", {}, ("access token may not write to 'other/new'", "owner's name")),
        ("no-owner", {}, ("'no-owner' is no name of a repository", "OWNER/NAME")),
        ("owner/n--x", {}, ("'owner/n--x' is no name of a repository",)),
        ("owner/old", {}, ("exists and is public", "--public")),
        ("owner/new", {"HF_HUB_OFFLINE": "1"}, ("HF_HUB_OFFLINE is set",)),
    ]
    environment = upload_hub.environment(
        here / "hf", PYTHONPATH=os.pathsep.join([*sys.path, str(Path(program.__file__).parent)])
    )
    script = [sys.executable, "-c", REFUSALS, json.dumps([case[:2] for case in cases])]
    output = subprocess.check_output(script, cwd=here, env=environment, text=True, timeout=60)
    for (*_case, words), line in zip(cases, output.splitlines(), strict=True):
        done = program.Done([], *json.loads(line))
        program.assert_refused(done, *words)
        assert "hf_" not in done.stdout + done.stderr
    assert list(upload_hub.repositories) == ["owner/old"]
    assert not upload_hub.objects and not upload_hub.repositories["owner/old"].files


def test_an_unreachable_hub_is_reported(upload_hub: UploadHub, here: Path, run: Run) -> None:
    done = push(upload_hub, here, "--to", "owner/new", "--yes", HF_ENDPOINT=closed_port())
    program.assert_refused(done, "the Hub can't be reached", "run the command again")
