"""Runs side by side."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.runs import comparison, heldout, store
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.store import Run


@pytest.fixture
def pair(finished: Run, tmp_path: Path) -> list[Run]:
    """Return two copies of a finished run."""
    return [Run(Path(shutil.copytree(finished.path, tmp_path / name))) for name in ("one", "two")]


def edit(run: Run, file: str, change: Any) -> None:
    path = run.path / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cells(compared: comparison.Comparison, section: str, name: str) -> list[str]:
    (rows,) = [each.rows for each in compared.sections if each.title == section]
    (row_cells,) = [cells for row, cells in rows if row == name]
    return [cell.text for cell in row_cells]


def repeat_rows(content: dict[str, Any]) -> None:
    """Make twenty rows of the run's five."""
    content["rows"] = [
        {**row, "sha256": f"{row['sha256']}-{n}"} for n in range(4) for row in content["rows"]
    ]


def halve_nats(content: dict[str, Any]) -> None:
    for row in content["rows"]:
        row["after"]["nats"] /= 2


def test_equal_runs_differ_in_nothing(pair: list[Run]) -> None:
    compared = comparison.compare_runs(pair)
    assert compared.names == ["one", "two"] and compared.notes == []
    assert "Settings that differ" not in [section.title for section in compared.sections]
    first, second = cells(compared, "Held-out rows", "Bits per character")
    assert second == f"{first}; +0.000"
    sample = compared.samples[0]
    assert sample.replies[0] == sample.replies[1] is not None


def test_settings_and_figures_that_differ_are_shown_with_intervals(pair: list[Run]) -> None:
    for run in pair:
        edit(run, "heldout.json", repeat_rows)
    edit(pair[1], "heldout.json", halve_nats)
    recipe = pair[1].recipe()
    recipe.lora.rank = 7
    (pair[1].path / "recipe.yaml").write_text(recipe.to_yaml())
    value = pair[0].report()["eval"]["after"]["bits_per_char"]
    edit(pair[1], "report.json", lambda r: r["eval"]["after"].update(bits_per_char=value / 2))
    compared = comparison.compare_runs(pair)
    assert cells(compared, "Settings that differ", "lora.rank") == ["2", "7"]
    text = cells(compared, "Held-out rows", "Bits per character")[1]
    assert text.startswith(f"{value / 2:.3f}; -{value / 2:.3f} (") and "no clear" not in text
    (section,) = [each for each in compared.sections if each.title == "Held-out rows"]
    verdicts = {name: row[1].verdict for name, row in section.rows}
    assert verdicts["Bits per character"] == "better" and verdicts["chrF"] == "same"


def test_a_difference_of_few_rows_is_called_noise(pair: list[Run]) -> None:
    edit(pair[1], "heldout.json", halve_nats)  # five rows
    text = cells(comparison.compare_runs(pair), "Held-out rows", "Bits per character")[1]
    assert text.endswith("too few rows")


def test_other_rows_are_not_compared_as_equal(pair: list[Run]) -> None:
    edit(pair[1], "heldout.json", lambda content: content["rows"].pop())
    compared = comparison.compare_runs(pair)
    assert compared.notes == [
        "two was measured on other held-out rows than one: no differences."
    ]  # fmt: skip
    assert ";" not in cells(compared, "Held-out rows", "Bits per character")[1]
    (pair[1].path / "heldout.json").unlink()
    (note,) = comparison.compare_runs(pair).notes
    assert note == "two has no heldout.json: it can't be compared row by row."
    (note,) = comparison.compare_runs([pair[1], pair[0]]).notes
    assert note == "two has no heldout.json: nothing can be compared with it row by row."
    assert comparison.compare_runs([pair[1], pair[0]]).sections


def test_probes_are_compared_with_an_interval(pair: list[Run]) -> None:
    names = [f"p{n}" for n in range(30)]

    def answer(count: int) -> Any:
        def change(report: dict[str, Any]) -> None:
            report["eval"]["probes"]["after"] = {"correct": names[:count], "share": count / 66}

        return change

    edit(pair[0], "report.json", answer(30))
    edit(pair[1], "report.json", answer(10))
    text = cells(comparison.compare_runs(pair), "General questions", "answered by the adapter")[1]
    assert text.startswith("15%; -30% (") and "no clear" not in text
    edit(pair[1], "report.json", answer(28))
    text = cells(comparison.compare_runs(pair), "General questions", "answered by the adapter")[1]
    assert text.endswith("no clear difference")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_and_markdown_escape_what_rows_contain(pair: list[Run]) -> None:
    hostile = "<script>alert(1)</script>|\x1b[2J"

    def change(report: dict[str, Any]) -> None:
        report["eval"]["after"]["samples"][0]["reply"] = hostile

    edit(pair[0], "report.json", change)
    compared = comparison.compare_runs(pair)
    html, page = comparison.render_html(compared), _Text()
    page.feed(html)
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text
    assert "\x1b" not in html + comparison.render_markdown(compared)
    assert "default-src 'none'" in html and "| Bits per character |" in comparison.render_markdown(
        compared
    )


def test_unfinished_run_and_one_run_are_refused(pair: list[Run], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Two different runs"):
        comparison.compare_runs([pair[0], pair[0]])
    started = store.create_run(pair[0].recipe(), "started")
    with pytest.raises(UserError, match="has no report yet"):
        comparison.compare_runs([pair[0], started])


def test_rows_of_a_run_are_read_as_written_and_damage_is_named(pair: list[Run]) -> None:
    rows = heldout.read_rows(pair[0])
    assert len(rows) == 5
    heldout.write_rows(pair[0], rows)
    assert heldout.read_rows(pair[0]) == rows
    edit(pair[0], "heldout.json", lambda content: content["rows"][0].pop("after"))
    with pytest.raises(DamagedRun, match=r"heldout\.json is damaged"):
        heldout.read_rows(pair[0])
    heldout.write_rows(pair[0], [])
    assert heldout.read_rows(pair[0]) == []
