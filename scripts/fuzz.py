"""Fuzz the readers of what comes from outside, guided by coverage.

    python scripts/fuzz.py TARGET --minutes 10
    python scripts/fuzz.py all --minutes 60        # in turn, the same time for each

It needs atheris, which is no dependency of this project:

    python -m venv --system-site-packages build/fuzz-venv    # on top of the project's environment
    build/fuzz-venv/bin/pip install atheris

A finding is an exception other than `UserError`, or a small input that takes too long or too much
memory. Each distinct one is written to the folder of findings once, with its input. Inputs that
reach new code are kept in the folder of the corpus, so that the next call goes on from there.
"""

from __future__ import annotations

import argparse
import atexit
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_SECONDS = 5.0  # for one input
MAX_GROWTH = 512 << 20  # bytes of memory for one input
MAX_BYTES = 1 << 13  # of one input
_RSS_MB = 4096  # beyond it, libFuzzer ends the process
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
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
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
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls":
     [{"function": {"name": "f", "arguments": {"x": 1}}}]}, {"role": "tool", "content": "r"},
     {"role": "assistant", "content": "a"}], "tools": [{"name": "f", "parameters": {}}]},
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
             json.dumps({"text": {"0": "a", "1": "b"}}), json.dumps({"text": ["a", "b"]})]  # fmt: skip
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


# --- sensors ---------------------------------------------------------------------------------


def _aggregate(*readings: Any) -> None:
    """Do with readings what a run's monitor does."""
    from jetson_ft.events import to_json
    from jetson_ft.hardware.monitor import EnergyMeter, SampleAggregator

    samples, meter = SampleAggregator(), EnergyMeter()
    meter.start(0.0)
    for now, reading in enumerate(readings):
        samples.add(float(now), reading)
        assert reading.temperature is None or reading.temperature > -100
        if reading.watts is not None:
            meter.sample(float(now), reading.watts)
    if event := samples.take_event(1):
        json.dumps(to_json(event), allow_nan=False).encode()
    meter.stop(9.0)


@target(
    "RAM 1889/7850MB (lfb 4x1MB) SWAP 0/3925MB CPU [5%@729,off] EMC_FREQ 0%@204 "
    "GR3D_FREQ 63%@[621] cpu@50.5C tj@51C soc2@-256C VDD_IN 4000mW/4000mW",
    "GR3D_FREQ 1%@76 PMIC@100C",
)
def tegrastats(data: bytes) -> None:
    """Read a line of tegrastats."""
    from jetson_ft.hardware.sensors.source import parse_tegrastats

    _aggregate(*map(parse_tegrastats, data.decode("utf-8", "replace").split("\n")))


@target(
    json.dumps(
        [
            {"gpu": {"freq": {"cur": 300000}, "status": {"load": 3.5}}},
            {"RAM": {"used": 1000, "tot": 2000}},
            {"rail": {"VDD_IN": {"power": 4000}}, "tot": {"name": "VDD_IN", "power": 4000}},
            {"tj": {"temp": 50.5, "online": True}},
        ]
    ),
    "[{}, {}, {}, {}]",
)
def jtop(data: bytes) -> None:
    """Read what jtop's client has: any JSON in the place of its four dictionaries."""
    from jetson_ft.hardware.sensors import source

    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(values, list) and len(values) == 4:
        telemetry = source.Telemetry(scratch() / "none", path="")
        telemetry._sources[:] = [(source.parse_jtop(*values) for _ in range(2))]
        _aggregate(telemetry.read(), telemetry.read())


_KERNEL_FILES = (
    "sys/class/thermal/thermal_zone0/type", "sys/class/thermal/thermal_zone0/temp",
    "sys/class/hwmon/hwmon1/name", "sys/class/hwmon/hwmon1/in1_label",
    "sys/class/hwmon/hwmon1/in1_input", "sys/class/hwmon/hwmon1/curr1_input",
    "sys/class/hwmon/hwmon1/oc1_event_cnt", "sys/class/thermal/cooling_device0/type",
    "sys/class/thermal/cooling_device0/cur_state", "sys/devices/gpu.0/load",
    "sys/class/devfreq/17000000.gpu/cur_freq", "proc/meminfo", "proc/self/cgroup",
    "sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat",
    "etc/nv_tegra_release", "etc/nvpmodel.conf", "var/lib/nvpmodel/status", "proc/vmstat",
)  # fmt: skip


@target("\x1e".join((
    "tj-thermal", "50500", "ina3221", "VDD_IN", "5000", "800", "3", "gpu-throttle-alert", "1", "120",
    "306000000", "MemTotal: 8000 kB\nMemAvailable: 4000 kB\n", "0::/a/b\n", "1000000", "5000",
    "inactive_file 100\n", "# R36 (release), REVISION: 4.3", "< POWER_MODEL ID=0 NAME=15W >",
    "pmode:0000", "oom_kill 1\n")))  # fmt: skip
def sysfs(data: bytes) -> None:
    """Read the kernel's files; the input has one after the other, separated by 0x1e."""
    from jetson_ft.hardware import cgroup, jetpack
    from jetson_ft.hardware.sensors import sysfs as module

    root = scratch() / "machine"
    for name, content in itertools.zip_longest(
        _KERNEL_FILES, data.split(b"\x1e")[: len(_KERNEL_FILES)], fillvalue=b""
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    _aggregate(module.read(root))
    printed(module.over_current(root))
    module.alerts(root)
    cgroup.memory_limit(root)
    cgroup.oom_kills(root)
    jetpack.read_l4t(root)
    if modes := jetpack.read_power_modes(root):
        assert modes.fastest in modes.names


# --- run directories -------------------------------------------------------------------------

_RUN_FILES = ("state.json", "about.json", "plan.json", "report.json", "events.jsonl", "log.txt",
              "recipe.yaml", "data.json", "processes.json", "ticket")  # fmt: skip


def _run_seeds() -> list[bytes]:
    from jetson_ft import events

    kinds = [events.Step(step=1, total_steps=9, loss=1.0, lr=1e-3, grad_norm=1.0, tokens=9,
                         tokens_per_second=1.0, seconds_left=1.0, memory=9),
             events.Evaluated(step=0, heldout_loss=1.0, bits_per_char=None, seconds=1.0),
             events.PhaseStarted(name="data", detail="x"),
             events.Warned(message="w", text={"template": "w {a}", "values": {"a": 1}}),
             events.Download(file="f", done=1, total=2, seconds_left=None),
             events.Exited(code=0)]  # fmt: skip
    lines = [json.dumps(events.to_json(event)).encode() + b"\n" for event in kinds]
    state = {"state": "finished", "reason": "r", "resumable": True, "attempt": 1, "created": 1.0,
             "message": {"template": "r {a}", "values": {"a": 1}}, "updated": 2.0, "schema": 1}  # fmt: skip
    figures = {"loss": 1.0, "bits_per_char": 1.0, "chinese_share": 0.5, "stop_rate": 1.0,
               "repetition": 0.0, "chrf": 1.0, "bleu": 1.0, "samples": []}  # fmt: skip
    report = {"schema": 1, "eval": {"rows": 1, "documents": 0, "before": figures, "after": figures}}
    about = {"title": "t", "notes": "n"}
    return [
        *(bytes([0]) + json.dumps(value).encode() for value in (state, [], {})),
        bytes([1]) + json.dumps(about).encode(), bytes([2]) + b'{"steps": 3}',
        bytes([3]) + json.dumps(report).encode(),
        *(bytes([4]) + line for line in (*lines, b"".join(lines))), bytes([5]) + b"log",
        bytes([6]) + b"version: 1\n", bytes([7]) + b"{}",
    ]  # fmt: skip


@target(more=_run_seeds)
def run(data: bytes) -> None:
    """Show a run of which one file is the input; the first byte chooses the file."""
    from jetson_ft.errors import UserError
    from jetson_ft.runs import store
    from jetson_ft.webui.fragments import Fragments

    if not data:
        return
    root = scratch() / "runs"
    shutil.rmtree(root, ignore_errors=True)
    (root / "one").mkdir(parents=True)
    (root / "one" / "recipe.yaml").write_text("version: 1\n")
    (root / "one" / "state.json").write_text('{"state": "finished"}')
    (root / "one" / _RUN_FILES[data[0] % len(_RUN_FILES)]).write_bytes(data[1:])
    opened = store.Run(root / "one")
    fragments = Fragments(root)
    calls = (
        lambda: fragments.run_list("zh_CN", "one", ("one",)),
        lambda: fragments.run_detail("en", "one", ()),
        opened.events, opened.plan, opened.report, opened.recipe, opened.state,
    )  # fmt: skip
    for call in calls:
        try:
            printed(call())
        except UserError as error:
            printed(error)


# --- chats -----------------------------------------------------------------------------------

_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@lru_cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {text: number for number, text in enumerate([*special, *sorted(alphabet)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=special
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


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
    assert [encoded.ids.count(token) for token in range(4)] == [0, 2, 2, 0]
    assert [prompt.count(token) for token in range(4)] == [0, 2, 1, 0]


@target(
    "{{ messages }}",
    _TEMPLATE,
    "{% for i in range(9) %}{{ i }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{% raw %}{% endraw %}",
    "{% macro f() %}{% endmacro %}{{ f() }}",
    "{{ strftime_now('%Y') }}",
)
def chat_template(data: bytes) -> None:
    """Read a chat template."""
    from jetson_ft.data.templates import read_template, with_fixed_date
    from jetson_ft.errors import UserError

    if re.search(rb"range|\*|\d{3}|~", data):  # what it computes is bounded elsewhere
        return
    path = scratch() / "template.jinja"
    path.write_bytes(data)
    try:
        with_fixed_date(read_template(str(path)))
    except UserError as error:
        printed(error)


# --- running ---------------------------------------------------------------------------------


class Watched:
    """A target that writes its findings to a folder and goes on."""

    def __init__(self, name: str, findings: Path) -> None:
        self.name, self.findings = name, findings
        self._function, _seeds = TARGETS[name]

    def __call__(self, data: bytes) -> None:
        memory, started = _peak_bytes(), time.process_time()
        try:
            self._function(data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = "".join(f"{frame.filename}:{frame.lineno}" for frame in frames[-3:])
            self._report(data, f"{type(error).__name__}{place}", traceback.format_exc())
        if (seconds := time.process_time() - started) > MAX_SECONDS:
            self._report(data, "slow", f"{seconds:.1f} s\n")
        if (growth := _peak_bytes() - memory) > MAX_GROWTH:
            self._report(data, "memory", f"{growth >> 20} MiB\n")

    def _report(self, data: bytes, kind: str, text: str) -> None:
        key = hashlib.sha256(kind.encode()).hexdigest()[:10]
        path = self.findings / f"{self.name}-{key}"
        if not path.exists():
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(f"{text}\ninput: {data[:2000]!r}\n")
            print(f"finding: {path.with_suffix('.txt')}\n{text}", file=sys.stderr, flush=True)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(name: str, folder: Path, seconds: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["jetson_ft", "yaml"]):
        watched = Watched(name, folder / "findings")
        for seed in TARGETS[name][1]():
            watched(seed)
    corpus = folder / "corpus" / name
    for seed in TARGETS[name][1]():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = [
        f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-rss_limit_mb={_RSS_MB}",
        "-timeout=60", "-print_final_stats=1", f"-artifact_prefix={folder / 'findings' / name}-",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], watched)
    atheris.Fuzz()


def run_targets(names: list[str], folder: Path, minutes: float) -> Iterator[dict[str, Any]]:
    """Fuzz the targets in turn, each in a process of its own; yield the figures of each."""
    for name in names:
        (folder / "corpus" / name).mkdir(parents=True, exist_ok=True)
        (folder / "findings").mkdir(exist_ok=True)
        seconds = max(1, round(60 * minutes / len(names)))
        command = [sys.executable, __file__, name, "--folder", str(folder), "--child", str(seconds)]
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "JETSON_FT_CACHE": cache, "PYTHONPATH": str(ROOT)}
            started = time.monotonic()
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
        (folder / f"{name}.log").write_text(done.stdout + done.stderr)
        runs = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        yield {
            "target": name, "seconds": round(time.monotonic() - started),
            "executions": int(runs[-1]) if runs else None, "exit": done.returncode,
            "findings": len(list((folder / "findings").glob(f"{name}-*.txt"))),
        }  # fmt: skip


def main() -> None:
    """Read the command line; print a line of JSON for each target."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of what comes from outside.")
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=1.0, help="of all targets together")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz(options.target, options.folder, options.child)
    names = list(TARGETS) if options.target == "all" else [options.target]
    failed = False
    for figures in run_targets(names, options.folder.absolute(), options.minutes):
        print(json.dumps(figures), flush=True)
        failed = failed or bool(figures["findings"] or figures["exit"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
