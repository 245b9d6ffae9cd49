"""End to end with the real engine: quickstart -> records -> report, and the effects it exists to show.

CI hands over the run it has just made (SPARK_RAY_QUICKSTART_RUN); otherwise a short one is made here.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from spark_ray.store import Store

pytestmark = [pytest.mark.embedded, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
MIB = 1 << 20


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    given = os.environ.get("SPARK_RAY_QUICKSTART_RUN")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray.sweep", str(ROOT / "experiments/quickstart.yaml"), "--local", "--out", str(folder), "--set", "search.blocks=3"],
        capture_output=True, text=True, timeout=580, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def blocks(quickstart):
    """Configuration and records by arm, of every block."""
    store = Store.read(quickstart)
    found: dict[str, dict] = {}
    for record in store.records():
        if record["standing"] == "counts":
            found.setdefault(record["block_id"], {})[record["arm"]] = record
    assert found
    return list(found.values())


def kv(record):
    return record["result"]["measurements"]["kv_cache"]["bytes"]


def cached(record):
    """Page cache in the very reading of /proc/meminfo that the engine sized its pool by."""
    info = record["result"]["measurements"]["sizing"]["meminfo"]
    return info["Cached"] + info["Buffers"]


def test_every_arm_of_every_block_has_an_answer(blocks):
    kinds = {record["outcome"]["kind"] for arms in blocks for record in arms.values()}
    assert kinds <= {"ok", "infeasible", "out_of_memory"}
    assert all({"native", "page-cache"} <= set(arms) for arms in blocks)
    assert all(arms["native"]["outcome"]["kind"] == "ok" for arms in blocks)


def test_page_cache_takes_its_fraction_of_the_pool(blocks):
    """KV = fraction x (total - peak), and page cache is in the peak: the effect is known to the MiB."""
    errors = []
    for arms in blocks:
        fraction = arms["native"]["configuration"]["memory_fraction"]
        predicted = -fraction * (cached(arms["page-cache"]) - cached(arms["native"]))
        assert predicted < -fraction * 1800 * MIB, "the fill was there at the sizing moment"
        errors.append(kv(arms["page-cache"]) - kv(arms["native"]) - predicted)
    print("measured - predicted, MiB:", [round(error / MIB, 1) for error in errors])
    assert abs(statistics.median(errors)) <= 32 * MIB


def test_a_memory_limit_bounds_the_pool_of_an_engine_that_reads_it(blocks):
    limited = [arms["docker-limited"] for arms in blocks if "docker-limited" in arms]
    if not limited:
        pytest.skip("the run has no docker-limited arm: no Docker here")
    limit = 768 * MIB
    for record in limited:
        if record["outcome"]["kind"] == "ok":
            fraction = record["configuration"]["memory_fraction"]
            assert 32 * MIB <= kv(record) <= fraction * limit
            assert record["result"]["measurements"]["sizing"]["cgroup_limit_bytes"] == limit


def test_the_limited_arms_boundary_is_inside_the_space(quickstart):
    """Some configurations fit under the limit and some do not: the first of this seed does not."""
    store = Store.read(quickstart)
    if "docker-limited" not in store.plan["arms"]:
        pytest.skip("the run has no docker-limited arm: no Docker here")
    kinds = {
        r["outcome"]["kind"]
        for r in store.records()
        if r["arm"] == "docker-limited" and r["standing"] == "counts"
    }
    assert "ok" in kinds
    assert kinds & {"infeasible", "out_of_memory"}


def test_the_capacity_has_two_sources_that_agree_and_the_law_explains_it(blocks):
    for arms in blocks:
        for record in arms.values():
            if record["outcome"]["kind"] != "ok":
                continue
            measured = record["result"]["measurements"]
            kv_cache, sizing = measured["kv_cache"], measured["sizing"]
            block = kv_cache["tokens_per_block"] * kv_cache["bytes_per_token"]
            assert kv_cache["bytes"] == kv_cache["second_source"]["bytes"]
            assert 0 <= sizing["available_bytes"] - kv_cache["bytes"] < block
            assert sizing["available_bytes"] == int(
                (sizing["free_bytes"] - sizing["transient_bytes"]) * sizing["fraction"]
            )
            assert measured["throughput"]["output_tokens"] == 2 * 4


def test_the_report_and_its_tables_are_there(quickstart):
    summary = json.loads((quickstart / "summary.json").read_text())
    assert summary["verdict"]
    report = (quickstart / "report.html").read_text()
    assert "cgroup" in report
    assert "GB10" in report
    assert (quickstart / "trials.parquet").stat().st_size > 0
    assert not list((quickstart / "scratch").glob("*/page-cache-fill*")), "the fill file is removed"
