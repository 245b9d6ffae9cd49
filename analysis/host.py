"""What the host said about an attempt's conditions, as columns of the trial table: gate, guard, memory coming back, watchdog, ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .reading import COUNT, FLAG, NUMBER, TEXT, Record, at, count, flag, number, text
from .sizing import orchestrator_bytes

COLUMNS = {
    "gate_unreached": TEXT,
    "guard_swapped_bytes": COUNT,
    "guard_stalled_share": NUMBER,
    "guard_throttled_share": NUMBER,
    "guard_foreign_gpu_processes": COUNT,
    "back_reached": FLAG,
    "back_waited_s": NUMBER,
    "back_missing_bytes": COUNT,
    "watchdog_unprotected": TEXT,
    "ledger_disagreements": TEXT,
    "orchestrator_before_bytes": COUNT,
    "orchestrator_after_bytes": COUNT,
    "bounds_not_applied": TEXT,
}
MEANINGS = {
    "gate_unreached": "what the gate waited for in vain before the start, by name; empty: nothing",
    "guard_swapped_bytes": "pages swapped in and out while the worker ran, of the whole host",
    "guard_stalled_share": "share of the attempt in which some task waited for memory",
    "guard_throttled_share": "share of GPU samples slowed for heat or power",
    "guard_foreign_gpu_processes": "compute processes of others seen on a GPU while the worker ran",
    "back_reached": "whether memory came back after the attempt",
    "back_waited_s": "how long that took, seconds",
    "back_missing_bytes": "memory that was wanted back and had not come when the wait ended",
    "watchdog_unprotected": "protections that the watchdog could not get, with the reason; empty: it has all",
    "ledger_disagreements": "quantities that two sources told differently beyond the error bar, with the phase",
    "orchestrator_before_bytes": "Ray, this program and container daemons before the attempt, proportional set size",
    "orchestrator_after_bytes": "the same after the attempt",
    "bounds_not_applied": "bounds of plausibility that the measurement could not be held to, each with the reason; empty: none",
}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _joined(words: Iterator[str] | list[str]) -> str:
    return ", ".join(sorted(dict.fromkeys(words)))


def _unreached(gate: Mapping[str, Any]) -> Iterator[str]:
    """Names of what was not reached; what a host cannot tell is absent there, not unreached."""
    for name, each in gate.items():
        if at(each, "reached") is False:
            yield (text(name) or "?").replace("_", " ")


def _unprotected(watchdog: Any) -> list[str]:
    found = _mapping(at(watchdog, "protections"))
    return [f"{text(name)}: {text(why) or 'no'}" for name, why in found.items() if why is not True]


def _disagreements(ledgers: list[Any]) -> Iterator[str]:
    for each in ledgers:
        for quantity in _list(at(each, "quantities")):
            if at(quantity, "agree") is False:
                yield f"{text(at(quantity, 'name')) or '?'} at {text(at(each, 'phase')) or '?'}"


def _not_applied(record: Record, bounds: Mapping[str, Any]) -> Iterator[str]:
    """A throughput that was not measured needs no bound."""
    generated = at(record, "result", "measurements", "throughput") is not None
    for bound, why in bounds.items():
        if bound != "throughput" or generated:
            yield f"{(text(bound) or '?').replace('_', ' ')}: {text(why) or '?'}"


def of_record(record: Record) -> dict[str, Any]:
    """The columns above; absent in the record of an older program, and where this host cannot tell."""
    host = at(record, "host")
    gate, guard, back, watchdog, ledgers = (
        at(host, name) for name in ("gate", "guard", "back", "watchdog", "ledger")
    )
    strangers, bounds = at(guard, "foreign_gpu_processes"), at(host, "plausibility", "not_applied")
    wanted, found = count(at(back, "wanted_bytes")), count(at(back, "found_bytes"))
    return {
        "gate_unreached": _joined(_unreached(gate)) if isinstance(gate, Mapping) else None,
        "guard_swapped_bytes": count(at(guard, "swapped_bytes")),
        "guard_stalled_share": number(at(guard, "stalled_share")),
        "guard_throttled_share": number(at(guard, "throttled_share")),
        "guard_foreign_gpu_processes": len(strangers) if isinstance(strangers, list) else None,
        "back_reached": flag(at(back, "reached")),
        "back_waited_s": number(at(back, "waited_s")),
        "back_missing_bytes": None if wanted is None or found is None else max(0, wanted - found),
        "watchdog_unprotected": _joined(_unprotected(watchdog)) if at(watchdog, "protections") is not None else None,
        "ledger_disagreements": _joined(_disagreements(ledgers)) if isinstance(ledgers, list) else None,
        "orchestrator_before_bytes": orchestrator_bytes(record, "before", "pss_bytes"),
        "orchestrator_after_bytes": orchestrator_bytes(record, "after", "pss_bytes"),
        "bounds_not_applied": "; ".join(sorted(_not_applied(record, bounds))) if isinstance(bounds, Mapping) else None,
    }  # fmt: skip
