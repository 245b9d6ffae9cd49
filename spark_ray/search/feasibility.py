"""How probably an arm has any capacity at a configuration.

Two causes of failure, told apart by whether the predicted capacity explains it. An engine refuses to start below its *least
capacity*, one sequence of the longest length: an unknown level between what failed and what worked, the same for both arms
where it is KV capacity that was measured. And it may fail at a *cliff* of another kind (a kernel's limit, a container's), with plenty of memory. As long as
every failure is explained there is no cliff.

A cliff is where a latent value is 0: linear over the cube, as a limit is on one knob or on a product of several, or also in
the predicted capacity, as the limit of a container is on all that is held in it; and bent as little as the blocks allow. A
block says only on which side it is, which is one-sided information as that of a cap (`one_sided`); so where a few blocks
have the cliff between them, its place far away is known too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from .kernel import JITTER, Floats, MapKernel
from .mixture import Moments, one_sided
from .process import Hyperparameters, Inputs, Process

Mask = NDArray[np.bool_]
Bends = tuple[tuple[float, Hyperparameters], ...]
Capacity = tuple[Floats, Floats]
"""Means and standard deviations, bytes."""

BENDS = (0.05, 0.2, 1.0)
"""Standard deviations of a cliff's latent value around a plane; a plane's own is 1 for each axis, and so for 0.3 of its range."""
BEND_LENGTH = 0.5
SHARPNESS = 0.03
"""Within how much of the latent value a cliff may go either way."""
MOST_BENDS = 3
AXES_FAVOUR = 1.5
"""Natural log of the odds for a cliff along the axes alone, before the first block."""
PASSES = 12
DAMPING = 0.6
LEVELS = np.concatenate([np.logspace(-3, np.log10(0.5), 32, endpoint=False), np.linspace(0.5, 1, 96)])
"""What the least capacity may be, over the least that worked: from a thousandth to all of it, finer where failures end up."""
LEVELS_PRIOR = np.gradient(np.log(LEVELS)) / np.gradient(np.log(LEVELS)).sum()
"""Any order of magnitude is as likely as another."""
NEGLIGIBLE = 1e-4
"""Levels with less than this share of the largest weight are left out."""
NOTHING = 1e-12
CERTAIN = 8.0
"""Standard deviations, beyond which there is no doubt in double precision."""
MISTAKE = 0.02
UNEXPLAINED = 0.01
"""The chance below which a failure has another cause than too little capacity. Next to what worked little is left for it."""
SMALLEST_SD = 1e-3
"""Bytes, or tokens per second."""
CAUSES = 3
"""How often failures are told apart: what lies behind a cliff says nothing of the least capacity, and the other way round."""


@dataclass(frozen=True)
class _Failures:
    """What the blocks in which an arm failed say of the least capacity."""

    failed: Mask
    counts: Floats  # of the failed ones: how often each counts
    level_bytes: Floats
    below: Floats  # (levels, failed): the chance that the level explains the failure

    @classmethod
    def of(
        cls, failed: Mask, counts: Floats, least_bytes: float, mean_bytes: Floats, sd_bytes: Floats
    ) -> _Failures:
        level_bytes = least_bytes * LEVELS
        away = (level_bytes[:, None] - mean_bytes[failed]) / np.maximum(sd_bytes[failed], SMALLEST_SD)
        return cls(failed, counts[failed], level_bytes, np.asarray(ndtr(away)))

    def likelihood(self, otherwise: Floats | float = MISTAKE) -> Floats:
        """Of each level, by how well it explains the failures, each of which may `otherwise` have another cause."""
        found = np.log(otherwise + (1 - otherwise) * self.below) @ self.counts
        return np.asarray(np.exp(found - found.max()))

    def weights(self, otherwise: Floats | float = MISTAKE) -> Floats:
        weights = LEVELS_PRIOR * self.likelihood(otherwise)
        return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class Feasibility:
    level_bytes: Floats
    weights: Floats
    bends: Bends
    """How a cliff may be bent, each with its weight; none without a cliff."""
    cliffs: tuple[Process, ...]
    """Of a latent value that is positive where the arm works, each with a bend, the best first."""

    @classmethod
    def of_arms(
        cls, inputs: tuple[Inputs, Inputs], failed: Mask, least_bytes: Floats, mean_bytes: Floats, sd_bytes: Floats,
        learned: tuple[Bends, Bends], *, one_level: bool,
    ) -> tuple[Feasibility, Feasibility]:  # fmt: skip
        """From blocks: which of each arm failed, (blocks, 2), and what is predicted for it, (2, blocks), noise included.

        With `one_level` the least capacity is the same for both arms; so is then the least with which they ever worked.
        """
        # Both arms of a block share most of the prediction's error: together they say once what they say.
        counts = np.where(failed.all(axis=1) & one_level, 0.5, 1.0)
        of_arms = [
            _Failures.of(failed[:, arm], counts, least_bytes[arm], mean_bytes[arm], sd_bytes[arm])
            for arm in (0, 1)
        ]
        one, other = (
            cls._fit(
                inputs[arm], of_arms[arm], of_arms[1 - arm].likelihood() if one_level else 1.0, learned[arm]
            )
            for arm in (0, 1)
        )
        return (one._sharing(other), other._sharing(one)) if one_level else (one, other)

    @classmethod
    def _fit(cls, inputs: Inputs, failures: _Failures, heard: Floats | float, learned: Bends) -> Feasibility:
        """One arm; `heard` is the likelihood of the other one's failures by level, if they tell of the same."""
        failed = failures.failed
        found = cls(failures.level_bytes, failures.weights(), (), ())
        unexplained = np.zeros(len(failed), dtype=bool)
        for _ in range(CAUSES):
            before, unexplained = unexplained, unexplained.copy()
            joint = found.weights * heard
            unexplained[failed] = joint @ failures.below < UNEXPLAINED * joint.sum()
            if (unexplained == before).all():
                break
            says = ~failed | unexplained
            sides = np.where(unexplained, -1.0, 1.0)[says]
            bends = learned or _weighed(inputs[says], sides)
            found = replace(
                found, bends=bends, cliffs=tuple(_settled(each, inputs[says], sides) for _, each in bends)
            )
            otherwise = np.maximum(1 - found.beside_cliff(inputs[failed]), MISTAKE)
            found = replace(found, weights=failures.weights(otherwise))
        return found

    @property
    def level(self) -> tuple[float, float]:
        """Mean and standard deviation of the least capacity, bytes."""
        mean = float(self.weights @ self.level_bytes)
        return mean, float(np.sqrt(self.weights @ (self.level_bytes - mean) ** 2))

    def _sharing(self, other: Feasibility) -> Feasibility:
        """With the least capacity as both arms know it."""
        weights = self.weights * other.weights / LEVELS_PRIOR
        kept = weights > NEGLIGIBLE * weights.max()
        return replace(self, level_bytes=self.level_bytes[kept], weights=weights[kept] / weights[kept].sum())

    def seen(self, capacity: Capacity, possible: Floats) -> Feasibility:
        """As if blocks with these capacities, noise included, had gone the more probable way; nothing more is learned of cliffs."""
        weights = self.weights
        for works in self._enough(*capacity) * possible[:, None]:
            likelihood = works if works @ weights > 0.5 else 1 - works
            weights = weights * likelihood / (likelihood @ weights)
        return replace(self, weights=weights)

    def chances(self, inputs: Inputs, mean_bytes: Floats, sd_bytes: Floats) -> tuple[Floats, Floats]:
        """That the capacity is enough, and that no cliff forbids it."""
        return self.enough(mean_bytes, sd_bytes), self.beside_cliff(inputs)

    def enough(self, mean_bytes: Floats, sd_bytes: Floats) -> Floats:
        chance = self._enough(mean_bytes, sd_bytes) @ self.weights
        return np.minimum(chance, 1.0)  # weights add up to 1 but for rounding

    def _enough(self, mean_bytes: Floats, sd_bytes: Floats) -> Floats:
        """The chance that a capacity is enough under each level, (n, levels)."""
        sd_bytes = np.maximum(sd_bytes, SMALLEST_SD)
        found = np.ones((len(mean_bytes), len(self.level_bytes)))
        open_ = mean_bytes - self.level_bytes.max() < CERTAIN * sd_bytes  # seldom many, and ndtr is slow
        away = (mean_bytes[open_, None] - self.level_bytes) / sd_bytes[open_, None]
        found[open_] = ndtr(away)
        return found

    def level_told(
        self, candidates: Capacity, possible: Floats, places: Capacity, weight: Floats
    ) -> tuple[float, Floats]:
        """What is open about where capacity is enough, as the level is unknown, and how much of that a block takes away.

        Args:
            candidates: With a block's noise.
            possible: The chance that no cliff forbids each candidate.
            places: Where capacity is to be enough.
            weight: Of each place.

        Returns:
            Two shares of variances of works-or-not: the level's of all, and by candidate what it tells of the level's.
        """
        works, is_enough = self._enough(*candidates), self._enough(*places)
        chance, mean = possible * (works @ self.weights), is_enough @ self.weights
        away = is_enough - mean[:, None]
        shared = possible[:, None] * ((works * self.weights) @ away.T)
        own = float(np.square(away) @ self.weights @ weight)
        told = np.square(shared) @ weight / np.maximum(chance * (1 - chance), NOTHING)
        whole = float(np.maximum(mean * (1 - mean), 0.0) @ weight)
        return min(1.0, own / max(whole, NOTHING)), told / max(own, NOTHING)

    def beside_cliff(self, inputs: Inputs) -> Floats:
        """The chance that no cliff forbids it."""
        if self.cliff is None:
            return np.ones(len(inputs))
        chances = [ndtr(np.divide(*_latent(each, inputs))) for each in self.cliffs]
        return np.asarray(np.average(chances, axis=0, weights=[weight for weight, _ in self.bends]))

    @property
    def cliff(self) -> Process | None:
        """The one under which blocks predict each other best; None: no failure needs one."""
        return self.cliffs[0] if self.cliffs else None

    def latent(self, inputs: Inputs) -> tuple[Floats, Floats]:
        assert self.cliff  # noqa: S101
        return _latent(self.cliff, inputs)

    def told(self, inputs: Inputs) -> Floats:
        """How much of what a measured value would tell of the cliff, its side tells: little where that is foreseen."""
        mean, sd = self.latent(inputs)
        away = mean / sd
        return np.asarray(np.exp(-(away**2) - log_ndtr(away) - log_ndtr(-away)) / (2 * np.pi))


def _latent(cliff: Process, inputs: Inputs) -> tuple[Floats, Floats]:
    mean, variance = cliff.predict(inputs)
    return mean, np.sqrt(variance + cliff.noise_variance)


def _weighed(inputs: Inputs, sides: Floats) -> Bends:
    """Those under which blocks predict each other best, by how well they do."""
    tried = _bends(inputs)
    evidence = np.array([favour + _evidence(_settled(each, inputs, sides), sides) for favour, each in tried])
    best = np.argsort(-evidence, kind="stable")[:MOST_BENDS]
    weights = np.exp(evidence[best] - evidence.max())
    return tuple((float(w), tried[place][1]) for w, place in zip(weights / weights.sum(), best, strict=True))


def _bends(inputs: Inputs) -> list[tuple[float, Hyperparameters]]:
    """Along the axes (and the constant), along the capacity (and the constant), and along all; each with its favour."""
    axes = inputs.cube.shape[1]
    along = ((AXES_FAVOUR, slice(axes, -3)), (0.0, slice(-4, -2)), (0.0, slice(axes, -2)))
    lengths = (BEND_LENGTH,) * axes
    return [
        (favour, Hyperparameters(MapKernel(slice(axes, axes), columns, (1.0, bend**2, JITTER, SHARPNESS**2), lengths), 0.0, 1.0))
        for favour, columns in along
        for bend in BENDS
    ]  # fmt: skip


def _settled(hyper: Hyperparameters, inputs: Inputs, sides: Floats) -> Process:
    """Expectation propagation, all sides at once."""
    precision, shift = np.zeros(len(sides)), np.zeros(len(sides))
    process = _process(hyper, inputs, precision, shift)
    for _ in range(PASSES):
        said = Moments.of(process)
        mean, variance = one_sided(0.0, sides, said.mean, said.function, hyper.noise_variance)
        own = 1 / (variance + hyper.noise_variance)
        precision += DAMPING * (own - precision)
        shift += DAMPING * (own * mean - shift)
        process = _process(hyper, inputs, precision, shift, process)
    return process


def _process(
    hyper: Hyperparameters, inputs: Inputs, precision: Floats, shift: Floats, alike: Process | None = None
) -> Process:
    known = np.maximum(precision, 1e-6)
    return Process(hyper, inputs, shift / known, 1 / known / hyper.noise_variance, alike=alike)


def _evidence(process: Process, sides: Floats) -> float:
    said = Moments.of(process)
    return float(log_ndtr(sides * said.mean / np.sqrt(said.function + said.noise)).sum())
