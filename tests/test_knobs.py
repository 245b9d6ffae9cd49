"""Further knobs: any setting searched, every value of it tried before any is used, and the same value in every place."""

import json
from pathlib import Path

import pandas as pd
import pytest
from helpers import experiment_data, run, write_yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import frames
from spark_ray import content, knobs, page_cache, preview
from spark_ray.cluster import one_local_node
from spark_ray.config import load_experiment
from spark_ray.environments import Problem
from spark_ray.errors import InputError
from spark_ray.experiment import Experiment
from spark_ray.search import Search, design
from spark_ray.search.space import axes
from spark_ray.search_spec import Space, Span
from spark_ray.spec import held, with_unit
from spark_ray.units import MIB

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
POINT = {"max_batch_size": 4, "max_num_tokens": 512, "memory_fraction": 0.2}
KNOBS = {
    "engine.kv_cache": {"low": "600MiB", "high": "2GiB", "log": True},
    "engine.hold": ["0s", "250ms"],
    "arms.b.treatment.page_cache": ["keep", "drop"],
    "workload.streaming": False,
    "workload.requests": {"low": 1, "high": 8},
    "engine.allocate": [None, "64MiB"],
}


def data(further=None, **options):
    made = experiment_data(**options)
    made["search"]["space"]["further"] = KNOBS if further is None else further
    return made


def made(further=None, **options):
    return Experiment.model_validate(data(further, **options))


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_made_again_of_its_own_plain_data(path):
    experiment = load_experiment(path).experiment
    again = json.loads(json.dumps(experiment.as_written()))
    assert Experiment.model_validate(again) == experiment
    assert load_experiment(EXPERIMENTS / "aa.yaml").experiment.variants


@given(st.integers(0, 2**62), st.floats(0, 1e12, allow_subnormal=False))
def test_a_size_and_a_duration_are_read_back_as_they_were(size_bytes, duration_s):
    assert held(with_unit(duration_s, "s")) == duration_s
    if size_bytes < 2**53:  # sizes are read as floats times a unit
        assert held(with_unit(size_bytes, "B")) == size_bytes


def test_a_space_is_resolved_to_bytes_and_seconds():
    found = made().search.space.axes
    assert list(found)[:3] == ["max_batch_size", "max_num_tokens", "memory_fraction"]
    assert found["max_num_tokens"] == (512,)
    assert found["engine.kv_cache"] == Span(600 * MIB, 2048 * MIB, log=True, levels=3)
    assert found["engine.hold"] == (0.0, 0.25)
    assert found["workload.streaming"] == (False,)
    assert found["engine.allocate"] == (None, 64 * MIB)
    assert made().search.space.units == {"engine.kv_cache": "B", "engine.hold": "s", "engine.allocate": "B"}


def test_a_configuration_is_put_in_place():
    chosen = {
        "engine.kv_cache": 700 * MIB + 1, "engine.hold": 0.25, "arms.b.treatment.page_cache": "drop",
        "workload.requests": 3, "engine.allocate": None,
    }  # fmt: skip
    there = made().at(POINT | chosen)
    assert (there.engine_of("a").kv_cache, there.engine_of("b").hold) == (700 * MIB + 1, 0.25)
    assert (there.treatment_of("a").page_cache, there.treatment_of("b").page_cache) == ("keep", "drop")
    assert there.workload.requests == 3
    assert there.engine.allocate is None
    assert there.search.space == Space(**POINT)
    plain = Experiment.model_validate(experiment_data())
    assert plain.at(POINT).arms == plain.arms
    assert plain.variants == {"": plain}


MISTAKES = [
    ({"engine.holt": "1s"}, "engine.holt: unknown key; did you mean engine.hold?"),
    ({"engine.hold": {"low": "1s", "high": "2GiB"}}, "low 1s and high 2GiB are not of one unit"),
    ({"engine.hold": {"low": "2s", "high": "1s"}}, "the range is empty: low 2s is above high 1s"),
    ({"engine.hold": {"low": "0s", "high": "1s", "log": True}}, "begins above 0"),
    ({"engine.hold": {"low": 1, "high": 2}}, "engine.hold.low: 1 is not a duration"),
    ({"engine.hold": ["1s", "2GiB"]}, "mixes plain numbers, sizes and durations"),
    ({"engine.hold": ["1s", "1000ms"]}, "the list holds a value twice"),
    ({"engine.hold": []}, "must have at least 1"),
    ({"engine.only_in_arm": ["a", "b\x1b[2J"]}, "holds characters that cannot be shown"),
    ({"engine.only_in_arm": "b\x1b[2J"}, "holds characters that cannot be shown"),
    ({"engine.hold": {"low": "a", "high": "b"}}, "'a' is no number, size or duration"),
    ({"engine.kind": ["fake", "probe"]}, "decides what is run"),
    ({"arms.b.environment.kind": "docker"}, "decides what is run"),
    ({"arms.c.engine.hold": "1s"}, "c is not an arm (arms: a, b)"),
    ({"treatment.swap": "as_is"}, "write arms.ARM.treatment.swap"),
    ({"limits.trial_timeout": "5s"}, "is no place of a knob"),
    ({"max_batch_size": 5}, "is no place of a knob"),
    ({"engine": 5}, "is no place of a knob"),
    ({"arms": 5}, "is no place of a knob"),
    ({"arms.a": 5}, "is no place of a knob"),
    ({"arms.a.treatment": "x"}, "is no place of a knob"),
    ({"engine.": 5}, "is no place of a knob"),
    ({"arms.a.environment.ulimits.\x1b[31m": 5}, "is no place of a knob"),
    ({"workload.requests": {"low": -1, "high": 3}}, "workload.requests.low: must be greater than or equal to 0"),
    ({"arms.a.treatment.page_cache": ["keep", "dorp"]}, "page_cache.1: must be one of"),
    ({"arms.a.treatment.page_cache.fill": "1GiB"}, "arms.a.treatment.page_cache is no mapping but 'keep'"),
    ({"engine.hold": ["1s", "2s"], "arms.b.engine.hold": "3s"}, "does not reach arm b"),
    ({"arms.a.treatment.ballast": "1GiB", "arms.a.treatment.ballast.share": 0.1}, "is inside of arms.a.treatment.ballast"),
]  # fmt: skip


@pytest.mark.parametrize(("further", "words"), MISTAKES, ids=[words[:50] for _, words in MISTAKES])
def test_a_mistake_is_said_where_the_knob_is_written(tmp_path, further, words):
    file = tmp_path / "experiment.yaml"
    file.write_text(json.dumps(data(further)))  # JSON is YAML, on one line
    with pytest.raises(InputError) as refused:
        load_experiment(file)
    assert words in str(refused.value)
    assert str(refused.value).startswith(f"{file}:1: search.space.further")


@pytest.mark.parametrize(
    "place",
    [
        "engine.double", "engine.landscape.file", "arms.a.engine.double", "arms.a.engine.landscape.file",
        "arms.a.environment.rootfs", "arms.a.environment.image", "arms.a.environment.python", "model.path", "search.target.pilot",
    ],
)  # fmt: skip
def test_no_knob_names_a_file_or_content(place):
    """Folders that a YAML names are confined where the file is read; a knob would come after that."""
    assert knobs.refusal(place, {"a": {}}, ())


def test_two_knobs_that_do_not_go_together_are_refused():
    weights = {"engine.weights": ["60GiB", "90GiB"], "engine.memory_total": ["80GiB", "119GiB"]}
    simulated = data(weights)
    simulated["engine"] = {"kind": "simulated"}
    with pytest.raises(ValueError, match=r"with engine\.memory_total: 80GiB"):
        Experiment.model_validate(simulated)


@pytest.mark.parametrize("sampler", ["grid", "random", "qmc"])
def test_a_design_draws_every_kind_of_value(sampler):
    search = made().search.model_copy(update={"sampler": sampler})
    drawn = [point for point, _ in zip(design(search, 3), range(24), strict=False)]
    known = search.space.axes
    for point in drawn:
        assert set(point) == set(known)
        for name, value in point.items():
            axis = known[name]
            inside = value in axis if isinstance(axis, tuple) else axis.low <= value <= axis.high
            assert inside, (name, value)
            assert type(value) in (bool, int, float, str, type(None))
    assert {point["arms.b.treatment.page_cache"] for point in drawn} == {"keep", "drop"}


@pytest.mark.parametrize("sampler", ["qmc", "tpe", "map"])
def test_values_come_through_the_study_as_they_are(tmp_path, sampler):
    search = made().search.model_copy(update={"sampler": sampler})
    asked = []
    for index in range(3):  # a process of its own for each block
        study = Search(search, seed=1, journal=tmp_path / "journal", name="knobs")
        proposal = study.ask()
        asked.append(proposal.configuration)
        told = {f"kv_{role}_bytes": 10**9 + index for role in ("baseline", "against")}
        study.tell(proposal.study_trial, contrast=0.1, constraints={}, attributes=told)
        made().at(proposal.configuration)
    assert all(type(point["engine.kv_cache"]) is int for point in asked)
    assert all(point["workload.streaming"] is False for point in asked)
    assert all(point["arms.b.treatment.page_cache"] in ("keep", "drop") for point in asked)


def test_the_map_counts_choices_that_are_no_numbers():
    known = axes(made().search.space)
    chosen = POINT | {
        "engine.kv_cache": 700 * MIB, "engine.hold": 0.25, "arms.b.treatment.page_cache": "drop",
        "workload.streaming": False, "workload.requests": 3, "engine.allocate": 64 * MIB,
    }  # fmt: skip
    numbers = known.numbers(chosen)
    assert numbers["arms.b.treatment.page_cache"] == 1
    assert known.cube.raw([numbers]).shape == (1, len(chosen))
    (back,) = known.cube.configurations(known.cube.raw([numbers]))
    assert known.params(back) == chosen


@settings(max_examples=25)
@given(low=st.integers(1, 2**40), more=st.integers(0, 2**40), log=st.booleans())
def test_drawn_sizes_are_whole_bytes_inside_the_range(low, more, log):
    size = {"low": f"{low}B", "high": f"{low + more}B", "log": log}
    search = made({"engine.kv_cache": size}).search.model_copy(update={"sampler": "random"})
    value = next(iter(design(search, low % 1000)))["engine.kv_cache"]
    assert type(value) is int
    assert low <= value <= low + more


def test_the_plan_tries_the_flags_of_every_value(monkeypatch):
    tried = []
    monkeypatch.setattr(content, "environment_problems", lambda spec: tried.append(spec) or [])
    chosen = made({"arms.b.environment.memory": {"low": "600MiB", "high": "2GiB"}}, arms=("native", "docker"))
    offer = preview.Offer(None, None, "", None, "", memory_total_bytes=8 << 30)
    plan = preview.preview(chosen, one_local_node(), offer)
    assert {each.memory for each in tried if each.kind == "docker"} == {600 * MIB, 2048 * MIB}
    assert plan.executed == ("a", "b")
    monkeypatch.setattr(content, "environment_problems", _refuse_2_gib)
    plan = preview.preview(chosen, one_local_node(), offer)
    assert [each.what for each in plan.arms[1].problems] == ["with arms.b.environment.memory: 2GiB: too much"]


def _refuse_2_gib(spec):
    return [Problem("too much", "less")] if getattr(spec, "memory", None) == 2048 * MIB else []


def test_fills_of_many_sizes_do_not_fill_the_disk(tmp_path):
    for size_bytes in range(4096, 4096 * 9, 4096):
        page_cache.fill(tmp_path, size_bytes)
    assert (tmp_path / "page-cache-fill-32768").stat().st_size == 32768
    assert len(list(tmp_path.iterdir())) == 4


def test_records_without_knobs_stay_readable():
    record = {"configuration": POINT, "block_id": "b0000", "arm": "a"}
    odd = record | {"configuration": None}
    with_knob = record | {
        "configuration": POINT | {"engine.hold": 0.25, "arms.b.treatment.page_cache": "drop"}
    }
    table = frames.trials([record, odd, with_knob], {"b0000": 0})
    assert table["knobs"].isna().tolist() == [True, True, False]
    assert frames.configuration(table.iloc[0]) == POINT
    assert frames.configuration(table.iloc[1]) == {}
    assert frames.configuration(table.iloc[2]) == with_knob["configuration"]


@pytest.mark.process
def test_a_knob_reaches_the_worker_the_records_and_the_report(tmp_path):
    chosen = data(
        {"engine.kv_cache": {"low": "600MiB", "high": "2GiB"}, "arms.b.engine.hold": ["0s", "10ms"]}, blocks=2
    )
    chosen["search"]["sampler"] = "qmc"
    folder = tmp_path / "run"
    done = run(write_yaml(tmp_path, chosen), "--local", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "knob        engine.kv_cache: 600MiB to 2GiB" in done.stdout
    for path in folder.glob("trials/*/1/record.json"):
        record = json.loads(path.read_text())
        size_bytes = record["configuration"]["engine.kv_cache"]
        assert record["engine"]["kv_cache"] == size_bytes
        assert json.loads(path.with_name("request.json").read_text())["engine"]["kv_cache"] == size_bytes
        assert record["engine"]["hold"] == (
            record["configuration"]["arms.b.engine.hold"] if record["arm"] == "b" else 0
        )
    table = pd.read_parquet(folder / "trials.parquet")
    assert {name for text in table["knobs"] for name in json.loads(text)} == {
        "engine.kv_cache",
        "arms.b.engine.hold",
    }
    assert "engine.kv_cache" in (folder / "report.html").read_text()
