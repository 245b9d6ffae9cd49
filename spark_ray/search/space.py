"""The search space, and what each sampler draws from it, as functions of a seed: nothing here is remembered.

A *design* (grid, random, qmc) does not listen to results: its n-th configuration depends on the seed and n alone.
An *adaptive* sampler (tpe, gp) sees the finished and running blocks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from .. import experiment
from ..experiment import Configuration, FractionRange, IntRange

# on import, since also a plan that only prints a design makes studies, each of them announced by Optuna
optuna.logging.set_verbosity(optuna.logging.WARNING)


def distributions(space: experiment.Space) -> dict[str, BaseDistribution]:
    """What Optuna knows of the space; a list, and a fixed value, is a categorical choice."""
    return {name: _distribution(axis) for name, axis in space}


def configuration(params: Mapping[str, Any]) -> Configuration:
    """Parameters as plain int and float: samplers may hand out NumPy's."""
    return {name: float(value) if isinstance(value, float) else int(value) for name, value in params.items()}


def design(search: experiment.Search, seed: int) -> Iterator[Configuration] | None:
    """The configurations of a sampler that does not listen, in order and without repetitions; None if it listens.

    A grid ends; random and qmc do not.
    """
    match search.sampler:
        case "grid":
            return _grid(search.space, seed)
        case "random":
            return _draws(optuna.samplers.RandomSampler(seed=_derive(seed, "random")), search.space)
        case "qmc":
            return _draws(_sobol(_derive(seed, "qmc"), search.space), search.space)
        case "tpe" | "gp":
            return None


def adaptive(
    search: experiment.Search, seed: int, index: int, history: Sequence[FrozenTrial]
) -> Configuration:
    """The index-th configuration, chosen in view of the history.

    The sampler is new each time, so a draw depends on seed, index and history, not on how long a process lived.
    It draws in a throw-away study, so that a proposal enters the journal whole, as one record, or not at all.
    """
    own_seed = _derive(seed, search.sampler, index)
    if search.sampler == "gp":
        sampler = optuna.samplers.GPSampler(seed=own_seed)
        history = _for_gp(history)
    else:
        sampler = optuna.samplers.TPESampler(seed=own_seed)
    view = optuna.create_study(direction="maximize", sampler=sampler)
    view.add_trials(history)
    return configuration(view.ask(distributions(search.space)).params)


def _distribution(axis: object) -> BaseDistribution:
    match axis:
        case IntRange():
            return IntDistribution(axis.low, axis.high, log=axis.log)
        case FractionRange():
            return FloatDistribution(axis.low, axis.high)
        case list():
            return CategoricalDistribution(axis)
        case _:
            return CategoricalDistribution([axis])


def _derive(seed: int, *purpose: object) -> int:
    """A seed of its own for each purpose; 32 bits, which is what NumPy's RandomState takes."""
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:4], "big")


# ---- designs ----------------------------------------------------------------------------------------------


def _grid(space: experiment.Space, seed: int) -> Iterator[Configuration]:
    """Every combination of levels once, in seeded random order, so that drift of the host is not an axis."""
    # Optuna's GridSampler draws what it believes is left, and after a restart draws points twice (optuna #5489)
    points = list(itertools.product(*(_levels(axis) for _, axis in space)))
    names = [name for name, _ in space]
    for index in np.random.RandomState(_derive(seed, "grid")).permutation(len(points)):
        yield configuration(dict(zip(names, points[index], strict=True)))


def _levels(axis: object) -> list[Any]:
    """The levels of an axis, both ends included; a single level of a range is its middle."""
    match axis:
        case IntRange():
            return sorted({round(x) for x in _spread(axis.low, axis.high, axis.levels, log=axis.log)})
        case FractionRange():
            spread = _spread(axis.low, axis.high, axis.levels, log=False)
            return list(dict.fromkeys(min(max(round(x, 12), axis.low), axis.high) for x in spread))
        case list():
            return axis
        case _:
            return [axis]


def _spread(low: float, high: float, count: int, *, log: bool) -> list[float]:
    steps = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    if log:
        return [math.exp(math.log(low) + (math.log(high) - math.log(low)) * step) for step in steps]
    return [low + (high - low) * step for step in steps]


def _draws(sampler: optuna.samplers.BaseSampler, space: experiment.Space) -> Iterator[Configuration]:
    study = optuna.create_study(sampler=sampler)
    known = distributions(space)
    while True:
        yield configuration(study.ask(known).params)


class _Sobol(optuna.samplers.QMCSampler):  # type: ignore[misc]  # optuna is not followed by mypy
    """Optuna infers the space from the first trial and so draws that one at random; here it is known beforehand."""

    space: dict[str, BaseDistribution]

    def infer_relative_search_space(self, study: object, trial: object) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return self.space


def _sobol(seed: int, space: experiment.Space) -> _Sobol:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _Sobol(scramble=True, seed=seed)
    sampler.space = {name: known for name, known in distributions(space).items() if not known.single()}
    return sampler


# ---- what the Gaussian process is shown ---------------------------------------------------------------------


def _for_gp(history: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Let Optuna's GP see where there is no capacity.

    It reads constraints of COMPLETE trials only, and those need a value. The mean of the measured ones is the value
    that says least (zero, once standardised); it exists inside this one draw and is never stored. Without it a GP
    would propose the same infeasible point again and again. Constraints are shown as one, the worst: Optuna takes
    them for independent, so an arm's own and `no_capacity`, which go together, would count twice.
    """
    finished = [trial for trial in history if trial.state.is_finished()]
    values = [trial.value for trial in finished if trial.value is not None]
    mean = statistics.fmean(values) if values else 0.0
    worst = [max(trial.constraints.values(), default=-1.0) for trial in finished]
    constrained = any(violation > 0 for violation in worst)
    return [
        optuna.trial.create_trial(
            value=mean if trial.value is None else trial.value,
            params=trial.params,
            distributions=trial.distributions,
            constraints={"worst": violation} if constrained else None,
        )
        for trial, violation in zip(finished, worst, strict=True)
    ] + [trial for trial in history if not trial.state.is_finished()]
