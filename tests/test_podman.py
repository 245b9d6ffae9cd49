"""Podman: how a worker is started by it, what a host refuses, and how real containers of it end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import experiment_data, guests_of, spark_ray, wait_until, write_yaml
from test_launch import Bench

from spark_ray import guest_podman, reap, rootfs
from spark_ray.environment_spec import PodmanEnvironment
from spark_ray.environments import Content, Offer, Site, podman
from spark_ray.experiment import Experiment
from spark_ray.guest import StartError
from spark_ray.store import RECORD, Store, read_record


def spec(**keys):
    return PodmanEnvironment(kind="podman", **keys)


# ---- as data ----------------------------------------------------------------------------------------------


def test_each_key_is_one_flag(tmp_path):
    content = Content(
        python="python3", root="/tree", mounts=(("/venv", "/venv", True),), variables={"A": "x"}
    )
    site = Site(
        attempt=tmp_path, bundle=Path("/bundle"), model=Path("/model"), content=content, label="t/1", run_label="/run",
        uid=0, gid=0,
    )  # fmt: skip
    made = spec(
        runtime="crun", memory="2GiB", shm_size="1GiB", ipc="host", network="host", ulimits={"memlock": -1}
    )
    argv = podman.start(made, site).argv
    split = argv.index("--rootfs")
    assert argv[:3] == ("podman", "create", "--interactive")
    assert argv[split:] == ("--rootfs", "/tree:O", "python3", "-m", "spark_ray_worker", "/spark_ray/attempt")
    wanted = {
        "--runtime=crun", f"--memory={2 << 30}", f"--memory-swap={2 << 30}", f"--shm-size={1 << 30}b", "--ipc=host",
        "--network=host", "--ulimit=memlock=-1:-1", "--read-only", "--cap-drop=ALL", "--label=spark_ray.run=/run",
        "--label=spark_ray.trial=t/1", f"--volume={tmp_path}:/spark_ray/attempt:rw", "--volume=/model:/spark_ray/model:ro",
        "--volume=/venv:/venv:ro", "--env=A=x",
    }  # fmt: skip
    assert wanted <= set(argv[:split])
    plain = podman.start(spec(), site).argv
    assert not [
        word for word in plain if word.startswith(("--runtime", "--memory", "--shm", "--ipc", "--ulimit"))
    ]


def test_a_host_without_podman_is_told_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    why, mend = guest_podman.lacking()
    offer = Offer(root_acts=None, docker=None, podman=why, podman_mend=mend, memory_total_bytes=1 << 30)
    assert [str(problem) for problem in podman.problems(spec(memory="2GiB"), offer)] == [
        "the program podman is not installed (mend: sudo apt-get install podman)",
        "the memory limit is above this host's memory (mend: lower environment.memory)",
    ]
    with pytest.raises(StartError, match="not installed"):
        guest_podman.ask("ps")
    assert guest_podman.labelled("spark_ray.run") == []


OUTSIDE = {
    "container_id": "c0ffee", "cgroup": ["4:memory:/libpod_parent/libpod-c0ffee"], "root": "0:40:1",
    "namespaces": {"ipc": "i2", "mnt": "m2", "net": "n2", "pid": "p2"},
    "host": {"root": "8:1:2", "namespaces": {"ipc": "i1", "mnt": "m1", "net": "n1", "pid": "p1"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "change", "found"),
    [
        ({}, {}, []),
        ({}, {"cgroup": ["4:memory:/"]}, ["no cgroup of the process names container c0ffee"]),
        ({}, {"root": "8:1:2"}, ["root is the host's own"]),
        ({}, {"namespaces": {"ipc": "i1"}}, ["the ipc namespace is the host's own"]),
        ({}, {"namespaces": {"pid": "p1"}}, ["the pid namespace is the host's own"]),
        ({"ipc": "host"}, {}, ["the ipc namespace is not the host's own"]),
        ({"ipc": "host", "network": "host"}, {"namespaces": {"ipc": "i1", "net": "n1"}}, []),
    ],
)
def test_the_evidence_must_be_a_containers(keys, change, found):
    seen = OUTSIDE | change | {"namespaces": OUTSIDE["namespaces"] | change.get("namespaces", {})}
    assert podman.contradictions(spec(**keys), None, {}, seen) == found


REFUSING = """#!/bin/sh
case "$1" in
  create) shift; echo "$*" > "$0.flags"; echo 1234 ;;
  init)
    if grep -q -e "$NEEDED" "$0.flags"; then echo "Error: runc: exec: OCI runtime attempted to invoke a command that was not found" >&2
    else echo "Error: runc: runc create failed: error setting rlimit type 7" >&2; fi
    exit 126 ;;
  *) echo "$1" >> "$0.calls" ;;
esac
"""


@pytest.mark.parametrize(
    ("needed", "found"),
    [
        ("--read-only", None),
        ("ulimit=nofile", "add ulimits: {nofile: "),
        ("runtime=runc", "add runtime: runc and ulimits: {nofile: "),
        ("no such flag", "leave that out, or give podman what it lacks"),
    ],
)
def test_what_a_host_refuses_is_said_in_podmans_words_with_what_it_would_take(
    tmp_path, monkeypatch, needed, found
):
    """A stand-in that takes a container only with a certain flag."""
    program = tmp_path / "podman"
    program.write_text(REFUSING)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("NEEDED", needed)
    refused = guest_podman.refused_flags(spec())
    assert bool(refused) == (found is not None)
    for problem in refused:
        assert problem.what == "podman refuses: error setting rlimit type 7"
        assert problem.mend.startswith(found)
    assert set((tmp_path / "podman.calls").read_text().split()) == {"rm"}, "what was tried is removed"


# ---- real containers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def granted():
    """The keys without which this host refuses every container."""
    low = {"nofile": 1024, "nproc": 4096}
    for keys in ({}, {"ulimits": low}, {"runtime": "runc", "ulimits": low}):
        if not (refused := guest_podman.refused_flags(spec(**keys))):
            return keys
    pytest.skip(str(refused[0]))


@pytest.fixture
def bench(tmp_path, granted):
    """Runs of one podman arm, a; nothing of them is left in the end."""
    made = []

    def make(keys=None, limits=None, **engine):
        data = experiment_data(limits=limits, **engine)
        data["arms"]["a"]["environment"] = {"kind": "podman", **granted, **(keys or {})}
        made.append(Bench(tmp_path / f"run{len(made)}", Experiment.model_validate(data)))
        return made[-1]

    yield make
    for one in made:
        one.close()
        assert guests_of(one.store.folder) == []
        assert containers(one.store.folder) == []
        assert one.store.folder.name not in Path("/proc/self/mountinfo").read_text()


def containers(folder):
    return [
        one for one in guest_podman.labelled("spark_ray.run") if one.labels["spark_ray.run"] == str(folder)
    ]


@pytest.mark.process
@pytest.mark.podman
def test_a_trial_is_measured_in_the_container_it_says_and_leaves_the_tree_as_it_was(bench):
    one = bench()
    record = one.run()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    outside, inside = record["host"]["outside"], record["result"]["evidence"]
    assert inside["root"] == outside["root"] != outside["host"]["root"]
    assert inside["root_mount"]["filesystem"] == "overlay"
    assert any(outside["container_id"] in line for line in outside["cgroup"])
    assert int(inside["status"]["CapEff"], 16) == 0
    for kind in ("ipc", "mnt", "net", "pid"):
        assert (
            inside["namespaces"][kind] == outside["namespaces"][kind] != outside["host"]["namespaces"][kind]
        )
    content = record["content"]
    assert content["image_id"] is None
    assert rootfs.content_sha256(Path(content["root"])) == content["sha256"]


@pytest.mark.process
@pytest.mark.podman
def test_what_is_the_hosts_is_seen_to_be(bench):
    record = bench(keys={"ipc": "host", "network": "host"}).run()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    outside = record["host"]["outside"]
    for kind in ("ipc", "net"):
        assert outside["namespaces"][kind] == outside["host"]["namespaces"][kind]


@pytest.mark.process
@pytest.mark.podman
@pytest.mark.parametrize(
    ("behaviour", "kind", "reason"),
    [
        ("segfault", "crashed", "SIGSEGV"),
        ("exit", "crashed", "exit_3"),
        ("raise", "engine_error", "RuntimeError"),
        ("hang", "timeout", "trial_timeout"),
        ("stop", "timeout", "trial_timeout"),
    ],
)
def test_each_bad_end_has_its_outcome(bench, behaviour, kind, reason):
    limits = {"trial_timeout": "2s"} if kind == "timeout" else None
    record = bench(behaviour=behaviour, limits=limits).run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == (kind, reason)
    assert [o["phase"] for o in record["inside"]][:1] == ["after_load"], "what a dying worker saw is kept"


@pytest.mark.process
@pytest.mark.podman
def test_out_of_memory_is_an_answer(bench):
    record = bench(keys={"memory": "64MiB"}, allocate="256MiB").run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("out_of_memory", "kernel_oom_kill")
    assert record["host"]["oom_kills"] > 0  # by the kernel: podman 4.3 itself does not see it on cgroup v1
    assert record["host"]["exit_code"] == 137


@pytest.mark.process
@pytest.mark.podman
def test_a_start_that_podman_refuses_is_an_outcome_with_its_words(bench):
    record = bench(keys={"ulimits": {"no-such-limit": 1}}).run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("crashed", "start_refused")
    assert "no-such-limit" in record["outcome"]["message"]


def driven(tmp_path, granted, **engine):
    """A sweep of podman arms in a process of its own, with its first guest alive."""
    folder, arm = tmp_path / "run", {"kind": "podman", **granted}
    path = write_yaml(tmp_path, experiment_data(blocks=1, arms=(arm, arm), **engine))
    driver = subprocess.Popen(
        [sys.executable, "-m", "spark_ray.sweep", str(path), "--out", str(folder), "--local", "--no-report"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert wait_until(lambda: len(guests_of(folder)) >= 2, 60)
    return driver, folder


@pytest.mark.process
@pytest.mark.podman
def test_a_killed_driver_leaves_no_process_and_the_next_one_goes_on(tmp_path, granted):
    driver, folder = driven(tmp_path, granted, hold="1s")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert wait_until(lambda: not guests_of(folder), 10)
    assert wait_until(lambda: [one.status for one in containers(folder)] == ["exited"], 10)
    found = [one for one in reap.leftovers(folder, None) if one.kind == "podman container"]
    assert len(found) == 1
    command = [
        sys.executable,
        "-m",
        "spark_ray.sweep",
        str(tmp_path / "experiment.yaml"),
        "--out",
        str(folder),
    ]
    done = subprocess.run(
        [*command, "--local", "--no-report", "--resume"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"removed podman container {found[0].name}" in " ".join(done.stdout.split())
    assert containers(folder) == []
    records = [read_record(path) for path in folder.glob(f"trials/*/*/{RECORD}")]
    assert [record["outcome"]["kind"] for record in records] == ["ok", "ok"]


@pytest.mark.process
@pytest.mark.podman
def test_a_guest_that_was_stopped_when_its_driver_died_is_reaped(tmp_path, granted):
    driver, folder = driven(tmp_path, granted, hold="30s")
    for pid in guests_of(folder):
        os.kill(pid, signal.SIGSTOP)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert [one.status for one in containers(folder)] == ["running"]
    done = spark_ray("reap", str(folder))
    assert done.returncode == 0, done.stderr
    assert containers(folder) == []
    assert wait_until(lambda: not guests_of(folder), 10)
    assert Store.read(folder).blocks() != []
