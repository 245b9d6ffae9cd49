"""Several processes of the same values, each with a weight: what is said is what they say together.

Mean and covariance are those of the mixture. Where processes disagree, that is variance too, and a block there takes it away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from scipy.special import log_ndtr

from .kernel import Floats
from .process import Inputs, Process, Said

UNKNOWN = 1e40
"""A variance beyond all others, in any unit."""


@dataclass(frozen=True)
class Mixture:
    weights: tuple[float, ...]
    processes: tuple[Process, ...]

    @property
    def values(self) -> Floats:
        return self.processes[0].values

    @property
    def noise_variance(self) -> float:
        """Of one value whose multiplier is 1, drift left out."""
        return float(self._mean(lambda each: each.noise_variance))

    @property
    def multipliers(self) -> Floats:
        return np.asarray(
            self._mean(lambda each: each.multipliers * each.noise_variance) / self.noise_variance
        )

    @property
    def block_variance(self) -> float:
        """Of a value that is measured some time, around the function: drift and noise."""
        return float(self._mean(lambda each: each.block_variance))

    @property
    def independent_values(self) -> float:
        """As many values without drift would tell as much of a constant."""
        return float(self._mean(lambda each: each.independent_values))

    def predict(self, inputs: Inputs) -> Said:
        """Mean and variance of the function, without noise."""
        return self._together([each.predict(inputs) for each in self.processes])

    def joint(self, left: Inputs, right: Inputs) -> tuple[Said, Said, Floats]:
        """What `predict` says at left and at right, and the covariance between both."""
        here, there, within = zip(*(each.joint(left, right) for each in self.processes), strict=True)
        weights = np.array(self.weights)
        means, other_means = (np.stack([mean for mean, _ in said]) for said in (here, there))
        between = (weights[:, None] * (means - weights @ means)).T @ (other_means - weights @ other_means)
        covariance = between + sum(weight * each for weight, each in zip(weights, within, strict=True))
        return self._together(here), self._together(there), np.asarray(covariance)

    @cached_property
    def _left_out(self) -> tuple[Floats, Floats]:
        return self._together([each.leave_one_out() for each in self.processes])

    def leave_one_out(self) -> tuple[Floats, Floats]:
        """Each value predicted by all others: mean and variance, its noise included."""
        return self._left_out

    def with_(self, inputs: Inputs) -> Mixture:
        """As if measured there once more, each at its mean: the mean stays, the variance shrinks."""
        return Mixture(self.weights, tuple(each.with_(inputs) for each in self.processes))

    def _mean(self, of: Callable[[Process], float | Floats]) -> Any:
        return sum(weight * of(each) for weight, each in zip(self.weights, self.processes, strict=True))

    def _together(self, said: Sequence[Said]) -> Said:
        weights = np.array(self.weights)
        means, variances = np.stack([mean for mean, _ in said]), np.stack([variance for _, variance in said])
        mean = weights @ means
        return mean, weights @ (variances + (means - mean) ** 2)


# ---- what others say of a value, and a value that is only known from one side ------------------------------------


@dataclass(frozen=True)
class Moments:
    """Each block predicted by all others: mean, variance of the function, and noise of one value."""

    mean: Floats
    function: Floats
    noise: float

    @classmethod
    def of(cls, process: Process | Mixture) -> Self:
        mean, variance = process.leave_one_out()
        function = np.maximum(variance - process.multipliers * process.noise_variance, 0.0)
        return cls(mean, function, process.noise_variance)

    def errors(self, values: Floats) -> Floats:
        """As if every value were as good as any."""
        return (values - self.mean) / np.sqrt(self.function + self.noise)


def one_sided(
    bound: Floats | float, side: Floats | float, mean: Floats, function: Floats, noise: float
) -> tuple[Floats, Floats]:
    """The normal whose product with the prediction has the moments of prediction and "z + noise beyond bound"."""
    total = function + noise
    beyond = side * (mean - bound) / np.sqrt(total)
    ratio = np.exp(-(beyond**2) / 2 - log_ndtr(beyond)) / np.sqrt(2 * np.pi)
    curvature = np.maximum(ratio * (ratio + beyond) / total, 1 / UNKNOWN)
    centre = mean + side * ratio / np.sqrt(total) / curvature
    variance = np.maximum(1 / curvature - total, 1e-3 * noise)  # the noise is added again, as everywhere
    silent = variance > 1e3 * total
    return np.where(silent, 0.0, centre), np.where(silent, UNKNOWN, variance)
