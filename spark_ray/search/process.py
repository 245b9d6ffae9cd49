"""One Gaussian process over the space: a law's columns, doubtful columns, a smooth residual, drift and noise.

    value = certain @ a + doubtful @ b + residual(unit cube) + drift(order) + noise

`a` has a wide prior, so the law is fitted as by least squares; which columns are certain a prior may say otherwise. Drift is what neighbours in time have in common, as a host does
not forget at once; it is not part of what is predicted. The variances of `b`, of residual, drift and noise, and the length
scales of the residual are learned, each with a prior of its own, by maximising the posterior (`kernel`). Everything inside is
standardised by offset and scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from .kernel import DRIFT_BLOCKS, JITTER, Floats, MapKernel, Turned, drift_covariance, learned

Said = tuple[Floats, Floats]
"""Means and variances."""

FORGOTTEN_BLOCKS = 1e3
UNINFORMATIVE = 100.0
"""A multiplier of the noise above which a value has no say in the hyperparameters."""


@dataclass(frozen=True)
class Inputs:
    """Where values are: the columns of a process, a row for each."""

    cube: Floats
    certain: Floats
    doubtful: Floats

    def __len__(self) -> int:
        return len(self.cube)

    def __getitem__(self, rows: NDArray[np.bool_]) -> Inputs:
        return Inputs(self.cube[rows], self.certain[rows], self.doubtful[rows])

    def matrix(self, multipliers: Floats | float = 0.0, order: Floats | float = 0.0) -> Floats:
        """All columns side by side, then the order of measuring and the multiplier of the noise."""
        last = [np.broadcast_to(each, (len(self),)) for each in (order, multipliers)]
        return np.column_stack([self.cube, self.certain, self.doubtful, *last])

    def with_(self, other: Inputs) -> Inputs:
        return Inputs(
            np.vstack([self.cube, other.cube]),
            np.vstack([self.certain, other.certain]),
            np.vstack([self.doubtful, other.doubtful]),
        )


@dataclass(frozen=True)
class Prior:
    """Medians of standard deviations, relative to that of the data, and how far the data may move them (factor e)."""

    doubtful: float
    residual: float
    noise: float
    drift: float = 0.02
    length: float = 0.7
    spread: float = 1.0
    drift_spread: float = 1.0
    noise_spread: float = 0.6  # few values that happen to lie smoothly are no proof of little noise
    length_spread: float = 0.6
    trusted: tuple[int, ...] = ()
    """Doubtful columns that are certain."""
    doubted: tuple[int, ...] = ()
    """Certain columns that are doubtful."""
    gaussian: bool = False
    """The residual is as smooth as a Gaussian bell, and not only as a Matern 5/2 process."""
    turned: Turned | None = None
    """Two axes in place of which the residual has its length scales along two others, at an angle to them."""

    def kernel(self, inputs: Inputs) -> tuple[MapKernel, Floats]:
        """At the medians, and how far each logarithm may go."""
        cube, certain, doubtful = (each.shape[1] for each in (inputs.cube, inputs.certain, inputs.doubtful))
        surely = {*range(certain)} - {*self.doubted} | {certain + each for each in self.trusted}
        kernel = MapKernel(
            tuple(cube + each for each in sorted(surely)),
            tuple(cube + each for each in range(certain + doubtful) if each not in surely),
            (self.doubtful**2, self.residual**2, self.drift**2, self.noise**2),
            (self.length,) * cube,
            self.turned,
            self.gaussian,
        )
        spreads = [2 * each for each in (self.spread, self.spread, self.drift_spread, self.noise_spread)]
        return kernel, np.array(spreads + [self.length_spread] * cube)


@dataclass(frozen=True)
class Hyperparameters:
    """What is learned slowly, and kept between refits; the kernel holds standardised values."""

    kernel: MapKernel
    offset: float
    scale: float

    @property
    def noise_variance(self) -> float:
        """Of one value whose multiplier is 1."""
        return self.kernel.variances[-1] * self.scale**2

    @classmethod
    def learn(
        cls, prior: Prior, inputs: Inputs, values: Floats, multipliers: Floats, *,
        start: Hyperparameters | None = None, standard: tuple[float, float] | None = None,
    ) -> Hyperparameters:  # fmt: skip
        """Values with much noise have no say. `start` is where to climb from; `standard` is offset and scale."""
        say = multipliers < UNINFORMATIVE
        offset, scale = (start.offset, start.scale) if start else standard or _standard(values[say])
        kernel, spread = prior.kernel(inputs)
        if say.sum() < 2:
            return cls(kernel, offset, scale)

        rows = inputs.matrix(multipliers, np.arange(len(inputs), dtype=np.float64))
        standardised = (values[say] - offset) / scale
        return cls(
            learned(kernel, spread, rows[say], standardised, start.kernel if start else None), offset, scale
        )


def _standard(values: Floats) -> tuple[float, float]:
    """Offset and scale, robust where there are enough values."""
    if not len(values):
        return 0.0, 1.0
    offset = float(np.median(values))
    scale = float(np.std(values))
    return offset, scale if scale > 0 else max(abs(offset), 1.0) * 1e-3


class Process:
    """Hyperparameters and the values it is conditioned on, in the unit of the values."""

    def __init__(
        self,
        hyper: Hyperparameters,
        inputs: Inputs,
        values: Floats,
        multipliers: Floats,
        order: Floats | None = None,
        *,
        alike: Process | None = None,
    ) -> None:
        """`order` is when values were measured; left out, one after the other. `alike` has the same hyperparameters, inputs and order."""
        self.hyper, self.inputs, self.values, self.multipliers = hyper, inputs, values, multipliers
        self._order = np.arange(len(inputs), dtype=np.float64) if order is None else order
        self._matrix = inputs.matrix(multipliers, self._order)
        self._without_noise: Floats = (
            alike._without_noise if alike else hyper.kernel.without_noise(self._matrix)
        )
        covariance = self._without_noise + np.diag(hyper.kernel.variances[3] * multipliers + JITTER)
        self._factor = np.linalg.cholesky(covariance)
        self._whitened = self._solve(self._standardised)

    @property
    def _standardised(self) -> Floats:
        return (self.values - self.hyper.offset) / self.hyper.scale

    def _solve(self, right: Floats) -> Floats:
        found: Floats = solve_triangular(self._factor, right, lower=True, check_finite=False)
        return found

    @property
    def noise_variance(self) -> float:
        """Of one value whose multiplier is 1, drift left out."""
        return self.hyper.noise_variance

    @property
    def block_variance(self) -> float:
        """Of a value that is measured some time, around the function: drift and noise."""
        return self.hyper.noise_variance + self.hyper.kernel.variances[2] * self.hyper.scale**2

    @property
    def independent_values(self) -> float:
        """As many values without drift would tell as much of a constant: where a host drifts, neighbours tell the same."""
        of_drift, of_noise = self.hyper.kernel.variances[2:]
        covariance = of_drift * drift_covariance(self._order / DRIFT_BLOCKS) + np.diag(
            of_noise * self.multipliers
        )
        covariance[np.diag_indices_from(covariance)] += JITTER
        return float((of_drift + of_noise) * np.linalg.solve(covariance, np.ones(len(self.values))).sum())

    def predict(self, inputs: Inputs) -> Said:
        """Mean and variance of the function, without noise."""
        rows = inputs.matrix()
        return self._said(rows, self._solve(self.hyper.kernel(self._matrix, rows)))

    def joint(self, left: Inputs, right: Inputs) -> tuple[Said, Said, Floats]:
        """What `predict` says at left and at right, and the covariance between both."""
        a, b = left.matrix(), right.matrix()
        kernel = self.hyper.kernel
        of_a, of_b = (self._solve(kernel(self._matrix, rows)) for rows in (a, b))
        covariance = np.asarray(self.hyper.scale**2 * (kernel(a, b) - of_a.T @ of_b))
        return self._said(a, of_a), self._said(b, of_b), covariance

    def covariance(self, left: Inputs, right: Inputs) -> Floats:
        """Between the function at left and at right, given the values."""
        return self.joint(left, right)[2]

    def _said(self, rows: Floats, projected: Floats) -> Said:
        variance = self.hyper.kernel.diag(rows) - np.einsum("ij,ij->j", projected, projected)
        scale = self.hyper.scale
        mean = self.hyper.offset + scale * (projected.T @ self._whitened)
        return mean, scale**2 * np.maximum(variance, JITTER)

    def leave_one_out(self) -> tuple[Floats, Floats]:
        """Each value predicted by all others: mean and variance, its noise included."""
        inverse = self._solve(np.eye(len(self.values)))
        precision = np.einsum("ij,ij->j", inverse, inverse)
        weights = inverse.T @ self._whitened
        mean = self._standardised - weights / precision
        scale = self.hyper.scale
        return self.hyper.offset + scale * mean, scale**2 / precision

    def with_(self, inputs: Inputs) -> Process:
        """As if measured there once more, at the mean: the mean stays, the variance shrinks.

        Each at a time of its own, as nobody knows what drift it will meet.
        """
        mean, _ = self.predict(inputs)
        later = self._order.max(initial=0.0) + FORGOTTEN_BLOCKS * (
            1 + np.arange(len(inputs), dtype=np.float64)
        )
        return Process(
            self.hyper,
            self.inputs.with_(inputs),
            np.concatenate([self.values, mean]),
            np.concatenate([self.multipliers, np.ones(len(inputs))]),
            np.concatenate([self._order, later]),
        )
