"""What a complete block tells the search: from its records alone, so that a run that is resumed tells the same again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .divergence import contrast
from .experiment import Experiment
from .outcome import ANSWERS
from .store import RECORD, BlockState, Store, read_record
from .units import GIB


@dataclass(frozen=True)
class Told:
    """Arguments of `search.Search.tell`.

    Attributes, of both roles (baseline, against):

        kv_ROLE_bytes, kv_ROLE_gib          its capacity; None: none, which is known even where the other arm has some
        kv_ROLE_capped                      the setting that limited it instead of memory; left out where memory did
        throughput_ROLE_tokens_per_s        of the workload, where it was measured
        block_s                             seconds from the wait before the first arm to the cooldown after the last, all arms
    """

    contrast: float | None
    """None: a compared arm has no capacity."""
    constraints: Mapping[str, float]
    """By arm: above 0 is violated."""
    attributes: Mapping[str, object] = field(default_factory=dict)


def told_of(state: BlockState, store: Store, experiment: Experiment) -> Told | None:
    """What a complete block says; None if a compared arm failed, or was left out, which is no answer."""
    pair = experiment.compared
    roles = {"baseline": pair.baseline, "against": pair.against}
    kinds = {state.outcomes.get(arm, {}).get("kind", "left out") for arm in roles.values()}
    if not kinds <= ANSWERS:
        return None
    records = {arm: _record(state, store, arm) for arm in state.block.order}
    sizes = {role: _kv_bytes(records[arm]) for role, arm in roles.items()}
    attributes: dict[str, object] = {}
    for role, arm in roles.items():
        attributes |= _of_role(role, sizes[role], records[arm])
    durations = [record.get("host", {}).get("duration_s") for record in records.values()]
    # A simulated block's seconds are those of starting a formula: by them no run could be repeated.
    if experiment.engine.kind != "simulated" and None not in durations:
        attributes["block_s"] = sum(durations)
    baseline, against = sizes.values()
    return Told(
        contrast(baseline, against) if baseline and against else None,
        {f"{arm}_has_no_capacity": -1.0 if sizes[role] else 1.0 for role, arm in roles.items()},
        attributes,
    )


def _record(state: BlockState, store: Store, arm: str) -> dict[str, Any]:
    trial = state.block.trial_id(arm)
    return read_record(store.attempt_folder(trial, state.valid or state.attempts) / RECORD) or {}


def _kv_bytes(record: Mapping[str, Any]) -> int | None:
    """None where the answer is that nothing fits."""
    if record.get("outcome", {}).get("kind") != "ok":
        return None
    return int(record["result"]["measurements"]["kv_cache"]["bytes"]) or None


def _of_role(role: str, kv_bytes: int | None, record: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {f"kv_{role}_bytes": kv_bytes}
    found[f"kv_{role}_gib"] = None if kv_bytes is None else round(kv_bytes / GIB, 3)
    if kv_bytes is None:
        return found
    measured = record["result"]["measurements"]
    if setting := _capped_by(record.get("engine", {}), measured["kv_cache"]):
        found[f"kv_{role}_capped"] = setting
    if work := measured.get("throughput"):
        found[f"throughput_{role}_tokens_per_s"] = work["output_throughput_tokens_per_s"]
    return found


def _capped_by(engine: Mapping[str, Any], kv: Mapping[str, Any]) -> str | None:
    """The engine's setting of which the pool holds just so many tokens; None: memory set the pool."""
    setting = {"simulated": "max_tokens", "tensorrt_llm": "kv_cache"}.get(engine.get("kind", ""), "")
    most = engine.get(setting)
    if most is None:
        return None
    tokens = most if setting == "max_tokens" else most // kv["bytes_per_token"]
    return f"engine.{setting}" if abs(tokens - kv["tokens"]) < kv["tokens_per_block"] else None
