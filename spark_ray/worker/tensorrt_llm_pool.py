"""TensorRT-LLM's KV pool as it was built: blocks from the manager object, the LLM API, statistics or the log.

The first that answers counts, with the next one beside it: the host believes no two that are more than a block apart.

Each source names blocks of the GPU's own pool, and only some name bytes: a token's bytes come from the engine where it
says them, and are checked against the model's config.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .session import Infeasible
from .tensorrt_llm_api import UnsupportedError
from .tensorrt_llm_log import Log

_SPARE_BLOCKS = 4  # that an allocation may hold beyond the pool, as the host believes it
_STATS_S = 5.0  # for statistics of a request that has been served
_FRACTION_STEP = 1e-6  # a fraction may come back in single precision
_LISTED = 0.75  # share of what torch holds that a model's own list of parameters comes to at least


@dataclass(frozen=True)
class Reading:
    """The pool as one source has it. None: it does not say."""

    source: str
    blocks: int
    tokens_per_block: int
    bytes_per_token: int | None = None
    allocated_bytes: int | None = None
    max_seq_len: int | None = None

    @property
    def tokens(self) -> int:
        return self.blocks * self.tokens_per_block


def _whole(value: Any) -> int | None:
    """A positive whole number, or None: 0 is how these objects say that they do not know."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _reading(source: str, blocks: Any, tokens_per_block: Any, **more: Any) -> Reading | None:
    if _whole(blocks) is None or _whole(tokens_per_block) is None:
        return None
    return Reading(source, blocks, tokens_per_block, **more)


# ---- sources ----------------------------------------------------------------------------------------------


def _engine(llm: Any) -> Any:
    """The executor of an engine in this process, or None."""
    return getattr(getattr(llm, "_executor", None), "engine", None)


def from_manager(llm: Any) -> Reading | None:
    """From the manager object, in this process only. Its get_max_resource_count is not asked: some answer in bytes."""
    managers = getattr(getattr(_engine(llm), "resource_manager", None), "resource_managers", None) or {}
    named = {str(getattr(key, "name", key)).upper(): manager for key, manager in managers.items()}
    manager = named.get("KV_CACHE_MANAGER")
    if manager is None:
        return None
    stats = manager.get_kv_cache_stats()
    per_token = getattr(manager, "get_cache_bytes_per_token", None)
    return _reading(
        "KV cache manager",
        getattr(stats, "max_num_blocks", 0) or getattr(manager, "blocks_in_primary_pool", 0),
        getattr(stats, "tokens_per_block", 0) or getattr(manager, "tokens_per_block", 0),
        bytes_per_token=_whole(per_token()) if per_token is not None else None,
        allocated_bytes=_whole(getattr(stats, "allocated_bytes", 0)),
        max_seq_len=_whole(getattr(manager, "max_seq_len", 0)),
    )


def from_api(llm: Any) -> Reading | None:
    """From LLM.get_kv_cache_capacity, which came while 1.3 was made (1.3.0rc21 has it)."""
    ask = getattr(llm, "get_kv_cache_capacity", None)
    said = ask() if ask is not None else None
    if not isinstance(said, Mapping):
        return None
    return _reading("LLM.get_kv_cache_capacity", said.get("maxNumBlocks"), said.get("tokensPerBlock"))


def from_stats(llm: Any) -> Reading | None:
    """From the statistics of an iteration: there are none before a first request, and they come a little after it."""
    deadline = time.monotonic() + _STATS_S
    while time.monotonic() < deadline:
        for each in llm.get_stats(timeout=1) or ():
            stats = json.loads(each) if isinstance(each, str | bytes) else each
            kv = stats.get("kvCacheStats") or {}
            found = _reading("LLM.get_stats", kv.get("maxNumBlocks"), kv.get("tokensPerBlock"))
            if found is not None:
                return found
        time.sleep(0.05)
    return None


def from_log(seen: Log, tokens_per_block: int) -> Reading | None:
    page = seen.tokens_per_block or tokens_per_block
    tokens = seen.allocated_tokens
    if tokens is None and seen.primary_blocks is not None:
        tokens = seen.primary_blocks * page
    if tokens is None or tokens % page:
        return None
    return _reading("log", tokens // page, page, bytes_per_token=seen.bytes_per_token)


def readings(llm: Any, seen: Log, tokens_per_block: int, request: Callable[[], object]) -> list[Reading]:
    """Sources that answer, the most direct first. Statistics cost a `request`, so only a lack of others makes them speak."""
    best, last = [from_manager(llm), from_api(llm)], from_log(seen, tokens_per_block)
    stats = None
    if sum(each is not None for each in (*best, last)) < 2:
        request()
        stats = from_stats(llm)
    return [each for each in (*best, stats, last) if each is not None]


def weights(llm: Any, seen: Log) -> dict[str, Any] | None:
    """Bytes of the parameters: counted where the model is in this process, else as the log has them.

    Some kernels lay out weights anew and keep them as plain attributes, which no model lists: then the log's number counts.
    """
    model = getattr(getattr(_engine(llm), "model_engine", None), "model", None)
    if model is not None and hasattr(model, "parameters"):
        found = [(int(each.numel()), int(each.element_size())) for each in model.parameters()]
        size, count = sum(values * width for values, width in found), sum(values for values, _ in found)
        if size >= _LISTED * (seen.weights_bytes or 0):
            return {"weight_bytes": size, "parameters": count}
    if seen.weights_bytes is None:
        return None
    return {"weight_bytes": seen.weights_bytes, "resolution_bytes": seen.resolution_bytes}


# ---- capacity ---------------------------------------------------------------------------------------------


def bytes_per_token(found: list[Reading], seen: Log, by_config: int | None, kv_dtype: str) -> int:
    """As the engine says it, else by config.json. An engine that ignored the dtype that was asked for is refused."""
    told = next((each.bytes_per_token for each in found if each.bytes_per_token), seen.bytes_per_token)
    if told is None and by_config is None:
        raise UnsupportedError("nothing tells how many bytes a token takes in the KV cache")
    if told is not None and by_config is not None and told != by_config and kv_dtype != "auto":
        raise UnsupportedError(
            f"the engine counts {told} KV bytes a token, by config.json they are {by_config}: "
            f"engine.kv_dtype {kv_dtype} did not take effect"
        )
    return int(told or by_config or 0)


def check_fraction(seen: Log, asked: float) -> None:
    """The engine sized by the fraction that was asked for, as far as it says."""
    if seen.fraction is not None and abs(seen.fraction - asked) > _FRACTION_STEP:
        raise UnsupportedError(
            f"memory_fraction {asked} did not take effect: the engine says {seen.fraction}"
        )


def capacity(found: list[Reading], bytes_per_token: int, max_seq_len: int) -> dict[str, Any]:
    """measurements["kv_cache"]: the first source, with the second beside it."""
    if not found:
        raise UnsupportedError("neither objects, statistics nor log of this version tell the KV capacity")
    first, *others = found
    size = first.tokens * bytes_per_token
    values: dict[str, Any] = {
        "bytes": size,
        "blocks": first.blocks,
        "tokens": first.tokens,
        "tokens_per_block": first.tokens_per_block,
        "bytes_per_token": bytes_per_token,
        "sequences": first.tokens // max_seq_len,
        "source": first.source,
    }
    spare = _SPARE_BLOCKS * first.tokens_per_block * bytes_per_token
    if first.allocated_bytes is not None and 0 <= first.allocated_bytes - size <= spare:
        values["tensor_bytes"] = first.allocated_bytes
    if others:
        second = {"bytes": others[0].tokens * bytes_per_token, "source": others[0].source}
        values["second_source"] = second
    return values


def check_as_asked(
    pool: Mapping[str, Any], first: Reading, seen: Log, max_seq_len: int, max_tokens: int | None
) -> None:
    """A pool that the engine made fit by giving up what was asked for is an answer: that does not fit here."""
    tokens, page = pool["tokens"], pool["tokens_per_block"]
    if tokens < max_seq_len:
        need = max_seq_len * pool["bytes_per_token"]
        raise Infeasible(
            "pool_below_one_sequence",
            f"the pool holds {tokens} tokens, one request of max_seq_len {max_seq_len} needs {need} bytes",
        )
    if seen.reduced or (first.max_seq_len is not None and first.max_seq_len < max_seq_len):
        words = "; ".join(seen.reduced) or f"its max_seq_len is {first.max_seq_len}, asked was {max_seq_len}"
        raise Infeasible("max_seq_len_reduced", f"the engine reduced what one request may hold: {words}")
    if max_tokens is not None and tokens < max_tokens // page * page:
        raise Infeasible(
            "pool_below_pinned", f"the pool holds {tokens} tokens, engine.kv_cache is {max_tokens} tokens"
        )
