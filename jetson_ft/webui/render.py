"""Texts and templates (`templates/`) in the language of the page or of a response."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from html import escape
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from starlette.requests import cookie_parser

from jetson_ft import i18n
from jetson_ft.errors import Message, UserError, joined
from jetson_ft.files import printable, printable_value

_CODE = re.compile(r"`([^`\n]+)`")
_PAGE = re.compile(r"/(?:live/)?(\w+)/")
_TEMPLATES = Environment(
    loader=PackageLoader("jetson_ft.webui"), autoescape=True, finalize=printable_value,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_TOKENS = files("jetson_ft.runs.report").joinpath("tokens.css").read_text("utf-8")
_TEMPLATES.globals |= {"joined": joined, "duration": i18n.duration, "tokens": _TOKENS}
_TEMPLATES.filters["message"] = Message.from_json


def _with_code(text: str) -> Markup:
    """Return a text as HTML, what stands between backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", escape(text)))  # noqa: S704 - escaped


_TEMPLATES.filters["code"] = _with_code


class Locale:
    """Put texts into one language; a language without a catalogue becomes English."""

    def __init__(self, language: str) -> None:
        self.language = language if language in i18n.languages() else i18n.SOURCE
        self.tag = self.language.replace("_", "-")  # BCP 47, for HTML's `lang`
        self._translate = i18n.translator(self.language)

    def __call__(self, text: str | Message | UserError, **values: Any) -> str:
        """Return a text in this language, control characters in its values escaped.

        Args:
            values: of the fields of a template.
        """
        message = Message(text, values) if isinstance(text, str) else text
        return printable(message.format(self._translate))


def render(template: str, t: Locale, **values: Any) -> str:
    """Return a template's HTML; `t` translates its texts."""
    return _TEMPLATES.get_template(template).render(t=t, **values)


def error_html(error: str | UserError, t: Locale) -> str:
    """Return an error as a box on the page."""
    return f'<div class="complaint" role="alert">{escape(t(error))}</div>'


def preferred_language(accept_language: str) -> str:
    """Return the catalogue that suits a browser's `Accept-Language` (RFC 9110) best.

    Languages are compared without their region: `zh-TW` gets `zh_CN` where there is no other.
    """
    accepted: list[tuple[float, str]] = []
    for part in accept_language.split(","):
        tag, _, quality = part.partition(";q=")
        with suppress(ValueError):
            accepted.append((float(quality or 1), tag.strip().replace("-", "_").lower()))
    for _, tag in sorted(accepted, key=lambda pair: -pair[0]):
        primary = tag.partition("_")[0]
        near = [name for name in i18n.languages() if name.partition("_")[0] == primary]
        if near:
            return next((name for name in near if name.lower() == tag), near[0])
    return i18n.SOURCE


def request_language(path: str, headers: Mapping[str, str]) -> str:
    """Return the language of a response: the page's that sent the request, or the chosen one."""
    referer = headers.get("referer", "").partition("://")[2].partition("/")[2]
    pages = [_PAGE.match(address) for address in (path, f"/{referer}")]
    chosen = cookie_parser(headers.get("cookie", "")).get("jetson-ft-language", "")
    for language in (*(page[1] for page in pages if page), chosen):
        if language in i18n.languages():
            return language
    return preferred_language(headers.get("accept-language", ""))
