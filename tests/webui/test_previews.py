"""Processes that read rows for the page: one for each page, results are kept."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from workbench import wait_for

from jetson_ft.data.lengths import KNOWN_LENGTHS
from jetson_ft.errors import UserError
from jetson_ft.models import catalog
from jetson_ft.recipe import Recipe, load_recipe
from jetson_ft.runs.preview import RecipeFacts
from jetson_ft.webui import previews
from jetson_ft.webui.cli_json import run_json
from jetson_ft.webui.previews import Previews, ReplacedError

FACTS = RecipeFacts(
    catalog.KNOWN_DIMS["embedded"], KNOWN_LENGTHS["bundled", "embedded"], is_estimate=False,
    inspection={"sources": [{"name": "rows", "read": {"rows_kept": 3}}]},
)  # fmt: skip


class Processes:
    """Stands for the processes: records what they get, and answers when it may, unless killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.environments: list[dict[str, str]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        monkeypatch.setattr(previews, "run_json", self.run)

    def run(
        self, _module: str, text: str, environment: dict[str, str], started: Callable[[Any], None]
    ) -> Any:
        killed = threading.Event()
        started(SimpleNamespace(kill=killed.set))
        self.texts.append(text)
        self.environments.append(environment)
        wait_for(lambda: killed.is_set() or self.may_answer.is_set())
        if killed.is_set():
            raise UserError("Killed.")
        return asdict(FACTS)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def own(path: Path, *settings: str) -> Recipe:
    return load_recipe("quickstart-zh", [f"data.train={path}", *settings])


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Call a function in a thread; the list gets its result or its error."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(function())
        except (UserError, OSError) as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, results


def test_rows_are_read_once_for_all_settings_but_those_of_model_and_data(
    rows_file: Path, processes: Processes
) -> None:
    kept = Previews()
    for settings in ([], ["lora.rank=2"], ["train.epochs=9", "data.on_invalid=skip"]):
        assert kept.facts(own(rows_file, *settings), "a") == FACTS
    assert len(processes.texts) == 1 and kept.sources == {"rows": {"rows_kept": 3}}
    kept.facts(own(rows_file, "data.max_length=99"), "a")
    kept.facts(own(rows_file, "model=microsoft/phi-1_5"), "a")
    assert len(processes.texts) == 3
    os.utime(rows_file, (1, 1))  # another content
    kept.facts(own(rows_file), "a")
    assert len(processes.texts) == 4


def test_built_in_facts_need_no_process_unless_the_rows_are_wanted(processes: Processes) -> None:
    kept, recipe = Previews(), load_recipe("quickstart-zh")
    assert kept.facts(recipe, "a").inspection is None and not processes.texts
    assert kept.facts(recipe, "a", with_rows=True).inspection
    assert len(processes.texts) == 1


def test_without_leave_to_download_the_process_is_offline(
    rows_file: Path, processes: Processes
) -> None:
    kept = Previews()
    kept.facts(own(rows_file), "a")
    kept.facts(own(rows_file, "data.max_length=99"), "a", download=True)
    assert processes.environments == [{"HF_HUB_OFFLINE": "1"}, {}]


def test_two_that_ask_the_same_share_a_process(rows_file: Path, processes: Processes) -> None:
    kept = Previews()
    processes.may_answer.clear()
    threads = [in_thread(lambda page=page: kept.facts(own(rows_file), page)) for page in "ab"]  # type: ignore[misc]
    wait_for(lambda: processes.texts)
    time.sleep(0.1)
    processes.may_answer.set()
    for thread, results in threads:
        thread.join(10)
        assert results == [FACTS]
    assert len(processes.texts) == 1


def test_a_newer_question_of_a_page_ends_the_older_ones_process(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "slow_reader.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def slow(_module: str, **options: Any) -> Any:
        return run_json("slow_reader", **options)

    monkeypatch.setattr(previews, "run_json", slow)
    kept = Previews()
    thread, results = in_thread(lambda: kept.facts(own(rows_file), "a"))
    (child,) = wait_for(lambda: [
        each for each in psutil.Process().children() if "slow_reader" in " ".join(each.cmdline())
    ])  # fmt: skip
    monkeypatch.setattr(previews, "run_json", lambda *_, **__: asdict(FACTS))
    assert kept.facts(own(rows_file, "data.max_length=99"), "a") == FACTS
    thread.join(10)
    assert not child.is_running() and isinstance(results[0], ReplacedError)


def test_one_that_joined_asks_again_only_for_its_pages_newest_question(
    rows_file: Path, processes: Processes
) -> None:
    kept = Previews()
    processes.may_answer.clear()

    def ask(page: str, *settings: str) -> tuple[threading.Thread, list[Any]]:
        return in_thread(lambda: kept.facts(own(rows_file, *settings), page))

    asked = [ask("a")]
    wait_for(lambda: len(processes.texts) == 1)
    asked += [ask("b"), ask("c")]
    wait_for(lambda: {"b", "c"} <= kept._newest.keys())
    time.sleep(0.1)  # both wait for the first one's answer
    asked.append(ask("b", "data.max_length=99"))
    wait_for(lambda: len(processes.texts) == 2)
    asked.append(ask("a", "data.max_length=98"))  # ends the first one's process
    wait_for(lambda: len(processes.texts) == 4)  # "c" asks again
    processes.may_answer.set()
    for thread, _results in asked:
        thread.join(10)
    kinds = [type(result) for _thread, (result,) in asked]
    assert kinds == [ReplacedError, ReplacedError, RecipeFacts, RecipeFacts, RecipeFacts]
    assert len(processes.texts) == 4


def test_all_that_wait_get_an_error_of_any_kind(
    rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, may_fail = Previews(), threading.Event()

    def run_json(*_: Any, **__: Any) -> Any:
        assert may_fail.wait(10)
        raise OSError("no memory for a process")

    monkeypatch.setattr(previews, "run_json", run_json)
    asked = [in_thread(lambda page=page: kept.facts(own(rows_file), page)) for page in "ab"]  # type: ignore[misc]
    wait_for(lambda: kept._newest.keys() == {*"ab"})
    time.sleep(0.1)
    may_fail.set()
    for thread, results in asked:
        thread.join(10)
        assert isinstance(results[0], OSError)


def test_the_machine_is_measured_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    device = {
        "kind": "cpu", "name": "x", "board": None, "cores": 2, "memory_total": 2,
        "memory_available": 1, "integrated": False, "fast_bf16": True,
    }  # fmt: skip
    machine = {"device": device, "flops": {"bf16": 2.0, "fp32": 1.0}}
    monkeypatch.setattr(previews, "run_json", lambda *words: calls.append(words) or machine)
    monkeypatch.setattr(previews.preview, "remembered_machine", lambda: None)
    kept = Previews()
    assert kept.machine() == kept.machine() and len(calls) == 1
    assert calls[0][1:] == ("machine",)


def test_only_a_pages_newest_question_counts() -> None:
    kept = Previews()
    first, second = kept.next_turn("a"), kept.next_turn("a")
    assert not kept.is_newest("a", first) and kept.is_newest("a", second)
    for number in range(200):
        kept.next_turn(str(number))
    assert len(kept._turns) <= 64
