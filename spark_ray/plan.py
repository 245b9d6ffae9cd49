"""What will be done, in which order: pure, and the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .search_spec import Configuration


@dataclass(frozen=True)
class Block:
    """One configuration x one repetition: every arm once, adjacent in time, in `order`."""

    block_id: str
    index: int
    study_trial: int
    configuration: Configuration
    repetition: int
    order: tuple[str, ...]

    def trial_id(self, arm: str) -> str:
        return f"{self.block_id}.{arm}"


def block_name(index: int) -> str:
    return f"b{index:04d}"


def williams_rows(count: int) -> list[list[int]]:
    """A Williams design of `count` treatments: each is in each position, and follows each other one, equally often.

    Even counts need `count` rows, odd ones twice as many (Williams 1949).

    >>> williams_rows(2)
    [[0, 1], [1, 0]]
    """
    first = [0]
    low, high = 1, count - 1
    while len(first) < count:
        first.append(low)
        low += 1
        if len(first) < count:
            first.append(high)
            high -= 1
    rows = [[(value + shift) % count for value in first] for shift in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


def arm_order(arms: Sequence[str], index: int, seed: int) -> tuple[str, ...]:
    """The order of arms in block `index`: rows of a Williams design in random sequence with random labels.

    Position and neighbour are balanced over each full design, and random inside it, so neither drift nor carry-over
    can pass for an effect of an arm. A pure function: any block can be planned without the ones before it.
    """
    rows = williams_rows(len(arms))
    cycle, place = divmod(index, len(rows))
    generator = random.Random(f"{seed}/{cycle}/{'/'.join(arms)}")  # noqa: S311  a design, not a secret
    generator.shuffle(rows)
    labels = list(arms)
    generator.shuffle(labels)
    return tuple(labels[value] for value in rows[place])


def make_block(
    index: int,
    study_trial: int,
    configuration: Configuration,
    repetition: int,
    arms: Sequence[str],
    seed: int,
) -> Block:
    return Block(
        block_name(index), index, study_trial, configuration, repetition, arm_order(arms, index, seed)
    )
