"""Statistics against the textbook and against what must always hold; contrasts along the sizing law."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_frames import KV_BLOCK_BYTES, ONE_BLOCK, record, table

from analysis import attribution, contrasts, statistics
from spark_ray.units import MIB

SLEEP = [
    a - b
    for a, b in zip(
        [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
        [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
        strict=True,
    )
]
"""R's `sleep`: extra hours of sleep under two drugs (Student 1908), paired."""

values = st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 6)), min_size=2, max_size=30)


def test_paired_t_of_the_sleep_data():
    found = statistics.paired(SLEEP)
    assert (found.n, round(found.t, 4), round(found.p, 6)) == (10, -4.0621, 0.002833)
    assert (round(found.mean, 2), round(found.low, 6), round(found.high, 7)) == (-1.58, -2.459886, -0.7001142)
    assert found.excludes_zero


def test_ranks_of_the_sleep_data():
    found = statistics.paired(SLEEP)
    assert found.hodges_lehmann == pytest.approx(-1.3)
    assert found.wilcoxon_p < 0.01


def test_equivalence_is_not_the_absence_of_a_difference():
    assert statistics.equivalence_p(SLEEP, 0.5) > 0.98
    assert statistics.equivalence_p(SLEEP, 3.0) < 0.01
    assert statistics.equivalence_p([-0.001, 0.001, 0.0005, -0.0004], 0.02) < 0.001


def test_fewer_than_two_blocks_have_no_interval():
    assert statistics.paired([]) == statistics.Paired(0, note="no block has capacity in both arms")
    one = statistics.paired([0.25])
    assert (one.mean, one.low, one.p, one.note) == (0.25, None, None, "no interval from one block")
    assert statistics.equivalence_p([0.25], 0.5) is None
    assert not one.excludes_zero


def test_agreement_to_the_last_digit_is_not_a_division_by_zero():
    found = statistics.paired([0.1, 0.1, 0.1])
    assert (found.low, found.high, found.t) == (found.mean, found.mean, None)
    none = statistics.paired([0.0, 0.0])
    assert (none.excludes_zero, none.note) == (False, "0 of 2 blocks differ")


@settings(max_examples=15)
@given(values, st.floats(0.001, 1000))
def test_a_unit_or_a_sign_changes_nothing(sample, scale):
    found, scaled, mirrored = (
        statistics.paired(x) for x in (sample, [scale * v for v in sample], [-v for v in sample])
    )
    assert scaled.mean == pytest.approx(scale * found.mean, rel=1e-9, abs=1e-6)
    assert mirrored.mean == pytest.approx(-found.mean)
    assert mirrored.hodges_lehmann == pytest.approx(-found.hodges_lehmann)
    if found.low is not None:
        assert found.low <= found.mean <= found.high
        assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    assert min(sample) <= found.hodges_lehmann <= max(sample)


@settings(max_examples=50)
@given(values, st.floats(0.1, 1e6), st.floats(1.01, 10))
def test_a_wider_margin_is_never_harder_to_meet(sample, margin, factor):
    assert (
        statistics.equivalence_p(sample, margin * factor) <= statistics.equivalence_p(sample, margin) + 1e-12
    )


def test_order_trend_and_autocorrelation():
    assert statistics.order_effect([3.0, 1.0, 3.1, 1.1], [True, False, True, False]).size == pytest.approx(
        2.0
    )
    assert statistics.order_effect([1.0, 2.0], [True, False]) is None
    first = [True] * 4 + [False] * 4
    whole = statistics.order_effect([0.0] * 4 + [0.002, 0.004, 0.002, 0.003], first)
    assert whole.p < 0.02, "one group without spread: capacity comes in whole blocks"
    assert statistics.order_effect([0.0] * 4 + [0.1] * 4, first).p == 0
    assert statistics.order_effect([0.1] * 8, first) is None
    assert statistics.trend([1.0, 2.0, 3.0, 4.1], [0, 1, 2, 3]).size == pytest.approx(1.03)
    assert statistics.autocorrelation([1.0, 1.0, 5.0, 5.0, 1.0, 1.0]) == pytest.approx(0.25, abs=0.1)
    assert statistics.autocorrelation([1.0, 2.0]) is None
    assert statistics.effective_n(10, 0.5) == pytest.approx(10 / 3)
    assert statistics.effective_n(10, -0.5) == 10


def terms(row):
    return {
        name: row[attribution.column(name)]
        for name in attribution.TERMS
        if not pd.isna(row[attribution.column(name)])
    }


def pair(**changes):
    base, arm = record(ONE_BLOCK, "empty"), record(ONE_BLOCK, "full", **changes)
    return contrasts.pairs(table(base, arm), ("empty", "full"), "empty").iloc[0]


def test_page_cache_alone_is_predicted_to_the_block():
    row = pair(cached=2748 * MIB)
    assert row["predicted_delta_bytes"] == -0.25 * 2048 * MIB
    assert abs(row["unpredicted_bytes"]) <= KV_BLOCK_BYTES
    assert (
        sum(terms(row)[name] for name in attribution.PAGE_CACHE if name in terms(row))
        == row["predicted_delta_bytes"]
    )


@settings(max_examples=40)
@given(st.integers(0, 9 << 30), st.integers(310 << 20, 4 << 30), st.integers(0, 2 << 30))
def test_terms_add_up_to_the_measured_difference_exactly(cached, anon, per_cpu):
    row = pair(cached=cached + 40 * MIB, anon=anon, per_cpu=per_cpu)
    assert math.isclose(sum(terms(row).values()), row["delta_kv_cache_bytes"], abs_tol=1.0)
    assert abs(terms(row)["engine"]) <= KV_BLOCK_BYTES + 1


def test_a_term_that_was_not_read_goes_into_the_rest():
    base, arm = record(ONE_BLOCK, "empty"), record(ONE_BLOCK, "full", anon=950 * MIB)
    for each in (base, arm):
        del each["result"]["measurements"]["sizing"]["meminfo"]["AnonPages"]
    row = contrasts.pairs(table(base, arm), ("empty", "full"), "empty").iloc[0]
    assert "other_processes" not in terms(row)
    assert terms(row)["rest"] == pytest.approx(-0.25 * 500 * MIB)
    assert sum(terms(row).values()) == pytest.approx(row["delta_kv_cache_bytes"])


def test_under_a_limit_the_host_s_counters_explain_nothing():
    arm = record(ONE_BLOCK, "full", cached=2748 * MIB)
    arm["result"]["measurements"]["sizing"] |= {"view": "cgroup", "free_bytes": 700 * MIB}
    row = contrasts.pairs(table(record(ONE_BLOCK, "empty"), arm), ("empty", "full"), "empty").iloc[0]
    assert {name for name, size in terms(row).items() if size} == {"view", "engine"}
    assert sum(terms(row).values()) == pytest.approx(row["delta_kv_cache_bytes"])
    assert pd.isna(row["predicted_delta_bytes"])


def test_an_arm_without_capacity_keeps_its_row():
    row = pair(kind="out_of_memory")
    assert (row["outcome"], row["baseline_outcome"]) == ("out_of_memory", "ok")
    assert pd.isna(row["contrast"])


@pytest.mark.parametrize("standing", ["superseded", "open"])
def test_attempts_that_do_not_count_are_not_paired(standing):
    rows = table(record(ONE_BLOCK, "empty"), record(ONE_BLOCK, "full"))
    rows["standing"] = pd.array([standing, standing], dtype="string")
    assert contrasts.pairs(rows, ("empty", "full"), "empty").empty
