"""How good a map is: what `search.py` counts, for every method alike, against a landscape's truth.

The headline T1: at most 1 % of the volume misclassified outside margin ± 1 percentage point, and a median error of KV
capacity of at most 1 %. A place is of one of three classes: no capacity in either arm, the arms diverge (one of them alone
has capacity, or the contrast is above the margin), they do not. What nobody can tell or act upon is left out: both arms have
capacity and the contrast is within a point of the margin, or an arm is within 1 % of its smallest capacity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from landscapes import GIB, SLOWNESS, Array, Landscape, Noise, Points, cells
from numpy.typing import NDArray
from scipy.stats import norm

Mask = NDArray[np.bool_]

POINT = 0.01
MOST_MISCLASSIFIED = 0.01
MOST_CAPACITY_ERROR = 0.01
BAND = 0.95
Z = float(norm.ppf((1 + BAND) / 2))
SURE = 0.975
SEEDS_THAT_HOLD = 0.8
NONE, SAME, DIVERGES = 0, 1, 2


class Prediction(Protocol):
    """What a map says of each configuration: mean and standard deviation, bytes; chances of having any capacity."""

    @property
    def kv_a_mean(self) -> Array: ...
    @property
    def kv_a_sd(self) -> Array: ...
    @property
    def contrast_mean(self) -> Array: ...
    @property
    def contrast_sd(self) -> Array: ...
    @property
    def feasible_a(self) -> Array: ...
    @property
    def feasible_b(self) -> Array: ...
    @property
    def feasible_both(self) -> Array: ...


@dataclass(frozen=True)
class Truth:
    """A landscape at its held-out cells."""

    points: Points
    kv_bytes: Array  # of the baseline; NaN where it has none
    contrast: Array  # NaN where an arm has none
    classes: NDArray[np.int_]
    judged: Mask
    margin: float


def truth(landscape: Landscape) -> Truth:
    points = cells(landscape.searched)
    uncapped = landscape.uncapped_gib(points)
    possible = landscape.possible(points, uncapped)
    kv = np.minimum(uncapped, landscape.cap_gib)
    both = possible.all(axis=1)
    contrast = np.where(both, 1 - kv[:, 1] / kv[:, 0], np.nan)
    near_margin = both & (np.abs(contrast - landscape.margin) <= POINT)
    near_edge = (np.abs(uncapped / landscape.smallest_gib - 1) <= POINT).any(axis=1)
    return Truth(
        points,
        np.where(possible[:, 0], kv[:, 0] * GIB, np.nan),
        contrast,
        _classes(possible[:, 0], possible[:, 1], contrast, landscape.margin),
        ~(near_margin | near_edge),
        landscape.margin,
    )


def _classes(baseline: Mask, against: Mask, contrast: Array, margin: float) -> NDArray[np.int_]:
    with np.errstate(invalid="ignore"):
        diverges = (baseline != against) | (baseline & against & (contrast > margin))
    return np.where(diverges, DIVERGES, np.where(baseline | against, SAME, NONE))


def chance_of_divergence(said: Prediction, margin: float) -> Array:
    above = norm.sf(margin, said.contrast_mean, np.maximum(said.contrast_sd, 1e-12))
    one_alone = said.feasible_a + said.feasible_b - 2 * said.feasible_both
    found: Array = one_alone + said.feasible_both * above
    return found


def score(known: Truth, said: Prediction, diverges: Mask | None = None) -> dict[str, float | None]:
    """All figures of one map. A boundary planner says by itself what `diverges`."""
    baseline, against = said.feasible_a > 0.5, said.feasible_b > 0.5
    called = _classes(baseline, against, said.contrast_mean, known.margin)
    if diverges is not None:
        called = np.where(called == NONE, NONE, np.where(diverges, DIVERGES, SAME))
    wrong = called != known.classes
    true_region, called_region = known.classes == DIVERGES, called == DIVERGES
    either = (true_region | called_region).sum()
    chance = chance_of_divergence(said, known.margin)
    sure_wrong = ((chance > SURE) & ~true_region) | ((chance < 1 - SURE) & true_region)
    error = np.abs(said.kv_a_mean / known.kv_bytes - 1)
    contrast = _band(known.contrast, said.contrast_mean, said.contrast_sd)
    capacity = _band(np.ones_like(error), said.kv_a_mean / known.kv_bytes, said.kv_a_sd / known.kv_bytes)
    return {
        "misclassified": float((wrong & known.judged).mean()),
        "misclassified_all": float(wrong.mean()),
        "divergence_misclassified_all": float((called_region != true_region).mean()),
        "capacity_error": float(np.nanmedian(error)),
        "iou": float((true_region & called_region).sum() / either) if either else None,
        "false_divergence": float((called_region & ~true_region).mean()),
        "confident_false_divergence": float(((chance > SURE) & ~true_region).mean()),
        "confidently_wrong": float(sure_wrong.mean()),
        **{f"contrast_{name}": value for name, value in contrast.items()},
        **{f"capacity_{name}": value for name, value in capacity.items()},
    }


def _band(known: Array, mean: Array, sd: Array) -> dict[str, float]:
    """Coverage, median width and mean interval score of the 95 % band, where there is a truth."""
    there = np.isfinite(known) & np.isfinite(mean)
    low, high, known = (mean - Z * sd)[there], (mean + Z * sd)[there], known[there]
    outside = np.maximum(low - known, 0) + np.maximum(known - high, 0)
    return {
        "coverage": float((outside == 0).mean()),
        "width": float(np.median(high - low)),
        "interval_score": float((high - low + 2 / (1 - BAND) * outside).mean()),
    }


# ---- how many blocks ------------------------------------------------------------------------------------------


def holds(found: Mapping[str, Any]) -> bool:
    """T1."""
    return found["misclassified"] <= MOST_MISCLASSIFIED and found["capacity_error"] <= MOST_CAPACITY_ERROR


def boundary_holds(found: Mapping[str, Any]) -> bool:
    """The part of T1 that a boundary planner answers."""
    return bool(found["misclassified"] <= MOST_MISCLASSIFIED)


def blocks_of_a_seed(path: Sequence[Mapping[str, Any]], holding: Any = holds) -> int | None:
    """The first checkpoint where the target holds, and at the next one too."""
    for place, found in enumerate(path):
        if holding(found) and holding(path[min(place + 1, len(path) - 1)]):
            return int(found["blocks"])
    return None


def n80(paths: Sequence[Sequence[Mapping[str, Any]]], holding: Any = holds) -> int | None:
    """The first checkpoint where, of all seeds, 80 % hold there and at the next. None: not within the blocks spent.

    A path that ends before others, because its target held or because its planner was done, stays as it ended.
    """
    if not paths:
        return None
    checkpoints = sorted({found["blocks"] for path in paths for found in path})
    for place, blocks in enumerate(checkpoints):
        after = checkpoints[min(place + 1, len(checkpoints) - 1)]
        share = np.mean([_held(path, blocks, holding) and _held(path, after, holding) for path in paths])
        if share >= SEEDS_THAT_HOLD:
            return int(blocks)
    return None


def _held(path: Sequence[Mapping[str, Any]], blocks: int, holding: Any) -> bool:
    until = [found for found in path if found["blocks"] <= blocks]
    return bool(until) and bool(holding(until[-1]))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else math.nan


# ---- the noise floor --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """Blocks of an ideal search: the law known, the best design.

    To learn are the coefficients of the difference and, of the capacity, a constant.
    """

    t1: int | None
    iou_95: int | None


def floor(landscape: Landscape, rounds: int = 200) -> Floor | None:
    """None off the law: there no finite set of coefficients is to be learned.

    Expected misclassification by n blocks of the design that is best for the places near the margin. Approximate:
    normal errors, and a design that may split blocks.
    """
    if landscape.beside is not None or landscape.beyond is not None or not any(landscape.coefficients):
        return None
    known = truth(landscape)
    uncapped = landscape.uncapped_gib(known.points)
    noise = landscape.noise
    gain = landscape.gain(known.points)
    sd_gib = np.sqrt(2) * np.hypot(noise.arm_gib, noise.share * uncapped[:, 0] / gain)
    informative = uncapped[:, 1] < landscape.cap_gib
    terms = landscape.terms(known.points)
    seen = (terms / sd_gib[:, None])[informative]
    felt = terms * (gain / uncapped[:, 0])[:, None]  # contrast per unit of each coefficient
    away = np.abs(1 - uncapped[:, 1] / uncapped[:, 0] - landscape.margin)
    weights = np.exp(-0.5 * (away / POINT) ** 2) * informative
    spread = _best_spread(seen, felt, weights, rounds)
    region = (known.classes == DIVERGES).mean()

    def blocks(most: float, judged: Mask) -> int | None:
        for count in np.unique(np.geomspace(np.linalg.matrix_rank(seen), 20_000, 400).astype(int)):
            wrong = norm.sf(away / np.maximum(spread / np.sqrt(count), 1e-12))
            if (wrong * judged * informative).mean() <= most:
                return int(count)
        return None

    everywhere = np.ones_like(known.judged)
    classified = blocks(MOST_MISCLASSIFIED, known.judged)
    per_gib = gain / uncapped[:, 0] * (uncapped[:, 0] < landscape.cap_gib)
    capacity = _blocks_for_a_constant(noise, MOST_CAPACITY_ERROR / max(float(np.median(per_gib)), 1e-12))
    return Floor(
        max(classified, capacity) if classified and capacity else None,
        blocks(0.05 * region, everywhere) if region else None,
    )


def _blocks_for_a_constant(noise: Noise, most_gib: float) -> int | None:
    """The fewest whose best weighted mean is that near in 80 % of seeds: noise averages out, slow drift hardly does."""
    for count in np.unique(np.geomspace(1, 1000, 120).astype(int)):
        order = np.arange(count)
        covariance = noise.slow_gib**2 * SLOWNESS ** np.abs(np.subtract.outer(order, order))
        covariance += (noise.shared_gib**2 + noise.arm_gib**2 / 2) * np.eye(count)
        variance = 1 / np.linalg.solve(covariance, np.ones(count)).sum()
        if norm.ppf((1 + SEEDS_THAT_HOLD) / 2) * np.sqrt(variance) <= most_gib:
            return int(count)
    return None


def _best_spread(seen: Array, felt: Array, weights: Array, rounds: int) -> Array:
    """Standard deviation of the contrast at each place after one block, spread over places as is best (V-optimal)."""
    design = np.full(len(seen), 1 / len(seen))
    wanted = felt.T @ (felt * weights[:, None])
    for _ in range(rounds):
        inverse = np.linalg.pinv(seen.T @ (seen * design[:, None]))
        worth = np.sqrt(np.einsum("ij,jk,ik->i", seen, inverse @ wanted @ inverse, seen))
        design *= worth
        design /= design.sum()
    inverse = np.linalg.pinv(seen.T @ (seen * design[:, None]))
    return np.sqrt(np.einsum("ij,jk,ik->i", felt, inverse, felt))
