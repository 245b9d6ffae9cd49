"""Cheap counters between phases, what they cost, and what catches a peak between two of them."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import experiment_data
from test_launch import Bench

from analysis import frames
from analysis.columns import SAMPLES
from spark_ray import nvml, sampler
from spark_ray.experiment import Experiment
from spark_ray.store import RECORD
from spark_ray.worker import observe

MIB = 1 << 20
BURST = 300 * MIB


@pytest.fixture
def no_gpus():
    return SimpleNamespace(sample=list, processes=list, why_not="none", count=0)


def test_rows_are_what_the_kernel_says(no_gpus):
    one = sampler.Sampler(no_gpus)
    one.attach(os.getpid())
    one.take()
    row = dict(zip(sampler.FIELDS, one.rows[0], strict=True))
    info = observe.meminfo()
    near = 256 * MIB  # other programs live meanwhile
    assert abs(row["mem_free_bytes"] - info["MemFree"]) < near
    assert abs(row["mem_available_bytes"] - info["MemAvailable"]) < near
    assert abs(row["cached_bytes"] - info["Cached"] - info["Buffers"]) < near
    assert abs(row["anon_bytes"] - info["AnonPages"]) < near
    assert abs(row["shmem_bytes"] - info["Shmem"]) < near
    assert abs(row["per_cpu_free_bytes"] - observe.per_cpu_free_bytes()) < near
    seen = observe.cgroup("self")
    for ours, theirs in {"usage": "usage_bytes", "anon": "anon_bytes", "file": "file_bytes"}.items():
        assert (row[f"cgroup_{ours}_bytes"] is None) == (theirs not in seen)
        assert abs((row[f"cgroup_{ours}_bytes"] or 0) - seen.get(theirs, 0)) < near


def test_what_a_kernel_lacks_is_absent_and_not_zero(tmp_path, monkeypatch, no_gpus):
    """No zoneinfo, no pressure, no group: rows go on without them."""
    (tmp_path / "meminfo").write_text("MemTotal: 10 kB\nMemFree: 5 kB\nMemAvailable: 6 kB\nCached: 2 kB\n")
    monkeypatch.setattr(observe, "PROC", tmp_path)
    one = sampler.Sampler(no_gpus)
    one.take()
    row = dict(zip(sampler.FIELDS, one.rows[0], strict=True))
    assert row.pop("monotonic_s") > 0
    assert {name: value for name, value in row.items() if value is not None} == {
        "mem_free_bytes": 5120,
        "mem_available_bytes": 6144,
    }


def test_it_keeps_its_schedule_counts_its_cost_and_ends(no_gpus):
    looks = []
    one = sampler.Sampler(no_gpus, lambda: looks.append(1))
    one.start()
    time.sleep(0.5)
    one.stop()
    found = one.summary()
    assert found["count"] == len(one.rows) > 1
    assert found["cpu_s"] > 0
    assert found["core_share"] == pytest.approx(found["cpu_s"] / (one.rows[-1][0] - one.rows[0][0]))
    assert found["interval_s"] <= found["longest_gap_s"]
    assert sampler.INTERVAL_S <= 0.05, "20 Hz"
    assert looks == [1]
    assert not one._thread.is_alive()
    assert set(SAMPLES) == set(sampler.FIELDS)


def test_a_group_that_went_away_is_absent_from_then_on(no_gpus):
    one = sampler.Sampler(no_gpus)
    one.attach(1 << 30)
    one.take()
    assert one.rows[0][-3:] == (None, None, None)


def test_the_peak_of_a_process_that_gave_it_back():
    """A real process that held 100 MiB for a moment and waits now."""
    code = "import sys; b = bytearray(100 << 20); del b; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        seen = sampler.high_water_bytes(child.pid)
        assert seen > 100 * MIB
        assert observe.smaps(child.pid)["Rss"] < seen - 90 * MIB
        peaks = sampler.Peaks()
        peaks.look(child.pid, child.pid)
        child.stdin.close()
    assert peaks.as_dict()["worker_bytes"] == seen
    assert "shares its group with" in peaks.as_dict()["absent"]["cgroup"]


def test_a_peak_that_nobody_could_read_is_absent_with_the_reason():
    peaks = sampler.Peaks()
    assert peaks.as_dict() == {
        "absent": {"cgroup": "the worker was not seen", "worker": "the worker was not seen"}
    }
    peaks.look(1 << 30, 1 << 30)
    assert set(peaks.as_dict()["absent"]) == {"cgroup", "worker"}
    peaks.told(5, "the group, as it was removed")
    assert peaks.as_dict()["cgroup_bytes"] == 5
    assert set(peaks.as_dict()["absent"]) == {"worker"}


def burst(folder, environment, **limits):
    """A guest that holds 300 MiB for 50 ms between two phases."""
    data = experiment_data(
        arms=(environment, "native"), behaviour="burst", allocate=f"{BURST >> 20}MiB", limits=limits
    )
    one = Bench(folder, Experiment.model_validate(data))
    try:
        record = one.run()
        attempt = one.store.attempt_folder(record["trial_id"], 1)
        return record, frames.samples(attempt), attempt
    finally:
        one.close()


@pytest.mark.process
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"kind": "isolated", "cgroup": True}, id="cgroup", marks=pytest.mark.root),
        pytest.param({"kind": "docker"}, id="docker", marks=pytest.mark.docker),
    ],
)
def test_a_peak_of_50_ms_is_caught_by_the_counter_of_the_guests_own_group(tmp_path, environment):
    record, _, _ = burst(tmp_path / "run", environment)
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    peak = record["host"]["samples"]["peak"]
    assert BURST <= peak["cgroup_bytes"] < BURST + 200 * MIB, (
        "the interpreter and its files are in it as well"
    )
    assert peak["cgroup_source"]
    assert BURST <= peak["worker_bytes"] < BURST + 100 * MIB
    phases = [each["tree"]["pss_bytes"] for each in record["host"]["observations"] if "tree" in each]
    assert max(phases) < BURST, "no phase saw it"


@pytest.mark.process
def test_a_native_record_says_that_its_group_cannot_tell_the_peak(tmp_path):
    record, series, _ = burst(tmp_path / "run", "native")
    peak = record["host"]["samples"]["peak"]
    assert "shares its group with" in peak["absent"]["cgroup"]
    assert "cgroup_bytes" not in peak
    assert peak["worker_bytes"] >= BURST
    assert list(series.columns) == list(SAMPLES)
    assert len(series) == record["host"]["samples"]["count"] > 0


@pytest.mark.process
def test_without_sampling_the_record_says_so_and_everything_else_is_there(tmp_path):
    record, series, attempt = burst(tmp_path / "run", "native", sampling=False)
    assert record["outcome"]["kind"] == "ok"
    assert record["host"]["samples"]["count"] == 0
    assert record["host"]["samples"]["absent"] == {"count": "limits.sampling is false"}
    assert record["host"]["samples"]["peak"]["worker_bytes"] >= BURST
    assert series is None
    assert not (attempt / "samples.json").exists()
    assert record["host"]["watchdog"]["looks"] > 0, "the watchdog is no part of the sampler"
    assert (
        record["host"]["guard"]["stalled_share"] >= 0 or "stalled_share" in record["host"]["guard"]["absent"]
    )
    assert json.loads((attempt / RECORD).read_text()) == record


def test_gpu_rows_have_the_fields_that_they_say():
    assert nvml.SAMPLE_FIELDS[:2] == ("monotonic_s", "device")
    assert set(nvml.SAMPLE_FIELDS[2:]) <= set(nvml.QUESTIONS)
