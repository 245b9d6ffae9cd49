"""Rungs: each arm against the arm it builds on, so that one mechanism is between the two, and how the steps add up.

Over the blocks in which every rung of a path has a capacity, the mean differences between neighbours add up to the
difference between the ends: each block's do. Arms that were left out are stepped over, and said.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from . import contrasts, statistics, verdict
from .attribution import TERMS
from .reading import at, text


@dataclass(frozen=True)
class Rung:
    """An arm and its neighbour: the nearest arm below it that was executed."""

    arm: str
    neighbour: str
    stepped_over: tuple[str, ...]  # arms between them that were left out of this run
    step: verdict.Comparison
    margin_p: float | None  # of the test that the two are equivalent within the margin
    differing: int  # blocks in which the two have not exactly the same capacity

    @property
    def largest(self) -> tuple[str, float] | None:
        """The term that moves most, in words and bytes of KV; None where nothing moves."""
        means = {name: each.mean or 0.0 for name, each in self.step.attribution.terms.items()}
        if not any(means.values()):
            return None
        name = max(means, key=lambda each: abs(means[each]))
        return TERMS[name], means[name]

    @property
    def equivalent(self) -> bool:
        return self.margin_p is not None and self.margin_p < 1 - statistics.CONFIDENCE


@dataclass(frozen=True)
class Path:
    """From a root to a rung that nothing builds on, over the blocks in which every rung of it has a capacity."""

    arms: tuple[str, ...]
    blocks: int  # complete in every rung
    steps_bytes: tuple[float, ...]  # mean difference of each neighbour pair
    ends: statistics.Paired  # last less first, in bytes

    @property
    def sum_bytes(self) -> float:
        return sum(self.steps_bytes)

    @property
    def gap_bytes(self) -> float | None:
        """Sum of the steps less the end contrast: 0 but for rounding."""
        return None if self.ends.mean is None else self.sum_bytes - self.ends.mean


@dataclass(frozen=True)
class Ladder:
    rungs: tuple[Rung, ...]
    paths: tuple[Path, ...]
    pairs: pd.DataFrame  # one row per rung and block: ladder.parquet

    def path_to(self, arm: str) -> Path | None:
        return next((path for path in self.paths if arm in path.arms), None)


def neighbours(plan: Mapping[str, Any], executed: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By arm: its neighbour, and the arms left out between them. In the order of the arms."""
    declared = at(plan, "experiment", "arms")
    below = (
        {arm: text(at(each, "builds_on")) for arm, each in declared.items()}
        if isinstance(declared, Mapping)
        else {}
    )
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for arm in executed:
        stepped_over: list[str] = []
        under = below.get(arm)
        while under is not None and under not in executed and under not in stepped_over:
            stepped_over.append(under)
            under = below.get(under)
        if under is not None and under in executed and under != arm:
            found[arm] = under, tuple(stepped_over)
    return found


def _rung(arm: str, neighbour: str, stepped_over: tuple[str, ...], pairs: pd.DataFrame) -> Rung:
    step = verdict.comparison(pairs, arm, neighbour)
    changes = pairs["delta_kv_cache_bytes"].dropna()
    return Rung(arm, neighbour, stepped_over, step, step.equivalence_p, int((changes != 0).sum()))


def _capacities(trials: pd.DataFrame) -> pd.DataFrame:
    """KV bytes by block and arm, of the attempts that count and have a capacity."""
    sized = trials[
        (trials["standing"] == "counts") & (trials["outcome"] == "ok") & trials["kv_cache_bytes"].notna()
    ]
    return sized.pivot_table(index="block_id", columns="arm", values="kv_cache_bytes", aggfunc="first")


def path_over(arms: tuple[str, ...], capacities: pd.DataFrame) -> Path:
    """The steps of a path. `capacities`: KV bytes, one row per block, one column per arm."""
    complete = capacities.reindex(columns=list(arms)).dropna().astype(float)
    columns = [complete[arm] for arm in arms]
    steps = [
        float((after - before).mean()) if len(complete) else 0.0
        for before, after in itertools.pairwise(columns)
    ]
    ends = statistics.paired([float(value) for value in columns[-1] - columns[0]])
    return Path(arms, len(complete), tuple(steps), ends)


def _upwards(arm: str, below: Mapping[str, str]) -> tuple[str, ...]:
    path = [arm]
    while path[-1] in below and below[path[-1]] not in path:
        path.append(below[path[-1]])
    return tuple(reversed(path))


def climb(plan: Mapping[str, Any], trials: pd.DataFrame, executed: Sequence[str]) -> Ladder | None:
    """The ladder of a run; None where no arm builds on another."""
    found = neighbours(plan, executed)
    if not found:
        return None
    steps = [contrasts.pairs(trials, (neighbour, arm), neighbour) for arm, (neighbour, _) in found.items()]
    rungs = tuple(
        _rung(arm, neighbour, stepped_over, pairs)
        for (arm, (neighbour, stepped_over)), pairs in zip(found.items(), steps, strict=True)
    )
    below = {rung.arm: rung.neighbour for rung in rungs}
    tops = [arm for arm in below if arm not in below.values()]
    capacities = _capacities(trials)
    paths = tuple(path_over(_upwards(arm, below), capacities) for arm in tops)
    filled = [each for each in steps if len(each)]
    return Ladder(rungs, paths, pd.concat(filled, ignore_index=True) if filled else steps[0])


def summary(ladder: Ladder | None) -> dict[str, Any] | None:
    """For summary.json."""
    if ladder is None:
        return None
    return {
        "margin": verdict.MARGIN,
        "rungs": [
            {
                "arm": rung.arm,
                "neighbour": rung.neighbour,
                "stepped_over": list(rung.stepped_over),
                "delta_kv_cache_bytes": rung.step.attribution.total.as_dict(),
                "contrast": rung.step.contrast.as_dict(),
                "equivalence_p": rung.margin_p,
                "equivalent": rung.equivalent,
                "differing_blocks": rung.differing,
                "largest_term": None if rung.largest is None else dict(zip(("term", "bytes"), rung.largest, strict=True)),
            }
            for rung in ladder.rungs
        ],
        "paths": [
            {
                "arms": list(path.arms),
                "blocks": path.blocks,
                "steps_bytes": list(path.steps_bytes) if path.blocks else None,
                "sum_of_steps_bytes": path.sum_bytes if path.blocks else None,
                "end_contrast_bytes": path.ends.as_dict(),
                "gap_bytes": path.gap_bytes,
            }
            for path in ladder.paths
        ],
    }  # fmt: skip
