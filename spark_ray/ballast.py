"""Ballast: anonymous memory held by a process beside the environment, a cause whose effect is known."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from .environments import RUN_VARIABLE
from .errors import RunError
from .units import MIB, format_bytes

SCRIPT = Path(__file__).with_name("ballast_process.py")
_SLOWEST_BYTES_PER_S = (
    100 * MIB
)  # memory is touched at gigabytes a second; slower means that the host is swapping
_START_S = 30.0
_END_S = 10.0


class Ballast:
    """A process that holds `size_bytes`. Its own session, so that Ctrl-C is the driver's to handle.

    The kernel kills it when the *thread* that started it ends: start and release it in one call of a slot.
    """

    def __init__(self, size_bytes: int, run: str) -> None:
        """Return when all of it is held; RunError when it cannot be."""
        self.size_bytes = size_bytes
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT), str(size_bytes)],
            env={RUN_VARIABLE: run}, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        try:
            said = self._answer(_START_S + size_bytes / _SLOWEST_BYTES_PER_S)
            if "error" in said:
                raise _cannot(size_bytes, said["error"])
        except BaseException:
            self.release()
            raise
        self._base_bytes: int = said["base_bytes"]
        self.locked: bool | str = said["locked"]
        self.root_cgroup: bool | str = said["root_cgroup"]

    def _answer(self, longest_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101  piped above
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        if not poll.poll(int(longest_s * 1000)):
            return {"error": f"not all of it was held after {longest_s:.0f} s"}
        line = self._process.stdout.readline()  # written in one piece
        if not line:
            return {"error": f"its process ended with status {self._process.wait(_END_S)}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def resident_bytes(self) -> int:
        """What it holds now, without the interpreter's own; 0 when it is gone."""
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    return max(0, int(line.split()[1]) * 1024 - self._base_bytes)
        return 0

    def release(self) -> None:
        """Give it back, and return when it is gone."""
        assert self._process.stdin is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # stopped, or still touching
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdout.close()


def _cannot(size_bytes: int, why: str) -> RunError:
    return RunError(
        f"a ballast of {format_bytes(size_bytes)} cannot be held: {why}",
        mend="lower treatment.ballast of the arm, or free memory",
    )


def size_of(asked: dict[str, Any], free_bytes: int) -> int:
    """Bytes of a ballast that was asked for by size, or as a share of what is free."""
    return int(asked["size_bytes"] if "size_bytes" in asked else asked["share"] * free_bytes)


def refuse_if_too_large(size_bytes: int, available_bytes: int, spare_bytes: int) -> None:
    """Raise RunError for a ballast that would leave the host less than the watchdog tolerates."""
    if size_bytes <= 0 or available_bytes - size_bytes < spare_bytes:
        raise _cannot(
            size_bytes,
            f"{format_bytes(available_bytes)} are available, and limits.watchdog wants {format_bytes(spare_bytes)} of it",
        )
