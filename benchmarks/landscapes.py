"""Simulated machines with two arms whose true map is known: what `search.py` lets searches explore.

Nothing here is measured, and nothing is shared with the surrogate: a landscape is written from what engines do, in GiB.
A seed moves every parameter by 5 to 15 %, so that no search can be tuned to one of them. *Contained* landscapes follow a law
that the surrogate has among its own; the others do not.

    KV of an arm = law(configuration) - gain x (what the arm uses more), at most `cap_gib`,
    and none below `smallest_gib` (one sequence) or beyond a cliff.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from spark_ray.search_spec import Configuration, FractionRange, IntRange, Space

Array = NDArray[np.float64]
Points = Array
"""Configurations, one a row: max_batch_size, max_num_tokens, memory_fraction."""

GIB = float(1 << 30)
TOTAL_GIB = 119.7  # what an engine reads on a DGX Spark
AXES = ("max_batch_size", "max_num_tokens", "memory_fraction")
RANGES = {"max_batch_size": (1, 256), "max_num_tokens": (256, 32768), "memory_fraction": (0.3, 0.95)}
FIXED = {"max_batch_size": 32, "memory_fraction": 0.9}
SEARCHED = {1: AXES[1:2], 2: AXES[:2], 3: AXES}
SLOWNESS = 0.8  # of what is slow, how much is left a block later
CELLS = {1: (400,), 2: (32, 32), 3: (14, 14, 10)}


@dataclass(frozen=True)
class Noise:
    """What one block's two readings have in them besides the law; GiB of memory, before the law's gain."""

    arm_gib: float = 0.5
    shared_gib: float = 0.3  # both arms of a block alike
    share: float = 0.0  # of the capacity
    burst_chance: float = 0.0  # of a trial that finds 4 to 8 GiB taken
    transient_gib: float = 0.0  # taken at first, fading over eight blocks
    slow_gib: float = 0.0  # standard deviation of what is first-order autoregressive from block to block
    carry_over_gib: float = 0.0  # what the first arm of a block leaves for the second


@dataclass(frozen=True)
class Landscape:
    name: str
    searched: tuple[str, ...]
    law: Callable[[Points], Array]  # KV of the baseline, GiB
    gain: Callable[[Points], Array]  # KV lost for each GiB used more
    terms: Callable[[Points], Array]  # of what the other arm uses more, GiB
    coefficients: tuple[float, ...]  # of the terms: what a search must learn
    beside: Callable[[Points], Array] | None = None  # what it uses more besides, which no law foresees
    beyond: Callable[[Points], tuple[NDArray[np.bool_], NDArray[np.bool_]]] | None = None  # a cliff, by arm
    noise: Noise = field(default_factory=Noise)
    margin: float = 0.05
    smallest_gib: float = 0.25
    cap_gib: float = np.inf
    contained: bool = True

    @property
    def space(self) -> Space:
        return space(self.searched)

    def more_gib(self, points: Points) -> Array:
        """Memory that the other arm uses more than the baseline."""
        found = self.terms(points) @ np.array(self.coefficients)
        return found if self.beside is None else found + self.beside(points)

    def uncapped_gib(self, points: Points) -> Array:
        """True KV of both arms, (n, 2), as if nothing limited or forbade it."""
        baseline = self.law(points)
        return np.stack([baseline, baseline - self.gain(points) * self.more_gib(points)], axis=1)

    def possible(self, points: Points, kv_gib: Array) -> NDArray[np.bool_]:
        found = kv_gib >= self.smallest_gib
        return found if self.beyond is None else found & ~np.stack(self.beyond(points), axis=1)


@dataclass(frozen=True)
class Block:
    """What a block of both arms tells; None: that arm has no capacity there."""

    configuration: Configuration
    kv_bytes: tuple[float | None, float | None]
    capped: tuple[bool, bool]

    @property
    def contrast(self) -> float | None:
        """None without a baseline; an arm without capacity lacks all of it."""
        baseline, against = self.kv_bytes
        return None if baseline is None else 1.0 - (against or 0.0) / baseline


class Machine:
    """Executes blocks one after the other; drift and bursts are its own, from the seed and the order of blocks."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self._landscape = landscape
        self._random = np.random.default_rng([seed, 1])
        self._blocks = 0
        self._slow_gib = 0.0

    def execute(self, configuration: Configuration) -> Block:
        land, noise, draw = self._landscape, self._landscape.noise, self._random
        point = np.array([[float(configuration[axis]) for axis in AXES]])
        fresh = np.sqrt(1 - SLOWNESS**2) * draw.standard_normal()
        self._slow_gib = SLOWNESS * self._slow_gib + noise.slow_gib * fresh
        common = self._slow_gib + noise.shared_gib * draw.standard_normal()
        common += noise.transient_gib * np.exp(-self._blocks / 8)
        taken = common + noise.arm_gib * draw.standard_normal(2)
        taken += (draw.random(2) < noise.burst_chance) * draw.uniform(4, 8, 2)
        taken[draw.integers(2)] += noise.carry_over_gib
        self._blocks += 1
        kv = land.uncapped_gib(point)[0] - land.gain(point)[0] * taken
        kv *= 1 + noise.share * draw.standard_normal(2)
        possible = land.possible(point, kv[None])[0]
        seen = np.minimum(kv, land.cap_gib)
        return Block(
            configuration,
            tuple(float(x) * GIB if ok else None for x, ok in zip(seen, possible, strict=True)),  # type: ignore[arg-type]
            tuple(bool(ok and x >= land.cap_gib) for x, ok in zip(kv, possible, strict=True)),  # type: ignore[arg-type]
        )

    def shuffled(self, planned: list[Configuration]) -> list[Configuration]:
        """In random order, so that drift is no axis of a grid."""
        return [planned[place] for place in self._random.permutation(len(planned))]


def space(searched: tuple[str, ...]) -> Space:
    found: dict[str, IntRange | FractionRange | int | float] = {}
    for axis, (low, high) in RANGES.items():
        if axis not in searched:
            found[axis] = FIXED[axis]
        elif axis == "memory_fraction":
            found[axis] = FractionRange(low=low, high=high)
        else:
            found[axis] = IntRange(low=int(low), high=int(high), log=True)
    return Space.model_validate(found)


def units(points: Points) -> Array:
    """Places in the unit cube; batch and tokens by their logarithm."""
    low, high = np.array(list(RANGES.values()), dtype=float).T
    found = np.empty_like(points)
    found[:, :2] = np.log(points[:, :2] / low[:2]) / np.log(high[:2] / low[:2])
    found[:, 2] = (points[:, 2] - low[2]) / (high[2] - low[2])
    return found


def configurations(places: Array, searched: tuple[str, ...]) -> list[Configuration]:
    """Configurations at places of the unit cube of the searched axes; batch and tokens are whole."""
    found = []
    for place in places:
        made: Configuration = dict(FIXED)
        for axis, u in zip(searched, map(float, place), strict=True):
            low, high = RANGES[axis]
            made[axis] = (
                low + (high - low) * u if axis == "memory_fraction" else round(low * (high / low) ** u)
            )
        found.append({axis: made[axis] for axis in AXES})
    return found


def as_points(found: list[Configuration]) -> Points:
    return np.array([[float(each[axis]) for axis in AXES] for each in found])


def cells(searched: tuple[str, ...]) -> Points:
    """The held-out configurations: one anywhere in each of equal cells, so that a share of them is a share of the volume.

    Not in their centres: these lie in planes, and a cliff along one of them would have all of it on one side.
    """
    counts = CELLS[len(searched)]
    corners = np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, counts), indexing="ij")], axis=1)
    within = np.random.default_rng(0).random(corners.shape)
    return as_points(configurations((corners + within) / counts, searched))


# ---- the makers ---------------------------------------------------------------------------------------------


def _near(draw: np.random.Generator, value: float, share: float) -> float:
    return value * draw.uniform(1 - share, 1 + share)


def _all_terms(points: Points) -> Array:
    """A constant, the order of magnitude of the batch, tokens."""
    return np.stack([np.ones(len(points)), units(points)[:, 0], points[:, 1] / 32768], axis=1)


def _memfree(
    draw: np.random.Generator, name: str, more: tuple[float, ...], searched: tuple[str, ...] = AXES
) -> Landscape:
    """TensorRT-LLM's way: a fraction of what is left after weights, activations and graphs."""
    base, activation, graphs = _near(draw, 70, 0.05), _near(draw, 12, 0.15), _near(draw, 6.4, 0.15)
    knee = draw.choice([64, 128, 256])

    def law(points: Points) -> Array:
        peak = base + activation * points[:, 1] / 32768 + graphs * np.minimum(points[:, 0], knee) / knee
        return points[:, 2] * (TOTAL_GIB - peak)

    jittered = tuple(_near(draw, each, 0.1) for each in more)
    return Landscape(name, searched, law, lambda points: points[:, 2], _all_terms, jittered)


def _memavailable(draw: np.random.Generator) -> Landscape:
    """vLLM's and SGLang's way: a fraction of everything, less what the engine itself needs."""
    base, activation, graphs = _near(draw, 16, 0.05), _near(draw, 6, 0.15), _near(draw, 4, 0.15)

    def law(points: Points) -> Array:
        needed = base + activation * points[:, 1] / 32768 + graphs * np.minimum(points[:, 0], 128) / 128
        return points[:, 2] * TOTAL_GIB - needed

    more = tuple(_near(draw, each, 0.1) for each in (0.8, 0.8, 3.0))
    return Landscape("memavailable", AXES, law, lambda points: np.ones(len(points)), _all_terms, more)


def _wrong_law(draw: np.random.Generator) -> Landscape:
    """Neither: growth that is not linear in fraction, tokens or batch."""
    base, activation, graphs = _near(draw, 16, 0.05), _near(draw, 7, 0.15), _near(draw, 5, 0.15)

    def law(points: Points) -> Array:
        found = TOTAL_GIB * (1 - (1 - points[:, 2]) ** 1.3) - base
        return found - activation * (points[:, 1] / 32768) ** 1.6 - graphs * np.sqrt(points[:, 0] / 256)

    def terms(points: Points) -> Array:
        tokens = units(points)[:, 1]
        return np.stack([np.ones(len(points)), np.sqrt(points[:, 0] / 256), tokens**2], axis=1)

    more = tuple(_near(draw, each, 0.1) for each in (1.4, 3.0, 5.0))
    return Landscape("wrong_law", AXES, law, lambda points: points[:, 2], terms, more, contained=False)


STEEP = (0.6, 0.8, 7.0)


def _interaction(draw: np.random.Generator) -> Landscape:
    made = _memfree(draw, "interaction", (0.8, 0.3, 0.8))
    strength = _near(draw, 5.5, 0.1)

    def beside(points: Points) -> Array:
        where = units(points)
        return strength * where[:, 0] * where[:, 1]

    return replace(made, beside=beside, contained=False)


def _bump(draw: np.random.Generator) -> Landscape:
    made = _memfree(draw, "bump", STEEP)
    bumps = [(7.0, draw.uniform(0.25, 0.45, 3)), (-3.0, draw.uniform(0.6, 0.8, 3))]

    def beside(points: Points) -> Array:
        away = [(np.square(units(points) - centre).sum(axis=1), height) for height, centre in bumps]
        return np.sum([height * np.exp(-squared / (2 * 0.2**2)) for squared, height in away], axis=0)

    return replace(made, beside=beside, contained=False, margin=0.1)


def _cliff(draw: np.random.Generator) -> Landscape:
    made = _memfree(draw, "cliff", (0.4, 0.4, 2.5))
    edges = draw.uniform(1.45, 1.55), draw.uniform(1.2, 1.3)

    def beyond(points: Points) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        step = units(points)[:, :2].sum(axis=1)
        return step > edges[0], step > edges[1]

    return replace(made, beyond=beyond, smallest_gib=12.0, contained=False)


def _near_null(draw: np.random.Generator) -> Landscape:
    """The contrast is just below a point under the margin, everywhere."""
    made = _memfree(draw, "near_null", ())

    def left(points: Points) -> Array:
        return (made.law(points) / points[:, 2])[:, None]

    return replace(made, terms=left, coefficients=(0.039,))


def _ridge(draw: np.random.Generator) -> Landscape:
    made = _memfree(draw, "plane_ridge", (1.0, 0.0, 0.0), SEARCHED[2])
    middle, height = draw.uniform(1.0, 1.2), _near(draw, 4, 0.1)

    def beside(points: Points) -> Array:
        return height * np.exp(-(((units(points)[:, :2].sum(axis=1) - middle) / 0.2) ** 2))

    return replace(made, beside=beside, contained=False)


def _step(draw: np.random.Generator) -> Landscape:
    made = _memfree(draw, "line_step", (1.2, 0.0, 0.0), SEARCHED[1])
    middle, height = draw.uniform(0.4, 0.6), _near(draw, 3, 0.1)

    def beside(points: Points) -> Array:
        return height / (1 + np.exp(-(units(points)[:, 1] - middle) / 0.02))

    return replace(made, beside=beside, contained=False)


def _quiet(gib: float, **more: float) -> Noise:
    return Noise(arm_gib=gib, shared_gib=gib, **more)


MAKERS: dict[str, Callable[[np.random.Generator], Landscape]] = {
    "steep_low": lambda draw: replace(_memfree(draw, "steep_low", STEEP), noise=_quiet(0.3)),
    "steep_high": lambda draw: replace(_memfree(draw, "steep_high", STEEP), noise=_quiet(2.0, share=0.01)),
    "flat_low": lambda draw: replace(_memfree(draw, "flat_low", (1.4, 0.7, 0.6)), noise=_quiet(0.3)),
    "capped": lambda draw: replace(_memfree(draw, "capped", STEEP), cap_gib=26.0),
    "heavy": lambda draw: replace(_memfree(draw, "heavy", STEEP), noise=_quiet(0.5, burst_chance=0.05)),
    "drift": lambda draw: replace(
        _memfree(draw, "drift", STEEP), noise=_quiet(0.3, transient_gib=1.5, slow_gib=0.8, carry_over_gib=0.3)
    ),
    "memavailable": lambda draw: replace(_memavailable(draw), noise=_quiet(0.5)),
    "null": lambda draw: replace(_memfree(draw, "null", (0.0, 0.0, 0.0)), noise=_quiet(1.0)),
    "near_null": lambda draw: replace(_near_null(draw), noise=_quiet(0.5)),
    "interaction": _interaction,
    "bump": _bump,
    "cliff": _cliff,
    "wrong_law": _wrong_law,
    "plane_steep": lambda draw: _memfree(draw, "plane_steep", STEEP, SEARCHED[2]),
    "plane_ridge": _ridge,
    "line_steep": lambda draw: replace(_memfree(draw, "line_steep", STEEP, SEARCHED[1]), noise=_quiet(0.3)),
    "line_noisy": lambda draw: replace(_memfree(draw, "line_noisy", STEEP, SEARCHED[1]), noise=_quiet(1.0)),
    "line_step": _step,
}

DIVERGENT_VOLUME = {
    **dict.fromkeys(
        ("steep_low", "steep_high", "heavy", "drift", "plane_steep", "line_steep", "line_noisy"), (0.30, 0.42)
    ),
    **dict.fromkeys(("null", "near_null"), (0.0, 0.0)),
    "flat_low": (0.04, 0.35),
    "capped": (0.13, 0.27),
    "memavailable": (0.18, 0.30),
    "interaction": (0.35, 0.54),
    "bump": (0.14, 0.28),
    "cliff": (0.10, 0.28),
    "wrong_law": (0.17, 0.34),
    "plane_ridge": (0.30, 0.44),
    "line_step": (0.38, 0.63),
}
"""Least and most of the volume that diverges, whatever the seed."""


def make(name: str, seed: int) -> Landscape:
    return MAKERS[name](np.random.default_rng([seed, 0]))
