"""Texts from outside: escaped at each door that shows them, and values, never options."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from run_folders import make_run
from starlette.testclient import TestClient

from jetson_ft import recipe as recipes
from jetson_ft.cli import output
from jetson_ft.errors import Message, UserError
from jetson_ft.events import Warned
from jetson_ft.files import printable, quoted
from jetson_ft.recipe import strict_yaml
from jetson_ft.runs import store
from jetson_ft.runs.event_log import EventLog
from jetson_ft.webui import api, previews
from jetson_ft.webui.fragments import VIEWS
from jetson_ft.webui.render import Locale, error_html, render
from jetson_ft.webui.tabs import device, train_form, train_summary
from jetson_ft.webui.tabs.train_errors import complaint

# Moves the cursor, rings, sets a title, has C1's CSI, reverses, hides, is half a surrogate pair.
EVIL = "a\x1b[2J\x07\x1b]0;b\x07\x9b31m\u202ec\u2066\u061c\u200f\ufeff\U000e0041\u2028d\r"
SHOWN = r"a\x1b[2J\x07\x1b]0;b\x07\x9b31m\u202ec\u2066\u061c\u200f\ufeff\U000e0041\u2028d\x0d"
# Ordinary: scripts with joiners, a family, a flag, a tab and line breaks.
ORDINARY = "中文\tनमस्ते क्‍ष می‌خواهم 👩‍👩‍👧 🇨🇳 ❤️ «é»\n"
FORMATS = {"Cc", "Cs", "Zl", "Zp"}
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_dangerous(character: str) -> bool:
    if character in "\n\t":
        return False
    marks = character in "\u061c\u200e\u200f\ufeff" or 0xE0000 <= ord(character) <= 0xE007F
    kind = unicodedata.category(character)
    return kind in FORMATS or unicodedata.bidirectional(character) in DIRECTIONS or marks


def assert_harmless(text: str) -> None:
    """Nothing in the text moves a cursor, reverses or hides."""
    assert [character for character in text if is_dangerous(character)] == []


@pytest.mark.promise(46)
@given(st.text(st.characters()))
def test_printable_text_holds_nothing_dangerous_and_keeps_the_rest(text: str) -> None:
    shown = printable(text)
    assert_harmless(shown)
    shown.encode()
    assert printable(shown) == shown
    harmless = "".join(each for each in text if printable(each) == each)
    assert re.sub(r"\\x..|\\u....|\\U.{8}", "", shown) in (
        harmless, re.sub(r"\\x..|\\u....|\\U.{8}", "", harmless),
    )  # fmt: skip


@pytest.mark.promise(46)
def test_every_dangerous_character_is_escaped_and_ordinary_text_stays() -> None:
    for code in range(0x110000):
        if is_dangerous(chr(code)):
            assert printable(chr(code)) != chr(code), hex(code)
    assert printable(ORDINARY) == ORDINARY and printable(EVIL) == SHOWN


# The terminal


@pytest.mark.promise(46)
def test_console_escapes_in_texts_tables_rules_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"width": 300, "markup": False, "color_system": None}
    console = output._Console(file=io.StringIO(), **options)
    monkeypatch.setattr(output, "out", console)
    evil = "a\x1b[2J\x9b31m\u202e\ufeff[red]b[/red]"
    table = Table("name", evil, title=evil)
    table.add_row(evil, Text(evil, overflow="fold"))
    console.print(table)
    console.rule(evil)
    console.print(evil)
    output.show(EVIL)
    text = console.file.getvalue()
    assert_harmless(text)
    assert text.count(r"a\x1b[2J\x9b31m\u202e\ufeff[red]b[/red]") >= 6 and SHOWN in text


@pytest.mark.promise(46)
def test_json_is_escaped_and_equal(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({EVIL: [EVIL, ORDINARY]})
    text = capsys.readouterr().out
    assert_harmless(text)
    assert json.loads(text) == {EVIL: [EVIL, ORDINARY]} and "中文" in text


@pytest.mark.promise(46)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_recipe_is_written_without_dangerous_characters_and_read_back(text: str) -> None:
    for dumped in (strict_yaml.dump_yaml({"a": text}), strict_yaml.dump_flow([text])):
        assert_harmless(dumped)
        value = strict_yaml.parse_yaml(dumped)[0]
        assert value in ({"a": text}, [text])


def hostile_run(root: Path) -> store.Run:
    """Make a run whose every text is hostile."""
    run = make_run(root, "20260101-000000-a", "failed")
    evil = EVIL + "<b>"
    EventLog(run, 1).emit(Warned.of_message(Message("{x}", {"x": evil})))
    run.write_state("failed", Message("{x}", {"x": evil}))
    (run.path / "log.txt").write_bytes(evil.encode("utf-8", "surrogatepass"))
    (run.path / "about.json").write_text(json.dumps({"title": evil, "notes": evil}))
    return run


@pytest.mark.promise(46)
@pytest.mark.promise(22)
def test_commands_about_a_hostile_run_print_escapes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = hostile_run(tmp_path / "runs")
    for arguments in (
        ("runs", "list"), ("runs", "show", run.name), ("runs", "describe", run.name),
        ("recipe", "validate", EVIL), ("recipe", "show", "quickstart-zh", "--set", f"model={EVIL}"),
        ("train", "--resume", EVIL), ("data", "inspect", "--", f"no{EVIL}"),
    ):  # fmt: skip
        done = run_here(*arguments)
        assert_harmless(done)
        assert done


def run_here(*arguments: str) -> str:
    """Run the program in this process; return what it prints to both streams."""
    from typer.testing import CliRunner

    from jetson_ft.cli.app import app

    result = CliRunner().invoke(app, list(arguments))
    text = result.output
    if isinstance(result.exception, UserError):  # as `main` prints it
        text += printable(str(result.exception))
    return text


@pytest.mark.slow(minutes=0.1)
@pytest.mark.promise(46)
def test_rows_in_a_terminal_are_escaped(tmp_path: Path) -> None:
    """The whole program at a terminal, whose own colours are escapes."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": EVIL, "output": EVIL, EVIL: n}) + "\n" for n in range(3))
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jetson_ft.cli", "data", "inspect", "rows.jsonl"],
        cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, close_fds=True,
    )  # fmt: skip
    os.close(slave)
    received = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        received += block
    assert process.wait(60) == 0, received
    text = re.sub(r"\x1b\[[0-9;]*m", "", received.decode()).replace("\r\n", "\n")
    assert r"\x1b[2J\x07" in text and "row 1" in text
    assert_harmless(text)


# The page


@pytest.fixture
def page(tmp_path: Path) -> TestClient:
    app = FastAPI()
    app.include_router(api.router(tmp_path))
    app.add_exception_handler(UserError, api.error_response)
    return TestClient(app)


@pytest.mark.promise(46)
@pytest.mark.promise(22)
def test_page_escapes_all_texts_of_a_run(page: TestClient, tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    other = hostile_run(tmp_path / "other")
    other.path.rename(tmp_path / "20260102-000000-b")
    drawn = f"drawn={run.name}&drawn=20260102-000000-b"
    views = [f"?view={view}&{drawn}" for view in VIEWS]
    for address in ("", *(f"/{run.name}{rest}" for rest in ("/head", *views)), "?view=table"):
        for language in ("en", "zh_CN"):
            html = page.get(f"/live/{language}/runs{address}").text
            assert_harmless(html)
            if address in ("", f"/{run.name}/head"):
                assert SHOWN in html and "&lt;b&gt;" in html and "d\\x0d<b>" not in html
    refused = page.post("/runs/%1b%5B2J%E2%80%AE/stop")
    assert refused.status_code == 422
    assert_harmless("".join(refused.json().values()))


@pytest.mark.promise(46)
@pytest.mark.promise(22)
def test_templates_and_errors_of_the_page_escape_their_values() -> None:
    evil = EVIL + "<i>"
    t = Locale("zh_CN")
    message = Message("{x}", {"x": evil})
    check = {
        "status": "ok",
        "messages": {key: message.as_json() for key in ("title", "text", "fix")},
    }
    read = {
        "rows_read": 2, "rows_kept": 1, "layout": evil, "encoding": evil, "unread": [evil],
        "dropped": {"x": {"count": 1, "message": message.as_json(), "places": [message.as_json()]}},
        "duplicates": 0,
    }  # fmt: skip
    tokens = {
        "tokens": 1, "supervised_tokens": 1, "tokens_per_character": 1, "truncated": 0, "split": 0,
        "lengths": {"p50": 1, "p90": 1, "p99": 1, "max": 1}, "notices": [message.as_json()],
    }  # fmt: skip
    source = {"name": evil, "read": read, "rows": 1, "tokens": 1, "repeated": 0}
    htmls = [
        error_html(UserError("{x}", evil, evil.replace("{", ""), x=evil), t),
        render("findings.jinja", t, works=True, checks=[check], fix_parts=device.fix_parts),
        render("findings.jinja", t, error=UserError("{x}", x=evil), checks=[]),
        render("gauges.jinja", t, gauges=[device.Gauge(evil, evil, 1.0, evil)]),
        render("rows.jinja", t, report={
            "sources": [source, source], "tokens": tokens, "max_length": 9,
            "conversations": [[{"role": evil, "content": evil, "tool_calls": evil}]],
            "previews": [[(evil, True), (evil, False)]],
        }),
        render("rows.jinja", t, missing=[evil]),
        render("command.jinja", t, command=evil, yaml=evil),
        complaint(UserError("`{x}`", evil, "`--set lora.rank={x}` `{x}`", x=evil), t, Path("/")),
    ]  # fmt: skip
    for html in htmls:
        assert_harmless(html)
        assert SHOWN in html and "<i>" not in html


# Reports


@pytest.mark.promise(46)
@pytest.mark.promise(22)
def test_reports_escape_rows_replies_and_names() -> None:
    from jetson_ft.runs.report import figures, summary

    evil = EVIL + "<u>"
    sample = {
        "row": 0, "messages": [{"role": "user", "content": evil}], "reply": evil,
        "reference": evil, "ended": True,
    }  # fmt: skip
    side = {key: 1.0 for key, *_ in figures.METRICS} | {"samples": [sample]}
    category = {"name": evil, "rows": 1, "before": 1.0, "after": 1.0}
    part = {"name": evil, "rows_read": 1, "rows": 1, "tokens": 1}
    report = {
        "model": evil, "precision": "fp32", "seed": 1,
        "versions": {"jetson-ft": "1", "torch": evil},
        "device": {"board": evil, "name": evil}, "sensors": None, "data": {"sources": [part, part]},
        "warnings": [{"message": "m", "text": Message("{x}", {"x": evil}).as_json()}],
        "generation": {"max_new_tokens": 1},
        "train": {"steps": 1, "tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0,
                  "peak_memory_bytes": 1, "energy_joules": None},
        "eval": {"rows": 1, "documents": 0, "before": side, "after": side,
                 "categories": [category]},
    }  # fmt: skip
    html = summary.render_html("a", report, [])
    markdown = summary.render_markdown("a", report)
    assert_harmless(html)
    assert_harmless(markdown)
    assert html.count(SHOWN) >= 8 and markdown.count(r"a\x1b[2J") >= 6 and "<u>" not in html


# Values that begin with a dash

HOSTILE = ["-rf", "--debug", "--help", "-", "--", "-h", "--set=model=x", "--runs=/tmp"]


REQUEST = SimpleNamespace(session_hash="one")


def plan(runs: Path, **changed: Any) -> str:
    """Return the plan's HTML for the form of a page with these values."""
    shown = train_form.form_values(recipes.load_recipe("quickstart-zh")) | changed
    summary = train_summary.Summary(Locale("en"), train_form.Form(Locale("en"), runs))
    return str(summary.plan_now(REQUEST, *(shown[key] for key in train_form.Form.ORDER))[0])


@pytest.mark.promise(47)
def test_form_passes_values_and_never_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that reads the rows gets its recipe on standard input."""
    passed: list[tuple[Any, ...]] = []

    def run_json(_module: str, *words: str, text: str = "", **_options: Any) -> Any:
        passed.append((words, text))
        raise UserError("No process here.")

    monkeypatch.setattr(previews, "run_json", run_json)
    for value in HOSTILE:
        names = ("data.train", "model", "data.chat_template", "data.columns.question")
        plan(tmp_path, **dict.fromkeys(names, value))
        if value == "-":
            assert not passed  # a list in YAML, which the form refuses
            continue
        words, text = passed.pop()
        recipe = recipes.parse_recipe(text)
        assert words == () and recipe.model == recipe.data.train == value
        assert recipe.data.chat_template == recipe.data.columns.question == value


@pytest.mark.slow(minutes=0.2)
@pytest.mark.promise(47)
def test_real_processes_read_hostile_names_as_names(tmp_path: Path) -> None:
    for key, fault in (("data.train", "Data file not found"), ("model", "Model not found")):
        html = plan(tmp_path / "runs", **{key: "--help"})
        assert "complaint" in html and fault in html and "--help" in html
        assert "Usage" not in html and "no object" not in html


@pytest.mark.promise(47)
@pytest.mark.promise(46)
@pytest.mark.parametrize("name", [*HOSTILE, "a b", "$(id)", "`id`", "'; id", EVIL, "中 文"])
def test_command_to_copy_has_names_as_one_word(name: str) -> None:
    assert_harmless(quoted(name))
    assert shell_words(f"printf %s {quoted(name)}")[2:] == [name]
    setting = f"data.train={name}"
    if name in ("-", EVIL):  # a list in YAML, and control characters
        with pytest.raises(UserError):
            recipes.parse_recipe("", "", [setting])
        return
    recipe = recipes.parse_recipe("", "", [setting])
    command = train_form.command_of(recipe, "quickstart-zh")
    words = shell_words(command.replace("\\\n", " "))
    assert words[:3] == ["jetson-ft", "train", "quickstart-zh"]
    assert words[words.index(setting) - 1] == "--set"


def shell_words(command: str) -> list[str]:
    """Return the words that bash makes of the command."""
    script = f'words() {{ printf "%s\\0" "$@"; }}\nwords {command}'
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env=environment)
    return done.stdout.decode().split("\0")[:-1]
