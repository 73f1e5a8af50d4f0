"""Write docs/recipe.md's table of keys and docs/recipe.schema.json from the schema.

With `--check` write nothing and fail if they are not what the schema says.
"""

import sys
from pathlib import Path

from jetson_ft import recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE, SCHEMA = ROOT / "docs" / "recipe.md", ROOT / "docs" / "recipe.schema.json"
BEGIN, END = "<!-- keys: made by scripts/document_recipe.py -->\n", "<!-- end of keys -->"


def table() -> str:
    """One row a key: name, type, default, meaning."""
    lines = ["| key | values | default | what it does |", "|---|---|---|---|"]
    for name, field in recipe.fields():
        values = recipe.type_name(field.annotation).replace("|", "\\|")
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        help_text = field.description.replace("|", "\\|")
        lines.append(f"| `{name}` | {values} | `{default}` | {help_text} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with its table made anew."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table() + "\n" + END + after


def main() -> None:
    """Writes or checks both files."""
    stale = []
    for path, text in ((PAGE, page()), (SCHEMA, recipe.json_schema())):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: not what the schema says. Run {sys.argv[0]}.")


if __name__ == "__main__":
    main()
