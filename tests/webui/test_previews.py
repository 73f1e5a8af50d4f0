"""Processes that read rows for the page: one for each page, results are kept."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
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
    """Stands for the processes: records what they get, and answers when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.environments: list[dict[str, str]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        monkeypatch.setattr(previews, "run_json", self.run)

    def run(self, _module: str, text: str, environment: dict[str, str], **_: Any) -> Any:
        self.texts.append(text)
        self.environments.append(environment)
        assert self.may_answer.wait(10)
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
        except UserError as error:
            results.append(error)

    thread = threading.Thread(target=call)
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
