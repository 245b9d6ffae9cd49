"""Ask, tell and recover.

The unit is a block: cell (n-th configuration, repetition). The number of the study trial that first stood for it is
the block's name for good, in its file on disk too. When a process dies with the block open, that study trial fails,
and the next ask starts another one for the same block: it carries `continues: <first number>`, and the caller sees the
first number again. So files on disk never need rewriting, and nothing but the journal has to be remembered.

The state of a block is that of its latest study trial:

    RUNNING                       proposed, being executed
    COMPLETE                      a contrast was measured
    PRUNED, constraint violated   a compared arm has no capacity there: an answer
    FAIL with `abandoned`         given up: no outcome, or not one to search by
    FAIL without                  interrupted: asked again before anything new
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .. import search_spec
from ..errors import RunError, UnavailableError
from ..search_spec import Configuration
from ..told import Told
from .journal import open_journal
from .space import adaptive, configuration, design, distributions

GP_MEND = "pip install 'spark_ray[gp]'"
NO_CAPACITY = "no_capacity"
OWN_ATTRIBUTES = frozenset({"block", "continues", "contrast", "abandoned"})


@dataclass(frozen=True)
class Proposal:
    """What to measure next. A study_trial seen before is that same block, to be continued."""

    study_trial: int
    configuration: Configuration
    repetition: int


@dataclass(frozen=True)
class Abandoned:
    """A block given up, and why."""

    reason: str


def problems(search: search_spec.Search) -> list[str]:
    """What is missing here for this search."""
    if search.sampler == "gp" and importlib.util.find_spec("torch") is None:
        return ["the gp sampler needs torch, which is not installed"]
    return []


class Search:
    """One study in one journal. For one process at a time, and one thread of it."""

    def __init__(
        self,
        search: search_spec.Search,
        *,
        seed: int,
        journal: Path,
        name: str,
        about: Mapping[str, str] = {},
        mark: str = "",
    ) -> None:
        """`about` and `mark` are for people who open the study in Optuna's dashboard: attributes of it, and what its values are."""
        if found := problems(search):
            raise UnavailableError(found[0], mend=GP_MEND)
        self._search = search
        self._seed = seed
        self._distributions = distributions(search.space)
        self._design = design(search, seed)
        self._planned: list[Configuration] = []  # as much of the design as was needed so far
        self._storage = open_journal(journal)
        self._study = _create_or_load(self._storage, name)
        self._study_id = self._storage.get_study_id_from_name(name)
        self._describe(about, f"{mark} |contrast|".lstrip())

    def ask(self) -> Proposal | None:
        """The next block: an interrupted one first, then the next repetition, then a new configuration.

        None when a grid is exhausted. How many blocks are enough is the caller's to say.
        """
        blocks = self._blocks()
        for first, latest in blocks.items():
            if _interrupted(latest):
                return self._start(latest.params, latest.user_attrs["block"], continues=first)
        index, repetition = -1, self._search.repetitions
        if blocks:
            latest = blocks[max(blocks)]
            index, repetition = latest.user_attrs["block"]
            if repetition + 1 < self._search.repetitions:
                return self._start(latest.params, [index, repetition + 1])
        drawn = self._draw(index + 1)
        return None if drawn is None else self._start(drawn, [index + 1, 0])

    def tell(
        self,
        study_trial: int,
        *,
        contrast: float | None,
        constraints: Mapping[str, float],
        attributes: Mapping[str, object] = {},
    ) -> None:
        """Finish a block with the contrast between the compared arms. A finished block stays as it is.

        The value is |contrast|, what the search maximises; the signed one is an attribute. None means that a compared
        arm gave no capacity: that violates the constraint `no_capacity` (set for every block) and has no value.
        A constraint is violated above 0.

        Optuna 5 on constraints of trials without a value: TPE splits PRUNED trials by violation, smallest first and
        after all feasible ones; the GP reads COMPLETE trials only (`space._for_gp` shows it the others);
        nobody reads FAIL. So no capacity is told as PRUNED, and FAIL is left to blocks that say nothing.
        """
        if contrast is not None and not math.isfinite(contrast):
            raise ValueError(
                f"contrast of study trial {study_trial} is {contrast}; without capacity it is None"
            )
        if reserved := OWN_ATTRIBUTES & set(attributes):
            raise ValueError(f"attributes {', '.join(sorted(reserved))} are the search's own")
        trial = self._open_trial(study_trial)
        if trial is None:
            return
        violations = {**constraints, NO_CAPACITY: 1.0 if contrast is None else -1.0}
        # set_constraint warns when one is there already: a kill inside tell leaves the first ones
        for key in sorted(set(violations) - set(trial.constraints)):
            trial.set_constraint(key, violations[key])
        for key, value in {**attributes, "contrast": contrast}.items():
            trial.set_user_attr(key, value)
        if contrast is None:
            self._study.tell(trial.number, state=TrialState.PRUNED)
        else:
            self._study.tell(trial.number, abs(contrast))

    def abandon(self, study_trial: int, reason: str) -> None:
        """Give a block up: it says nothing to the sampler and is not asked again. A finished block stays as it is."""
        if trial := self._open_trial(study_trial):
            trial.set_user_attr("abandoned", reason)
            self._study.tell(trial.number, state=TrialState.FAIL)

    def recover(self, finished: Mapping[int, Told | Abandoned]) -> list[int]:
        """Make the study agree with the disk, at the start of a process. Safe to repeat after a kill at any point.

        `finished` has every block whose end is on disk. All others that were proposed are interrupted, those given up
        and those whose records were lost after they were told included: afterwards no study trial is RUNNING, and the
        next asks propose the blocks returned here, in this order.
        """
        for study_trial, outcome in finished.items():
            match outcome:
                case Told():
                    self.tell(
                        study_trial,
                        contrast=outcome.contrast,
                        constraints=outcome.constraints,
                        attributes=outcome.attributes,
                    )
                case Abandoned():
                    self.abandon(study_trial, outcome.reason)
        for first, latest in self._blocks().items():
            # Given up, or told and its record torn since: the records say what was done, the study only follows.
            if first not in finished and latest.state.is_finished() and not _interrupted(latest):
                self._start(latest.params, latest.user_attrs["block"], continues=first)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
        return [first for first, latest in self._blocks().items() if _interrupted(latest)]

    def rebuild(self, blocks: Sequence[tuple[int, Configuration, int]]) -> int:
        """Put (study trial, configuration, repetition) of blocks on disk into a study without any trial.

        Returns how many: none when the study has trials, and so a journal. Each block keeps its number; a number
        between them was of an interrupted block and stays empty. `recover` then tells what became of them.
        """
        if not blocks or self._study.get_trials(deepcopy=False):
            return 0
        by_number = {number: (params, repetition) for number, params, repetition in blocks}
        index = -1
        for number in range(max(by_number) + 1):
            params, repetition = by_number.get(number, ({}, 0))
            attributes: dict[str, object] = {}
            if number in by_number:
                index += repetition == 0
                attributes = {"block": [index, repetition]}
            trial = optuna.trial.create_trial(
                state=TrialState.RUNNING if attributes else TrialState.FAIL,
                params=dict(params),
                distributions=self._distributions if attributes else {},
                user_attrs=attributes,
            )
            self._storage.create_new_trial(self._study_id, template_trial=trial)
        return len(by_number)

    # ---- inside -------------------------------------------------------------------------------------------

    def _describe(self, about: Mapping[str, str], value: str) -> None:
        if self._study.metric_names != [value]:
            with warnings.catch_warnings(
                action="ignore", category=optuna.exceptions.ExperimentalWarning
            ):  # a name that is lost, or changes its form, changes nothing here
                self._study.set_metric_names([value])
        for key, text in about.items():
            if self._study.user_attrs.get(key) != text:
                self._study.set_user_attr(key, text)

    def _blocks(self) -> dict[int, FrozenTrial]:
        """The latest study trial of each block, by the number that names the block, in the order of asking."""
        blocks: dict[int, FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if (
                "block" in trial.user_attrs
            ):  # otherwise not from here: added by hand, say in Optuna's dashboard
                blocks[trial.user_attrs.get("continues", trial.number)] = trial
        return blocks

    def _draw(self, index: int) -> Configuration | None:
        if self._design is None:
            # In the order of the blocks, not of their latest study trials: a run that is resumed asks what it would have.
            return adaptive(self._search, self._seed, index, list(self._blocks().values()))
        while len(self._planned) <= index:
            if (point := next(self._design, None)) is None:
                return None
            self._planned.append(point)
        return self._planned[index]

    def _start(self, params: Mapping[str, Any], block: list[int], continues: int | None = None) -> Proposal:
        """A running study trial, complete in one record of the journal: a kill leaves all of it or nothing."""
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=self._distributions,
            user_attrs={"block": block} | ({} if continues is None else {"continues": continues}),
        )
        started = self._storage.get_trial(
            self._storage.create_new_trial(self._study_id, template_trial=trial)
        )
        first = started.number if continues is None else continues
        return Proposal(first, configuration(started.params), block[1])

    def _open_trial(self, study_trial: int) -> optuna.trial.Trial | None:
        """The running study trial of a block; a new one if the block was interrupted; None if it is finished."""
        latest = self._blocks().get(study_trial)
        if latest is None:
            raise RunError(
                f"the study has no block {study_trial}, but a block on disk names it",
                mend="study.journal is not the one of this run, or was cut: delete it, and --resume makes it again "
                "from the blocks on disk",
            )
        if _interrupted(latest):
            self._start(latest.params, latest.user_attrs["block"], continues=study_trial)
            latest = self._blocks()[study_trial]
        return None if latest.state.is_finished() else optuna.trial.Trial(self._study, latest._trial_id)


def _create_or_load(storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return optuna.create_study(study_name=name, storage=storage, direction="maximize")


def _interrupted(latest: FrozenTrial) -> bool:
    return bool(latest.state == TrialState.FAIL and "abandoned" not in latest.user_attrs)
