"""The recipe's settings of the rows, `data.…`, and the types that the rest of the schema shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from jetson_ft.errors import _

Layout = Literal["alpaca", "sharegpt", "messages", "text"]  # of a row; see `data.layouts`

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
# One line: names and paths with control characters in them are never meant.
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")]


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ColumnsRecipe(Section):
    """Names of the columns of `train` by what is in them; null: detected by the usual names."""

    question: Text | None = Field(
        None,
        title=_("Question column"),
        description=_("Column of the question, such as `title`; null: detected."),
    )
    answer: Text | None = Field(
        None,
        title=_("Answer column"),
        description=_("Column of the answer, such as `body` or `chosen`; null: detected."),
    )
    context: Text | None = Field(
        None,
        title=_("Context column"),
        description=_("Column of a text to put before the question; null: `context`."),
    )
    system: Text | None = Field(
        None,
        title=_("System message column"),
        description=_("Column of the system message; null: `system` or the like."),
    )
    history: Text | None = Field(
        None,
        title=_("History column"),
        description=_("Column of the earlier questions and answers; null: `history`."),
    )
    messages: Text | None = Field(
        None,
        title=_("Conversation column"),
        description=_("Column of a whole conversation, a list of messages; null: detected."),
    )
    text: Text | None = Field(
        None,
        title=_("Text column"),
        description=_("Column of plain text (see `format`); null: `text`, or `content`."),
    )

    def chosen(self) -> dict[str, str]:
        """Return the names that are set, by purpose."""
        return self.model_dump(exclude_none=True)


class SourceRecipe(Section):
    """One of several sources of training rows, and how many of its rows to take."""

    source: Text = Field(description=_("A file, a Hub data set id or a bundled set."))
    share: float | None = Field(
        None, gt=0, le=1, description=_("Share of its rows to take; null: all of them.")
    )
    rows: Count | None = Field(None, description=_("Rows to take at most; null: no limit."))

    @model_validator(mode="after")
    def _one_limit(self) -> SourceRecipe:
        if self.share is not None and self.rows is not None:
            raise PydanticCustomError("two_limits", "share and rows")
        return self

    @model_serializer
    def _set_keys(self) -> dict[str, Any]:
        """Return the keys that have a value, for short lists in recipes."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def __repr__(self) -> str:  # as a recipe has it, for messages about changed settings
        return repr(self.model_dump())

    def __str__(self) -> str:
        if self.share is not None:
            return f"{self.source} (share {self.share:g})"
        return self.source if self.rows is None else f"{self.source} (at most {self.rows} rows)"


class DataRecipe(Section):
    """The rows to train on and the held-out rows."""

    train: Text | Annotated[list[Text | SourceRecipe], Field(min_length=1)] = Field(
        "bundled",
        title=_("Training data"),
        description=_(
            "Rows to train on: `bundled` or `bundled-short` (Chinese rows with long or short "
            "answers), a file, or a Hub data set id (`owner/name`). Or a list of these, each a "
            "name or a mapping of `source` and `share` (0.5: half of its rows) or `rows` (at most)."
        ),
    )
    heldout: Count | Text = Field(
        "auto",
        title=_("Held-out rows"),
        description=_(
            "Rows to evaluate on, never trained on: `auto`, a number of rows, or a file. A "
            "number is taken from the end of `train`, of several sources a part from each. "
            "`auto`: the bundled held-out set for bundled data, else the last min(60, 10 %) "
            "rows."
        ),
    )
    max_length: int = Field(
        1024,
        ge=16,
        le=131072,
        title=_("Longest row (tokens)"),
        description=_("Maximum tokens of a row."),
    )
    truncation: Literal["truncate", "drop"] = Field(
        "truncate",
        title=_("Longer rows"),
        description=_("A row longer than that: `truncate` it, or `drop` it whole."),
    )
    on_invalid: Literal["error", "skip"] = Field(
        "error",
        title=_("Broken rows"),
        description=_("`error` ends the run, `skip` leaves them out and counts them."),
    )
    format: Literal["auto", Layout] = Field(
        "auto",
        title=_("Layout of the rows"),
        description=_(
            "`auto` detects it and reports it. `text`: plain text, trained on without a chat "
            "template."
        ),
    )
    columns: ColumnsRecipe = Field(ColumnsRecipe(), description=ColumnsRecipe.__doc__ or "")
    encoding: Text = Field(
        "auto",
        title=_("Text encoding"),
        description=_("Such as `utf-8` or `gb18030`; `auto` detects it."),
    )
    chat_template: Text | None = Field(
        None,
        title=_("Chat template"),
        description=_(
            "For training, evaluation and chat: `chatml`, `plain`, or a file with Jinja text; "
            "null: the model's own, or `plain` if it has none."
        ),
    )

    def sources(self) -> list[SourceRecipe]:
        """Return the sources of `train`."""
        items = [self.train] if isinstance(self.train, str) else self.train
        return [SourceRecipe(source=item) if isinstance(item, str) else item for item in items]

    def train_names(self) -> str:
        """Return the sources of `train` as text for people."""
        return ", ".join(map(str, self.sources()))

    def rename_sources(self, new_name: Callable[[str], str]) -> None:
        """Replace the name of every source of `train`."""
        if isinstance(self.train, str):
            self.train = new_name(self.train)
            return
        self.train = [
            new_name(item)
            if isinstance(item, str)
            else item.model_copy(update={"source": new_name(item.source)})
            for item in self.train
        ]
