"""`jetson-ft doctor`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from program import Done
from rich.console import Console
from typer.testing import CliRunner

from jetson_ft.cli import doctor as command
from jetson_ft.cli import output
from jetson_ft.cli.app import app
from jetson_ft.hardware import doctor
from jetson_ft.hardware.doctor import finding


@pytest.mark.parametrize(("weight", "code", "verdict"), [
    (finding.warning, 0, "Training works here. Failures: 0, warnings: 1."),
    (finding.failure, 1, "Training would not work here. Failures: 1, warnings: 0."),
])  # fmt: skip
def test_verdict_decides_the_exit_code(
    weight: Any, code: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [finding.ok("hub.reachable", "{address} answers", address="here\x1b[2J"),
             weight("swap.zram", "{size:.1f} GiB", "sudo systemctl", size=3.62)]  # fmt: skip
    monkeypatch.setattr(doctor, "examine", lambda machine: iter(found))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == code
    assert done.output.splitlines() == [
        "ok       Hub: here\\x1b[2J answers",
        f"{found[1].status:8} Swap: 3.6 GiB",
        "         fix: sudo systemctl", verdict,
    ]  # fmt: skip
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == code
    assert [check["name"] for check in json.loads(done.output)["checks"]] == ["hub", "swap"]


@pytest.mark.slow
def test_this_machine_passes_every_check(jetson: Callable[..., Done]) -> None:
    done = jetson("doctor", "--json", HF_HUB_OFFLINE="1")
    found = json.loads(done.stdout)
    assert found["schema"] == 1 and found["works"] and done.returncode == 0
    assert {"board", "memory", "disk", "sensors", "hub", "torch", "gpu", "bitsandbytes"} <= {
        check["name"] for check in found["checks"]
    }  # fmt: skip


def test_in_a_terminal_a_fix_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=40, soft_wrap=True)
    for module in (command, output):
        monkeypatch.setattr(module, "out", screen)
    fix = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile"
    warning = finding.warning("swap.none", "none on a disk", fix)
    assert command.print_findings([warning, finding.ok("torch.cpu", "2.9, for the CPU")]) != []
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.file.getvalue())
    assert f"fix: {fix}\n" in text
    first, *_ = text.splitlines()
    assert first.startswith("!  Swap ") and len(first) <= 40
    assert "✓  PyTorch       2.9, for the" in text
