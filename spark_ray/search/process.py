"""One Gaussian process over the space: a law's columns, doubtful columns, a smooth residual, drift and noise.

    value = certain @ a + doubtful @ b + residual(unit cube) + drift(order) + noise

`a` has a wide prior, so the law is fitted as by least squares. Drift is what neighbours in time have in common, as a host does
not forget at once; it is not part of what is predicted. The variances of `b`, of residual, drift and noise, and the length
scales of the residual are learned, each with a prior of its own, by maximising the posterior. scikit-learn does the learning; added are
the kernel and the priors. Everything inside is standardised by offset and scale.

The home of scikit-learn in the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.linalg.lapack import dpotrf, dpotri
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel

Floats = NDArray[np.float64]
Said = tuple[Floats, Floats]
"""Means and variances."""
Turned = tuple[int, int, float]
"""Two columns of the cube and an angle, radians, by which they are turned."""

WIDE = 10.0
"""Prior standard deviation of a certain term, in standard deviations of the data."""
JITTER = 1e-8
FORGOTTEN_BLOCKS = 1e3
VARIANCES = 4
BOUNDS = (1e-8, 1e8)
DRIFT_BLOCKS = 5.0
"""Over how many blocks a drift is forgotten, by a factor e."""
START_UP = 2.0
"""Standard deviation of what a fresh host differs by, over that of drift."""
STEPS = 25
"""Of the optimiser, at most: what it gains later is within the priors' width."""
UNINFORMATIVE = 100.0
"""A multiplier of the noise above which a value has no say in the hyperparameters."""


class MapKernel(Kernel):  # type: ignore[misc]  # scikit-learn is not followed by mypy
    """The covariance of `Inputs.matrix`: linear in some columns, Matern 5/2 (or Gaussian) in others, then of drift and noise.

    One kernel in place of a sum of scikit-learn's, which looks its hyperparameters up by name at every step. Learned are
    the logarithms of the variances of doubtful columns, residual, drift and noise, and of the length scales. Drift (by the
    last column but one) and noise (by the last) are of measured values, so they are in no covariance between two sets of places.
    """

    def __init__(
        self, certain: slice, doubtful: slice, variances: tuple[float, ...], lengths: tuple[float, ...],
        turned: Turned | None = None, gaussian: bool = False,
    ) -> None:  # fmt: skip
        self.certain, self.doubtful = certain, doubtful
        self.variances, self.lengths = variances, lengths
        self.turned, self.gaussian = turned, gaussian

    def axes(self, X: Floats) -> Floats:
        """Along which the residual has its length scales."""
        found = X[:, : len(self.lengths)]
        if self.turned is None:
            return found
        left, right, angle = self.turned
        found = found.copy()
        along, across = np.cos(angle), np.sin(angle)
        found[:, left] = along * X[:, left] + across * X[:, right]
        found[:, right] = along * X[:, right] - across * X[:, left]
        return found

    @property
    def theta(self) -> Floats:
        return np.asarray(np.log([*self.variances, *self.lengths]))

    @theta.setter
    def theta(self, theta: Floats) -> None:
        values = tuple(np.exp(theta).tolist())
        self.variances, self.lengths = values[:VARIANCES], values[VARIANCES:]

    @property
    def bounds(self) -> Floats:
        return np.asarray(np.log([BOUNDS] * self.n_dims))

    @property
    def n_dims(self) -> int:
        return VARIANCES + len(self.lengths)

    def __call__(self, X: Floats, Y: Floats | None = None, eval_gradient: bool = False) -> Any:  # noqa: ARG002  # never asked
        of_doubtful, of_residual, of_drift, of_noise = self.variances
        other = X if Y is None else Y
        certain = WIDE**2 * (X[:, self.certain] @ other[:, self.certain].T)
        axes = [self.axes(each) / self.lengths for each in (X, other)]
        if self.gaussian:
            covariance = np.exp(-cdist(*axes, "sqeuclidean") / 2)
        else:
            root = cdist(*axes)
            root *= np.sqrt(5)
            covariance = root * (1 + root / 3)
            covariance += 1
            covariance *= np.exp(np.negative(root, out=root), out=root)
        covariance *= of_residual
        covariance += certain + of_doubtful * (X[:, self.doubtful] @ other[:, self.doubtful].T)
        if Y is not None:
            return covariance
        drift = of_drift * _drift(X[:, -2] / DRIFT_BLOCKS)
        return covariance + drift + np.diag(of_noise * X[:, -1])

    def diag(self, X: Floats) -> Floats:
        """Of the function itself."""
        of_doubtful, of_residual, _, _ = self.variances
        certain = WIDE**2 * (X[:, self.certain] ** 2).sum(axis=1)
        doubtful = of_doubtful * (X[:, self.doubtful] ** 2).sum(axis=1)
        return np.asarray(certain + doubtful + of_residual)

    def is_stationary(self) -> bool:
        return False

    def _check_bounds_params(self) -> None:
        """The priors keep everything from its bounds."""


def _drift(order: Floats) -> Floats:
    """What neighbours in time share, and what wears off after a start."""
    wears_off = START_UP * np.exp(-order)
    return np.asarray(np.exp(-np.abs(np.subtract.outer(order, order))) + np.outer(wears_off, wears_off))


class _Regressor(GaussianProcessRegressor):  # type: ignore[misc]
    """Maximises the posterior of the hyperparameters: their logarithms are normal around `kernel`, by `spread`.

    scikit-learn's, but for the likelihood, which is worked out here at once from what does not change with the
    hyperparameters: in a fraction of the time.
    """

    def __init__(
        self, kernel: MapKernel, *, spread: Floats, alpha: float = JITTER, optimizer: Any = None
    ) -> None:
        super().__init__(kernel, alpha=alpha, optimizer=optimizer)
        self.spread = spread

    def fit(self, X: Floats, y: Floats) -> Any:
        axes = self.kernel.axes(X).T
        self._squared = np.square(axes[:, :, None] - axes[:, None, :])
        self._certain = WIDE**2 * (X[:, self.kernel.certain] @ X[:, self.kernel.certain].T)
        doubtful = X[:, self.kernel.doubtful] @ X[:, self.kernel.doubtful].T
        self._linear = np.stack([doubtful, _drift(X[:, -2] / DRIFT_BLOCKS), np.diag(X[:, -1])])
        return super().fit(X, y)

    def log_marginal_likelihood(
        self, theta: Any = None, eval_gradient: bool = False, clone_kernel: bool = True
    ) -> Any:
        if theta is None:
            return self.log_marginal_likelihood_value_
        off = (theta - self.kernel.theta) / self.spread
        if not eval_gradient:
            return super().log_marginal_likelihood(theta, clone_kernel=clone_kernel) - off @ off / 2
        found, gradient = self._likelihood(np.exp(theta))
        return found - off @ off / 2, gradient - off / self.spread

    def _likelihood(self, variances_and_lengths: Floats) -> tuple[float, Floats]:
        of_doubtful, of_residual, of_drift, of_noise = variances_and_lengths[:VARIANCES]
        apart = self._squared / np.square(variances_and_lengths[VARIANCES:])[:, None, None]
        if self.kernel.gaussian:
            slope = residual = of_residual * np.exp(-apart.sum(axis=0) / 2)
        else:
            root = np.sqrt(5 * apart.sum(axis=0))
            decay = of_residual * np.exp(-root)
            residual = (1 + root + root**2 / 3) * decay
            slope = decay * (1 + root) * 5 / 3
        linear = np.array([of_doubtful, of_drift, of_noise])
        covariance = self._certain + residual + np.einsum("k,kij->ij", linear, self._linear)
        covariance[np.diag_indices_from(covariance)] += self.alpha
        factor, failed = dpotrf(covariance)
        if failed:
            return -np.inf, np.zeros_like(variances_and_lengths)
        weights = cho_solve((factor, False), self.y_train_, check_finite=False)
        found = -(self.y_train_ @ weights + len(weights) * np.log(2 * np.pi)) / 2
        upper, _ = dpotri(factor)
        pull = (np.outer(weights, weights) - np.triu(upper) - np.triu(upper, 1).T) / 2
        by_doubtful, by_drift, by_noise = linear * np.einsum("kij,ij->k", self._linear, pull)
        by_length = np.einsum("kij,ij->k", apart, pull * slope)
        by_residual = (pull * residual).sum()
        return (
            float(found - np.log(np.diag(factor)).sum()),
            np.array([by_doubtful, by_residual, by_drift, by_noise, *by_length]),
        )


def _climb(objective: Callable[..., Any], start: Floats, bounds: Floats) -> tuple[Floats, float]:
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS})
    return found.x, float(found.fun)


# ---- a process ------------------------------------------------------------------------------------------------


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
    gaussian: bool = False
    """The residual is as smooth as a Gaussian bell, and not only as a Matern 5/2 process."""
    turned: Turned | None = None
    """Two axes in place of which the residual has its length scales along two others, at an angle to them."""

    def kernel(self, inputs: Inputs) -> tuple[MapKernel, Floats]:
        """At the medians, and how far each logarithm may go."""
        cube, certain = inputs.cube.shape[1], inputs.certain.shape[1]
        kernel = MapKernel(
            slice(cube, cube + certain),
            slice(cube + certain, -2),
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

        def climb(objective: Callable[..., Any], own: Floats, bounds: Floats) -> tuple[Floats, float]:
            return _climb(objective, start.kernel.theta if start else own, bounds)

        regressor = _Regressor(kernel, spread=spread, optimizer=climb)
        rows = inputs.matrix(multipliers, np.arange(len(inputs), dtype=np.float64))
        regressor.fit(rows[say], (values[say] - offset) / scale)
        return cls(regressor.kernel_, offset, scale)


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
    ) -> None:
        """`order` is when values were measured; left out, one after the other."""
        self.hyper, self.inputs, self.values, self.multipliers = hyper, inputs, values, multipliers
        self._order = np.arange(len(inputs), dtype=np.float64) if order is None else order
        self._matrix = inputs.matrix(multipliers, self._order)
        covariance = hyper.kernel(self._matrix)
        covariance[np.diag_indices_from(covariance)] += JITTER
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
        covariance = of_drift * _drift(self._order / DRIFT_BLOCKS) + np.diag(of_noise * self.multipliers)
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
