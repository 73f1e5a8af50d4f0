"""The process that generates: watched, and started again if it ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import printable
from jetson_ft.runs.processes import explain_error

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.5
_RESTARTS, _RESTART_SECONDS = 5, 600.0  # so many in that time; one more ends the server


class EngineProcess(Protocol):
    """A server on loopback that speaks llama.cpp's API: `LlamaServer`, `TransformersServer`."""

    api_key: str

    @property
    def url(self) -> str:
        """The address, without a slash at its end."""

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""

    def __enter__(self) -> Any:
        """Start the process, and return when it can answer."""

    def close(self) -> None:
        """End the process."""


class Engine:
    """One engine process at a time; a thread replaces it when it ends.

    Args:
        process: not started yet; entering it again starts it again.
        is_memory_short: whether a training run needs the memory that the process has; then the
            process is ended until the run is over.
        is_run_over: whether that run is over.
        give_up: called when the process has ended too often, or can't be watched.
    """

    def __init__(
        self,
        process: EngineProcess,
        is_memory_short: Callable[[], bool],
        is_run_over: Callable[[], bool],
        give_up: Callable[[], None],
    ) -> None:
        self.process = process
        self.unavailable = "The model is being loaded."  # for clients; empty: it can answer
        self.failure: UserError | None = None  # why it has given up
        self._is_memory_short, self._is_run_over = is_memory_short, is_run_over
        self._give_up = give_up
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="engine", daemon=True)

    def __enter__(self) -> Engine:
        self.process.__enter__()
        self.unavailable = ""
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self.process.close()
        self._watcher.join()
        self.process.close()  # the thread may just have started it again

    def _watch(self) -> None:
        try:
            self._keep_running()
        except Exception as error:  # else the server would refuse all requests without end
            self.failure = explain_error(error, Message(_("Report this error.")))
            self.unavailable = "The engine has ended; the server stops."
            self._give_up()

    def _keep_running(self) -> None:
        restarts: list[float] = []
        reason: UserError | None = None  # why the last start failed
        while not self._closed.wait(_WATCH_SECONDS):
            try:
                if self.process.is_alive and not self._is_memory_short():
                    continue
            except UserError as error:  # the run was being deleted: the next round may succeed
                logger.warning("the memory can't be watched: %s", error)
                continue
            if self._closed.is_set():
                return
            if self.process.is_alive:
                self._wait_for_run()
            else:
                restarts = [at for at in restarts if time.monotonic() - at < _RESTART_SECONDS]
                restarts.append(time.monotonic())
                if len(restarts) > _RESTARTS:
                    raise UserError(
                        _("The engine has ended too often; the server has stopped."),
                        fix=reason.fix if reason else Message(_("Start it again.")),
                    )
                self.unavailable = "The engine has ended; it is being started again."
                print(f"{self.unavailable} ({len(restarts)} of {_RESTARTS})", flush=True)
            if self._closed.is_set():
                return
            try:
                self.process.__enter__()
            except UserError as error:
                reason = error
                print(printable(str(error)), flush=True)
            else:
                self.unavailable = ""
                print("The engine answers again.", flush=True)

    def _wait_for_run(self) -> None:
        self.unavailable = "Busy: a training run needs the memory."
        print(f"{self.unavailable} The model is unloaded until it is over.", flush=True)
        self.process.close()
        while not self._closed.wait(_WATCH_SECONDS) and not self._is_run_over():
            pass
