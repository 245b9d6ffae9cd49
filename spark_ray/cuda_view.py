"""What CUDA calls free on this host, beside MemFree of the same moment. Read by a process of its own.

Asking takes a CUDA context, and a context takes memory. This program makes none; the other process keeps its one from the
first reading to the last, so that two readings differ by what happened between them and by nothing else.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from .errors import SparkRayError

DEADLINE_S = 60  # a first context is made in seconds; a driver that hangs must not take us with it

_SCRIPT = """
import ctypes, json, sys
from spark_ray.worker import cuda, observe

for _ in sys.stdin:
    try:
        cuda.memory()  # makes the context, which moves memory
        free, total = cuda.memory()
        info = observe.meminfo()
        version = ctypes.c_int()
        ctypes.CDLL(cuda.LIBRARY).cuDriverGetVersion(ctypes.byref(version))
        said = {"free_bytes": free, "total_bytes": total, "mem_free_bytes": info["MemFree"],
                "mem_total_bytes": info["MemTotal"], "cuda_version": version.value}
    except cuda.Unavailable as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)
"""
READER = (sys.executable, "-P", "-c", _SCRIPT)


class Unavailable(SparkRayError):
    """CUDA memory cannot be read on this host, and why."""


@dataclass(frozen=True)
class Reading:
    free_bytes: int
    total_bytes: int
    mem_free_bytes: int
    mem_total_bytes: int
    cuda_version: int
    """As the driver numbers it: 13000 is 13.0."""


class CudaView:
    """Ends with its context manager, and with this process: the reader's standard input closes."""

    def __init__(self, command: Sequence[str] = READER) -> None:
        self._reader = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> Reading:
        """One reading. Raises Unavailable with the reason."""
        stdin, stdout = self._reader.stdin, self._reader.stdout
        assert stdin is not None  # noqa: S101  both are pipes
        assert stdout is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # it says why, or nothing
            stdin.write("\n")
        if not select.select([stdout], [], [], DEADLINE_S)[0]:
            raise Unavailable(f"CUDA did not answer within {DEADLINE_S} s")
        line = stdout.readline()
        if not line:
            raise Unavailable("the process that asked CUDA ended without a word")
        said = json.loads(line)
        if "error" in said:
            raise Unavailable(said["error"])
        return Reading(**said)

    def close(self) -> None:
        self._reader.kill()
        self._reader.communicate()


def once(command: Sequence[str] = READER) -> Reading | str:
    """One reading, or why there is none."""
    try:
        with CudaView(command) as view:
            return view.read()
    except Unavailable as error:
        return str(error)
