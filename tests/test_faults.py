"""Real kills of real processes, in a real sweep: nothing runs on, nothing stays mounted, --resume completes the rest."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import experiment_data, guests_of, wait_until, write_yaml

from spark_ray.store import Store

pytestmark = [pytest.mark.process, pytest.mark.machine]  # out-of-memory kills are counted for all
ARMS = [
    pytest.param("native", id="native"),
    pytest.param("chroot", id="chroot", marks=pytest.mark.root),
    pytest.param("docker", id="docker", marks=pytest.mark.docker),
]
BLOCKS = 3


def sweep(path, folder, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "spark_ray.sweep", str(path), "--out", str(folder), "--no-report", *options],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def study_states(folder):
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    backend = JournalFileBackend(
        str(folder / "study.journal"), lock_obj=JournalFileOpenLock(str(folder / "study.journal"))
    )
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    return Counter(trial.state.name for trial in study.get_trials(deepcopy=False))


def assert_exactly_once(folder):
    store = Store.read(folder)
    states = [store.state(block) for block in store.blocks()]
    assert len(states) == BLOCKS
    assert all(state.complete for state in states)
    counted = Counter(record["trial_id"] for record in store.records() if record["standing"] == "counts")
    assert set(counted.values()) == {1}
    assert study_states(folder)["RUNNING"] == 0
    assert study_states(folder)["COMPLETE"] == BLOCKS


def running_containers(folder):
    from spark_ray import image

    client = image.connect()
    try:
        return client.containers.list(filters={"label": f"spark_ray.run={folder}"})
    finally:
        client.close()


def mounts_of(folder):
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]


@pytest.mark.parametrize("environment", ARMS)
def test_a_killed_driver_leaves_nothing_and_resume_completes(tmp_path, environment):
    folder = tmp_path / "run"
    path = write_yaml(tmp_path, experiment_data(blocks=BLOCKS, arms=(environment, "native"), hold="700ms"))
    driver = sweep(path, folder, "--local")
    assert wait_until(lambda: list(folder.glob("trials/*/1/record.json")) and guests_of(folder), 60)
    os.kill(driver.pid, signal.SIGKILL)
    killed = time.monotonic()
    driver.communicate()
    assert wait_until(lambda: not guests_of(folder), 5)
    assert time.monotonic() - killed < 5
    assert mounts_of(folder) == []
    if environment == "docker":
        assert wait_until(lambda: not running_containers(folder), 5)
    again = sweep(path, folder, "--local", "--resume")
    output = again.communicate(timeout=600)[0]
    assert again.returncode == 0, output
    assert_exactly_once(folder)


@pytest.mark.parametrize("environment", ARMS)
def test_a_killed_guest_voids_its_block_only(tmp_path, environment):
    folder = tmp_path / "run"
    path = write_yaml(tmp_path, experiment_data(blocks=BLOCKS, arms=(environment, "native"), hold="700ms"))
    driver = sweep(path, folder, "--local")
    assert wait_until(lambda: list(folder.glob("trials/*/1/record.json")) and guests_of(folder), 60)
    os.kill(max(guests_of(folder)), signal.SIGKILL)
    output = driver.communicate(timeout=600)[0]
    assert driver.returncode == 0, output
    assert "killed_from_outside" in output
    assert_exactly_once(folder)
    assert any(record["standing"] == "superseded" for record in Store.read(folder).records())


def test_an_interrupt_keeps_everything_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    path = write_yaml(tmp_path, experiment_data(blocks=BLOCKS, hold="700ms"))
    driver = sweep(path, folder, "--local")
    assert wait_until(lambda: list(folder.glob("trials/*/1/record.json")) and guests_of(folder), 60)
    os.kill(driver.pid, signal.SIGINT)
    output = driver.communicate(timeout=600)[0]
    assert driver.returncode == 130, output
    assert "--resume" in output
    assert guests_of(folder) == []
    again = sweep(path, folder, "--local", "--resume")
    assert again.wait(120) == 0, again.stdout.read()
    again.stdout.close()
    assert_exactly_once(folder)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("victim", ["driver", "actor"])
def test_with_ray_a_killed_driver_or_actor_loses_nothing(tmp_path, victim):
    folder = tmp_path / "run"
    path = write_yaml(tmp_path, experiment_data(blocks=BLOCKS, hold="1500ms"))
    driver = sweep(path, folder)
    assert wait_until(lambda: list(folder.glob("trials/*/1/record.json")) and guests_of(folder), 90), (
        driver.kill()
    )
    session = ray_processes(driver.pid)
    if victim == "driver":
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        assert wait_until(lambda: not guests_of(folder), 10)
        assert wait_until(lambda: not alive(session), 10), [command(pid) for pid in alive(session)]
        again = sweep(path, folder, "--resume")
        output = again.communicate(timeout=180)[0]
        assert again.returncode == 0, output
    else:
        actors = [pid for pid in session if command(pid).startswith((b"ray::b0", b"ray::SlotActor"))]
        assert actors, [command(pid) for pid in session]
        os.kill(actors[0], signal.SIGKILL)
        output = driver.communicate(timeout=180)[0]
        assert driver.returncode == 0, output
        assert "slot_lost" in output
    assert_exactly_once(folder)
    assert guests_of(folder) == []


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pids):
    return [pid for pid in pids if command(pid)]


def ray_processes(driver):
    from spark_ray.worker.observe import descendants

    return [pid for pid in descendants(driver) if pid != driver]


@pytest.mark.ray
def test_ray_and_local_write_the_same_records(tmp_path):
    data = experiment_data(blocks=1)
    path = write_yaml(tmp_path, data)
    keys = {}
    for name, options in {"ray": [], "local": ["--local"]}.items():
        done = sweep(path, tmp_path / name, *options)
        output = done.communicate(timeout=600)[0]
        assert done.returncode == 0, output
        records = [r | {"standing": "counts"} for r in Store.read(tmp_path / name).records()]
        keys[name] = [shape(record) for record in records]
        assert [r["outcome"]["kind"] for r in records] == ["ok", "ok"]
        assert [r["configuration"] for r in records] == [records[0]["configuration"]] * 2
    assert keys["ray"] == keys["local"]


def shape(value):
    """The keys of a record, all the way down; counters of other kernels' fields are left out."""
    if isinstance(value, dict):
        return {
            key: shape(inner)
            for key, inner in value.items()
            if key not in {"meminfo", "stat", "environment", "variables", "events"}
        }
    return type(value).__name__ if not isinstance(value, list) else "list"


def test_a_torn_last_record_and_a_torn_journal_are_survived(tmp_path):
    folder = tmp_path / "run"
    path = write_yaml(tmp_path, experiment_data(blocks=BLOCKS))
    assert sweep(path, folder, "--local").communicate(timeout=600)
    record = max(folder.glob("trials/*/1/record.json"), key=lambda p: p.stat().st_mtime_ns)
    record.write_bytes(record.read_bytes()[:100])
    journal = folder / "study.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    again = sweep(path, folder, "--local", "--resume")
    output = again.communicate(timeout=600)[0]
    assert again.returncode == 0, output
    assert_exactly_once(folder)


def test_the_same_seed_plans_the_same_run(tmp_path):
    path = write_yaml(tmp_path, experiment_data(blocks=2))
    seen = []
    for name in ("one", "two"):
        sweep(path, tmp_path / name, "--local").communicate(timeout=600)
        blocks = sorted((tmp_path / name / "blocks").glob("*.json"))
        seen.append([json.loads(block.read_text()) for block in blocks])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2


@pytest.mark.root
def test_a_disk_that_fills_in_mid_sweep_is_said_and_resume_completes(tmp_path):
    """A real small file system, in a mount namespace of its own; made larger before the resume."""
    path = write_yaml(tmp_path, experiment_data(blocks=BLOCKS))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} -m spark_ray.sweep {path} --out {disk}/run --local"
    script = f"""
        mount -t tmpfs -o size=700k none {disk}
        {command}; echo "FIRST $?"
        mount -o remount,size=100m {disk}
        {command} --resume; echo "SECOND $?"
        cp -r {disk}/run {tmp_path}/saved
    """
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "FIRST 2" in done.stdout, done.stdout + done.stderr
    assert "No space left" in done.stderr
    assert "--resume" in done.stderr
    assert "SECOND 0" in done.stdout, done.stdout + done.stderr
    assert_exactly_once(tmp_path / "saved")
