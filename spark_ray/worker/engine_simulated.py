"""No engine and no memory: the capacity that a formula gives, on a machine that is not there. Every record says so.

The formula is a law of `simulated_law`, or the user's own function, of which the run took a copy (`LANDSCAPE`). Either
goes through the phases of a trial like an engine, so that everything around an engine is used as it is.
"""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

from . import simulated_law as law
from .session import Infeasible, OutOfMemory, Session

LANDSCAPE = "spark_ray_landscape"
"""Name of the user's module beside this package."""
_ENGINES = {"memfree": "TensorRT-LLM", "memavailable": "vLLM"}


def _meminfo(sized: law.Sized) -> dict[str, int]:
    """What /proc/meminfo of the simulated machine would say; every byte of it is in one of these."""
    return {
        "MemTotal": sized.total_bytes,
        "MemFree": sized.mem_free_bytes,
        "MemAvailable": sized.mem_free_bytes + sized.page_cache_bytes,
        "Buffers": 0,
        "Cached": sized.page_cache_bytes,
        "Shmem": 0,
        "AnonPages": sized.total_bytes - sized.mem_free_bytes - sized.page_cache_bytes,
    }


def _by_law(talk: Session, disturbed: law.Disturbance) -> dict[str, Any]:
    """measurements["sizing"] by one of the laws."""
    settings = talk.engine
    try:
        sized = law.size(settings, settings["effect"], talk.configuration, disturbed)
    except law.OutOfMemory as error:
        raise OutOfMemory(str(error)) from error
    return {
        "law": law.MARK + law.LAWS[sized.view],
        "view": law.MARK + sized.view,
        "fraction": sized.fraction,
        "total_bytes": sized.total_bytes,
        "free_bytes": sized.free_bytes,
        "transient_bytes": sized.transient_bytes,
        "peak_bytes": sized.peak_bytes,
        "available_bytes": sized.available_bytes,
        "read_from": "nowhere: simulated",
        "meminfo": _meminfo(sized),
        "terms": {
            "own_bytes": sized.own_bytes,
            "graphs_bytes": sized.graphs_bytes,
            "effect_bytes": sized.effect_bytes,
        },
    }


def _by_landscape(talk: Session, disturbed: law.Disturbance) -> dict[str, Any]:
    """The same by the user's function. Disturbances are of its KV bytes: it has no memory that they could take."""
    chosen = talk.engine["landscape"]
    function = getattr(importlib.import_module(LANDSCAPE), chosen["function"])
    value = function(dict(talk.configuration), talk.request["arm"], dict(chosen["parameters"]))
    if value is None:
        raise Infeasible("landscape_has_none", f"{chosen['function']} gives no capacity here")
    if not math.isfinite(value):
        raise ValueError(f"{chosen['function']} gives {value}")
    available = value * (1 - disturbed.taken_share) - disturbed.taken_bytes
    return {
        "law": f"{law.MARK}{chosen['function']} of a landscape",
        "view": law.MARK + "landscape",
        "fraction": talk.configuration["memory_fraction"],
        "available_bytes": max(0, int(available)),
        "read_from": "nowhere: simulated",
    }


def _pool(talk: Session, available_bytes: int) -> dict[str, Any]:
    """measurements["kv_cache"]; Infeasible if not one request of max_seq_len fits."""
    settings = talk.engine
    blocks = law.blocks_of(settings, available_bytes)
    tokens = blocks * settings["tokens_per_block"]
    if not law.fits_one_sequence(settings, blocks):
        need = settings["max_seq_len"] * settings["bytes_per_token"]
        raise Infeasible(
            "pool_below_one_sequence",
            f"the pool would hold {tokens} tokens, one request of max_seq_len {settings['max_seq_len']} needs {need} bytes",
        )
    return {
        "bytes": tokens * settings["bytes_per_token"],
        "blocks": blocks,
        "tokens": tokens,
        "tokens_per_block": settings["tokens_per_block"],
        "bytes_per_token": settings["bytes_per_token"],
        "sequences": tokens // settings["max_seq_len"],
        "source": "simulated",
    }


def measure(talk: Session, measurements: dict[str, Any], disturbed: law.Disturbance) -> None:
    """The capacity of one trial that finds this."""
    by_landscape = talk.engine["landscape"] is not None
    name = "a landscape" if by_landscape else f"{_ENGINES[talk.engine['memory_view']]}'s law"
    measurements["engine"] = {
        "name": f"simulated ({name})",
        "version": "1",
        "python": sys.version.split()[0],
        "simulated": True,
    }
    if not by_landscape:
        measurements["model"] = {"weight_bytes": talk.engine["weights"]}
    measurements["sizing"] = (_by_landscape if by_landscape else _by_law)(talk, disturbed)
    measurements["kv_cache"] = _pool(talk, measurements["sizing"]["available_bytes"])


def run(talk: Session, measurements: dict[str, Any]) -> None:
    """Compute; nothing is loaded and nothing is taken."""
    moment = law.Moment(**talk.engine["moment"])
    talk.phase("sizing", settle=False)  # it reads nothing, so the host has nothing to hold for it
    measure(talk, measurements, law.found(talk.engine, talk.request["arm"], talk.request["seed"], moment))
    talk.phase("end")
