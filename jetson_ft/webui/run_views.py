"""The views of a run beside the overview and the charts, and the table of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jetson_ft.runs.store import Run
from jetson_ft.webui.render import Locale, render


def render_view(t: Locale, runs: Sequence[Run], view: str, query: Mapping[str, str]) -> str:
    """Return the HTML of a view: `samples`, `settings`, `log`, `export`, or `table` (of all runs).

    Args:
        runs: the chosen run, then those that are compared with it; all runs for the table.
        query: what the view takes from the address.
    """
    return render("empty_view.jinja", t, view=view)
