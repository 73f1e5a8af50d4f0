"""The recipe's schema: every setting is declared here and nowhere else.

docs/recipe.md, the JSON schema for editors and the page's form derive from these classes. A recipe
is YAML; a key that is not written takes the default below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import reduce
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jetson_ft.errors import Message, _
from jetson_ft.recipe import strict_yaml

Layout = Literal["alpaca", "sharegpt", "messages", "text"]  # of a row; see `data.layouts`
Quantization = Literal["none", "int8", "nf4"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
# One line: names and paths with control characters in them are never meant.
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ColumnsRecipe(_Section):
    """Names of the columns of `train` by what is in them; null: detected by the usual names."""

    question: Text | None = Field(
        None, description=_("Column of the question, such as `title`; null: detected.")
    )
    answer: Text | None = Field(
        None, description=_("Column of the answer, such as `body` or `chosen`; null: detected.")
    )
    context: Text | None = Field(
        None, description=_("Column of a text to put before the question; null: `context`.")
    )
    system: Text | None = Field(
        None, description=_("Column of the system message; null: `system` or the like.")
    )
    history: Text | None = Field(
        None, description=_("Column of the earlier questions and answers; null: `history`.")
    )
    messages: Text | None = Field(
        None, description=_("Column of a whole conversation, a list of messages; null: detected.")
    )
    text: Text | None = Field(
        None, description=_("Column of plain text (see `format`); null: `text`, or `content`.")
    )

    def chosen(self) -> dict[str, str]:
        """Return the names that are set, by purpose."""
        return self.model_dump(exclude_none=True)


class SourceRecipe(_Section):
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


class DataRecipe(_Section):
    """The rows to train on and the held-out rows."""

    train: Text | Annotated[list[Text | SourceRecipe], Field(min_length=1)] = Field(
        "bundled",
        description=_(
            "Rows to train on: `bundled` or `bundled-short` (Chinese rows with long or short "
            "answers), a file, or a Hub data set id (`owner/name`). Or a list of these, each a "
            "name or a mapping of `source` and `share` (0.5: half of its rows) or `rows` (at most)."
        ),
    )
    heldout: Count | Text = Field(
        "auto",
        description=_(
            "Rows to evaluate on, never trained on: a file, a number of rows taken from the end of "
            "`train`, or `auto` (the bundled held-out set for bundled data, else the last "
            "min(60, 10 %) rows). Of several sources each gives its part."
        ),
    )
    max_length: int = Field(
        1024, ge=16, le=131072, description=_("Maximum tokens of a row; see `truncation`.")
    )
    truncation: Literal["truncate", "drop"] = Field(
        "truncate",
        description=_("A row longer than `max_length`: `truncate` it, or `drop` the whole row."),
    )
    on_invalid: Literal["error", "skip"] = Field(
        "error",
        description=_("A malformed row: `error` ends the run, `skip` leaves it out and counts it."),
    )
    format: Literal["auto", Layout] = Field(
        "auto",
        description=_(
            "Layout of the rows of `train`; `auto` detects it and reports it. `text`: plain text, "
            "trained on without a chat template."
        ),
    )
    columns: ColumnsRecipe = Field(ColumnsRecipe(), description=ColumnsRecipe.__doc__ or "")
    encoding: Text = Field(
        "auto",
        description=_("Text encoding of `train` (`utf-8`, `gb18030`, …); `auto` detects it."),
    )
    chat_template: Text | None = Field(
        None,
        description=_(
            "Chat template for training, evaluation and chat: `chatml`, `plain`, or a file with "
            "Jinja text; null: the model's own, or `plain` if it has none."
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


class LoraRecipe(_Section):
    """The adapter: low-rank matrices added to the frozen linear layers."""

    rank: int = Field(16, ge=1, le=1024, description=_("Rank of the two adapter matrices."))
    alpha: Positive | None = Field(
        None, description=_("The update is scaled by alpha / rank; null: twice the rank.")
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description=_("Dropout before the adapter; takes memory, rarely helps.")
    )
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        "all-linear",
        description=_(
            "Layers that get an adapter: `all-linear`, or a list of module names (a text may name "
            "them with commas between)."
        ),
    )
    rslora: bool = Field(False, description=_("Scale by alpha / sqrt(rank) instead (rsLoRA)."))
    loraplus_lr_ratio: float = Field(
        1.0,
        ge=1,
        le=64,
        description=_("Learning rate of the B matrices, as a multiple of the A matrices' (LoRA+)."),
    )
    initial_adapter: Text | None = Field(
        None,
        description=_(
            "Adapter to start from: a run's folder, or a folder with a PEFT adapter of the same "
            "model, rank and layers; null: a new adapter."
        ),
    )
    dora: bool = Field(
        False, description=_("Train magnitude and direction separately (DoRA); slower.")
    )

    @model_validator(mode="after")
    def _alpha_follows_rank(self) -> LoraRecipe:
        if self.alpha is None:
            self.alpha = 2.0 * self.rank
        return self

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split_names(cls, targets: Any) -> Any:
        """Make a list of names that a text has with commas between them."""
        if isinstance(targets, str) and "," in targets:
            return [name for name in map(str.strip, targets.split(",")) if name]
        return targets


class TrainRecipe(_Section):
    """Length and speed of training; the first of epochs, max_steps, max_minutes ends the run."""

    epochs: float = Field(3.0, gt=0, le=1000, description=_("Passes over the training rows."))
    max_steps: Count | None = Field(
        None, description=_("Maximum number of optimizer steps; null: no limit.")
    )
    max_minutes: Positive | None = Field(
        None,
        description=_(
            "Training time in minutes, in steps alone; null: no limit. The number of steps follows "
            "the speed of the newest ones, and the learning rate's schedule ends with the last."
        ),
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description=_("Peak learning rate."))
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description=_("Decay of the learning rate after the warm-up.")
    )
    warmup_steps: int = Field(
        5, ge=0, description=_("Steps over which the learning rate rises from zero.")
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description=_("AdamW's weight decay."))
    max_grad_norm: float = Field(1.0, gt=0, description=_("Gradients are clipped to this norm."))
    tokens_per_step: int = Field(
        4096, ge=1, description=_("Tokens of an optimizer step, no padding; rows are never split.")
    )
    max_memory_gb: Positive | None = Field(
        None,
        description=_(
            "Memory for the run, in GB (10^9 bytes); null: what is free at its start. A lower "
            "limit leaves memory to other programs; it changes speed, never the result."
        ),
    )
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description=_("Random seed of the row order and the adapter.")
    )
    eval_every: Count | Literal["auto"] = Field(
        "auto",
        description=_(
            "Steps between evaluations on the held-out rows; `auto`: so that they take about a "
            "tenth of the time."
        ),
    )
    early_stopping_patience: Count | None = Field(
        3,
        description=_("Evaluations without improvement after which training ends; null: never."),
    )
    save_minutes: float = Field(
        10.0, gt=0, description=_("Minutes between checkpoints; each evaluation also saves one.")
    )
    save_total_limit: int = Field(
        2, ge=1, description=_("Number of newest checkpoints to keep; the best one is always kept.")
    )
    on_oom: Literal["stop", "shrink"] = Field(
        "stop",
        description=_(
            "When memory runs out: `stop` the run, or `shrink`: resume from the last checkpoint, "
            "once, with the next smaller plan. This changes speed, never the result."
        ),
    )


class EvalRecipe(_Section):
    """The comparison of base model and adapter on the held-out rows."""

    max_new_tokens: int = Field(
        160, ge=1, le=8192, description=_("Maximum length of a reply in the comparison, in tokens.")
    )
    samples: int = Field(8, ge=0, description=_("Number of replies to show side by side."))


class DeviceRecipe(_Section):
    """Limits that protect the machine."""

    max_temperature_c: Annotated[float, Field(gt=0, le=150)] | None = Field(
        None,
        description=_(
            "Training pauses while the board is hotter than this, in degrees Celsius, until it has "
            "cooled by 5; null: no limit."
        ),
    )


class Recipe(_Section):
    """One fine-tuning job."""

    version: Literal[1] = Field(1, description=_("Version of the recipe format."))
    model: Text = Field(
        "embedded",
        description=_(
            "Base model: `embedded` (SmolLM2-135M-Instruct, works offline), a Hub id such as "
            "`microsoft/phi-1_5`, or a folder with safetensors or GGUF weights."
        ),
    )
    quantize: Quantization = Field(
        "none", description=_("Quantization of the frozen weights; int8 and nf4 need bitsandbytes.")
    )
    double_quantize: bool = Field(
        True, description=_("With nf4: quantize the scales too (saves 0.4 bits per weight).")
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description=_("Number format of the computation; `auto`: bf16 if fast on the device."),
    )
    data: DataRecipe = Field(DataRecipe(), description=DataRecipe.__doc__ or "")
    lora: LoraRecipe = Field(LoraRecipe(), description=LoraRecipe.__doc__ or "")
    train: TrainRecipe = Field(TrainRecipe(), description=TrainRecipe.__doc__ or "")
    eval: EvalRecipe = Field(EvalRecipe(), description=EvalRecipe.__doc__ or "")
    device: DeviceRecipe = Field(DeviceRecipe(), description=DeviceRecipe.__doc__ or "")
    output_dir: Text = Field("runs", description=_("Folder in which each run gets a folder."))

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML: every key with its value."""
        return strict_yaml.dump_yaml(self.model_dump())

    def rename_paths(self, new_name: Callable[[str], str]) -> None:
        """Replace each name that can be the path of a file to read."""
        self.model = new_name(self.model)
        self.data.rename_sources(new_name)
        if isinstance(self.data.heldout, str):
            self.data.heldout = new_name(self.data.heldout)
        if self.data.chat_template:
            self.data.chat_template = new_name(self.data.chat_template)
        if self.lora.initial_adapter:
            self.lora.initial_adapter = new_name(self.lora.initial_adapter)

    def sha256(self) -> str:
        """Return the hash of the resolved values; comments and order in the file don't matter."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def diff(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the dotted keys whose values differ, each with (own, other) value."""
        pairs = {key: (attrgetter(key)(self), attrgetter(key)(other)) for key in fields()}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def json_schema() -> str:
    """Return the JSON schema, for editors and other programs."""
    return json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def fields(section: type[BaseModel] = Recipe) -> dict[str, Any]:
    """Return the pydantic field of every setting by its dotted key, in the order of the schema."""
    result: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            result |= {f"{name}.{key}": value for key, value in fields(inner).items()}
        else:
            result[name] = field
    return result


def type_name(annotation: Any) -> Message:
    """Return a field's type in plain words."""
    names = {
        int: _("a whole number"), float: _("a number"), str: _("text"), bool: _("true or false"),
        type(None): "null",
    }  # fmt: skip
    if annotation in names:
        return Message(names[annotation])
    if get_origin(annotation) is Literal:
        choices = list(map(str, get_args(annotation)))
        template = _("one of {choices}") if len(choices) > 1 else "{choices}"
        return Message(template, {"choices": ", ".join(choices)})
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if annotation == list[Text]:
        return Message(_("a list of names"))
    if get_origin(annotation) is list:
        values = {"item": type_name(*get_args(annotation))}
        return Message(_("a list, each item {item}"), values)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Message(_("a mapping of {keys}"), {"keys": ", ".join(annotation.model_fields)})
    return reduce(
        lambda one, other: Message(_("{one} or {other}"), {"one": one, "other": other}),
        map(type_name, get_args(annotation)),
    )
