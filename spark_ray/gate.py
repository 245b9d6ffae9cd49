"""What an attempt waits for beside memory: cool GPUs, clocks that nothing caps, and nobody else computing on them.

What a host cannot say is absent with the reason. It is then not "reached": nobody looked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import nvml
from .conditions import Gate
from .host import Kin

CONDITIONS = ("temperature", "sm_clock", "foreign_gpu_processes")
_LOOK_EVERY_S = 0.25


@dataclass(frozen=True)
class Look:
    """One condition at one moment. `hopeless`: no wait can mend it."""

    reached: bool
    found: dict[str, Any]
    unmet: str = ""
    hopeless: bool = False


def _temperature(wanted: int, readings: list[dict[str, Any]]) -> Look | str:
    found = {
        each["device"]: each["temperature_celsius"] for each in readings if "temperature_celsius" in each
    }
    if not found:
        return _refusal("temperature_celsius", readings)
    hot = [f"GPU {device} is at {value} °C" for device, value in found.items() if value > wanted]
    what = f"{', '.join(hot)}; at most {wanted} is wanted"
    return Look(not hot, {"wanted_celsius": wanted, "found_celsius": list(found.values())}, what)


def _clock(wanted: int, readings: list[dict[str, Any]]) -> Look | str:
    """A clock that is low because nothing runs is no cap: only a reason for slowing, or the device's own highest, is."""
    known = [each for each in readings if {"sm_clock_mhz", "throttle_reasons"} <= set(each)]
    if not known:
        return _refusal("throttle_reasons", readings)
    capping: dict[int, list[str]] = {
        each["device"]: sorted(nvml.SLOWED & set(each["throttle_reasons"]))
        for each in known
        if each["sm_clock_mhz"] < wanted
    }
    low = [each["device"] for each in known if each.get("max_sm_clock_mhz", wanted) < wanted]
    unmet = [f"GPU {device} is held back by {', '.join(why)}" for device, why in capping.items() if why]
    unmet += [f"GPU {device} can never reach it" for device in low]
    found = {
        "wanted_mhz": wanted, "found_mhz": [each["sm_clock_mhz"] for each in known],
        "capped_by": sorted({name for why in capping.values() for name in why}),
    }  # fmt: skip
    return Look(not unmet, found, f"{', '.join(unmet)}; {wanted} MHz are wanted", bool(low))


def _foreign(wanted: str, readings: list[dict[str, Any]], kin: Kin) -> Look | str:
    known = [each for each in readings if "processes" in each]
    if not known:
        return _refusal("processes", readings)
    strangers = kin.foreign(
        {"device": each["device"], **process} for each in known for process in each["processes"]
    )
    what = ", ".join(f"{each['name']} (process {each['pid']}) on GPU {each['device']}" for each in strangers)
    return Look(
        wanted == "accept" or not strangers,
        {"wanted": wanted, "found": strangers},
        f"{what} computes as well",
    )


def _refusal(name: str, readings: list[dict[str, Any]]) -> str:
    words = {each.get("absent", {}).get(name, "not said") for each in readings}
    return "; ".join(sorted(words))


def look(gate: Gate, gpus: nvml.Reader, kin: Kin) -> dict[str, Look | str]:
    """Every condition now; a text says why nobody can look."""
    if gpus.why_not is not None:
        return dict.fromkeys(CONDITIONS, gpus.why_not)
    readings = gpus.read(nvml.GATE_QUESTIONS)
    if not readings:
        return dict.fromkeys(CONDITIONS, "this host has no GPU")
    not_asked = "not asked for"
    return {
        "temperature": _temperature(gate.temperature_celsius, readings) if gate.temperature_celsius else not_asked,
        "sm_clock": _clock(gate.sm_clock_mhz, readings) if gate.sm_clock_mhz else not_asked,
        "foreign_gpu_processes": _foreign(gate.foreign_gpu_processes, readings, kin),
    }  # fmt: skip


def wait(gate: Gate, gpus: nvml.Reader, kin: Kin, stopped: Callable[[], bool]) -> dict[str, Any]:
    """Wait until every condition holds at one moment, at most `gate.longest`; what was found and how long each took."""
    started = time.monotonic()
    since: dict[str, float] = {}  # when each began to hold, and held until the end
    while True:
        waited = time.monotonic() - started
        seen = look(gate, gpus, kin)
        looks = {name: each for name, each in seen.items() if isinstance(each, Look)}
        for name, each in looks.items():
            if each.reached:
                since.setdefault(name, waited)
            else:
                since.pop(name, None)
        unmet = {name: each for name, each in looks.items() if not each.reached}
        if not unmet or waited >= gate.longest or stopped() or any(each.hopeless for each in unmet.values()):
            break
        time.sleep(_LOOK_EVERY_S)
    found: dict[str, Any] = {
        "reached": not unmet if looks else None,
        "waited_s": waited,
        **{
            name: {"reached": each.reached, "waited_s": since.get(name, waited), **each.found}
            for name, each in looks.items()
        },
    }
    if absent := {name: why for name, why in seen.items() if isinstance(why, str)}:
        found["absent"] = absent
    if unmet:
        found["unmet"] = "; ".join(each.unmet for each in unmet.values())
    return found


def not_reached(found: dict[str, Any]) -> str | None:
    """Which condition did not come about; None when all did, or there was nothing to look at."""
    return f"gate: {found['unmet']}; waited {found['waited_s']:.0f} s" if "unmet" in found else None
