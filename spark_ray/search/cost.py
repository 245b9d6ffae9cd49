"""What a block at a configuration takes, learned from those that were measured: start, treatment, workload and cooldown of all arms.

A ridge regression of the logarithm of seconds on the unit cube: blocks differ by factors, and a sampler that weighs gain
against cost needs no more than the trend.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .acquire import Cost
from .cube import Cube, Point

FEWEST_BLOCKS = 8
RIDGE = 1.0
"""Of slopes per unit of an axis, in blocks that say that there is none."""


def learn(cube: Cube, configurations: Sequence[Point], seconds: Sequence[float]) -> Cost | None:
    """Seconds of a block; None while fewer than FEWEST_BLOCKS tell, when every block costs the same."""
    if len(seconds) < FEWEST_BLOCKS:
        return None
    unit = cube.unit(cube.raw(configurations))
    logarithms = np.log(np.maximum(seconds, 1e-3))
    middle, level = unit.mean(axis=0), logarithms.mean()
    spread = unit - middle
    slopes = np.linalg.solve(
        spread.T @ spread + RIDGE * np.eye(cube.dimensions), spread.T @ (logarithms - level)
    )

    def cost(configuration: Point) -> float:
        place = cube.unit(cube.raw([configuration]))[0]
        return float(np.exp(level + (place - middle) @ slopes))

    return cost
