"""Read what a run's files contain: any content, owner or kind of file ends in `DamagedRun`."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import printable

SCHEMA = 1  # of all files of a run
_MAX_BYTES = 1 << 24


class DamagedRun(UserError):
    """A file of a run that can't be used.

    Args:
        path: the file.
        reason: what is wrong with it; the end of a sentence.
        fix: what to do; by default to restore the file or to delete the run.
    """

    def __init__(self, path: Path, reason: str | Message, fix: str = "", **values: Any) -> None:
        self.reason = reason if isinstance(reason, Message) else Message(reason, values)
        fix = fix or _("Put back an intact copy of the file, or delete the run.")
        what = Message(
            _("{file} is damaged: {reason}."), {"file": path.name, "reason": self.reason}
        )
        super().__init__(what, printable(str(path)), fix)


class NewerRun(DamagedRun):
    """A file of a run that a later version of this program wrote."""


class About(BaseModel):
    """`about.json`: what a person wrote on the run."""

    title: str = ""
    notes: str = ""


class Base(BaseModel):
    """What identifies a base model and its tokenizer (`contract.describe_base`)."""

    fingerprint: str
    weights: dict[str, str]
    config: dict[str, Any]
    tokens: int
    vocabulary: str
    chat_template: str


class Data(BaseModel):
    """What this program reads of `data.json`: what the last attempt trained with."""

    sha256: str
    recipe: dict[str, Any]
    base: Base | None = None  # not in runs of older versions, nor is the next
    token_ids_sha256: str | None = None


class InitialAdapter(BaseModel):
    """`initial/source.json`: where the adapter that a run started from comes from."""

    path: str
    run: str | None
    step: int | None
    base: str | None
    sha256: str


class _SmallerPlan(BaseModel):
    micro_batch_tokens: int = Field(ge=0)
    checkpointing: bool
    peak_memory_bytes: int = Field(ge=0)
    memory_limit_gb: float = Field(gt=0)


class Plan(BaseModel):
    """What this program reads of `plan.json`."""

    micro_batch_tokens: int = Field(0, ge=0)
    checkpointing: bool = False
    peak_memory_bytes: int = Field(0, ge=0)
    parts: dict[str, int] = {}
    memory_limit_gb: float | None = Field(None, gt=0)
    smaller: _SmallerPlan | None = None


class _Train(BaseModel):
    steps: int
    best_step: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    energy_joules: float | None = None  # older runs have no energy
    joules_per_token: float | None = None


class _Sensors(BaseModel):
    throttled_seconds: float
    over_current: dict[str, int]
    paused_seconds: float = 0.0


class _Side(BaseModel):
    loss: float
    bits_per_char: float
    chinese_share: float
    stop_rate: float
    repetition: float
    chrf: float
    bleu: float
    rouge_l: float = 0.0  # not in reports of older runs, nor are the next
    distinct_1: float = 0.0
    distinct_2: float = 0.0


class _Difference(BaseModel):
    difference: float
    low: float
    high: float
    clear: bool


class _Category(BaseModel):
    name: str
    rows: int
    before: float
    after: float
    difference: _Difference


class _ProbeSide(BaseModel):
    correct: list[str]
    share: float


class _Probes(BaseModel):
    count: int
    before: _ProbeSide
    after: _ProbeSide
    lost: list[str]
    gained: list[str]
    difference: _Difference


class _Eval(BaseModel):
    rows: int
    documents: int | None = None
    before: _Side
    after: _Side
    differences: dict[str, _Difference] = {}  # not in reports of older runs, nor are the next
    categories: list[_Category] = []
    probes: _Probes | None = None


class _Speed(BaseModel):
    seconds_per_reply: float
    tokens_per_second: float


class _Generation(BaseModel):
    before: _Speed | None = None
    after: _Speed | None = None


class Report(BaseModel):
    """What this program reads of `report.json` after it was written."""

    eval: _Eval | None
    generation: _Generation | None = None
    comparison_error: str | None = None
    train: _Train
    sensors: _Sensors | None = None


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file without waiting for the other side of a FIFO; return its descriptor.

    Raises:
        DamagedRun: something else than a file is in its place.
        OSError: it can't be opened.
    """
    number = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise DamagedRun(path, _("it is not a regular file"))
    return number


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file of a run for reading.

    Raises:
        DamagedRun: it is missing, something else than a file, or can't be read.
    """
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DamagedRun(path, _("it is missing")) from error
    except OSError as error:
        text = error.strerror or str(error)
        raise DamagedRun(path, _("it can't be read ({error})"), error=text) from error


def open_to_append(path: Path) -> int:
    """Open a regular file of a run to read and append, or make it; return its descriptor.

    Raises:
        DamagedRun: something else is in its place.
        OSError: the disk refuses it.
    """
    try:
        return open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    except (IsADirectoryError, PermissionError) as error:
        text = error.strerror or str(error)
        raise DamagedRun(path, _("it can't be read ({error})"), error=text) from error


def read_bytes(path: Path, limit: int = _MAX_BYTES) -> bytes:
    """Return the content of a run's file of at most `limit` bytes.

    Raises:
        DamagedRun: it can't be read, or is larger.
    """
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DamagedRun(path, _("it has more than {limit:,} bytes"), limit=limit)
    return content


def read_object(path: Path, content: Any) -> dict[str, Any]:
    """Return the object in one of a run's JSON files.

    Args:
        content: a model or dataclass of what must be in it; other keys are not checked.

    Raises:
        DamagedRun: it can't be read, isn't JSON, or has values of other types.
        NewerRun: a later version of this program wrote it.
    """
    data = read_bytes(path)
    try:
        stored = orjson.loads(data)
    except ValueError as error:
        raise DamagedRun(path, _("it is not valid JSON ({error})"), error=str(error)) from error
    schema = stored.get("schema", SCHEMA) if isinstance(stored, dict) else SCHEMA
    if isinstance(schema, int) and schema > SCHEMA:
        fix = _("Update jetson-ft; a later version wrote this file.")
        raise NewerRun(path, _("its format {schema} is not known here"), fix, schema=schema)
    try:
        _validator(content).validate_json(data, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
        raise DamagedRun(
            path,
            _("unexpected value of `{key}` ({error})"),
            key=printable(".".join(map(str, details["loc"]))[:100]),
            error=details["msg"],
        ) from error
    return dict(stored)


@functools.cache
def _validator(content: Any) -> TypeAdapter[Any]:
    return TypeAdapter(content)
