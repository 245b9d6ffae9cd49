"""The sampler in plain Optuna studies, as anyone would use it."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from test_surrogate import CUBE, GIB, memfree

from spark_ray.search.divergence_sampler import Axes, DivergenceSampler

SEARCH_SPACE = {
    "max_batch_size": IntDistribution(1, 256, log=True),
    "max_num_tokens": IntDistribution(256, 32768, log=True),
    "memory_fraction": FloatDistribution(0.3, 0.95),
}


def study_with(sampler):
    return optuna.create_study(sampler=sampler, direction="maximize")


def measure(params):
    baseline, against = memfree(CUBE.raw([params]))[0] * GIB
    return baseline, against


def objective(trial):
    params = {
        "max_batch_size": trial.suggest_int("max_batch_size", 1, 256, log=True),
        "max_num_tokens": trial.suggest_int("max_num_tokens", 256, 32768, log=True),
        "memory_fraction": trial.suggest_float("memory_fraction", 0.3, 0.95),
    }
    baseline, against = measure(params)
    trial.set_user_attr("kv_baseline_bytes", baseline)
    trial.set_user_attr("kv_against_bytes", against)
    return abs(1 - against / baseline)


def told(params, kv=(), **more):
    names = ("kv_baseline_bytes", "kv_against_bytes")
    return create_trial(
        params=params, distributions=SEARCH_SPACE, user_attrs=dict(zip(names, kv, strict=False)), **more
    )


def filled(count, sampler=None):
    study = study_with(sampler or DivergenceSampler(SEARCH_SPACE, seed=4))
    for params in CUBE.configurations(CUBE.filling(count, 4)):
        study.add_trial(told(params, measure(params), value=0.0))
    return study


def test_define_by_run_finds_the_law():
    study = study_with(DivergenceSampler(seed=1))
    study.optimize(objective, n_trials=14)
    surrogate = study.sampler.surrogate(study)
    assert surrogate.family == "memfree"
    places = CUBE.filling(64, 9)
    true = memfree(places)
    error = surrogate.predict(places).contrast_mean - (1 - true[:, 1] / true[:, 0])
    assert np.median(np.abs(error)) < 0.01


def test_a_draw_depends_on_seed_and_trials_alone():
    one = filled(12).ask(SEARCH_SPACE).params
    assert filled(12).ask(SEARCH_SPACE).params == one
    lived = DivergenceSampler(SEARCH_SPACE, seed=4)
    filled(8, lived).ask(SEARCH_SPACE)
    assert filled(12, lived).ask(SEARCH_SPACE).params == one


def test_many_asked_at_once_are_not_the_same():
    for count in (0, 12):
        study = filled(count)
        asked = [tuple(study.ask(SEARCH_SPACE).params.values()) for _ in range(6)]
        assert len(set(asked)) >= 5


def test_no_capacity_is_told_as_none_or_as_a_constraint():
    study = filled(20)
    small = {"max_batch_size": 256, "max_num_tokens": 32768, "memory_fraction": 0.3}
    study.add_trial(told(small, (5 * GIB, None), state=TrialState.PRUNED))
    near = {**small, "memory_fraction": 0.31}
    study.add_trial(told(near, state=TrialState.PRUNED, constraints={"no_capacity": 1.0}))
    surrogate = study.sampler.surrogate(study)
    said = surrogate.predict([small])
    assert surrogate.blocks == 22
    assert said.feasible_b[0] < 0.9


def test_trials_without_a_measurement_are_ignored():
    study = filled(10)
    params = CUBE.configurations(CUBE.corners())[0]
    study.add_trial(told(params, value=0.3))
    study.add_trial(told(params, measure(params), state=TrialState.FAIL))
    assert study.sampler.surrogate(study).blocks == 10
    assert study_with(DivergenceSampler()).sampler.surrogate(study_with(None)) is None


def test_a_place_where_trials_fail_is_not_asked_for_ever():
    for count in (0, 12):
        study = filled(count)
        for _ in range(5):
            study.tell(study.ask(SEARCH_SPACE), state=TrialState.FAIL)
        asked = {tuple(trial.params.values()) for trial in study.trials[count:]}
        assert len(asked) >= 4


def test_an_objective_that_tells_nothing_is_warned_of():
    study = filled(0)
    for _ in range(4):
        with pytest.warns(UserWarning, match="did not set the user attributes kv_baseline_bytes"):
            study.tell(study.ask(SEARCH_SPACE), 0.1)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 4


def capped_at(params, kv):
    trial = told(params, (kv, kv), value=0.0)
    trial.user_attrs["kv_baseline_capped"] = trial.user_attrs["kv_against_capped"] = True
    return trial


def test_capped_arms_are_told_by_attributes():
    study = filled(10)
    study.add_trial(capped_at(CUBE.configurations(CUBE.corners())[3], 90 * GIB))
    assert study.sampler.surrogate(study).caps_bytes == (90 * GIB, 90 * GIB)


def test_a_cap_that_others_exceed_bounds_nothing_but_itself():
    """What limits it may be searched itself, as a size of the pool is."""
    study = filled(10)
    one, other = CUBE.configurations(CUBE.corners())[3:5]
    study.add_trial(capped_at(one, 9 * GIB))
    assert study.sampler.surrogate(study).caps_bytes == (np.inf, np.inf)
    study = filled(10)
    study.add_trial(capped_at(one, 90 * GIB))
    study.add_trial(capped_at(other, 100 * GIB))
    assert study.sampler.surrogate(study).caps_bytes == (np.inf, np.inf)


def test_the_last_step_of_a_float_is_one_that_optuna_knows():
    known = {"memory_fraction": FloatDistribution(0.3, 0.9, step=0.1)}
    levels = Axes(known).cube.axes[0].levels
    assert len(levels) == 7
    assert all(known["memory_fraction"]._contains(level) for level in levels)


def test_any_parameters_will_do():
    space = {
        "kind": CategoricalDistribution(["a", "b"]),
        "x": FloatDistribution(0, 1),
        "even": IntDistribution(2, 8, step=2),
        "quarter": FloatDistribution(0, 1, step=0.25),
    }
    study = study_with(DivergenceSampler(space, seed=0))
    for _ in range(16):
        trial = study.ask(space)
        assert trial.params["kind"] in ("a", "b")
        assert trial.params["even"] in (2, 4, 6, 8)
        assert trial.params["quarter"] * 4 % 1 == 0
        against = 8 + trial.params["x"] - (trial.params["kind"] == "b")
        trial.set_user_attr("kv_baseline_bytes", 10.0)
        trial.set_user_attr("kv_against_bytes", against)
        study.tell(trial, 1 - against / 10)
    assert study.sampler.surrogate(study).family is None


def test_two_objectives_are_refused():
    study = optuna.create_study(sampler=DivergenceSampler(SEARCH_SPACE), directions=["maximize", "maximize"])
    with pytest.raises(ValueError, match="multi-objective"):
        study.ask(SEARCH_SPACE)
