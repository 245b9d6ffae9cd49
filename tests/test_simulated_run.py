"""Runs of the simulated engine: its numbers marked wherever they stand, its effects found again to the byte, landscapes of one's own."""

import json
from pathlib import Path

import pandas as pd
import pytest
from helpers import run, run_without_report, write_yaml
from rich.console import Console

from analysis import attribution, contrasts
from analysis.attribution import column
from spark_ray import landscape, measurements, opening, preview, several
from spark_ray.cluster import one_local_node
from spark_ray.config import load_experiment
from spark_ray.errors import InputError
from spark_ray.experiment import Experiment
from spark_ray.record import Record
from spark_ray.result import Asked, Result, misfits
from spark_ray.store import Store
from spark_ray.terminal import show_standing
from spark_ray.units import GIB
from spark_ray.worker import simulated_law as law

BLOCK = 32 * 73728
AXES = ("max_batch_size", "max_num_tokens", "memory_fraction")


def data(arms=("native", "native"), arm_engine=None, **settings):
    return {
        "name": "simulated",
        "seed": 4,
        "engine": {"kind": "simulated"} | settings,
        "workload": {"requests": 0},
        "search": {
            "sampler": "random", "blocks": 4,
            "space": {"max_batch_size": {"low": 1, "high": 64}, "max_num_tokens": 4096, "memory_fraction": {"low": 0.6, "high": 0.9}},
        },
        "arms": {
            "plain": {"environment": arms[0]},
            "taking": {"environment": arms[1], "engine": arm_engine or {"effect": {"held": "3GiB"}}},
        },
        "limits": {"trial_timeout": "60s"},
    }  # fmt: skip


def records(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "trials").glob("*/*/record.json"))]


def kv(folder):
    return {each["trial_id"]: each["result"]["measurements"]["kv_cache"]["bytes"] for each in records(folder)}


TAKING = {
    "memfree": (
        "memfree-taking",
        {"held": "1GiB", "per_token": "64KiB", "per_batch_doubling": "50MiB", "interaction": "5MiB", "page_cache": "3GiB",
         "bumps": [{"takes": "1GiB", "around": {"max_batch_size": 16}}]},
    ),
    "memavailable": ("memavailable-taking", {"held": "1GiB", "share": 0.05, "page_cache": "3GiB"}),
}  # fmt: skip
"""An arm of each family, and the one beside it with what it takes."""
EVERYTHING = {
    "name": "everything",
    "seed": 4,
    "engine": {
        "kind": "simulated",
        "page_cache": {"start": "2GiB", "growth": "100MiB", "most": "3GiB"},
        "cliffs": [{"axis": "max_num_tokens", "above": 8000, "takes": "2GiB"}],
        "max_tokens": 500_000,
        "noise": {
            "sd": "200MiB", "shared_sd": "300MiB", "relative_sd": 0.002, "burst": "1GiB", "burst_share": 0.2,
            "drift": "10MiB", "start_up": "1GiB", "wander_sd": "300MiB", "carry_over": "100MiB",
        },
    },
    "workload": {"requests": 0},
    "search": {
        "sampler": "qmc", "blocks": 3,
        "space": {
            "max_batch_size": {"low": 1, "high": 256, "log": True},
            "max_num_tokens": {"low": 256, "high": 16384, "log": True},
            "memory_fraction": {"low": 0.75, "high": 0.95},
        },
    },
    "arms": {
        name: {"environment": "native", "engine": {"memory_view": view, "effect": takes}} | rung
        for view, (taking, effect) in TAKING.items()
        for name, takes, rung in ((view, {}, {}), (taking, effect, {"builds_on": view}))
    },
    "contrast": {"baseline": "memfree", "against": "memfree-taking"},
    "limits": {"trial_timeout": "60s"},
}  # fmt: skip
"""Both families, and whatever can disturb them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    path = write_yaml(folder, EVERYTHING)
    done = run(path, "--local", "--out", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


@pytest.mark.process
def test_every_place_where_a_number_stands_says_simulated(finished):
    folder, shown = finished
    assert "SIMULATED: no engine runs; capacities come from a formula" in shown
    assert "b0000 SIMULATED done: divergence" in shown
    assert "SIMULATED everything: KV cache by arm" in shown
    for record in records(folder):
        Record.model_validate_json(json.dumps(record))
        assert record["outcome"]["kind"] == "ok"
        assert record["result"]["measurements"]["engine"]["simulated"] is True
        assert record["treatment"]["page_cache"] == "keep", "nothing of this host is touched"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["simulated"] is True
    assert summary["verdict"].startswith("SIMULATED: no engine ran, capacities come from a formula.")
    assert summary["findings"][0]["severity"] == "grave"
    assert "simulated" in summary["findings"][0]["sentence"]
    page = (folder / "report.html").read_text()
    assert "<title>SIMULATED " in page
    assert '<p class="verdict alarm" id="simulated">' in page
    assert "<h3>SIMULATED: " in page
    assert "<h3>" not in page.replace("<h3>SIMULATED: ", "")
    for table in ("trials", "ladder"):
        assert pd.read_parquet(folder / f"{table}.parquet")["simulated"].all()
    shown = Console(record=True, width=200)
    show_standing(shown, {"everything": several.standing(Store.read(folder))}, whole=True)
    assert shown.export_text().startswith("SIMULATED 3 of 3 blocks complete")


def taken_bytes(trial):
    """What a trial's environment takes and disturbs, by the formula alone; memory of the machine, before the law."""
    moment = law.Moment(int(trial["block_index"]), int(trial["position"]), len(TAKING) * 2)
    settings = trial["engine"]
    point = {name: trial[name] for name in AXES}
    found = law.found(settings, trial["arm"], EVERYTHING["seed"], moment)
    effect = settings["effect"]
    whole = law.size(settings, effect | {"share": 0}, point, found._replace(taken_share=0)).available_bytes
    share = (effect["share"] + found.taken_share) * whole
    share /= trial["memory_fraction"] if settings["memory_view"] == "memfree" else 1
    cache = found.page_cache_bytes + effect["page_cache"]
    return law.effect_bytes(effect, point) + found.taken_bytes + share, cache


@pytest.mark.process
def test_the_analysis_finds_each_effect_to_the_byte(finished):
    """Through worker, records and tables, with everything on: nothing is lost and nothing is named something else."""
    trials = pd.read_parquet(finished[0] / "trials.parquet")
    settings = {record["trial_id"]: record["engine"] for record in records(finished[0])}
    trials["engine"] = trials["trial_id"].map(settings)
    for base, (arm, _) in TAKING.items():
        pairs = contrasts.pairs(trials, (base, arm), base).set_index("block_id")
        assert len(pairs) == EVERYTHING["search"]["blocks"]
        rows = {name: trials[trials["arm"] == name].set_index("block_id") for name in (base, arm)}
        for block, pair in pairs.iterrows():
            (own, cache), (others, less) = (taken_bytes(rows[name].loc[block]) for name in (arm, base))
            memfree = base == "memfree"
            worth = pair["memory_fraction"] if memfree else 1
            assert pair[column("other_processes")] == pytest.approx(-worth * (own - others), abs=3)
            assert pair[column("cache_other")] == pytest.approx(-worth * (cache - less), abs=2)
            # page cache is free memory to one of the families
            assert pair[column("view")] == pytest.approx(0 if memfree else cache - less, abs=2)
            parts = {name: pair[column(name)] for name in attribution.TERMS}
            assert sum(value for value in parts.values() if pd.notna(value)) == pytest.approx(
                pair["delta_kv_cache_bytes"], abs=2
            )
            named = {name for name, value in parts.items() if pd.notna(value) and abs(value) > 2}
            assert named <= {"other_processes", "cache_other", "view", "engine"}
    summary = json.loads((finished[0] / "summary.json").read_text())
    terms = summary["contrasts"][0]["mean_term_bytes"]
    assert sum(terms.values()) == pytest.approx(summary["contrasts"][0]["mean_delta_kv_cache_bytes"], abs=8)


@pytest.mark.process
def test_a_run_can_be_repeated_to_the_byte_and_resumed_into_the_same(finished, tmp_path):
    path = write_yaml(tmp_path, EVERYTHING)
    done = run_without_report(path, "--out", tmp_path / "run", "--max-blocks", 1)
    assert done.returncode == 0, done.stderr
    assert len(kv(tmp_path / "run")) == len(EVERYTHING["arms"])
    done = run_without_report(path, "--out", tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert kv(tmp_path / "run") == kv(finished[0])


@pytest.mark.process
def test_a_result_without_its_mark_is_not_believed(finished):
    record = next(each for each in records(finished[0]) if each["arm"] == "memfree")
    result = record["result"]
    asked = Asked(record["trial_id"], record["attempt"], record["engine"], record["configuration"], record["workload"])  # fmt: skip
    assert not list(misfits(Result.model_validate_json(json.dumps(result)), asked))
    for kind, part, value in (
        ("simulated", "engine", {"name": "x", "version": "1"}),
        ("simulated", "sizing", result["measurements"]["sizing"] | {"law": measurements.LAW}),
        ("fake", "engine", {"name": "x", "version": "1", "simulated": True}),
    ):
        told = Result.model_validate_json(
            json.dumps(result | {"measurements": result["measurements"] | {part: value}})
        )
        found = list(misfits(told, Asked(**vars(asked) | {"engine": record["engine"] | {"kind": kind}})))
        assert any("simulated" in sentence for _, sentence in found), (kind, part)


# ---- a landscape of the user's ----------------------------------------------------------------------------

CODE = """
def kv_cache_bytes(configuration, arm, parameters):
    if configuration["memory_fraction"] > parameters["end"]:
        return None
    return parameters["gib"] * (1 << 30) * (0.9 if arm == "taking" else 1)
"""


def with_landscape(folder, code=CODE, arms=("native", "native"), arm_engine=None, **chosen):
    (folder / "surface.py").write_text(code)
    surface = {"file": str(folder / "surface.py"), "parameters": {"gib": 20, "end": 0.8}} | chosen
    described = data(arms=arms, noise={"sd": "0B"}, landscape=surface)
    described["arms"]["taking"]["engine"] = arm_engine or {}
    return write_yaml(folder, described)


def looked_at(path):
    experiment = load_experiment(path).experiment
    return preview.preview(experiment, one_local_node(), preview.probe(experiment))


@pytest.mark.process
def test_a_landscape_takes_the_place_of_the_law(tmp_path):
    folder = tmp_path / "run"
    done = run(with_landscape(tmp_path), "--local", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "which is executed in every worker" in done.stdout
    for record in records(folder):
        feasible = record["configuration"]["memory_fraction"] <= 0.8
        assert record["outcome"]["kind"] == ("ok" if feasible else "infeasible")
        found = record["result"]["measurements"]
        assert found["engine"]["name"] == "simulated (a landscape)"
        if feasible:
            whole = 20 * GIB * (0.9 if record["arm"] == "taking" else 1)
            assert found["kv_cache"]["bytes"] == whole // BLOCK * BLOCK
    summary = json.loads((folder / "summary.json").read_text())
    change = summary["contrasts"][0]["mean_delta_kv_cache_bytes"]
    assert "A/A" not in summary["verdict"], "equal settings, but the function knows the arms apart"
    assert summary["contrasts"][0]["mean_term_bytes"]["rest"] == change, (
        "no law, so nothing to divide it along"
    )
    with (folder / "bundle" / landscape.MODULE).open("a") as stream:
        stream.write("# changed\n")
    done = run_without_report(tmp_path / "experiment.yaml", "--out", folder, "--resume")
    assert (done.returncode, "bundle was changed" in done.stderr) == (2, True)


@pytest.mark.process
@pytest.mark.root
@pytest.mark.docker
def test_every_environment_executes_the_runs_own_copy(tmp_path):
    path = with_landscape(tmp_path, arms=("chroot", "docker"), parameters={"gib": 20, "end": 1})
    done = run_without_report(path, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["outcome"]["kind"] for record in records(tmp_path / "run")] == ["ok"] * 8


def test_a_landscape_is_held_to_the_folders_that_a_file_may_name(tmp_path, monkeypatch):
    away, here = tmp_path / "away", tmp_path / "here"
    away.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    path = with_landscape(away)
    inside = here / "experiment.yaml"
    inside.write_text(path.read_text())
    with pytest.raises(InputError, match=r"engine.landscape.file: .*surface.py is outside"):
        load_experiment(inside)
    own = here / "own.yaml"
    own.write_text(json.dumps(data(arm_engine={"landscape": {"file": str(away / "surface.py")}})))
    with pytest.raises(InputError, match=r"arms.taking.engine.landscape.file: .*surface.py is outside"):
        load_experiment(own)
    assert load_experiment(inside, allow_roots=[away])


@pytest.mark.parametrize(
    ("code", "chosen", "words"),
    [
        (CODE, {"function": "other"}, "defines no function other"),
        ("def kv_cache_bytes(", {}, "is not Python"),
        (CODE, {"file": "/nowhere/surface.py"}, "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_landscape_is_said_before_any_effect(tmp_path, code, chosen, words):
    experiment = Experiment.model_validate(data(landscape={"file": str(tmp_path / "surface.py")} | chosen))
    (tmp_path / "surface.py").write_text(code)
    assert words in landscape.problems(experiment)[0].what


def test_looking_at_a_landscape_does_not_execute_it(tmp_path):
    path = with_landscape(tmp_path, code=f"open({str(tmp_path / 'executed')!r}, 'w')\n{CODE}")
    plan = looked_at(path)
    assert plan.lacking() is None
    assert plan.mark == "SIMULATED"
    assert not (tmp_path / "executed").exists()


def test_one_run_has_one_landscape(tmp_path):
    (tmp_path / "other.py").write_text(CODE)
    path = with_landscape(tmp_path, arm_engine={"landscape": {"file": str(tmp_path / "other.py")}})
    assert "arms differ in engine.landscape.file" in looked_at(path).lacking()


def test_a_run_keeps_a_copy_under_a_name_of_ours(tmp_path):
    path = with_landscape(tmp_path)
    loaded = load_experiment(path)
    store = opening.begin(tmp_path / "run", loaded, looked_at(path), cluster=None, executor="local")
    assert (tmp_path / "run" / "bundle" / landscape.MODULE).read_text() == CODE
    assert store.plan["landscape_sha256"] == landscape.sha256(tmp_path / "surface.py")
    store.close()


@pytest.mark.parametrize("name", ["map", "page_cache", "landscape"])
def test_the_experiments_are_simulated(name, monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)  # where relative paths of a YAML begin
    path = root / "experiments" / f"simulated_{name}.yaml"
    experiment = load_experiment(path).experiment
    assert experiment.engine.kind == "simulated"
    assert experiment.question.startswith("Simulated.")
    assert not landscape.problems(experiment)
