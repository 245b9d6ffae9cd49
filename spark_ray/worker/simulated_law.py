"""A machine that is not there: how much KV cache an engine would get on it, as pure functions. No number is measured.

    found      in use before the engine: other processes, page cache, what the arm's environment takes, disturbances
    own        the engine's weights, and CUDA graphs for each sequence up to a batch
    transient  what its profiling pass needs for a moment: activations for each token, work space beyond a cliff
    free       total - found - own; with memavailable, page cache counts as free
    peak       total - free + transient

    memfree       (total - peak) x fraction     TensorRT-LLM as it meets GB10
    memavailable  total x fraction - peak       vLLM, SGLang

Whatever disturbs or distinguishes an arm is memory that something holds, so that both laws hold to the byte and a
difference can be divided along them. TensorRT-LLM's temporary cache and second reading are left out: they cancel here.

A guest remembers nothing, and neither does this: what a trial finds is a function of the seed and of its `Moment`, so
a trial that is executed again, or after others, or elsewhere, finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import Any, NamedTuple

LAWS = {"memfree": "(total - peak) x fraction", "memavailable": "total x fraction - peak"}
MARK = "simulated: "
"""Begins the law and the view of every record."""
SMALLEST_BATCH, SMALLEST_TOKENS = 1, 256  # doublings are counted from here

Settings = Mapping[str, Any]
"""The engine's settings as `engines.SimulatedEngine` dumps them: sizes in bytes."""


class OutOfMemory(Exception):
    """What is in use, with the engine's own memory, is more than the machine has."""


class Moment(NamedTuple):
    """Where in a run a trial stands."""

    block: int = 0
    position: int = 0  # inside the block
    arms: int = 1

    @property
    def trial(self) -> int:
        """Trials before it, the clock of everything that changes with time."""
        return self.block * self.arms + self.position


class Disturbance(NamedTuple):
    """What a trial finds that its configuration has no part in."""

    taken_bytes: float = 0.0  # below 0: it finds more than usual
    taken_share: float = 0.0  # of what the engine would get
    page_cache_bytes: float = 0.0


NOTHING = Disturbance()


class Sized(NamedTuple):
    """A machine at the sizing moment, and what the law gives; sizes in bytes."""

    view: str
    fraction: float
    total_bytes: int
    free_bytes: int  # as the view has it
    mem_free_bytes: int
    page_cache_bytes: int
    own_bytes: int
    graphs_bytes: int
    effect_bytes: int
    transient_bytes: int
    available_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.total_bytes - self.free_bytes + self.transient_bytes


# ---- what an arm's environment takes ----------------------------------------------------------------------


def effect_bytes(effect: Settings, configuration: Settings) -> float:
    """What the environment takes at a configuration, shares left out; nothing for an effect of {}."""
    batch, tokens = configuration["max_batch_size"], configuration["max_num_tokens"]
    doublings = math.log2(batch / SMALLEST_BATCH), math.log2(max(1.0, tokens / SMALLEST_TOKENS))
    terms = (
        effect.get("held", 0),
        effect.get("per_token", 0) * tokens,
        effect.get("per_batch_doubling", 0) * doublings[0],
        effect.get("interaction", 0) * doublings[0] * doublings[1],
        *(_bump_bytes(bump, configuration) for bump in effect.get("bumps", ())),
    )
    return float(sum(terms))


def _bump_bytes(bump: Settings, configuration: Settings) -> float:
    """A smooth hill: all of it at its centre, e^-1/2 of it one standard deviation away on any axis it names."""
    distance = 0.0
    for axis, centre in bump["around"].items():
        here = configuration[axis]
        if axis == "memory_fraction":
            distance += ((here - centre) / bump["width_fraction"]) ** 2
        else:
            distance += (math.log2(here / centre) / bump["width_doublings"]) ** 2
    return float(bump["takes"] * math.exp(-distance / 2))


def _beyond_cliffs(cliffs: Any, configuration: Settings) -> int:
    return sum(cliff["takes"] for cliff in cliffs if configuration[cliff["axis"]] > cliff["above"])


# ---- what a trial finds -----------------------------------------------------------------------------------


def own_disturbance(noise: Settings, generator: Random) -> Disturbance:
    """What one trial has for itself. Everything is drawn, wanted or not, so that one setting does not move another."""
    usual, scale, chance, size = (
        generator.gauss(0, 1), generator.gauss(0, 1), generator.random(), generator.uniform(1, 2)
    )  # fmt: skip
    burst = noise["burst"] * size if chance < noise["burst_share"] else 0.0
    return Disturbance(noise["sd"] * usual + burst, noise["relative_sd"] * scale)


def timed_bytes(noise: Settings, seed: int, moment: Moment) -> float:
    """What the arms of a block share, and what changes in the course of a run."""
    trial = moment.trial
    shared = noise["shared_sd"] * Random(f"{seed}/block/{moment.block}").gauss(0, 1)  # noqa: S311  no secret
    start = noise["start_up"] * 0.5 ** (trial / noise["start_up_trials"])
    left = noise["carry_over"] if moment.position else 0
    wander = noise["wander_sd"] and noise["wander_sd"] * _autoregression(
        noise["wander_correlation"], seed, trial
    )
    return float(shared + start + left + wander + noise["drift"] * trial)


def _autoregression(correlation: float, seed: int, trial: int) -> float:
    """AR(1) with unit variance at a trial: walked from the first one, which costs less than a microsecond a step."""
    generator = Random(f"{seed}/wander")  # noqa: S311
    state = generator.gauss(0, 1)
    innovation = math.sqrt(1 - correlation**2)
    for _ in range(trial):
        state = correlation * state + innovation * generator.gauss(0, 1)
    return state


def page_cache_bytes(cache: Settings, moment: Moment) -> float:
    """Pages that files have left in memory, a little more with each trial."""
    grown = cache["start"] + cache["growth"] * moment.trial
    return float(min(grown, max(cache["start"], cache["most"])))


def found(settings: Settings, arm: str, seed: int, moment: Moment) -> Disturbance:
    """Everything that one trial of a run finds."""
    own = own_disturbance(settings["noise"], Random(f"{seed}/trial/{moment.block}/{arm}"))  # noqa: S311
    taken = own.taken_bytes + timed_bytes(settings["noise"], seed, moment)
    return Disturbance(taken, own.taken_share, page_cache_bytes(settings["page_cache"], moment))


# ---- the law ----------------------------------------------------------------------------------------------


def size(law: Settings, effect: Settings, configuration: Settings, disturbed: Disturbance = NOTHING) -> Sized:
    """The machine at the sizing moment; OutOfMemory where the engine's own memory does not fit."""
    total, view, fraction = law["memory_total"], law["memory_view"], configuration["memory_fraction"]
    graphs = law["graphs_per_sequence"] * min(configuration["max_batch_size"], law["graphs_up_to"])
    own = law["weights"] + graphs
    transient = law["transient_per_token"] * configuration["max_num_tokens"]
    transient += _beyond_cliffs(law["cliffs"], configuration)
    cache = max(0.0, disturbed.page_cache_bytes + effect.get("page_cache", 0))
    taken = effect_bytes(effect, configuration)

    def at(held: float) -> Sized:
        in_use = max(0, round(law["other_processes"] + held)) + own
        if in_use > total:
            raise OutOfMemory(f"the simulated machine has {total} bytes, and {in_use} would be in use")
        pages = min(round(cache), total - in_use)
        free = total - in_use - pages
        seen = free + (pages if view == "memavailable" else 0)
        available = _available(view, total, seen, transient, fraction)
        return Sized(
            view, fraction, total, seen, free, pages, own, graphs, round(taken), transient, available
        )

    held = taken + disturbed.taken_bytes
    share = effect.get("share", 0.0) + disturbed.taken_share
    if not share:
        return at(held)
    gain = fraction if view == "memfree" else 1.0  # KV bytes that a byte of memory is worth
    return at(held + share * at(held).available_bytes / gain)


def _available(view: str, total: int, free: int, transient: int, fraction: float) -> int:
    if view == "memavailable":
        return max(0, int(total * fraction) - (total - free + transient))
    return max(0, int((free - transient) * fraction))


def blocks_of(law: Settings, available_bytes: float) -> int:
    """Whole blocks of the pool, under the user's cap."""
    tokens = int(available_bytes) // law["bytes_per_token"]
    if law["max_tokens"] is not None:
        tokens = min(tokens, law["max_tokens"])
    return int(max(0, tokens) // law["tokens_per_block"])


def fits_one_sequence(law: Settings, blocks: int) -> bool:
    return bool(blocks * law["tokens_per_block"] >= law["max_seq_len"])


def capacity_bytes(law: Settings, arm: Settings, configuration: Settings, noise: Random) -> int | None:
    """KV bytes of an arm, with a trial's own noise; None: no capacity. `arm` is its effect, {} for none.

    For maps and benchmarks, which bring their own time: `found` has what a whole run adds.
    """
    try:
        sized = size(law, arm, configuration, own_disturbance(law["noise"], noise))
    except OutOfMemory:
        return None
    blocks = blocks_of(law, sized.available_bytes)
    if not fits_one_sequence(law, blocks):
        return None
    return int(blocks * law["tokens_per_block"] * law["bytes_per_token"])
