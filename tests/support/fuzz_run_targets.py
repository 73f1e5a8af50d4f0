"""Like `fuzz_targets`, for what a machine's sensors and a run directory contain."""

from __future__ import annotations

import itertools
import json
import shutil
from functools import partial
from typing import Any

from fuzz_targets import printed, scratch, target

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
    "tj-thermal", "50500", "ina3221", "VDD_IN", "5000", "800", "3", "gpu-throttle-alert", "1", "9",
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
             "message": {"template": "r {a}", "values": {"a": 1}}, "updated": 2.0,
             "schema": 1}  # fmt: skip
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
    from jetson_ft.webui.fragments import VIEWS, Fragments

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
        lambda: fragments.run_head("en", "one", "overview"),
        *(partial(fragments.run_view, "en", "one", view, ("one",), {}) for view in VIEWS),
        opened.events, opened.plan, opened.report, opened.recipe, opened.state,
    )  # fmt: skip
    for call in calls:
        try:
            printed(call())
        except UserError as error:
            printed(error)
