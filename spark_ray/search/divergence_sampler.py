"""DivergenceSampler: an Optuna sampler that maps where two arms diverge, instead of looking for an optimum.

It can be used in any Optuna study. What a trial measured is told by user attributes, not by the objective value (which
Optuna shows and nobody here reads):

    kv_baseline_bytes, kv_against_bytes     capacity of both arms, or None: no capacity there
    kv_baseline_capped, kv_against_capped   True: something else than memory limited it (may be left out)

A trial without the first two, or one that failed, says nothing, and its place is not asked again; unless it violates the
constraint `no_capacity`: then neither arm had any.

    import optuna
    from spark_ray.search.divergence_sampler import DivergenceSampler

    def objective(trial):
        batch = trial.suggest_int("max_batch_size", 1, 256, log=True)
        tokens = trial.suggest_int("max_num_tokens", 256, 32768, log=True)
        fraction = trial.suggest_float("memory_fraction", 0.3, 0.95)
        baseline, against = measure(batch, tokens, fraction)       # bytes
        trial.set_user_attr("kv_baseline_bytes", baseline)
        trial.set_user_attr("kv_against_bytes", against)
        return abs(1 - against / baseline)

    study = optuna.create_study(sampler=DivergenceSampler(margin=0.05, seed=0))
    study.optimize(objective, n_trials=40)
    surrogate = study.sampler.surrogate(study)                     # the map: surrogate.predict([...])

With parameters of these three names the surrogate starts from the sizing laws of inference engines; with any others it is a
plain Gaussian process. Trials that are running count as measured at their predicted value, so many may be asked at once.
The n-th draw depends on the seed and the trials alone, not on how long a process lived.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from .. import search_spec
from ..search_spec import Span
from .acquire import Cost, next_points
from .cube import Cube, axis_of, is_number
from .surrogate import Observation, Surrogate, TooFewBlocks
from .target import Target
from .threads import one_thread

BASELINE, AGAINST = "kv_baseline_bytes", "kv_against_bytes"
BASELINE_CAPPED, AGAINST_CAPPED = "kv_baseline_capped", "kv_against_capped"
NO_CAPACITY = "no_capacity"


class DivergenceSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]  # optuna is not followed by mypy
    """Chooses the configurations that tell most about where two arms diverge.

    Args:
        search_space: What is searched. Left out, it is what all trials so far have in common, and the first one is random.
        margin: The contrast, 1 - against / baseline, above which arms diverge.
        target: What is asked of the map, if not the level set at the margin.
        law: False: a plain Gaussian process, even if the parameters are an engine's.
        seed: Of every draw. None: 0, as a map should be repeatable.
        cost: What a block at a configuration takes, in any unit: cheap ones are preferred.
    """

    def __init__(
        self,
        search_space: Mapping[str, BaseDistribution] | None = None,
        *,
        margin: float = 0.05,
        target: Target | None = None,
        law: bool = True,
        seed: int | None = None,
        cost: Cost | None = None,
    ) -> None:
        self._search_space = dict(search_space) if search_space is not None else None
        self._target = target or Target(margin=margin)
        self._law = law
        self._seed = seed or 0
        self._cost = cost
        self._common = optuna.search_space.IntersectionSearchSpace(include_pruned=True)
        self._random = optuna.samplers.RandomSampler(seed=self._seed)

    def reseed_rng(self) -> None:
        """Parameters outside the search space are random; nothing else is."""
        self._random.reseed_rng()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        del trial
        return self._common.calculate(study) if self._search_space is None else self._search_space

    @one_thread
    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        axes = Axes(search_space)
        surrogate, known = self._fit(study, axes)
        # Places that say nothing yet, or never will: were they left out, the same draw would be made for ever.
        silent = [
            axes.numbers(each.params)
            for each in study.get_trials(deepcopy=False)
            if each.number != trial.number and axes.has(each) and not _told(each, axes)
        ]
        pending = silent if surrogate else [*(each.configuration for each in known), *silent]
        (chosen,) = next_points(surrogate, axes.cube, self._target, 1, pending, self._seed, self._cost)
        return axes.params(chosen)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Warn of an objective that tells nothing: a search by it would be no better than points chosen in advance."""
        del study, values
        if state == TrialState.COMPLETE and not {BASELINE, AGAINST} <= set(trial.user_attrs):
            warnings.warn(
                f"trial {trial.number} taught the sampler nothing: the objective did not set the user attributes "
                f"{BASELINE} and {AGAINST}",
                stacklevel=2,
            )

    @one_thread
    def surrogate(self, study: optuna.Study) -> Surrogate | None:
        """What is known after the trials of a study; None while too few measured both arms."""
        space = self.infer_relative_search_space(study, None)
        return self._fit(study, Axes(space))[0] if space else None

    def _fit(self, study: optuna.Study, axes: Axes) -> tuple[Surrogate | None, list[Observation]]:
        trials = study.get_trials(deepcopy=False)
        known = [each for trial in trials if axes.has(trial) and (each := _told(trial, axes))]
        try:
            return Surrogate.fit(axes.cube, known, law=self._law, seed=self._seed), known
        except TooFewBlocks:
            return None, known


class Axes:
    """Optuna's distributions as a cube, and parameters as numbers; choices that are no numbers are counted."""

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self._choices = {
            name: each.choices
            for name, each in distributions.items()
            if isinstance(each, CategoricalDistribution) and not all(map(is_number, each.choices))
        }
        self._names = tuple(distributions)
        self.cube = Cube(tuple(axis_of(name, _searched(name, each)) for name, each in distributions.items()))

    def has(self, trial: FrozenTrial) -> bool:
        return all(name in trial.params for name in self._names)

    def numbers(self, params: Mapping[str, Any]) -> dict[str, int | float]:
        return {
            name: self._choices[name].index(params[name]) if name in self._choices else params[name]
            for name in self._names
        }

    def params(self, numbers: Mapping[str, int | float]) -> dict[str, Any]:
        return {
            name: self._choices[name][int(value)] if name in self._choices else value
            for name, value in numbers.items()
        }


def _searched(name: str, known: BaseDistribution) -> search_spec.Axis:
    match known:
        case IntDistribution(step=1) | FloatDistribution(step=None):
            return Span(known.low, known.high, known.log, levels=1)
        case IntDistribution():
            return tuple(range(known.low, known.high + 1, known.step))
        case FloatDistribution():
            count = round((known.high - known.low) / known.step)
            # at the end a rounding error more would be a value that Optuna draws for itself
            return tuple(min(known.low + known.step * each, known.high) for each in range(count + 1))
        case CategoricalDistribution():
            return tuple(known.choices)
        case _:
            raise TypeError(f"{name}: {type(known).__name__} is no distribution that this sampler knows")


def _told(trial: FrozenTrial, axes: Axes) -> Observation | None:
    if trial.state not in {TrialState.COMPLETE, TrialState.PRUNED}:
        return None
    told = trial.user_attrs
    if BASELINE not in told or AGAINST not in told:
        if trial.constraints.get(NO_CAPACITY, -1.0) <= 0:
            return None
        told = {BASELINE: None, AGAINST: None}
    capped = bool(told.get(BASELINE_CAPPED)), bool(told.get(AGAINST_CAPPED))
    return Observation(axes.numbers(trial.params), (told[BASELINE], told[AGAINST]), capped)
