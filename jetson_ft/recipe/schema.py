"""The recipe's schema: every setting is declared here (those of the rows in `data_schema`)
and nowhere else.

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
    Field,
    field_validator,
    model_validator,
)

from jetson_ft.errors import Message, _
from jetson_ft.recipe import strict_yaml
from jetson_ft.recipe.data_schema import Count, DataRecipe, Positive, Section, Text

Quantization = Literal["none", "int8", "nf4"]


class LoraRecipe(Section):
    """The adapter: low-rank matrices added to the frozen linear layers."""

    rank: int = Field(
        16, ge=1, le=1024, title=_("Rank"), description=_("Rank of the two adapter matrices.")
    )
    alpha: Positive | None = Field(
        None,
        title=_("Alpha"),
        description=_("The update is scaled by alpha / rank; null: twice the rank."),
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        title=_("Dropout"),
        description=_("Dropout before the adapter; takes memory, rarely helps."),
    )
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        "all-linear",
        title=_("Adapted layers"),
        description=_(
            "`all-linear`, or a list of module names (a text may name them with commas between)."
        ),
    )
    rslora: bool = Field(
        False, title=_("rsLoRA"), description=_("Scale by alpha / sqrt(rank) instead.")
    )
    loraplus_lr_ratio: float = Field(
        1.0,
        ge=1,
        le=64,
        title=_("LoRA+ ratio"),
        description=_("Learning rate of the B matrices, as a multiple of that of the A matrices."),
    )
    initial_adapter: Text | None = Field(
        None,
        title=_("Initial adapter"),
        description=_(
            "A run's folder, or a folder with a PEFT adapter of the same model, rank and "
            "layers; null: a new adapter."
        ),
    )
    dora: bool = Field(
        False,
        title=_("DoRA"),
        description=_("Train magnitude and direction separately; slower."),
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


class TrainRecipe(Section):
    """Length and speed of training; the first of epochs, max_steps, max_minutes ends the run."""

    epochs: float = Field(
        3.0,
        gt=0,
        le=1000,
        title=_("Passes over the data"),
        description=_("Passes over the training rows."),
    )
    max_steps: Count | None = Field(
        None,
        title=_("Step limit"),
        description=_("Maximum number of optimizer steps; null: no limit."),
    )
    max_minutes: Positive | None = Field(
        None,
        title=_("Time limit (minutes)"),
        description=_(
            "Minutes for the training steps alone; null: no limit. The number of steps follows "
            "the speed of the newest ones, and the learning rate's schedule ends with the "
            "last."
        ),
    )
    learning_rate: float = Field(
        2e-4, gt=0, le=1, title=_("Learning rate"), description=_("Peak learning rate.")
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine",
        title=_("Learning rate schedule"),
        description=_("Decay of the learning rate after the warm-up."),
    )
    warmup_steps: int = Field(
        5,
        ge=0,
        title=_("Warm-up (steps)"),
        description=_("Steps over which the learning rate rises from zero."),
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1, title=_("Weight decay"), description=_("AdamW's weight decay.")
    )
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        title=_("Gradient clipping"),
        description=_("Gradients are clipped to this norm."),
    )
    tokens_per_step: int = Field(
        4096,
        ge=1,
        title=_("Tokens per step"),
        description=_("Tokens of an optimizer step, no padding; rows are never split."),
    )
    max_memory_gb: Positive | None = Field(
        None,
        title=_("Memory limit (GB)"),
        description=_(
            "Memory for the run, in GB (10^9 bytes); null: what is free at its start. A lower "
            "limit leaves memory to other programs; it changes speed, never the result."
        ),
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        title=_("Random seed"),
        description=_("Of the row order and the adapter."),
    )
    eval_every: Count | Literal["auto"] = Field(
        "auto",
        title=_("Steps between evaluations"),
        description=_(
            "Evaluations are on the held-out rows; `auto`: they take about a tenth of the time."
        ),
    )
    early_stopping_patience: Count | None = Field(
        3,
        title=_("Early stopping"),
        description=_("Evaluations without improvement that end the training; null: never."),
    )
    save_minutes: float = Field(
        10.0,
        gt=0,
        title=_("Minutes between checkpoints"),
        description=_("Each evaluation also saves one."),
    )
    save_total_limit: int = Field(
        2,
        ge=1,
        title=_("Checkpoints to keep"),
        description=_("The newest ones; the best one is always kept."),
    )
    on_oom: Literal["stop", "shrink"] = Field(
        "stop",
        title=_("When memory runs out"),
        description=_(
            "`stop` the run, or `shrink`: resume once, from the last checkpoint with the next "
            "smaller plan. This changes speed, never the result."
        ),
    )


class EvalRecipe(Section):
    """The comparison of base model and adapter on the held-out rows."""

    max_new_tokens: int = Field(
        160,
        ge=1,
        le=8192,
        title=_("Longest reply (tokens)"),
        description=_("Maximum length of a reply in the comparison, in tokens."),
    )
    samples: int = Field(
        8,
        ge=0,
        title=_("Replies to show"),
        description=_("Base and adapter side by side."),
    )


class DeviceRecipe(Section):
    """Limits that protect the machine."""

    max_temperature_c: Annotated[float, Field(gt=0, le=150)] | None = Field(
        None,
        title=_("Pause above (°C)"),
        description=_(
            "Training pauses while the board is hotter, until it has cooled by 5 degrees; "
            "null: no limit."
        ),
    )


class RunRecipe(Section):
    """What happens after a power cut or a crash; these keys may change when a run is resumed."""

    auto_resume: bool = Field(
        False,
        title=_("Resume by itself"),
        description=_(
            "After a crash, a hang or a power cut. A process that crashed or hangs is replaced "
            "at once; after a power cut or a shutdown the run goes on when the page, the "
            "container or the service starts. Not after Stop, nor after a fault that would "
            "repeat."
        ),
    )
    max_restarts: Count = Field(
        3,
        title=_("Restarts in a row"),
        description=_(
            "How many without a new checkpoint. Then the run waits until it is resumed by hand."
        ),
    )


class Recipe(Section):
    """One fine-tuning job."""

    version: Literal[1] = Field(
        1, title=_("Recipe format"), description=_("Version of the recipe format.")
    )
    model: Text = Field(
        "embedded",
        title=_("Base model"),
        description=_(
            "`embedded` (SmolLM2-135M-Instruct, works offline), a Hub id such as "
            "`microsoft/phi-1_5`, or a folder with safetensors or GGUF weights."
        ),
    )
    quantize: Quantization = Field(
        "none",
        title=_("Quantization"),
        description=_("Quantization of the frozen weights; int8 and nf4 need bitsandbytes."),
    )
    double_quantize: bool = Field(
        True,
        title=_("Quantize the scales too"),
        description=_("With nf4; saves 0.4 bits per weight."),
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        title=_("Precision"),
        description=_("Number format of the computation; `auto`: bf16 if fast on the device."),
    )
    data: DataRecipe = Field(DataRecipe(), description=DataRecipe.__doc__ or "")
    lora: LoraRecipe = Field(LoraRecipe(), description=LoraRecipe.__doc__ or "")
    train: TrainRecipe = Field(TrainRecipe(), description=TrainRecipe.__doc__ or "")
    eval: EvalRecipe = Field(EvalRecipe(), description=EvalRecipe.__doc__ or "")
    device: DeviceRecipe = Field(DeviceRecipe(), description=DeviceRecipe.__doc__ or "")
    run: RunRecipe = Field(RunRecipe(), description=RunRecipe.__doc__ or "")
    output_dir: Text = Field(
        "runs", title=_("Folder of runs"), description=_("Folder in which each run gets a folder.")
    )

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
