"""The instrument on recorded and composed trees (tests/trees: cgroup v1, v2, GB10-like, an old kernel) and on this machine."""

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_ray.observation import Observation
from spark_ray.worker import evidence, observe, residency, session, sizing

GIB = 1 << 30
TREES = Path(__file__).parent / "trees"
# MemTotal of a DGX Spark as its owners report it: 121.69 GiB (facts: unsloth #10486)
MEMINFO = "MemTotal:       127600592 kB\nMemFree:        12582912 kB\nMemAvailable:   115343360 kB\nBuffers: 0 kB\nCached:         104857600 kB\nHugePages_Total:       0\n"
ZONEINFO = """Node 0, zone   Normal
  pages free     3145728
        present  31900148
  pagesets
    cpu: 0
              count:    1000
              high:     8000
              batch:    63
  vm stats threshold: 60
    cpu: 1
              count:    24
              high:     8000
  node_unreclaimable:  0
  start_pfn:           4096
Node 0, zone  Movable
  pages free     0
"""


@pytest.fixture
def proc(tmp_path):
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(MEMINFO)
    (folder / "zoneinfo").write_text(ZONEINFO)
    return folder


def test_kernel_kb_are_kib_and_counts_stay_counts(proc):
    info = observe.meminfo(proc)
    assert info["MemTotal"] == 127600592 * 1024
    assert info["Cached"] == 100 * GIB
    assert info["HugePages_Total"] == 0


def test_per_cpu_free_is_the_sum_of_the_pagesets(proc):
    assert observe.per_cpu_free_bytes(proc) == 1024 * os.sysconf("SC_PAGE_SIZE")


def v2(proc, root, limit="max"):
    (proc / "self" / "cgroup").write_text("0::/system.slice/docker-abc.scope\n")
    group = root / "system.slice" / "docker-abc.scope"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("409000000\n")
    (group / "memory.peak").write_text("500000000\n")
    (group / "memory.max").write_text(limit + "\n")
    (group / "memory.stat").write_text(
        "anon 300000000\nfile 100000000\ninactive_file 60000000\nactive_file 40000000\nslab_reclaimable 1000000\n"
    )
    (group / "memory.events").write_text("low 0\noom 0\noom_kill 0\n")


def test_cgroup_v2(proc, tmp_path):
    v2(proc, tmp_path / "cg", "8589934592")
    seen = observe.cgroup("self", proc, tmp_path / "cg")
    assert (seen["version"], seen["usage_bytes"], seen["peak_bytes"], seen["limit_bytes"]) == (
        2,
        409000000,
        500000000,
        8 * GIB,
    )
    assert (seen["anon_bytes"], seen["file_bytes"], seen["events"]["oom_kill"]) == (300000000, 100000000, 0)


def test_no_limit_is_absent_with_its_reason_never_a_number(proc, tmp_path):
    v2(proc, tmp_path / "cg")
    seen = observe.cgroup("self", proc, tmp_path / "cg")
    assert "limit_bytes" not in seen
    assert seen["absent"]["limit_bytes"] == "unlimited"


def test_cgroup_v1_and_a_container_that_sees_its_own_group_at_the_top(proc, tmp_path):
    (proc / "self" / "cgroup").write_text("5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n")
    group = tmp_path / "cg" / "memory"
    group.mkdir(parents=True)
    (group / "memory.usage_in_bytes").write_text("1000\n")
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (group / "memory.stat").write_text(
        "total_rss 600\ntotal_cache 300\ntotal_inactive_file 200\ntotal_active_file 100\n"
    )
    seen = observe.cgroup("self", proc, tmp_path / "cg")
    assert (seen["version"], seen["usage_bytes"], seen["anon_bytes"], seen["file_bytes"]) == (
        1,
        1000,
        600,
        300,
    )
    assert seen["seen_at"] == "mount top"
    assert seen["absent"]["limit_bytes"] == "unlimited"
    assert "peak_bytes" not in seen
    assert "peak_bytes" in seen["absent"]
    assert sizing._charged_bytes(seen) == 700


def test_a_kernel_without_pressure_information_says_so(proc):
    (proc / "self" / "cgroup").write_text("0::/\n")
    seen = observe.observe("x", with_tree=False, proc=proc, root=proc)
    assert "pressure" not in seen
    assert "pressure" in seen["absent"]


def seen_in(tree, phase="sizing"):
    """The worker of a tree as the host observes it; strict: nothing may be there that the model does not describe."""
    found = observe.observe(phase, 7, proc=TREES / tree / "proc", root=TREES / tree / "cgroup")
    model = Observation.model_validate(found)
    assert not model.__pydantic_extra__
    return found


@pytest.mark.parametrize("tree", ["v1", "v2", "gb10", "bare"])
def test_every_field_of_meminfo_is_there(tree):
    lines = (TREES / tree / "proc" / "meminfo").read_text().splitlines()
    assert list(seen_in(tree)["meminfo"]) == [line.split(":")[0] for line in lines]


def test_v1_in_full():
    seen = seen_in("v1")
    group = seen["cgroup"]
    assert (group["version"], group["path"], "seen_at" in group) == (1, "/docker/f00d", False)
    assert (group["usage_bytes"], group["peak_bytes"], group["anon_bytes"]) == (
        190000000,
        250000000,
        70 << 20,
    )
    # Only a group above has a limit: v1 says how much, and not where.
    assert group["absent"]["limit_bytes"] == "unlimited"
    assert (group["effective_limit_bytes"], group["effective_limit_at"]) == (
        4 * GIB,
        "hierarchical_memory_limit",
    )
    tree = seen["tree"]
    assert (tree["processes"], tree["pss_anon_bytes"]) == (2, (61440 + 10240) << 10)
    assert seen["swap_traffic"] == {"in_bytes": 0, "out_bytes": 0}
    assert (seen["steadiness"]["tries"], seen["steadiness"]["spread_bytes"]) == (2, 0)
    # 4, 24 and 32 pages in three zones on two CPUs; a node's counters take the largest.
    assert seen["batches"] == {"free_bytes": 2 * 60 * 4096, "counter_bytes": 2 * 32 * 4096}
    assert "absent" not in seen


def test_v2_finds_the_smallest_limit_up_the_tree():
    group = seen_in("v2")["cgroup"]
    assert group["absent"] == {"limit_bytes": "unlimited", "swap_limit_bytes": "unlimited"}
    assert (group["effective_limit_bytes"], group["effective_limit_at"]) == (8 * GIB, "/jobs.slice/one.scope")
    assert (group["usage_bytes"], group["peak_bytes"], group["swap_usage_bytes"]) == (409000000, 500000000, 0)
    assert seen_in("v2")["swap_traffic"] == {"in_bytes": 3 * 4096, "out_bytes": 5 * 4096}


def test_a_group_of_another_namespace_is_not_looked_for_above_the_mount(proc, tmp_path):
    (proc / "self" / "cgroup").write_text("0::/../other\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "memory.max").write_text("1\n")
    (tmp_path / "cg").mkdir()
    seen = observe.cgroup("self", proc, tmp_path / "cg")
    assert seen["seen_at"] == "mount top"
    assert "hidden" in seen["absent"]["effective_limit_bytes"]


def test_what_an_old_kernel_lacks_is_absent_with_its_reason():
    seen = seen_in("bare")
    assert set(seen["absent"]) == {"per_cpu_free_bytes", "pressure", "swap_traffic"}
    assert all(seen["absent"].values())
    assert not {"per_cpu_free_bytes", "pressure", "swap_traffic", "batches"} & seen.keys()
    assert seen["tree"] == {"processes": 0, "absent": {"some_members": os.strerror(errno.ENOENT)}}
    assert {"usage_bytes", "stat", "events"} <= seen["cgroup"]["absent"].keys()


def test_gb10_has_twenty_cpus_of_lists():
    seen = seen_in("gb10")
    assert seen["per_cpu_free_bytes"] == 20 * 1063 * 4096
    assert seen["batches"] == {"free_bytes": 20 * 210 * 4096, "counter_bytes": 20 * 110 * 4096}


# ---- unstable counters --------------------------------------------------------------------------------------


def moving(monkeypatch, proc, *free_kib):
    """Each reading of meminfo finds the next of these values of MemFree."""
    left = iter(free_kib)
    real = observe._text

    def text(path):
        if Path(path).name != "meminfo":
            return real(path)
        return MEMINFO.replace("12582912", str(next(left)))

    monkeypatch.setattr(observe, "_text", text)
    return observe.steady(proc)


def test_two_readings_that_agree_are_enough(monkeypatch, proc):
    seen = moving(monkeypatch, proc, 5000000, 5000512)
    assert seen["steadiness"] == {"tries": 2, "spread_bytes": 512 << 10, "agreed": True}
    assert seen["meminfo"]["MemFree"] == 5000512 << 10


def test_a_third_reading_can_settle_it(monkeypatch, proc):
    seen = moving(monkeypatch, proc, 5000000, 6000000, 6000100)
    assert seen["steadiness"] == {"tries": 3, "spread_bytes": 100 << 10, "agreed": True}


def test_what_never_agrees_is_kept_with_its_whole_spread(monkeypatch, proc):
    seen = moving(monkeypatch, proc, 5000000, 7000000, 6000000)
    assert seen["steadiness"] == {"tries": 3, "spread_bytes": 2000000 << 10, "agreed": False}
    assert seen["meminfo"]["MemFree"] == 6000000 << 10


# ---- residency ----------------------------------------------------------------------------------------------


@pytest.fixture
def cached_file(tmp_path):
    """1 MiB and a bit that has just been written, so it is in the page cache, and an empty file."""
    (tmp_path / "part").mkdir()
    path = tmp_path / "part" / "weights"
    path.write_bytes(b"x" * ((1 << 20) + 10))
    (tmp_path / "empty").touch()
    return path


def test_residency_of_files_with_its_source(cached_file, tmp_path):
    found = observe.resident([*observe.files_under(tmp_path), tmp_path / "gone"])
    assert (found["files"], found["size_bytes"]) == (2, (1 << 20) + 10)
    assert found["resident_bytes"] == (1 << 20) + 4096
    assert found["source"] in {"cachestat", "mincore"}
    assert found["absent"] == {str(tmp_path / "gone"): os.strerror(errno.ENOENT)}
    assert observe.files_under(cached_file) == [cached_file]


def test_both_ways_of_asking_agree(cached_file):
    with cached_file.open("rb") as stream:
        by_mincore = residency._mincore(stream.fileno(), cached_file.stat().st_size)
        assert by_mincore == (1 << 20) + 4096
        try:
            by_cachestat = residency._cachestat(stream.fileno())
        except OSError:
            pytest.skip("no cachestat here")
    assert by_cachestat == by_mincore


def refused(*_):
    raise OSError(errno.EPERM, "seccomp")


def test_without_cachestat_mincore_is_asked_and_without_the_right_to_it_nobody(monkeypatch, cached_file):
    monkeypatch.setattr(residency, "_cachestat", refused)
    assert residency.resident([cached_file])["source"] == "mincore"
    monkeypatch.setattr(residency, "_mincore_is_honest", lambda *_: False)
    found = residency.resident([cached_file])
    assert "resident_bytes" not in found
    assert "mincore tells only" in found["absent"][str(cached_file)]


@pytest.mark.root
def test_a_file_of_an_overlay_is_not_0(tmp_path, cached_file):
    """cachestat sees the overlay's own mapping there, which is always empty."""
    for name in ("upper", "work", "mount"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={cached_file.parent},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(tmp_path / "mount")]
    subprocess.run(mount, check=True)
    try:
        assert residency.resident_bytes(tmp_path / "mount" / "weights") == (1 << 20) + 4096
    finally:
        subprocess.run(["umount", str(tmp_path / "mount")], check=True)


# ---- on this machine ----------------------------------------------------------------------------------------


def test_on_this_machine_parts_do_not_exceed_the_whole():
    seen = observe.observe("now")
    info = seen["meminfo"]
    assert 0 < info["MemFree"] <= info["MemAvailable"] * 2 <= 2 * info["MemTotal"]
    assert seen["tree"]["pss_bytes"] > 1 << 20
    assert seen["tree"]["processes"] >= 1
    assert 2 <= seen["steadiness"]["tries"] <= 3
    assert seen["batches"]["free_bytes"] > 0
    Observation.model_validate(seen)


@given(free=st.integers(0, 200 * GIB), transient=st.integers(0, 20 * GIB), fraction=st.floats(0.01, 0.99))
def test_the_law_is_fraction_of_total_less_peak(free, transient, fraction):
    pool = sizing.size_pool({"total_bytes": 200 * GIB, "free_bytes": free}, transient, fraction)
    assert pool["available_bytes"] == max(0, int((200 * GIB - pool["peak_bytes"]) * fraction))


def test_page_cache_eats_memfree_and_not_memavailable(monkeypatch, proc):
    """The reported GB10 state: 12 GiB free, 110 GiB available, 100 GiB of page cache."""
    info = observe.meminfo(proc)
    monkeypatch.setattr(sizing.observe, "meminfo", lambda: info)
    assert sizing.read_view("memfree")["free_bytes"] == 12 * GIB
    assert sizing.read_view("memavailable")["free_bytes"] == 110 * GIB


def test_the_lists_are_read_beside_the_law(monkeypatch):
    reading = sizing.read_view("memfree")
    assert reading["per_cpu_free_bytes"] >= 0

    def absent():
        raise PermissionError

    monkeypatch.setattr(observe, "per_cpu_free_bytes", absent)
    assert "per_cpu_free_bytes" not in sizing.read_view("memfree")


# ---- the worker's phases, and its evidence ------------------------------------------------------------------


def test_before_sizing_the_host_is_asked_to_settle(tmp_path, cached_file):
    request = {"engine": {}, "configuration": {}, "model_path": str(cached_file.parent)}
    answers, answering = os.pipe()
    hearing, control = os.pipe()
    heard = []

    def host():
        with open(hearing) as stream:  # noqa: PTH123  a descriptor
            for line in stream:
                heard.append(line.strip())
                os.write(answering, b"go\n")

    answerer = threading.Thread(target=host)
    answerer.start()
    talk = session.Session(tmp_path, request, control, answers)
    talk.phase("after_kv")
    seen = talk.phase("sizing")
    os.close(control)
    answerer.join()
    assert heard == [f"@spark_ray {words}" for words in ("phase after_kv", "settle", "phase sizing")]
    assert seen["model_files"]["resident_bytes"] == (1 << 20) + 4096
    first, second = (tmp_path / "observations.jsonl").read_text().splitlines()
    assert "model_files" not in first
    assert Observation.model_validate_json(second).model_files.files == 1
    os.close(answers)
    os.close(answering)


def test_mounts_leave_out_what_every_mount_namespace_has_by_chance(monkeypatch):
    lines = (
        "27 1 254:0 / / rw,relatime - overlay overlay rw,lowerdir=/a/l,upperdir=/a/u,workdir=/a/w,xino=off\n"
        "30 27 254:0 /m /model ro,nosuid - ext4 /dev/vda rw,discard\n"
        "99 27 0:50 / /dev/shm rw,nosuid shared:7 master:3 - tmpfs shm rw,nosuid,size=65536k\n"
        "98 27 0:4 net:[4026533] /run/docker/netns/default rw - nsfs nsfs rw\n"
        "97 27 0:51 / /var/lib/docker/overlay2/0123456789abcdef/merged rw - overlay overlay rw\n"
    )
    monkeypatch.setattr(evidence.Path, "read_text", lambda *_, **__: lines)
    assert evidence.mounts() == [
        {"source": "overlay", "target": "/", "type": "overlay", "options": "rw,relatime,xino=off"},
        {"source": "shm", "target": "/dev/shm", "type": "tmpfs", "options": "rw,nosuid,size=65536k"},
        {"source": "/dev/vda", "target": "/model", "type": "ext4", "options": "ro,nosuid,discard"},
    ]
    monkeypatch.undo()
    assert any(mount["target"] == "/proc" for mount in evidence.mounts())
