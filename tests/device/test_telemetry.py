"""Every form of tegrastats' lines, every kind of machine, and whatever may be broken in them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boards_in_folders import AGX, LAPTOP, MIB, NANO, NX, Board, Folder
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jetson_ft.device import streams, sysfs, telemetry
from jetson_ft.device.jtop_client import of_jtop
from jetson_ft.device.reading import Reading
from jetson_ft.device.tegrastats import parse
from jetson_ft.device.telemetry import Telemetry

BOARDS = [pytest.param(board, id=board.model.split()[-1]) for board in (NANO, NX, AGX)]
WATTS = {NANO.model: 12.02, NX.model: 14.952, AGX.model: 12.0}
HEAT = {NANO.model: 62.5, NX.model: 44.5, AGX.model: 57.6}


def read(found: Telemetry, until: Callable[[Reading], Any]) -> Reading:
    """A reading that has what is waited for; programs take a moment to say their first line."""
    deadline = time.monotonic() + 10
    try:
        while time.monotonic() < deadline:
            reading = found.read()
            if until(reading):
                return reading
            time.sleep(0.02)
    finally:
        found.close()
    raise AssertionError(f"it never came: {reading}")


# --- tegrastats' lines ---------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS)
def test_each_jetpacks_line_is_understood(board: Board) -> None:
    found = parse(board.line)
    assert found.memory_total == board.memory * MIB and (found.memory_used or 0) > 0
    assert found.watts == pytest.approx(WATTS[board.model])
    assert found.temperature == HEAT[board.model]
    assert "cv0" not in found.temperatures and set(found.temperatures) >= {"cpu", "gpu", "soc0"}


@pytest.mark.parametrize(
    ("said", "load", "clock"),
    [
        ("0%", 0, None), ("99%", 99, None), ("0%@0", 0, 0), ("63%@621", 63, 621),
        ("63%@[621]", 63, 621), ("12%@[1300,1299]", 12, 1300), ("off", None, None),
        ("63%@[62", 63, None), ("6", None, None), ("100%@[", 100, None),
    ],
)  # fmt: skip
def test_load_and_clock_have_many_forms(said: str, load: Any, clock: Any) -> None:
    end = " VIC off" if "@[" not in said or "]" in said else ""
    found = parse(f"RAM 1/2MB GR3D_FREQ {said}{end}")
    assert (found.gpu_load, found.gpu_mhz) == (load, clock)


def test_without_rights_without_swap_and_with_the_gpu_asleep() -> None:
    found = parse("RAM 779/7620MB (lfb 2x4MB) CPU [0%@1344] GR3D_FREQ 0% cpu@50.1C tj@50.5C "
                  "VDD_IN 6626mW/6625mW VDD_SOC 2380mW/2380mW")  # fmt: skip
    assert (found.gpu_load, found.gpu_mhz, found.watts) == (0, None, 6.626)
    assert dict(found.temperatures) == {"cpu": 50.1, "tj": 50.5}


def test_the_junction_decides_and_else_the_hottest() -> None:
    assert parse("cpu@70C gpu@80.5C tj@75C").temperature == 75
    assert parse("cpu@70C gpu@80.5C CV1@-256C").temperature == 80.5
    assert parse("CV1@-256C").temperature is None
    assert parse("tj@99C").throttled and not parse("tj@98.9C").throttled


def test_pins_that_lead_nowhere_are_no_rails() -> None:
    found = parse("NC 0mW/0mW VDD_IN 100mW/90mW NC 5mW/5mW")
    assert dict(found.rails) == {"VDD_IN": 0.1}


@pytest.mark.parametrize("board", BOARDS)
def test_a_line_cut_anywhere_tells_nothing_false(board: Board) -> None:
    whole = parse(board.line)
    for length in range(len(board.line)):
        part = parse(board.line[:length])
        assert set(part.rails.items()) <= set(whole.rails.items())
        assert set(part.temperatures.items()) <= set(whole.temperatures.items())
        assert part.gpu_load in (None, whole.gpu_load)
        assert part.gpu_mhz in (None, whole.gpu_mhz)
        assert part.memory_total in (None, whole.memory_total)
        assert part.watts in (None, pytest.approx(whole.watts))


def mangled() -> st.SearchStrategy[str]:
    """Lines with pieces cut out, doubled or replaced."""
    pieces = [piece for board in (NANO, NX, AGX) for piece in board.line.split(" ")]
    words = st.one_of(st.sampled_from(pieces), st.text(max_size=8))
    return st.lists(words, max_size=30).map(" ".join)


@given(mangled())
@example("RAM 99999999999999999999/1MB VDD_IN 9999999999999999999999mW tj@1e999C GR3D_FREQ ١%@[٢]")
def test_no_line_raises_and_what_is_told_is_possible(line: str) -> None:
    found = parse(line)
    assert all(-60 < value < 200 for value in found.temperatures.values())
    assert found.watts is None or found.watts >= 0
    found.throttled  # noqa: B018 - may not raise


# --- the kernel's files ---------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS)
def test_the_kernels_files_tell_the_same(board: Board, tmp_path: Path) -> None:
    Folder(tmp_path, board)
    found = Telemetry(tmp_path, path="").read()
    assert (found.source, found.gpu_load, found.gpu_mhz) == ("sysfs", 97, 1015)
    assert found.memory_total == board.memory * MIB
    assert found.memory_used == pytest.approx(board.memory * MIB / 4, rel=1e-3)
    assert dict(found.temperatures) == {"cpu": 61.5, "gpu": 62.125, "tj": 62.5}
    assert found.watts == pytest.approx(WATTS[board.model], rel=2e-3)
    assert dict(found.over_current) == {"oc1": 0, "oc2": 0, "oc3": 0} and not found.throttled


def test_the_firmwares_alert_is_throttling(tmp_path: Path) -> None:
    board = Folder(tmp_path, NANO)
    board.alert("gpu", 0)
    assert not Telemetry(tmp_path, path="").read().throttled
    board.alert("gpu", 1)
    found = Telemetry(tmp_path, path="").read()
    assert found.throttled and found.alerts == ("gpu",)


BROKEN = [b"", b"\xff\xfe", b"nan", b"-", b"1e400", b"12 34", b"\0\0", b"9" * 400]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_broken_files_are_left_out(tmp_path_factory: Any, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("board")
    board = Folder(root, data.draw(st.sampled_from([NANO, NX, AGX])))
    board.alert("cpu", 1)
    files = sorted(path for path in (*root.rglob("sys/**/*"), root / "proc/meminfo")
                   if path.is_file())  # fmt: skip
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=8)):
        path.write_bytes(data.draw(st.sampled_from(BROKEN)))
    found = Telemetry(root, path="").read()
    assert all(-60 < value < 200 for value in found.temperatures.values())
    assert sysfs.gpu_clocks(root).get("cur", 0.0) >= 0


def test_a_file_that_refuses_is_left_out(tmp_path: Path) -> None:
    """Zones of sleeping units answer EAGAIN; a folder in a file's place refuses as well."""
    board = Folder(tmp_path, NANO)
    zone = board.root / "sys/class/thermal/thermal_zone2/temp"
    zone.unlink()
    zone.mkdir()
    assert dict(sysfs.zones(tmp_path)) == {"cpu": 61.5, "gpu": 62.125}


# --- which source is taken -----------------------------------------------------------------------


def test_tegrastats_comes_before_the_files(tmp_path: Path) -> None:
    board = Folder(tmp_path, NANO)
    board.over_current(0, 2, 7)
    found = read(Telemetry(tmp_path, board.tegrastats()), lambda one: one.watts)
    assert (found.source, found.watts, found.gpu_mhz) == ("tegrastats", 12.02, 1015)
    assert dict(found.over_current) == {"oc1": 0, "oc2": 2, "oc3": 7}, "which it doesn't know"


def test_the_newest_whole_line_counts(tmp_path: Path) -> None:
    board = Folder(tmp_path, NANO)
    path = board.program("tegrastats", "echo 'tj@1C'; echo 'tj@2C'; printf 'tj@3C VDD_'; sleep 60")
    assert read(Telemetry(tmp_path, path), lambda one: one.temperature).temperature == 2


def test_a_program_that_ends_gives_way(tmp_path: Path) -> None:
    board = Folder(tmp_path, NANO)
    path = board.program("tegrastats", f"echo '{NANO.line}'; exit 1")
    assert read(Telemetry(tmp_path, path), lambda one: one.source == "sysfs").watts


def test_a_program_that_falls_silent_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Folder(tmp_path, NANO)
    found = Telemetry(tmp_path, board.program("tegrastats", "exec sleep 60"))
    assert found.read().source == "tegrastats"
    monkeypatch.setattr(streams, "_SILENT_SECONDS", 0.0)
    assert found.read().source == "sysfs"
    found.close()


def test_closing_ends_the_program(tmp_path: Path) -> None:
    import psutil

    board = Folder(tmp_path, NANO)
    others = psutil.Process().children()  # of tests before
    found = Telemetry(tmp_path, board.tegrastats())
    found.read()
    (child,) = (one for one in psutil.Process().children() if one not in others)
    found.close()
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
def jtop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A board with jtop's socket, and a client that does something at its start."""

    def make(act: str) -> Telemetry:
        (tmp_path / "client").mkdir()
        (tmp_path / "client/jtop.py").write_text(JTOP.replace("ACT", act))
        monkeypatch.syspath_prepend(tmp_path / "client")
        monkeypatch.delitem(sys.modules, "jtop", raising=False)
        board = Folder(tmp_path / "root", NANO)
        board.write("run/jtop.sock", "")
        return Telemetry(board.root, path="")

    yield make
    sys.modules.pop("jtop", None)


def test_jtop_comes_first(jtop: Any) -> None:
    found = jtop("pass").read()
    assert (found.source, found.gpu_load, found.gpu_mhz) == ("jtop", 42.5, 918)
    assert (found.memory_used, found.memory_total) == (3000 * 1024, 8000 * 1024)
    assert (found.watts, dict(found.temperatures)) == (9.5, {"tj": 55.5})


@pytest.mark.parametrize("act", ["raise RuntimeError('Mismatch version')", "self.memory = None"])
def test_a_jtop_that_refuses_or_tells_nonsense_gives_way(jtop: Any, act: str) -> None:
    assert jtop(act).read().source == "sysfs"


def test_a_jtop_that_hangs_gives_way(jtop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jetson_ft.device.jtop_client._PATIENCE", 0.1)
    assert jtop("import time; time.sleep(30)").read().source == "sysfs"


def test_a_socket_without_the_package_gives_way(tmp_path: Path) -> None:
    Folder(tmp_path, NANO).write("run/jtop.sock", "")
    assert Telemetry(tmp_path, path="").read().source == "sysfs"


def test_jtops_sum_over_unknown_rails_is_not_taken() -> None:
    power = {"rail": {"VDD_GPU_SOC": {"power": 100}}, "tot": {"power": 100, "avg": 90}}
    assert of_jtop({}, {}, power, {}).watts is None


def test_a_laptop_tells_memory(tmp_path: Path) -> None:
    Folder(tmp_path, LAPTOP)
    found = Telemetry(tmp_path, path="").read()
    assert found.source == "psutil" and (found.memory_total or 0) > (found.memory_used or 0) > 0
    assert found.watts is None and not found.over_current


# --- nvidia-smi ----------------------------------------------------------------------------------


def test_nvidia_smi_is_for_gpus_of_their_own(tmp_path: Path) -> None:
    board = Folder(tmp_path, LAPTOP)
    path = board.program("nvidia-smi", "echo '0, 87, 1980, 40960, 81559, 61, 412.35'; sleep 60")
    found = read(Telemetry(tmp_path, path), lambda one: one.watts)
    assert (found.source, found.gpu_load, found.gpu_mhz, found.watts) == (
        "nvidia-smi", 87, 1980, 412.35,
    )  # fmt: skip
    assert (found.memory_total, found.temperature) == (81559 * MIB, 61)


def test_several_gpus_are_one_machine() -> None:
    found = streams.of_smi(["0, 5, 100, 1, 10, 30, 60.5", "1, 7, 300, 2, 10, 40, 70.5",
                            "0, 9, 200, 3, 10, 35, 61.5"])  # fmt: skip
    assert (found.gpu_load, found.gpu_mhz, found.watts, found.temperature) == (8, 300, 132, 40)
    assert found.memory_total == 20 * MIB


def test_a_sum_without_one_of_them_is_none() -> None:
    assert streams.of_smi(["0, 5, 1, 1, 1, 3, 60.5", "1, 5, 1, 1, 1, 3, [N/A]"]).watts is None


@given(st.lists(st.one_of(st.text(max_size=40), st.lists(
    st.sampled_from(["0", "1", "[N/A]", "ERR!", "nan", "inf", "-3", "1.5"]), max_size=9,
).map(", ".join)), max_size=6))  # fmt: skip
def test_no_answer_of_nvidia_smi_raises(lines: list[str]) -> None:
    found = streams.of_smi(lines)
    assert found.watts is None or found.watts == found.watts


def test_gpus_are_those_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Folder(tmp_path, LAPTOP)
    path = board.program("nvidia-smi", f'echo "$@" > {tmp_path}/said; exec sleep 60')
    said = []
    for named, gpus in (("3", 1), ("", 1), ("2", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        (tmp_path / "said").unlink(missing_ok=True)
        found = Telemetry(tmp_path, path, gpus)
        read(found, lambda _: (tmp_path / "said").exists() and (tmp_path / "said").read_text())
        said.append([w for w in (tmp_path / "said").read_text().split() if w.startswith("--id")])
    assert said == [["--id=3"], ["--id=0"], ["--id=0,1"]]


# --- nothing ever raises --------------------------------------------------------------------------


def test_a_source_that_fails_while_it_is_read_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Folder(tmp_path, NANO)
    found = Telemetry(tmp_path, path="")
    assert found.read().source == "sysfs"

    def fail(root: Path) -> Reading:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(telemetry.sysfs, "read", fail)
    assert found.read().source == "psutil"
    monkeypatch.setattr(telemetry.Anything, "read", lambda self: 1 / 0)
    assert found.read() == Reading("none")


@settings(max_examples=15, deadline=None)
@given(said=st.lists(st.binary(max_size=60), max_size=6).map(b"\n".join), name=st.sampled_from(
    ["tegrastats", "nvidia-smi"]))  # fmt: skip
def test_whatever_a_program_says_a_reading_comes(
    tmp_path_factory: Any, said: bytes, name: str
) -> None:
    board = Folder(tmp_path_factory.mktemp("board"), LAPTOP)
    (board.root / "said").write_bytes(said + b"\n")
    found = Telemetry(board.root, board.program(name, f"cat {board.root}/said; exec sleep 60"))
    try:
        for _ in range(3):
            assert found.read().source in (name, "psutil")
            time.sleep(0.005)
    finally:
        found.close()
