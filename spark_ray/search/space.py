"""The search space, and what each sampler draws from it, as functions of a seed: nothing here is remembered.

A *design* (grid, random, qmc) does not listen to results: its n-th configuration depends on the seed and n alone.
An *adaptive* sampler (tpe, gp, map) sees the finished and running blocks.

Whoever draws, a step holds at least one token of each sequence: where max_num_tokens is a range, it is raised to
max_batch_size as far as the range goes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from .. import search_spec
from ..search_spec import Axis, Configuration, Span
from ..spec import Scalar

if TYPE_CHECKING:  # these load scikit-learn, which takes longer than a plan
    from .divergence_sampler import Axes
    from .target import Target

ROLES = ("baseline", "against")
Measured = tuple[tuple[float | None, float | None], tuple[bool, bool]]
"""Of baseline and other arm: the number, None where there is no capacity; and whether something else than memory limited it."""
MOST_DRAWS = 8
"""Until a configuration is not one that is under way: in a space of few, there may be no other."""

# on import, since also a plan that only prints a design makes studies, each of them announced by Optuna
optuna.logging.set_verbosity(optuna.logging.WARNING)


def distributions(space: search_spec.Space) -> dict[str, BaseDistribution]:
    """What Optuna knows of the space; a list, and a fixed value, is a categorical choice."""
    return {name: _distribution(axis) for name, axis in space.axes.items()}


def configuration(params: Mapping[str, Any]) -> Configuration:
    """Parameters as plain scalars: samplers may hand out NumPy's."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in params.items()}


def design(search: search_spec.Search, seed: int) -> Iterator[Configuration] | None:
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
        case "tpe" | "gp" | "map":
            return None


def attainable(search: search_spec.Search) -> search_spec.Search:
    """With as many blocks as there can be: a grid may have fewer than were asked for."""
    if search.sampler != "grid":
        return search
    space, names, found = search.space, list(search.space.axes), set()
    for point in itertools.product(*map(_levels, space.axes.values())):
        made = _runnable(space, configuration(dict(zip(names, point, strict=True))))
        found.add(tuple(made.values()))
        if len(found) * search.repetitions >= search.blocks:  # grids may be too large to be counted
            return search
    return search.model_copy(update={"blocks": len(found) * search.repetitions})


def adaptive(
    search: search_spec.Search, seed: int, index: int, history: Sequence[FrozenTrial]
) -> Configuration:
    """The index-th configuration, chosen in view of the history: study trials in the order of the blocks.

    The sampler is new each time, so a draw depends on seed, index and history, not on how long a process lived.
    It draws in a throw-away study, so that a proposal enters the journal whole, as one record, or not at all.
    """
    known = distributions(search.space)
    sampler: optuna.samplers.BaseSampler
    told = [trial for trial in history if trial.state != TrialState.FAIL]
    match search.sampler:
        case "map":
            return _for_map(search, seed, history)
        case "gp":
            sampler = optuna.samplers.GPSampler(seed=_derive(seed, "gp", index))
            told = _for_gp(told)
        case _:
            sampler = optuna.samplers.TPESampler(seed=_derive(seed, search.sampler, index))
    view = optuna.create_study(direction="maximize", sampler=sampler)
    view.add_trials(told)
    return _runnable(search.space, configuration(view.ask(known).params))


def axes(space: search_spec.Space) -> Axes:
    """The space as the map has it: a cube, and configurations as numbers."""
    from .divergence_sampler import Axes

    return Axes(distributions(space))


def target(asked: search_spec.Target) -> Target:
    from .target import Target

    return Target(asked.kind, asked.margin)


def lawful(asked: search_spec.Target) -> bool:
    """Whether the sizing laws say anything of what is asked: they are of capacity."""
    return asked.objective == "kv_capacity"


def measured(asked: search_spec.Target, attributes: Mapping[str, Any]) -> Measured | None:
    """What a told block says of what is asked; None: nothing."""
    if any(f"kv_{role}_bytes" not in attributes for role in ROLES):
        return None
    sizes = _of_roles(attributes, "kv_{}_bytes")
    if lawful(asked):
        baseline, against = map(bool, _of_roles(attributes, "kv_{}_capped"))
        return sizes, (baseline, against)
    rates = _of_roles(attributes, "throughput_{}_tokens_per_s")
    unmeasured = any(size is not None and rate is None for size, rate in zip(sizes, rates, strict=True))
    return None if unmeasured else (rates, (False, False))


def _of_roles(attributes: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    baseline, against = (attributes.get(name.format(role)) for role in ROLES)
    return baseline, against


def _distribution(axis: Axis) -> BaseDistribution:
    if isinstance(axis, tuple):
        return CategoricalDistribution(axis)
    kind = IntDistribution if isinstance(axis.low, int) else FloatDistribution
    return kind(axis.low, axis.high, log=axis.log)


def _runnable(space: search_spec.Space, drawn: Configuration) -> Configuration:
    axis, batch = space.axes["max_num_tokens"], drawn["max_batch_size"]
    if isinstance(axis, Span) and drawn["max_num_tokens"] < batch:  # type: ignore[operator]  # both are numbers
        return drawn | {"max_num_tokens": min(batch, axis.high)}  # type: ignore[type-var]
    return drawn


def _derive(seed: int, *purpose: object) -> int:
    """A seed of its own for each purpose; 32 bits, which is what NumPy's RandomState takes."""
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:4], "big")


# ---- designs ----------------------------------------------------------------------------------------------


def _grid(space: search_spec.Space, seed: int) -> Iterator[Configuration]:
    """Every combination of levels once, in seeded random order, so that drift of the host is not an axis."""
    # Optuna's GridSampler draws what it believes is left, and after a restart draws points twice (optuna #5489)
    points = list(itertools.product(*map(_levels, space.axes.values())))
    names = list(space.axes)
    order = np.random.RandomState(_derive(seed, "grid")).permutation(len(points))
    drawn = (_runnable(space, configuration(dict(zip(names, points[index], strict=True)))) for index in order)
    yield from ({tuple(each.values()): each for each in drawn}).values()


def _levels(axis: Axis) -> Sequence[Scalar]:
    """The levels of an axis, both ends included; a single level of a range is its middle."""
    if isinstance(axis, tuple):
        return axis
    spread = _spread(axis.low, axis.high, axis.levels, log=axis.log)
    if isinstance(axis.low, int):
        return sorted({round(x) for x in spread})
    return list(dict.fromkeys(min(max(round(x, 12), axis.low), axis.high) for x in spread))


def _spread(low: float, high: float, count: int, *, log: bool) -> list[float]:
    steps = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    if log:
        return [math.exp(math.log(low) + (math.log(high) - math.log(low)) * step) for step in steps]
    return [low + (high - low) * step for step in steps]


def _draws(sampler: optuna.samplers.BaseSampler, space: search_spec.Space) -> Iterator[Configuration]:
    study = optuna.create_study(sampler=sampler)
    known = distributions(space)
    while True:
        yield _runnable(space, configuration(study.ask(known).params))


class _Sobol(optuna.samplers.QMCSampler):  # type: ignore[misc]  # optuna is not followed by mypy
    """Optuna infers the space from the first trial and so draws that one at random; here it is known beforehand."""

    space: dict[str, BaseDistribution]

    def infer_relative_search_space(self, study: object, trial: object) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return self.space


def _sobol(seed: int, space: search_spec.Space) -> _Sobol:
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


# ---- what the map is shown ----------------------------------------------------------------------------------


def _for_map(search: search_spec.Search, seed: int, history: Sequence[FrozenTrial]) -> Configuration:
    """By what blocks measured. The seed is the experiment's own, as a map of the records is fitted with it.

    A block that was given up stays under way: it will tell nothing, and what failed there would fail again.
    """
    from . import cost
    from .divergence_sampler import DivergenceSampler

    known, of_space = distributions(search.space), axes(search.space)
    timed = [trial for trial in history if "block_s" in trial.user_attrs]
    sampler = DivergenceSampler(
        known,
        target=target(search.target),
        law=lawful(search.target),
        seed=seed,
        cost=cost.learn(
            of_space.cube,
            [of_space.numbers(trial.params) for trial in timed],
            [trial.user_attrs["block_s"] for trial in timed],
        ),
    )
    view = optuna.create_study(direction="maximize", sampler=sampler)
    view.add_trials([_as_measured(trial, search.target) for trial in history])
    under_way = [trial.params for trial in history if trial.state in (TrialState.RUNNING, TrialState.FAIL)]
    drawn = view.ask(known).params
    for _ in range(MOST_DRAWS):
        if drawn not in under_way:
            break
        drawn = view.ask(known).params  # the one before counts as under way
    return configuration(drawn)


def _as_measured(trial: FrozenTrial, asked: search_spec.Target) -> FrozenTrial:
    """The attributes that the sampler reads, of capacity or of what takes its place."""
    found = measured(asked, trial.user_attrs)
    attributes: dict[str, Any] = {}
    if found:
        for role, value, capped in zip(ROLES, *found, strict=True):
            attributes |= {f"kv_{role}_bytes": value, f"kv_{role}_capped": capped}
    return optuna.trial.create_trial(
        state=TrialState.RUNNING if trial.state == TrialState.FAIL else trial.state,
        value=trial.value,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=attributes,
    )
