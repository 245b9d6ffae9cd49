"""One worker's side of the conversation with the host: phases, observations, the result."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import observe, protocol

_WITH_MODEL_FILES = frozenset({"after_load", "sizing", "end"})


class Infeasible(Exception):
    """The engine cannot run this configuration here, and says so itself. An answer, not a failure."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class OutOfMemory(Exception):
    """The engine ran out of memory and survived to say so."""


class HostGone(BaseException):
    """Standard input closed: nobody is waiting for this worker any more."""


class Session:
    """Holds the request; `phase` observes, writes the observation down, and waits for the host to do the same.

    A thread may observe a phase while the main thread is inside the engine: one conversation at a time.
    """

    def __init__(self, folder: Path, request: dict[str, Any], control: int, answers: int = 0) -> None:
        self.folder = folder
        self.request = request
        self._control = control
        self._answers = answers
        self._observations = os.open(
            folder / "observations.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
        )
        self._one_at_a_time = threading.RLock()
        self.sources: list[Callable[[], dict[str, Any]]] = []

    @property
    def engine(self) -> dict[str, Any]:
        engine: dict[str, Any] = self.request["engine"]
        return engine

    @property
    def configuration(self) -> dict[str, Any]:
        configuration: dict[str, Any] = self.request["configuration"]
        return configuration

    def exchange(self, *words: object) -> None:
        """Write one control line and wait for the host's answer."""
        os.write(self._control, (" ".join([protocol.CONTROL, *map(str, words)]) + "\n").encode())
        answer = b""
        while not answer.endswith(b"\n"):
            piece = os.read(self._answers, 64)
            if not piece:
                raise HostGone
            answer += piece

    def settle(self) -> None:
        """Have the host apply again what must hold when the engine reads free memory."""
        with self._one_at_a_time:
            self.exchange("settle")

    def phase(self, name: str, *, settle: bool = True, **extra: Any) -> dict[str, Any]:
        """Observe at a phase from inside, keep it on disk whatever happens next, and let the host observe as well.

        Before `sizing` the host is asked to settle: the state of an arm must hold when the engine reads free memory,
        and what the worker freed since the start waits in per-CPU lists again. `settle=False`: the engine is reading
        already, and nothing may move under it.
        """
        with self._one_at_a_time:
            if name == "sizing" and settle:
                self.settle()
            # An engine's own sources come first: what the first of them sets up (a CUDA context) is then in the reading.
            own = {key: value for source in self.sources for key, value in source().items()}
            seen = observe.observe(name) | extra | own
            if name in _WITH_MODEL_FILES and self.request["model_path"]:
                seen["model_files"] = observe.resident(observe.files_under(Path(self.request["model_path"])))
            os.write(self._observations, (json.dumps(seen, allow_nan=False) + "\n").encode())
            self.exchange("phase", name)
            return seen
