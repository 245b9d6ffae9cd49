"""Records as tables. Also composes the runs that the other analysis tests read, through the store's own interface."""

import copy
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import audit, contrasts, findings, fingerprint, frames, reading, report
from spark_ray.plan import make_block
from spark_ray.store import RECORD, Store, write_durably
from spark_ray.units import GIB, MIB

BLOCK_TOKENS, TOKEN_BYTES = 64, 32768
KV_BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
OTHERS_MIB = (0, 16, 24, 8, 8, 24, 16, 0)


def meminfo(cached, anon, per_cpu, total=24 * GIB):
    shmem, kernel = 8 * MIB, 44 * MIB
    return {
        "MemTotal": total, "MemFree": total - cached - anon - kernel - per_cpu - MIB, "MemAvailable": total - anon - kernel - per_cpu,
        "Buffers": 20 * MIB, "Cached": cached - 20 * MIB, "Shmem": shmem, "AnonPages": anon,
        "Slab": 40 * MIB, "KernelStack": 2 * MIB, "PageTables": MIB, "Percpu": MIB, "SwapTotal": 0, "SwapFree": 0,
    }  # fmt: skip


def observation(phase, info, own=300 * MIB, per_cpu=64 * MIB, **more):
    return {
        "phase": phase, "monotonic_s": 100.0 + len(phase), "cost_s": 0.004, "meminfo": dict(info), "per_cpu_free_bytes": per_cpu,
        "cgroup": {"version": 1, "usage_bytes": own, "peak_bytes": own + MIB}, "tree": {"pss_bytes": own + 10 * MIB, "pss_anon_bytes": own},
    } | more  # fmt: skip


def measured(fraction, cached, anon, per_cpu, view="memfree"):
    """Measurements of the embedded engine, by its law, and the meminfo it sized by."""
    info = meminfo(cached, anon, per_cpu)
    available = int((info["MemFree"] - 20 * MIB) * fraction)
    blocks = available // KV_BLOCK_BYTES
    return {
        "engine": {"name": "transformers continuous batching", "version": "5.23.0", "torch": "2.13.0"},
        "model": {"weight_bytes": 79709184},
        "sizing": {
            "view": view, "law": "(total - peak) x fraction", "total_bytes": info["MemTotal"], "free_bytes": info["MemFree"], "meminfo": info,
            "transient_bytes": 20 * MIB, "peak_bytes": 24 * GIB - info["MemFree"] + 20 * MIB, "fraction": fraction, "available_bytes": available,
        },
        "kv_cache": {
            "bytes": blocks * KV_BLOCK_BYTES, "blocks": blocks, "tokens": blocks * BLOCK_TOKENS, "tokens_per_block": BLOCK_TOKENS,
            "bytes_per_token": TOKEN_BYTES, "sequences": blocks // 16, "source": "composed",
        },
        "throughput": {"output_throughput_tokens_per_s": 90.0},
    }  # fmt: skip


def record(
    block,
    arm,
    attempt=1,
    *,
    cached=700 * MIB,
    anon=450 * MIB,
    per_cpu=64 * MIB,
    kind="ok",
    message="",
    engine="embedded",
):
    fraction = block.configuration["memory_fraction"]
    sized = measured(fraction, cached, anon, per_cpu)
    info = sized["sizing"]["meminfo"]
    result = {
        "evidence": {"namespaces": {"mnt": "mnt:[4026531841]"}, "python": "3.11.7", "libraries": ["/lib/libc.so.6"], "limits": {"nofile": [1024, 1024]}},
        "measurements": sized, "failure": None,
    }  # fmt: skip
    seen = [observation(phase, info, per_cpu=per_cpu) for phase in ("after_load", "sizing", "after_kv")]
    before = {key: value for key, value in observation("before_launch", info).items() if key != "tree"}
    return {
        "record_version": 1, "spark_ray_version": "0.1.0", "run": "composed", "block_id": block.block_id, "trial_id": block.trial_id(arm),
        "arm": arm, "attempt": attempt, "position": block.order.index(arm), "configuration": dict(block.configuration), "repetition": 0,
        "slot": "local-0", "started_at": "2026-11-21T00:00:00+00:00", "engine": {"kind": engine}, "workload": {"requests": 4},
        "environment": {"kind": "native"}, "treatment": {"page_cache": {"fill_bytes": 2 * GIB} if arm == "full" else "drop", "per_cpu_pages": "drained"},
        "content": {}, "bundle_sha256": "0" * 64, "result": result if kind in {"ok", "disturbed"} else None,
        "inside": seen, "outcome": {"kind": kind, "reason": "measured" if kind == "ok" else f"{kind}_reason", "message": message},
        "host": {
            "observations": [before, *seen], "outside": {"root": "254:0:2"}, "at_sizing": {}, "wait": {"reached": True, "waited_s": 0.1},
            "exit_code": 0, "oom_kills": 0, "stopped_by": None, "duration_s": 9.0, "samples": {"count": 2, "cpu_s": 0.01},
        },
    }  # fmt: skip


def compose(folder, records, *, blocks=4, arms=("empty", "full"), wanted=None, engine="embedded", plan=None):
    """A run folder: `records(block, arm)` gives the records of one trial, first attempt first."""
    experiment = {
        "name": "composed", "question": "a question", "seed": 7, "engine": {"kind": engine}, "search": {"blocks": wanted or blocks},
        "arms": {arm: {"environment": "native"} for arm in arms}, "contrast": {"baseline": arms[0], "against": arms[1]},
    }  # fmt: skip
    description = {
        "spark_ray_version": "0.1.0", "created_at": "2026-11-21T00:00:00+00:00", "experiment": experiment, "overrides": [], "arms": list(arms),
        "left_out": {}, "warnings": {}, "executor": "local", "host": {"hostname": "vm"}, "bundle_sha256": "0" * 64,
    } | (plan or {})  # fmt: skip
    store = Store.create(folder, {"experiment.yaml": "name: composed\n"}, description)
    for index in range(blocks):
        configuration = {"max_batch_size": 4, "max_num_tokens": 512, "memory_fraction": 0.05 * (index + 1)}
        block = make_block(index, index, configuration, 0, arms, 7)
        store.save_block(block)
        for arm in arms:
            for each in records(block, arm):
                target = store.new_attempt_folder(block.trial_id(arm), each["attempt"])
                write_durably(target / RECORD, each)
                rows = [
                    [100.0 + step / 20, 20 * GIB - step, 21 * GIB, 700 * MIB, 8 * MIB, 64 * MIB, None]
                    for step in range(40)
                ]
                fields = [
                    "monotonic_s",
                    "mem_free_bytes",
                    "mem_available_bytes",
                    "cached_bytes",
                    "shmem_bytes",
                    "per_cpu_free_bytes",
                    "cgroup_usage_bytes",
                ]
                (target / "samples.json").write_text(json.dumps({"fields": fields, "rows": rows}))
    store.close()
    return folder


def two_gib_of_cache(block, arm):
    """`full` has 2 GiB more page cache, and a little more of other processes, with no trend and no effect of order."""
    extra = OTHERS_MIB[block.index] * MIB if arm == "full" else 0
    return [record(block, arm, cached=(700 + 2048 * (arm == "full")) * MIB, anon=450 * MIB + extra)]


ONE_BLOCK = make_block(
    0, 0, {"max_batch_size": 4, "max_num_tokens": 512, "memory_fraction": 0.25}, 0, ("empty", "full"), 7
)


def table(*records):
    return frames.trials([each | {"standing": "counts"} for each in records], {"b0000": 0})


def test_a_row_says_what_the_record_says():
    row = table(record(ONE_BLOCK, "full", cached=2 * GIB)).iloc[0]
    assert row["kv_cache_bytes"] == row["kv_cache_blocks"] * KV_BLOCK_BYTES
    assert row["sizing_cached_bytes"] == 2 * GIB
    assert (
        row["sizing_page_cache_bytes"] == 2 * GIB - 8 * MIB
    )  # shared memory is in Cached, and no page cache
    assert row["sizing_other_anon_bytes"] == 150 * MIB
    assert row["peak_memory_bytes"] == 310 * MIB
    assert row["treatment"] == "page_cache=fill 2.00 GiB, per_cpu_pages=drained"
    assert (row["block_index"], row["fake"], row["outside_readable"]) == (0, False, True)


def test_what_a_record_lacks_is_absent_and_never_zero():
    row = table({"trial_id": "x", "outcome": {"kind": "crashed"}}).iloc[0]
    known = {"trial_id", "outcome", "standing", "fake", "simulated", "probe", "engine_is_double", "treatment", "setup"}  # fmt: skip
    assert [name for name in row.index if name not in known and not pd.isna(row[name])] == []


def test_no_records_make_a_table_with_the_same_columns():
    assert list(frames.trials([], {}).dtypes.items()) == list(table(record(ONE_BLOCK, "full")).dtypes.items())


def test_phases_have_both_sides_and_no_tree_before_the_worker_lives():
    rows = frames.phases([record(ONE_BLOCK, "full") | {"standing": "counts"}])
    assert rows.groupby("side").size().to_dict() == {"inside": 3, "outside": 4}
    assert pd.isna(rows[rows["phase"] == "before_launch"]["tree_pss_bytes"].iloc[0])


@pytest.mark.parametrize("value", [True, 1.5, "12", None, 2**63, float("nan"), [], {}])
def test_no_count(value):
    assert reading.count(value) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"fields": 3}',
        '{"fields": ["a_s"], "rows": 1}',
        '{"fields": [1], "rows": []}',
        "[" * 100_000,
    ],
)
def test_samples_that_cannot_be_read_are_none(tmp_path, text):
    (tmp_path / "samples.json").write_text(text)
    assert frames.samples(tmp_path) is None


def test_samples_keep_their_columns_and_absent_values(tmp_path):
    (tmp_path / "samples.json").write_text(
        '{"fields": ["monotonic_s", "mem_free_bytes"], "rows": [[1.5, 7], [2.0, null], "torn", [3]]}'
    )
    assert frames.samples(tmp_path).to_dict("list") == {
        "monotonic_s": [1.5, 2.0, 3.0],
        "mem_free_bytes": [7, None, None],
    }


_ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(["", "\ud800", "<b>", "x" * 300]),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.sampled_from(["bytes", "stat", "kind"]), st.integers(), max_size=2),
)  # fmt: skip


def _paths(data, prefix=()):
    for key, value in (
        data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    ):
        yield (*prefix, key)
        yield from _paths(value, (*prefix, key))


def _has(place, key):
    return (
        key in place
        if isinstance(place, dict)
        else isinstance(place, list) and isinstance(key, int) and key < len(place)
    )


_PATHS = list(_paths(record(ONE_BLOCK, "full")))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(_PATHS), _ODD), min_size=1, max_size=4))
def test_a_record_with_odd_parts_gives_absent_values_not_a_traceback(changes):
    odd = copy.deepcopy(record(ONE_BLOCK, "full")) | {"standing": "counts"}
    for path, value in changes:
        place = odd
        for key in path[:-1]:
            place = place[key] if _has(place, key) else {}
        if isinstance(place, dict) or _has(place, path[-1]):
            place[path[-1]] = value
    records = [record(ONE_BLOCK, "empty") | {"standing": "counts"}, odd]
    trials, phases = frames.trials(records, {"b0000": 0}), frames.phases(records)
    assert len(trials) == 2
    assert "side" in phases
    trials.to_json()
    pairs = contrasts.pairs(trials, ("empty", "full"), "empty")
    properties = fingerprint.compare(records, ("empty", "full"))
    rivals = fingerprint.rivals(properties, ("empty", "full"), "empty", "full")
    assert audit.findings(
        findings.Evidence({}, trials, pairs, {}, ("empty", "full"), "empty", "full", len(rivals))
    )


def test_parquet_can_be_read_back(tmp_path):
    folder = compose(tmp_path / "run", two_gib_of_cache)
    report.write(folder)
    trials = pd.read_parquet(folder / "trials.parquet")
    assert len(trials) == 8
    assert trials["kv_cache_bytes"].dtype == "Int64"
    assert len(pd.read_parquet(folder / "phases.parquet")) == 8 * 7
    assert len(pd.read_parquet(folder / "samples" / "b0000.full-1.parquet")) == 40


# ---- GPUs -------------------------------------------------------------------------------------------------


def gpu_seen(phase, **device):
    base = {"device": 0, "memory_used_bytes": 5, "temperature_celsius": 40, "power_w": 80.0, "energy_j": 100.0,
            "sm_clock_mhz": 1980, "throttle_reasons": ["idle"], "processes": []}  # fmt: skip
    return {"phase": phase, "gpus": [base | device]}


def with_gpu(*observations):
    found = record(ONE_BLOCK, "full")
    return found | {"host": found["host"] | {"observations": list(observations)}}


def test_gpu_columns_are_of_the_worker_alone_and_absent_where_nobody_answers():
    row = table(
        with_gpu(
            gpu_seen("before_launch", processes=[{"pid": 9}]),
            gpu_seen("after_kv", memory_used_bytes=70, sm_clock_mhz=900, throttle_reasons=["sw_power_cap"], power_w=300.0),
            gpu_seen("after_exit", energy_j=150.5, temperature_celsius=52, memory_used_bytes=6),
        )
    ).iloc[0]  # fmt: skip
    assert row["gpu_memory_before_bytes"] == 5
    assert row["gpu_peak_memory_bytes"] == 70
    assert row["gpu_energy_j"] == 50.5
    assert row["gpu_peak_temperature_celsius"] == 52
    assert row["gpu_lowest_sm_clock_mhz"] == 900
    assert row["gpu_throttle_reasons"] == "sw_power_cap"
    assert row["gpu_processes_before"] == 1
    silent = table(record(ONE_BLOCK, "full")).iloc[0]
    assert silent[[name for name in silent.index if name.startswith("gpu_")]].isna().all()


def test_a_device_that_does_not_answer_makes_the_sum_absent():
    mute = gpu_seen("after_kv")
    del mute["gpus"][0]["memory_used_bytes"]
    row = table(with_gpu(gpu_seen("before_launch"), mute, gpu_seen("after_exit"))).iloc[0]
    assert row.isna()["gpu_peak_memory_bytes"]
    assert row["gpu_peak_power_w"] == 80.0
