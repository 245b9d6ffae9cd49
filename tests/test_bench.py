"""NVIDIA's trtllm-bench as the workload, against a small stand-in of the tool: what it is given, and what is read back."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_identity import LLAMA_8B, folder_with

from spark_ray.engines import TensorRTLLMEngine
from spark_ray.experiment import Workload
from spark_ray.measurements import Measurements
from spark_ray.result import Asked, _capacity_misfits, _workload_misfits
from spark_ray.worker import bench_tensorrt_llm as bench
from spark_ray.worker import session, tensorrt_llm_api, tensorrt_llm_log

GPT_OSS_SIZE = {"num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 64}  # 73728 KV bytes a token
PACKAGE = "__version__ = '1.1.0rc3'\n"
API = """
class KvCacheConfig:
    model_fields = dict.fromkeys(
        ["free_gpu_memory_fraction", "max_tokens", "tokens_per_block", "dtype", "enable_block_reuse", "host_cache_size"]
    )
"""
I = "[11/20/2025-08:00:00] [TRT-LLM] [I] "
LOG = f"""{I}TensorRT LLM version: 1.1.0rc3
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 0.56 GiB for max tokens in paged KV cache (8224).
{I}Memory used after loading model weights (inside torch) in memory usage profiling: 63.52 GiB
{I}Memory used after loading model weights (outside torch) in memory usage profiling: 49.28 GiB
{I}Memory dynamically allocated during inference (inside torch) in memory usage profiling: 0.85 GiB
{I}Memory used outside torch (e.g., NCCL and CUDA graphs) in memory usage profiling: 49.28 GiB
{I}Peak memory during memory usage profiling (torch + non-torch): 113.65 GiB, available KV cache memory when calculating \
max tokens: 5.95 GiB, fraction is set 0.9, kv size is 73728. device total memory 119.70 GiB, , tmp kv_mem 0.56 GiB
{I}Estimated max memory in KV cache : 5.95 GiB
[TensorRT-LLM][INFO] Max KV cache blocks per sequence: 64 [window size=2048], tokens per block=32, primary blocks=2710, \
secondary blocks=0, max sequence length=2048
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 5.95 GiB for max tokens in paged KV cache (86720).
{I}Setting PyTorch memory fraction to 0.9 (107.73 GiB)
"""
TOOL = f"""#!{sys.executable}
import json, os, pathlib, sys, time
here = pathlib.Path({{here!r}})
words = sys.argv[1:]
(here / "words.json").write_text(json.dumps([words, sorted(name for name in os.environ if name.startswith(("TLLM", "TRTLLM")))]))
with (here / "attempt" / "worker.log").open("a") as log:
    log.write((here / "log").read_text())
deadline = time.monotonic() + 20
while not (here / "seen").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
report = json.loads((here / "report").read_text())
if report is not None:
    pathlib.Path(words[words.index("--report_json") + 1]).write_text(json.dumps(report))
sys.exit(int((here / "status").read_text()))
"""
REPORT = {
    "engine": {"version": "1.1.0rc3", "backend": "Pytorch"},
    "world_info": {"tp_size": 1, "max_batch_size": 8, "max_num_tokens": 4096, "kv_cache_percentage": 0.9},
    "request_info": {"num_requests": 3, "avg_input_length": 5.0, "avg_output_length": 7.0},
    "performance": {"total_latency_ms": 500.0, "system_output_throughput_tok_s": 42.0},
}
MS = {"minimum": 1.0, "maximum": 9.0, "average": 4.0, "p50": 4.0, "p90": 8.0, "p95": 8.5, "p99": 9.0}


def half_served():
    performance = {"total_latency_ms": 500.0, "system_output_throughput_tok_s": 40.0}
    return REPORT | {
        "request_info": REPORT["request_info"] | {"avg_output_length": 20 / 3},
        "performance": performance,
    }


class Rig:
    """A model folder, an attempt folder, a package and a tool on PATH; `run` is one trial."""

    def __init__(self, folder):
        self.folder, self.phases = folder, []
        self.model = folder_with(folder / "model", LLAMA_8B | GPT_OSS_SIZE)
        (self.model / "tokenizer.json").write_text("{}")
        (folder / "attempt").mkdir()
        (folder / "attempt" / "worker.log").write_text("before\n")
        for name, text in (("__init__", PACKAGE), ("llmapi", API)):
            (folder / "site" / "tensorrt_llm").mkdir(parents=True, exist_ok=True)
            (folder / "site" / "tensorrt_llm" / f"{name}.py").write_text(text)
        program = folder / "bin" / "trtllm-bench"
        program.parent.mkdir()
        program.write_text(TOOL.format(here=str(folder)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self.engine, self.work = {}, {}

    def phase(self, name, settle=True):
        self.phases.append((name, settle))
        if name == "after_kv":
            (self.folder / "seen").touch()
        return {"meminfo": {"MemTotal": 2, "MemFree": 1}, "per_cpu_free_bytes": 1}

    def run(self, log=LOG, report=REPORT, status=0, seen=False):
        for name, text in (("log", log), ("report", json.dumps(report)), ("status", str(status))):
            (self.folder / name).write_text(text)
        if status or seen:
            (self.folder / "seen").touch()
        asked = Workload(requests=3, input_tokens=5, output_tokens=7, tool="trtllm_bench", **self.work)
        talk = SimpleNamespace(
            engine=TensorRTLLMEngine(kind="tensorrt_llm", **self.engine).model_dump(mode="json"),
            configuration={"max_batch_size": 8, "max_num_tokens": 4096, "memory_fraction": 0.9},
            request={"model_path": str(self.model), "workload": asked.model_dump(mode="json"), "seed": 0},
            folder=self.folder / "attempt", phase=self.phase, settle=lambda: self.phases.append(("settle", True)),
        )  # fmt: skip
        self.found = {}
        bench.run(talk, self.found)
        measured = Measurements.model_validate(self.found)
        expected = Asked("t", 1, talk.engine, talk.configuration, talk.request["workload"])
        assert not list(_workload_misfits(measured, expected.workload))
        assert not list(_capacity_misfits(measured.kv_cache, expected))
        return measured

    def words(self):
        return json.loads((self.folder / "words.json").read_text())


@pytest.fixture
def rig(tmp_path, monkeypatch):
    made = Rig(tmp_path)
    site = str(tmp_path / "site")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", site)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    # What it sets is for the process that it runs in, which here is the tests' own.
    monkeypatch.setattr(
        tensorrt_llm_api, "prepare_environment", lambda worker: monkeypatch.setenv("TLLM_LOG_LEVEL", worker)
    )
    monkeypatch.setattr(tensorrt_llm_api, "children", list)
    return made


@pytest.mark.process
def test_a_trial_reads_its_pool_from_the_log_and_its_tokens_from_the_report(rig):
    found = rig.run()
    assert rig.phases == [("settle", True), ("sizing", False), ("after_kv", False), ("end", True)]
    assert (found.kv_cache.tokens, found.kv_cache.blocks, found.kv_cache.bytes) == (
        86720,
        2710,
        86720 * 73728,
    )
    assert found.kv_cache.second_source.bytes == found.kv_cache.bytes
    assert (found.sizing.law, found.sizing.read_from) == ("(total - peak + temporary KV) x fraction", "log")
    assert found.sizing.meminfo == {"MemTotal": 2, "MemFree": 1}
    assert (found.throughput.output_tokens, found.throughput.duration_s) == (21, 0.5)
    assert found.throughput.output_throughput_tokens_per_s == 42.0
    assert (found.throughput.source, found.engine.version) == ("trtllm-bench", "1.1.0rc3")
    assert found.model.bytes_per_token == found.kv_cache.bytes_per_token == 73728
    assert found.engine.engine_is_double is None
    assert "worker" not in found.engine.model_dump(), "what was asked was not observed"


@pytest.mark.process
def test_what_the_tool_is_given(rig):
    rig.engine, rig.work = (
        {"cuda_graphs": False, "kv_cache": "1GiB", "load_format": "dummy"},
        {"streaming": True},
    )
    rig.run(report=REPORT | {"streaming_metrics": {"ttft_percentiles": MS, "tpot_percentiles": MS}})
    words, variables = rig.words()
    assert words[: words.index("throughput")] == [
        "--model", "model", "--model_path", str(rig.model), "--workspace", str(rig.folder / "attempt/bench"), "--log_level", "info",
    ]  # fmt: skip
    options = dict(
        zip(
            words[words.index("throughput") + 1 :: 2], words[words.index("throughput") + 2 :: 2], strict=False
        )
    )
    assert (options["--kv_cache_free_gpu_mem_fraction"], options["--max_seq_len"], options["--tp"]) == (
        "0.9",
        "2048",
        "1",
    )
    assert words[-1] == "--streaming"
    assert "TLLM_LOG_LEVEL" in variables
    extra = json.loads((rig.folder / "attempt/bench/options.yaml").read_text())
    assert extra["kv_cache_config"] == {
        "max_tokens": (1 << 30) // 73728, "free_gpu_memory_fraction": 0.9, "tokens_per_block": 32, "dtype": "auto",
        "enable_block_reuse": False, "host_cache_size": 0,
    }  # fmt: skip
    assert (extra["cuda_graph_config"], extra["load_format"], extra["enable_chunked_prefill"]) == (
        None,
        "dummy",
        False,
    )
    lines = [
        json.loads(line) for line in (rig.folder / "attempt/bench/dataset.jsonl").read_text().splitlines()
    ]
    assert [(line["task_id"], len(line["input_ids"]), line["output_tokens"]) for line in lines] == [
        (n, 5, 7) for n in range(3)
    ]
    latency = Measurements.model_validate(rig.found).throughput.latency
    assert (latency.first_token.n, latency.first_token.p90_s, latency.inter_token) == (3, 0.008, None)
    assert latency.per_output_token.p50_s == 0.004


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"status": 1, "log": "Traceback\nValueError: no such option\n"}, bench.BenchFailed, "ended with status 1: ValueError: no such option"),
        ({"status": 1, "log": "Executor creation failed due to insufficient GPU memory.\n"}, session.OutOfMemory, "insufficient GPU memory"),
        ({"status": 1, "log": LOG + "CUDA out of memory. Tried to allocate 2.00 GiB.\n"}, session.OutOfMemory, "Tried to allocate 2"),
        ({"status": 1, "log": "CUDA out of memory. Tried to allocate 2.00 GiB.\n" + LOG + "ValueError: x\n"}, bench.BenchFailed, "status 1: ValueError: x"),
        ({"status": 1, "log": f"{I}Adjusted max_seq_len to 8224\nValueError: in the dry run\n"}, bench.BenchFailed, "status 1: ValueError: in the dry run"),
        ({"status": 1, "log": f"{I}[Autotuner] Failed when profiling x. Error: CUDA out of memory. Tried to allocate 2.00 GiB.\nptxas fatal\n"}, bench.BenchFailed, "ptxas fatal"),
        ({"status": 1, "log": LOG + f"{I}Adjusted max_seq_len to 128\n"}, session.Infeasible, "Adjusted max_seq_len to 128"),
        ({"log": LOG + f"{I}Adjusted max_seq_len to 128\n"}, session.Infeasible, "reduced what one request may hold"),
        ({"log": LOG.replace("86720", "64").replace("2710", "2").replace("5.95 GiB for", "0.00 GiB for")}, session.Infeasible, "one request of max_seq_len 2048"),
        ({"log": "nothing\n", "seen": True}, bench.BenchFailed, "its log does not tell it either"),
        ({"log": LOG.replace("5.95 GiB for", "9.95 GiB for")}, bench.BenchFailed, "bytes for 86720 tokens"),
        ({"log": LOG.replace("fraction is set 0.9", "fraction is set 0.8")}, tensorrt_llm_api.UnsupportedError, r"memory_fraction 0\.9 did not take effect"),
        ({"report": half_served()}, RuntimeError, "3 requests made 20 tokens, asked were 3 and 21"),
        ({"report": None}, bench.BenchFailed, "no report that can be read"),
        ({"report": {}}, bench.BenchFailed, "lacks or garbles 'world_info'"),
        ({"report": REPORT | {"world_info": REPORT["world_info"] | {"kv_cache_percentage": 0.8}}}, bench.BenchFailed, "kv_cache_percentage 0.8, asked was 0.9"),
        ({"report": REPORT | {"performance": {"total_latency_ms": 500.0, "system_output_throughput_tok_s": 84.0}}}, bench.BenchFailed, "are another number"),
    ],
)  # fmt: skip
def test_a_tool_that_fails_or_did_something_else_is_told_apart(rig, change, error, words):
    with pytest.raises(error, match=words):
        rig.run(**change)
    assert rig.found["engine"]["version"] == "1.1.0rc3", "what was measured before it is kept"


def test_a_model_folder_that_brings_code_is_refused(rig):
    (rig.model / "config.json").write_text(json.dumps(LLAMA_8B | {"auto_map": {"AutoConfig": "mine.Config"}}))
    with pytest.raises(bench.BenchFailed, match="which trtllm-bench would execute"):
        rig.run()
    assert not (rig.folder / "words.json").exists()


def test_a_model_without_a_tokenizer_is_refused(rig):
    (rig.model / "tokenizer.json").unlink()
    with pytest.raises(bench.BenchFailed, match="loads a tokenizer"):
        rig.run()


def test_a_double_where_none_was_asked_for_and_the_other_way_round(rig):
    rig.engine = {"double": "tests/double"}
    with pytest.raises(bench.BenchFailed, match=r"is no double, and engine\.double says otherwise"):
        rig.run()


@pytest.mark.process
def test_a_double_that_lies_elsewhere_is_known_by_what_it_says_of_itself(rig):
    (rig.folder / "site/tensorrt_llm/__init__.py").write_text(PACKAGE + "ENGINE_IS_DOUBLE = True\n")
    with pytest.raises(bench.BenchFailed, match=r"is a double, and engine\.double says otherwise"):
        rig.run()
    assert not (rig.folder / "words.json").exists()


@pytest.mark.process
def test_weights_that_the_log_does_not_tell_leave_the_rest_of_the_identity(rig):
    found = rig.run(
        log="".join(line for line in LOG.splitlines(keepends=True) if "(inside torch)" not in line)
    )
    assert found.model.weight_bytes is None
    assert found.model.config_sha256 == hashlib.sha256((rig.model / "config.json").read_bytes()).hexdigest()


@pytest.mark.process
def test_a_process_that_outlives_the_tool_is_ended_and_does_not_hide_its_answer(rig, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as rank:
        lingering = tensorrt_llm_api.Child(rank.pid, tensorrt_llm_api._state(rank.pid), "python3")
        found = iter([[], [lingering]])
        monkeypatch.setattr(tensorrt_llm_api, "children", lambda: next(found))
        monkeypatch.setattr(tensorrt_llm_api, "SHUTDOWN_S", 0.1)
        with pytest.raises(session.OutOfMemory):
            rig.run(status=1, log="Executor creation failed due to insufficient GPU memory.\n")
        assert rank.wait(10) < 0
    assert rig.found["engine"]["killed_at_shutdown"] == "python3"


def test_without_the_tool_it_says_so(rig):
    (rig.folder / "bin" / "trtllm-bench").unlink()
    with pytest.raises(bench.BenchFailed, match="no trtllm-bench on PATH"):
        rig.run()


# ---- the report -------------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 2000),
    inputs=st.integers(1, 4096),
    outputs=st.integers(1, 4096),
    duration_ms=st.floats(0.1, 1e7),
)
def test_tokens_come_whole_out_of_averages(count, inputs, outputs, duration_ms):
    report = {
        "request_info": {"num_requests": count, "avg_input_length": inputs * count / count, "avg_output_length": (outputs * count - 1) / count},
        "performance": {"total_latency_ms": duration_ms, "system_output_throughput_tok_s": (outputs * count - 1) / (duration_ms / 1000)},
    }  # fmt: skip
    found = bench.throughput(report)
    assert (found["requests"], found["input_tokens"], found["output_tokens"]) == (
        count,
        inputs * count,
        outputs * count - 1,
    )


def test_windows_of_several_sizes_are_not_taken_for_one():
    more = "Max KV cache blocks per sequence: 4 [window size=128], tokens per block=32, primary blocks=100, secondary blocks=0, max sequence length=2048\n"  # fmt: skip
    log = tensorrt_llm_log.parse(LOG + more)
    with pytest.raises(bench.BenchFailed, match="does not tell it either"):
        bench.capacity(log, {"tokens_per_block": 32, "kv_dtype": "auto", "max_seq_len": 2048}, 73728, None)
