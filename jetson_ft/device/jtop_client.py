"""Sensors by way of jtop's service (the package jetson-stats, where it is installed)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from jetson_ft.device.reading import Reading, rails, temperatures

_PATIENCE = 5.0  # seconds for the service to answer at the start
_SECONDS = 2  # between its figures


class Jtop:
    """jtop's service; its client refuses one of another version."""

    def __init__(self) -> None:
        jtop: Any = import_module("jtop")  # of the package jetson-stats, which is there or not
        started: list[Any] = []

        def start() -> None:
            client = jtop.jtop(interval=_SECONDS)
            client.start()
            started.append(client)

        # Beside us, as a service that hangs would keep us waiting without end.
        beside = threading.Thread(target=_quietly, args=(start,), daemon=True)
        beside.start()
        beside.join(_PATIENCE)
        if not started:
            raise OSError("jtop's service doesn't answer, or is of another version")
        self._client = started[0]

    def read(self) -> Reading:
        """What it sent last.

        Raises:
            OSError: it has ended.
        """
        client = self._client
        if not client.ok(spin=True):
            raise OSError("jtop's service has ended")
        return of_jtop(client.gpu, client.memory, client.power, client.temperature)

    def close(self) -> None:
        """Leaves the service."""
        self._client.close()


def _quietly(act: Callable[[], None]) -> None:
    try:
        act()
    except Exception:  # told by what is missing afterwards
        return


def of_jtop(gpu: Any, memory: Any, power: Any, temperature: Any) -> Reading:
    """Its dictionaries: KB, kHz and mW."""
    first: Any = next(iter(gpu.values()), {})
    clock, ram = first.get("freq", {}).get("cur"), memory.get("RAM", {})
    rail = {name: float(one["power"]) for name, one in power.get("rail", {}).items()}
    total = power.get("tot", {})
    if "name" in total:  # else it is a sum over whatever rails there are
        rail[total["name"]] = float(total["power"])
    return Reading(
        source="jtop",
        gpu_load=first.get("status", {}).get("load"),
        gpu_mhz=clock / 1000 if clock is not None else None,
        memory_used=ram["used"] * 1024 if "used" in ram else None,
        memory_total=ram["tot"] * 1024 if "tot" in ram else None,
        temperatures=temperatures(_online(temperature)),
        rails=rails(rail),
    )


def _online(sensors: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(one["temp"]) for name, one in sensors.items() if one.get("online", True)}
