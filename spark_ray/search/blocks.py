"""Blocks as arrays, and what is known of both arms of each; the columns of two are the baseline and the other arm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .kernel import Floats
from .mixture import Moments

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Data:
    raw: Floats
    kv_bytes: Floats  # NaN: no capacity
    capped: Mask
    one_level: bool = True  # both arms need the same least capacity

    @property
    def failed(self) -> Mask:
        return np.isnan(self.kv_bytes)

    @property
    def measured(self) -> Mask:
        return ~self.failed & ~self.capped

    @property
    def floor_bytes(self) -> Floats:
        """The least capacity with which each arm ever worked, or either; infinite if none did."""
        least = np.where(self.failed, np.inf, self.kv_bytes).min(axis=0, initial=np.inf)
        return np.full(2, least.min()) if self.one_level else np.asarray(least)


@dataclass(frozen=True)
class Known:
    """z of both arms as normal: variance 0 where measured, UNKNOWN where nothing is known."""

    mean: Floats
    variance: Floats

    def difference(self) -> tuple[Floats, Floats]:
        return self.mean[:, 0] - self.mean[:, 1], self.variance.sum(axis=1)

    def common(self, difference: Moments) -> tuple[Floats, Floats]:
        """An arm that is not measured is known better through the other, if that one is."""
        mean, variance = self.mean.copy(), self.variance.copy()
        for arm, sign in ((0, 1.0), (1, -1.0)):
            through = (self.variance[:, arm] > 0) & (self.variance[:, 1 - arm] == 0)
            share = self.variance[:, arm] / (self.variance[:, arm] + difference.function)
            told = share * (self.mean[:, 1 - arm] + sign * difference.mean) + (1 - share) * self.mean[:, arm]
            mean[:, arm] = np.where(through, told, mean[:, arm])
            variance[:, arm] = np.where(through, share * difference.function, variance[:, arm])
        return mean.mean(axis=1), variance.sum(axis=1) / 4


def of_arms(common: Moments, difference: Moments) -> Iterator[tuple[int, Floats, Floats, float]]:
    """Of each arm: which, mean, variance of the function, and noise."""
    for arm, sign in ((0, 1.0), (1, -1.0)):
        function = common.function + difference.function / 4
        yield arm, common.mean + sign * difference.mean / 2, function, common.noise + difference.noise / 4
