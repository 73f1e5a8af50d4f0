"""The sources of sensor readings, on every kind of machine, intact and broken."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from boards_in_folders import AGX, LAPTOP, MIB, NANO, NX, Board, FakeMachine
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jetson_ft.hardware.sensors import source, sysfs
from jetson_ft.hardware.sensors.reading import Reading
from jetson_ft.hardware.sensors.source import Telemetry, parse_jtop, parse_tegrastats

BOARDS = [pytest.param(board, id=board.model.split()[-1]) for board in (NANO, NX, AGX)]
WATTS = {NANO.model: 12.02, NX.model: 14.952, AGX.model: 12.0}
HEAT = {NANO.model: 62.5, NX.model: 44.5, AGX.model: 57.6}


def read(telemetry: Telemetry, until: Callable[[Reading], Any]) -> Reading:
    """Return the first reading with a condition; programs need a moment for their first line."""
    deadline = time.monotonic() + 10
    try:
        while time.monotonic() < deadline:
            reading = telemetry.read()
            if until(reading):
                return reading
            time.sleep(0.02)
    finally:
        telemetry.close()
    raise AssertionError(f"no such reading: {reading}")


# --- tegrastats' lines ---------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS)
def test_line_of_each_jetpack_is_parsed(board: Board) -> None:
    reading = parse_tegrastats(board.line)
    assert reading.memory_total == board.memory * MIB and (reading.memory_used or 0) > 0
    assert reading.watts == pytest.approx(WATTS[board.model])
    assert reading.temperature == HEAT[board.model]
    assert "cv0" not in reading.temperatures and set(reading.temperatures) >= {"cpu", "gpu", "soc0"}


@pytest.mark.parametrize(
    ("text", "load", "clock"),
    [
        ("0%", 0, None), ("99%", 99, None), ("0%@0", 0, 0), ("63%@621", 63, 621),
        ("63%@[621]", 63, 621), ("12%@[1300,1299]", 12, 1300), ("off", None, None),
        ("63%@[62", 63, None), ("6", None, None), ("100%@[", 100, None),
    ],
)  # fmt: skip
def test_every_form_of_load_and_clock_is_parsed(text: str, load: Any, clock: Any) -> None:
    end = " VIC off" if "@[" not in text or "]" in text else ""
    reading = parse_tegrastats(f"RAM 1/2MB GR3D_FREQ {text}{end}")
    assert (reading.gpu_load, reading.gpu_mhz) == (load, clock)


def test_line_without_swap_emc_and_clock_is_parsed() -> None:
    reading = parse_tegrastats(
        "RAM 779/7620MB (lfb 2x4MB) CPU [0%@1344] GR3D_FREQ 0% cpu@50.1C tj@50.5C "
        "VDD_IN 6626mW/6625mW VDD_SOC 2380mW/2380mW"
    )
    assert (reading.gpu_load, reading.gpu_mhz, reading.watts) == (0, None, 6.626)
    assert dict(reading.temperatures) == {"cpu": 50.1, "tj": 50.5}


def test_temperature_is_that_of_the_junction_or_the_highest() -> None:
    assert parse_tegrastats("cpu@70C gpu@80.5C tj@75C").temperature == 75
    assert parse_tegrastats("cpu@70C gpu@80.5C CV1@-256C").temperature == 80.5
    assert parse_tegrastats("CV1@-256C").temperature is None
    assert parse_tegrastats("tj@99C").throttled and not parse_tegrastats("tj@98.9C").throttled


def test_unconnected_pins_are_left_out() -> None:
    reading = parse_tegrastats("NC 0mW/0mW VDD_IN 100mW/90mW NC 5mW/5mW")
    assert dict(reading.rails) == {"VDD_IN": 0.1}


@pytest.mark.parametrize("board", BOARDS)
def test_truncated_line_gives_no_wrong_value(board: Board) -> None:
    whole = parse_tegrastats(board.line)
    for length in range(len(board.line)):
        part = parse_tegrastats(board.line[:length])
        assert set(part.rails.items()) <= set(whole.rails.items())
        assert set(part.temperatures.items()) <= set(whole.temperatures.items())
        assert part.gpu_load in (None, whole.gpu_load)
        assert part.gpu_mhz in (None, whole.gpu_mhz)
        assert part.memory_total in (None, whole.memory_total)
        assert part.watts in (None, pytest.approx(whole.watts))


def mangled() -> st.SearchStrategy[str]:
    """Generate lines with words removed, doubled or replaced."""
    originals = [word for board in (NANO, NX, AGX) for word in board.line.split(" ")]
    words = st.one_of(st.sampled_from(originals), st.text(max_size=8))
    return st.lists(words, max_size=30).map(" ".join)


@given(mangled())
@example("RAM 99999999999999999999/1MB VDD_IN 9999999999999999999999mW tj@1e999C GR3D_FREQ ١%@[٢]")
def test_mangled_line_gives_possible_values(line: str) -> None:
    reading = parse_tegrastats(line)
    assert all(-60 < value < 200 for value in reading.temperatures.values())
    assert reading.watts is None or reading.watts >= 0
    reading.throttled  # noqa: B018 - may not raise


# --- the kernel's files ---------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS)
def test_sysfs_gives_the_same_values(board: Board, tmp_path: Path) -> None:
    FakeMachine(tmp_path, board)
    reading = Telemetry(tmp_path, path="").read()
    assert (reading.source, reading.gpu_load, reading.gpu_mhz) == ("sysfs", 97, 1015)
    assert reading.memory_total == board.memory * MIB
    assert reading.memory_used == pytest.approx(board.memory * MIB / 4, rel=1e-3)
    assert dict(reading.temperatures) == {"cpu": 61.5, "gpu": 62.125, "tj": 62.5}
    assert reading.watts == pytest.approx(WATTS[board.model], rel=2e-3)
    assert dict(reading.over_current) == {"oc1": 0, "oc2": 0, "oc3": 0} and not reading.throttled


def test_firmware_alert_is_throttling(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NANO)
    board.alert("gpu", 0)
    assert not Telemetry(tmp_path, path="").read().throttled
    board.alert("gpu", 1)
    reading = Telemetry(tmp_path, path="").read()
    assert reading.throttled and reading.alerts == ("gpu",)


BROKEN = [b"", b"\xff\xfe", b"nan", b"-", b"1e400", b"12 34", b"\0\0", b"9" * 400]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_broken_file_is_left_out(tmp_path_factory: Any, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("board")
    board = FakeMachine(root, data.draw(st.sampled_from([NANO, NX, AGX])))
    board.alert("cpu", 1)
    files = sorted(path for path in (*root.rglob("sys/**/*"), root / "proc/meminfo")
                   if path.is_file())  # fmt: skip
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=8)):
        path.write_bytes(data.draw(st.sampled_from(BROKEN)))
    reading = Telemetry(root, path="").read()
    assert all(-60 < value < 200 for value in reading.temperatures.values())
    assert sysfs.gpu_clocks(root).get("cur", 0.0) >= 0


def test_unreadable_file_is_left_out(tmp_path: Path) -> None:
    """Zones of sleeping units raise EAGAIN; a folder instead of a file raises OSError as well."""
    board = FakeMachine(tmp_path, NANO)
    zone = board.root / "sys/class/thermal/thermal_zone2/temp"
    zone.unlink()
    zone.mkdir()
    assert dict(sysfs.zones(tmp_path)) == {"cpu": 61.5, "gpu": 62.125}


# --- which source is taken -----------------------------------------------------------------------


def test_tegrastats_comes_before_the_files(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NANO)
    board.over_current(0, 2, 7)
    reading = read(Telemetry(tmp_path, board.tegrastats()), lambda reading: reading.watts)
    assert (reading.source, reading.watts, reading.gpu_mhz) == ("tegrastats", 12.02, 1015)
    assert dict(reading.over_current) == {"oc1": 0, "oc2": 2, "oc3": 7}, "that tegrastats hasn't"


def test_newest_complete_line_is_used(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NANO)
    path = board.program("tegrastats", "echo 'tj@1C'; echo 'tj@2C'; printf 'tj@3C VDD_'; sleep 60")
    assert read(Telemetry(tmp_path, path), lambda reading: reading.temperature).temperature == 2


def test_ended_tegrastats_is_replaced_by_sysfs(tmp_path: Path) -> None:
    board = FakeMachine(tmp_path, NANO)
    path = board.program("tegrastats", f"echo '{NANO.line}'; exit 1")
    assert read(Telemetry(tmp_path, path), lambda reading: reading.source == "sysfs").watts


def test_silent_tegrastats_is_replaced_by_sysfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = FakeMachine(tmp_path, NANO)
    telemetry = Telemetry(tmp_path, board.program("tegrastats", "exec sleep 60"))
    assert telemetry.read().source == "tegrastats"
    monkeypatch.setattr(source, "_TEGRASTATS_SILENT_SECONDS", 0.0)
    assert telemetry.read().source == "sysfs"
    telemetry.close()


def test_close_ends_tegrastats(tmp_path: Path) -> None:
    import psutil

    board = FakeMachine(tmp_path, NANO)
    others = psutil.Process().children()  # of tests before
    telemetry = Telemetry(tmp_path, board.tegrastats())
    telemetry.read()
    (child,) = (child for child in psutil.Process().children() if child not in others)
    telemetry.close()
    assert not child.is_running()


JTOP = """
class jtop:
    def __init__(self, interval):
        self.gpu = {"gpu": {"status": {"load": 42.5}, "freq": {"cur": 918000}}}
        self.memory = {"RAM": {"tot": 8000, "used": 3000, "free": 10, "shared": 900}}
        self.power = {"rail": {"VDD_SOC": {"power": 900}}, "tot": {"name": "VDD_IN", "power": 9500}}
        self.temperature = {"tj": {"temp": 55.5, "online": True},
                            "cv0": {"temp": -256, "online": False}}
    def start(self):
        ACT
    def ok(self, spin):
        return True
    def close(self):
        pass
"""


@pytest.fixture
def jtop_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a board with jtop's socket and a client whose `start` runs `act`."""

    def make(act: str) -> Telemetry:
        (tmp_path / "client").mkdir()
        (tmp_path / "client/jtop.py").write_text(JTOP.replace("ACT", act))
        monkeypatch.syspath_prepend(tmp_path / "client")
        monkeypatch.delitem(sys.modules, "jtop", raising=False)
        board = FakeMachine(tmp_path / "root", NANO)
        board.write("run/jtop.sock", "")
        return Telemetry(board.root, path="")

    yield make
    sys.modules.pop("jtop", None)


def test_jtop_is_preferred(jtop_board: Any) -> None:
    reading = jtop_board("pass").read()
    assert (reading.source, reading.gpu_load, reading.gpu_mhz) == ("jtop", 42.5, 918)
    assert (reading.memory_used, reading.memory_total) == (3000 * 1024, 8000 * 1024)
    assert (reading.watts, dict(reading.temperatures)) == (9.5, {"tj": 55.5})


@pytest.mark.parametrize("act", ["raise RuntimeError('Mismatch version')", "self.memory = None"])
def test_unusable_jtop_is_replaced_by_sysfs(jtop_board: Any, act: str) -> None:
    assert jtop_board(act).read().source == "sysfs"


def test_hanging_jtop_is_replaced_by_sysfs(
    jtop_board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_JTOP_START_SECONDS", 0.1)
    assert jtop_board("import time; time.sleep(30)").read().source == "sysfs"


def test_jtop_socket_without_the_package_is_ignored(tmp_path: Path) -> None:
    FakeMachine(tmp_path, NANO).write("run/jtop.sock", "")
    assert Telemetry(tmp_path, path="").read().source == "sysfs"


def test_total_of_jtop_without_a_name_is_ignored() -> None:
    power = {"rail": {"VDD_GPU_SOC": {"power": 100}}, "tot": {"power": 100, "avg": 90}}
    assert parse_jtop({}, {}, power, {}).watts is None


def test_laptop_gives_memory(tmp_path: Path) -> None:
    FakeMachine(tmp_path, LAPTOP)
    reading = Telemetry(tmp_path, path="").read()
    assert (
        reading.source == "psutil" and (reading.memory_total or 0) > (reading.memory_used or 0) > 0
    )
    assert reading.watts is None and not reading.over_current


# --- NVML ----------------------------------------------------------------------------------------

NOT_SUPPORTED = "not supported"
GPU_VALUES = {
    "UtilizationRates": SimpleNamespace(gpu=87), "ClockInfo": 1980, "Temperature": 61,
    "MemoryInfo": SimpleNamespace(used=40960 * MIB, total=81559 * MIB), "PowerUsage": 412350,
}  # fmt: skip


class FakeNvml(ModuleType):
    """The module pynvml, for GPUs with these values."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, nvmlMemory_v2 = 1, 0, 33554472

    def __init__(self, *gpus: dict[str, Any], driver: bool = True) -> None:
        super().__init__("pynvml")
        self.gpus, self.driver, self.users = gpus, driver, 0
        self.handles: list[int | str] = []

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("library not found")
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        self.handles.append(index)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        self.handles.append(uuid)
        return self.gpus[0]

    def __getattr__(self, name: str) -> Any:
        def get(gpu: dict[str, Any], *_: Any) -> Any:
            value = gpu[name.removeprefix("nvmlDeviceGet")]
            if value == NOT_SUPPORTED:
                raise self.NVMLError(value)
            return value

        return get


def gpu_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvml: ModuleType | None, gpus: int = 1
) -> Telemetry:
    """Return the sensors of a laptop with the driver's device file."""
    FakeMachine(tmp_path, LAPTOP).write("dev/nvidia0", "")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return Telemetry(tmp_path, "", gpus)


@pytest.mark.parametrize("sign", ["dev/nvidia0", "usr/bin/nvidia-smi"])
def test_discrete_gpu_is_read_through_nvml(
    sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, nvml = FakeMachine(tmp_path, LAPTOP), FakeNvml(GPU_VALUES)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine.write(sign, "").chmod(0o755)
    telemetry = Telemetry(tmp_path, str(tmp_path / "usr/bin"))
    reading = telemetry.read()
    assert (reading.source, reading.gpu_load, reading.gpu_mhz, reading.watts) == (
        "nvml", 87, 1980, 412.35,
    )  # fmt: skip
    assert (reading.memory_used, reading.memory_total) == (40960 * MIB, 81559 * MIB)
    assert reading.temperature == 61
    assert nvml.users == 1
    telemetry.close()
    assert nvml.users == 0


def test_machine_that_shows_no_nvidia_driver_does_not_use_nvml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeMachine(tmp_path, LAPTOP)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(GPU_VALUES))
    assert Telemetry(tmp_path, path="").read().source == "psutil"


def test_several_gpus_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = {
        "UtilizationRates": SimpleNamespace(gpu=89), "ClockInfo": 1000, "Temperature": 40,
        "MemoryInfo": SimpleNamespace(used=40 * MIB, total=41 * MIB), "PowerUsage": 100000,
    }  # fmt: skip
    reading = gpu_machine(tmp_path, monkeypatch, FakeNvml(GPU_VALUES, second), gpus=2).read()
    assert (reading.gpu_load, reading.gpu_mhz, reading.temperature) == (88, 1980, 61)
    assert reading.watts == pytest.approx(512.35)
    assert (reading.memory_used, reading.memory_total) == (41000 * MIB, 81600 * MIB)


@pytest.mark.parametrize("name", GPU_VALUES)
def test_unsupported_value_of_a_gpu_is_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml(GPU_VALUES, GPU_VALUES | {name: NOT_SUPPORTED})
    reading = gpu_machine(tmp_path, monkeypatch, nvml, gpus=2).read()
    assert (reading.source, reading.gpu_load, reading.temperature) == ("nvml", 87, 61)
    # Half of the power would be wrong.
    assert reading.watts == (None if name == "PowerUsage" else pytest.approx(824.7))


@pytest.mark.parametrize(
    "nvml",
    [None, FakeNvml(driver=False), FakeNvml(), FakeNvml(dict.fromkeys(GPU_VALUES, NOT_SUPPORTED))],
    ids=["no package", "no driver", "no GPU", "no value"],
)
def test_unusable_nvml_is_replaced_by_the_next_source(
    nvml: ModuleType | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_machine(tmp_path, monkeypatch, nvml).read().source == "psutil"
    assert not getattr(nvml, "users", 0), "the library is released"


@pytest.mark.parametrize(
    ("visible", "gpus", "handles"),
    [("3", 1, [3]), ("", 1, [0]), ("2", 2, [0, 1]), ("GPU-5fd4", 1, ["GPU-5fd4"]),
     ("1, 0", 2, [1, 0])],
)  # fmt: skip
def test_gpus_are_those_that_the_environment_names(
    visible: str, gpus: int, handles: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml(*[GPU_VALUES] * 4)
    assert gpu_machine(tmp_path, monkeypatch, nvml, gpus).read().source == "nvml"
    assert nvml.handles == handles


# --- nothing raises ------------------------------------------------------------------------------


def test_source_that_fails_later_is_replaced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeMachine(tmp_path, NANO)
    telemetry = Telemetry(tmp_path, path="")
    assert telemetry.read().source == "sysfs"

    def fail(root: Path) -> Reading:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(source.sysfs, "read", fail)
    assert telemetry.read().source == "psutil"
    monkeypatch.setattr(source.psutil, "virtual_memory", lambda: 1 / 0)
    assert telemetry.read() == Reading("none")


@settings(max_examples=15, deadline=None)
@given(output=st.lists(st.binary(max_size=60), max_size=6).map(b"\n".join))
def test_any_output_of_tegrastats_gives_a_reading(tmp_path_factory: Any, output: bytes) -> None:
    machine = FakeMachine(tmp_path_factory.mktemp("machine"), LAPTOP)
    (machine.root / "output").write_bytes(output + b"\n")
    path = machine.program("tegrastats", f"cat {machine.root}/output; exec sleep 60")
    telemetry = Telemetry(machine.root, path)
    try:
        for _ in range(3):
            assert telemetry.read().source in ("tegrastats", "psutil")
            time.sleep(0.005)
    finally:
        telemetry.close()
