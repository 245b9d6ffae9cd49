"""Bounds that no measurement can beat: each is held, violated or said not to be applied, and a violated one fails the trial."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from helpers import experiment
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from test_identity import DENSE, LLAMA_8B, folder_with
from test_launch import Bench
from test_outcome import KV

from spark_ray import execute, launch, nvml, preview
from spark_ray.cluster import memory_bandwidth
from spark_ray.config import load_cluster
from spark_ray.engines import EmbeddedEngine, Engine
from spark_ray.errors import InputError
from spark_ray.experiment import Experiment
from spark_ray.host_view import Plausibility
from spark_ray.outcome import Facts, derive
from spark_ray.plausible import Asked, Reference, judge, lacking_memory, reference
from spark_ray.record import Record
from spark_ray.units import parse_rate_bytes_per_s
from spark_ray.worker import observe
from spark_ray.worker.identity import Weights

GB, GIB = 10**9, 1 << 30
QWEN_72B = Weights(145_412_407_296, 145_412_500_000, 145_412_407_296, 142_920_000_000)
R1_7B = Weights(15_231_233_024, 15_231_300_000, 15_231_233_024, 14_140_000_000)
SPARK_BYTES = round(119.7 * GIB)


def asked(
    weights=R1_7B,
    speed=273 * GB,
    batch=8,
    requests=50,
    ranks=1,
    memory=SPARK_BYTES,
    double=None,
    sha="a" * 64,
):
    engine = {"kind": "tensorrt_llm", "tensor_parallel_size": ranks, "double": double}
    known = Reference(weights, None if weights else "the folder holds no *.safetensors", sha, speed)
    return Asked(
        known, engine, {"max_batch_size": batch}, {"requests": requests}, memory, on_gpu=double is None
    )


def measured(weight_bytes=R1_7B.loaded_bytes, tokens_per_s=100.0, sha="a" * 64, **more):
    return {
        "model": {"weight_bytes": weight_bytes, "config_sha256": sha, **more},
        "throughput": {"output_throughput_tokens_per_s": tokens_per_s},
    }


LARGE = Weights(70 * GIB, 70 * GIB, 70 * GIB, 69 * GIB)


def sized(kv_bytes, weight_bytes):
    return {**measured(weight_bytes, tokens_per_s=1.0), "kv_cache": {"bytes": kv_bytes}}


def test_a_pool_that_is_promised_and_not_touched_may_be_larger_than_what_is_left():
    on_cpu = dataclasses.replace(asked(LARGE), on_gpu=False)
    assert "footprint" in judge(sized(80 * GIB, 70 * GIB), on_cpu).held
    assert "footprint" in judge(sized(44 * GIB, 70 * GIB), asked(LARGE)).held


@pytest.mark.parametrize(
    ("engine", "gpus", "bytes_in_all"),
    [
        ({"kind": "tensorrt_llm"}, 0, SPARK_BYTES),  # unified: CUDA's pages are never swapped
        ({"kind": "tensorrt_llm"}, 80 * GIB, 80 * GIB),
        ({"kind": "tensorrt_llm"}, None, None),
        ({"kind": "tensorrt_llm", "double": "here"}, 80 * GIB, SPARK_BYTES + 16 * GIB),
        ({"kind": "embedded"}, None, SPARK_BYTES + 16 * GIB),
        ({"kind": "embedded", "device": "cuda"}, 0, SPARK_BYTES),
        ({"kind": "fake"}, 0, None),
    ],
)
def test_swap_is_no_memory_for_what_is_on_a_gpu(monkeypatch, engine, gpus, bytes_in_all):
    monkeypatch.setattr(nvml, "memory_bytes", lambda: gpus)
    made = TypeAdapter(Engine).validate_python(engine)
    job = SimpleNamespace(
        trial={"trial_id": "t", "attempt": 1, "configuration": {"max_batch_size": 1}}, workload={"requests": 0},
        engine=made.model_dump(mode="json"), needs_gpu=made.needs_gpu, reference=asked(QWEN_72B).reference,
    )  # fmt: skip
    found = launch._asked(job, {"meminfo": {"MemTotal": SPARK_BYTES, "SwapTotal": 16 * GIB}})
    assert found.memory_bytes == bytes_in_all
    judged = launch._judge(job, found, {"measurements": measured(QWEN_72B.loaded_bytes)})
    beyond = bytes_in_all is not None and bytes_in_all < QWEN_72B.loaded_bytes
    assert ("footprint" in judged.violated) == beyond


def test_states_of_a_hybrid_may_count_as_weights():
    hybrid = dataclasses.replace(R1_7B, has_states=True)
    found = judge(measured(40 * GIB), asked(hybrid))
    assert (found.first, "weights" in found.held) == (None, True)
    assert "states of its layers" in found.not_applied["weights_above"]
    assert judge(measured(GIB), asked(hybrid)).first[0] == "implausible_weights"


def test_a_measurement_within_every_bound_holds():
    found = judge(measured(), asked())
    assert found.held == ["model", "weights", "footprint", "throughput"]
    assert (found.first, found.violated, found.not_applied) == (None, {}, {})
    Plausibility.model_validate(found.as_dict())


@pytest.mark.parametrize(
    ("told", "held_to", "reason", "words"),
    [
        # A study reported 72B in bf16 with the peak memory and throughput of a 7B model.
        (measured(), asked(QWEN_72B), "implausible_weights", "14.19 GiB of weights, the model's files have 135.43 GiB"),
        (measured(QWEN_72B.loaded_bytes, 5.0), asked(QWEN_72B), "implausible_footprint", "135.43 GiB of weights on a node with 119.70 GiB"),
        (measured(tokens_per_s=163.0), asked(), "implausible_throughput", "8 requests at once; memory of 273 GB/s"),
        (measured(sha="b" * 64), asked(), "implausible_model", "not that of the model that was asked for"),
        (measured(40 * GIB), asked(), "implausible_weights", "another model"),
        (sized(80 * GIB, 70 * GIB), asked(LARGE), "implausible_footprint", "70.00 GiB of weights and 80.00 GiB of KV cache on a node with 119.70"),
        (sized(GIB, None), asked(), "implausible_weights", "did not say how large its weights are"),
    ],
)  # fmt: skip
def test_what_cannot_be_fails_the_trial_in_a_sentence(told, held_to, reason, words):
    found = judge(told, held_to)
    assert found.first[0] == reason
    assert words in found.first[1]
    result = {"failure": None, "measurements": {"kv_cache": KV}}
    outcome = derive(Facts(result, exit_code=0, implausible=found.first))
    assert (outcome.kind, outcome.reason) == ("engine_error", reason)


@pytest.mark.parametrize(
    ("kind", "expected"), [("infeasible", "engine_error"), ("engine_error", "engine_error")]
)
def test_an_answer_about_another_model_is_none(kind, expected):
    failure = {"kind": kind, "reason": "pool_below_one_sequence", "message": ""}
    facts = Facts(
        {"failure": failure, "measurements": {}}, exit_code=0, implausible=("implausible_weights", "…")
    )
    outcome = derive(facts)
    assert outcome.kind == expected
    assert outcome.reason == ("implausible_weights" if kind == "infeasible" else "pool_below_one_sequence")


@pytest.mark.parametrize(
    ("told", "held_to", "bound", "why"),
    [
        (measured(), asked(speed=None), "throughput", "bandwidth of this node is not known"),
        (measured(), asked(double="tests/double"), "throughput", "a double makes its tokens without reading weights"),
        (measured(), asked(dataclasses.replace(R1_7B, decode_bytes=None, decode_unknown="experts")), "throughput", "experts"),
        (measured(), asked(dataclasses.replace(R1_7B, decode_bytes=GIB - 1)), "throughput", "processor's cache"),
        ({"model": measured()["model"]}, asked(), "throughput", "no tokens were generated"),
        (measured(), asked(None), "weights", "holds no *.safetensors"),
        ({}, asked(), "weights", "did not say"),
        (measured(), asked(memory=None), "footprint", "not known"),
        (measured(sha=None), asked(), "model", "could not be read"),
    ],
)  # fmt: skip
def test_a_bound_that_cannot_be_applied_says_why(told, held_to, bound, why):
    found = judge(told, held_to)
    assert why in found.not_applied[bound]
    assert bound not in found.held
    assert not found.violated


def test_a_double_is_held_to_its_weights():
    assert judge(measured(2 * GIB), asked(double="tests/double")).first[0] == "implausible_weights"


@given(
    batch=st.integers(1, 512), requests=st.integers(1, 1000), ranks=st.integers(1, 8), share=st.floats(0, 3),
    speed=st.floats(1e10, 1e13),
)  # fmt: skip
def test_no_batch_beats_reading_the_weights_once_a_step(batch, requests, ranks, share, speed):
    most = min(batch, requests) * ranks * speed / R1_7B.decode_bytes
    found = judge(
        measured(R1_7B.loaded_bytes // ranks, share * most), asked(R1_7B, speed, batch, requests, ranks)
    )
    assert ("throughput" in found.violated) == (share > 1.05)
    assert "weights" in found.held, "each of the ranks has its share"


@given(st.integers(0, 1 << 40), st.integers(0, 20 * 1 << 20))
def test_printed_weights_are_believed_within_their_step(size, step):
    tiny = Weights(size, size, size, None, "unknown")
    rounded = size // step * step if step else size
    assert "weights" in judge(measured(rounded, resolution_bytes=step), asked(tiny)).held


def test_the_reference_is_read_from_the_folder(tmp_path):
    folder = folder_with(tmp_path / "model", LLAMA_8B, DENSE)
    found = reference(folder, {"kind": "tensorrt_llm"}, 273e9)
    assert found.weights.disk_bytes == 2 * 1000 * 64 * 2 + 64 * 256 * 2 + 64 * 4
    wide = reference(folder, EmbeddedEngine(kind="embedded", dtype="float32").model_dump(), None)
    assert wide.weights.loaded_bytes == 2 * found.weights.loaded_bytes
    assert len(found.config_sha256) == 64
    assert not found.weights.has_states
    hybrid = folder_with(tmp_path / "hybrid", LLAMA_8B | {"hybrid_override_pattern": "M*"}, DENSE)
    assert reference(hybrid, {"kind": "tensorrt_llm"}, None).weights.has_states
    single = folder_with(tmp_path / "single", LLAMA_8B | {"torch_dtype": "float32"}, DENSE)
    unsettled = reference(single, {"kind": "tensorrt_llm"}, None)
    assert (unsettled.weights, len(unsettled.config_sha256)) == (None, 64)
    assert "says float32" in unsettled.unknown
    empty = reference(tmp_path, {"kind": "tensorrt_llm"}, None)
    assert (empty.weights, empty.config_sha256) == (None, None)
    assert "config.json cannot be read" in empty.unknown


# ---- before any effect --------------------------------------------------------------------------------------


def experiment_of(folder):
    return Experiment.model_validate(
        {
            "name": "large", "engine": {"kind": "embedded"}, "model": {"path": str(folder)},
            "search": {"space": {"max_batch_size": 1, "max_num_tokens": 64, "memory_fraction": 0.5}},
            "arms": {"a": {"environment": "native"}, "b": {"environment": "native"}},
        }
    )  # fmt: skip


def test_a_model_larger_than_the_node_is_a_problem_of_the_plan(tmp_path):
    total = observe.meminfo()["MemTotal"]
    large = folder_with(tmp_path / "large", LLAMA_8B, {"model.embed_tokens.weight": ("BF16", total // 2 + 1)})
    fits = folder_with(tmp_path / "fits", LLAMA_8B, DENSE)
    (problem,) = preview._too_large(experiment_of(large))
    assert f"the weights in {large} take" in problem.what
    assert "a smaller or quantized model" in problem.mend
    assert preview._too_large(experiment_of(fits)) == []
    assert lacking_memory(tmp_path, {"kind": "embedded", "dtype": "bfloat16"}, 1) is None, (
        "an empty folder is told elsewhere"
    )


# ---- the node's memory ------------------------------------------------------------------------------------

CLUSTER = {
    "cluster_name": "sparks", "head_start_ray_commands": ["ray start --head --resources='{\"slot\": 1}'"],
    "worker_start_ray_commands": ["ray start --resources='{\"slot\": 1}'"],
}  # fmt: skip


def cluster_with(folder, **provider):
    path = folder / "cluster.yaml"
    nodes = {"type": "local", "head_ip": "192.0.2.10", "worker_ips": [], **provider}
    path.write_text(json.dumps(CLUSTER | {"provider": nodes}))
    return path


def test_a_cluster_file_may_say_how_fast_its_memory_is(tmp_path):
    assert load_cluster(cluster_with(tmp_path)).memory_bandwidth_bytes_per_s is None
    path = cluster_with(tmp_path, memory_bandwidth="273GB/s")
    assert load_cluster(path).memory_bandwidth_bytes_per_s == 273e9


@pytest.mark.parametrize(
    ("names", "speed"),
    [
        (["NVIDIA GB10"], 273e9),
        (["NVIDIA GB10", "NVIDIA GB10"], 273e9),
        (["NVIDIA H200"], None),
        (["NVIDIA GB10", "NVIDIA H200"], None),
        (["NVIDIA GB100"], None),
        ([None], None),
        ([], None),
    ],
)
def test_the_speed_of_a_gb10_is_known_and_a_cluster_file_counts_before_it(
    tmp_path, monkeypatch, names, speed
):
    described = [{"error": "gone"} if name is None else {"name": name} for name in names]
    monkeypatch.setattr(nvml.Reader, "describe", lambda _: described)
    assert execute._memory_bandwidth(tmp_path) == speed
    cluster_with(tmp_path)
    assert execute._memory_bandwidth(tmp_path) == speed
    cluster_with(tmp_path, memory_bandwidth="4.8TB/s")
    assert execute._memory_bandwidth(tmp_path) == 4.8e12


@pytest.mark.parametrize("said", [273, "273GB", "fast", "273 GB/h", "0GB/s", True, "273 parsecs/s"])
def test_a_speed_that_is_none_is_refused_at_its_place(tmp_path, said):
    with pytest.raises(InputError, match=r"cluster\.yaml:1: provider\.memory_bandwidth: "):
        load_cluster(cluster_with(tmp_path, memory_bandwidth=said))


@given(st.integers(1, 10**6), st.sampled_from(["GB", "GiB", "MB"]))
def test_rates_are_read_with_their_unit(number, unit):
    complaints = []
    speed = memory_bandwidth(f"{number}{unit}/s", complaints.append)
    assert speed == number * {"GB": 10**9, "GiB": 1 << 30, "MB": 10**6}[unit]
    assert parse_rate_bytes_per_s(f"{number} {unit} / s") == speed
    assert complaints == []


@pytest.mark.process
def test_a_guest_with_another_models_weights_ends_as_a_failed_trial(tmp_path, monkeypatch):
    one = Bench(tmp_path / "run", experiment())
    try:
        assert one.run()["host"]["plausibility"] is None, "the fake engine loads no model"
        told = f'measurements["model"] = {{"weight_bytes": {R1_7B.loaded_bytes}}}'
        one.change_worker("engine_fake.py", 'talk.phase("end")', f'{told}\n    talk.phase("end")')
        other = dataclasses.replace(asked().reference, weights=QWEN_72B)
        monkeypatch.setattr(one.runner, "_reference", lambda _: other)
        record = Record.model_validate(one.run(attempt=2))
        assert (record.outcome.kind, record.outcome.reason) == ("engine_error", "implausible_weights")
        assert record.host.plausibility.violated["weights"] == record.outcome.message
        assert record.result.measurements.kv_cache is not None, "what it said stays on record"
        assert "model" in record.host.plausibility.not_applied
    finally:
        one.close()
