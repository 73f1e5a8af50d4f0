"""The one exception a person is meant to read.

Everything that can go wrong through input, a machine or a network is raised as
`UserError`; the faces (command line, page) print it as it is. Any other exception is
a fault of this program.
"""

from __future__ import annotations

from dataclasses import dataclass


class UserError(Exception):
    """Says what is wrong, where, and how to mend it, in one message.

    Args:
        what: the fault, a full sentence.
        where: the file, key or address concerned; may be empty.
        fix: what the person can do about it; may be empty.
    """

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str]:
        """For other programs, and for faces that put it into another language."""
        return {"what": self.what, "where": self.where, "fix": self.fix}


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: the dotted key it belongs to, its line (0: none), the text."""

    key: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


class RecipeError(UserError):
    """All mistakes of a recipe at once; `problems` lets a form show each at its field."""

    def __init__(self, problems: list[Problem], where: str) -> None:
        self.problems = problems
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(
            f"The recipe has {count}:\n{listed}",
            where,
            "`jetson-ft recipe schema` lists every key; docs/recipe.md explains them.",
        )
