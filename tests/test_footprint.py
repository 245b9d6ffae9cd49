"""What the orchestrator itself holds: which processes are its own, and how much memory they have."""

import contextlib
import os
import subprocess
import sys

import pytest

from spark_ray import footprint
from spark_ray.footprint import Process, grouped
from spark_ray.worker import observe

MIB = 1 << 20
OURS, OTHER = b"session_2026-01-02_03-04-05_678_10", b"session_2026-01-02_09-09-09_999_90"


def table(*rows):
    return {
        pid: Process(pid, parent, name, b"/bin/" + name.encode() + b" " + rest)
        for pid, parent, name, rest in rows
    }


def local_ray(driver, first, session):
    """A local Ray as Ray 2.60 starts it: the raylet with its agents and workers, its brothers, their children."""
    return (
        (first, driver, "gcs_server", b"--session-name=" + session),
        (first + 1, driver, "python", b"dashboard.py --session-dir=/tmp/ray/" + session),
        (first + 2, first + 1, "ray-dashboard-M", b"multiprocessing"),
        (first + 3, driver, "raylet", b"--raylet_socket_name=/tmp/ray/" + session + b"/sockets/raylet"),
        (first + 4, first + 3, "ray::DashboardA", b""),
        (first + 5, first + 3, "ray::IDLE", b""),
        (first + 6, first + 3, "ray::SlotActor", b""),
    )


SERVICES = (
    (2000, 1, "dockerd", b""),
    (2001, 2000, "containerd", b""),
    (2002, 1, "containerd-shim", b""),
    (2003, 2002, "python", b"guest"),
)
HOST = (*SERVICES, *local_ray(1, 3000, OTHER), (4000, 1, "bash", b""))


def test_an_actor_counts_its_own_session_and_the_driver_above_it():
    found = table(
        (10, 4000, "python", b"spark_ray.sweep"),
        (11, 10, "python", b"tether"),
        *local_ray(10, 100, OURS),
        (200, 106, "python", b"watchdog"),
        *HOST,
    )
    groups = grouped(found, own={106, 10})
    assert groups == {
        "spark_ray": [10, 11, 106, 200],
        "ray": [100, 101, 102, 103, 104, 105],
        "docker": [2000, 2001, 2002],
        "podman": [],
    }


def test_a_cluster_that_was_joined_is_found_by_the_raylet_above_the_actor():
    found = table(*local_ray(1, 100, OURS), *HOST)
    groups = grouped(found, own={106})
    assert groups["spark_ray"] == [106]
    assert groups["ray"] == [100, 101, 102, 103, 104, 105]


def test_without_ray_there_is_none_whatever_else_runs_on_the_host():
    found = table(
        (10, 4000, "python", b"spark_ray.sweep --out /tmp/" + OTHER), (11, 10, "python", b"watchdog"), *HOST
    )
    groups = grouped(found, own={10})
    assert groups["spark_ray"] == [10, 11]
    assert groups["ray"] == []


def test_what_is_left_out_is_in_no_group_nor_is_what_hangs_on_it():
    found = table((10, 4000, "python", b""), (11, 10, "python", b"ballast"), (12, 11, "python", b""), *HOST)
    assert grouped(found, own={10}, leave_out=[11])["spark_ray"] == [10]


@pytest.fixture
def holder():
    """A child that holds 64 MiB."""
    code = "import sys; held = bytearray(64 << 20); print(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    yield child.pid
    child.communicate()


@pytest.mark.process
def test_a_child_of_this_program_is_its_own_memory(holder):
    without = footprint.read(leave_out=[holder])
    seen = footprint.read()
    grown = seen["spark_ray"]["pss_anon_bytes"] - without["spark_ray"]["pss_anon_bytes"]
    assert 64 * MIB <= grown < 80 * MIB
    assert seen["spark_ray"]["processes"] == without["spark_ray"]["processes"] + 1
    assert seen["ray"] == {"processes": 0, "pss_bytes": 0, "pss_anon_bytes": 0}
    assert seen["object_store_bytes"] == 0
    assert seen["cost_s"] > 0


@pytest.mark.process
def test_memory_that_may_not_be_read_is_absent_with_the_reason(monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(observe, "smaps", refused)
    mine = footprint.read()["spark_ray"]
    assert mine["processes"] >= 1
    assert "pss_bytes" not in mine
    assert "Permission denied" in mine["absent"]["pss_bytes"]


def test_a_kernel_that_does_not_sum_up_is_no_process_that_has_ended(tmp_path):
    folder = tmp_path / str(os.getpid())
    folder.mkdir()
    (folder / "stat").write_text(f"{os.getpid()} (a (strange) name) S 1 1 1\n")
    (folder / "cmdline").write_bytes(b"python\0")
    assert footprint.processes(tmp_path)[os.getpid()].name == "a (strange) name"
    mine = footprint.read(proc=tmp_path)["spark_ray"]
    assert (mine["processes"], "pss_bytes" in mine, list(mine["absent"])) == (1, False, ["pss_bytes"])
    (folder / "smaps_rollup").write_text("")
    ending = footprint.read(proc=tmp_path)["spark_ray"]
    assert ending == {"processes": 0, "pss_bytes": 0, "pss_anon_bytes": 0}, "nothing is mapped any more"


def test_a_driver_of_another_host_is_not_looked_for_here(monkeypatch):
    monkeypatch.delenv(footprint.DRIVER, raising=False)
    name = footprint.driver_name()
    found = table((1, 0, "init", b""), (os.getpid(), 1, "python", b""))
    monkeypatch.setenv(footprint.DRIVER, name.rsplit(" ", 1)[0] + " 1")
    assert footprint._own(found) == {1, os.getpid()}
    monkeypatch.setenv(footprint.DRIVER, "another-boot 1")
    assert footprint._own(found) == {os.getpid()}
    with contextlib.suppress(KeyError):
        monkeypatch.delenv(footprint.DRIVER)
    assert footprint._own(found) == {os.getpid()}
