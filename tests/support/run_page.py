"""All fragments of a run's page together."""

from __future__ import annotations

from jetson_ft.webui.fragments import VIEWS, Fragments


def run_page(fragments: Fragments, language: str, name: str, *others: str) -> str:
    """Return a run's head and all its views, drawn with other runs."""
    views = [fragments.run_view(language, name, view, (name, *others), {}) for view in VIEWS]
    return "\n".join([fragments.run_head(language, name, "overview"), *views])
