"""Colours are tokens, with a value for light and one for dark; the heat scale's order is seen."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import ImageColor

import jetson_ft

PACKAGE = Path(jetson_ft.__file__).parent
TOKENS = PACKAGE / "runs" / "report" / "tokens.css"
INSIDE = PACKAGE / "inside" / "static" / "inside.css"
SHEETS = sorted({*PACKAGE.rglob("*.css"), *PACKAGE.rglob("*.html.jinja")} - {TOKENS})
SHEETS += sorted((PACKAGE / "webui" / "templates").glob("*.jinja"))
_NAMES = "|".join(ImageColor.colormap)
LITERAL = re.compile(
    rf"#[0-9a-f]{{3,8}}\b|\b(?:rgb|hsl|hwb|lab|lch|oklab|oklch)a?\(|(?<![\w-])(?:{_NAMES})(?![\w-])",
    re.IGNORECASE,
)


def styles(path: Path) -> list[str]:
    """Return the values that a file's styles give to properties."""
    text = path.read_text("utf-8")
    if path.suffix == ".jinja":
        text = re.sub(r"{% set icon %}.*?{% endset %}", "", text)  # no page's tokens reach it
        sheets = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
        attributes = re.findall(r'\bstyle="([^"]*)"|\b(?:fill|stroke)="([^"]*)"', text)
        text = "\n".join([*sheets, *(f"x: {style or colour};" for style, colour in attributes)])
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    declarations = re.findall(r"([\w-]+)\s*:\s*([^;{}]+)", text)
    return [value for name, value in declarations if not re.match("--(on-)?heat-", name)]


def test_no_style_has_a_literal_colour() -> None:
    literal = {
        f"{path.relative_to(PACKAGE)}: {value}"
        for path in SHEETS
        for value in styles(path)
        if LITERAL.search(value)
    }
    assert literal == set()
    assert len(SHEETS) > 30 and len(styles(INSIDE)) > 100
    assert LITERAL.search("1px solid White") and LITERAL.search("rgb(0 0 0)")
    assert not LITERAL.search("var(--curve-0) pre-wrap white-space")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_heat_scale_is_ordered_by_lightness(scheme: str) -> None:
    """Lightness is what eyes that don't tell colours apart see of it."""
    text = INSIDE.read_text("utf-8")
    pairs = re.findall(r"--heat-(\d): light-dark\((#\w+), (#\w+)\)", text)
    assert [number for number, *_ in pairs] == list("012345")
    index = 1 if scheme == "light" else 2
    values = [lightness(ImageColor.getrgb(pair[index])[:3]) for pair in pairs]
    sign = -1 if scheme == "light" else 1  # more is farther from the ground
    assert all(sign * (after - before) > 7 for before, after in pairwise(values)), values


def lightness(rgb: tuple[int, ...]) -> float:
    """Return L* (CIE 1976) of an sRGB colour, 0 to 100."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in rgb)
    ]
    luminance = sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance
