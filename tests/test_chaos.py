"""The chaos benchmark's own parts, and what only its private Docker engine can show: a daemon that dies in mid-sweep."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import experiment_data, guests_of, wait_until, write_yaml

from spark_ray.plan import make_block
from spark_ray.store import Store

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from chaos import BLOCKS, NOT_QUICK, plan
from chaos_faults import KINDS
from chaos_places import Engine, EngineError, fill, mounts_below, small_disk
from chaos_sweep import whole_executions


@pytest.mark.parametrize("kills", [1, 8, 50, 200])
def test_a_plan_has_every_kind_and_at_least_the_kills_asked_for(kills):
    faults = plan(KINDS, kills, random.Random(1), quick=False)  # noqa: S311
    planned = Counter(kind.name for waiting in faults.values() for kind in waiting)
    assert set(planned) == {kind.name for kind in KINDS}
    assert sum(planned[kind.name] for kind in KINDS if kind.kills) >= kills
    assert plan(KINDS, kills, random.Random(1), quick=False) == faults  # noqa: S311
    assert set(faults) == set(BLOCKS)


def test_kinds_are_named_once_and_the_short_form_leaves_some_of_them_out():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert set(names) > NOT_QUICK


def test_executions_are_counted_from_the_records_alone():
    blocks = [make_block(index, index, {}, 0, ("a", "b"), 0) for index in range(2)]

    def record(block, attempt, kind="ok"):
        return {"block_id": block, "attempt": attempt, "outcome": {"kind": kind}}

    records = [
        record("b0000", 1),
        record("b0000", 1, "disturbed"),
        record("b0001", 1),
        record("b0001", 1, "timeout"),
    ]
    assert whole_executions(blocks, records) == {"b0001": 1}
    again = [*records, record("b0000", 2), record("b0000", 2), record("b0001", 2), record("b0001", 2)]
    assert whole_executions(blocks, again) == {"b0000": 1, "b0001": 2}


@pytest.mark.root
def test_a_small_disk_is_really_full_and_goes_away(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        filler = fill(disk)
        with pytest.raises(OSError, match="No space left"):
            (disk / "more").write_bytes(bytes(4096))
        filler.unlink()
        (disk / "more").write_bytes(bytes(4096))
    assert mounts_below(tmp_path) == []


@pytest.fixture
def engine(tmp_path):
    try:
        made = Engine(tmp_path / "engine")
    except EngineError as error:
        pytest.skip(str(error))
    yield made
    made.close()
    assert mounts_below(tmp_path) == []
    assert made.cgroups() == []


@pytest.mark.root
@pytest.mark.docker
@pytest.mark.slow
def test_a_daemon_that_dies_and_comes_back_disturbs_one_execution_of_its_block(tmp_path, engine):
    folder = tmp_path / "run"
    data = experiment_data(blocks=2, arms=("docker", "native"), hold="1500ms")
    data["arms"]["b"]["engine"] = {"hold": "0s"}  # nothing but the daemon's absence fills the time
    path = write_yaml(tmp_path, data)
    words = [str(path), "--out", str(folder), "--local", "--no-report"]
    command = [sys.executable, "-m", "spark_ray.sweep", *words]
    environment = {**os.environ, "DOCKER_HOST": engine.url}
    with (tmp_path / "output").open("w") as output:
        driver = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        assert wait_until(lambda: engine.running(folder) and guests_of(folder), 60)
        engine.stop(signal.SIGKILL)
        time.sleep(1.5)  # long enough for every attempt that a block has, if none waited
        engine.start()
        code = driver.wait(120)
    said = (tmp_path / "output").read_text()
    assert code == 0, said
    store = Store.read(folder)
    states = [store.state(block) for block in store.blocks()]
    assert [state.complete for state in states] == [True, True], said
    assert sorted(state.attempts for state in states) == [1, 2]
    disturbed = [r["outcome"] for r in store.records() if r["outcome"]["kind"] == "disturbed"]
    assert len(disturbed) == 1, json.dumps(disturbed)
    assert engine.containers(folder) == []
