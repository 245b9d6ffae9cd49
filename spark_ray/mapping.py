"""From the records of a run to what is known of its map: the one way there, for the sweep, `predict` and the report alike.

Who chose the blocks makes no difference: any run with enough complete blocks has a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from .experiment import Experiment
from .plan import Block
from .search import space
from .search.divergence_sampler import Axes
from .search.stopping import Decision, decide
from .search.surrogate import FEWEST_COMPLETE, Observation, Surrogate, TooFewBlocks
from .search.target import Target
from .search.threads import one_thread
from .store import Store
from .told import Told, told_of


def axes(experiment: Experiment) -> Axes:
    """The searched space: its cube, and configurations as the numbers that a surrogate takes and gives."""
    return space.axes(experiment.search.space)


def target(experiment: Experiment) -> Target:
    return space.target(experiment.search.target)


def observations(store: Store, experiment: Experiment) -> tuple[Observation, ...]:
    """What complete blocks measured, in the order of the blocks; configurations as numbers (`axes`).

    Capacity in bytes, or throughput in tokens per second where that is the target's objective. Blocks of which a compared
    arm failed say nothing.
    """
    return _observed(_complete(store, experiment), experiment)


@one_thread
def surrogate(store: Store, experiment: Experiment) -> Surrogate | None:
    """What is known of the space; None: too few blocks measured both arms."""
    return _fitted(observations(store, experiment), experiment)


@one_thread
def decision(store: Store, experiment: Experiment) -> Decision:
    """Whether that is enough: the precision that was asked for is reached, or the budget is spent."""
    asked = experiment.search
    complete = _complete(store, experiment)  # once: other slots go on completing blocks
    known = _observed(complete, experiment)
    found = decide(
        _fitted(known, experiment),
        target(experiment),
        known,
        misclassified=asked.target.precision,
        # those that told nothing were spent too
        blocks=len(known) if len(complete) >= asked.blocks else None,
    )
    open_share = f"{found.undecided_volume:.1%} of the space undecided"
    return replace(found, why=f"{found.why}; {len(complete)} of {asked.blocks} blocks, {open_share}")


def lacks(known: Sequence[Observation]) -> str:
    """What a run has where it has no map."""
    comparable = sum(None not in block.kv and not any(block.capped) for block in known)
    of_all = (
        f"{comparable} of its {len(known)} complete blocks have a number of both arms that nothing capped"
    )
    return f"{of_all}, and a map needs {FEWEST_COMPLETE}"


# ---- reading ------------------------------------------------------------------------------------------------


Complete = list[tuple[Block, Told | None]]


def _observed(complete: Complete, experiment: Experiment) -> tuple[Observation, ...]:
    of_space, asked = axes(experiment), experiment.search.target
    return tuple(
        Observation(of_space.numbers(block.configuration), *said)
        for block, told in complete
        if told and (said := space.measured(asked, told.attributes))
    )


def _fitted(known: tuple[Observation, ...], experiment: Experiment) -> Surrogate | None:
    lawful = space.lawful(experiment.search.target)
    try:
        return Surrogate.fit(axes(experiment).cube, known, law=lawful, seed=experiment.seed)
    except TooFewBlocks:
        return None


_READ: WeakKeyDictionary[Store, dict[str, Told | None]] = WeakKeyDictionary()
"""By block: after each block all are asked for, and what a complete one says is never rewritten."""


def _complete(store: Store, experiment: Experiment) -> Complete:
    read, blocks = _READ.setdefault(store, {}), store.blocks()
    for block in blocks:
        if block.block_id not in read and (state := store.state(block)).complete:
            read[block.block_id] = told_of(state, store, experiment)
    return [(block, read[block.block_id]) for block in blocks if block.block_id in read]
