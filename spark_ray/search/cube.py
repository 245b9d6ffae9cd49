"""The searched space as numbers: raw configurations, the unit cube that a Gaussian process sees, points that fill it.

A *raw* matrix has a row per configuration and a column per axis, in the order of the axes, in the axes' own units. The
*unit* cube has only the axes that vary, each spread over [0, 1] as it is searched: logarithmically, evenly, or, where
the user listed values, by rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from .. import search_spec
from ..search_spec import Span

Floats = NDArray[np.float64]
Point = dict[str, int | float]
"""A configuration as numbers: a choice that is no number is counted (`divergence_sampler.Axes`)."""

ENGINE_AXES = ("max_batch_size", "max_num_tokens", "memory_fraction")
"""The axes that the sizing laws speak of, in the order of their arguments."""


@dataclass(frozen=True)
class Axis:
    """One searched knob; `levels` are the values of a list or of a single value, and otherwise empty."""

    name: str
    low: float
    high: float
    log: bool = False
    integer: bool = False
    levels: tuple[float, ...] = ()

    @property
    def varies(self) -> bool:
        return self.high > self.low

    def unit(self, values: Floats) -> Floats:
        """Where values lie between the ends, 0 to 1; an axis that does not vary lies in its middle."""
        if not self.varies:
            return np.full_like(values, 0.5)
        if self.levels:
            return np.interp(values, self.levels, np.linspace(0.0, 1.0, len(self.levels)))
        if self.log:
            return np.asarray(np.log(values / self.low) / math.log(self.high / self.low))
        return np.asarray((values - self.low) / (self.high - self.low))

    def value(self, unit: Floats) -> Floats:
        """The searchable values nearest to places between the ends."""
        if self.levels:
            ranks = np.rint(unit * (len(self.levels) - 1)).astype(int)
            return np.asarray(np.asarray(self.levels)[ranks], dtype=np.float64)
        if self.log:
            values = self.low * (self.high / self.low) ** unit
        else:
            values = self.low + (self.high - self.low) * unit
        return np.clip(np.rint(values) if self.integer else values, self.low, self.high)


@dataclass(frozen=True)
class Cube:
    """The axes of a search, as a value: two cubes of the same space are equal."""

    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, space: search_spec.Space | Cube) -> Cube:
        return space if isinstance(space, Cube) else cls(tuple(axis_of(*each) for each in space.axes.items()))

    @property
    def varying(self) -> tuple[int, ...]:
        """The axes that the unit cube has. A space of a single point keeps one, so that nothing is special there."""
        return tuple(place for place, axis in enumerate(self.axes) if axis.varies) or (0,)

    @property
    def dimensions(self) -> int:
        return len(self.varying)

    @property
    def engine_columns(self) -> tuple[int, int, int] | None:
        """The places of batch, tokens and fraction; None if this space is not an engine's."""
        names = [axis.name for axis in self.axes]
        if not set(ENGINE_AXES) <= set(names):
            return None
        batch, tokens, fraction = (names.index(name) for name in ENGINE_AXES)
        return batch, tokens, fraction

    @property
    def product(self) -> tuple[int, int, float] | None:
        """The columns of batch and tokens in the unit cube, and the angle from the first one to where their product grows.

        None: not both of them are searched by their logarithm.
        """
        if not self.engine_columns:
            return None
        batch, tokens, _ = self.engine_columns
        both = self.axes[batch], self.axes[tokens]
        if not all(axis.log and axis.varies for axis in both):
            return None
        along = [math.log(axis.high / axis.low) for axis in both]
        return self.varying.index(batch), self.varying.index(tokens), math.atan2(along[1], along[0])

    def raw(self, configurations: Iterable[Mapping[str, float]] | Floats) -> Floats:
        """Configurations as a raw matrix; a matrix stays as it is."""
        if not isinstance(configurations, np.ndarray):
            configurations = np.array([[each[axis.name] for axis in self.axes] for each in configurations])
        return np.asarray(configurations, dtype=np.float64).reshape(-1, len(self.axes))

    def unit(self, raw: Floats) -> Floats:
        return np.column_stack([self.axes[place].unit(raw[:, place]) for place in self.varying])

    def snap(self, unit: Floats) -> Floats:
        """The raw configurations that can be run, nearest to points of the unit cube.

        A step holds at least one token of each sequence, so tokens are raised to the batch where an engine has both.
        """
        columns = [axis.value(np.full(len(unit), 0.5)) for axis in self.axes]
        for column, place in enumerate(self.varying):
            columns[place] = self.axes[place].value(unit[:, column])
        if self.engine_columns:
            batch, tokens, _ = self.engine_columns
            ceiling = self.axes[tokens].high
            if not self.axes[tokens].levels:
                columns[tokens] = np.minimum(np.maximum(columns[tokens], columns[batch]), ceiling)
        return np.column_stack(columns)

    def configurations(self, raw: Floats) -> list[Point]:
        """Rows as configurations, integers as int."""
        return [
            {axis.name: int(v) if axis.integer else float(v) for axis, v in zip(self.axes, row, strict=True)}
            for row in raw
        ]

    def filling(self, count: int, seed: int) -> Floats:
        """The first points of a scrambled Sobol sequence, raw: a longer one begins with a shorter one."""
        return self.snap(_sobol(self.dimensions, math.ceil(math.log2(max(count, 2))), seed)[:count])

    def corners(self) -> Floats:
        """All corners, raw; the first twelve axes only, which is more than a search has."""
        ends = list(product((0.0, 1.0), repeat=min(self.dimensions, 12)))
        rest = np.full((len(ends), self.dimensions - len(ends[0])), 0.5)
        return self.snap(np.column_stack([np.array(ends), rest]))


@lru_cache(maxsize=64)
def _sobol(dimensions: int, log2_count: int, seed: int) -> Floats:
    drawn: Floats = qmc.Sobol(dimensions, scramble=True, seed=seed).random_base2(log2_count)
    drawn.setflags(write=False)
    return drawn


def axis_of(name: str, searched: search_spec.Axis) -> Axis:
    """A list of numbers in their order; of anything else, by the place in the list."""
    if isinstance(searched, Span):
        return Axis(
            name, searched.low, searched.high, log=searched.log, integer=isinstance(searched.low, int)
        )
    numbers = all(map(is_number, searched))
    levels: tuple[Any, ...] = tuple(sorted(searched)) if numbers else tuple(range(len(searched)))
    whole = all(isinstance(value, int) for value in levels)
    return Axis(name, levels[0], levels[-1], integer=whole, levels=levels)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
