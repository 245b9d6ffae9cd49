"""No engine: does on command what engines do by accident. Its numbers mean nothing and say so."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import time
from typing import Any

from .session import Infeasible, Session

_STEP_BYTES = 64 << 20
_BURST_S = 0.05


def _allocate(size_bytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, size_bytes)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        block[offset] = 1
    return block


def _eat(most_bytes: int, pause_s: float) -> None:
    """Take memory step by step, with pauses, and keep it until somebody ends this process."""
    eaten = []
    for _ in range(most_bytes // _STEP_BYTES):
        eaten.append(_allocate(_STEP_BYTES))
        time.sleep(pause_s)
    time.sleep(10_000)


def _burst(size_bytes: int) -> None:
    """Hold memory for a moment, between two phases."""
    with contextlib.closing(_allocate(size_bytes)):
        time.sleep(_BURST_S)


def _misbehave(behaviour: str) -> None:
    if behaviour == "hang":
        ctypes.PyDLL(None).sleep(10_000)  # holds the interpreter lock: no thread of this process can run
    elif behaviour == "segfault":
        ctypes.string_at(0)
    elif behaviour == "exit":
        os._exit(3)
    elif behaviour == "raise":
        raise RuntimeError("the fake engine was told to fail")
    elif behaviour == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif behaviour == "infeasible":
        raise Infeasible("told_so", "the fake engine was told that nothing fits")


def run(talk: Session, measurements: dict[str, Any]) -> None:
    """Go through the phases; misbehave after `after_load` if told to."""
    settings = talk.engine
    measurements["engine"] = {"name": "fake", "version": "1", "python": sys.version.split()[0], "fake": True}
    talk.phase("after_load")
    behaviour = settings["behaviour"]
    if settings.get("only_in_arm") in {None, talk.request["arm"]}:
        _misbehave(behaviour)
        if behaviour == "eat":
            _eat(settings["allocate"] or 0, settings["hold"])
    allocates = settings.get("allocate") and behaviour != "burst"
    held = _allocate(settings["allocate"]) if allocates else None
    seen = talk.phase("sizing")
    time.sleep(settings.get("hold", 0.0))
    if behaviour == "burst":
        _burst(settings["allocate"] or 0)
    tokens_per_block, bytes_per_token = 64, 8192
    blocks = int(settings["kv_cache"] * talk.configuration["memory_fraction"]) // (
        tokens_per_block * bytes_per_token
    )
    measurements["sizing"] = {
        "law": "fake",
        "free_bytes": seen["meminfo"]["MemFree"],
        "fraction": talk.configuration["memory_fraction"],
    }
    measurements["kv_cache"] = {
        "bytes": blocks * tokens_per_block * bytes_per_token,
        "blocks": blocks,
        "tokens": blocks * tokens_per_block,
        "tokens_per_block": tokens_per_block,
        "bytes_per_token": bytes_per_token,
        "sequences": blocks // 16,
        "source": "fake",
    }
    if behaviour == "garbage":
        measurements["kv_cache"]["bytes"] = "many"
    talk.phase("end")
    if held is not None:
        held.close()
