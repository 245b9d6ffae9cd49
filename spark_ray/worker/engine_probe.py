"""The sizing law alone: no model, no engine library. A probe of memory, and it says so.

It reads the real memory view of its environment when an engine would, subtracts the profiling peak it was told,
applies the law of `sizing`, and takes a pool of that size for real. So a trial takes a fraction of a second and
answers what an engine with this law would have read and taken here. What engines add (their libraries, kernels,
graphs, fragmentation) is not in it.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

from . import cuda, sizing
from .session import Infeasible, OutOfMemory, Session

NAME = "probe (sizing law only)"


def _mapping(size_bytes: int, what: str) -> mmap.mmap | None:
    """Private anonymous memory as an engine's allocator asks for it; none of it is committed yet."""
    if size_bytes == 0:
        return None
    try:
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise OutOfMemory(f"{what} of {size_bytes} bytes was refused: {error}") from error


def _touched(size_bytes: int, what: str) -> mmap.mmap | None:
    """The same with a byte written to every page, so that the kernel has to find them all."""
    block = _mapping(size_bytes, what)
    if block is not None:
        block[:: mmap.PAGESIZE] = b"\1" * -(-size_bytes // mmap.PAGESIZE)
    return block


def _profile(talk: Session) -> int:
    """Touch what the largest batch is said to need and give it back, as an engine's profiling pass does."""
    size = int(talk.engine["transient_per_token"]) * int(talk.configuration["max_num_tokens"])
    block = _touched(size, "the profiling pass")
    if block is not None:
        block.close()
    return size


def _read_view(view: str) -> dict[str, Any]:
    if view != "cuda":
        return sizing.read_view(view)
    free, total = _cuda_memory()
    return sizing.read_view("memfree") | {"view": "cuda", "total_bytes": total, "free_bytes": free}


def _cuda_memory() -> tuple[int, int]:
    try:
        return cuda.memory()
    except cuda.Unavailable as error:
        raise RuntimeError(f"engine.memory_view is cuda, but CUDA does not start here: {error}") from error


def _observed_cuda() -> dict[str, Any]:
    free, total = _cuda_memory()
    return {"cuda": {"free_bytes": free, "total_bytes": total}}


def _blocks(available_bytes: int, settings: dict[str, Any]) -> int:
    """Whole blocks of the pool; Infeasible if not one request of max_seq_len fits."""
    blocks = available_bytes // (settings["tokens_per_block"] * settings["bytes_per_token"])
    tokens = blocks * settings["tokens_per_block"]
    if tokens < settings["max_seq_len"]:
        need = settings["max_seq_len"] * settings["bytes_per_token"]
        raise Infeasible(
            "pool_below_one_sequence",
            f"the pool would hold {tokens} tokens, one request of max_seq_len {settings['max_seq_len']} needs {need} bytes",
        )
    return int(blocks)


def run(talk: Session, measurements: dict[str, Any]) -> None:
    """Hold the weights, touch the transient, hold the graphs, size, take the pool: the memory of one engine's start, once."""
    settings = talk.engine
    measurements["engine"] = {
        "name": NAME,
        "version": "1",
        "python": sys.version.split()[0],
        "probe": True,
    }
    if settings["memory_view"] == "cuda":
        talk.sources.append(_observed_cuda)
    weights = _touched(settings["weights"], "weights")
    measurements["model"] = {"weight_bytes": settings["weights"]}
    talk.phase("after_load")
    transient = _profile(talk)
    graphs = _touched(
        settings["graphs_per_sequence"] * int(talk.configuration["max_batch_size"]), "what graphs hold"
    )
    talk.phase("sizing")
    pool = sizing.size_pool(
        _read_view(settings["memory_view"]), transient, talk.configuration["memory_fraction"]
    )
    measurements["sizing"] = pool
    blocks = _blocks(pool["available_bytes"], settings)
    tokens = blocks * settings["tokens_per_block"]
    size = tokens * settings["bytes_per_token"]
    how = settings["pool"] or ("none" if settings["memory_view"] == "cuda" else "touched")
    take = {"touched": _touched, "mapped": _mapping}.get(how)
    held = take(size, "the pool") if take else None
    measurements["kv_cache"] = {
        "bytes": size,
        "blocks": blocks,
        "tokens": tokens,
        "tokens_per_block": settings["tokens_per_block"],
        "bytes_per_token": settings["bytes_per_token"],
        "sequences": tokens // settings["max_seq_len"],
        "source": "law over the memory view; "
        + (f"pool of {len(held)} bytes {how}" if held is not None else "no pool taken"),
    }
    if held is not None:
        measurements["kv_cache"]["tensor_bytes"] = len(held)
    talk.phase("after_kv")
    talk.phase("end")
    for block in (held, graphs, weights):
        if block is not None:
            block.close()
