"""The test double of TensorRT-LLM: as strict as the real one, and its sums come out by the law it prints."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOUBLE = Path(__file__).parent / "double"
GIB, MIB = 1 << 30, 1 << 20
WEIGHT_BYTES = 48 * MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of one tensor. 2 layers x 2 heads x 16 x 2 bytes, keys and values: 256 bytes a token."""
    folder = tmp_path_factory.mktemp("model")
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [WEIGHT_BYTES // 2], "data_offsets": [0, WEIGHT_BYTES]}}
    ).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + WEIGHT_BYTES)
    return folder


START = """
import json, os, sys
from pathlib import Path
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig
def start(kv=None, **more):
    return LLM(MODEL, skip_tokenizer_init=True, **{
        "max_batch_size": 8, "max_num_tokens": 512, "max_seq_len": 1024, "enable_iter_perf_stats": True,
        "kv_cache_config": KvCacheConfig(**({"free_gpu_memory_fraction": 0.5} | (kv or {}))),
        "cuda_graph_config": CudaGraphConfig(max_batch_size=8, enable_padding=True), **more})
def tell(**values): print("TOLD", json.dumps(values), flush=True)
def answer(**more): return SamplingParams(end_id=-1, ignore_eos=True, **more)
"""
FIXED = {"TLLM_DOUBLE_TOTAL_BYTES": str(10 * GIB), "TLLM_DOUBLE_FREE_BYTES": str(8 * GIB)}
ALONE = {"TLLM_WORKER_USE_SINGLE_PROCESS": "1"}
INFO = {"TLLM_LOG_LEVEL": "INFO"}


def run(code, model=None, folder=DOUBLE, **variables):
    """(what it told, everything it printed)."""
    done = subprocess.run(
        [sys.executable, "-c", f"MODEL = {str(model)!r}\n{START}\nif __name__ == '__main__':\n    " + "\n    ".join(code.strip().splitlines())],
        capture_output=True, text=True, timeout=600, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    return (told[-1] if told else {}), done.stdout


REFUSE = """
found = {}
for name, call in {
    "llm": lambda: LLM(MODEL, nonsense=1),
    "llm type": lambda: LLM(MODEL, max_batch_size="8"),
    "kv": lambda: KvCacheConfig(nonsense=1),
    "kv type": lambda: KvCacheConfig(max_tokens="many"),
    "kv bool": lambda: KvCacheConfig(max_tokens=True),
    "kv range": lambda: KvCacheConfig(free_gpu_memory_fraction=1.5),
    "graphs": lambda: CudaGraphConfig(nonsense=1),
    "graphs both": lambda: CudaGraphConfig(batch_sizes=[1, 2], max_batch_size=4),
    "sampling": lambda: SamplingParams(nonsense=1),
    "sampling type": lambda: SamplingParams(max_tokens="8"),
    "load format": lambda: LLM(MODEL, load_format="fast"),
}.items():
    try: call()
    except Exception as error: found[name] = f"{type(error).__name__}: {error}"
tell(**found)
"""


def test_what_the_real_one_refuses_is_refused_in_its_words(model):
    told, _ = run(REFUSE, model)
    assert told["llm"] == "ValueError: LLM got invalid argument: nonsense"
    assert "Extra inputs are not permitted" in told["kv"]
    assert told["kv"].startswith("ValueError: 1 validation error for KvCacheConfig\nnonsense")
    assert told["graphs"].startswith("ValueError: 1 validation error for CudaGraphConfig")
    assert told["sampling"].startswith("TypeError: SamplingParams.__init__() got an unexpected keyword")
    assert told["load format"] == "ValueError: Invalid LoadFormat: fast"
    assert set(told) == set(re.findall(r'^    "(.+?)":', REFUSE, re.MULTILINE)), "every one was refused"


POOL = """
llm = start()
manager = next(iter(llm._executor.engine.resource_manager.resource_managers.values()))
stats = manager.get_kv_cache_stats()
tell(blocks=stats.max_num_blocks, bytes=stats.allocated_bytes, per_token=manager.get_cache_bytes_per_token(),
     longest=manager.max_seq_len, capacity=llm.get_kv_cache_capacity() if hasattr(llm, "get_kv_cache_capacity") else None)
"""


LINES = {
    "1.0.0": ["kv size is 256. device total memory 10.00 GiB, , tmp kv_mem 0.00 GiB", "Estimated max tokens in KV cache : ", "Adjusted max_seq_len to 544"],
    "1.1.0": [", , tmp kv_mem 0.00 GiB", "Estimated max memory in KV cache : ", "Use 0.05 GB for model weights.", ", respectively)"],
    "1.2.1": ["for estimation dry run", "with free memory 1.9", "Prefetching 0.05GB checkpoint files."],
    "1.3.0rc13": ["kv size per token is 256. device total memory", "temporary kv cache memory during profiling", "GiB of total memory 10.0GiB"],
    "1.3.0rc28": ["kv size per token is 256. device total memory"],
    "1.4.0rc1": ["kv size per token is 256 bytes/token. device total memory"],
}  # fmt: skip


@pytest.mark.parametrize("version", LINES)
def test_the_pool_is_what_the_law_gives_and_the_log_says_so_twice_in_its_generations_words(model, version):
    told, log = run(POOL, model, TLLM_DOUBLE_VERSION=version, **FIXED, **ALONE, **INFO)
    activation = 512 * 64 * 64
    context, graphs = 128 * MIB, 4 * 2 * MIB  # batch sizes 1, 2, 4, 8
    free = 8 * GIB - WEIGHT_BYTES - context - graphs  # as the dry run ends, without its own cache
    tokens = (free - activation) // 2 // 256
    whole = tokens // 32 if version >= "1.3" else -(-tokens // 32)
    assert told["blocks"] == whole
    assert told["bytes"] == whole * 32 * told["per_token"] == whole * 32 * 256
    assert told["longest"] == 1024
    allocated = re.findall(
        r"\[MemUsageChange\] Allocated (\S+) GiB for max tokens in paged KV cache \((\d+)\)", log
    )
    assert len(allocated) == 2
    assert int(allocated[1][1]) == whole * 32
    peak = re.search(
        r"Peak memory .*: (\S+) GiB, available KV cache memory .*: (\S+) GiB, fraction is set 0.5", log
    )
    assert float(peak[1]) == pytest.approx((10 * GIB - free + activation) / GIB, abs=0.01)
    assert float(peak[2]) == pytest.approx((free - activation) / 2 / GIB, abs=0.006)
    assert (told["capacity"] is not None) == (version >= "1.3.0rc2")
    for line in (*LINES[version], "] [TRT-LLM] [I] Setting PyTorch memory fraction to 0."):
        assert line in log
    if told["capacity"]:
        assert told["capacity"] == {"maxNumBlocks": whole, "tokensPerBlock": 32, "maxNumTokens": whole * 32}


def test_python_lines_are_silent_by_default_and_cpp_lines_are_not(model):
    _, log = run("start()", model, **FIXED, **ALONE)
    assert "[TensorRT-LLM][INFO] [MemUsageChange]" in log
    assert "Peak memory" not in log
    assert "Using LLM with PyTorch backend" in log, "while arguments are read the level is info"


def test_limits_cut_the_pool_or_the_sequence(model):
    told, log = run(
        POOL.replace("start()", "start(kv={'max_tokens': 4096})"), model, **FIXED, **ALONE, **INFO
    )
    assert told["blocks"] == 128
    assert "max_tokens=4096 is provided, max_memory is set to 0.00 GiB" in log
    short = POOL.replace("start()", "start(kv={'max_tokens': 640})")
    told, log = run(short, model, **FIXED, **ALONE, **INFO)
    assert told["longest"] == 640
    assert "Attention window size 1024 exceeds upper bound 640 for available blocks. Reducing to 640." in log
    assert run(POOL.replace("start()", "start(kv={'max_gpu_total_bytes': 1 << 20})"), model, **FIXED, **ALONE)[0]["blocks"] > 1000, (
        "V1 does not feel the byte cap"
    )  # fmt: skip


def test_by_default_it_answers_the_hosts_free_memory_and_takes_little_of_it(model):
    code = """
def anonymous(): return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
before, llm = anonymous(), start()
from tensorrt_llm.device import meminfo
tell(taken=anonymous() - before, used=llm._executor.engine._device.mem_get_info(), info=meminfo())
"""
    told, _ = run(code, model, **ALONE)
    assert told["used"][1] == told["info"]["MemTotal"]
    assert told["used"][0] < 0.7 * told["info"]["MemFree"]
    assert 32 * MIB < told["taken"] < 80 * MIB


def test_weights_are_read_unless_they_are_dummies(model):
    code = """
def read(): return int(next(l for l in open("/proc/self/io") if l.startswith("rchar")).split()[1])
before = read(); start(); whole = read() - before
before = read(); start(load_format="dummy")
tell(whole=whole, dummy=read() - before)
"""
    told, _ = run(code, model, **FIXED, **ALONE)
    assert told["whole"] > WEIGHT_BYTES > MIB > told["dummy"]


# ---- requests -----------------------------------------------------------------------------------------------


def test_requests_give_as_many_tokens_as_asked_and_statistics_come_after_them(model):
    code = """
llm = start()
before = llm.get_stats()
many = llm.generate([[1, 2, 3]] * 20, answer(max_tokens=16))
one = llm.generate([4, 5], answer(max_tokens=2000))
stopped = llm.generate([4, 5], SamplingParams(end_id=7, max_tokens=16))
steps = [len(each.outputs[0].token_ids_diff) for each in llm.generate_async([1], answer(max_tokens=5), streaming=True)]
stats = llm.get_stats()
tell(before=before, many=[len(each.outputs[0].token_ids) for each in many], one=len(one.outputs[0].token_ids),
     stopped=len(stopped.outputs[0].token_ids), steps=steps, kv=stats[-1]["kvCacheStats"], again=llm.get_stats())
"""
    told, _ = run(code, model, **FIXED)
    assert (told["before"], told["again"]) == ([], [])
    assert told["many"] == [16] * 20
    assert told["one"] == 1022, "the sequence ends at max_seq_len"
    assert told["stopped"] < 16, "without ignore_eos an end may come"
    assert told["steps"] == [1] * 5
    assert told["kv"]["maxNumBlocks"] > 1000
    assert told["kv"]["tokensPerBlock"] == 32


def test_what_a_request_may_not_be(model):
    code = """
llm, found = start(), {}
for name, call in {
    "long": lambda: llm.generate([1] * 513, answer()),
    "no end": lambda: llm.generate([1], SamplingParams(max_tokens=4)),
    "text": lambda: llm.generate("hello", answer()),
    "late": lambda: (llm.shutdown(), llm.generate([1], answer())),
}.items():
    try: call()
    except Exception as error: found[name] = str(error)
tell(**found)
"""
    told, _ = run(code, model, **FIXED, **ALONE)
    assert told["long"].endswith("should not exceed max_num_tokens (512)")
    assert told["no end"].startswith("tokenizer is required to reset end_id")
    assert told["text"].startswith("The inputs must be")
    assert told["late"] == "LLM is shutting down"


# ---- the worker process ---------------------------------------------------------------------------------------


def test_the_worker_is_another_process_that_gets_little_and_ends_late(model):
    code = """
def below(pid):
    found = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [deeper for each in found for deeper in below(each)]
llm = start()
pids = below(os.getpid())
names = {part.split(b"=")[0].decode() for part in Path(f"/proc/{pids[-1]}/environ").read_bytes().split(b"\\0") if part}
llm.shutdown()
def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError: return False
late = [alive(pid) for pid in pids]
import time
while any(alive(pid) for pid in pids): time.sleep(0.02)
tell(kind=type(llm._executor).__name__, processes=len(pids), names=sorted(names), late=late)
"""
    more = {"TLLM_DOUBLE_LATE_S": "1.5", "HF_HUB_OFFLINE": "1", "TRTLLM_X": "1", "HOME": "/"}
    told, log = run(code, model, **FIXED, **more)
    assert told["processes"] == 2, "a launcher and one rank"
    assert told["late"] == [True, True], "shutdown() returns before they have ended"
    assert {"TLLM_DOUBLE_FREE_BYTES", "TRTLLM_X", "PATH"} <= set(told["names"])
    assert "HF_HUB_OFFLINE" not in told["names"]
    assert "rank 0 using MpiPoolSession to spawn MPI processes" in log


def test_two_ranks_share_weights_and_heads(model):
    code = """
llm = start(tensor_parallel_size=2)
tell(**llm.get_kv_cache_capacity())
llm.shutdown()
"""
    told, log = run(code, model, TLLM_DOUBLE_VERSION="1.4.0rc1", **FIXED, **INFO)
    assert "[RANK 0] [I] Peak memory" in log
    assert "[RANK 1] [I] Peak memory" in log
    assert "kv size per token is 128 bytes/token" in log
    assert told["maxNumTokens"] > 16 * MIB, "half the bytes a token, about twice the tokens"


@pytest.mark.parametrize("alone", [True, False])
def test_too_little_memory_ends_in_the_report(model, alone):
    code = """
try: start()
except RuntimeError as error: tell(said=str(error), cause=str(error.__cause__))
"""
    told, log = run(
        code,
        model,
        TLLM_DOUBLE_FREE_BYTES=str(150 * MIB),
        TLLM_DOUBLE_TOTAL_BYTES=str(GIB),
        **(ALONE if alone else {}),
    )
    report = told["said"] if alone else told["cause"]
    assert alone or told["said"] == "Executor worker returned error"
    assert alone or "Executor worker initialization error: Traceback" in log, "at any level"
    assert report.startswith("Executor creation failed due to insufficient GPU memory.\n")
    assert "The following component could not be created: Model\nTotal GPU memory (GiB): 1.00\n" in report


def test_a_pool_of_nothing_is_an_assertion(model):
    code = """
try: start(kv={"free_gpu_memory_fraction": 0.0})
except AssertionError as error: tell(said=str(error))
"""
    assert run(code, model, **FIXED, **ALONE)[0]["said"] == "max_blocks_per_seq > 0"


def test_newer_ones_would_report_their_use_unless_told_not_to(model):
    late = {"TLLM_DOUBLE_VERSION": "1.4.0rc1", **FIXED, **ALONE}
    assert "usage telemetry would be sent" in run("start()", model, **late)[1]
    assert "usage telemetry would be sent" not in run("start()", model, TRTLLM_NO_USAGE_STATS="1", **late)[1]


def test_the_hook_stands_where_the_real_one_has_it(model):
    code = """
from tensorrt_llm._torch.pyexecutor._util import KvCacheCreator
name = "estimate_max_tokens" if hasattr(KvCacheCreator, "estimate_max_tokens") else "configure_kv_cache_capacity"
original, calls = getattr(KvCacheCreator, name), []
setattr(KvCacheCreator, name, lambda *positional: (calls.append(1), original(*positional))[1])
start()
tell(name=name, calls=len(calls))
"""
    for version, name in (("1.0.0", "estimate_max_tokens"), ("1.2.1", "configure_kv_cache_capacity")):
        told, _ = run(code, model, TLLM_DOUBLE_VERSION=version, **FIXED, **ALONE)
        assert told == {"name": name, "calls": 1}


def test_settings_may_lie_beside_the_package(model, tmp_path):
    shutil.copytree(DOUBLE / "tensorrt_llm", tmp_path / "tensorrt_llm")
    (tmp_path / "tensorrt_llm" / "double.json").write_text('{"VERSION": "1.3.0rc28", "LATE_S": "0"}')
    code = "import tensorrt_llm\ntell(version=tensorrt_llm.__version__, double=tensorrt_llm.ENGINE_IS_DOUBLE)"
    assert run(code, model, folder=tmp_path)[0] == {"version": "1.3.0rc28", "double": True}


def test_the_bench_reports_what_it_counted(model, tmp_path):
    requests = [{"task_id": n, "input_ids": [n, 2, 3], "output_tokens": 6} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    (tmp_path / "extra.yaml").write_text(json.dumps({"kv_cache_config": {"free_gpu_memory_fraction": 0.25}}))
    done = subprocess.run(
        [sys.executable, "-m", "tensorrt_llm.double_bench", "-m", "x", "--model_path", model, "throughput", "--max_batch_size", "4",
         "--max_num_tokens", "256", "--max_seq_len", "512", "--kv_cache_free_gpu_mem_fraction", "0.5", "--dataset", tmp_path / "data.jsonl",
         "--extra_llm_api_options", tmp_path / "extra.yaml", "--report_json", tmp_path / "report.json", "--streaming"],
        capture_output=True, text=True, timeout=600, check=False, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(DOUBLE), **FIXED},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["request_info"]["num_requests"] == 4
    assert report["request_info"]["avg_output_length"] == 6
    assert report["world_info"]["kv_cache_percentage"] == 0.25, "the extra options have the last word"
    assert report["streaming_metrics"]["ttft_percentiles"]["p50"] > 0
    assert "= PERFORMANCE OVERVIEW" in done.stdout
