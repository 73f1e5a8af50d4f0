"""Known holes in the pinned packages: `scripts/audit.py` names them, and is never green unasked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ADVISORIES = yaml.safe_load((ROOT / "scripts" / "advisories.yaml").read_text())
# Stands in for pip-audit; ANSWER is what its service knows, by package.
PIP_AUDIT = """
import json, os, sys
answer = json.loads(os.environ["ANSWER"])
if answer == "offline":
    raise ConnectionError("no route to api.osv.dev")
pins = open(sys.argv[sys.argv.index("--requirement") + 1]).read().split()
assert len({pin.split("==")[0] for pin in pins}) == len(pins), "a package twice"
items = []
for pin in pins:
    name, version = pin.split("==")
    item = answer.get(name, answer.get("*", {"vulns": []}))
    items.append({"name": name, "version": version, **item} if "vulns" in item else
                 {"name": name, **item})
print(json.dumps({"dependencies": items, "fixes": []}))
sys.exit(any(item.get("vulns") for item in items))
"""
Audit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    """Return a function that runs a copy of the script on a copy of the pins, changed if wanted."""
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    (tmp_path / "scripts").mkdir()
    for name in ("audit.py", "advisories.yaml"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    site = tmp_path / "site"
    site.mkdir()
    (site / "pip_audit.py").write_text(PIP_AUDIT)

    def run(answer: Any, *options: str, **pins: str) -> subprocess.CompletedProcess[str]:
        for path in (tmp_path / "constraints").iterdir():
            text = path.read_text()
            for package, version in pins.items():
                name = package.replace("_", "-")
                text = re.sub(rf"^{name}==[^ \n]+", f"{name}=={version}", text, flags=re.M)
            path.write_text(text)
        environment = {**os.environ, "ANSWER": json.dumps(answer), "PYTHONPATH": str(site)}
        return subprocess.run(
            [sys.executable, str(tmp_path / "scripts" / "audit.py"), *options],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    return run


@pytest.mark.promise(51)
def test_pins_of_this_repository_are_at_or_above_the_fixed_versions(audit: Audit) -> None:
    done = audit({})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "audited: no known holes" in done.stdout
    assert "SKIPPED" not in done.stdout


@pytest.mark.promise(51)
@pytest.mark.parametrize("number", range(len(ADVISORIES)), ids=lambda n: ADVISORIES[n]["id"])
def test_pin_below_a_fixed_version_is_named_without_a_network(audit: Audit, number: int) -> None:
    advisory = ADVISORIES[number]
    done = audit("offline", "--allow-offline", **{advisory["package"].replace("-", "_"): "0.0.1"})
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if advisory["id"] in line)
    assert f"{advisory['package']} 0.0.1" in line and str(advisory["fixed"]) in line


@pytest.mark.promise(51)
def test_hole_that_the_service_reports_is_named_with_its_fix(audit: Audit) -> None:
    hole = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["99.0"], "description": "x"}
    done = audit({"gradio": {"vulns": [hole]}})
    assert done.returncode == 1
    assert "cpu.txt: gradio" in done.stdout and "CVE-1, PYSEC-1; fixed in 99.0" in done.stdout
    assert "fix:" in done.stderr


@pytest.mark.promise(51)
def test_accepted_advisory_is_accepted_in_its_file_alone(audit: Audit) -> None:
    hole = {"id": "PYSEC-2", "aliases": ["CVE-2026-24747"], "fix_versions": [], "description": ""}
    done = audit({"torch": {"vulns": [hole]}})
    assert "cpu.txt: torch" in done.stdout
    assert "jetpack6-py310.txt: torch" not in done.stdout


@pytest.mark.promise(51)
@pytest.mark.parametrize(
    "answer", ["offline", {"*": {"skip_reason": "Dependency not found on PyPI"}}]
)
def test_audit_without_a_service_is_not_green(audit: Audit, answer: Any) -> None:
    done = audit(answer)
    assert done.returncode == 2
    assert "SKIPPED" in done.stdout and "not audited: no advisory service in reach" in done.stdout
    assert "no known holes" not in done.stdout
    allowed = audit(answer, "--allow-offline")
    assert allowed.returncode == 0
    assert "SKIPPED" in allowed.stdout


@pytest.mark.promise(51)
def test_package_that_the_service_does_not_know_is_named(audit: Audit) -> None:
    done = audit({"gguf": {"skip_reason": "not found"}})
    assert done.returncode == 2
    assert "does not know gguf" in done.stdout


@pytest.mark.promise(51)
def test_every_requirement_is_pinned_exactly_in_every_file() -> None:
    for path in (ROOT / "constraints").glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert lines and all(re.match(r"[a-z0-9._-]+==[^ *]+( ;|$)", line) for line in lines)


@pytest.mark.promise(51)
def test_ci_audits_and_repeats_what_was_skipped() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"lint lock-check audit-if-online", makefile)
    assert "'^SKIPPED'" in (ROOT / ".ci" / "run").read_text()
