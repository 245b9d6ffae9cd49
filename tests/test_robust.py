"""Values that a linear law cannot explain: found also where several hide each other, and nothing found where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_ray.search.robust import outlying


def drawn(seed, count=16, noise=0.7, bursts=()):
    random = np.random.default_rng(seed)
    columns = np.column_stack([np.ones(count), random.random((count, 2))])
    values = columns @ [1.0, 2.0, 3.0] + noise * random.standard_normal(count)
    for row, size in bursts:
        values[row] -= size
    return columns, values


BURSTS = ((0, 8.0), (5, 7.0), (9, 8.0))


def test_several_bursts_hide_each_other_from_least_squares_and_not_from_here():
    columns, values = drawn(0, bursts=BURSTS)
    residuals = values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
    assert np.abs(residuals).max() < 3 * residuals.std(ddof=3)
    assert np.flatnonzero(outlying(columns, values)).tolist() == [0, 5, 9]


def test_most_bursts_are_found_and_little_else():
    found = [outlying(*drawn(seed, bursts=BURSTS)) for seed in range(100)]
    bursts = [row for row, _ in BURSTS]
    assert np.mean([each[bursts].mean() for each in found]) > 0.9
    assert np.mean([each.sum() - each[bursts].sum() for each in found]) < 0.3


def test_also_where_one_in_four_is_off_to_the_same_side():
    bursts = tuple((row, 5.0 + row % 3) for row in (1, 4, 11, 13, 18))
    found = [outlying(*drawn(seed, count=20, bursts=bursts)) for seed in range(100)]
    rows = [row for row, _ in bursts]
    assert np.mean([each[rows].mean() for each in found]) > 0.85
    assert np.mean([each.sum() - each[rows].sum() for each in found]) < 0.2


def test_noise_alone_is_seldom_taken_for_bursts():
    """One suspect in several blocks' time does no harm: it is tried, and kept if the others fit better without it."""
    assert np.mean([outlying(*drawn(seed, count=24)).sum() for seed in range(100)]) < 0.2
    assert np.mean([outlying(*drawn(seed, count=64)).sum() for seed in range(100)]) < 0.2


@given(
    seed=st.integers(0, 100),
    slopes=st.lists(st.floats(-100, 100), min_size=3, max_size=3),
    unit=st.floats(1e-3, 1e9),
)
def test_neither_the_law_s_coefficients_nor_the_unit_change_what_is_found(seed, slopes, unit):
    columns, values = drawn(seed, bursts=BURSTS)
    expected = outlying(columns, values)
    np.testing.assert_array_equal(outlying(columns, unit * (values + columns @ slopes)), expected)


@given(seed=st.integers(0, 100), order=st.permutations(range(12)))
def test_a_burst_is_the_same_block_in_any_order(seed, order):
    columns, values = drawn(seed, count=12, noise=0.1, bursts=((3, 8.0),))
    assert outlying(columns, values)[3]
    assert outlying(columns[list(order)], values[list(order)])[order.index(3)]


@pytest.mark.parametrize("count", [0, 1, 6])
def test_of_too_few_values_nothing_is_said(count):
    assert not outlying(*drawn(0, count=count, bursts=((0, 99.0),)[: min(count, 1)])).any()


def test_what_fits_exactly_has_no_outliers():
    assert not outlying(*drawn(0, noise=0.0)).any()
    assert outlying(*drawn(0, noise=0.0, bursts=((4, 1e-3),))).tolist().index(True) == 4
