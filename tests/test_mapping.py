"""From records to the map: the same whoever asks and however often the run was resumed, and a run that stops when it knows."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import experiment_data, run_without_report, spark_ray, write_yaml
from pydantic import ValidationError
from rich.console import Console
from test_execute import ScriptedSlot, Silent
from threadpoolctl import threadpool_info

from analysis.run import analyse
from spark_ray import mapping, power
from spark_ray.drive import Drive
from spark_ray.experiment import Experiment
from spark_ray.opening import recover
from spark_ray.search import Search
from spark_ray.search.threads import one_thread
from spark_ray.store import RECORD, Store, write_durably
from spark_ray.terminal import Terminal
from spark_ray.told import told_of
from spark_ray.units import GIB

LINE = {
    "max_batch_size": 8,
    "max_num_tokens": {"low": 256, "high": 32768, "log": True},
    "memory_fraction": 0.8,
}
PRECISE = {"precision": 0.06}


def made(blocks=40, space=LINE, target=PRECISE, **options):
    data = experiment_data(**options)
    data["search"] = {"sampler": "map", "blocks": blocks, "space": space, "target": target}
    return Experiment.model_validate(data)


class Machine(ScriptedSlot):
    """A law without noise: b lacks 1 GiB and as much for every 4096 tokens, and has none where `ends` is passed."""

    ends = 1e9

    def measured(self, block, arm, record):
        tokens, fraction = block.configuration["max_num_tokens"], block.configuration["memory_fraction"]
        free = 60 - tokens / 2048 - (1 + tokens / 4096 if arm == "b" else 0)
        record["result"]["measurements"]["kv_cache"]["bytes"] = round(fraction * free * GIB)
        record["host"] = {"duration_s": 30.0 + tokens / 1000, "exit_code": 0}
        if arm == "b" and tokens > self.ends:
            record["outcome"] = {"kind": "infeasible", "reason": "script", "message": ""}


class Counting(Silent):
    def __init__(self):
        self.known = []

    def block_ended(self, *ended):
        self.known.append(ended[2])


def drive(folder, experiment, *, slots=1, most=None, ends=1e9):
    store = Store.resume(folder) if (folder / "plan.json").exists() else Store.create(folder, {}, {})
    listener = Counting()
    try:
        search = Search(experiment.search, seed=experiment.seed, journal=store.journal, name="test")
        interrupted = recover(store, search, experiment)
        machines = [Machine(store, f"slot-{number}") for number in range(slots)]
        for machine in machines:
            machine.ends = ends
        done = Drive(
            store, experiment, ["a", "b"], search, listener, interrupted,
            enough=lambda begun: most is not None and begun >= most, look=lambda: mapping.decision(store, experiment),
        )  # fmt: skip
        done.run(machines)
        return store, listener.known
    finally:
        store.close()


def test_a_run_stops_when_the_map_is_known(tmp_path):
    store, known = drive(tmp_path / "run", made())
    assert 8 <= len(store.blocks()) < 40
    assert [each.stop for each in known] == [False] * (len(known) - 1) + [True]
    decision = mapping.decision(store, made())
    assert decision.stop
    assert "expected to be called wrongly, asked for: 6.0%" in decision.why
    assert f"{len(known)} of 40 blocks" in decision.why
    said = mapping.surrogate(store, made()).predict(
        [{**store.blocks()[0].configuration, "max_num_tokens": 20000}]
    )
    assert said.contrast_mean[0] == pytest.approx((1 + 20000 / 4096) / (60 - 20000 / 2048), abs=0.01)
    drive(tmp_path / "run", made())
    assert len(store.blocks()) == len(known), "and nothing is begun by whoever resumes it"


def test_several_slots_find_the_same_end(tmp_path):
    store, known = drive(tmp_path / "run", made(), slots=3)
    assert mapping.decision(store, made()).stop
    assert len(known) == len(store.blocks()) < 40


def test_a_run_that_was_interrupted_asks_what_it_would_have_asked(tmp_path):
    whole, _ = drive(tmp_path / "whole", made(blocks=14, target={"precision": 0.001}))
    parts = made(blocks=14, target={"precision": 0.001})
    for most in (3, 4, 1, 2, None):
        store, _ = drive(tmp_path / "parts", parts, most=most)
        if most == 4:
            store.journal.unlink()  # lost: made again from the blocks
            search = Search(parts.search, seed=parts.seed, journal=store.journal, name="test")
            search.rebuild(
                [(block.study_trial, block.configuration, block.repetition) for block in store.blocks()]
            )
    assert store.blocks() == whole.blocks()
    assert mapping.observations(store, parts) == mapping.observations(whole, parts)


def test_a_budget_that_is_spent_says_what_is_open(tmp_path):
    hurried = made(blocks=6)
    store, known = drive(tmp_path / "run", hurried)
    assert len(known) == 6
    decision = mapping.decision(store, hurried)
    assert decision.stop
    assert decision.why.startswith("all blocks are spent")
    assert decision.why.endswith("of the space undecided")
    assert mapping.surrogate(*drive(tmp_path / "two", made(blocks=2))[:1], made(blocks=2)) is None


def test_an_arm_that_works_alone_tells_what_it_has(tmp_path):
    store, _ = drive(tmp_path / "run", made(blocks=8), ends=8000)
    alone = [each for each in mapping.observations(store, made()) if each.kv[1] is None]
    assert alone
    assert all(each.kv[0] > 30 * GIB for each in alone)
    said = mapping.surrogate(store, made()).predict([alone[0].configuration])
    assert said.feasible_b[0] < 0.5 < said.feasible_a[0]


def test_what_is_told_of_a_block(tmp_path):
    store, _ = drive(tmp_path / "run", made(blocks=1))
    (block,) = store.blocks()
    told = told_of(store.state(block), store, made())
    tokens = block.configuration["max_num_tokens"]
    assert told.attributes == {
        "kv_baseline_bytes": round(0.8 * (60 - tokens / 2048) * GIB),
        "kv_baseline_gib": round(0.8 * (60 - tokens / 2048), 3),
        "kv_against_bytes": round(0.8 * (59 - tokens * 3 / 4096) * GIB),
        "kv_against_gib": round(0.8 * (59 - tokens * 3 / 4096), 3),
        "block_s": 2 * (30.0 + tokens / 1000),
    }


def test_a_compared_arm_that_was_left_out_tells_nothing(tmp_path):
    store, _ = drive(tmp_path / "run", made(blocks=1))
    state = store.state(store.blocks()[0])
    alone = dataclasses.replace(state, outcomes={"a": state.outcomes["a"]})
    assert told_of(alone, store, made()) is None


@pytest.mark.parametrize(
    ("engine", "tokens", "capped"),
    [
        ({"kind": "simulated", "max_tokens": 1000}, 992, "engine.max_tokens"),
        ({"kind": "simulated", "max_tokens": 1000}, 960, None),
        ({"kind": "simulated", "max_tokens": None}, 992, None),
        ({"kind": "tensorrt_llm", "kv_cache": 64_000}, 992, "engine.kv_cache"),
        ({"kind": "fake", "kv_cache": 64_000}, 992, None),
    ],
)
def test_a_cap_is_told_from_memory(tmp_path, engine, tokens, capped):
    store, _ = drive(tmp_path / "run", made(blocks=1))
    (block,) = store.blocks()
    path = store.attempt_folder(block.trial_id("b"), 1) / RECORD
    record = json.loads(path.read_text())
    kv = {"bytes": 64 * tokens, "tokens": tokens, "tokens_per_block": 32, "bytes_per_token": 64}
    work = {"output_throughput_tokens_per_s": 12.5}
    record |= {"engine": engine, "result": {"measurements": {"kv_cache": kv, "throughput": work}}}
    write_durably(path, record)
    told = told_of(store.state(block), store, made()).attributes
    assert told.get("kv_against_capped") == capped
    assert told["throughput_against_tokens_per_s"] == 12.5


def test_throughput_is_only_asked_for_where_it_is_measured():
    data = experiment_data()
    data["search"] = {
        "sampler": "map", "space": LINE, "target": {"kind": "optimum", "objective": "throughput"},
    }  # fmt: skip
    with pytest.raises(ValidationError, match="engine fake generates no tokens"):
        Experiment.model_validate(data)
    data |= {"engine": {"kind": "embedded"}, "model": {"random_llama": {}}, "workload": {"requests": 0}}
    with pytest.raises(ValidationError, match=r"workload.requests is 0"):
        Experiment.model_validate(data)
    assert Experiment.model_validate(data | {"workload": {"requests": 4}})


def test_a_person_sees_how_well_the_map_is_known(tmp_path):
    store, known = drive(tmp_path / "run", made(blocks=4))
    (*_, state) = map(store.state, store.blocks())
    for live in (False, True):
        console = Console(record=True, width=200, force_terminal=live, file=io.StringIO())
        with Terminal(console, 6, 0, 2, quiet=False, mark="SIMULATED") as terminal:
            terminal.block_ended(state, 0.1, known[-1])
        said = console.export_text()
        assert f"{known[-1].expected_misclassified:.1%} of the space expected to be called wrongly" in said
        assert f"{known[-1].undecided_volume:.1%} undecided" in said


def test_a_map_is_made_by_one_thread():
    blas = one_thread(
        lambda: {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}
    )
    assert blas() == {1}


# ---- in a run -----------------------------------------------------------------------------------------------


def simulated(folder, blocks=30, **target):
    data = experiment_data()
    data["engine"] = {"kind": "simulated", "noise": {"sd": "64MiB"}}
    data["workload"] = {"requests": 0}
    data["search"] = {"sampler": "map", "blocks": blocks, "space": LINE, "target": PRECISE | target}
    data["arms"]["b"]["engine"] = {"effect": {"held": "500MiB", "per_token": "224KiB"}}
    return write_yaml(folder, data)


@pytest.mark.process
def test_a_simulated_map_ends_by_itself_and_says_why(tmp_path):
    path, folder = simulated(tmp_path), tmp_path / "run"
    done = run_without_report(path, "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store.read(folder)
    count = len(store.blocks())
    assert count < 30
    why = f"asked for: 6.0%; {count} of 30 blocks"
    assert why in done.stdout
    assert "SIMULATED map: " in done.stdout
    assert "b0007 SIMULATED map: " in done.stdout
    assert json.loads(spark_ray("status", folder, "--json").stdout)["map"]["stop"] is True
    found = analyse(store)
    assert found.map_ended
    assert not [each for each in found.findings if "are complete" in each.sentence], "the rest was not needed"
    again = run_without_report(path, "--out", folder, "--resume")
    assert (again.returncode, why in again.stdout) == (0, True), again.stderr
    assert "preparing" not in again.stdout
    more = run_without_report(path, "--out", folder, "--resume", "--set", "search.target.precision=0.001",
                              "--set", f"search.blocks={count + 2}")  # fmt: skip
    assert more.returncode == 0, more.stderr
    assert "all blocks are spent" in more.stdout
    assert [block.configuration for block in store.blocks()][:count] == [
        observation.configuration for observation in mapping.observations(store, made())[:count]
    ]


@pytest.mark.process
def test_a_map_killed_with_kill_9_measures_the_same_blocks(map_run, tmp_path):
    """The driver dies in the midst of a block that the map chose; whoever resumes finds the map that would have been."""
    whole, folder = Store.read(map_run), tmp_path / "run"
    file = Path(__file__).parent.parent / "experiments" / "simulated_map.yaml"
    command = [
        sys.executable,
        "-m",
        "spark_ray.sweep",
        file,
        "--local",
        "--no-report",
        "--set",
        "search.blocks=10",
        "--out",
        folder,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as driver:
        while driver.poll() is None and len(list((folder / "blocks").glob("b*.json"))) < 9:
            time.sleep(0.02)
        driver.kill()
    assert driver.returncode == -signal.SIGKILL
    done = run_without_report(file, "--local", "--set", "search.blocks=10", "--out", folder, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    again = Store.read(folder)
    assert [(each.index, each.configuration, each.order) for each in again.blocks()] == [
        (each.index, each.configuration, each.order) for each in whole.blocks()
    ]
    experiment = power.experiment_of(whole.plan)
    assert mapping.observations(again, experiment) == mapping.observations(whole, experiment)
    assert mapping.decision(again, experiment) == mapping.decision(whole, experiment)
