"""Noise between equal arms, and what a budget shows against it: formulas held against simulated tests, and a pilot of each experiment."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import experiment_data, run_without_report, spark_ray, write_yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import noise, statistics
from spark_ray import pilot, power
from spark_ray.config import load_experiment
from spark_ray.errors import InputError, RunError
from spark_ray.experiment import Experiment
from spark_ray.power import MAP_PARAMETERS, Noise
from spark_ray.running import Options
from spark_ray.store import Store

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
TESTS = 20_000
NOISE = Noise("runs/x-pilot", blocks=8, sd=0.01, floor=0.012)


def made(**target):
    data = experiment_data()
    data["search"]["target"] = target
    return Experiment.model_validate(data)


# ---- formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 3, 8, 40])
def test_the_detectable_effect_is_shown_by_four_of_five_tests(blocks):
    effect = power.detectable(0.02, blocks)
    drawn = np.random.default_rng(blocks).normal(effect, 0.02, size=(TESTS, blocks))
    shown = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < power.SIGNIFICANCE
    assert shown.mean() == pytest.approx(power.POWER, abs=0.02)


@pytest.mark.parametrize("blocks", [8, 16, 32])
def test_the_detectable_effect_of_a_map_is_that_of_a_place_in_a_balanced_design(blocks):
    """Each place of a two-level factorial has the leverage parameters / blocks, which is the mean of any design."""
    signs = np.array([[1, a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], dtype=float)
    design = np.tile(signs, (blocks // 8, 1))
    effect = power.detectable(0.02, blocks, MAP_PARAMETERS)
    drawn = effect + np.random.default_rng(blocks).normal(0.0, 0.02, size=(TESTS, blocks))
    slopes = drawn @ design / blocks
    residual_sd = np.sqrt(((drawn - slopes @ design.T) ** 2).sum(axis=1) / (blocks - MAP_PARAMETERS))
    at_a_place = slopes @ design[0] / (residual_sd * np.sqrt(MAP_PARAMETERS / blocks))
    critical = stats.t.ppf(1 - power.SIGNIFICANCE / 2, blocks - MAP_PARAMETERS)
    assert (np.abs(at_a_place) > critical).mean() == pytest.approx(power.POWER, abs=0.02)


@settings(max_examples=40)
@given(st.floats(1e-4, 0.1), st.floats(1e-3, 0.5), st.sampled_from([1, MAP_PARAMETERS]))
def test_the_blocks_needed_are_the_fewest(sd, effect, parameters):
    blocks = power.blocks_needed(sd, effect, parameters)
    assert power.detectable(sd, blocks, parameters) <= effect
    before = power.detectable(sd, blocks - 1, parameters)
    assert before is None or before > effect


def test_what_blocks_cannot_show():
    assert power.detectable(0.01, MAP_PARAMETERS, MAP_PARAMETERS) is None
    assert power.detectable(0.01, 1) is None
    assert power.blocks_needed(0.1, 1e-7) is None
    assert power.detectable(0.0, 8) == 0.0


@settings(max_examples=25)
@given(st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=20, unique=True))
def test_the_floor_is_that_of_the_report(contrasts):
    reported = noise.Twin("again", "native", statistics.paired(contrasts))
    found = power.noise_of(contrasts, "x")
    assert (found.floor, found.sd) == pytest.approx(
        (reported.floor, reported.contrast.sd), rel=1e-6, abs=1e-12
    )
    low, high = found.sd_between
    assert low <= found.sd <= high


def test_the_interval_of_the_spread_covers_it():
    drawn = np.random.default_rng(5).normal(0.0, 1.0, size=(2000, 8))
    ends = np.array([power.noise_of(list(each), "x").sd_between for each in drawn])
    assert ((ends[:, 0] < 1) & (ends[:, 1] > 1)).mean() == pytest.approx(0.95, abs=0.02)


# ---- the margin in force ----------------------------------------------------------------------------------


def test_the_margin_is_at_least_the_floor():
    assert power.in_force(made(margin=0.01), NOISE).search.target.margin == 0.012
    assert power.in_force(made(margin=0.05), NOISE).search.target.margin == 0.05
    assert power.in_force(made(margin=0.01), None).search.target.margin == 0.01
    plan = {"experiment": made(margin=0.01).as_written(), "noise": vars(NOISE)}
    assert power.experiment_of(plan).search.target.margin == 0.012
    assert power.experiment_of(plan | {"noise": None}).search.target.margin == 0.01
    assert (
        power.experiment_of({"experiment": plan["experiment"]}).search.target.margin == 0.01
    )  # an older run


def test_a_plan_says_what_is_known_of_the_noise():
    search = made(margin=0.01, wished=0.005).search
    assert power.said(None, search) == [
        "noise       not known, nor how many blocks show 0.5%; spark-ray pilot EXPERIMENT.yaml measures it"
    ]
    lines = power.said(NOISE, search, mark="SIMULATED")
    assert lines[0].startswith(
        "noise       SIMULATED standard deviation 1.00% a block (0.66% to 2.04%), by 8 blocks"
    )
    assert lines[1] == "margin      1.20%; the noise floor is 1.20%"
    assert "nothing (fewer than 5 blocks) by a map" in lines[2]  # of 2 blocks
    assert lines[3] == "wished      0.50% takes 34 blocks at one configuration, 128 blocks for a map"


# ---- pilots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_has_a_pilot_of_equal_arms(path):
    experiment = load_experiment(path).experiment
    found = Experiment.model_validate(pilot.derived(experiment, 8))
    baseline = experiment.compared.baseline
    assert next(iter(found.arms)) == baseline
    landscape = getattr(experiment.engine, "landscape", None)  # is told the arm's name
    assert power.twins(found) == (None if landscape else (baseline, list(found.arms)[1]))
    assert found.search.blocks == 8
    assert (
        found.engine_of(baseline) == next(iter(experiment.variants.values())).engine_of(baseline)
        or experiment.search.space.further
    )
    assert not [knob for knob in found.search.space.further if knob.startswith("arms.")]


def test_knobs_of_an_arm_are_the_same_in_both_arms_of_a_pilot():
    data = experiment_data()
    data["search"]["space"]["further"] = {
        "engine.hold": ["0s", "1s"],
        "arms.a.engine.kv_cache": {"low": "1GiB", "high": "2GiB"},
        "arms.b.treatment.page_cache": ["drop", "keep"],
    }
    found = Experiment.model_validate(pilot.derived(Experiment.model_validate(data), 4))
    assert {found.engine_of(arm).kv_cache for arm in found.arms} == {1 << 30}
    assert list(found.search.space.further) == ["engine.hold"]


def test_a_run_that_is_no_pilot_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"search.target.pilot: .* is not a run"):
        power.of_pilot(tmp_path, made())
    different = experiment_data(arms=("native", "chroot"))
    Store.create(tmp_path / "no", {}, {"experiment": different}).close()
    with pytest.raises(InputError, match="has no arm that is the same as its baseline"):
        power.of_pilot(tmp_path / "no", made())
    Store.create(tmp_path / "few", {}, {"experiment": experiment_data()}).close()
    with pytest.raises(InputError, match="measured 0 blocks, at least 4"):
        power.of_pilot(tmp_path / "few", made())
    simulated = experiment_data() | {"engine": {"kind": "simulated"}}
    with pytest.raises(InputError, match="is of engine fake, this experiment of simulated"):
        power.of_pilot(tmp_path / "few", Experiment.model_validate(simulated))


def test_what_no_pilot_can_say_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    landscape = EXPERIMENTS / "simulated_landscape.yaml"
    monkeypatch.chdir(EXPERIMENTS.parent)
    with pytest.raises(InputError, match="told the name of its arm"):
        pilot.run(landscape, (), 8, Options(out=tmp_path / "run", local=True))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(Store, "capacities", lambda _, state, __: {"a": 1, "b": 90 + state})
    monkeypatch.setattr(Store, "blocks", lambda _: range(4))
    monkeypatch.setattr(Store, "state", lambda _, block: _State(block))
    Store.create(tmp_path / "wild", {}, {"experiment": experiment_data()}).close()
    with pytest.raises(InputError, match="no contrast can be above it"):
        power.of_pilot(tmp_path / "wild", made())


class _State(int):
    complete = True


def test_an_experiment_of_another_version_is_said_and_no_traceback():
    plan = {"experiment": experiment_data(kind="abacus"), "spark_ray_version": "9.9"}
    with pytest.raises(RunError, match=r"begun with spark_ray 9\.9, is none of this version: engine"):
        power.experiment_of(plan)


@pytest.mark.process
def test_a_pilot_sets_the_margin_of_the_run_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = experiment_data(blocks=5) | {
        "name": "probed",
        "engine": {"kind": "simulated"},
        "workload": {"requests": 0},
    }
    data["search"]["target"] = {"margin": 1e-6, "wished": 0.02}
    path = write_yaml(tmp_path, data)
    measured = spark_ray("pilot", path, "--local", "--blocks", 4)
    assert measured.returncode == 0, measured.stderr
    assert "pilot: runs/probed-pilot" in measured.stdout
    assert "noise       SIMULATED standard deviation" in measured.stdout
    reported = json.loads((tmp_path / "runs/probed-pilot/summary.json").read_text())
    data["search"]["target"]["pilot"] = "runs/probed-pilot"
    path = write_yaml(tmp_path, data)
    begun = run_without_report(path, "--max-blocks", 1)
    assert begun.returncode == 0, begun.stderr
    plan = Store.read(tmp_path / "runs/probed").plan
    assert plan["noise"]["floor"] == pytest.approx(reported["noise"][0]["floor"])
    assert f"margin      {plan['noise']['floor']:.2%}" in begun.stdout
    (tmp_path / "runs/probed-pilot").rename(tmp_path / "elsewhere")  # a run keeps what it was planned with
    ended = run_without_report(path, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert f"margin      {plan['noise']['floor']:.2%}" in ended.stdout
    assert len(Store.read(tmp_path / "runs/probed").blocks()) == 5
    refused = spark_ray("plan", path)
    assert refused.returncode == 2
    assert "runs/probed-pilot is not a run" in refused.stderr
