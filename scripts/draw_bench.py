"""Draw a benchmark's speed and memory: `draw_bench.py bench.json picture.svg`.

The picture follows the reader's light or dark scheme.
"""

import json
import sys
from html import escape
from pathlib import Path

WIDTH, LABEL, BAR, ROW, TOP = 760, 210, 180, 26, 34
LABELS = {
    "trainer": "Trainer + PEFT, batches of 8",
    "packed": "Trainer + PEFT, packed rows",
    "ours": "jetson-ft",
}
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.head { font-weight: 600 }
.bar { fill: #b9bfc6 }
.ours { fill: #2f7d4f }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .bar { fill: #5b636c }
  .ours { fill: #55b27c }
}"""


def panel(x: int, title: str, rows: list[tuple[str, float, str]]) -> str:
    """Return one group of bars: a title, then (name, value, text) from top to bottom."""
    largest = max(value for _name, value, _text in rows) or 1
    parts = [f'<text class="head" x="{x}" y="20">{escape(title)}</text>']
    for number, (name, value, text) in enumerate(rows):
        y, width = TOP + number * ROW, BAR * value / largest
        kind = "ours" if name == "ours" else "bar"
        box = f'x="{x}" y="{y}" width="{width:.0f}" height="18" rx="2"'
        parts.append(f'<rect class="{kind}" {box}/>')
        parts.append(f'<text x="{x + width + 6:.0f}" y="{y + 14}">{escape(text)}</text>')
    return "".join(parts)


def picture(report: dict) -> str:
    """Return the SVG of a `bench.json`: medians over the rounds."""
    lines = [line for line in report["summary"] if line["tokens_per_second"]]
    speeds = [(line["variant"], line["tokens_per_second"]) for line in lines]
    # Zero: not known.
    memory = [(line["variant"], (line["peak_memory_bytes"] or 0) / 2**30) for line in lines]
    sizes = [(name, value, f"{value:.2f}" if value else "–") for name, value in memory]
    height = TOP + ROW * len(lines) + 6
    names = "".join(
        f'<text x="0" y="{TOP + number * ROW + 14}">{escape(LABELS.get(name, name))}</text>'
        for number, (name, _speed) in enumerate(speeds)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Speed and memory of each variant">'
        f"<style>{STYLE}</style>{names}"
        + panel(LABEL, "tokens per second", [(n, v, f"{v:,.0f}") for n, v in speeds])
        + panel(LABEL + BAR + 90, "peak memory, GiB", sizes)
        + "</svg>\n"
    )


if __name__ == "__main__":
    bench, output = map(Path, sys.argv[1:])
    output.write_text(picture(json.loads(bench.read_text())), encoding="utf-8")
