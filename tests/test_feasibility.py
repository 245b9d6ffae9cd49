"""Where arms work at all: the least capacity, cliffs, and what a further block would tell of either."""

from __future__ import annotations

import numpy as np
import pytest
from test_surrogate import CUBE, ELSEWHERE, GIB, SPACE, errors, fit, measure, memfree

from spark_ray.search import acquire
from spark_ray.search.feasibility import Feasibility
from spark_ray.search.surrogate import Observation, Surrogate
from spark_ray.search.target import Target


def test_failures_place_the_least_capacity():
    surrogate = fit(blocks=48, least_gib=14.0)
    level, sd = surrogate.feasibility[0].level
    assert abs(level / GIB - 14) < 3 * sd / GIB
    assert sd < 0.3 * GIB, "as near as the blocks on both sides of it, of either arm"
    said, true = surrogate.predict(ELSEWHERE), memfree(ELSEWHERE)
    assert surrogate.feasibility[0].cliff is None
    for chance, kv in ((said.feasible_a, true[:, 0]), (said.feasible_b, true[:, 1])):
        assert (chance[kv > 16] > 0.5).all()
        assert (chance[kv < 12] < 0.5).all()


def test_a_failure_with_plenty_of_memory_is_a_cliff_and_leaves_capacity_alone():
    raw = CUBE.filling(48, 3)
    fails = CUBE.unit(raw)[:, :2].sum(axis=1) > 1.3
    blocks = [
        Observation(each.configuration, (each.kv[0], None if fail else each.kv[1]))
        for each, fail in zip(measure(memfree, raw), fails, strict=True)
    ]
    surrogate = Surrogate.fit(SPACE, blocks, seed=3)
    said, where = surrogate.predict(ELSEWHERE), CUBE.unit(ELSEWHERE)[:, :2].sum(axis=1)
    assert (said.feasible_a > 0.8).all(), (
        "where it has less than ever worked, a failure of the other one leaves a doubt"
    )
    assert (said.feasible_a > 0.9).mean() > 0.99
    clear = np.abs(where - 1.3) > 0.2
    assert ((said.feasible_b > 0.5) == (where < 1.3))[clear].mean() > 0.97
    assert np.median(errors(surrogate, memfree)[0]) < 0.01
    divergent = Target().divergent(said)
    assert (divergent[where > 1.6] > 0.75).all()


def test_failures_behind_a_cliff_do_not_raise_the_least_capacity():
    """Where capacity is small beyond the cliff as well, either could have been the cause of each failure."""
    raw = CUBE.filling(64, 3)
    fails = CUBE.unit(raw)[:, 1] > 0.7
    blocks = [
        Observation(each.configuration, (each.kv[0], None if fail else each.kv[1]))
        for each, fail in zip(measure(memfree, raw, least_gib=11.0), fails, strict=True)
    ]
    surrogate = Surrogate.fit(SPACE, blocks, seed=3)
    said, true = surrogate.predict(ELSEWHERE), memfree(ELSEWHERE)
    small = (true[:, 1] > 12) & (true[:, 1] < 15) & (CUBE.unit(ELSEWHERE)[:, 1] < 0.6)
    assert small.any()
    assert (said.feasible_b[small] > 0.5).all()
    beyond = CUBE.unit(ELSEWHERE)[:, 1] > 0.8
    assert (said.feasible_b[beyond] < 0.5).all()


def test_a_limit_on_what_an_arm_may_hold_is_found_by_the_capacity_that_it_would_have():
    limit_gib = 26.0
    blocks = [
        Observation(each.configuration, (each.kv[0], each.kv[1] if each.kv[1] < limit_gib * GIB else None))
        for each in measure(memfree, CUBE.filling(48, 3))
    ]
    surrogate = Surrogate.fit(SPACE, blocks, seed=3)
    capacity = slice(-4, -2)  # constant and capacity, of the columns that a cliff sees
    assert capacity in [bend.kernel.doubtful for _, bend in surrogate.feasibility[1].bends]
    assert sum(weight for weight, _ in surrogate.feasibility[1].bends) == pytest.approx(1)
    said, kv_gib = surrogate.predict(ELSEWHERE), memfree(ELSEWHERE)[:, 1]
    clear = np.abs(kv_gib - limit_gib) > 2
    assert ((said.feasible_b > 0.5) == (kv_gib < limit_gib))[clear].mean() > 0.97
    assert (said.feasible_a > 0.9).all()


# ---- what a block tells of the least capacity


def of_levels(*levels_gib):
    levels = np.array(levels_gib, dtype=float)
    return Feasibility(levels * GIB, np.full(len(levels), 1 / len(levels)), (), ())


def known(*kv_gib):
    return np.array(kv_gib, dtype=float) * GIB, np.full(len(kv_gib), 1e-6 * GIB)


def test_what_a_block_tells_of_the_level_is_what_it_leaves_open_less():
    """Against counting: each level in turn is the true one, the block says on which side it is."""
    levels = np.arange(1.0, 9.0)
    places = np.arange(1.5, 9.5)
    found = of_levels(*levels)
    tried = np.array([0.5, 2.5, 4.5, 6.5, 9.5])
    of_level, told = found.level_told(
        known(*tried), np.ones(len(tried)), known(*places), np.ones(len(places))
    )
    assert of_level == pytest.approx(1, abs=1e-6), "all is open since the level is unknown, nothing for noise"
    enough = (places[:, None] > levels).astype(float)
    for kv, share in zip(tried, told, strict=True):
        sides = [kv > levels, kv <= levels]
        left = sum(enough[:, side].var(axis=1).sum() * side.mean() for side in sides if side.any())
        assert share == pytest.approx(1 - left / enough.var(axis=1).sum(), abs=1e-6)
    assert np.argmax(told) == 2, "halving"


def test_a_block_behind_a_cliff_tells_less_of_the_level():
    found, places = of_levels(*np.arange(1.0, 9.0)), known(*np.arange(1.5, 9.5))
    _, told = found.level_told(known(4.5, 4.5, 4.5), np.array([1.0, 0.5, 0.0]), places, np.ones(8))
    assert told[0] > told[1] > told[2] == 0


def test_where_capacity_itself_is_unknown_that_is_what_is_open():
    found = of_levels(3.9, 4.1)
    wide = np.array([4.0, 4.5]) * GIB, np.array([2.0, 2.0]) * GIB
    assert found.level_told(wide, np.ones(2), wide, np.ones(2))[0] < 0.1


def of_arms(least_gib, *failures, one_level=True):
    """Both arms after blocks that failed at so many GiB each; None: that arm worked, with 20."""
    kv = np.array([[20.0 if each is None else each for each in pair] for pair in failures]).T * GIB
    failed = np.array([[each is not None for each in pair] for pair in failures])
    places = fit().places(CUBE.filling(len(failures), 3), kv[0])
    least = np.full(2, least_gib) * GIB
    sd = np.full(kv.shape, 0.001 * GIB)
    return Feasibility.of_arms((places, places), failed, least, kv, sd, ((), ()), one_level=one_level)


def test_both_arms_know_the_level_together():
    failures = ((6, None), (None, 9), (None, 8.9))
    one, other = of_arms(10, *failures)
    assert one.level == other.level
    assert 9 * GIB < one.level[0] < 10 * GIB
    assert one.weights.sum() == pytest.approx(1)
    alone, without = of_arms(10, *failures, one_level=False)
    assert alone.level[0] < 9 * GIB < without.level[0]


def test_arms_that_fail_in_one_block_say_once_what_they_say():
    once, twice = of_arms(10, (6, None))[0], of_arms(10, (6, 6))[0]
    assert once.level == pytest.approx(twice.level, rel=1e-3)


def test_a_failure_next_to_what_worked_is_no_cliff():
    """One that the other arm's failures explain, and one alone."""
    for failures in (((9.5, None), (9.0, None), (None, 9.98)), ((9.96, None),)):
        assert [each.cliff for each in of_arms(10, *failures)] == [None, None]
    assert of_arms(10, (15, None))[0].cliff is not None


def test_a_block_under_way_is_not_asked_for_again():
    """With a map of capacity that is known, and only the least capacity open."""
    raw = CUBE.filling(64, 3)
    far = ((memfree(raw) < 11) | (memfree(raw) > 15)).all(axis=1)
    surrogate = Surrogate.fit(SPACE, measure(memfree, raw[far], noise_gib=0.05, least_gib=13.0), seed=3)
    places, candidates = CUBE.filling(512, 0), CUBE.filling(256, 5)
    before = acquire.gain(surrogate, Target("boundary"), candidates, places)
    best = candidates[[np.argmax(before)]]
    then = surrogate.condition(best)
    assert then.feasibility[0].level[1] < 0.8 * surrogate.feasibility[0].level[1]
    gains = acquire.gain(then, Target("boundary"), np.vstack([best, candidates]), places)
    assert gains[0] < 0.5 * gains.max()
    chosen = acquire.next_points(surrogate, SPACE, Target("boundary"), 4, [], 3)
    assert len({tuple(each.items()) for each in chosen}) == 4


def test_hope_is_lost_where_blocks_failed_and_not_where_they_worked():
    raw = CUBE.filling(24, 3)
    blocks = measure(memfree, raw, least_gib=16.0)
    surrogate = Surrogate.fit(SPACE, blocks, seed=3)
    failed = np.array([each.kv[1] is None for each in blocks])
    assert failed.any()
    hope = acquire._hope(surrogate, 1, raw)
    assert (hope[failed] == 0).all()
    assert (hope[~failed] == 1).all()
    elsewhere = acquire._hope(surrogate, 1, ELSEWHERE)
    assert ((elsewhere > 0) & (elsewhere < 1)).all()
    assert (acquire._hope(fit(), 1, ELSEWHERE) == 1).all(), "nothing failed"


def test_what_is_no_capacity_has_a_least_value_for_each_arm():
    """As throughput: one arm is half as fast, and starts where the other one does."""

    def machine(raw):
        kv = memfree(raw)[:, :1]
        return np.hstack([kv, kv / 2])

    blocks = [
        Observation(each.configuration, each.kv if each.kv[0] > 20 * GIB else (None, None))
        for each in measure(machine, CUBE.filling(32, 3), noise_gib=0.05)
    ]
    surrogate = Surrogate.fit(SPACE, blocks, law=False, seed=3)
    baseline, against = (each.level[0] / GIB for each in surrogate.feasibility)
    assert baseline == pytest.approx(2 * against, rel=0.1)
    said = surrogate.predict(ELSEWHERE)
    assert (said.feasible_both <= np.minimum(said.feasible_a, said.feasible_b)).all()


def test_both_arms_fail_together_as_often_as_drawing_says():
    surrogate = fit(blocks=16, least_gib=14.0)
    (common, difference), sds = surrogate.latent(ELSEWHERE)
    level = surrogate.feasibility[0]
    assert not level.cliffs
    draw = np.random.default_rng(0)
    z = draw.standard_normal((2, 4000, 1))
    kv = surrogate.kv_bytes(common + z[0] * sds[0], difference + z[1] * sds[1], ELSEWHERE)
    works = np.stack(kv) > draw.choice(level.level_bytes, size=(4000, 1), p=level.weights)
    said = surrogate.predict(ELSEWHERE)
    np.testing.assert_allclose(said.feasible_both, works.all(axis=0).mean(axis=0), atol=0.05)
    alone = said.feasible_a + said.feasible_b - 2 * said.feasible_both
    np.testing.assert_allclose(alone, (works[0] != works[1]).mean(axis=0), atol=0.07)


def test_arms_that_are_equal_do_not_diverge_where_the_least_capacity_is_unknown():
    def twins(raw):
        return np.repeat(memfree(raw)[:, :1], 2, axis=1)

    surrogate = Surrogate.fit(
        SPACE, measure(twins, CUBE.filling(16, 3), noise_gib=0.1, least_gib=20.0), seed=3
    )
    said = surrogate.predict(CUBE.filling(1024, 7))
    doubtful = (said.feasible_a > 0.2) & (said.feasible_a < 0.8)
    assert doubtful.any()
    independent = said.feasible_a * (1 - said.feasible_b) + said.feasible_b * (1 - said.feasible_a)
    assert (independent[doubtful] > 0.3).all()
    assert Target().divergent(said)[doubtful].max() < 0.25
    assert Target("boundary").divergent(said)[doubtful].max() < 0.25


def test_the_search_asks_between_what_failed_and_what_worked():
    """With a map of capacity that is known, and only the least capacity open, between 11 and 15 GiB."""
    raw = CUBE.filling(64, 3)
    far = ((memfree(raw) < 11) | (memfree(raw) > 15)).all(axis=1)
    surrogate = Surrogate.fit(SPACE, measure(memfree, raw[far], noise_gib=0.05, least_gib=13.0), seed=3)
    assert surrogate.feasibility[0].level[1] > 0.5 * GIB
    candidates = CUBE.filling(256, 5)
    gains = acquire.gain(surrogate, Target("boundary"), candidates, CUBE.filling(512, 0))
    between = ((memfree(candidates) > 11.5) & (memfree(candidates) < 14.5)).any(axis=1)
    assert between.mean() < 0.4
    assert between[np.argsort(-gains)[:10]].all()
