"""What can be said before a run starts: its plan, and its rows as the model reads them."""

from __future__ import annotations

from html import escape
from typing import Any

from jetson_ft.webui.words import Words


def plan_html(found: dict[str, Any], words: Words) -> str:
    """A dry run in words, and its memory as a bar against what is free."""
    device, rows = found["forecast"], found["rows"]
    plan = device["plan"]
    lines = [
        words("plan.rows", rows=f"{rows['train']['rows']:,}", heldout=rows["heldout"]["rows"]),
        words("plan.tokens", tokens=f"{found['tokens']:,}", steps=f"{found['steps']:,}"),
    ]
    if plan:
        lines.append(words("plan.time", time=words.duration(plan["seconds"])))
    elif device["would_fit"]:
        settings = "; ".join(f"{one['settings']}" for one in device["would_fit"])
        lines.append(words("plan.would", settings=settings))
    peak = plan["peak_memory_bytes"] if plan else device["least_memory_bytes"]
    share = peak / device["memory_bytes"]
    verdict = "fits" if plan and share < 0.85 else "tight" if plan else "no"
    memory = words(
        "plan.memory", peak=f"{peak / 2**30:.2f}", free=f"{device['memory_bytes'] / 2**30:.1f}"
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f'<ul class="plan">{items}</ul><div class="bar large memory {verdict}">'
        f'<i style="width: {min(100, 100 * share):.1f}%"></i></div>'
        f'<p class="small">{escape(memory)} · <b>{words("plan." + verdict)}</b></p>'
    )


def inspection_html(found: dict[str, Any], words: Words) -> str:
    """What became of the rows, and some as the model reads them: what it learns is marked."""
    read, tokens = found["read"], found["tokens"]
    lengths = tokens["lengths"]
    lines = [
        words("rows.read", read=f"{read['rows_read']:,}", kept=f"{read['rows_kept']:,}",
              layout=read["layout"], encoding=read["encoding"]),
        *(
            words("rows.dropped", count=f"{one['count']:,}", reason=words.said(reason),
                  where=", ".join(one["where"][:5]))
            for reason, one in read["dropped"].items()
        ),
        words("rows.duplicates", count=f"{read['duplicates']:,}"),
        words("rows.tokens", tokens=f"{tokens['tokens']:,}",
              supervised=f"{tokens['supervised_tokens']:,}",
              each=tokens["tokens_per_character"]),
        words("rows.lengths", **lengths),
        words("rows.truncated", count=f"{tokens['truncated']:,}", at=f"{found['max_length']:,}"),
    ]  # fmt: skip
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="plan">{items}</ul>{_previews(found["previews"], words)}'


def _previews(rows: list[list[tuple[str, bool]]], words: Words) -> str:
    if not rows:
        return ""
    shown = "".join(
        "<pre class='tokens'>"
        + "".join(
            f"<mark>{escape(text)}</mark>" if learnt else escape(text) for text, learnt in row
        )
        + "</pre>"
        for row in rows
    )
    return f'<p class="small">{words("rows.preview")}</p>{shown}'
