"""When the map is known: not before the space is filled, not while blocks that no model chose contradict it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from test_surrogate import CUBE, SPACE, measure, memfree

from spark_ray.search.stopping import decide
from spark_ray.search.surrogate import Surrogate
from spark_ray.search.target import Target

SEED = 3


def decision(blocks, machine=memfree, target=None, limit=None, **how):
    observations = measure(machine, CUBE.filling(blocks, SEED), **how)
    surrogate = Surrogate.fit(SPACE, observations, seed=SEED)
    return decide(surrogate, target or Target(), observations, blocks=limit)


def test_a_law_at_low_noise_is_known_when_the_space_is_filled():
    assert not decision(12).stop
    assert "fill the space" in decision(12).why
    known = decision(24)
    assert known.stop
    assert known.expected_misclassified <= 0.03
    assert "expected to be called wrongly" in known.why


def test_noise_keeps_it_open_and_the_budget_ends_it():
    open_ = decision(24, noise_gib=4.0)
    assert not open_.stop
    assert open_.undecided_volume > 0.1
    spent = decision(24, noise_gib=4.0, limit=24)
    assert spent.stop
    assert "all blocks are spent" in spent.why
    assert decide(None, Target(), [], blocks=4).stop is False


def test_blocks_that_fill_the_space_and_contradict_it_count_against_it():
    calm = decision(24)
    shaken = decision(24, spoiled=[(row, 1, -7.0) for row in (3, 9, 14)])
    assert shaken.expected_misclassified > calm.expected_misclassified + 0.02


def test_only_blocks_that_no_model_chose_count_as_filling():
    raw = np.vstack([CUBE.filling(8, SEED), CUBE.filling(64, SEED + 1)[:40]])
    observations = measure(memfree, raw)
    found = decide(Surrogate.fit(SPACE, observations, seed=SEED), Target(), observations)
    assert not found.stop
    assert "8 of the 16" in found.why


def test_a_block_without_capacity_has_looked_there_as_well():
    observations = measure(memfree, CUBE.filling(24, SEED))
    halved = [
        replace(each, kv=(each.kv[0], None)) if row % 2 else each for row, each in enumerate(observations)
    ]
    found = decide(Surrogate.fit(SPACE, halved, seed=SEED), Target(kind="boundary"), halved)
    assert not found.stop
    assert "fill the space" not in found.why
