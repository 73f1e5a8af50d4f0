"""What the sensors said during a run, for its report."""

from __future__ import annotations

from collections import Counter
from typing import Any

# Counter -> English and Chinese.
OVER_CURRENT = {
    "oc1": ("the input voltage fell too low", "输入电压过低"),
    "oc2": ("the mean current rose too high", "平均电流过高"),
    "oc3": ("the current peaked too high", "瞬时电流过高"),
}


def summary(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """`sensors` of report.json: over all attempts; None where nothing was read."""
    samples = [event for event in events if event["kind"] == "sample"]
    if not samples:
        return None
    # Both count from the start of an attempt, so that its last word holds.
    last = list({sample["attempt"]: sample for sample in samples}.values())
    counts: Counter[str] = Counter()
    for sample in last:
        counts.update(sample.get("over_current", {}))
    pauses = [event["seconds"] for event in events if event["kind"] == "pause_end"]
    return {
        "source": samples[-1].get("source"),
        "max_temperature": max((s["temperature"] for s in samples if "temperature" in s),
                               default=None),
        "throttled_seconds": round(sum(s.get("throttled_seconds", 0.0) for s in last), 1),
        "over_current": dict(counts),
        "paused_seconds": round(sum(pauses), 1),
    }  # fmt: skip


def complaints(sensors: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What slowed the board down, in English and Chinese."""
    if sensors is None:
        return []
    said = []
    if sensors["throttled_seconds"]:
        seconds = f"{sensors['throttled_seconds']:,.0f}"
        said.append((f"The board lowered its clocks because of heat, for about {seconds} s.",
                     f"开发板因过热而降频约 {seconds} 秒。"))  # fmt: skip
    if sensors["paused_seconds"]:
        seconds = f"{sensors['paused_seconds']:,.0f}"
        said.append((f"Training paused for {seconds} s to let it cool.",
                     f"训练为降温暂停了 {seconds} 秒。"))  # fmt: skip
    for name, count in sensors["over_current"].items():
        if count and name in OVER_CURRENT:
            english, chinese = OVER_CURRENT[name]
            said.append((f"Power: {english} ({name}: {count:,}); the clocks are lowered then.",
                         f"供电：{chinese}（{name}：{count:,} 次），此时会降频。"))  # fmt: skip
    return said
