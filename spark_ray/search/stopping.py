"""Whether the map is known well enough.

What is declared wrong has two parts, both volumes. *Expected*: the model's own chance that a place is called by the wrong side.
*Unseen*: a model is sure before it has looked everywhere, and where it is contradicted it had been sure too; so of the
blocks that it did not choose, which fill the space, those that all others contradict are counted (one half more, as none
among few proves little), and a third of such places is taken to be called wrong. Bands are widened once more if those blocks
were predicted worse than others.

Before enough blocks fill the space nothing is declared known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import acquire
from .cube import Floats
from .surrogate import TRUSTED, Observation, Surrogate
from .target import Target

FILLING_PER_START = 2
"""16 blocks that fill three dimensions, 8 for one."""
CONTRADICTED = 3.0
"""Standard deviations between a block and what all others say of it."""
PLACES = 2048
TOO_FEW = "too few blocks so far in which both arms have a number that nothing capped"


@dataclass(frozen=True)
class Decision:
    stop: bool
    why: str
    expected_misclassified: float
    """The share of the space that is expected to be called wrongly."""
    undecided_volume: float
    """The share of the space where it is open, at 95 %, whether arms diverge."""
    widening: float = 1.0
    """How much wider bands were taken for it than the surrogate says."""


def decide(
    surrogate: Surrogate | None,
    target: Target,
    observations: Sequence[Observation],
    *,
    misclassified: float = 0.03,
    blocks: int | None = None,
) -> Decision:
    """Stop when at most the share `misclassified` of the space is expected to be called wrongly, or after `blocks`.

    The observations are those that the surrogate was fitted with, and its seed is the one that chose them.
    """
    spent = blocks is not None and len(observations) >= blocks
    if surrogate is None:
        return Decision(spent, TOO_FEW, 1.0, 1.0)
    cube = surrogate.cube
    fills = acquire.fills(cube, cube.raw([each.configuration for each in observations]), surrogate.seed)
    complete = surrogate.pair.complete[: len(fills)]
    errors = surrogate.leave_one_out()[fills[complete]]
    widening = _widening(errors)
    said = surrogate.predict(cube.filling(PLACES, surrogate.seed))
    doubted = surrogate.contradicted()[: len(fills)][fills & complete]
    contradicted = int((doubted | (np.abs(errors).max(axis=1, initial=0.0) > CONTRADICTED)).sum())
    unseen = (contradicted + 0.5) / (len(errors) + 1) / 3
    expected = min(1.0, float(target.misclassified(said, widening).mean()) + unseen)
    undecided = float(target.undecided(said, widening).mean())
    measured, needed = int(fills.sum()), FILLING_PER_START * acquire.start_blocks(cube)
    if expected <= misclassified and measured >= needed:
        why = f"{expected:.1%} of the space is expected to be called wrongly, asked for: {misclassified:.1%}"
        return Decision(True, why, expected, undecided, widening)
    if measured < needed:
        why = f"{measured} of the {needed} blocks that fill the space are measured"
    else:
        why = f"{expected:.1%} of the space is expected to be called wrongly, more than {misclassified:.1%}"
    why = f"all blocks are spent; {why}" if spent else why
    return Decision(spent, why, expected, undecided, widening)


def _widening(errors: Floats) -> float:
    """How much wider still the bands must be for the worse predicted of both processes."""
    return max(1.0, float(np.sqrt(((errors**2).sum(axis=0) + TRUSTED) / (len(errors) + TRUSTED)).max()))
