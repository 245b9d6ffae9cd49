"""Requests, latency, and the matrix product that no engine has a part in."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import experiment_data
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_identity import LLAMA_8B, folder_with

from spark_ray import record
from spark_ray.engines import FakeEngine
from spark_ray.experiment import Experiment, Workload
from spark_ray.measurements import Latency, Matmul, Throughput
from spark_ray.result import Asked, Measurements, _workload_misfits
from spark_ray.worker import workload
from spark_ray.worker.__main__ import _run_engine

# ---- requests ---------------------------------------------------------------------------------------------


@given(
    requests=st.integers(0, 300),
    length=st.integers(2, 40),
    vocabulary=st.integers(2, 9000) | st.just(2 * 7919),
)
def test_no_two_prompts_share_their_beginning(requests, length, vocabulary):
    if requests > vocabulary**2:
        with pytest.raises(ValueError, match="need a vocabulary larger than"):
            workload.prompts({"requests": requests, "input_tokens": length}, vocabulary)
        return
    made = workload.prompts({"requests": requests, "input_tokens": length}, vocabulary)
    assert [len(prompt) for prompt in made] == [length] * requests
    assert all(0 <= token < vocabulary for prompt in made for token in prompt)
    assert len({prompt[0] for prompt in made}) == min(requests, vocabulary)
    assert len({tuple(prompt[:2]) for prompt in made}) == requests
    assert made == workload.prompts({"requests": requests, "input_tokens": length}, vocabulary), (
        "the same in every arm"
    )


# ---- latency ----------------------------------------------------------------------------------------------

times = st.floats(0, 1e4, allow_nan=False)


@given(st.lists(times, min_size=1, max_size=200))
def test_a_percentile_is_the_smallest_measured_value_that_so_many_are_not_above(values):
    found = workload.spread(values)
    assert found["n"] == len(values)
    assert found["mean_s"] == pytest.approx(sum(values) / len(values))
    for percent in (50, 90, 99):
        value = found[f"p{percent}_s"]
        assert value in values
        assert sum(each <= value for each in values) * 100 >= percent * len(values)
        assert sum(each < value for each in values) * 100 < percent * len(values)


@given(st.lists(st.lists(times, min_size=1, max_size=9).map(sorted), min_size=1, max_size=20))
def test_latency_counts_every_first_token_and_every_gap(arrived):
    found = Latency.model_validate(workload.latency([0.0] * len(arrived), arrived))
    assert found.first_token.n == len(arrived)
    gaps = sum(len(each) - 1 for each in arrived)
    assert (found.inter_token.n if found.inter_token else 0) == gaps


# ---- the matrix product -----------------------------------------------------------------------------------


def believed(found):
    made = Matmul.model_validate(found)
    assert (made.size, made.dtype, len(made.durations_s)) == (48, "float32", 3)
    return made


def test_numpy_where_there_is_no_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    made = believed(workload.multiply(48, 3))
    assert made.library.startswith("numpy ")
    assert made.device == "cpu"


def test_a_gpu_that_is_asked_for_is_not_replaced_by_the_cpu(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert "sees no GPU here" in workload.multiply(8, 1, "cuda")["lacks"]
    with pytest.raises(ValidationError, match="'any' or 'cuda'"):
        Workload.model_validate({"matmul": {"device": "cpu"}})


@pytest.mark.process
def test_the_device_asked_for_reaches_the_process():
    asked = Workload.model_validate({"requests": 0, "matmul": {"size": 8, "runs": 1, "device": "cuda"}})
    settings = asked.model_dump(mode="json")["matmul"]
    try:
        assert workload.matmul(settings)["device"] != "cpu"
    except RuntimeError as error:
        assert "sees no GPU here" in str(error)  # noqa: PT017  either, as the host is


def test_neither_of_them_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "needs torch or numpy" in workload.multiply(48, 3)["lacks"]


def process_that_ends(monkeypatch, status, output):
    done = subprocess.CompletedProcess([], status, output)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


@pytest.mark.parametrize(
    ("status", "output", "message"),
    [(0, b'{"lacks": "finds neither"}\n', "finds neither"), (-9, b"", "signal 9"), (1, b"", "status 1")],
)
def test_a_product_that_cannot_be_is_an_error_in_words(monkeypatch, status, output, message):
    process_that_ends(monkeypatch, status, output)
    with pytest.raises(RuntimeError, match=message):
        workload.matmul({"size": 8, "runs": 1})


@pytest.mark.process
def test_the_product_is_timed_before_the_engine_in_a_process_of_its_own(monkeypatch):
    asked = Workload.model_validate({"requests": 0, "matmul": {"size": 32, "runs": 2}}).model_dump(
        mode="json"
    )
    order, real = [], workload.matmul

    def timed(settings):
        order.append("matmul")
        return real(settings)

    monkeypatch.setattr(workload, "matmul", timed)

    def phase(name):
        order.append(name)
        return {"meminfo": {"MemFree": 1}}

    talk = SimpleNamespace(
        engine=FakeEngine(kind="fake").model_dump(mode="json"),
        configuration={"memory_fraction": 0.5, "max_num_tokens": 64, "max_batch_size": 2},
        request={"arm": "a", "workload": asked},
        phase=phase,
    )
    found, failure = _run_engine(talk)
    assert failure is None
    assert order == ["matmul", "after_load", "sizing", "end"]
    library = "torch " if importlib.util.find_spec("torch") else "numpy "
    assert found["matmul"]["library"].startswith(library)
    assert not list(_workload_misfits(Measurements.model_validate(found), asked))
    assert record.Workload.model_validate(asked).matmul.runs == 2


# ---- asked and told ---------------------------------------------------------------------------------------

WORK = {
    "requests": 1,
    "input_tokens": 2,
    "output_tokens": 4,
    "duration_s": 2.0,
    "output_throughput_tokens_per_s": 2.0,
}
SPREAD = {"n": 1, "mean_s": 1.0, "p50_s": 1.0, "p90_s": 1.0, "p99_s": 1.0}
PRODUCT = {"size": 8, "library": "numpy 2", "device": "cpu", "dtype": "float32", "durations_s": [0.5, 1.0, 2.0], "median_flop_per_s": 1024.0}  # fmt: skip
LATENCY = {"latency": {"first_token": SPREAD}}


@pytest.mark.parametrize(
    ("asked", "work", "product", "field"),
    [
        ({}, {}, None, None),
        ({"tool": "trtllm_bench"}, {"source": "trtllm-bench"}, None, None),
        ({"tool": "trtllm_bench"}, {}, None, "source"),
        ({}, {"source": "trtllm-bench"}, None, "source"),
        ({"streaming": True}, LATENCY, None, None),
        ({"streaming": True}, {}, None, "latency"),
        ({}, LATENCY, None, "latency"),
        ({"matmul": {"size": 8, "runs": 3}}, {}, PRODUCT, None),
        ({"matmul": {"size": 9, "runs": 3}}, {}, PRODUCT, "matmul"),
        ({}, {}, PRODUCT, "matmul"),
    ],
)
def test_a_workload_other_than_asked_is_not_believed(asked, work, product, field):
    told = Measurements.model_validate({"throughput": WORK | work, "matmul": product})
    assert [path[-1] for path, _ in _workload_misfits(told, asked)] == ([field] if field else [])


def test_a_product_agrees_with_itself():
    with pytest.raises(ValidationError, match="median_flop_per_s is not"):
        Matmul.model_validate(PRODUCT | {"median_flop_per_s": 1025.0})
    with pytest.raises(ValidationError, match="percentiles are not in order"):
        Throughput.model_validate(WORK | {"latency": {"first_token": SPREAD | {"p90_s": 0.5}}})


@pytest.mark.parametrize(
    ("engine", "work", "message"),
    [
        ({"kind": "probe"}, {"tool": "trtllm_bench"}, "starts TensorRT-LLM; the engine is probe"),
        ({"kind": "tensorrt_llm"}, {"tool": "trtllm_bench", "requests": 0}, "has no KV-only trial"),
        ({"kind": "fake"}, {"streaming": True}, "engine fake generates no tokens"),
    ],
)
def test_a_workload_that_the_engine_cannot_do_is_refused(engine, work, message):
    data = experiment_data() | {"engine": engine, "workload": work, "model": {"path": "/model"}}
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate(data)


def test_any_engine_goes_with_the_product():
    for kind in ("fake", "probe"):
        data = experiment_data() | {"engine": {"kind": kind}, "workload": {"matmul": {}}}
        assert Experiment.model_validate(data).workload.matmul.size == 10_000


# ---- the embedded engine streams ----------------------------------------------------------------------------

STREAMED = """
import json, pathlib, sys
from spark_ray.worker import engine_embedded, identity
from spark_ray.engines import EmbeddedEngine
from spark_ray.units import MIB
from spark_ray.worker import sizing
sizing.read_view = lambda view: {"view": "test", "total_bytes": 64 << 30, "free_bytes": 1000 * MIB}
class Talk:
    engine = EmbeddedEngine(kind="embedded", max_seq_len=64).model_dump(mode="json")
    configuration = {"memory_fraction": 0.25, "max_num_tokens": 64, "max_batch_size": 2}
    sources = []
    request = {
        "model_path": sys.argv[1], "seed": 0,
        "workload": {"requests": 3, "input_tokens": 5, "output_tokens": 4, "streaming": True},
    }
    def phase(self, name): pass
found = {}
engine_embedded.run(Talk(), found)
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("requests", "tokens", "whole"), [(50, 6400, True), (50, 50, False), (49, 6400, False), (50, 6401, False)]
)
def test_requests_that_were_not_served_to_the_end_are_no_workload(requests, tokens, whole):
    measured = {"requests": requests, "output_tokens": tokens}
    if whole:
        assert workload.check_whole(measured, {"requests": 50, "output_tokens": 128}) == measured
        return
    with pytest.raises(
        RuntimeError, match=f"{requests} requests made {tokens} tokens, asked were 50 and 6400"
    ):
        workload.check_whole(measured, {"requests": 50, "output_tokens": 128})


def small_llama(folder):
    """One layer, all weights zero: enough to count tokens with."""
    layer, wide = "model.layers.0", ("BF16", 64, 64)
    names = [f"{layer}.self_attn.{each}_proj" for each in "qkvo"] + [
        f"{layer}.mlp.{each}_proj" for each in ("gate", "up", "down")
    ]
    norms = ["model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    tensors = {
        "model.embed_tokens.weight": ("BF16", 128, 64), "lm_head.weight": ("BF16", 128, 64),
        **{f"{name}.weight": wide for name in names}, **{f"{name}.weight": ("BF16", 64) for name in norms},
    }  # fmt: skip
    config = LLAMA_8B | {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    return folder_with(folder, config, tensors)


@pytest.mark.embedded
def test_streaming_takes_each_token_as_it_comes(tmp_path):
    model = small_llama(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, str(model)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = Measurements.model_validate_json(done.stdout.splitlines()[-1].encode())
    asked = Asked("t", 1, {}, {}, {"streaming": True})
    assert not list(_workload_misfits(found, asked.workload))
    assert found.throughput.output_tokens == 12
    assert (found.throughput.latency.first_token.n, found.throughput.latency.inter_token.n) == (3, 9)
    assert found.model.weight_bytes == found.model.disk_bytes
    assert found.model.bytes_per_token == found.kv_cache.bytes_per_token
