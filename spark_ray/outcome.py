"""From facts to one word: what became of an attempt. Pure; the worker states facts, the host derives the outcome."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from .measurements import KvCache
from .result import problems

OutcomeKind = Literal[
    "ok",
    "infeasible",
    "out_of_memory",
    "engine_error",
    "timeout",
    "crashed",
    "disturbed",
    "wrong_environment",
    "host_wedged",
]
ANSWERS = frozenset({"ok", "infeasible", "out_of_memory"})
"""Outcomes that answer the question. The rest of the final ones are failures; `disturbed` is no outcome of the trial."""
VOID = frozenset({"disturbed", "host_wedged"})
"""The block is void: it runs again as a whole, within bounds."""
_KILLED, _LOST_HOST = 128 + signal.SIGKILL, 128 + signal.SIGHUP  # exit statuses


@dataclass(frozen=True)
class Outcome:
    kind: OutcomeKind
    reason: str
    message: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "reason": self.reason, "message": self.message}


@dataclass(frozen=True)
class Facts:
    """What the host knows of an attempt that has ended."""

    result: dict[str, Any] | None  # checked result.json
    result_error: str | None = None  # why there is none, or none with a capacity, that can be believed
    exit_code: int | None = None  # 128 + n after signal n
    oom_kills: int = 0  # kernel out-of-memory kills in the worker's group or on the host meanwhile
    killed_by_host: bool = False  # it had said its last word and did not end, so it was killed
    own_oom_kill: bool = False  # one of them was in the worker's own group or container
    stopped_by: str | None = None  # deadline, watchdog, interrupt: what of ours ended it
    not_reached: str | None = None  # a treatment or gate that did not hold
    not_quiet: str | None = None  # what happened on the host meanwhile, beyond the guard's bounds
    contradictions: tuple[str, ...] = ()
    start_error: str | None = None
    lost: str | None = None  # what runs the worker did not answer, or no longer
    implausible: tuple[str, str] | None = None  # (reason, sentence): what was measured is beyond a bound


def capacity_problem(measurements: Any) -> str | None:
    """Why `measurements` holds no KV capacity with its source; None when it does. No capacity is never `ok`."""
    kv = measurements.get("kv_cache") if isinstance(measurements, dict) else None
    if not isinstance(kv, dict):
        return "the result has no kv_cache"
    try:
        KvCache.model_validate(kv)
    except ValidationError as error:
        path, message = problems(error)[0]
        return f"{'.'.join(map(str, ('kv_cache', *path)))}: {message}"
    return None


def _of_exit(facts: Facts) -> Outcome:
    code = facts.exit_code
    if code is None:
        return Outcome("disturbed", "no_exit_status", "the worker's exit status could not be read")
    if code > 128:
        number = code - 128
        name = signal.Signals(number).name if number in signal.Signals._value2member_map_ else str(number)
        if number == signal.SIGKILL and facts.killed_by_host:
            return Outcome("crashed", "did_not_end", "it said its last word, left no result and did not end")
        if number == signal.SIGKILL:
            return Outcome(
                "disturbed",
                "killed_from_outside",
                "SIGKILL with no out-of-memory event and no deadline of ours",
            )
        if number == signal.SIGHUP:
            return Outcome("disturbed", "host_side_gone", "the worker lost its host side")
        return Outcome("crashed", name, f"the worker died by {name}")
    if code == 0:
        return Outcome("crashed", "no_result", facts.result_error or "the worker ended without result.json")
    return Outcome("crashed", f"exit_{code}", f"the worker ended with status {code}")


def _kernel_oom(facts: Facts) -> Outcome | None:
    """The kernel killed for memory, and the attempt failed: the worker was killed, or an engine's process that it missed or waited for.

    Not where the host side went away, and not where what was measured is beyond a bound: that answers nothing.
    """
    failure = (facts.result or {}).get("failure") or {}
    failed = facts.exit_code not in {None, 0, _LOST_HOST} or failure.get("kind") == "engine_error"
    if not facts.oom_kills or facts.implausible is not None or not (failed or facts.stopped_by == "deadline"):
        return None
    counted = f"({facts.oom_kills} oom_kill)"
    if facts.stopped_by == "deadline":
        said = f"the kernel killed a process for memory {counted}, and the deadline passed"
    elif facts.exit_code == _KILLED and not facts.killed_by_host:
        said = f"the kernel killed it for memory {counted}"
    else:
        how = failure.get("message") or f"the worker ended with status {facts.exit_code}"
        said = f"the kernel killed a process for memory {counted}: {_shown(how)}"
    return Outcome("out_of_memory", "kernel_oom_kill", said)


_MOST_CHARACTERS = 4000  # of a guest's message; result.json has the whole


def _shown(message: str) -> str:
    """A guest's words, safe for a terminal: what could steer one is written out in hexadecimal."""
    shown = message[:_MOST_CHARACTERS] + ("…" if len(message) > _MOST_CHARACTERS else "")
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in shown)


def derive(facts: Facts) -> Outcome:
    """One outcome; what disturbed an attempt outweighs what it measured, and where it ran outweighs both."""
    if facts.killed_by_host and facts.exit_code == _KILLED and facts.result is not None:
        facts = replace(facts, exit_code=0)  # it had said everything: only what was left of it was killed
    if facts.stopped_by == "watchdog":
        return Outcome(
            "host_wedged",
            "watchdog",
            "MemAvailable fell below the watchdog's threshold; the worker was killed",
        )
    if facts.stopped_by == "interrupt":
        return Outcome("disturbed", "interrupted", "the run was interrupted")
    if facts.lost is not None:
        return Outcome("disturbed", "environment_gone", facts.lost)
    if facts.start_error is not None:
        return Outcome("crashed", "start_refused", facts.start_error)
    if facts.contradictions:
        return Outcome("wrong_environment", "evidence", "; ".join(facts.contradictions))
    if facts.not_reached is not None:
        return Outcome("disturbed", "not_reached", facts.not_reached)
    out_of_memory = _kernel_oom(facts)
    if out_of_memory is not None and facts.own_oom_kill:
        return out_of_memory  # short of memory a host swaps: that is no disturbance from elsewhere
    if facts.not_quiet is not None:
        return Outcome("disturbed", "not_quiet", facts.not_quiet)
    if out_of_memory is not None:
        return out_of_memory
    if facts.stopped_by == "deadline":
        return Outcome("timeout", "trial_timeout", "the trial's deadline passed")
    if facts.result is None or facts.exit_code != 0:
        return _of_exit(facts)
    failure = facts.result["failure"]
    if facts.implausible is not None and (failure is None or failure["kind"] != "engine_error"):
        return Outcome("engine_error", *facts.implausible)  # an answer, perhaps, but not about this model
    if failure is not None:
        return Outcome(failure["kind"], failure["reason"], _shown(failure["message"]))
    problem = capacity_problem(facts.result["measurements"])
    if problem:
        return Outcome("engine_error", "no_capacity", facts.result_error or problem)
    return Outcome("ok", "measured")
