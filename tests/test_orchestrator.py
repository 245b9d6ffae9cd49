"""Arms that name their orchestrator: some attempts through a Ray of their own, the others while there is none."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import QUIET, experiment, experiment_data, guests_of, run, wait_until, write_yaml

from spark_ray import host, orchestrator
from spark_ray.errors import UnavailableError
from spark_ray.execute import SlotLost
from spark_ray.experiment import Experiment
from spark_ray.orchestrator import RayDriver, named
from spark_ray.plan import make_block
from spark_ray.record import Record
from spark_ray.worker import observe


def mixed(**engine):
    data = experiment_data(blocks=1, **engine) | {"seed": 4}  # by which b is executed first
    for arm, name in zip("ab", ("local", "ray"), strict=True):
        data["arms"][arm] = {"environment": "native", "treatment": QUIET, "orchestrator": name}
    return data


def test_arms_that_say_nothing_are_executed_as_the_run_is():
    assert named(experiment(), ["a", "b"]) == {}
    data = mixed()
    del data["arms"]["a"]["orchestrator"]
    made = Experiment.model_validate(data)
    assert named(made, ["a", "b"]) == {"a": "local", "b": "ray"}
    assert named(made, ["a"]) == {}


@pytest.mark.process
def test_the_plan_names_what_executes_each_arm_and_an_address_is_refused(tmp_path):
    file = write_yaml(tmp_path, mixed())
    done = run(file, "--plan")
    assert done.returncode == 0
    assert "b: through a Ray that is started for each attempt" in done.stdout
    assert "a: in this process, while no Ray of this run lives" in done.stdout
    refused = run(file, "--plan", "--address", "127.0.0.1:6379")
    assert refused.returncode == 2
    assert "leave out --address and --cluster" in refused.stderr


# ---- what the process that starts Ray can say, without Ray ------------------------------------------------


def driver(code):
    return RayDriver(
        [
            sys.executable,
            "-c",
            "import json, sys, time\ndef say(**m): print(json.dumps(m), flush=True)\n" + code,
        ]
    )


def said(code):
    one = driver(code)
    try:
        return one.outcome()
    finally:
        one.close()


OK = {"kind": "ok", "reason": "measured", "message": ""}


@pytest.mark.process
def test_the_outcome_is_what_the_process_says_last():
    assert said(f"say(ready=True); say(outcome={OK})") == OK


@pytest.mark.process
def test_a_dead_actor_and_a_dead_process_are_lost_slots_with_the_last_words():
    with pytest.raises(SlotLost, match="the actor died"):
        said("say(ready=True); say(lost='the actor died')")
    with pytest.raises(SlotLost, match="ended with 3: no more file descriptors"):
        said("say(ready=True); sys.stderr.write('one\\nno more file descriptors\\n'); sys.exit(3)")


@pytest.mark.process
def test_a_ray_that_does_not_start_is_the_error_it_would_be_in_a_run():
    with pytest.raises(UnavailableError) as raised:
        said("say(error={'kind': 'UnavailableError', 'message': 'no Ray', 'mend': 'install it'})")
    assert (raised.value.message, raised.value.mend) == ("no Ray", "install it")


@pytest.mark.process
def test_stop_is_handed_on_and_harmless_when_it_comes_late():
    one = driver(f"say(ready=True); assert sys.stdin.readline() == 'stop\\n'; say(outcome={OK})")
    one.stop()
    assert one.outcome() == OK
    one.close()
    one.stop()


def test_a_program_that_came_to_stay_disturbs_one_attempt_not_every_one(tmp_path, monkeypatch):
    free = {"bytes": 20 << 30}
    monkeypatch.setattr(host, "releasable_bytes", lambda: free["bytes"])
    monkeypatch.setattr(orchestrator, "RayDriver", FakeDriver)
    made = Experiment.model_validate(mixed(limits={"memory_wait": "0s"}))
    slot = orchestrator.ArmSlot(tmp_path, made, ["b"])
    block = make_block(0, 0, {}, 0, ["a", "b"], 4)
    assert slot.run(block, "b", 1) == OK
    free["bytes"] -= 2 << 30
    with pytest.raises(
        SlotLost, match=f"before Ray was started: {18 << 30} of {(20 << 30) - (512 << 20)} bytes"
    ):
        slot.run(block, "b", 2)
    assert slot.run(block, "b", 3) == OK
    assert FakeDriver.closed == 2


class FakeDriver:
    closed = 0

    def __init__(self, command):
        assert command[2:5:2] == ["spark_ray.orchestrator", "b0000"]

    def outcome(self):
        return OK

    def close(self):
        FakeDriver.closed += 1


# ---- with Ray ---------------------------------------------------------------------------------------------


def records(folder):
    paths = sorted((folder / "trials").glob("*/*/record.json"))
    return {(record := json.loads(path.read_text()))["arm"]: record for path in paths}


@pytest.mark.process
@pytest.mark.ray
def test_each_arm_is_executed_by_what_it_names_and_ray_is_gone_afterwards(tmp_path):
    done = run(write_yaml(tmp_path, mixed()), "--no-report", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path / "run")
    for record in found.values():
        Record.model_validate_json(json.dumps(record))
    assert {arm: record["executor"] for arm, record in found.items()} == {"a": "local", "b": "ray"}
    for moment in ("before", "after"):
        local, ray = (found[arm]["host"]["orchestrator"][moment] for arm in "ab")
        assert local["ray"]["processes"] == 0, "no Ray of this run lives"
        assert ray["ray"]["processes"] >= 3
        assert ray["ray"]["pss_bytes"] > ray["spark_ray"]["pss_bytes"] > local["spark_ray"]["pss_bytes"] > 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["executor"] == "by arm"
    assert not processes_naming(str(tmp_path))


def processes_naming(text):
    """Live processes in whose command or environment a path is."""
    found = []
    for entry in observe.PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                where = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if text.encode() in where and state != "Z":
                found.append(int(entry.name))
    return found


def alive(handles):
    return [pid for pid, started in handles.items() if started_at(pid) == started]


def started_at(pid):
    try:
        fields = (observe.PROC / str(pid) / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_ended_during_an_attempt_through_ray_leaves_nothing(tmp_path, number):
    file = write_yaml(tmp_path, mixed(behaviour="hang", only_in_arm="b"))
    command = [
        sys.executable,
        "-m",
        "spark_ray.sweep",
        str(file),
        "--no-report",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    through_ray = (tmp_path / "run" / "trials").glob
    try:
        assert wait_until(lambda: list(through_ray("*.b/1/request.json")) and guests_of(tmp_path), 180)
        started = {pid: started_at(pid) for pid in observe.descendants(process.pid)}
        assert len(started) > 10, "the driver, its child, and Ray"
        process.send_signal(number)
        said_at_last = process.communicate(timeout=600)[1].decode()
    finally:
        process.kill()
        process.communicate()
    assert wait_until(lambda: not alive(started), 15), {
        pid: (observe.PROC / str(pid) / "cmdline").read_bytes() for pid in alive(started)
    }
    assert not guests_of(tmp_path)
    if number == signal.SIGINT:
        assert process.returncode == 130, said_at_last
        assert "Traceback" not in said_at_last
        assert records(tmp_path / "run")["b"]["outcome"]["reason"] == "interrupted"
