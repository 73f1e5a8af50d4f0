"""Update the catalogues `jetson_ft/i18n/*.po` from the texts marked in the source.

Texts are marked with `_("…")` in Python and with `t("…")` or `_("…")` in Jinja templates; the first
lines of the shipped recipes are texts too. With
`--check`, write nothing and fail where a catalogue's texts are not those of the source, lack a
translation, or have other fields than their translation.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po, write_po

from jetson_ft import recipe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jetson_ft"
HEADER = """msgid ""
msgstr ""
"Language: {language}\\n"
"Content-Type: text/plain; charset=utf-8\\n"

"""


def extract() -> Catalog:
    """Return a catalogue of the texts in the source, without translations.

    Raises:
        SystemExit: a text in Python is not a literal.
    """
    template = Catalog()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_":
                text = node.args[0]
                if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                    sys.exit(f"{name}:{node.lineno}: `_` takes a literal")
                template.add(text.value, locations=[(name, text.lineno)])
    for name, line, text, _, _ in extract_from_dir(
        PACKAGE, [("**.jinja", "jinja2")], keywords={"t": None, "_": None}
    ):
        template.add(text, locations=[(f"jetson_ft/{name}", line)])
    for path in recipe.shipped().values():
        template.add(recipe.summary(path), locations=[(f"recipes/{path.name}", 1)])
    return template


def read(path: Path) -> Catalog:
    """Return the catalogue in a file; its name is the language's tag."""
    with open(path, encoding="utf-8") as file:
        return read_po(file, locale=path.stem)


def update(path: Path, template: Catalog) -> None:
    """Add new texts and remove old ones; a changed text keeps its translation, marked as fuzzy."""
    catalogue = read(path)
    catalogue.update(template)
    with open(path, "wb") as file:
        file.write(HEADER.format(language=path.stem).encode())
        write_po(
            file, catalogue, width=100, omit_header=True, sort_by_file=True, include_lineno=False,
            ignore_obsolete=True,
        )  # fmt: skip


def check(path: Path, template: Catalog) -> Iterator[str]:
    """Yield a line for each fault of a catalogue."""
    catalogue = read(path)
    entries = {message.id: message for message in catalogue if message.id}
    texts = {message.id for message in template if message.id}
    for text in sorted(texts | set(entries)):
        entry = entries.get(text)
        if text not in texts:
            yield f"not in the source: {text!r}"
        elif entry is None or not entry.string:
            yield f"without translation: {text!r}"
        elif entry.fuzzy:
            yield f"fuzzy: {text!r}"
        elif fields(text) != fields(str(entry.string)):
            yield f"other fields in the translation: {text!r}"


def fields(text: str) -> set[str]:
    """Return the names of a template's fields; `?` stands for one without a name."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError:  # an unmatched brace
        return {"?"}
    return {name if name.isidentifier() else "?" for name in names}


def main() -> None:
    """Update or check all catalogues."""
    template = extract()
    faults = [f"{message.id!r}: name every field" for message in template
              if message.id and "?" in fields(message.id)]  # fmt: skip
    for path in sorted((PACKAGE / "i18n").glob("*.po")):
        if "--check" not in sys.argv:
            update(path, template)
        faults += [f"{path.relative_to(ROOT)}: {fault}" for fault in check(path, template)]
    print(*faults, sep="\n", end="\n" if faults else "")
    if faults:
        sys.exit(f"{len(faults)} faults.\n  fix:   {sys.argv[0]}, then edit the catalogues")


if __name__ == "__main__":
    main()
