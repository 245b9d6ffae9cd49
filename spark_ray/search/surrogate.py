"""What is known of KV capacity over the space after some blocks: of both arms, of their contrast, and how surely.

    surrogate = Surrogate.fit(space, observations, seed=0)
    map = surrogate.predict(cube.filling(4096, seed=1))

The mean is the sizing law of an engine (`law`), of the family that predicts blocks best from the others; what no law
foresees is a residual (`process`), smooth or rough as the blocks say, and both as far as they leave it open (`mixture`);
arms are a common part and a difference (`pair`); and where no law does better than a plain process, that is what is used.
Bands are widened, never narrowed, by how wrong each block's prediction from all the others was, and where blocks are few.

Hyperparameters are learned at some numbers of blocks only (`_scheduled`), from the first so many: what is known is a
function of the blocks and their order, not of how often one asked, and asking often is cheap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from .. import search_spec
from . import law
from .blocks import Data
from .cube import Cube, Floats
from .feasibility import Bends, Feasibility
from .pair import DOUBTED, Learned, Pair, learn
from .process import Inputs, Said
from .scale import Family, Scale

FEWEST_COMPLETE = 3
FIRST_LEARNING = 5
GROWTH = 1.25
TRUSTED = 4.0
"""Leave-one-out errors that are taken to be as predicted, beside those seen: few blocks widen little by chance."""
LAW_TERMS = 4
"""What a law leaves to be learned from the same blocks as their noise."""
ONE_CAP = 1.02
"""By how much a block's blocks of KV cache may differ at one and the same cap."""
FEWEST_FREE = 3
"""Degrees of freedom: with fewer, bands would say nothing any more."""

_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
NODES = np.stack(np.meshgrid(_NODES, _NODES), axis=-1).reshape(-1, 2)
NODE_WEIGHTS = np.outer(_NODE_WEIGHTS, _NODE_WEIGHTS).ravel() / _NODE_WEIGHTS.sum() ** 2


@dataclass(frozen=True)
class Observation:
    """What a block told. `kv` is bytes of the baseline and the other arm; None: no capacity there.

    `capped` says of which arm something else than memory set the capacity: without it, there would be more.
    """

    configuration: Mapping[str, int | float]
    kv: tuple[float | None, float | None]
    capped: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Prediction:
    """Of each configuration: mean and standard deviation of what the engine would do, without the noise of a trial."""

    kv_a_mean: Floats
    kv_a_sd: Floats
    kv_b_mean: Floats
    kv_b_sd: Floats
    contrast_mean: Floats
    contrast_sd: Floats
    feasible_a: Floats
    feasible_b: Floats
    feasible_both: Floats
    """Not the product: both arms have about as much, and need the same least capacity. Cliffs are each arm's own."""


Latent = tuple[Floats, Floats]
"""Means and standard deviations of common and difference, (2, n), in the scale of a family."""


class TooFewBlocks(ValueError):
    """Fewer than FEWEST_COMPLETE blocks have a number of both arms."""


Row = tuple[tuple[float, ...], tuple[float | None, float | None], tuple[bool, bool]]


@dataclass(frozen=True)
class Surrogate:
    cube: Cube
    seed: int
    blocks: int
    pair: Pair
    caps_bytes: tuple[float, float]
    """The capacity that each arm never exceeds; infinite if it was never found capped, or at several capacities."""
    widening: tuple[float, float]
    """Of the standard deviations of common and difference."""
    measured_bytes: tuple[float, float]
    """The smallest and the largest capacity that was measured."""
    failed: NDArray[np.bool_]
    """Which arm had no capacity in which of the blocks that were measured, (blocks, 2)."""
    capped: NDArray[np.bool_]
    """And which met a cap."""
    one_level: bool
    """Whether the least capacity is the same for both arms, as one sequence is: not so if something else was measured."""
    feasibility: tuple[Feasibility, ...]
    """Of the baseline and the other arm."""

    @classmethod
    def fit(
        cls, space: search_spec.Space | Cube, observations: Sequence[Observation], *, law: bool = True, seed: int
    ) -> Surrogate:  # fmt: skip
        """In the order of the blocks. The seed is that of the search: of its space-filling points.

        `law` False: what was measured is no capacity in bytes, or nothing that is known of engines is to be used.

        Raises:
            TooFewBlocks: nothing can be compared yet.
        """
        cube = Cube.of(space)
        return _fit(cube, tuple(_row(cube, each) for each in observations), law, seed)

    # ---- what it says ---------------------------------------------------------------------------------------

    @property
    def family(self) -> Family:
        """The law that predicts best; None: none does better than a plain process."""
        return self.pair.scale.family

    @property
    def law_fits(self) -> bool:
        return self.family is not None

    @property
    def noise_sd_bytes(self) -> float:
        """Of one arm in one block, in the middle of the space: what is not shared between the arms of a block."""
        middle = self.cube.snap(np.full((1, self.cube.dimensions), 0.5))
        sd = np.sqrt(self.pair.difference.noise_variance / 2)
        if self.family is None:
            return float(sd * self.predict(middle).kv_a_mean[0])
        return float(sd * self.pair.scale.gain(middle)[0])

    def leave_one_out(self) -> Floats:
        """Errors of each complete block predicted by all others, of common and difference, in standard deviations."""
        return self.pair.standardised

    def predict(
        self, configurations: Iterable[Mapping[str, float]] | Floats, latent: Latent | None = None
    ) -> Prediction:
        """`latent` is what `latent` says of the same configurations, if that is known already."""
        raw = self.cube.raw(configurations)
        mean, sd = self.moments(raw, latent or self.latent(raw))
        arms = [
            each.chances(self.places(raw, mean[arm]), mean[arm], sd[arm])
            for arm, each in enumerate(self.feasibility)
        ]
        (a_level, a_cliff), (b_level, b_cliff) = arms
        a, b = a_level * a_cliff, b_level * b_cliff
        enough = self.feasibility[0].enough(*_smaller(mean, sd)) if self.one_level else a_level * b_level
        both = np.clip(enough * a_cliff * b_cliff, np.maximum(a + b - 1, 0), np.minimum(a, b))
        return Prediction(mean[0], sd[0], mean[1], sd[1], mean[2], sd[2], a, b, both)

    def places(self, raw: Floats, kv_bytes: Floats) -> Inputs:
        """Where they are, as a cliff sees it: the axes, a constant, and the capacity that an arm is predicted to have."""
        plain = Scale(self.cube, None).inputs(raw)[0]
        capacity = np.sqrt(3) * (2 * kv_bytes[:, None] / self.measured_bytes[1] - 1)  # as even as the axes
        return Inputs(plain.cube, plain.certain[:, :0], np.hstack([plain.doubtful, plain.certain, capacity]))

    def contradicted(self) -> NDArray[np.bool_]:
        """Blocks that all others contradict and that were measured only once."""
        _, of_row, counts = np.unique(self.pair.raw, axis=0, return_inverse=True, return_counts=True)
        return np.asarray((self.pair.doubt > DOUBTED) & (counts[of_row.ravel()] == 1))

    def moments(self, raw: Floats, latent: Latent, *, noise: bool = False) -> tuple[Floats, Floats]:
        """Mean and standard deviation of both capacities, the contrast and their difference, (4, n), by Gauss-Hermite quadrature.

        With `noise` of what a block measures, at some time: drift is noise to it.
        """
        means, sds = latent
        if noise:
            of_both = [[self.pair.common.block_variance], [self.pair.difference.block_variance]]
            sds = np.sqrt(sds**2 + np.array(of_both))
        z = means[:, None] + NODES.T[:, :, None] * sds[:, None]
        kv = self.kv_bytes(z[0], z[1], raw)
        values = np.stack([*kv, self.contrast(*kv), kv[0] - kv[1]])
        mean = np.einsum("n,vnr->vr", NODE_WEIGHTS, values)
        return mean, np.sqrt(np.einsum("n,vnr->vr", NODE_WEIGHTS, (values - mean[:, None]) ** 2))

    def latent(self, raw: Floats) -> Latent:
        """Means and widened standard deviations of common and difference, (2, n), in the family's scale."""
        of_common, of_difference = self.pair.scale.inputs(raw)
        return self.widened(self.pair.common.predict(of_common), self.pair.difference.predict(of_difference))

    def widened(self, common: Said, difference: Said) -> Latent:
        sds = [np.sqrt(said[1]) * by for said, by in zip((common, difference), self.widening, strict=True)]
        return np.stack([common[0], difference[0]]), np.stack(sds)

    def kv_bytes(self, common: Floats, difference: Floats, raw: Floats) -> tuple[Floats, Floats]:
        """Capacity of both arms, at most their caps."""
        a = self.pair.scale.bytes_of(common + difference / 2, raw)
        b = self.pair.scale.bytes_of(common - difference / 2, raw)
        return np.minimum(a, self.caps_bytes[0]), np.minimum(b, self.caps_bytes[1])

    def below_cap(self, arm: int, raw: Floats, latent: Latent) -> Floats:
        """The chance that a block would find an arm's capacity and not its cap, which is known."""
        (common, difference), (of_common, of_difference) = latent
        noise = self.pair.common.block_variance + self.pair.difference.block_variance / 4
        cap = self.pair.scale.of_bytes(np.full((len(raw), 1), self.caps_bytes[arm]), raw)[:, 0]
        mean = common + (1, -1)[arm] * difference / 2
        return np.asarray(ndtr((cap - mean) / np.sqrt(of_common**2 + of_difference**2 / 4 + noise)))

    def contrast(self, a: Floats, b: Floats) -> Floats:
        """1 - b / a; of less than was ever measured, and than a hundredth of the most, there is no telling: feasibility decides."""
        smallest, largest = self.measured_bytes
        least = max(min(smallest, 0.01 * largest), np.finfo(np.float64).tiny)
        return np.asarray(np.clip(1 - np.maximum(b, least) / np.maximum(a, least), -2.0, 1.0))

    def condition(self, configurations: Iterable[Mapping[str, float]] | Floats) -> Surrogate:
        """As if these were measured too, each arm at its mean: for blocks that are under way."""
        raw = self.cube.raw(configurations)
        if not len(raw):
            return self
        mean, sd = self.moments(raw, self.latent(raw), noise=True)
        feasibility = list(self.feasibility)
        for arm, own in enumerate(self.feasibility):
            possible = own.beside_cliff(self.places(raw, mean[arm]))
            for each in (0, 1) if self.one_level else (arm,):
                feasibility[each] = feasibility[each].seen((mean[arm], sd[arm]), possible)
        return replace(
            self, pair=self.pair.with_(raw), blocks=self.blocks + len(raw), feasibility=tuple(feasibility)
        )


def _smaller(mean: Floats, sd: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the smaller of both capacities, of `moments` (Clark 1961, two normals)."""
    (a, b), (a_sd, b_sd), apart = mean[:2], sd[:2], np.maximum(sd[3], 1e-9)
    z = (b - a) / apart
    density = apart * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    first = a * ndtr(z) + b * ndtr(-z) - density
    second = (a**2 + a_sd**2) * ndtr(z) + (b**2 + b_sd**2) * ndtr(-z) - (a + b) * density
    return first, np.sqrt(np.maximum(second - first**2, 0.0))


# ---- fitting ------------------------------------------------------------------------------------------------------


_Cliffs = tuple[Bends, Bends]


@dataclass(frozen=True)
class _Learned:
    family: Family
    pair: Learned
    cliffs: _Cliffs


@lru_cache(maxsize=4)  # whoever asks for the next block, for the map and whether to stop asks for the same
def _fit(cube: Cube, rows: tuple[Row, ...], with_law: bool, seed: int) -> Surrogate:
    data = _data(rows, one_level=with_law)
    learned = _learn(cube, rows[: _scheduled(rows)], with_law)
    pair = Pair.condition(Scale(cube, learned.family), data, learned.pair)
    return _assemble(cube, seed, data, pair, learned.cliffs)


@lru_cache(maxsize=32)
def _learn(cube: Cube, rows: tuple[Row, ...], with_law: bool) -> _Learned:
    """Each family in turn; kept is the one under which the blocks predict each other best."""
    data = _data(rows, one_level=with_law)
    families: list[Family] = [*law.FAMILIES] if with_law and cube.engine_columns else []
    learned, pair = learn([Scale(cube, family) for family in [*families, None]], data)
    baseline, against = (each.bends for each in _assemble(cube, 0, data, pair, ((), ())).feasibility)
    return _Learned(pair.scale.family, learned, (baseline, against))


def _assemble(cube: Cube, seed: int, data: Data, pair: Pair, cliffs: _Cliffs) -> Surrogate:
    measured = float(np.nanmin(data.kv_bytes)), float(np.nanmax(data.kv_bytes))
    found = Surrogate(
        cube, seed, len(data.raw), pair, (_cap(data, 0), _cap(data, 1)), _widening(pair), measured, data.failed, data.capped,
        data.one_level, (),
    )  # fmt: skip
    mean, sd = found.moments(data.raw, found.latent(data.raw), noise=True)
    places = found.places(data.raw, mean[0]), found.places(data.raw, mean[1])
    feasibility = Feasibility.of_arms(
        places, data.failed, data.floor_bytes, mean, sd, cliffs, one_level=data.one_level
    )
    return replace(found, feasibility=feasibility)


def _cap(data: Data, arm: int) -> float:
    """The capacity that an arm never exceeds; infinite if none is known, or if what limits it is itself searched."""
    capped = data.kv_bytes[data.capped[:, arm], arm]
    if not len(capped) or np.nanmax(data.kv_bytes[:, arm]) > ONE_CAP * capped.min():
        return float(np.inf)
    return float(np.median(capped))


def _widening(pair: Pair) -> tuple[float, float]:
    """How much wider the bands must be for leave-one-out errors to be as large as they say; 1 at least.

    And wider as Student's t is than a normal, as the noise was learned from few blocks too: fewer still on a host that drifts,
    where neighbours tell the same.
    """
    squares = pair.standardised**2
    seen = np.maximum(np.sqrt((squares.sum(axis=0) + TRUSTED) / (len(squares) + TRUSTED)), 1.0)
    independent = np.array([each.independent_values for each in (pair.common, pair.difference)])
    free = np.maximum(independent * (1 - LAW_TERMS / len(squares)), FEWEST_FREE)
    common, difference = seen * stdtrit(free, 0.975) / ndtri(0.975)
    return float(common), float(difference)


def _row(cube: Cube, observation: Observation) -> Row:
    values = tuple(float(observation.configuration[axis.name]) for axis in cube.axes)
    return values, observation.kv, observation.capped


def _data(rows: Sequence[Row], *, one_level: bool) -> Data:
    kv = np.array(
        [[np.nan if arm is None else arm for arm in of_arms] for _, of_arms, _ in rows], dtype=float
    )
    kv = kv.reshape(-1, 2)
    capped = np.array([capped for _, _, capped in rows], dtype=bool).reshape(-1, 2)
    raw = np.array([values for values, _, _ in rows], dtype=float)
    data = Data(raw, kv, capped & ~np.isnan(kv), one_level)
    if data.measured.all(axis=1).sum() < FEWEST_COMPLETE:
        raise TooFewBlocks(f"at least {FEWEST_COMPLETE} blocks with a capacity of both arms are needed")
    return data


def _scheduled(rows: Sequence[Row]) -> int:
    """How many of the first blocks teach the hyperparameters: a number that grows by steps."""
    stage = min(FIRST_LEARNING, len(rows))
    while (following := int(np.ceil(stage * GROWTH))) <= len(rows):
        stage = following
    complete = [all(arm is not None for arm in kv) and not any(capped) for _, kv, capped in rows]
    while sum(complete[:stage]) < FEWEST_COMPLETE:
        stage += 1
    return stage
