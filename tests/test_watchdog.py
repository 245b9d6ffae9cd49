"""The watchdog as a real process: whom it kills, in which order, and that it outlives everything but its driver."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import experiment_data, guests_of, wait_until, write_yaml
from test_launch import Bench

from spark_ray import doctor, watchdog, watchdog_process
from spark_ray.experiment import Experiment
from spark_ray.store import Store
from spark_ray.worker import observe

pytestmark = pytest.mark.process
GIB = 1 << 30
ALWAYS = 1 << 60  # more than any host has
NEVER = 0


@pytest.fixture
def dog(monkeypatch):
    monkeypatch.setattr(watchdog, "PATIENCE_S", 0.1)
    one = watchdog.Watchdog()
    one.start()
    yield one
    one.close()


@pytest.fixture
def family():
    """A shell with a child, in a session of their own: (pid of the shell, pid of the child)."""
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True) as shell:
        assert wait_until(lambda: len(observe.descendants(shell.pid)) == 2)
        yield tuple(observe.descendants(shell.pid))
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)


@pytest.fixture
def loner():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def hear_until_fired(dog):
    assert wait_until(lambda: dog.hear() or dog.fired)
    return dog.fired


# ---- whom it kills ----------------------------------------------------------------------------------------


def test_it_kills_the_guests_tree_then_the_helpers_and_says_whom(dog, family, loner):
    """Memory cannot come back to a threshold like this: the second step comes as well."""
    dog.guard(ALWAYS, [family[0]], helpers=[loner.pid])
    fired = hear_until_fired(dog)
    assert [each["pid"] for each in fired["killed"]] == [*family, loner.pid]
    assert [each["part"] for each in fired["killed"]] == ["guest", "guest", "helper"]
    assert [each["name"] for each in fired["killed"]] == ["sh", "sleep", "sleep"]
    assert 0 < fired["available_bytes"] < ALWAYS
    assert loner.wait(10) == -signal.SIGKILL
    assert wait_until(lambda: not any(map(alive, family)))


def test_it_kills_what_is_in_the_guests_group_and_in_no_tree(dog, family, loner, tmp_path):
    (tmp_path / "cgroup.procs").write_text(f"0\n{loner.pid}\n")
    dog.guard(ALWAYS, [family[0]], group=tmp_path)
    assert {each["pid"] for each in hear_until_fired(dog)["killed"]} == {*family, loner.pid}


def test_above_the_threshold_it_looks_and_kills_nobody(dog, family):
    dog.guard(NEVER, [family[0]])
    time.sleep(0.3)
    found = dog.rest()
    assert found["fired"] is None
    assert found["looks"] > 1
    assert found["longest_gap_s"] > 0
    assert all(map(alive, family))
    assert watchdog_process.LOOK_EVERY_S <= 0.05, "20 Hz"


def test_a_number_that_is_somebody_elses_by_now_is_not_killed(dog, loner):
    """The guest has ended before the order came, and the watchdog holds handles, not numbers."""
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        dog.guard(ALWAYS, [ended.pid])
        assert hear_until_fired(dog)["killed"] == []
    assert alive(loner.pid)


def test_it_fires_once_and_again_only_after_a_rest(dog, loner):
    dog.guard(ALWAYS, [])
    first = hear_until_fired(dog)
    dog.guard(ALWAYS, [loner.pid])
    assert dog.rest()["fired"] == first
    assert alive(loner.pid)
    dog.guard(ALWAYS, [loner.pid])
    assert [each["pid"] for each in hear_until_fired(dog)["killed"]] == [loner.pid]


# ---- its own life -----------------------------------------------------------------------------------------


def test_each_protection_is_had_or_its_lack_has_a_reason():
    got = watchdog.try_out()
    assert set(got) == {"cgroup", "oom_score", "priority", "mlock"}
    assert all(value is True or (isinstance(value, str) and value) for value in got.values())


@pytest.mark.root
def test_it_leaves_every_memory_group_and_locks_its_memory(dog):
    if dog.protections["cgroup"] is True:
        assert observe.cgroup_path(dog.pid)[1] == "/"
    if dog.protections["mlock"] is True:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{dog.pid}/status").read_text().splitlines())
        assert int(status["VmLck"].split()[0]) >= int(status["VmRSS"].split()[0]) * 0.9
    assert os.getsid(dog.pid) == dog.pid, "a stop or Ctrl-C of the driver's terminal does not reach it"


def test_it_ends_with_its_driver():
    code = (
        "import os, signal; from spark_ray.watchdog import Watchdog; one = Watchdog(); one.guard(0, []);"
        "print(one.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert wait_until(lambda: not alive(int(done.stdout)))


def test_one_that_was_killed_is_replaced_and_guards_on(dog, family, caplog):
    dog.guard(NEVER, [family[0]])
    first = dog.pid
    os.kill(first, signal.SIGKILL)
    assert wait_until(lambda: dog.hear() or dog.pid != first)
    assert "another one is started" in caplog.text
    found = dog.rest()
    assert found["replaced"] == 1
    assert found["looks"] > 0
    dog.guard(ALWAYS, [family[0]])
    assert hear_until_fired(dog)["killed"]
    assert dog.rest()["replaced"] == 0


def test_one_that_hangs_does_not_hang_the_driver(dog, monkeypatch, caplog):
    monkeypatch.setattr(watchdog, "_ANSWER_S", 0.2)
    dog.guard(NEVER, [])
    os.kill(dog.pid, signal.SIGSTOP)
    found = dog.rest()
    assert "does not answer" in caplog.text
    assert found["fired"] is None
    assert "looks" not in found
    dog.guard(ALWAYS, [])
    assert hear_until_fired(dog)


def test_the_doctor_says_what_it_lacks(monkeypatch):
    assert doctor.watchdog_check().name == "watchdog"
    monkeypatch.setattr(watchdog, "try_out", lambda: {"mlock": True, "oom_score": "Permission denied"})
    found = doctor.watchdog_check()
    assert found.status == "warn"
    assert "oom_score: Permission denied" in found.found
    assert "CAP_SYS_RESOURCE" in found.mend
    monkeypatch.setattr(watchdog, "try_out", lambda: {"mlock": True, "oom_score": True})
    assert doctor.watchdog_check().status == "ok"


# ---- a guest that eats memory -----------------------------------------------------------------------------


def hungry(environment, hold="0s"):
    """A guest that eats up to 8 GiB, and a watchdog that wakes when 6 GiB of the host are taken."""
    info = observe.meminfo()
    threshold = min(info["MemTotal"] - 6 * GIB, info["MemAvailable"] - GIB)
    return experiment_data(
        blocks=1, arms=(environment, "native"), behaviour="eat", allocate="8GiB", hold=hold,
        limits={"watchdog": f"{threshold}B"},
    )  # fmt: skip


def assert_the_watchdog_did_it(record):
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("host_wedged", "watchdog")
    fired = record["host"]["watchdog"]["fired"]
    before = record["host"]["observations"][0]["meminfo"]["MemAvailable"]
    assert fired["available_bytes"] < record["host"]["watchdog"]["threshold_bytes"] < before
    worker = record["host"]["outside"]["worker_pid"]
    assert worker in [each["pid"] for each in fired["killed"]]
    assert {each["part"] for each in fired["killed"]} == {"guest"}
    assert record["host"]["stopped_by"] == "watchdog"


@pytest.mark.parametrize("environment", ["native", pytest.param("docker", marks=pytest.mark.docker)])
def test_a_guest_that_eats_memory_is_killed_before_the_host_is_out_of_it(tmp_path, environment):
    one = Bench(tmp_path / "run", Experiment.model_validate(hungry(environment)))
    record = one.run()
    one.close()
    assert_the_watchdog_did_it(record)
    lowest = record["host"]["samples"]["lowest_mem_available_bytes"]
    assert lowest > record["host"]["watchdog"]["threshold_bytes"] - 4 * GIB, "not all of the 8 GiB"
    assert guests_of(one.store.folder) == []


def test_it_kills_while_the_driver_is_stopped_and_the_run_ends_with_exit_code_5(tmp_path):
    folder = tmp_path / "run"
    path = write_yaml(tmp_path, hungry("native", hold="60ms"))
    command = [sys.executable, "-m", "spark_ray.sweep", str(path), "--out", str(folder), "--local"]
    driver = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    try:
        eating = 200 << 20
        assert wait_until(lambda: any(resident_bytes(pid) > eating for pid in guests_of(folder)), 60)
        os.kill(driver.pid, signal.SIGSTOP)
        assert guests_of(folder), "it was alive when its driver was stopped"
        assert wait_until(lambda: not guests_of(folder), 60), "nobody but the watchdog can have killed it"
        assert not list(folder.glob("trials/*/1/record.json"))
    finally:
        os.kill(driver.pid, signal.SIGCONT)
        output = driver.communicate(timeout=600)[0]
    assert driver.returncode == 5, output
    (record,) = Store.read(folder).records()
    assert_the_watchdog_did_it(record)
    assert json.loads(next(folder.glob("trials/*/1/host.json")).read_text())["watchdog"]["fired"]


def resident_bytes(pid):
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
