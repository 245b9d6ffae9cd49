"""In which scale capacities are learned. Each family of laws has its own, and its own columns.

The scale z of a capacity KV is

    a law    z = KV / gain, where the noise is even
    none     z = log KV
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import law
from .cube import Cube, Floats
from .process import Inputs

Family = law.Family | None
TINY = 1e-12
"""The least of which a logarithm is taken: a rate may be far below one token a second."""


@dataclass(frozen=True)
class Scale:
    """A family's coordinates, over one cube."""

    cube: Cube
    family: Family

    def gain(self, raw: Floats) -> Floats:
        return np.ones(len(raw)) if self.family is None else law.gain(self.family, self.engine(raw))

    def of_bytes(self, kv_bytes: Floats, raw: Floats) -> Floats:
        if self.family is None:
            return np.asarray(np.log(np.maximum(kv_bytes, TINY)))
        return np.asarray(kv_bytes / self.gain(raw)[:, None])

    def bytes_of(self, z: Floats, raw: Floats) -> Floats:
        """The last dimension of z is that of raw."""
        return np.exp(z) if self.family is None else z * self.gain(raw)

    def log_density(self, kv_bytes: Floats, raw: Floats) -> Floats:
        """What turns a density of z into one of bytes, for two arms."""
        if self.family is None:
            return np.asarray(-np.log(np.maximum(kv_bytes, TINY)).sum(axis=1))
        return np.asarray(-2 * np.log(self.gain(raw)))

    def inputs(self, raw: Floats) -> tuple[Inputs, Inputs]:
        """For the common part and for the difference. Columns are even over the cube: mean 0, deviation 1."""
        unit = self.cube.unit(raw)
        of_common, of_difference, doubtful = _columns(self, raw)
        centres, widths = _evening(self)
        even = [
            (columns - centre) / width
            for columns, centre, width in zip(
                (of_common, of_difference, doubtful), centres, widths, strict=True
            )
        ]
        return Inputs(unit, even[0], even[2]), Inputs(unit, even[1], even[2])

    def engine(self, raw: Floats) -> Floats:
        assert self.cube.engine_columns  # noqa: S101  # a family is only chosen where there are
        return raw[:, self.cube.engine_columns]


def _columns(scale: Scale, raw: Floats) -> tuple[Floats, Floats, Floats]:
    if scale.family is None:
        constant = np.ones((len(raw), 1))
        return constant, constant, scale.cube.unit(raw)
    engine = scale.engine(raw)
    return (
        law.capacity_terms(scale.family, engine),
        law.difference_terms(engine),
        law.doubtful_terms(engine),
    )


@lru_cache(maxsize=64)
def _evening(scale: Scale) -> tuple[list[Floats], list[Floats]]:
    """Centres and widths of all columns over the cube. What does not vary becomes 0; the constant stays 1."""
    raw = np.vstack([scale.cube.filling(256, seed=0), scale.cube.corners()])
    centres, widths = [], []
    for place, columns in enumerate(_columns(scale, raw)):
        centre, width = columns.mean(axis=0), columns.std(axis=0)
        width[width < 1e-9 * (1 + np.abs(centre))] = 1.0
        if place < 2:
            centre[0], width[0] = 0.0, 1.0
        centres.append(centre)
        widths.append(width)
    return centres, widths
