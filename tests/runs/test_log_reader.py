"""A run's log: its end, a search, the levels of its lines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jetson_ft.runs import log_reader
from jetson_ft.runs.contents import DamagedRun

LOG = """\
loading:   0%|          | 0/2\rloading: 100%|##########| 2/2
D jetson_ft.training.loop: step 1
/x/a.py:12: UserWarning: old
W jetson_ft.hardware: falls back
plain E text
Traceback (most recent call last):
  File "/x/worker.py", line 61, in main

    run()
torch.OutOfMemoryError: no memory
after it
E jetson_ft.runs.worker: ended
ValueError: bare
"""


def write(folder: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    (folder / "log.txt").write_bytes(data)


def test_lines_have_levels_and_progress_bars_their_last_state(tmp_path: Path) -> None:
    write(tmp_path, LOG)
    lines, has_earlier = log_reader.read_tail(tmp_path, 10_000)
    assert not has_earlier
    levels = {line.text: line.level for line in lines}
    assert lines[0].text == "loading: 100%|##########| 2/2" and lines[-1].text == "ValueError: bare"
    assert [text for text, level in levels.items() if level == "warning"] == [
        "/x/a.py:12: UserWarning: old", "W jetson_ft.hardware: falls back",
    ]  # fmt: skip
    errors = [line.text for line in lines if line.level == "error"]
    assert errors[0].startswith("Traceback") and '  File "/x/worker.py", line 61, in main' in errors
    assert errors[-3:] == ["torch.OutOfMemoryError: no memory",
                           "E jetson_ft.runs.worker: ended", "ValueError: bare"]  # fmt: skip
    assert levels["plain E text"] == levels["after it"] == ""
    assert levels["D jetson_ft.training.loop: step 1"] == "debug"


def test_the_end_of_a_long_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    write(tmp_path, "".join(f"line {number}\n" for number in range(1000)))
    lines, has_earlier = log_reader.read_tail(tmp_path, 100)
    assert has_earlier and lines[-1].text == "line 999"
    assert 5 < len(lines) < 12 and all(line.text.startswith("line ") for line in lines)
    write(tmp_path, b"x" * 5000)
    (line,), _ = log_reader.read_tail(tmp_path, 4500)
    assert line.text == "x" * 4000  # of a line without an end, a part


def test_control_characters_and_broken_text_are_shown_escaped(tmp_path: Path) -> None:
    write(tmp_path, b"\x1b[31mred\x00 \xff\r\n")
    (line,), _ = log_reader.read_tail(tmp_path, 100)
    assert line.text == "\\x1b[31mred\\x00 \ufffd"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.text("aAb中 ", max_size=6), max_size=12),
    st.text("aAb中", min_size=1, max_size=2),
    st.integers(1, 5),
)
def test_search_counts_the_lines_that_contain_the_text(
    tmp_path: Path, lines: list[str], text: str, limit: int
) -> None:
    write(tmp_path, "\n".join(lines))
    expected = [line for line in lines if text.lower() in line.lower()]
    for size in (8, 1 << 20):  # of a block; lines have up to 18 bytes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log_reader, "_BLOCK_BYTES", max(size, 24))
            matches = log_reader.search(tmp_path, text, limit)
        shown = [line.text.rstrip() for line in matches.lines]
        assert matches.count == len(expected)
        wanted = [line.rstrip() for line in expected[-limit:]]
        assert shown == wanted or not all(wanted)  # empty ones at the end are left out


def test_the_search_for_a_text_that_begins_with_a_line_break_ends(tmp_path: Path) -> None:
    write(tmp_path, "one\neins\ntwo\neins\n")
    for text, count in (("\ne", 2), ("e\n", 1), ("o\ne", 1)):
        assert log_reader.search(tmp_path, text, 9).count == count


def test_a_log_of_many_megabytes_is_searched_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "log.txt").open("wb") as file:
        for _ in range(20):
            file.write(b"a line of the log\n" * 60_000)
        file.write(b"The Needle\n")
    tracemalloc.start()
    matches = log_reader.search(tmp_path, "needle", 10)
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line.text for line in matches.lines] == ["The Needle"] and matches.count == 1
    assert largest < 8 << 20


def test_no_log_is_empty_and_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    assert log_reader.read_tail(tmp_path, 100) == ([], False)
    assert log_reader.search(tmp_path, "a", 10) == log_reader.Matches(0, [])
    os.mkfifo(tmp_path / "log.txt")
    for read in (lambda: log_reader.read_tail(tmp_path, 100),
                 lambda: log_reader.search(tmp_path, "a", 10)):  # fmt: skip
        with pytest.raises(DamagedRun, match="not a regular file"):
            read()
