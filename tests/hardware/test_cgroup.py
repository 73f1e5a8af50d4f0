"""Memory limits of control groups, from folders that imitate the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.hardware.cgroup import UNLIMITED, MemoryLimit, memory_limit, oom_kills, parse_size

GIB = 2**30
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
V1_UNLIMITED = "9223372036854771712"


def group(
    folder: Path, names: tuple[str, ...], limit: object, usage: int, inactive: int = 0
) -> None:
    """Write the files of a group as version 1 or 2 has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    # Version 1 has another `inactive_file`, without the groups below.
    (folder / "memory.stat").write_text(f"anon 5\nxinactive_file 7\n{names[2]} {inactive}\n")


def own_group(root: Path, *lines: str) -> Path:
    """Write /proc/self/cgroup; return /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text("\n".join(lines) + "\n")
    return root / "sys/fs/cgroup"


@pytest.mark.parametrize("path", ["/", "/docker/1f2e", "/../..", "/../../user.slice"])
def test_container_with_version_2_has_the_limit_of_its_root(tmp_path: Path, path: str) -> None:
    """Without a namespace of its own, the path is that of the host, which isn't mounted."""
    base = own_group(tmp_path, f"0::{path}")
    group(base, V2, 4 * GIB, 3 * GIB, GIB)
    assert memory_limit(tmp_path) == MemoryLimit(4 * GIB, 2 * GIB)


def test_container_with_version_1_has_the_limit_of_its_root(tmp_path: Path) -> None:
    base = own_group(tmp_path, "5:cpu,cpuacct:/docker/a", "4:memory:/docker/a", "0::/docker/a")
    group(base / "memory", V1, 2 * GIB, GIB, GIB // 2)
    assert memory_limit(tmp_path) == MemoryLimit(2 * GIB, 3 * GIB // 2)


@pytest.mark.parametrize(("names", "line", "mount"), [
    (V2, "0::/system.slice/a.service", ""), (V2, "0::/system.slice/a.service", "unified"),
    (V1, "9:memory,hugetlb:/system.slice/a.service", "memory"),
])  # fmt: skip
def test_limit_that_leaves_least_memory_applies_in_nested_groups(
    names: tuple[str, ...], line: str, mount: str, tmp_path: Path
) -> None:
    base = own_group(tmp_path, line) / mount
    group(base, names, V1_UNLIMITED, 7 * GIB)
    group(base / "system.slice", names, 6 * GIB, 5 * GIB)
    group(base / "system.slice/a.service", names, 2 * GIB, GIB // 2)
    group(base / "user.slice", names, GIB, GIB)  # another's
    assert memory_limit(tmp_path) == MemoryLimit(6 * GIB, GIB)
    group(base / "system.slice/a.service", names, "max", GIB // 2)
    assert memory_limit(tmp_path) == MemoryLimit(6 * GIB, GIB)
    group(base / "system.slice", names, "max", 5 * GIB)
    assert memory_limit(tmp_path) == UNLIMITED


def test_hybrid_hierarchy_is_read_in_both_versions(tmp_path: Path) -> None:
    base = own_group(tmp_path, "4:memory:/a", "0::/a")
    group(base / "memory/a", V1, V1_UNLIMITED, GIB)
    group(base / "unified/a", V2, 3 * GIB, GIB)
    assert memory_limit(tmp_path) == MemoryLimit(3 * GIB, 2 * GIB)


def test_full_group_leaves_nothing(tmp_path: Path) -> None:
    group(own_group(tmp_path, "0::/"), V2, GIB, 2 * GIB, GIB // 2)
    assert memory_limit(tmp_path) == MemoryLimit(GIB, 0)


def test_more_cache_than_usage_leaves_the_limit(tmp_path: Path) -> None:
    group(own_group(tmp_path, "0::/"), V2, GIB, GIB // 2, 2 * GIB)
    assert memory_limit(tmp_path) == MemoryLimit(GIB, GIB)


def test_lower_of_high_and_max_is_the_limit(tmp_path: Path) -> None:
    """Above memory.high the kernel slows a group down instead of killing."""
    base = own_group(tmp_path, "0::/a")
    group(base / "a", V2, 4 * GIB, GIB)
    (base / "a/memory.high").write_text(f"{2 * GIB}\n")
    assert memory_limit(tmp_path) == MemoryLimit(2 * GIB, GIB)
    (base / "a/memory.high").write_text("max\n")
    assert memory_limit(tmp_path) == MemoryLimit(4 * GIB, 3 * GIB)
    group(base / "a", V2, "max", GIB)
    (base / "a/memory.high").write_text(f"{3 * GIB}\n")
    assert memory_limit(tmp_path) == MemoryLimit(3 * GIB, 2 * GIB)


def test_limit_above_a_containers_group_counts_in_version_1(tmp_path: Path) -> None:
    """A pod's limit: the group that has it isn't mounted in its containers."""
    base = own_group(tmp_path, "4:memory:/kubepods/pod/a") / "memory"
    group(base, V1, V1_UNLIMITED, GIB)
    with open(base / "memory.stat", "a") as file:
        file.write(f"hierarchical_memory_limit {2 * GIB}\n")
    assert memory_limit(tmp_path) == MemoryLimit(2 * GIB, GIB)


def test_kills_of_all_groups_and_the_machine_are_counted(tmp_path: Path) -> None:
    base = own_group(tmp_path, "4:memory:/a", "0::/a")
    assert oom_kills(tmp_path) == 0
    (base / "memory/a").mkdir(parents=True)
    (base / "unified/a").mkdir(parents=True)
    (base / "memory/a/memory.oom_control").write_text("under_oom 0\noom_kill 2\n")
    (base / "unified/a/memory.events").write_text("oom 9\noom_kill 3\noom_group_kill 1\n")
    (base / "unified/memory.events").write_text("oom_kill 10\n")
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 5\noom_kill 100\n")
    assert oom_kills(tmp_path) == 115


def test_missing_statistics_count_as_no_cache(tmp_path: Path) -> None:
    base = own_group(tmp_path, "0::/")
    group(base, V2, 4 * GIB, GIB)
    (base / "memory.stat").unlink()
    assert memory_limit(tmp_path) == MemoryLimit(4 * GIB, 3 * GIB)
    (base / "memory.current").unlink()
    assert memory_limit(tmp_path) == UNLIMITED


@pytest.mark.parametrize("limit", ["max", "", "-1", "4G", V1_UNLIMITED, str(2**63 - 1), str(2**64)])
def test_value_out_of_range_is_no_limit(tmp_path: Path, limit: str) -> None:
    group(own_group(tmp_path, "0::/"), V2, limit, GIB)
    assert memory_limit(tmp_path) == UNLIMITED


def test_machine_without_control_groups_is_unlimited(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == UNLIMITED


def test_path_never_leaves_the_hierarchy(tmp_path: Path) -> None:
    base = own_group(tmp_path, "0::/../../outside", "4:memory:/../../outside")
    base.mkdir(parents=True)
    for names in (V1, V2):
        group(tmp_path / "sys/outside", names, GIB, 0)
        group(tmp_path / "outside", names, GIB, 0)
    assert memory_limit(tmp_path) == UNLIMITED


@given(st.integers(0, 2**62 - 1))
def test_size_in_range_is_read(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.text(max_size=30) | st.integers().map(str))
def test_any_text_gives_no_size_or_one_in_range(text: str) -> None:
    size = parse_size(text)
    assert size is None or 0 <= size < 2**62


@given(
    lines=st.text(max_size=80), limit=st.text(max_size=25) | st.integers().map(str),
    usage=st.text(max_size=25) | st.integers().map(str), stat=st.text(max_size=40),
)  # fmt: skip
def test_broken_files_give_no_limit_or_one_in_range(
    tmp_path_factory: pytest.TempPathFactory, lines: str, limit: str, usage: str, stat: str
) -> None:
    root = tmp_path_factory.mktemp("root")
    base = root / "sys/fs/cgroup"
    for folder in (base, root / "proc/self"):
        folder.mkdir(parents=True)
    for path, text in (
        (root / "proc/self/cgroup", f"0::/{lines}\n{lines}"), (base / "memory.max", limit),
        (base / "memory.current", usage), (base / "memory.stat", f"inactive_file {stat}"),
    ):  # fmt: skip
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    result = memory_limit(root)
    assert result == UNLIMITED or 0 <= result.available <= result.limit < 2**62
