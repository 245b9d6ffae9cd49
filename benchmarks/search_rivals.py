"""What `search.py` races against: Optuna's samplers, grids, and in one dimension bisection and AIPerf's planners.

Each proposes configurations and is told blocks. Their points go to one plain Gaussian process, the same for all, which makes
the map; a boundary planner says by itself where divergence begins, which is kinder to it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
from landscapes import AXES, FIXED, RANGES, Array, Block, Landscape, Points, as_points, configurations, units
from scipy.interpolate import PchipInterpolator
from scipy.linalg import cho_solve
from scipy.linalg.lapack import dpotrf, dpotri
from scipy.optimize import isotonic_regression, minimize
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from spark_ray.search.space import distributions
from spark_ray.search_spec import Configuration


class Sampler(Protocol):
    """Proposes configurations. None: it is done, or it waits for what is pending."""

    def ask(self) -> Configuration | None: ...
    def tell(self, block: Block) -> None: ...


# ---- Optuna ---------------------------------------------------------------------------------------------------


class OptunaRival:
    """An Optuna sampler that minimises the distance of the contrast from the margin, as its users would."""

    def __init__(self, sampler: optuna.samplers.BaseSampler, landscape: Landscape) -> None:
        known = distributions(landscape.space)
        self._searched = {axis: known[axis] for axis in landscape.searched}
        self._margin = landscape.margin
        self._study = optuna.create_study(sampler=sampler)
        self._pending: list[optuna.Trial] = []

    def ask(self) -> Configuration:
        trial = self._study.ask(self._searched)
        self._pending.append(trial)
        asked = {**FIXED, **trial.params}
        return {axis: asked[axis] for axis in AXES}

    def tell(self, block: Block) -> None:
        trial = self._pending.pop(0)
        if block.contrast is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, abs(block.contrast - self._margin))


def random(landscape: Landscape, seed: int) -> Sampler:
    return OptunaRival(optuna.samplers.RandomSampler(seed=seed), landscape)


def qmc(landscape: Landscape, seed: int) -> Sampler:
    with _experimental():
        return OptunaRival(optuna.samplers.QMCSampler(scramble=True, seed=seed), landscape)


def tpe(landscape: Landscape, seed: int) -> Sampler:
    return OptunaRival(optuna.samplers.TPESampler(seed=seed), landscape)


def optuna_gp(landscape: Landscape, seed: int) -> Sampler:
    with _experimental():
        return OptunaRival(optuna.samplers.GPSampler(seed=seed, deterministic_objective=False), landscape)


def _experimental() -> warnings.catch_warnings[None]:
    return warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning)


# ---- grids ----------------------------------------------------------------------------------------------------

GRID_LEVELS = {1: (3, 4, 6, 8, 12, 16, 24, 32, 64), 2: (3, 4, 5, 6, 8, 10, 12), 3: (3, 4, 5, 6, 7, 8)}


def grid(landscape: Landscape, levels: int) -> list[Configuration]:
    """Every combination of evenly spread levels, both ends included."""
    spread = np.linspace(0, 1, levels)
    places = np.array(list(itertools.product(spread, repeat=len(landscape.searched))))
    return configurations(places, landscape.searched)


# ---- one dimension ----------------------------------------------------------------------------------------------


class Boundary:
    """A planner of max_num_tokens that believes: passes below one number of tokens, fails above it.

    It passes where the contrast is not above the margin. `_plan` yields tokens and is sent the margin left (negative where
    it passes); it ends when the planner is satisfied, and so then does asking.
    """

    def __init__(self, landscape: Landscape, seed: int) -> None:  # noqa: ARG002  # nothing in it is random
        assert landscape.searched == ("max_num_tokens",)
        self._margin = landscape.margin
        low, high = RANGES["max_num_tokens"]
        self.passes: float | None = None
        self.fails: float | None = None
        self._plan = self._search(int(low), int(high))
        self._next: int | None = next(self._plan)

    def _search(self, low: int, high: int) -> Iterator[int]:
        raise NotImplementedError

    def ask(self) -> Configuration | None:
        return None if self._next is None else {**FIXED, "max_num_tokens": self._next}

    def tell(self, block: Block) -> None:
        assert self._next is not None
        left = 1.0 if block.contrast is None else block.contrast - self._margin
        if left <= 0 and (self.fails is None or self._next < self.fails):
            self.passes = max(self._next, self.passes or 0)
        elif left > 0 and (self.passes is None or self._next > self.passes):
            self.fails = min(self._next, self.fails or np.inf)
        self._heard(self._next, left)
        self._next = next(self._plan, None)

    def _heard(self, tokens: int, left: float) -> None: ...

    def diverges(self, points: Points) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Above the boundary; in the middle, by order of magnitude, of what is still open."""
        low, high = RANGES["max_num_tokens"]
        if self.fails is None:
            return np.zeros(len(points), dtype=bool)
        edge = low if self.passes is None else np.sqrt(self.passes * self.fails)
        found: np.ndarray[Any, np.dtype[np.bool_]] = points[:, 1] >= min(edge, high)
        return found

    def _doubling(self, low: int, high: int) -> Iterator[int]:
        """From the low end, twice as much each time, until one fails or the high end is reached."""
        tokens = low
        while True:
            yield tokens
            if self.fails is not None or tokens >= high:
                return
            tokens = min(2 * tokens, high)

    def _open(self, precision: float) -> bool:
        if self.passes is None or self.fails is None:
            return False
        return self.fails - self.passes > max(precision * self.fails, 1)


class Bisection(Boundary):
    """Both ends, then always the middle by order of magnitude, to 1 %."""

    def _search(self, low: int, high: int) -> Iterator[int]:
        yield low
        yield high
        while self._open(0.01):
            assert self.passes is not None
            assert self.fails is not None
            yield round(np.sqrt(self.passes * self.fails))


class Monotonic(Boundary):
    """AIPerf's `monotonic_sla`, by its description: doubling up to the first failure, then bisection to 5 %."""

    def _search(self, low: int, high: int) -> Iterator[int]:
        yield from self._doubling(low, high)
        while self._open(0.05):
            assert self.passes is not None
            assert self.fails is not None
            yield int(self.passes + self.fails) // 2


class SmoothIsotonic(Boundary):
    """AIPerf's `smooth_isotonic`, by its description, without its optional replicates.

    Doubling, three probes inside the bracket, then the root of a monotone cubic through the isotonic regression of all
    probes, probed in turn, until the bracket is within 5 % or a root repeats; two more probes, three times at most, while the
    regression has fewer than three levels.
    """

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self._probes: dict[int, list[float]] = {}
        super().__init__(landscape, seed)

    def _heard(self, tokens: int, left: float) -> None:
        self._probes.setdefault(tokens, []).append(left)

    def _search(self, low: int, high: int) -> Iterator[int]:
        yield from self._doubling(low, high)
        yield from self._inside(0.25, 0.5, 0.75)
        for _ in range(3):
            if not self._open(0.05) or len(set(np.round(self._regression()[1], 9))) >= 3:
                break
            yield from self._inside(0.125, 0.625)
        while self._open(0.05):
            root = self._root()
            if root in self._probes:
                return
            yield root

    def _inside(self, *shares: float) -> Iterator[int]:
        if self.passes is None or self.fails is None:
            return
        low, high = int(self.passes), int(self.fails)
        for tokens in dict.fromkeys(round(low + share * (high - low)) for share in shares):
            if tokens not in self._probes:
                yield tokens

    def _regression(self) -> tuple[Array, Array]:
        tokens = sorted(self._probes)
        means = [float(np.mean(self._probes[each])) for each in tokens]
        return np.array(tokens, dtype=float), isotonic_regression(means).x

    def _root(self) -> int:
        """Inside the bracket; its middle where the curve does not cross zero there."""
        assert self.passes is not None
        assert self.fails is not None
        inside = np.arange(int(self.passes) + 1, int(self.fails))
        curve = PchipInterpolator(*self._regression())(inside)
        crossed = np.flatnonzero((curve[:-1] <= 0) & (curve[1:] > 0))
        return int(inside[crossed[0]] if len(crossed) else inside[len(inside) // 2])


# ---- the plain map ------------------------------------------------------------------------------------------------


FEW_BLOCKS = 40


@dataclass(frozen=True)
class PlainPrediction:
    kv_a_mean: Array
    kv_a_sd: Array
    contrast_mean: Array
    contrast_sd: Array
    feasible_a: Array
    feasible_b: Array

    @property
    def feasible_both(self) -> Array:
        """Its processes know nothing of each other."""
        return self.feasible_a * self.feasible_b


class PlainProcess(GaussianProcessRegressor):
    """scikit-learn's, for a constant times Matern 5/2 with a length for each axis, plus white noise.

    Its likelihood is worked out here for that kernel at once, each pair of places once: a third of the time.
    """

    def fit(self, X: Array, y: Array) -> Any:
        self._pairs = np.triu_indices(len(X), 1)
        self._squared = np.square(X[self._pairs[0]] - X[self._pairs[1]]).T
        return super().fit(X, y)

    def log_marginal_likelihood(
        self, theta: Array | None = None, eval_gradient: bool = False, clone_kernel: bool = True
    ) -> Any:
        if theta is None or not eval_gradient:
            return super().log_marginal_likelihood(theta, eval_gradient, clone_kernel)
        scale, *lengths, noise = np.exp(theta)
        apart = self._squared / np.square(lengths)[:, None]
        root = np.sqrt(5 * apart.sum(axis=0))
        decay = scale * np.exp(-root)
        surface = decay * (1 + root + root**2 / 3)
        covariance = np.diag(np.full(len(self.y_train_), scale + noise + self.alpha))
        covariance[self._pairs] = surface
        factor, failed = dpotrf(covariance)
        if failed:
            return -np.inf, np.zeros_like(theta)
        weights = cho_solve((factor, False), self.y_train_, check_finite=False)
        found = (
            -0.5 * (self.y_train_ @ weights + len(weights) * np.log(2 * np.pi))
            - np.log(np.diag(factor)).sum()
        )
        inverse, _ = dpotri(factor)
        pull = weights[self._pairs[0]] * weights[self._pairs[1]] - inverse[self._pairs]
        alone = 0.5 * (weights @ weights - np.trace(inverse))
        by_length = apart @ (pull * decay * (1 + root)) * 5 / 3
        return found, np.array([pull @ surface + scale * alone, *by_length, noise * alone])


class PlainMap:
    """Plain Gaussian processes: contrast, the logarithm of the baseline's KV, and ±1 for capacity where any failed.

    Matérn 5/2 with a length for each axis, and noise, by maximum likelihood; a fit starts from the last, and from the default too
    while blocks are few.
    """

    def __init__(self, landscape: Landscape) -> None:
        self._columns = [AXES.index(axis) for axis in landscape.searched]
        self._last: dict[str, Array] = {}

    def predict(self, blocks: Sequence[Block], points: Points) -> PlainPrediction:
        at = units(as_points([block.configuration for block in blocks]))[:, self._columns]
        where = units(points)[:, self._columns]
        has = np.array([[kv is not None for kv in block.kv_bytes] for block in blocks])
        both = has.all(axis=1)
        contrast = np.array([block.contrast for block in blocks], dtype=float)
        capacity = np.log(np.array([block.kv_bytes[0] for block in blocks], dtype=float))
        contrast_mean, contrast_sd = self._process("contrast", at[both], contrast[both], where)
        log_mean, log_sd = self._process("capacity", at[has[:, 0]], capacity[has[:, 0]], where)
        kv = np.exp(log_mean)
        feasible = [self._chance(arm, at, has[:, arm], where) for arm in (0, 1)]
        return PlainPrediction(kv, kv * log_sd, contrast_mean, contrast_sd, *feasible)

    def _chance(self, arm: int, at: Array, has: np.ndarray[Any, np.dtype[np.bool_]], where: Array) -> Array:
        if has.all() or not has.any():  # one more than seen, of each
            return np.full(len(where), (has.sum() + 1) / (len(has) + 2))
        mean, sd = self._process(f"feasible {arm}", at, np.where(has, 1.0, -1.0), where)
        return norm.cdf(mean / np.maximum(sd, 1e-6))

    def _process(self, name: str, at: Array, values: Array, where: Array) -> tuple[Array, Array]:
        if len(values) < 2:
            return np.full(len(where), values.mean() if len(values) else 0.0), np.full(len(where), np.inf)
        surface = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(np.full(at.shape[1], 0.5), (0.05, 20.0), nu=2.5)
        kernel = surface + WhiteKernel(0.1, (1e-5, 2.0))
        process = PlainProcess(kernel, normalize_y=True, optimizer=self._climb(name, len(at)))
        # a length at its bound is an answer, not a failure
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            process.fit(at, values)
        self._last[name] = process.kernel_.theta
        process.kernel_.k2.noise_level = 1e-10  # what is asked for is the surface, not another reading
        mean, sd = process.predict(where, return_std=True)
        return mean, sd

    def _climb(self, name: str, blocks: int) -> Callable[..., tuple[Array, float]]:
        def climb(cost: Callable[..., Any], start: Array, bounds: Array) -> tuple[Array, float]:
            last = self._last.get(name)
            starts = [start] if last is None else [start, last] if blocks <= FEW_BLOCKS else [last]
            how = {"jac": True, "bounds": bounds, "method": "L-BFGS-B", "options": {"maxiter": 25}}
            ends = [minimize(cost, each, **how) for each in starts]
            best = min(ends, key=lambda end: float(end.fun))
            return best.x, float(best.fun)

        return climb
