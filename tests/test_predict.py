"""`spark-ray predict`: near the truth where that is known, marked, and never beyond what was searched."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from random import Random

import pytest

from spark_ray import cli, predict
from spark_ray.errors import InputError
from spark_ray.experiment import Experiment
from spark_ray.store import Store
from spark_ray.worker import simulated_law

pytestmark = pytest.mark.process
AT = {"max_batch_size": 16, "max_num_tokens": 4096, "memory_fraction": 0.9}


def said(**at):
    return [word for name, value in at.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.parametrize(
    "at",
    [AT, {"max_batch_size": 64, "max_num_tokens": 16384, "memory_fraction": 0.5}],
    ids=["small", "large"],
)
def test_it_is_near_the_truth(map_run, at):
    store = Store.read(map_run)
    found = predict.predict(store, said(**at)[1::2])
    experiment = Experiment.model_validate(store.plan["experiment"])
    truth = {}
    for each in (found.baseline, found.against):
        engine = experiment.engine_of(each.arm).model_dump(mode="json")
        silent = engine | {"noise": dict.fromkeys(engine["noise"], 0)}
        truth[each.arm] = simulated_law.capacity_bytes(silent, engine["effect"], at, Random(0))  # noqa: S311
        assert each.value.mean == pytest.approx(truth[each.arm], rel=0.1), (
            "drift and start-up are in the blocks"
        )
        assert each.value.low <= each.value.mean <= each.value.high
        assert each.works > 0.99
    assert found.contrast.mean == pytest.approx(1 - truth["container"] / truth["native"], abs=0.03)
    assert found.configuration == at


def test_it_is_marked_in_words_and_in_json(map_run, capsys):
    assert cli.main(["predict", str(map_run), *said(**AT)]) == 0
    assert capsys.readouterr().out.startswith(
        "SIMULATED: no engine made these numbers\nKV capacity expected at"
    )
    assert cli.main(["predict", str(map_run), *said(**AT), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["simulated"]
    assert not data["engine_is_double"]
    assert data["configuration"] == AT
    assert data["arms"]["native"]["kv_bytes"]["low"] < data["arms"]["native"]["kv_bytes"]["mean"]
    assert data["blocks"] == 10


def test_a_map_of_a_probe_says_so(tmp_path, capsys):
    """The real map in this repository."""
    committed = Path(__file__).parent.parent / "experiments" / "results" / "vm" / "map_cgroup" / "run.tar.xz"
    with tarfile.open(committed) as archive:
        archive.extractall(tmp_path, filter="data")
    (plan,) = tmp_path.rglob("plan.json")
    at = said(max_batch_size=16, max_num_tokens=1024, memory_fraction=0.2)
    assert cli.main(["predict", str(plan.parent), *at]) == 0
    assert capsys.readouterr().out.startswith("PROBE: no engine made these numbers\n")
    assert cli.main(["predict", str(plan.parent), *at, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["probe"]
    assert not data["simulated"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (said(max_batch_size=16, max_num_tokens=4096), "memory_fraction is missing"),
        (said(**AT | {"max_num_tokens": 65536}), "max_num_tokens 65536 is outside of what was searched (256 to 32768)"),
        (said(**AT | {"memory_fraction": 0.99}), "memory_fraction 0.99 is outside of what was searched (0.3 to 0.95)"),
        (said(**AT, max_batch=3), "max_batch was not searched: did you mean max_batch_size?"),
        (said(**AT | {"max_batch_size": 2.5}), "max_batch_size must be a whole number: got 2.5"),
        (said(**AT | {"max_batch_size": "many"}), "max_batch_size must be a number: got many"),
        (["--set", "max_batch_size"], "--set max_batch_size: write it as AXIS=VALUE"),
    ],
)  # fmt: skip
def test_a_mistake_is_an_error_that_says_what_was_searched(map_run, settings, message):
    with pytest.raises(InputError) as caught:
        predict.predict(Store.read(map_run), settings[1::2])
    assert message in str(caught.value)
    assert "max_batch_size 1 to 256; max_num_tokens 256 to 32768; memory_fraction 0.3 to 0.95" in str(caught.value)  # fmt: skip


def test_a_run_without_a_map_says_what_it_lacks(few_blocks, tmp_path, capsys):
    assert cli.main(["predict", str(few_blocks), *said(**AT)]) == 2
    shown = capsys.readouterr().err
    assert (
        "has no map yet: 2 of its 2 complete blocks have a number of both arms that nothing capped, and a map needs 3"
        in shown
    )
    assert "mend: go on with it:" in shown
    assert cli.main(["predict", str(tmp_path), *said(**AT)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_blocks_that_another_sampler_chose_have_a_map_where_one_is_asked_for(map_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(map_run, folder, ignore=shutil.ignore_patterns("map.parquet"))
    plan = json.loads((folder / "plan.json").read_text())
    plan["experiment"]["search"]["sampler"] = "qmc"
    (folder / "plan.json").write_text(json.dumps(plan))
    assert cli.main(["report", str(folder)]) == 0
    assert '<h2 id="map">' not in (folder / "report.html").read_text()
    assert cli.main(["report", str(folder), "--map"]) == 0
    assert "the sampler qmc chose, not this map" in (folder / "report.html").read_text()
    assert (folder / "map.parquet").is_file()
    assert cli.main(["report", str(tmp_path), "--map"]) == 2
    assert "--map is of one run" in capsys.readouterr().err
    assert cli.main(["predict", str(folder), *said(**AT)]) == 0


# ---- what may be asked ------------------------------------------------------------------------------------


def searched(further=None, **axes):
    space = {
        "max_batch_size": 16,
        "max_num_tokens": [1024, 4096],
        "memory_fraction": {"low": 0.3, "high": 0.9},
    }
    return Experiment.model_validate(
        {
            "name": "test",
            "engine": {"kind": "simulated"},
            "search": {"space": space | axes | ({"further": further} if further else {})},
            "arms": {"native": {"environment": "native"}, "other": {"environment": "native"}},
        }
    )


def test_an_axis_with_one_value_need_not_be_named():
    asked, notes = predict._asked(searched(), ["max_num_tokens=4096", "memory_fraction=0.5"])
    assert asked == {"max_batch_size": 16, "max_num_tokens": 4096, "memory_fraction": 0.5}
    assert notes == ()
    with pytest.raises(InputError, match="max_batch_size 8 is outside"):
        predict._asked(searched(), ["max_num_tokens=4096", "memory_fraction=0.5", "max_batch_size=8"])


def test_a_number_between_those_of_a_list_is_noted():
    _, notes = predict._asked(searched(), ["max_num_tokens=2048", "memory_fraction=0.5"])
    assert notes == ("max_num_tokens 2048 lies between values that were searched (1024, 4096)",)


def test_further_knobs_are_asked_as_they_are_written():
    experiment = searched(
        {"engine.max_seq_len": [1024, 2048], "engine.weights": {"low": "60GiB", "high": "63GiB"}}
    )
    settings = ["max_num_tokens=4096", "memory_fraction=0.5", "engine.max_seq_len=2048"]
    asked, _ = predict._asked(experiment, [*settings, "engine.weights=61GiB"])
    assert asked["engine.weights"] == 61 << 30
    with pytest.raises(
        InputError,
        match=r"engine\.weights 70\.00 GiB is outside of what was searched \(60\.00 GiB to 63\.00 GiB\)",
    ):
        predict._asked(experiment, [*settings, "engine.weights=70GiB"])


def test_a_word_that_looks_like_a_number_is_the_word_that_was_searched():
    assert predict._value("0", ("0", "0-3")) == "0"
    assert predict._value("0", (0, 3)) == 0


def test_fewer_tokens_than_sequences_are_refused():
    experiment = searched(max_num_tokens={"low": 8, "high": 4096})
    with pytest.raises(InputError, match="max_num_tokens 8 is below max_batch_size 16"):
        predict._asked(experiment, ["max_num_tokens=8", "memory_fraction=0.5"])


def test_what_was_run_as_it_was_listed_is_answered():
    experiment = searched(max_num_tokens=[8, 4096])
    asked, _ = predict._asked(experiment, ["max_num_tokens=8", "memory_fraction=0.5"])
    assert asked["max_num_tokens"] == 8


@pytest.mark.parametrize("written", ["true", "True"])
def test_yes_and_no_are_typed_as_they_are_shown(written):
    axis = (True, False)
    assert predict._value(written, axis) is True
    assert predict._misfit("engine.cuda_graphs", True, axis, "") == (None, None)
    assert predict._words((True, False, None), "") == "true, false, null"
    assert predict._value("null", (None, 5)) is predict._value("None", (None, 5)) is None


def test_a_list_of_which_some_are_whole_has_numbers_between():
    assert predict._misfit("engine.landscape.parameters.gain", 1.5, (1, 1.5, 2), "") == (None, None)
    problem, _ = predict._misfit("max_batch_size", 1.5, (1, 2), "")
    assert "whole number" in problem


def test_nothing_is_the_least_that_is_predicted():
    found = predict.Interval.of(-40.0, 1.0, 0.0)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    assert predict.Interval.of(0.9, 0.2, most=1.0).high == 1.0
