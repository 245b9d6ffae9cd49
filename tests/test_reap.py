"""What a death leaves is found and removed; what lives, or is not ours, is not touched."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import experiment_data, guests_of, wait_until, write_yaml

from spark_ray import image, reap
from spark_ray.store import Store

pytestmark = pytest.mark.process


def sweep(path, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "spark_ray.sweep", str(path), "--out", str(folder), "--local"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def client(request):
    if not request.node.get_closest_marker("docker"):
        yield None
        return
    made = image.connect()
    yield made
    made.close()


def test_a_driven_run_is_left_alone_and_a_dead_ones_file_goes(tmp_path):
    folder = tmp_path / "run"
    driver = sweep(write_yaml(tmp_path, experiment_data(blocks=1, hold="4s")), folder)
    assert wait_until(lambda: guests_of(folder), 30)
    fill = folder / "scratch" / "local-0" / "page-cache-fill-1"
    fill.parent.mkdir(parents=True, exist_ok=True)
    fill.write_bytes(b"x")
    assert reap.leftovers(folder, None) == []
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert wait_until(lambda: not guests_of(folder), 5)
    found = reap.leftovers(folder, None)
    assert [(one.kind, one.name) for one in found] == [("fill file", str(fill))]
    reap.remove(found[0], None)
    assert reap.leftovers(folder, None) == []


def test_a_process_of_a_dead_run_is_found_and_a_stranger_is_not(tmp_path):
    folder = tmp_path / "run"
    Store.create(folder, {}, {}).close()
    ours = subprocess.Popen(["sleep", "100"], env={"SPARK_RAY_RUN": str(folder)})
    stranger = subprocess.Popen(["sleep", "100"], env={"SPARK_RAY_RUNNER": str(folder)})
    found = reap.leftovers(folder, None)
    assert [(one.kind, one.name) for one in found] == [("process", str(ours.pid))]
    reap.remove(found[0], None)
    assert ours.wait(timeout=10) == -signal.SIGKILL
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.docker
def test_a_container_whose_guest_was_stopped_when_its_driver_died(tmp_path, client):
    """SIGSTOP of the whole container: nobody inside can notice. This is what reap is for."""
    folder = tmp_path / "run"
    driver = sweep(
        write_yaml(tmp_path, experiment_data(blocks=1, arms=("docker", "docker"), hold="30s")), folder
    )
    assert wait_until(lambda: guests_of(folder), 60)
    for pid in guests_of(folder):
        os.kill(pid, signal.SIGSTOP)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    found = [one for one in reap.leftovers(folder, client) if one.kind == "container"]
    assert len(found) == 1
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray", "reap", str(folder), "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "would remove container" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray", "reap", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "removed container" in done.stdout
    assert wait_until(lambda: not guests_of(folder), 10)
    assert reap.leftovers(folder, client) == []
