"""What happens in a run: one dataclass per kind of event, one line of `events.jsonl` each.

Writers emit these and readers get them back (`runs.store`); docs/run-directory.md's table is made
from the fields and their annotations. Times and durations are in seconds, sizes in bytes,
temperatures in degrees Celsius, losses in nats per token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import orjson

from jetson_ft.errors import Message, UserError, _

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA = 1
# A line with greater numbers is damaged. Readers have a place for each step.
MAX_STEP, MAX_ATTEMPT, _MAX_INTEGER = 10**7, 9_999, 2**62
_MAX_FLOAT = 1e100  # far above fp32's, and sums and differences of such numbers are finite
KINDS: dict[str, type[Event]] = {}  # in the order of definition, which is that of the docs

# Phases of a run, by the names that its events give them.
PHASES = {
    "rendezvous": _("connecting to the other machines"),
    "libraries": _("loading libraries"),
    "device": _("detecting the device"),
    "model files": _("fetching model files"),
    "data": _("reading the data"),
    "plan": _("planning memory"),
    "model": _("loading the model"),
    "sharding": _("splitting the model"),
    "training": _("training"),
    "comparison": _("comparing base and adapter"),
    "report": _("writing the report"),
}


@dataclass(frozen=True, kw_only=True)
class Event:
    """The fields of every line; a run's log sets them."""

    kind: ClassVar[str]
    t: float = 0.0  # seconds since 1970
    attempt: int = 0  # grows with each resume; of a step made twice the last attempt's line counts

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        KINDS[kind] = cls


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event, kind="phase"):
    """A part of the work begins."""

    name: Annotated[
        str,
        "`libraries`, `device`, `model files`, `data`, `plan`, `model`, `sharding`, "
        "`training`, `comparison`, `report`, `rendezvous`",
    ]
    detail: Annotated[str, "what it works on"] = ""


@dataclass(frozen=True, kw_only=True)
class PhaseEnded(Event, kind="phase_end"):
    """That part of the work is done."""

    name: Annotated[str, "as in `phase`"]
    seconds: Annotated[float, "duration"]


@dataclass(frozen=True, kw_only=True)
class Download(Event, kind="download"):
    """Progress of a large file from the hub, every two seconds."""

    file: Annotated[str, "its name"]
    done: Annotated[int, "bytes here"]
    total: Annotated[int, "bytes in all"]
    seconds_left: Annotated[float | None, "null while unknown"]


@dataclass(frozen=True, kw_only=True)
class DeviceDetected(Event, kind="device"):
    """The machine that trains."""

    device: Annotated[dict[str, Any], "name, board, kind, memory"]
    precision: Annotated[str, "of the arithmetic: fp32, bf16, fp16"]


@dataclass(frozen=True, kw_only=True)
class ProcessesConnected(Event, kind="processes"):
    """Several processes train together."""

    rank: Annotated[int, "of this process"]
    size: Annotated[int, "number of processes"]
    hosts: Annotated[list[str], "machine of each process"]
    backend: Annotated[str, "that reduces the gradients: gloo, nccl"]


@dataclass(frozen=True, kw_only=True)
class DataPrepared(Event, kind="data"):
    """The rows are read and tokenized."""

    sha256: Annotated[str, "of the rows and the settings that read them"]
    train: Annotated[dict[str, Any], "token report of the training rows"]
    heldout: Annotated[dict[str, Any], "token report of the held-out rows"]
    read: Annotated[dict[str, Any], "report of reading and splitting"]


@dataclass(frozen=True, kw_only=True)
class WeightsLoaded(Event, kind="weights"):
    """Model and adapter are in memory."""

    bytes: Annotated[dict[str, int], "by part: embedding, head, linear, adapter, other"]
    fused: Annotated[dict[str, int], "modules replaced by faster ones, by kind"]
    adapter_parameters: Annotated[int | None, "that are trained"] = None
    adapted_share: Annotated[float | None, "base weights with an adapter beside them"] = None
    quantized_share: Annotated[float | None, "of the base weights"] = None


@dataclass(frozen=True, kw_only=True)
class Planned(Event, kind="plan"):
    """The plan of training."""

    micro_batch_tokens: Annotated[int, "0: each row alone"]
    checkpointing: Annotated[bool, "whether activations are recomputed"]
    shards: Annotated[int, "processes that the frozen layers are split among"]
    peak_memory_bytes: Annotated[int | None, "predicted"]
    seconds: Annotated[float | None, "predicted, with the held-out measurements"]
    other_seconds: Annotated[float | None, "predicted: loading before, the comparison after"] = None
    parts: Annotated[dict[str, int], "of the predicted peak"]
    steps_at_most: Annotated[int, "optimizer steps unless a limit ends the run earlier"]
    packing: Annotated[bool, "whether rows are packed; else each row goes alone"]


@dataclass(frozen=True, kw_only=True)
class TotalSteps(Event, kind="total_steps"):
    """The number of steps is estimated for the first time (`train.max_minutes`)."""

    step: Annotated[int, "steps made"]
    total_steps: Annotated[int, "steps in all"]
    seconds_left: Annotated[float | None, "of training; null while unknown"]


@dataclass(frozen=True, kw_only=True)
class Step(Event, kind="step"):
    """An optimizer step."""

    step: Annotated[int, "from 1"]
    total_steps: Annotated[int | None, "null until it is estimated; `max_minutes` changes it"]
    loss: Annotated[float | None, "mean over the step's supervised tokens"]
    lr: Annotated[float, "learning rate of the step"]
    grad_norm: Annotated[float, "before clipping"]
    tokens: Annotated[int, "trained on so far"]
    tokens_per_second: Annotated[float, "mean so far, over training steps alone"]
    seconds_left: Annotated[float | None, "of training; null while unknown"]
    memory: Annotated[int, "peak so far: allocated on the GPU, or resident on a CPU"]


@dataclass(frozen=True, kw_only=True)
class Sensors(Event, kind="sensors"):
    """Sensor readings of the last ten seconds; a field that isn't known is left out."""

    step: Annotated[int, "steps made"]
    source: Annotated[str, "of the readings: jtop, tegrastats, nvml, sysfs, psutil"]
    watts: Annotated[float | None, "mean"] = None
    temperature: Annotated[float | None, "highest, of the junction or the hottest sensor"] = None
    gpu_load: Annotated[float | None, "mean, percent"] = None
    gpu_mhz: Annotated[float | None, "GPU clock"] = None
    memory_used: Annotated[int | None, "of the machine"] = None
    memory_total: Annotated[int | None, "of the machine"] = None
    throttled_seconds: Annotated[float | None, "with lowered clocks, of the attempt"] = None
    over_current: Annotated[
        dict[str, int] | None,
        "events of the attempt: `oc1` voltage too low, `oc2` mean current, `oc3` peak current",
    ] = None


@dataclass(frozen=True, kw_only=True)
class Paused(Event, kind="pause"):
    """Training waits until the board has cooled."""

    step: Annotated[int, "steps made"]
    temperature: Annotated[float | None, "now"]
    limit: Annotated[float, "`device.max_temperature_c`"]
    until: Annotated[float, "training resumes below it"]


@dataclass(frozen=True, kw_only=True)
class PauseEnded(Event, kind="pause_end"):
    """Training goes on."""

    step: Annotated[int, "steps made"]
    temperature: Annotated[float | None, "now"]
    seconds: Annotated[float, "duration of the pause"]


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event, kind="eval"):
    """A measurement on the held-out rows; step 0 is the base model."""

    step: Annotated[int, "steps made"]
    heldout_loss: Annotated[float | None, "null where it wasn't finite"]
    bits_per_char: Annotated[float | None, "null where it wasn't finite"]
    seconds: Annotated[float, "duration"]


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event, kind="checkpoint"):
    """A checkpoint is on the disk."""

    step: Annotated[int, "steps made"]
    path: Annotated[str, "its folder"]
    seconds: Annotated[float, "duration"]


@dataclass(frozen=True, kw_only=True)
class BestSelected(Event, kind="best"):
    """The step whose weights become the adapter."""

    step: Annotated[int, "of the checkpoint"]
    heldout_loss: Annotated[float | None, "the lowest"]


@dataclass(frozen=True, kw_only=True)
class Generated(Event, kind="generation"):
    """Progress of the comparison's replies, and then of its probes."""

    side: Annotated[str, "`before`: the base model; `after`: with the adapter"]
    part: Annotated[str, "`replies`, `probes`"] = "replies"
    done: Annotated[int, "replies written, or probes answered"]
    total: Annotated[int, "of them in all"]


@dataclass(frozen=True, kw_only=True)
class Warned(Event, kind="warning"):
    """Something a person should know that doesn't end the run."""

    message: Annotated[str, "English"]
    text: Annotated[dict[str, Any], "template and values of the message, for translation"]

    @classmethod
    def of_message(cls, message: Message) -> Warned:
        """Return the event for a message."""
        return cls(message=str(message), text=message.as_json())


@dataclass(frozen=True, kw_only=True)
class Failed(Event, kind="error"):
    """Why the attempt failed."""

    what: Annotated[str, "the fault, English"]
    where: Annotated[str, "file, key or address; may be empty"]
    fix: Annotated[str, "may be empty"]
    messages: Annotated[dict[str, Any], "templates and values of the three, for translation"]
    max_memory_gb: Annotated[
        float | None, "out of memory: `train.max_memory_gb` with which a smaller plan continues"
    ] = None


@dataclass(frozen=True, kw_only=True)
class Exited(Event, kind="exit"):
    """The worker's last event."""

    code: Annotated[
        int,
        "0 finished, 1 fault, 2 refused, 3 stopped, 4 out of memory: try again, 5 disk full",
    ]


Emit = Callable[[Event], None]


def to_json(event: Event) -> dict[str, Any]:
    """Return the line's object: `schema`, `t`, `attempt`, `kind`, then the kind's own fields.

    A float that isn't finite becomes null; of `Sensors`, fields without a value are left out.
    """
    values = {f.name: _finite(getattr(event, f.name)) for f in fields(event)}
    if isinstance(event, Sensors):
        values = {name: value for name, value in values.items() if value is not None}
    head = {"schema": SCHEMA, "t": event.t, "attempt": event.attempt, "kind": event.kind}
    return head | values


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(line: bytes | str) -> Event | None:
    """Return the event of a line; None: a damaged line, or a kind that isn't known here.

    Unknown fields are ignored: later versions may add some. Values have the types of their fields.
    """
    try:
        content = orjson.loads(line)
        if not isinstance(content, dict) or (kind := str(content.get("kind"))) not in KINDS:
            return None
        event = _validator(kind).validate_json(line, strict=True)
        if isinstance(event, Warned):
            Message.from_json(event.text)
        elif isinstance(event, Failed):
            UserError.from_json({"messages": event.messages})
    except ValueError:
        return None
    numbers = [value for value in vars(event).values() if isinstance(value, int | float)]
    is_plausible = (
        0 <= event.attempt <= MAX_ATTEMPT
        and isinstance(event, Step) <= getattr(event, "step", 0) <= MAX_STEP  # a step made: from 1
        and all(abs(n) < (_MAX_INTEGER if isinstance(n, int) else _MAX_FLOAT) for n in numbers)
    )
    return event if is_plausible else None


@functools.cache
def _validator(kind: str) -> TypeAdapter[Event]:
    from pydantic import TypeAdapter

    return TypeAdapter(KINDS[kind])
