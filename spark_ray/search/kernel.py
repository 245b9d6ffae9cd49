"""The covariance of a process, and how its hyperparameters are learned.

scikit-learn does the learning; added are the kernel, the density of a prior, and a likelihood that is worked out at once.

The home of scikit-learn in the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve
from scipy.linalg.lapack import dpotrf, dpotri
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel

Floats = NDArray[np.float64]
Columns = tuple[int, ...] | slice
Turned = tuple[int, int, float]
"""Two columns of the cube and an angle, radians, by which they are turned."""

WIDE = 10.0
"""Prior standard deviation of a certain term, in standard deviations of the data."""
JITTER = 1e-8
VARIANCES = 4
BOUNDS = (1e-8, 1e8)
DRIFT_BLOCKS = 5.0
"""Over how many blocks a drift is forgotten, by a factor e."""
START_UP = 2.0
"""Standard deviation of what a fresh host differs by, over that of drift."""
STEPS = 25
"""Of the optimiser, at most: what it gains later is within the priors' width."""


class MapKernel(Kernel):  # type: ignore[misc]  # scikit-learn is not followed by mypy
    """The covariance of `Inputs.matrix`: linear in some columns, Matern 5/2 (or Gaussian) in others, then of drift and noise.

    One kernel in place of a sum of scikit-learn's, which looks its hyperparameters up by name at every step. Learned are
    the logarithms of the variances of doubtful columns, residual, drift and noise, and of the length scales. Drift (by the
    last column but one) and noise (by the last) are of measured values, so they are in no covariance between two sets of places.
    """

    def __init__(
        self, certain: Columns, doubtful: Columns, variances: tuple[float, ...], lengths: tuple[float, ...],
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
        covariance = self.without_noise(X, Y)
        if Y is None:
            covariance[np.diag_indices_from(covariance)] += self.variances[3] * X[:, -1]
        return covariance

    def without_noise(self, X: Floats, Y: Floats | None = None) -> Floats:
        """Drift is in it among measured values (Y is None)."""
        of_doubtful, of_residual, of_drift, _ = self.variances
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
        if Y is None:
            covariance += of_drift * drift_covariance(X[:, -2] / DRIFT_BLOCKS)
        return np.asarray(covariance)

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


def drift_covariance(order: Floats) -> Floats:
    """What neighbours in time share, and what wears off after a start."""
    wears_off = START_UP * np.exp(-order)
    return np.asarray(np.exp(-np.abs(np.subtract.outer(order, order))) + np.outer(wears_off, wears_off))


class Regressor(GaussianProcessRegressor):  # type: ignore[misc]
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
        self._linear = np.stack([doubtful, drift_covariance(X[:, -2] / DRIFT_BLOCKS), np.diag(X[:, -1])])
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


def learned(
    kernel: MapKernel, spread: Floats, rows: Floats, values: Floats, start: MapKernel | None = None
) -> MapKernel:
    """With the most probable hyperparameters, given standardised values (n,) at rows (n, columns).

    Args:
        kernel: With the medians of their prior.
        spread: Standard deviations of their logarithms.
        rows: Of `Inputs.matrix`.
        values: One a row.
        start: Where to climb from, if not at the medians.
    """

    def climb(objective: Callable[..., Any], own: Floats, bounds: Floats) -> tuple[Floats, float]:
        at = start.theta if start else own
        found = minimize(
            objective, at, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS}
        )
        return found.x, float(found.fun)

    found: MapKernel = Regressor(kernel, spread=spread, optimizer=climb).fit(rows, values).kernel_
    return found
