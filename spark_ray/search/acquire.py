"""Which configuration to measure next.

The map's remaining variance, where it matters for the target, is known in closed form after any further block, since
it does not depend on what the block will say:

    reduction(x) = sum over places r of  weight(r) x covariance(x, r)^2 / (variance(x) + noise)

The weight is the density at the level that is asked about (targeted mean squared error, Picheny et al. 2010): high where a
place is near the level or little known. What is wished besides, capacities and each arm's boundary, enters with shares;
each term is relative to what is left of it. Of the least capacity with which arms start, a block says only on which side of it
it lies: what that takes away is expected over both answers (`Feasibility.level_told`). A block that was measured before is
a candidate like any: where noise and not ignorance is what limits the map, it is chosen again. Only where an arm failed, or met
its cap, there is little hope that it tells more.

Not all blocks are the model's to choose, as a model cannot see what it does not expect. The first ones fill the space
evenly; every other of the following ones, and later one in four, closes the widest gap between all blocks (`filling_point`);
and a block that all others contradict is measured once more before it is believed or forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.spatial.distance import cdist
from scipy.special import ndtr

from .. import search_spec
from .cube import Cube, Floats, Point
from .feasibility import Capacity
from .mixture import Mixture
from .process import Inputs, Process, Said
from .surrogate import Latent, Prediction, Surrogate
from .target import Target, density

Cost = Callable[[Point], float]
"""Seconds, or any other measure, of a block."""

AUDIT_EVERY = 4
FILLING_POOL = 256
"""The first points of the sequence, among which those are that fill gaps."""
GAP_LENGTH = 0.2
"""Half the width of what is to be seen in a gap, in parts of the space."""
GAP_NOISE = 0.1
"""The variance of a block's noise over that of what is to be seen."""
PLACES = 512
CANDIDATES = 192
AMONG = 1024
CAPACITY_SHARE = 0.2
NOTHING = 1e-30


# ---- blocks that no model chooses -------------------------------------------------------------------------------


def start_blocks(cube: Cube) -> int:
    """How many blocks fill the space before any model is asked: 4, 6, 8 in one, two, three dimensions."""
    return 2 + 2 * cube.dimensions


def filling_number(cube: Cube, block: int) -> int | None:
    """Which point of the filling sequence a block is; None: it is the model's to choose."""
    start = start_blocks(cube)
    if block < start:
        return block
    if block < 3 * start:  # every other one, until there are twice as many
        return start + (block - start) // 2 if (block - start) % 2 else None
    if block % AUDIT_EVERY == AUDIT_EVERY - 1:
        return 2 * start + (block - 3 * start) // AUDIT_EVERY
    return None


def filling_point(cube: Cube, number: int, seed: int, taken: Floats) -> Floats:
    """The first ones are those of the sequence; of a later one, the point of it that best fills the gaps between all blocks.

    Blocks that a model chose lie close together, so that next to them wide gaps stay, in which nothing that is narrower
    would be seen. Taken is raw, and so is the point, of one row.
    """
    if number < start_blocks(cube):
        return cube.filling(number + 1, seed)[-1:]
    points = cube.filling(FILLING_POOL, seed)
    at, places, known = cube.unit(points), cube.unit(cube.filling(PLACES, seed=0)), cube.unit(taken)
    factor = np.linalg.cholesky(_alike(known, known) + GAP_NOISE * np.eye(len(known)))
    left, right = (solve_triangular(factor, _alike(known, each), lower=True) for each in (at, places))
    variance = 1 + GAP_NOISE - np.square(left).sum(axis=0)
    seen = np.square(_alike(at, places) - left.T @ right).sum(axis=1) / variance
    return points[[int(np.argmax(seen))]]


def _alike(left: Floats, right: Floats) -> Floats:
    return np.asarray(np.exp(-cdist(left, right, "sqeuclidean") / (2 * GAP_LENGTH**2)))


def fills(cube: Cube, raw: Floats, seed: int) -> NDArray[np.bool_]:
    """Which of a search's blocks, in their order, no model chose."""
    sequence = {tuple(row) for row in cube.filling(FILLING_POOL, seed)}
    found = np.array([tuple(row) in sequence for row in raw], dtype=bool)
    planned = sum(filling_number(cube, block) is not None for block in range(len(raw)))
    return found & (np.cumsum(found) <= planned)


# ---- blocks that the model chooses ------------------------------------------------------------------------------


def next_points(
    surrogate: Surrogate | None,
    space: search_spec.Space | Cube,
    target: Target,
    count: int,
    pending: Sequence[Mapping[str, int | float]],
    seed: int,
    cost: Cost | None = None,
) -> list[Point]:
    """The next `count` configurations, while those pending are under way.

    Without a surrogate, as long as blocks are too few for one, all blocks so far are pending. The seed is that of the
    whole search, the same at every call and for `Surrogate.fit`.
    """
    cube = Cube.of(space)
    known = surrogate.blocks if surrogate else 0
    model = surrogate and surrogate.condition(cube.raw(pending))
    taken = np.vstack([surrogate.pair.raw if surrogate else np.empty((0, len(cube.axes))), cube.raw(pending)])
    chosen: list[Point] = []
    for block in range(known + len(pending), known + len(pending) + count):
        number = filling_number(cube, block)
        if model is None:
            number = block if number is None else number
        if number is not None:
            raw = filling_point(cube, number, seed, taken)
        else:
            assert model  # noqa: S101  # without one, every block fills the space
            raw = _best(model, target, cost, (seed + block) % 2**32)
        chosen += cube.configurations(raw)
        taken = np.vstack([taken, raw])
        if model:
            model = model.condition(raw)
    return chosen


def _best(model: Surrogate, target: Target, cost: Cost | None, seed: int) -> Floats:
    """The candidate that leaves least unknown for its cost; raw, one row."""
    contradicted = model.pair.raw[model.contradicted()]
    if len(contradicted):
        return contradicted[:1]
    cube = model.cube
    candidates = np.vstack(
        [_candidates(model, target, seed), cube.corners(), np.unique(model.pair.raw, axis=0)]
    )
    worth = gain(model, target, candidates, cube.filling(PLACES, seed=0))
    if cost:
        worth = worth / np.array([cost(each) for each in cube.configurations(candidates)])
    return candidates[[int(np.argmax(worth))]]


def _candidates(model: Surrogate, target: Target, seed: int) -> Floats:
    """Some from everywhere, and as many from where it is most open on which side of a boundary a place is."""
    places = model.cube.filling(AMONG, seed)
    open_ = target.misclassified(model.predict(places))
    half = CANDIDATES // 2
    return np.vstack([places[:half], places[half:][np.argsort(-open_[half:], kind="stable")[:half]]])


def gain(model: Surrogate, target: Target, candidates: Floats, places: Floats) -> Floats:
    """The share of what is unknown that a block at each candidate would take away, 0 to 1."""
    reductions = _Reductions.of(model, candidates, places)
    said = model.predict(places, reductions.latent)
    capacity = reductions.share(partial(_log_baseline, 0.01 * model.measured_bytes[1]), said.feasible_a)
    amounts, shares = [], []
    for amount, share in _asked(model, target, said, reductions, candidates, places):
        amounts.append(amount)
        shares.append(share)
    if sum(amounts) < NOTHING:
        return capacity
    asked = np.einsum("t,tc->c", np.array(amounts), np.stack(shares)) / sum(amounts)
    return np.asarray((1 - CAPACITY_SHARE) * asked + CAPACITY_SHARE * capacity)


def _asked(
    model: Surrogate, target: Target, said: Prediction, reductions: _Reductions, candidates: Floats, places: Floats
) -> Iterator[tuple[float, Floats]]:  # fmt: skip
    """Each part of the question: how much of it is open, and the share of that which each candidate takes away."""
    both = said.feasible_both
    if target.kind == "contrast":
        yield 1.0, reductions.share(model.contrast, both)
    if target.kind == "level_set":
        above = ndtr((said.contrast_mean - target.margin) / np.maximum(said.contrast_sd, 1e-9))
        weight = both * density(said.contrast_mean, said.contrast_sd, target.margin)
        yield _open(above, both), reductions.share(model.contrast, weight)
    capacities = ((said.kv_a_mean, said.kv_a_sd), (said.kv_b_mean, said.kv_b_sd))
    at = [model.places(candidates, of_block) for of_block, _ in reductions.capacity]
    for arm, (mean, sd) in enumerate(capacities):
        feasibility, right = model.feasibility[arm], model.places(places, mean)
        level, cliff = feasibility.chances(right, mean, sd)
        of_arm = partial(_of_arm, arm)
        if target.kind == "optimum":
            best = ndtr((mean - (mean * level * cliff).max()) / np.maximum(sd, 1.0))
            yield 1.0, reductions.share(of_arm, level * cliff * best)
        of_level, told = 0.0, np.zeros(len(candidates))
        for reading in (0, 1) if model.one_level else (arm,):  # either arm's tells of a level that both have
            possible = model.feasibility[reading].beside_cliff(at[reading]) * reductions.hope[reading]
            of_level, by = feasibility.level_told(reductions.capacity[reading], possible, (mean, sd), cliff)
            told = np.maximum(told, by)
        yield of_level * _open(level, cliff), told
        near = density(mean, sd, feasibility.level[0])
        yield (1 - of_level) * _open(level, cliff), reductions.share(of_arm, near)
        if feasibility.cliff:
            weight = density(*feasibility.latent(right), 0.0) * level
            share = _Reduction.of(feasibility.cliff, at[arm], right).share(weight)
            yield _open(cliff, level), feasibility.told(at[arm]) * share * reductions.hope[arm]


def _hope(model: Surrogate, arm: int, candidates: Floats) -> Floats:
    """That an arm works.

    Where two causes may explain a failure neither is sure, and so would the next one there not be, for ever.
    """
    return _unlike(model, candidates, model.failed[:, arm])


def _below_cap(model: Surrogate, arm: int, candidates: Floats, latent: Latent) -> Floats:
    """That a block finds an arm's capacity and not its cap; by what its neighbours did where caps differ."""
    if np.isfinite(model.caps_bytes[arm]):
        return model.below_cap(arm, candidates, latent)
    return _unlike(model, candidates, model.capped[:, arm])


def _unlike(model: Surrogate, candidates: Floats, blocks: NDArray[np.bool_]) -> Floats:
    """0 at one of these blocks and 1 at any other, by the nearest of both."""
    if not blocks.any() or blocks.all():
        return np.ones(len(candidates))
    unit, known = model.cube.unit(candidates), model.cube.unit(model.pair.raw[: len(blocks)])
    away, near = (cdist(unit, known[each]).min(axis=1) for each in (blocks, ~blocks))
    return np.asarray(away / np.maximum(away + near, NOTHING))


def _open(chance: Floats, weight: Floats) -> float:
    return float((weight * np.minimum(chance, 1 - chance)).mean())


# ---- reductions of variance -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reduction:
    """Of one process: what it says at candidates and at places, and how much of the variance each candidate would take."""

    candidates: Said
    places: Said
    taken: Floats  # (candidates, places)

    @classmethod
    def of(cls, process: Process | Mixture, candidates: Inputs, places: Inputs) -> Self:
        at_candidates, at_places, shared = process.joint(candidates, places)
        return cls(at_candidates, at_places, shared**2 / (at_candidates[1] + process.block_variance)[:, None])

    @property
    def variance(self) -> Floats:
        """At each place."""
        return self.places[1]

    def share(self, weight: Floats) -> Floats:
        return np.asarray(self.taken @ weight / max(float(self.variance @ weight), NOTHING))


@dataclass(frozen=True)
class _Reductions:
    """Of what is computed from common and difference; a block tells of each as far as the arms work there, below their caps."""

    model: Surrogate
    places: Floats
    common: _Reduction
    difference: _Reduction
    works: tuple[Floats, Floats]
    hope: tuple[Floats, Floats]
    """Of both arms at the candidates."""
    capacity: tuple[Capacity, Capacity]
    """What a block would read of each arm at the candidates."""

    @classmethod
    def of(cls, model: Surrogate, candidates: Floats, places: Floats) -> Self:
        left, right = model.pair.scale.inputs(candidates), model.pair.scale.inputs(places)
        common = _Reduction.of(model.pair.common, left[0], right[0])
        difference = _Reduction.of(model.pair.difference, left[1], right[1])
        latent = model.widened(common.candidates, difference.candidates)
        said = model.predict(candidates, latent)
        means, sds = model.moments(candidates, latent, noise=True)
        hope = _hope(model, 0, candidates), _hope(model, 1, candidates)
        below = _below_cap(model, 0, candidates, latent), _below_cap(model, 1, candidates, latent)
        either = np.maximum(said.feasible_a * hope[0] * below[0], said.feasible_b * hope[1] * below[1])
        works = either, said.feasible_both * np.minimum(*hope) * np.minimum(*below)
        return cls(model, places, common, difference, works, hope, ((means[0], sds[0]), (means[1], sds[1])))

    @cached_property
    def latent(self) -> Latent:
        """At the places."""
        return self.model.widened(self.common.places, self.difference.places)

    def share(self, quantity: Callable[[Floats, Floats], Floats], weight: Floats) -> Floats:
        """Of the weighted variance of a quantity of both arms' capacities, to first order."""
        by_common, by_difference = self._slopes(quantity)
        of_common, of_difference = weight * by_common**2, weight * by_difference**2
        taken = self.works[0] * (self.common.taken @ of_common)
        taken += self.works[1] * (self.difference.taken @ of_difference)
        whole = float(self.common.variance @ of_common + self.difference.variance @ of_difference)
        return np.asarray(taken / max(whole, NOTHING))

    def _slopes(self, quantity: Callable[[Floats, Floats], Floats]) -> tuple[Floats, Floats]:
        (common, difference), (step, other_step) = self.latent

        def at(m: Floats, d: Floats) -> Floats:
            return quantity(*self.model.kv_bytes(m, d, self.places))

        return (
            (at(common + step, difference) - at(common - step, difference)) / (2 * step),
            (at(common, difference + other_step) - at(common, difference - other_step)) / (2 * other_step),
        )


def _log_baseline(least: float, a: Floats, b: Floats) -> Floats:  # noqa: ARG001
    return np.asarray(np.log(np.maximum(a, least)))


def _of_arm(arm: int, a: Floats, b: Floats) -> Floats:
    return (a, b)[arm]
