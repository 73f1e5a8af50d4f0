"""Look for known holes in the packages pinned in `constraints/`.

First the pins are compared with `advisories.yaml`, which needs no network. Then pip-audit asks OSV
about every pin. Exit code 0: audited, no hole; 1: a hole, or a pin that is missing; 2: not audited,
as no advisory service was reached. With `--allow-offline` the last is 0, with a line that begins
with "SKIPPED".
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
ADVISORIES = Path(__file__).with_name("advisories.yaml")
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^ ;]+)")


class Pin(NamedTuple):
    file: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.file}: {self.package} {self.version}"


def read_pins() -> list[Pin]:
    """Return all pins; a package may have several, for different versions of Python."""
    pins = []
    for path in sorted((ROOT / "constraints").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := PIN.match(line):
                pins.append(Pin(path.name, match[1].lower(), match[2]))
            elif line.strip() and not line.startswith("#"):
                sys.exit(f"{path.name}: not a pin: {line}\n  fix:   make lock")
    return pins


def known_holes(pins: list[Pin], advisories: list[dict[str, Any]]) -> list[str]:
    """Return a line for each pin below the version that fixes one of the advisories."""
    holes = []
    for advisory in advisories:
        for pin in pins:
            accepted = pin.file in advisory.get("accepted", {})
            is_below = Version(pin.version) < Version(str(advisory["fixed"]))
            if pin.package == advisory["package"] and is_below and not accepted:
                fix, about = advisory["fixed"], advisory["about"]
                holes.append(f"{pin}: {advisory['id']}: {about}; fixed in {fix}")
    return holes


def reported_holes(pins: list[Pin], advisories: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Ask OSV about the pins; return a line for each hole, and why some pins weren't audited."""
    accepted = {
        (file, advisory["id"]) for advisory in advisories for file in advisory.get("accepted", {})
    }
    holes: dict[str, None] = {}
    audited: set[tuple[str, str]] = set()
    # pip-audit takes one version of a package at a time.
    rounds: list[dict[str, str]] = []
    for package, version in dict.fromkeys((pin.package, pin.version) for pin in pins):
        free = next((each for each in rounds if package not in each), None)
        if free is None:
            rounds.append(free := {})
        free[package] = version
    for versions in rounds:
        answer = _pip_audit(versions)
        if isinstance(answer, str):
            return list(holes), answer
        for item in answer["dependencies"]:
            if "skip_reason" in item:
                continue
            key = item["name"].lower(), item["version"]
            audited.add(key)
            for hole in item["vulns"]:
                names = {hole["id"], *hole.get("aliases", [])}
                for pin in (pin for pin in pins if pin[1:] == key):
                    if not any((pin.file, name) in accepted for name in names):
                        fixed = ", ".join(hole["fix_versions"]) or "no version"
                        holes[f"{pin}: {', '.join(sorted(names))}; fixed in {fixed}"] = None
    missing = sorted({pin.package for pin in pins if pin[1:] not in audited})
    if not audited:
        return list(holes), "no advisory service in reach"
    return list(holes), f"the service does not know {', '.join(missing)}" if missing else ""


def _pip_audit(versions: dict[str, str]) -> Any:
    """Return pip-audit's report, or a text that says why there is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version}\n" for name, version in versions.items())
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps"]
        command += ["--disable-pip", "--vulnerability-service", "osv", "--format", "json"]
        command += ["--progress-spinner", "off", "--timeout", "10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:  # it ends with a traceback where it reaches no service
        last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
        if "No module named pip_audit" in last_line:
            return "pip-audit is not installed"
        return f"no advisory service in reach ({last_line[:200]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow-offline", action="store_true", help="exit with 0 if not audited")
    arguments = parser.parse_args()
    advisories = yaml.safe_load(ADVISORIES.read_text(encoding="utf-8"))
    pins = read_pins()
    unused = sorted({item["package"] for item in advisories} - {pin.package for pin in pins})
    if unused:
        sys.exit(f"{ADVISORIES.name}: not pinned: {', '.join(unused)}\n  fix:   remove the entries")
    holes, obstacle = known_holes(pins, advisories), ""
    if not holes:
        holes, obstacle = reported_holes(pins, advisories)
    if holes:
        print(*holes, sep="\n")
        sys.exit("  fix:   make lock UPGRADE=1, or explain it under `accepted` in advisories.yaml")
    print(f"{len(pins)} pins are not below the fixed versions of {len(advisories)} advisories")
    if obstacle:
        print(f"SKIPPED audit of dependencies: not audited: {obstacle}")
        sys.exit(0 if arguments.allow_offline else 2)
    print("audited: no known holes")


if __name__ == "__main__":
    main()
