"""What `scripts/fuzz.py` and the tests call with inputs of any kind: one function for each reader.

A function raises nothing for any input, unless it has met a fault of the program.
"""

from __future__ import annotations

import atexit
import gzip
import io
import itertools
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAX_ROWS = 10_000  # read of one file

Target = Callable[[bytes], None]
TARGETS: dict[str, tuple[Target, Callable[[], list[bytes]]]] = {}  # with the first inputs of each


def target(
    *seeds: str | bytes, more: Callable[[], list[bytes]] = list
) -> Callable[[Target], Target]:
    """Register a function that reads one input, under its name."""

    def register(function: Target) -> Target:
        first = [seed.encode() if isinstance(seed, str) else seed for seed in seeds]
        TARGETS[function.__name__] = function, lambda: first + more()
        return function

    return register


@lru_cache
def scratch() -> Path:
    """Return a folder in memory that lives as long as this process."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="jetson-ft-fuzz-", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def printed(value: Any) -> None:
    """Do what showing a text does: write it as UTF-8."""
    str(value).encode()


# --- recipes ---------------------------------------------------------------------------------


def _recipe_files() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]


@target(
    "a: 1e-4\n",
    "a: [1, {b: c}]\n",
    "a: !!python/name:os.system\n",
    "&a [*a]\n",
    "- '\\u0000'\n",
    "? [x]\n: y\n",
    "{a: 0x1f, a: 1_000}",
    more=_recipe_files,
)
def yaml(data: bytes) -> None:
    """Read YAML; what is read and written again must be the same."""
    from jetson_ft.recipe import strict_yaml

    text = data.decode("utf-8", "replace")
    value, _lines, problems = strict_yaml.parse_yaml(text)
    for problem in problems:
        printed(problem.as_message())
    strict_yaml.parse_scalar(text)
    if value is not None and not problems:
        again, _lines, problems = strict_yaml.parse_yaml(strict_yaml.dump_yaml(value))
        assert repr(again) == repr(value), (value, again, problems)


@target(
    "version: 1\n\0train.steps=3",
    "model: x\n\0lora.rank=[1]",
    "data: {train: [{source: a}]}\n\0",
    more=_recipe_files,
)
def recipe(data: bytes) -> None:
    """Read a recipe and, behind a NUL, an override."""
    from jetson_ft.errors import UserError
    from jetson_ft.recipe import parse_recipe

    text, nul, override = data.decode("utf-8", "replace").partition("\0")
    try:
        parsed = parse_recipe(text, "recipe.yaml", [override] if nul else [])
    except UserError as error:
        printed(error)
        json.dumps(error.as_json())
        return
    assert parse_recipe(parsed.to_yaml()) == parsed


# --- files of rows ---------------------------------------------------------------------------

_ROWS = [
    {"instruction": "问", "input": "", "output": "答"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"text": "一是不了在人有我"},
    {"prompt": "a", "response": "b", "history": [["c", "d"]], "system": "s"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "",
     "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
     {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}],
     "tools": [{"name": "f", "parameters": {}}]},
    {"conversation": [{"human": "a", "assistant": "b"}], "chat": {"turn_1": {"Human": "a"}}},
]  # fmt: skip


def _read(data: bytes, name: str, encoding: str = "auto") -> None:
    """Read the rows of a file of that name and make conversations of them."""
    from jetson_ft.data import layouts
    from jetson_ft.data.formats import RowError
    from jetson_ft.data.readers import read_rows
    from jetson_ft.errors import UserError

    path = scratch() / name
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))  # the cache of hashes gets one entry for each size, not input
    layout = None
    try:
        _info, rows = read_rows(path, encoding)
        for row in itertools.islice(rows, MAX_ROWS):
            if isinstance(row.value, RowError):
                printed(row.value.reason)
                continue
            layout = layout or layouts.detect_layout(row.value)
            try:
                if layout and (layouts.has_layout(row.value, layout) or row.number % 2):
                    conversation = layouts.to_conversation(row.value, layout)
                    json.dumps(conversation.messages, ensure_ascii=False).encode()
                    printed(conversation.tools)
            except RowError as error:
                json.dumps(error.reason.as_json())
    except UserError as error:
        printed(error)
        json.dumps(error.as_json())


def _json_seeds() -> list[bytes]:
    lists = [json.dumps(_ROWS, ensure_ascii=False), json.dumps({"data": _ROWS, "test": _ROWS}),
             json.dumps({"columns": ["text"], "index": [0], "data": [["a"]]}),
             json.dumps({"text": {"0": "a", "1": "b"}}),
             json.dumps({"text": ["a", "b"]})]  # fmt: skip
    return [text.encode() for text in lists] + [json.dumps([row]).encode() for row in _ROWS]


@target("{}", "[{]", '{"train": [{"text": "a"}], "test": [1]}', '[["', more=_json_seeds)
def json_rows(data: bytes) -> None:
    """Read rows of JSON."""
    _read(data, "rows.json")


def _jsonl_seeds() -> list[bytes]:
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in _ROWS]
    return [b"".join(lines), *lines]


@target("{}\n[1]\nnull\n", '{"text": "\\ud800"}\n', "# a\n", more=_jsonl_seeds)
def jsonl(data: bytes) -> None:
    """Read rows of JSON Lines."""
    _read(data, "rows.jsonl")


@target(
    "instruction,output\n问,答\n",
    'a\tb\n"x\ny"\tz\n',
    "sep=;\nquestion;answer\n1;2\n",
    "text\n,\n",
    '"a","a"\n',
    'prompt,response\r\n"a""b",\'c\'\r\n',
)
def csv(data: bytes) -> None:
    """Read rows of CSV, with tabs or semicolons too."""
    _read(data, "rows.csv")


@target("一是不了在人有我\n\n第二", "question,answer\na,b\n", '{"text": "a"}\n')
def txt(data: bytes) -> None:
    """Read plain text."""
    _read(data, "rows.txt")


def _parquet_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for rows in (
        [_ROWS[0]],
        _ROWS[1:2],
        [{"text": "a" * 50}] * 20,
        [{"text": b"\xff"}, {"text": None}],
    ):
        for codec in ("none", "snappy", "gzip"):
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), file, compression=codec)
            tables.append(file.getvalue())
    return tables


@target(b"PAR1", b"PAR1PAR1", b"ARROW1\0\0", more=_parquet_seeds)
def parquet(data: bytes) -> None:
    """Read Parquet."""
    _read(b"PAR1" + data[4:], "rows.parquet")


def _archive_seeds() -> list[bytes]:
    seeds = [gzip.compress(b'{"text": "a"}\n', mtime=0)]
    for names in (
        ["a.jsonl"],
        ["a.jsonl", "__MACOSX/a"],
        ["../a.csv"],
        ["xl/a.xml"],
        ["a/", "a/b.json"],
    ):
        for method in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
            zipfile.ZIP_BZIP2,
            zipfile.ZIP_LZMA,
        ):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", method) as archive:
                for name in names:
                    archive.writestr(zipfile.ZipInfo(name), b'{"text": "a"}\n', method)
            seeds.append(file.getvalue())
    return seeds


@target(b"PK\5\6", b"7z\xbc\xaf\x27\x1c", b"BZh91AY", more=_archive_seeds)
def compressed(data: bytes) -> None:
    """Read compressed files."""
    _read(data, "rows.jsonl.gz" if data[:1] == b"\x1f" else "rows.zip")


_ENCODINGS = ("auto", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030", "big5",
              "shift_jis", "euc-kr", "cp1252", "utf-7", "hz", "iso2022_jp")  # fmt: skip


@target(
    *("\0" + chr(number) + "text" for number in range(14)),
    more=lambda: [
        bytes([0, n]) + "text\n一是不了在人有我".encode(name)
        for n, name in enumerate(("gb18030", "utf-8", "utf-8-sig", "utf-16"))
    ],
)
def encodings(data: bytes) -> None:
    """Read text in an encoding, which the second byte chooses; the first sets the blocks' size."""
    from jetson_ft.data import encodings as module

    if len(data) < 2:
        return
    module.BLOCK_BYTES = data[0] % 7 + 1 if data[0] else 1 << 20
    try:
        _read(data[2:], "rows.csv", _ENCODINGS[data[1] % len(_ENCODINGS)])
    finally:
        module.BLOCK_BYTES = 1 << 20


# --- chats -----------------------------------------------------------------------------------

_MODEL = ROOT / "tests" / "versions" / "1" / "model"


@lru_cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_MODEL)


@target("hi\0there", "<|im_end|>\n<|im_start|>system\nx\0<|im_", "<<|im_end|>|im_end|>\0</s></s>")
def control_tokens(data: bytes) -> None:
    """Encode a question and, behind a NUL, an answer: only the template writes control tokens."""
    from jetson_ft.data.chat_template import encode, encode_prompt
    from jetson_ft.data.formats import ChatMessage
    from jetson_ft.errors import UserError

    question, _nul, answer = data.decode("utf-8", "ignore").partition("\0")
    messages = [
        ChatMessage(role="user", content=question),
        ChatMessage(role="assistant", content=answer),
    ]
    try:
        encoded = encode(_tokenizer(), messages)
        prompt = encode_prompt(_tokenizer(), messages[:1])
    except UserError as error:
        printed(error)
        return
    assert [encoded.ids.count(token) for token in range(3)] == [0, 2, 2]
    assert [prompt.count(token) for token in range(3)] == [0, 2, 1]


@target(
    "{{ messages }}",
    (_MODEL / "chat_template.jinja").read_bytes(),
    "{% for i in range(9) %}{{ i }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{% raw %}{% endraw %}",
    "{% macro f() %}{% endmacro %}{{ f() }}",
    "{{ strftime_now('%Y') }}",
)
def chat_template(data: bytes) -> None:
    """Read a chat template."""
    from jetson_ft.data.template_files import read_template
    from jetson_ft.errors import UserError

    path = scratch() / "template.jinja"
    path.write_bytes(data)
    try:
        read_template(str(path))
    except UserError as error:
        printed(error)
