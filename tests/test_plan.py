import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from spark_ray.plan import arm_order, make_block, williams_rows

ARMS = ["native", "docker", "chroot", "page-cache", "limited", "podman", "nspawn"]


@given(st.integers(2, 7))
def test_williams_balances_positions_and_neighbours(count):
    rows = williams_rows(count)
    assert all(sorted(row) == list(range(count)) for row in rows)
    for position in range(count):
        assert set(Counter(row[position] for row in rows).values()) == {len(rows) // count}
    neighbours = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert len(neighbours) == count * (count - 1)
    assert len(set(neighbours.values())) == 1


@given(st.integers(2, 7), st.integers(0, 10_000), st.integers(0, 50))
def test_every_full_design_is_balanced_and_the_order_is_a_pure_function(count, seed, cycle):
    arms = ARMS[:count]
    length = len(williams_rows(count))
    orders = [arm_order(arms, cycle * length + place, seed) for place in range(length)]
    assert orders == [arm_order(arms, cycle * length + place, seed) for place in range(length)]
    for position in range(count):
        assert set(Counter(order[position] for order in orders).values()) == {length // count}


def test_orders_are_random_across_designs_and_differ_by_seed():
    two = [arm_order(["a", "b"], index, 1) for index in range(200)]
    assert two != [("a", "b"), ("b", "a")] * 100, "strict alternation is a hidden factor"
    assert 90 <= sum(order[0] == "a" for order in two) <= 110
    assert two != [arm_order(["a", "b"], index, 2) for index in range(200)]


def test_a_block_names_its_trials():
    block = make_block(3, 7, {"max_batch_size": 1}, 0, ["a", "b"], 0)
    assert block.block_id == "b0003"
    assert {block.trial_id(arm) for arm in block.order} == {"b0003.a", "b0003.b"}
