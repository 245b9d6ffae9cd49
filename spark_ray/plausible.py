"""Bounds that a measurement cannot beat: the model that was named, the memory of the node, the speed of that memory.

A result beyond one of them is of another model, or wrong, so its trial fails (`implausible_*`) and no analysis takes it
for an answer. A bound is only applied where everything it needs is known; what was not applied is on record with its reason.
All numbers of the model are read by the host itself, from the folder that it handed out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .units import GIB, format_bytes
from .worker import identity

BUFFERS_BYTES = 4 * GIB  # engines count work space as weights: tables of logits, of attention, of the sampler
TOLERANCE = 0.25  # of the weights: parts that are not loaded, padding, scales in another layout
CACHED_BYTES = GIB  # smaller weights may stay in a processor's cache, where the memory's speed is no bound
JITTER = 0.05


@dataclass(frozen=True)
class Reference:
    """What the host knows of the model it hands out, as one engine loads it, and of the node."""

    weights: identity.Weights | None  # None: not known, for the reason in `unknown`
    unknown: str | None
    config_sha256: str | None
    memory_bandwidth_bytes_per_s: (
        float | None
    )  # nominal, of the memory that weights live in; None: not stated


@dataclass(frozen=True)
class Asked:
    """One attempt: what it was held to."""

    reference: Reference
    engine: Mapping[str, Any]
    configuration: Mapping[str, Any]
    workload: Mapping[str, Any]
    memory_bytes: int | None  # all that the engine can use on this node; None: unknown
    on_gpu: bool = False  # where a pool is taken whole; elsewhere it may be promised and not touched

    @property
    def ranks(self) -> int:
        return int(self.engine.get("tensor_parallel_size", 1))


@dataclass
class Findings:
    held: list[str] = field(default_factory=list)
    violated: dict[str, str] = field(default_factory=dict)
    not_applied: dict[str, str] = field(default_factory=dict)

    def put(self, bound: str, wrong: str | None) -> None:
        if wrong is None:
            self.held.append(bound)
        else:
            self.violated[bound] = wrong

    def as_dict(self) -> dict[str, Any]:
        return {"held": self.held, "violated": self.violated, "not_applied": self.not_applied}

    @property
    def first(self) -> tuple[str, str] | None:
        """(reason, sentence) for the outcome."""
        return next(((f"implausible_{bound}", why) for bound, why in self.violated.items()), None)


def reference(
    model: Path, engine: Mapping[str, Any], memory_bandwidth_bytes_per_s: float | None
) -> Reference:
    """Read before anything is measured: hashes and headers, nothing is loaded."""
    weights, unknown = None, None
    try:
        if engine["kind"] == "tensorrt_llm" and identity.dtype_of(model) == "float32":
            raise identity.Unknown(
                "its config.json says float32, which TensorRT-LLM loads as bfloat16 for some models"
            )
        weights = identity.weights(model, engine["dtype"] if engine["kind"] == "embedded" else "auto")
    except (identity.Unknown, OSError) as error:
        unknown = str(error)
    return Reference(weights, unknown, identity.of(model)["config_sha256"], memory_bandwidth_bytes_per_s)


def judge(measurements: Mapping[str, Any], asked: Asked) -> Findings:
    """Hold what was measured against every bound that can be applied."""
    found = Findings()
    model, pool, work = (measurements.get(name) or {} for name in ("model", "kv_cache", "throughput"))
    _judge_identity(found, model, asked)
    if pool and model.get("weight_bytes") is None and asked.reference.weights is not None:
        found.put("weights", "the engine sized its pool and did not say how large its weights are")
    else:
        _judge_weights(found, model.get("weight_bytes"), model.get("resolution_bytes") or 0, asked)
    _judge_footprint(found, model.get("weight_bytes"), pool.get("bytes") or 0, asked)
    if asked.engine.get("double") is not None:
        found.not_applied["throughput"] = "a double makes its tokens without reading weights"
    else:
        _judge_throughput(found, work.get("output_throughput_tokens_per_s"), asked)
    return found


def _judge_identity(found: Findings, model: Mapping[str, Any], asked: Asked) -> None:
    told = model.get("config_sha256")
    if told is None or asked.reference.config_sha256 is None:
        found.not_applied["model"] = (
            "the config.json that was loaded, or the one that was asked for, could not be read"
        )
    else:
        wrong = told != asked.reference.config_sha256
        found.put(
            "model",
            "the config.json in the worker's folder is not that of the model that was asked for"
            if wrong
            else None,
        )


def _judge_weights(found: Findings, weight_bytes: int | None, resolution_bytes: int, asked: Asked) -> None:
    """What lies in memory is what lies in the files: a dummy's random weights have the same shapes and types."""
    if weight_bytes is None or asked.reference.weights is None:
        found.not_applied["weights"] = (
            asked.reference.unknown or "the engine did not say how large its weights are"
        )
        return
    share = asked.reference.weights.loaded_bytes / asked.ranks
    low = (1 - TOLERANCE) * share - resolution_bytes
    high = (1 + TOLERANCE) * asked.reference.weights.loaded_bytes + BUFFERS_BYTES
    if asked.reference.weights.has_states:
        high = math.inf
        found.not_applied["weights_above"] = (
            "states of its layers, one for each request, may count as weights"
        )
    wrong = None
    if not low <= weight_bytes <= high:
        wrong = (
            f"the engine holds {format_bytes(weight_bytes)} of weights, the model's files have "
            f"{format_bytes(asked.reference.weights.loaded_bytes)} in the types they are loaded in: another model, or not all of it"
        )
    found.put("weights", wrong)


def _judge_footprint(found: Findings, weight_bytes: int | None, pool_bytes: int, asked: Asked) -> None:
    """The pool is taken beside the weights. What the profiling pass held for a moment may be counted among those."""
    if weight_bytes is None or asked.memory_bytes is None:
        found.not_applied["footprint"] = "the size of the weights, or of the node's memory, is not known"
        return
    wrong = None
    if weight_bytes > asked.memory_bytes:
        wrong = f"{format_bytes(weight_bytes)} of weights"
    elif asked.on_gpu and weight_bytes + pool_bytes > (1 + JITTER) * asked.memory_bytes:
        wrong = f"{format_bytes(weight_bytes)} of weights and {format_bytes(pool_bytes)} of KV cache"
    if wrong is not None:
        wrong += f" on a node with {format_bytes(asked.memory_bytes)} of memory in all"
    found.put("footprint", wrong)


def _judge_throughput(found: Findings, tokens_per_s: float | None, asked: Asked) -> None:
    """Each step reads the weights at least once and makes one token for each request of the batch at most."""
    why = None
    speed, decode = asked.reference.memory_bandwidth_bytes_per_s, None
    if tokens_per_s is None:
        why = "no tokens were generated"
    elif speed is None:
        why = "the memory bandwidth of this node is not known (provider.memory_bandwidth in the cluster file)"
    elif asked.reference.weights is None:
        why = asked.reference.unknown
    else:
        decode, why = asked.reference.weights.decode_bytes, asked.reference.weights.decode_unknown
        if decode is not None and decode < CACHED_BYTES:
            why = f"{format_bytes(decode)} of weights may stay in a processor's cache"
    if why is not None or tokens_per_s is None or speed is None or decode is None:
        found.not_applied["throughput"] = why or "not known"
        return
    batch = min(int(asked.configuration["max_batch_size"]), int(asked.workload["requests"]))
    most = batch * asked.ranks * speed / decode
    wrong = None
    if tokens_per_s > (1 + JITTER) * most:
        wrong = (
            f"{tokens_per_s:.1f} tokens/s with {batch} requests at once; memory of {speed / 1e9:.0f} GB/s can read "
            f"{format_bytes(decode)} of weights for {most:.1f} at most"
        )
    found.put("throughput", wrong)


def lacking_memory(model: Path, engine: Mapping[str, Any], memory_bytes: int) -> tuple[str, str] | None:
    """(what is wrong, mend) where the weights of a model folder cannot be in this node's memory; told before any effect."""
    weights = reference(model, engine, None).weights
    if weights is None or weights.loaded_bytes <= memory_bytes:
        return None
    return (
        f"the weights in {model} take {format_bytes(weights.loaded_bytes)}, this node has {format_bytes(memory_bytes)} of memory",
        "name a smaller or quantized model, or one folder of it that fits",
    )
