"""The instrument on composed trees (cgroup v1, v2, GB10-like) and on this machine."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_ray.worker import observe, sizing

GIB = 1 << 30
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


def test_on_this_machine_parts_do_not_exceed_the_whole():
    seen = observe.observe("now")
    info = seen["meminfo"]
    assert 0 < info["MemFree"] <= info["MemAvailable"] * 2 <= 2 * info["MemTotal"]
    assert seen["tree"]["pss_bytes"] > 1 << 20
    assert seen["tree"]["processes"] >= 1
    assert seen["cost_s"] < 1


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
