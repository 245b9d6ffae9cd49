"""What is asked of a map, and so where knowing more helps.

    level_set    where does the contrast exceed the margin?
    contrast     how large is it, everywhere?
    boundary     where does each arm stop working, and where does only one of them?
    optimum      which configuration gives each arm the largest capacity?

Whatever is asked, the map is of everything: the target says where blocks go. A wrong answer is one alone of two that works
(`boundary`), and otherwise the wrong side of the margin too, also where sizes or the largest capacity are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr

from .cube import Floats
from .surrogate import Prediction

TargetKind = Literal["level_set", "contrast", "boundary", "optimum"]
UNDECIDED = (0.025, 0.975)


@dataclass(frozen=True)
class Target:
    kind: TargetKind = "level_set"
    margin: float = 0.05
    """Of the contrast: less is no divergence."""

    def divergent(self, said: Prediction, widening: float = 1.0) -> Floats:
        """The chance that arms diverge: one alone works, or both and the contrast is above the margin."""
        one_alone = said.feasible_a + said.feasible_b - 2 * said.feasible_both
        if self.kind == "boundary":
            return one_alone
        above = ndtr((said.contrast_mean - self.margin) / _positive(widening * said.contrast_sd))
        return np.asarray(one_alone + said.feasible_both * above)

    def misclassified(self, said: Prediction, widening: float = 1.0) -> Floats:
        """The chance that calling each place by what is more probable is wrong."""
        chance = self.divergent(said, widening)
        return np.minimum(chance, 1 - chance)

    def undecided(self, said: Prediction, widening: float = 1.0) -> Floats:
        """1 where it is open whether arms diverge, 0 where it is known."""
        chance = self.divergent(said, widening)
        return np.asarray((chance > UNDECIDED[0]) & (chance < UNDECIDED[1]), dtype=np.float64)


def density(mean: Floats, sd: Floats, level: float) -> Floats:
    """Of a normal variable at the level: high where it is near and where little is known."""
    sd = _positive(sd)
    return np.asarray(np.exp(-(((mean - level) / sd) ** 2) / 2) / sd)


def _positive(sd: Floats) -> Floats:
    return np.maximum(sd, 1e-9)
