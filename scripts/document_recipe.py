"""Write docs/recipe.md's table of keys and docs/recipe.schema.json from the recipe's schema.

With `--check`, write nothing and fail if one of them is out of date.
"""

import json
import sys
from pathlib import Path

from jetson_ft import recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE, SCHEMA = ROOT / "docs" / "recipe.md", ROOT / "docs" / "recipe.schema.json"
BEGIN, END = "<!-- keys: made by scripts/document_recipe.py -->\n", "<!-- end of keys -->"


def key_table() -> str:
    """Return a Markdown table with a row for each key; `name` is what the page calls it."""
    lines = ["| key | name | values | default | meaning |", "|---|---|---|---|---|"]
    for name, field in recipe.fields().items():
        values = str(recipe.type_name(field.annotation)).replace("|", "\\|")
        default = field.default if isinstance(field.default, str) else json.dumps(field.default)
        help_text = field.description.replace("|", "\\|")
        lines.append(f"| `{name}` | {field.title} | {values} | `{default}` | {help_text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write or check both files."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page = f"{before}{BEGIN}\n{key_table()}\n{END}{after}"
    stale = []
    for path, text in ((PAGE, page), (SCHEMA, recipe.json_schema())):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: out of date with the schema.\n  fix:   {sys.argv[0]}")


if __name__ == "__main__":
    main()
