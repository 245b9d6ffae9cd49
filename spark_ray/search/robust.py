"""Which values a linear law cannot explain, found without being misled by them: reweighted least trimmed squares.

A trial that met a burst of somebody else's memory is far off; a fit to all values leans towards it, takes its error for
noise, and then sees nothing unusual. So many small subsets are fitted exactly, and kept is the fit whose better part of all
residuals is smallest (Rousseeuw 1984); what is far from that, by the spread of the better part, is left out of a last fit.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

BETTER_PART = 0.6
"""Where bursts meet one block of ten, one search in fourteen meets three or more among its first ten."""
SPARE = 4
"""Values beyond the coefficients, below which nothing can be told."""
MOST_SUBSETS = 400
PROMISING = 16
FAR = 3.5
"""Standard deviations. What is suspected without cause costs little: whether it is one is judged by how well the others fit."""


def outlying(columns: Floats, values: Floats) -> Mask:
    """Of values (n,), those that columns (n, k) cannot explain."""
    used = columns[:, np.ptp(columns, axis=0) > 0] if len(columns) else columns
    columns = np.column_stack([np.ones(len(values)), used])
    count, coefficients = columns.shape
    if count < coefficients + SPARE:
        return np.zeros(count, dtype=bool)
    kept = max(int(np.ceil(BETTER_PART * count)), coefficients + 2)
    residuals = _best(columns, values, kept)
    squares = np.square(residuals)
    spread = np.sqrt(np.sort(squares)[:kept].sum() / (kept - coefficients)) / _trimmed(kept / count)
    usual = squares <= (FAR * spread) ** 2
    fitted, *_ = np.linalg.lstsq(columns[usual], values[usual], rcond=None)
    residuals = values - columns @ fitted
    spread = np.sqrt(np.square(residuals[usual]).sum() / max(usual.sum() - coefficients, 1))
    return np.asarray(np.abs(residuals) > FAR * max(spread, 1e-12 * np.abs(values).max(initial=1.0)))


def _best(columns: Floats, values: Floats, kept: int) -> Floats:
    """Residuals of the fit whose `kept` smallest squares add up to least."""
    residuals = _residuals(columns, values, _subsets(*columns.shape))
    for few in (PROMISING, PROMISING, 1):
        squares = np.sort(np.square(residuals), axis=1)[:, :kept].sum(axis=1)
        residuals = residuals[np.argsort(squares, kind="stable")[:few]]
        better = np.argsort(np.square(residuals), axis=1, kind="stable")[:, :kept]
        residuals = _residuals(columns, values, better)
    best: Floats = residuals[0]
    return best


def _residuals(columns: Floats, values: Floats, subsets: NDArray[np.intp]) -> Floats:
    """Of all values (subsets, n), by a fit to the rows of each subset."""
    fitted = np.einsum("skr,sr->sk", np.linalg.pinv(columns[subsets]), values[subsets])
    return np.asarray(values - fitted @ columns.T)


@lru_cache(maxsize=64)
def _subsets(count: int, size: int) -> NDArray[np.intp]:
    """All, or as many as there is time for, always the same ones."""
    if comb(count, size) <= MOST_SUBSETS:
        return np.array(list(combinations(range(count), size)))
    draw = np.random.default_rng(0)
    return np.array([draw.choice(count, size, replace=False) for _ in range(MOST_SUBSETS)])


def _trimmed(part: float) -> float:
    """Standard deviation of the part of a normal that is nearest to its mean."""
    end = norm.ppf((1 + part) / 2)
    return float(np.sqrt(1 - 2 * end * norm.pdf(end) / part)) if part < 1 else 1.0
