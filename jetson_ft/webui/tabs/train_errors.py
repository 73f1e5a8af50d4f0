"""Errors on the Train tab, in the form's words: what the command line sets is a button here."""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup, escape

from jetson_ft.errors import UserError, _
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.run_settings import SETTINGS

# `--set KEY=VALUE`, `KEY: VALUE, KEY: VALUE` and `KEY` in the texts of errors.
_SET = re.compile(r"`--set ([a-z_.]+)=([^`]+)`")
_SETTINGS = re.compile(r"`((?:[a-z_.]+: [^`,]+(?:, |(?=`)))+)`")
_CODE = re.compile(r"`([^`]*)`")


def complaint(error: UserError, t: Locale, runs: Path) -> str:
    """Return the error as a box, with a button for each setting that would fix it."""
    uploads = re.compile(re.escape(f"{runs.absolute()}/uploads/") + r"[0-9a-f]{8}/")
    what, where, fix = (uploads.sub("", t(text)) for text in (error.what, error.where, error.fix))
    remedies = [f"{key}: {value}" for key, value in _SET.findall(fix) if key in SETTINGS]
    remedies += [text for text in _SETTINGS.findall(fix) if is_settings(text)]
    return render(
        "complaint.jinja", t, what=_in_words(what, t), where=where, fix=_in_words(fix, t),
        remedies=[(text, remedy_title(text, t)) for text in dict.fromkeys(remedies)],
    )  # fmt: skip


def is_settings(text: str) -> bool:
    """Return whether a text is `KEY: VALUE, KEY: VALUE`, of the form's keys."""
    return all(part.partition(": ")[0] in SETTINGS for part in text.split(", "))


def remedy_title(settings: str, t: Locale) -> str:
    """Return what a button that applies these settings says."""
    if settings == "data.on_invalid: skip":
        return t(_("Skip the broken rows"))
    names = []
    for part in settings.split(", "):
        key, _colon, value = part.partition(": ")
        template = _SHORT.get(key, _("{label}: {value}"))
        names.append(t(template, value=value, label=t(SETTINGS[key].title or key)))
    return t(_("Use {settings}"), settings=" + ".join(names))


# What a plan suggests.
_SHORT = {
    "quantize": "{value}",
    "precision": "{value}",
    "data.max_length": _("rows of at most {value} tokens"),
    "lora.rank": _("rank {value}"),
}


def _in_words(text: str, t: Locale) -> Markup:
    """Return a text as HTML: keys by their labels, other code in a fixed width."""

    def in_words(match: re.Match[str]) -> str:
        key, equals, value = match[1].removeprefix("--set ").partition("=")
        if key in SETTINGS:
            label = t(SETTINGS[key].title or key)
            return f"<b>{escape(f'{label}: {value}' if equals else label)}</b>"
        return f"<code>{escape(match[1])}</code>"

    pieces, end = [], 0
    for match in _CODE.finditer(text):
        pieces += [str(escape(text[end : match.start()])), in_words(match)]
        end = match.end()
    return Markup("".join([*pieces, str(escape(text[end:]))]))  # noqa: S704 - escaped above
