"""The noise between arms that are the same, and what a budget of blocks can show against it.

A pilot (A/A: an arm beside a copy of itself) measures how far a block's contrast is from 0 where nothing differs. Its
noise floor is the largest mean contrast that it does not exclude, with 95 % confidence: what is smaller is nobody's
divergence, so it is the least margin of a search.

Effects are contrasts of 1 - KV(against) / KV(baseline); tests are two-sided t tests at 5 %, "shows" means with 80 % power.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import ValidationError

from .divergence import contrast
from .errors import InputError, RunError
from .experiment import Experiment
from .explain import explain
from .search_spec import Search
from .store import Store

SIGNIFICANCE, POWER = 0.05, 0.8
MAP_PARAMETERS = 4
"""What the sizing laws leave to be learned of the difference between two arms: a constant, and slopes along batch, tokens and
fraction. A contrast is known everywhere once these are."""
FEWEST_BLOCKS = 4
_MOST_BLOCKS = 1_000_000
_MEND = "make one of this experiment with spark-ray pilot EXPERIMENT.yaml"


@dataclass(frozen=True)
class Noise:
    """What a pilot measured."""

    pilot: str
    """Its folder."""
    blocks: int
    sd: float
    """Standard deviation of the contrast from block to block."""
    floor: float

    @property
    def sd_between(self) -> tuple[float, float]:
        """The 95 % interval of the standard deviation: few blocks know it badly."""
        from scipy.special import chdtri  # loads slowly, and most commands never ask

        freedom = self.blocks - 1
        low, high = (chdtri(freedom, tail) for tail in (SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2))
        return self.sd * math.sqrt(freedom / low), self.sd * math.sqrt(freedom / high)


def noise_of(contrasts: Sequence[float], pilot: str) -> Noise:
    """Of contrasts between arms that are the same, one of each block; at least two."""
    from scipy.special import stdtrit

    mean, sd = fmean(contrasts), stdev(contrasts)
    reach = float(stdtrit(len(contrasts) - 1, 1 - SIGNIFICANCE / 2)) * sd / math.sqrt(len(contrasts))
    return Noise(pilot, len(contrasts), sd, abs(mean) + reach)


def of_pilot(folder: Path, experiment: Experiment) -> Noise:
    """The noise that an A/A run measured.

    Raises:
        InputError: it is no A/A run, of another engine, or has too few blocks.
    """
    try:
        store = Store.read(folder)
    except RunError as error:
        raise InputError(f"search.target.pilot: {error.message}", mend=_MEND) from error
    measured = _planned(store.plan)
    kinds = [
        (each.engine.kind, getattr(each.engine, "double", None) is not None)
        for each in (measured, experiment)
    ]
    if kinds[0] != kinds[1]:
        told, asked = (f"{kind}{' (a double)' if double else ''}" for kind, double in kinds)
        raise InputError(
            f"search.target.pilot: {folder} is of engine {told}, this experiment of {asked}", mend=_MEND
        )
    pair = twins(measured)
    if pair is None:
        raise InputError(
            f"search.target.pilot: {folder} has no arm that is the same as its baseline", mend=_MEND
        )
    found = []
    for state in map(store.state, store.blocks()):
        baseline, again = store.capacities(state, pair).values() if state.complete else (None, None)
        if baseline and again:
            found.append(contrast(baseline, again))
    if len(found) < FEWEST_BLOCKS:
        raise InputError(
            f"search.target.pilot: {folder} measured {len(found)} blocks, at least {FEWEST_BLOCKS} say what the noise is",
            mend=f"finish it with spark-ray resume {folder}, or make one with more blocks",
        )
    noise = noise_of(found, str(folder))
    if noise.floor >= 1:
        raise InputError(
            f"search.target.pilot: {folder} has a noise floor of {noise.floor:.0%}: no contrast can be above it",
            mend="find out what disturbed its blocks (its report), then make another one",
        )
    return noise


def twins(experiment: Experiment) -> tuple[str, str] | None:
    """The baseline and an arm that differs from it in nothing; a landscape can tell arms apart by name."""
    baseline = experiment.compared.baseline

    def made(arm: str) -> tuple[object, ...]:
        chosen = experiment.arms[arm]
        return (
            chosen.environment,
            experiment.treatment_of(arm),
            experiment.engine_of(arm),
            chosen.orchestrator,
            arm if getattr(experiment.engine_of(arm), "landscape", None) else None,  # which is told its name
        )

    same = [arm for arm in experiment.arms if arm != baseline and made(arm) == made(baseline)]
    return (baseline, same[0]) if same else None


# ---- the margin in force ----------------------------------------------------------------------------------


def in_force(experiment: Experiment, noise: Noise | None) -> Experiment:
    """The experiment with its margin raised to the noise floor."""
    search = experiment.search
    if noise is None or noise.floor <= search.target.margin:
        return experiment
    target = search.target.model_copy(update={"margin": noise.floor})
    return experiment.model_copy(update={"search": search.model_copy(update={"target": target})})


def of_plan(plan: Mapping[str, Any]) -> Noise | None:
    """The noise that a run was planned with, as its plan.json keeps it."""
    return Noise(**plan["noise"]) if plan.get("noise") else None


def experiment_of(plan: Mapping[str, Any]) -> Experiment:
    """The experiment of a run, by its plan.json: its margin is the one in force."""
    return in_force(_planned(plan), of_plan(plan))


def _planned(plan: Mapping[str, Any]) -> Experiment:
    try:
        return Experiment.model_validate(plan["experiment"])
    except ValidationError as error:
        began = plan.get("spark_ray_version", "another version")
        place, why = explain(error.errors(include_url=False)[0], plan["experiment"])
        raise RunError(
            f"the experiment of the run, begun with spark_ray {began}, is none of this version: {'.'.join(map(str, place))}: {why}",
            mend=f"use spark_ray {began}",
        ) from error


# ---- power ------------------------------------------------------------------------------------------------


def detectable(sd: float, blocks: int, parameters: int = 1) -> float | None:
    """The smallest effect that so many blocks show.

    Args:
        sd: Standard deviation of the effect in one block.
        blocks: The budget.
        parameters: What is learned from them: 1 where all are at one configuration, MAP_PARAMETERS for a map.

    Returns:
        None where blocks do not suffice to learn anything but the parameters.
    """
    from scipy.special import nctdtrinc, stdtrit

    freedom = blocks - parameters
    if freedom < 1:
        return None
    critical = stdtrit(freedom, 1 - SIGNIFICANCE / 2)
    return float(nctdtrinc(freedom, 1 - POWER, critical)) * sd * math.sqrt(parameters / blocks)


def blocks_needed(sd: float, effect: float, parameters: int = 1) -> int | None:
    """The fewest blocks that show an effect; None: more than a million."""
    low, high = parameters, parameters + 1

    def shows(blocks: int) -> bool:
        least = detectable(sd, blocks, parameters)
        return least is not None and least <= effect

    while not shows(high):
        low, high = high, 2 * high
        if high > _MOST_BLOCKS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


# ---- in words ---------------------------------------------------------------------------------------------


def said(noise: Noise | None, search: Search, *, mark: str = "") -> list[str]:
    """Lines of a plan: what is known of the noise, and what the budget can show against it."""
    target, blocks = search.target, search.blocks
    if noise is None:
        wished = f", nor how many blocks show {target.wished:.1%}" if target.wished else ""
        return [f"noise       not known{wished}; spark-ray pilot EXPERIMENT.yaml measures it"]
    low, high = noise.sd_between
    one, everywhere = (_effect(noise, blocks, parameters) for parameters in (1, MAP_PARAMETERS))
    lines = [
        f"noise       {mark and mark + ' '}standard deviation {noise.sd:.2%} a block ({low:.2%} to {high:.2%}), by {noise.blocks} blocks of {noise.pilot}",
        f"margin      {max(target.margin, noise.floor):.2%}; the noise floor is {noise.floor:.2%}",
        f"detectable  {one} with all {blocks} blocks at one configuration, {everywhere} by a map of them (80 % power, 5 %)",
    ]
    if target.wished:
        one, everywhere = (_needed(noise, target.wished, parameters) for parameters in (1, MAP_PARAMETERS))
        lines.append(
            f"wished      {target.wished:.2%} takes {one} at one configuration, {everywhere} for a map"
        )
    return lines


def _effect(noise: Noise, blocks: int, parameters: int) -> str:
    least = detectable(noise.sd, blocks, parameters)
    return f"nothing (fewer than {parameters + 1} blocks)" if least is None else f"{least:.2%}"


def _needed(noise: Noise, effect: float, parameters: int) -> str:
    blocks = blocks_needed(noise.sd, effect, parameters)
    return f"over {_MOST_BLOCKS} blocks" if blocks is None else f"{blocks} blocks"
