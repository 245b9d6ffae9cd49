"""Where to look next: blocks that fill the space, those that the model chooses, those under way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_surrogate import CUBE, ELSEWHERE, GIB, SPACE, fit, measure, memfree, no_law

from spark_ray.search import acquire
from spark_ray.search.surrogate import Surrogate
from spark_ray.search.target import Target


def test_first_blocks_fill_the_space_then_the_model_has_its_turns():
    model = [block for block in range(48) if acquire.filling_number(CUBE, block) is None]
    assert model[:4] == [8, 10, 12, 14]
    assert set(range(24, 40)) - set(model) == {27, 31, 35, 39}
    numbers = [n for block in range(200) if (n := acquire.filling_number(CUBE, block)) is not None]
    assert numbers == list(range(len(numbers)))
    assert acquire.next_points(None, SPACE, Target(), 3, [], 7) == CUBE.configurations(CUBE.filling(3, 7))


def test_later_filling_points_close_the_widest_gaps_between_all_blocks():
    low = CUBE.filling(256, 3)
    crowd = low[(CUBE.unit(low)[:, 0] < 0.5)][:60]
    taken = np.vstack([CUBE.filling(8, 3), crowd])
    others = CUBE.filling(256, 9)
    for number in range(8, 20):
        point = acquire.filling_point(CUBE, number, 3, taken)
        assert tuple(point[0]) in {tuple(row) for row in low}
        assert CUBE.unit(point)[0, 0] > 0.5, "where nothing is known"
        taken = np.vstack([taken, point])
    # what a model chose does not count, and neither does more than was planned
    np.testing.assert_array_equal(
        acquire.fills(CUBE, np.vstack([low[:8], others[:8]]), 3), [True] * 8 + [False] * 8
    )
    assert acquire.fills(CUBE, low[:64], 3).sum() == 26


def test_one_at_a_time_or_all_at_once_no_point_is_chosen_twice_in_ignorance():
    surrogate = fit(blocks=24)
    at_once = acquire.next_points(surrogate, SPACE, Target(), 6, [], 3)
    one_by_one = []
    for _ in range(6):
        one_by_one += acquire.next_points(surrogate, SPACE, Target(), 1, one_by_one, 3)
    assert at_once == one_by_one
    assert len({tuple(each.values()) for each in at_once}) >= 4


def test_blocks_under_way_are_known_at_their_mean():
    surrogate = fit(blocks=12)
    there = CUBE.corners()[[7]]
    before, after = surrogate.predict(there), surrogate.condition(there).predict(there)
    np.testing.assert_allclose(after.kv_a_mean, before.kv_a_mean, rtol=1e-6)
    assert after.contrast_sd[0] < before.contrast_sd[0]


def test_what_costs_less_is_preferred():
    surrogate = fit(blocks=24)

    def cost(configuration):
        return 1.0 if configuration["max_num_tokens"] < 1024 else 1000.0

    (chosen,) = acquire.next_points(surrogate, SPACE, Target(), 1, [], 3, cost=cost)
    assert chosen["max_num_tokens"] < 1024


def test_a_contradicted_block_is_measured_again():
    surrogate = fit(blocks=24, spoiled=[(5, 1, -6.0)])
    (chosen,) = acquire.next_points(surrogate, SPACE, Target(), 1, [], 3)
    np.testing.assert_array_equal(CUBE.raw([chosen]), CUBE.filling(24, 3)[[5]])


@pytest.mark.parametrize("kind", ["level_set", "contrast", "boundary", "optimum"])
def test_every_target_chooses(kind):
    surrogate = fit(blocks=24, least_gib=14.0)
    gains = acquire.gain(surrogate, Target(kind=kind), CUBE.filling(64, 8), CUBE.filling(256, 0))
    assert ((gains >= 0) & (gains <= 1 + 1e-6)).all()
    assert gains.max() > gains.min()


def test_the_model_looks_where_the_contrast_meets_the_margin():
    """Without a law, and so without leverage from afar."""
    surrogate = fit(no_law, 64, law=False)
    candidates = CUBE.filling(256, 8)
    said = surrogate.predict(candidates)
    target = Target(margin=0.15)
    gains = acquire.gain(surrogate, target, candidates, CUBE.filling(512, 0))
    best = np.argsort(gains)[-16:]
    assert target.misclassified(said)[best].mean() > target.misclassified(said).mean()


def test_beyond_both_caps_a_block_tells_nothing_and_is_not_asked():
    surrogate = fit(blocks=16, cap_gib=20.0)
    free = memfree(ELSEWHERE)
    worth = acquire.gain(surrogate, Target(), ELSEWHERE, CUBE.filling(256, 0))
    assert worth[(free > 26).all(axis=1)].max() < 0.05 * worth.max()
    below = [surrogate.below_cap(arm, ELSEWHERE, surrogate.latent(ELSEWHERE)) for arm in (0, 1)]
    assert np.stack(below)[free.T < 17].min() > 0.9
    assert np.stack(below)[free.T > 24].max() < 0.1


def test_where_caps_differ_neighbours_say_what_is_capped():
    """As where the cap itself is searched: no one capacity is never exceeded."""
    raw = CUBE.filling(24, 3)
    told = [
        replace(each, kv=tuple(min(kv, cap) for kv in each.kv), capped=tuple(kv > cap for kv in each.kv))
        for each, cap in zip(measure(memfree, raw), np.where(raw[:, 1] > 3000, 23, 25) * GIB, strict=True)
    ]
    surrogate = Surrogate.fit(SPACE, told, seed=3)
    assert np.isinf(surrogate.caps_bytes).all()
    both = np.array([all(each.capped) for each in told])
    worth = acquire.gain(surrogate, Target(), raw, CUBE.filling(256, 0))
    assert worth[both].max() < 0.1 * worth.max()
    asked = acquire.next_points(surrogate, SPACE, Target(), 8, [], 3)
    assert (memfree(CUBE.raw(asked)).min(axis=1) > 27).sum() <= 2  # those that fill the space
