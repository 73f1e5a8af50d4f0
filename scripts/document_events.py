"""Write docs/run-directory.md's table of events from their dataclasses.

With `--check`, write nothing and fail if the table is out of date.
"""

import inspect
import sys
from pathlib import Path
from typing import get_type_hints

from jetson_ft.events import KINDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "run-directory.md"
BEGIN, END = "<!-- events: made by scripts/document_events.py -->\n", "<!-- end of events -->"


def event_table() -> str:
    """Return a Markdown table with a row for each kind: its meaning and its fields."""
    lines = ["| kind | meaning | fields |", "|---|---|---|"]
    for kind, cls in KINDS.items():
        documented = [
            f"`{name}`: {hint.__metadata__[0]}"
            for name, hint in get_type_hints(cls, include_extras=True).items()
            if hasattr(hint, "__metadata__")
        ]
        meaning = " ".join((inspect.getdoc(cls) or "").split())
        lines.append(f"| `{kind}` | {meaning} | {'<br>'.join(documented)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write or check the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    page = f"{before}{BEGIN}\n{event_table()}\n{END}{rest.partition(END)[2]}"
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    elif page != text:
        sys.exit(f"{PAGE.name}: out of date with the events.\n  fix:   {sys.argv[0]}")


if __name__ == "__main__":
    main()
