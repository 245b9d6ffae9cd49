"""The driver's end of the watchdog: a process of its own that kills the guest before the host runs out of memory.

Its protocol is in `watchdog_process`. It is asked for at the first attempt and ends with this process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger("spark_ray")
PROGRAM = Path(__file__).with_name("watchdog_process.py")
PATIENCE_S = 2.0
"""After the guest was killed, until the helpers are: what a dead process held comes back in steps."""
_ANSWER_S = 10.0


class Watchdog:
    """One watchdog process at a time; one that was killed is replaced, and the record says so."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._order: dict[str, Any] | None = None
        self._pending = b""
        self._replaced = 0
        self.protections: dict[str, bool | str] = {}
        self.fired: dict[str, Any] | None = None
        self._rested: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def descriptor(self) -> int:
        """Readable when there is something to `hear`."""
        return self._pipes()[1].fileno()

    def guard(
        self,
        threshold_bytes: int,
        guest: Sequence[int],
        group: Path | None = None,
        helpers: Sequence[int] = (),
    ) -> None:
        """Kill these when MemAvailable falls below the threshold: the guest's trees and group first, then the helpers."""
        self._order = {
            "threshold_bytes": threshold_bytes, "guest": list(guest),
            "group": str(group) if group else None, "helpers": list(helpers), "patience_s": PATIENCE_S,
        }  # fmt: skip
        self.start()
        self._tell({"guard": self._order})

    def hear(self) -> None:
        """Take in what it has said; start another one if it has ended."""
        text = os.read(self.descriptor, 65536)
        if not text:
            self._replace()
            return
        *lines, self._pending = (self._pending + text).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def rest(self) -> dict[str, Any]:
        """The attempt is over: what it was told, what protects it, whether it fired. For the record."""
        told = self._order
        assert told is not None  # noqa: S101  guard came first
        self._order = None
        rested = self._ask_for_rest()
        found = {
            "threshold_bytes": told["threshold_bytes"], "protections": self.protections, "fired": self.fired,
            "replaced": self._replaced, **rested,
        }  # fmt: skip
        self.fired, self._replaced = None, 0
        return found

    def _ask_for_rest(self) -> dict[str, Any]:
        """What it says of the attempt; empty when it does not answer any more."""
        self._rested = {}
        self._tell({"guard": None})
        deadline = time.monotonic() + _ANSWER_S
        while not self._rested and self._process:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.descriptor], [], [], left)[0]:
                logger.warning("the watchdog does not answer; the next attempt gets another one")
                self._end(signal.SIGKILL)
                break
            self.hear()
        return self._rested

    def close(self) -> None:
        """Closing its standard input ends it."""
        self._end(None)

    def _end(self, by: signal.Signals | None) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        if by is not None:
            process.send_signal(by)
        try:
            process.communicate(timeout=_ANSWER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def start(self) -> None:
        """Start the process, unless it runs already."""
        if self._process is not None:
            return
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PROGRAM)], env={}, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0, start_new_session=True,
        )  # fmt: skip
        self.protections = {}
        while not self.protections and self._process is not None:
            self.hear()

    def _replace(self) -> None:
        self.close()
        logger.warning("the watchdog has ended; another one is started")
        if self._order is not None:
            self._replaced += 1
            self.start()
            self._tell({"guard": self._order})

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process is not None  # noqa: S101  started by guard
        assert self._process.stdin is not None  # noqa: S101  piped
        assert self._process.stdout is not None  # noqa: S101
        return self._process.stdin, self._process.stdout

    def _tell(self, message: dict[str, Any]) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):  # heard of at the next `hear`
                self._pipes()[0].write(json.dumps(message).encode() + b"\n")

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"protections": dict(found)}:
                self.protections = found
            case {"fired": dict(found)}:
                self.fired = found
            case {"rested": dict(found)}:
                self._rested = found
            case _:
                raise AssertionError(f"no word of the watchdog's: {message}")


def try_out() -> dict[str, bool | str]:
    """What a watchdog of this user on this host is protected by: each protection, true or the reason why not."""
    watchdog = Watchdog()
    try:
        watchdog.start()
        return watchdog.protections
    finally:
        watchdog.close()
