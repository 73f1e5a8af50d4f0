"""Files that are no data: none is waited for, read without end, or shown."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

from jetson_ft import recipe as recipes
from jetson_ft.chat import target
from jetson_ft.cli.app import app
from jetson_ft.data import store
from jetson_ft.data.sources import Source
from jetson_ft.errors import UserError
from jetson_ft.webui import server
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs import train_data, train_form, train_summary

CANARY = "canary5d1f0c"
COMMAND = get_command(app)  # once, as Typer takes a third of a second


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """Interrupt what waits for a pipe."""

    def interrupt(*_arguments: Any) -> None:
        raise TimeoutError("the program waits")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(40)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def special(tmp_path: Path) -> dict[str, str]:
    """Return what is no stored file: its path by its kind in messages."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))  # a short name
    (tmp_path / "link").symlink_to("/dev/null")
    return {
        "a pipe": str(tmp_path / "fifo"), "a socket": str(tmp_path / "socket"),
        "a device": str(tmp_path / "link"), "a part of the running system": "/proc/self/environ",
    }  # fmt: skip


def refusal(*arguments: str) -> str:
    """Return the error of a command."""
    with pytest.raises(UserError) as caught:
        COMMAND.main(arguments, standalone_mode=False)
    return f"{caught.value.what} {caught.value.where} {caught.value.fix}"


def commands(path: str, model: Path) -> list[tuple[str, ...]]:
    """Return the commands that read a file at the path: as data, recipe, template and model."""
    plan = ("train", "--dry-run", "quickstart-zh", "--set", f"model={model}", "--set")
    return [
        ("data", "inspect", path, "--model", str(model)),
        ("train", "--dry-run", path),
        (*plan, f"data.train={path}"),
        (*plan, f"data.heldout={path}"),
        (*plan, f"data.chat_template={path}"),
        (*plan, f"model={path}"),
        ("chat", path),
    ]


@pytest.mark.promise(39)
def test_special_file_is_refused_by_its_kind(special: dict[str, str], tiny_phi: Path) -> None:
    for kind, path in special.items():
        for command in commands(path, tiny_phi):
            message = refusal(*command)
            assert f"Expected a stored file, found {kind}" in message, command
            assert path in message


@pytest.mark.promise(39)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_special_file_in_a_model_or_adapter_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert "found a pipe" in refusal("train", "--dry-run", "--set", f"model={tmp_path}")
    (tmp_path / "adapter_config.json").symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="not found"):
        target.resolve_target(str(tmp_path), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "embedded"}')
    with pytest.raises(UserError, match="found a pipe"):
        target.open_session(target.resolve_target(str(tmp_path), tmp_path))


@pytest.mark.promise(39)
def test_endless_file_ends_no_process(tmp_path: Path) -> None:
    script = "import sys; from jetson_ft.cli import main; sys.argv[1:] = {}; main()"
    done = subprocess.run(
        [sys.executable, "-c", script.format(["data", "inspect", "/dev/zero"])],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2),
    )  # fmt: skip
    assert done.returncode == 2 and "found a device" in done.stderr


@pytest.mark.promise(39)
def test_start_of_the_page_names_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *arguments: given.append(arguments[-1]))
    monkeypatch.setenv("JETSON_FT_ALLOW_PATH", f"{tmp_path}:/srv/data")
    COMMAND.main(["webui"], standalone_mode=False)
    COMMAND.main(["webui", "--allow-path", "a", "--allow-path", "b"], standalone_mode=False)
    assert given == [(tmp_path, Path("/srv/data")), (Path("a"), Path("b"))]


def secrets(folder: Path) -> list[Path]:
    """Write files that are no data, each with the canary in it."""
    shadow = f"root:{CANARY}:19000:0:99999:7:::\ndaemon:*:1:2:3\n"
    texts = {
        "shadow": shadow, "shadow.jsonl": shadow, "shadow.json": shadow, "shadow.yaml": shadow,
        "word": f"{CANARY}\nx\ny\n", "word.csv": f"{CANARY}\nx\n", "word.json": f"{CANARY}\n",
        "prose": f"Dear John, the {CANARY}\nfoo, bar\n", "users.csv": f"alice,{CANARY}\nbob,x\n",
        "env": f"TOKEN={CANARY}\nexport KEY='{CANARY}'\n", "ini": f"[default]\nkey = {CANARY}\n",
        "pem": f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n", "open.csv": f'"{CANARY}\nx,y\n',
        "ragged.csv": f"a,b\n{CANARY}\n1,2,3\n", "cut.json": '{"password": "' + CANARY,
        "key.json": json.dumps({"password": CANARY}), "rows.jsonl": f'{{"a": "{CANARY}"}}\n',
        "yaml.yaml": f"password: {CANARY}\nusers: [{CANARY}]\n",
        "tabs.yaml": f"a:\n\t{CANARY}: x\n",
        "list.yaml": f"- {CANARY}\n", "colons.yaml": f"a: b: {CANARY}\n",
        "ansible": f"{{% {CANARY} %}}", "curly": f"{{{{ {CANARY}! }}}}",
        "got": f"{{{{ a {CANARY} }}}}",
        "nul": f"\0{CANARY}\0", "pickle": f"\x80\x04\x95{CANARY}",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    (folder / "latin").write_bytes(f"{CANARY}\xff\xfe\xe9\n".encode("latin-1"))
    (folder / "parquet").write_bytes(b"PAR1" + CANARY.encode() * 9 + b"PAR1")
    (folder / "shadow.gz").write_bytes(gzip.compress(shadow.encode()))
    with zipfile.ZipFile(folder / "shadow.zip", "w") as archive:
        archive.writestr("shadow", shadow)
    return sorted(folder.iterdir())


@pytest.mark.promise(40)
def test_file_without_rows_is_not_shown(tmp_path: Path, tiny_phi: Path) -> None:
    for path in secrets(tmp_path):
        for command in commands(str(path), tiny_phi):
            assert CANARY not in refusal(*command), command
        for options in (["--format", "alpaca"], ["--column", "question=x"]):
            assert CANARY not in refusal("data", "inspect", str(path), *options), path


@pytest.mark.promise(40)
def test_model_folder_with_another_file_is_not_shown(tmp_path: Path) -> None:
    for text in (CANARY, f'{{"x": "{CANARY}"', f'["{CANARY}"]', f'"{CANARY}"'):
        (tmp_path / "config.json").write_text(text)
        (tmp_path / "model.safetensors").write_text(CANARY)
        (tmp_path / "tokenizer.json").write_text(text)
        message = refusal("train", "--dry-run", "--set", f"model={tmp_path}")
        assert CANARY not in message, message


@pytest.mark.promise(40)
@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=30), st.text(max_size=30), st.sampled_from(["", ".json", ".jsonl", ".csv"]),
    st.sampled_from(["", "question", "text"]),
)  # fmt: skip
def test_no_text_around_a_secret_shows_it(
    tmp_path_factory: pytest.TempPathFactory, before: str, after: str, suffix: str, column: str
) -> None:
    path = tmp_path_factory.mktemp("secret") / f"file{suffix}"
    path.write_bytes(f"{before}{CANARY}{after}\nx{after}\n".encode(errors="replace"))
    try:
        store.read_source(Source("it", (path,)), columns={column: "canary"} if column else {})
    except UserError as error:
        assert CANARY not in f"{error.what} {error.where} {error.fix}"


@pytest.mark.slow
@pytest.mark.promise(40)
def test_page_does_not_show_it_either(tmp_path: Path, tiny_phi: Path) -> None:
    """With the processes that the page starts."""
    (tmp_path / "runs").mkdir()
    form = train_form.Form(Locale("en"), tmp_path / "runs", AllowedPaths())
    summary = train_summary.Summary(Locale("en"), form)
    data = train_data.Data(Locale("en"), tmp_path / "runs", form)
    secret = tmp_path / "shadow"
    secret.write_text(f"root:{CANARY}:1\n")
    shown = train_form.form_values(recipes.load_recipe("quickstart-zh", [f"model={tiny_phi}"]))
    shown["data.train"] = str(secret)
    values = [shown[key] for key in form.ORDER]
    request = SimpleNamespace(session_hash="one")
    _reading, rows = data.fetch_rows(request, *values)
    for outcome in (rows, summary.plan_now(request, *values), form.load(str(secret))):
        assert str(secret) in str(outcome) and CANARY not in str(outcome)


@pytest.mark.promise(39)
def test_relative_name_does_not_reveal_what_is_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "payroll.csv").touch()
    allowed = AllowedPaths((tmp_path / "runs",))
    for name in ("payroll.csv", "payrol.csv", "nothing.csv"):
        with pytest.raises(UserError, match="may not name files"):
            allowed.require(f"secret/{name}")
    assert allowed.require("owner/set/payroll.csv")
