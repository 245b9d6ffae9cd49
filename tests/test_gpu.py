"""On a real GPU with memory of its own: NVML from outside, and the engine in every environment."""

import json
import subprocess
import sys

import pytest
from helpers import write_yaml

from spark_ray import nvml
from spark_ray.store import Store

pytestmark = pytest.mark.gpu
EXPERIMENT = {
    "name": "gpu",
    "engine": {"kind": "embedded", "device": "cuda"},
    "model": {"random_llama": {"layers": 2}},
    "search": {
        "blocks": 1,
        "space": {"max_batch_size": 8, "max_num_tokens": 512, "memory_fraction": 0.4},
    },
    "arms": {
        "native": {"environment": "native"},
        "chroot": {"environment": {"kind": "chroot", "gpus": "all"}},
        "docker": {"environment": {"kind": "docker", "gpus": "all", "memory": "3GiB"}},
    },
    "contrast": {"baseline": "native", "against": "docker"},
}


def test_nvml_answers_from_outside():
    with nvml.Reader() as reader:
        assert reader.why_not is None
        (first, *_), rows = reader.read(), reader.sample()
    assert first["memory_total_bytes"] <= nvml.memory_bytes()
    assert set(nvml.QUESTIONS) <= set(first) | set(first.get("absent", {}))
    assert all(len(row) == len(nvml.SAMPLE_FIELDS) for row in rows)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    path = write_yaml(folder, EXPERIMENT)
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray.sweep", str(path), "--local", "--out", str(folder / "run")],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {record["arm"]: record for record in Store.read(folder / "run").records()}


@pytest.mark.root
@pytest.mark.docker
@pytest.mark.embedded
def test_every_environment_sees_the_gpu_and_sizes_by_the_law(records):
    for arm in EXPERIMENT["arms"]:
        result = records[arm]["result"]["measurements"]
        sizing, kv = result["sizing"], result["kv_cache"]
        assert records[arm]["outcome"]["kind"] == "ok"
        assert sizing["view"] == "cuda"
        one_block = kv["bytes_per_token"] * kv["tokens_per_block"]
        law = (sizing["free_bytes"] - sizing["transient_bytes"]) * sizing["fraction"]
        assert 0 <= law - kv["bytes"] < one_block


@pytest.mark.root
@pytest.mark.docker
@pytest.mark.embedded
def test_a_memory_limit_of_the_container_does_not_bound_device_memory(records):
    docker = records["docker"]
    assert docker["result"]["measurements"]["kv_cache"]["bytes"] > docker["environment"]["memory"]


@pytest.mark.root
@pytest.mark.docker
@pytest.mark.embedded
def test_the_host_sees_the_memory_and_the_process_that_the_guest_reports(records):
    for record in records.values():
        held = record["result"]["measurements"]["kv_cache"]["tensor_bytes"]
        after = next(o for o in record["host"]["observations"] if o["phase"] == "after_kv")
        assert after["gpus"][0]["memory_used_bytes"] > held
        before = next(o for o in record["host"]["observations"] if o["phase"] == "before_launch")
        assert before["gpus"][0]["memory_used_bytes"] < held
    series = json.dumps(records["native"]["host"]["samples"])
    assert records["native"]["host"]["samples"]["gpu_count"] > 0, series
