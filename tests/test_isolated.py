"""Each switch of `isolated`, on its own and together: seen from both sides, ended in every way, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import experiment_data, guests_of, wait_until, write_yaml
from test_launch import Bench

from spark_ray import capabilities, environments, group, guest, preview, privileged, reap
from spark_ray.cluster import one_local_node
from spark_ray.environment_spec import IsolatedEnvironment
from spark_ray.environments import Content, Offer, Site, isolated
from spark_ray.errors import UnavailableError
from spark_ray.experiment import Experiment
from spark_ray.rootact import RootActs

ALL = ["pid", "ipc", "uts", "net", "cgroup"]
DOCKER_LIKE = {"root": "overlay", "cgroup": True, "memory": "2GiB", "namespaces": ALL}


def data_of(switches, **options):
    data = experiment_data(**options)
    data["arms"]["a"]["environment"] = {"kind": "isolated", **switches}
    return data


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(switches, **options):
        made.append(
            Bench(tmp_path / f"run{len(made)}", Experiment.model_validate(data_of(switches, **options)))
        )
        return made[-1]

    yield make
    for one in made:
        one.close()
        assert guests_of(one.store.folder) == []
        assert one.store.folder.name not in Path("/proc/self/mountinfo").read_text()
        assert groups_of(one.store.folder) == []


def groups_of(run):
    """Names of the cgroups of a run, driven or not."""
    folder = Path(privileged.memory_hierarchy()[1], privileged.GROUPS)
    mark = group.name_of(str(run), "")
    return sorted(each.name for each in folder.glob(f"{mark}*")) if folder.is_dir() else []


# ---- what was switched on is there, and nothing else ----------------------------------------------------------


@pytest.mark.process
@pytest.mark.root
@pytest.mark.parametrize(
    "switches",
    [
        {"root": "host"},
        {"root": "host", "cgroup": True, "memory": "1GiB"},
        {},
        {"cgroup": True},
        {"root": "overlay"},
        *({"root": "host", "namespaces": [kind]} for kind in ALL),
        DOCKER_LIKE,
    ],
    ids=lambda switches: " ".join(f"{key}={value}" for key, value in switches.items()) or "chroot",
)
def test_evidence_shows_exactly_what_was_switched_on(bench, switches):
    record = bench(switches).run()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    inside, outside = record["result"]["evidence"], record["host"]["outside"]
    of_host = outside["host"]
    root = switches.get("root", "chroot")
    assert (outside["root"] == of_host["root"]) == (root == "host")
    assert (outside["root"] == outside.get("expected_root")) == (root == "chroot")
    assert (outside["root_filesystem"] == "overlay") == (root == "overlay")
    assert inside["root_mount"]["filesystem"] == outside["root_filesystem"]
    own = {kind for kind, space in outside["namespaces"].items() if space != of_host["namespaces"][kind]}
    assert own == {"mnt", *switches.get("namespaces", ())}
    assert inside["namespaces"] == outside["namespaces"]
    assert (outside["memory_group"] == outside["launcher_memory_group"]) == ("cgroup" not in switches)
    limit = {"1GiB": 1 << 30, "2GiB": 2 << 30}.get(switches.get("memory"))
    assert outside.get("group_limit_bytes") == limit
    last = record["inside"][-1]["cgroup"]
    if limit:
        assert last["limit_bytes"] == limit, "the worker reads its own limit, in a cgroup namespace as well"
    if "pid" in switches.get("namespaces", ()):
        assert inside["pid"] != outside["worker_pid"]
    if "ipc" in switches.get("namespaces", ()):
        assert inside["shm_bytes"] == 64 << 20
    if "cgroup" in switches:
        assert record["host"]["end"]["oom_killed"] is False
        assert record["host"]["end"]["cgroup_peak_bytes"] > 1 << 20


def site_of(**more):
    content = Content(python="python3", root="/tree")
    return Site(
        Path("/run/trials/t/1"), Path("/run/bundle"), None, content, "t/1", "/run", 0, 0, ("python",), **more
    )


def seen(spec, **changes):
    """What the host sees of a worker that is separated as `spec` says."""
    kinds = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
    of_host = {kind: f"{kind}:[1]" for kind in kinds}
    own = {kind: f"{kind}:[2]" for kind in ("mnt", *spec.namespaces)}
    roots = {"host": "8:0:2", "chroot": "8:0:7", "overlay": "0:99:2"}
    return {
        "host": {"root": "8:0:2", "namespaces": of_host},
        "root": roots[spec.root],
        "expected_root": "8:0:7",
        "root_filesystem": "overlay" if spec.root == "overlay" else "ext4",
        "namespaces": of_host | own,
        "launcher_memory_group": "/user",
        "memory_group": f"/spark_ray/{group.name_of('/run', 't/1')}" if spec.cgroup else "/user",
        **({"group_limit_bytes": spec.memory} if spec.memory else {}),
        **changes,
    }


def spec_of(**switches):
    return IsolatedEnvironment.model_validate({"kind": "isolated", **switches})


@pytest.mark.parametrize(
    ("switches", "changes", "words"),
    [
        ({}, {"root": "8:0:2"}, "root is the host's own"),
        ({}, {"root": "8:0:9"}, "root is 8:0:9, the rootfs is 8:0:7"),
        ({"root": "host"}, {"root": "8:0:7"}, "the host's is 8:0:2"),
        ({"root": "overlay"}, {"root_filesystem": "ext4"}, "root is on ext4, not an overlay"),
        ({"root": "overlay"}, {"root": "8:0:7"}, "not an overlay"),
        ({"namespaces": ["pid"]}, {"namespaces": {"pid": "pid:[1]", "mnt": "mnt:[2]"}}, "the pid namespace is the host's own"),
        ({"namespaces": ["pid"]}, {"namespaces": {"mnt": "mnt:[2]"}}, None),
        ({}, {"namespaces": {"mnt": "mnt:[1]"}}, "the mnt namespace is the host's own"),
        ({}, {"namespaces": {"mnt": "mnt:[2]", "ipc": "ipc:[2]"}}, "the ipc namespace is not the host's"),
        ({}, {"memory_group": "/other"}, "the memory cgroup is /other, the launcher's is /user"),
        ({"cgroup": True}, {"memory_group": "/user"}, "the memory cgroup is /user, not"),
        ({"cgroup": True}, {"group_limit_bytes": 1 << 20}, "the limit of the memory cgroup is 1048576, not None"),
        ({"cgroup": True, "memory": "1GiB"}, {"group_limit_bytes": None}, "is None, not 1073741824"),
    ],
)  # fmt: skip
def test_what_was_not_switched_on_or_is_missing_is_a_contradiction(switches, changes, words):
    spec = spec_of(**switches)
    assert isolated.contradictions(spec, site_of(), {}, seen(spec)) == []
    found = isolated.contradictions(spec, site_of(), {}, seen(spec, **changes))
    if words is None:  # a kind that could not be read is not known to be its own
        assert found == []
    else:
        assert any(words in one for one in found), found


def test_the_docker_socket_is_no_back_door_where_the_root_is_the_hosts():
    inside = {"bundle_sha256": "x", "docker_sockets": ["/run/docker.sock"]}
    for root, count in (("host", 0), ("chroot", 1), ("overlay", 1)):
        assert len(environments.common_contradictions(spec_of(root=root), inside, {}, "x")) == count


# ---- every way to end -----------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.root
@pytest.mark.parametrize(
    "switches", [{"root": "host", "namespaces": ["pid"]}, DOCKER_LIKE], ids=["pid", "docker-like"]
)
@pytest.mark.parametrize(
    ("behaviour", "kind", "reason"),
    [
        ("segfault", "crashed", "SIGSEGV"),
        ("exit", "crashed", "exit_3"),
        ("raise", "engine_error", "RuntimeError"),
        ("stop", "timeout", "trial_timeout"),
    ],
)
def test_each_bad_end_has_its_outcome_and_leaves_nothing(bench, switches, behaviour, kind, reason):
    limits = {"trial_timeout": "1200ms"} if kind == "timeout" else None
    one = bench(switches, behaviour=behaviour, limits=limits)
    record = one.run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == (kind, reason)
    assert [o["phase"] for o in record["inside"]][:1] == ["after_load"]
    assert guests_of(one.store.folder) == []
    assert groups_of(one.store.folder) == []


@pytest.mark.process
@pytest.mark.root
@pytest.mark.parametrize("switches", [{"root": "host"}, DOCKER_LIKE], ids=["host", "docker-like"])
def test_more_than_its_limit_is_out_of_memory(bench, switches):
    one = bench(switches | {"cgroup": True, "memory": "64MiB"}, allocate="256MiB")
    record = one.run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("out_of_memory", "kernel_oom_kill")
    end = record["host"]["end"]
    assert end["oom_killed"] is True
    assert (60 << 20) < end["cgroup_peak_bytes"] <= (64 << 20)


@pytest.mark.process
@pytest.mark.root
def test_a_kill_from_outside_is_disturbed(bench):
    one = bench(DOCKER_LIKE, hold="20s")

    def kill():
        assert wait_until(lambda: len(guests_of(one.store.folder)) >= 2)
        os.kill(max(guests_of(one.store.folder)), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    record = one.run()
    killer.join()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("disturbed", "killed_from_outside")


@pytest.mark.process
@pytest.mark.root
@pytest.mark.parametrize("switches", [{"root": "host", "cgroup": True}, {"root": "host"}, {}], ids=str)
def test_what_leaves_the_session_goes_at_the_deadline(bench, switches):
    """As MPI's daemon and its ranks, each in a session of its own; who would collect them is killed with the first one."""
    one = bench(switches, behaviour="hang", limits={"trial_timeout": "1200ms"})
    spawn = "    import subprocess; subprocess.Popen(['sh', '-c', 'setsid sleep 1000 & wait'], start_new_session=True, env={'SPARK_RAY_TRIAL': str(talk.folder), 'PATH': '/usr/bin:/bin'})\n"
    phase = '    talk.phase("after_load")\n'
    one.change_worker("engine_fake.py", phase, spawn + phase)
    assert one.run()["outcome"]["kind"] == "timeout"
    assert guests_of(one.store.folder) == []


@pytest.mark.process
@pytest.mark.root
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_killed_driver_leaves_no_process_no_mount_and_a_group_that_reap_removes(tmp_path, stopped):
    folder = tmp_path / "run"
    path = write_yaml(tmp_path, data_of(DOCKER_LIKE, blocks=1, hold="30s"))
    driver = subprocess.Popen(
        [sys.executable, "-m", "spark_ray.sweep", str(path), "--out", str(folder), "--local", "--set", "arms.b.environment=" + json.dumps({"kind": "isolated", **DOCKER_LIKE})],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert wait_until(lambda: len(guests_of(folder)) >= 2, 30)
    assert len(groups_of(folder)) == 1
    assert list(group.left(folder)) == [], "somebody drives it"
    if (
        stopped
    ):  # also those cannot notice that their input is closed; the kernel kills them with their parent
        for pid in guests_of(folder):
            os.kill(pid, signal.SIGSTOP)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert wait_until(lambda: not guests_of(folder), 10)
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert wait_until(lambda: list(group.left(folder)) == groups_of(folder), 5)
    found = [one for one in reap.leftovers(folder, None) if one.kind == "cgroup"]
    assert len(found) == 1
    assert found[0].name in {one.name for one in reap.of_no_run(tmp_path, None)}
    assert reap.remove(found[0], None) is None
    assert groups_of(folder) == []


# ---- groups, by hand --------------------------------------------------------------------------------------------


@pytest.fixture
def v2(tmp_path, monkeypatch):
    """A composed v2 tree: files where the kernel has its own, so only what is written where can be seen."""
    for folder in (tmp_path, tmp_path / privileged.GROUPS):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.controllers").write_text("cpu memory pids\n")
    monkeypatch.setattr(privileged, "CGROUP", str(tmp_path))
    monkeypatch.setattr(privileged, "memory_hierarchy", lambda: (2, str(tmp_path)))
    return tmp_path


def test_v2_hands_the_memory_controller_down_the_path(v2):
    privileged.make_group("x-1", None)
    assert (v2 / "cgroup.subtree_control").read_text() == "+memory"
    assert (v2 / privileged.GROUPS / "cgroup.subtree_control").read_text() == "+memory"
    assert (v2 / privileged.GROUPS / "x-1").is_dir()


def test_v2_limits_without_swap_where_swap_is_accounted(v2):
    folder = v2 / "group"
    folder.mkdir()
    privileged._limit(2, str(folder), "4096")
    assert sorted(path.name for path in folder.iterdir()) == ["memory.max"]
    (folder / "memory.swap.max").write_text("max")
    privileged._limit(2, str(folder), "4096")
    assert (folder / "memory.swap.max").read_text() == "0"


def test_v2_kills_all_at_once_where_the_kernel_can(v2):
    folder = v2 / "group"
    folder.mkdir()
    (folder / "cgroup.kill").write_text("")
    (folder / "cgroup.procs").write_text(f"{os.getpid()}\n")
    privileged._kill_all(str(folder))
    assert (folder / "cgroup.kill").read_text() == "1"


def test_v2_without_the_controller_is_said(v2):
    (v2 / "cgroup.controllers").write_text("cpu\n")
    with pytest.raises(privileged.Refused, match="no memory controller"):
        privileged.make_group("x-1", None)


@pytest.mark.parametrize(
    ("version", "files", "found"),
    [
        (1, {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", "memory.max_usage_in_bytes": "77\n"}, {"oom_killed": True, "cgroup_peak_bytes": 77}),
        (2, {"memory.events": "low 0\noom 1\noom_kill 0\noom_group_kill 0\n", "memory.peak": "99\n"}, {"oom_killed": False, "cgroup_peak_bytes": 99}),
        (2, {"memory.events": "oom_kill 1\n"}, {"oom_killed": True}),
        (2, {}, {}),
    ],
)  # fmt: skip
def test_what_a_group_saw_is_read_in_both_versions(tmp_path, version, files, found):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert group.read(tmp_path, version) == found


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "../../docker"])
def test_a_group_has_a_plain_name(name):
    with pytest.raises(privileged.Refused, match="no name of a group"):
        privileged._folder("/sys/fs/cgroup", name)


def test_a_group_that_cannot_be_limited_is_not_left(v2, monkeypatch):
    def fail(*_):
        raise PermissionError

    monkeypatch.setattr(privileged, "_limit", fail)
    with pytest.raises(PermissionError):
        privileged.make_group("x-1", "4096")
    assert not (v2 / privileged.GROUPS / "x-1").exists()


@pytest.mark.root
def test_a_group_that_exists_is_not_taken_over():
    acts = RootActs()
    name = f"test-{os.getpid()}"
    one = group.Group(name, 64 << 20, acts.prefix())
    try:
        assert one.limit_bytes() == 64 << 20
        assert name not in list(group.left()), "it is driven"
        with pytest.raises(UnavailableError, match="exists"):
            group.Group(name, None, acts.prefix())
        assert one.limit_bytes() == 64 << 20
    finally:
        assert one.finish().get("group_left") is None
    assert not one.folder.exists()


# ---- what a host lacks ------------------------------------------------------------------------------------------


@pytest.mark.root
def test_every_way_is_tried_for_real_and_nothing_lasts(tmp_path):
    failed = RootActs().isolation(tmp_path)
    assert failed.keys() <= isolated.SWITCHES.keys()
    assert all(failed.values())
    # Containers of others may come and go meanwhile: all that is tried here is below tmp_path.
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert list(tmp_path.iterdir()) == []
    assert f"probe-{os.getpid()}" not in groups_of(tmp_path)


@pytest.mark.parametrize(
    ("switches", "named"),
    [
        ({}, []),
        ({"root": "overlay"}, ["an overlay root"]),
        ({"cgroup": True, "namespaces": ["pid", "net"]}, ["a memory cgroup", "a net namespace"]),
    ],
)
def test_a_switch_that_does_not_work_here_is_a_named_problem(switches, named):
    offer = Offer(None, None, isolation={"overlay": "why", "memory": "why", "net": "why"})
    problems = isolated.problems(spec_of(**switches), offer)
    assert [problem.what for problem in problems] == [f"{what} is not possible here: why" for what in named]
    assert all(problem.mend for problem in problems)


def test_without_root_or_with_more_than_the_host_has_it_is_a_problem():
    (one,) = isolated.problems(spec_of(), Offer("no sudo", None))
    assert one.what == "isolated needs root: no sudo"
    spec = spec_of(cgroup=True, memory="4GiB")
    (one,) = isolated.problems(spec, Offer(None, None, memory_total_bytes=1 << 30))
    assert "above this host's memory" in one.what


def test_the_plan_lists_a_rung_that_is_not_possible_and_its_reason(monkeypatch):
    lacking = {"overlay": "mount overlay at /x: Operation not permitted (it lacks CAP_SYS_ADMIN)"}
    monkeypatch.setattr(RootActs, "available", lambda self: (True, "this is root"))  # noqa: ARG005
    monkeypatch.setattr(RootActs, "isolation", lambda self, folder: lacking)  # noqa: ARG005
    data = data_of({"root": "overlay"}, arms=("native", "native", "native"))
    data["arms"]["a"]["required"] = False
    data["contrast"] = {"baseline": "b", "against": "c"}
    made = Experiment.model_validate(data)
    plan = preview.preview(made, one_local_node(), preview.probe(made))
    assert plan.executed == ("b", "c")
    assert "CAP_SYS_ADMIN" in plan.arms[0].problems[0].what


@pytest.mark.parametrize(
    ("way", "reason", "bounds", "words"),
    [
        ("pid", "isolate: a pid namespace of its own: Operation not permitted", 0, "it lacks CAP_SYS_ADMIN"),
        ("net", "Operation not permitted", 1 << 21, "it lacks CAP_NET_ADMIN"),
        ("pid", "Operation not permitted", (1 << 41) - 1, "a security module or a seccomp filter forbids it"),
        ("pid", "a pid namespace of its own: Invalid argument", (1 << 41) - 1, "Invalid argument"),
    ],
)
def test_the_capability_that_is_missing_is_named(way, reason, bounds, words):
    said = capabilities.explain_isolation(way, reason, bounds)
    assert words in said
    assert "isolate:" not in said


# ---- the guest --------------------------------------------------------------------------------------------------


def test_a_guest_that_reads_no_answer_does_not_hold_the_host(tmp_path):
    start = environments.Start((sys.executable, "-c", "import time; time.sleep(60)"), {}, "", None)
    one = guest.ProcessGuest(start, tmp_path / "log")
    try:
        for _ in range(40_000):  # 120 kB: more than a pipe holds
            one.answer()
    finally:
        one.kill()
        one.end()


def test_only_its_own_processes_are_asked_for_the_number_inside(tmp_path):
    start = environments.Start((sys.executable, "-c", "input()"), {}, "", None)
    one = guest.ProcessGuest(start, tmp_path / "log")
    try:
        inside = one.identity()["pid"]
        assert one.pid_of(inside) == inside
        with pytest.raises(ProcessLookupError):
            one.pid_of(os.getpid())
    finally:
        one.kill()
        assert one.end().exit_code == 137
