"""Which of the machine's files a visitor of the page may name, as data, model or chat template.

On a page that only this machine can reach: all that the server's user may read. Otherwise what is
inside the folders that the page's start names. Names that stand for no local file (bundled sets,
models by name, Hub ids) are always allowed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from jetson_ft.errors import UserError, _
from jetson_ft.files import expand_user
from jetson_ft.recipe import Recipe
from jetson_ft.runs import manager


@dataclass(frozen=True)
class AllowedPaths:
    """The folders whose files may be named; None: every file."""

    folders: tuple[Path, ...] | None = None

    def require(self, name: str) -> str:
        """Return the name unchanged; raise `UserError` if it is a path outside the folders.

        Links are followed. Whether a file outside exists is not revealed.
        """
        if self.folders is None or name in manager.RESERVED_NAMES:
            return name
        try:
            path = expand_user(name)
            real = path.resolve()
        except (OSError, ValueError, RuntimeError, UserError):  # NUL, a loop, an unknown ~user
            raise _refusal(name) from None
        # A Hub id, or nothing; below a folder of this machine, not even whether it exists is said.
        is_relative = not path.is_absolute() and ".." not in path.parts
        if is_relative and path.parts and not os.path.lexists(path.parts[0]):
            return name
        if any(real.is_relative_to(folder.resolve()) for folder in self.folders):
            return name
        raise _refusal(name)

    def require_recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe unchanged; raise `UserError` for a path in it that is outside."""
        recipe.rename_paths(self.require)
        return recipe


EVERY_PATH = AllowedPaths()


def _refusal(name: str) -> UserError:
    return UserError(
        _("Visitors of this page may not name files outside its folders."),
        name,
        _("Upload the file, or start the page with `--allow-path FOLDER`."),
    )
