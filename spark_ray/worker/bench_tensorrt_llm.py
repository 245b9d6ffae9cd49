"""NVIDIA's own trtllm-bench as the workload: it starts the engine itself, sends the requests and reports.

The report has no KV capacity, so that is read from the log, by the lines of the last of the two managers that are built.
What the tool's options do not pin goes through --extra_llm_api_options, a YAML file (written as JSON, which is YAML);
its entries come after the tool's own, so the whole kv_cache_config is in it. `python -m spark_ray_worker.bench_tensorrt_llm
FILE` writes down what the installed version takes, in a process of its own: to import the library takes device memory.

The tool loads tokenizer and configuration with trust_remote_code=True, so a model folder that brings code is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import (
    identity,
    tensorrt_llm_api,
    tensorrt_llm_law,
    tensorrt_llm_log,
    tensorrt_llm_oom,
    tensorrt_llm_pool,
    workload,
)
from .session import Infeasible, OutOfMemory, Session

TOOL = "trtllm-bench"
WARMUP_REQUESTS = 2  # the tool's own default, not counted
_PHASES = {
    "sizing": (
        "Memory used after loading model weights (outside torch)",
    ),  # printed before the profiling pass
    "after_kv": (
        "Peak memory during memory usage profiling",
        "[MemUsageChange] Allocated",
    ),  # after it comes the pool
}
_BUILT = "Setting PyTorch memory fraction"  # ends the start: memory that runs out later was not got over
_LOOK_S = 0.05
_PRINTED_STEP_BYTES = -(-(1 << 30) // 100)  # the log has sizes in steps of 0.01 GiB
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_CODE = ("config.json", "tokenizer_config.json")


class BenchFailed(Exception):
    """The tool ended badly, or reports something else than what was asked."""


# ---- before it ---------------------------------------------------------------------------------------------


def _program(talk: Session) -> list[str]:
    """The tool; a double has one of its own. Which of the two is there is seen from where the package lies."""
    found = importlib.util.find_spec("tensorrt_llm")
    if found is None or found.origin is None:
        raise ImportError("no tensorrt_llm in this environment")
    is_double = Path(found.origin).parents[1] == Path(__file__).parents[1]
    _check_double(found.origin, talk, is_double=is_double)
    if is_double:
        return [sys.executable, "-m", "tensorrt_llm.double_bench"]
    program = shutil.which(TOOL)
    if program is None:
        raise BenchFailed(f"tensorrt_llm is here, but no {TOOL} on PATH")
    return [program]


def _check_double(what: str, talk: Session, *, is_double: bool) -> None:
    if is_double != bool(talk.engine["double"]):
        raise BenchFailed(f"{what} is {'a' if is_double else 'no'} double, and engine.double says otherwise")


def _check_model(folder: Path, *, double: bool) -> None:
    for name in _CODE:
        path = folder / name
        if path.is_file() and "auto_map" in json.loads(path.read_text(encoding="utf-8")):
            raise BenchFailed(
                f"{name} names code of its own (auto_map), which {TOOL} would execute: use tool: worker"
            )
    if not double and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise BenchFailed(f"{TOOL} loads a tokenizer, though requests are token ids; {folder} has none")


def _offered(file: Path) -> dict[str, Any]:
    """What the installed version takes, asked in a process of its own."""
    done = subprocess.run([sys.executable, "-m", __name__, str(file)], stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise BenchFailed("the installed tensorrt_llm cannot be looked at; worker.log says why")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _write_offered(file: Path) -> None:
    library, api = (importlib.import_module(name) for name in ("tensorrt_llm", "tensorrt_llm.llmapi"))
    names = tensorrt_llm_api.offered(api.KvCacheConfig)
    is_double = bool(getattr(library, "ENGINE_IS_DOUBLE", False))
    found = {"version": str(library.__version__), "is_double": is_double, "KvCacheConfig": sorted(names)}
    file.write_text(json.dumps(found), encoding="utf-8")


def _extra_options(talk: Session, offered: dict[str, Any], max_tokens: int | None) -> dict[str, Any]:
    """What --extra_llm_api_options pins: the same as the worker's own way of starting the engine."""
    settings, configuration = talk.engine, talk.configuration
    knobs = tensorrt_llm_api.kv_cache_knobs(settings, configuration, max_tokens)
    names = frozenset(offered["KvCacheConfig"])
    graphs = {knob.name: knob.value for knob in tensorrt_llm_api.cuda_graph_knobs(configuration)}
    return {
        "kv_cache_config": tensorrt_llm_api.arguments("KvCacheConfig", offered["version"], names, knobs),
        "cuda_graph_config": graphs if settings["cuda_graphs"] else None,
        "load_format": settings["load_format"],
        "enable_chunked_prefill": False,
        "trust_remote_code": False,
    }


def _write_dataset(file: Path, asked: dict[str, Any], vocabulary: int) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for number, ids in enumerate(workload.prompts(asked, vocabulary)):
            line = {"task_id": number, "input_ids": ids, "output_tokens": asked["output_tokens"]}
            lines.write(json.dumps(line) + "\n")


def command(program: list[str], talk: Session, folder: Path) -> list[str]:
    """The tool's command line; every option of it is in all of 1.0 to 1.4."""
    settings, configuration, asked = talk.engine, talk.configuration, talk.request["workload"]
    model = Path(talk.request["model_path"])
    return [
        *program, "--model", model.resolve().name or "model", "--model_path", str(model), "--workspace", str(folder), "--log_level", "info",
        "throughput", "--backend", "pytorch",
        "--max_batch_size", str(configuration["max_batch_size"]),
        "--max_num_tokens", str(configuration["max_num_tokens"]),
        "--max_seq_len", str(settings["max_seq_len"]),
        "--kv_cache_free_gpu_mem_fraction", str(configuration["memory_fraction"]),
        "--tp", str(settings["tensor_parallel_size"]),
        "--dataset", str(folder / "dataset.jsonl"), "--num_requests", str(asked["requests"]),
        "--warmup", str(WARMUP_REQUESTS), "--eos_id", "-1",
        "--extra_llm_api_options", str(folder / "options.yaml"), "--report_json", str(folder / "report.json"),
        *(["--streaming"] if asked["streaming"] else []),
    ]  # fmt: skip


# ---- while it runs -----------------------------------------------------------------------------------------


class _Followed:
    """worker.log from here on, and what was observed at the tool's phases as the log told them."""

    def __init__(self, log: Path) -> None:
        self._path = log
        self._place = log.stat().st_size
        self._bytes = b""
        self.seen: dict[str, dict[str, Any]] = {}

    @property
    def text(self) -> str:
        with self._path.open("rb") as file:
            file.seek(self._place + len(self._bytes))
            self._bytes += file.read()
        return self._bytes.decode(errors="replace")

    def wait(self, process: subprocess.Popen[bytes], talk: Session) -> int:
        """Wait for the tool. Returns its exit status."""
        while (status := process.poll()) is None:
            text = self.text
            for name, lines in _PHASES.items():
                if name not in self.seen and _has(text, lines):
                    self.seen[name] = talk.phase(name, settle=False)
            time.sleep(_LOOK_S)
        return status


def _has(text: str, lines: tuple[str, ...]) -> bool:
    """Whether all of them came, in this order."""
    place = 0
    for line in lines:
        place = text.find(line, place) + 1
        if place == 0:
            return False
    return True


# ---- after it ----------------------------------------------------------------------------------------------


def capacity(
    log: tensorrt_llm_log.Log, settings: dict[str, Any], by_config: int | None, max_tokens: int | None
) -> dict[str, Any]:
    """kv_cache from the log: tokens of the last pool, with its blocks beside them; raises where it is not what was asked."""
    first = tensorrt_llm_pool.from_log(log, settings["tokens_per_block"])
    if first is None or len(log.windows) > 1:
        raise BenchFailed(f"{TOOL} reports no KV capacity, and its log does not tell it either")
    found = [replace(first, source=f"{TOOL}, log: allocated")]
    if log.primary_blocks is not None and log.allocated_tokens is not None:
        found.append(replace(first, source=f"{TOOL}, log: blocks", blocks=log.primary_blocks))
    per_token = tensorrt_llm_pool.bytes_per_token(found, log, by_config, settings["kv_dtype"])
    pool = tensorrt_llm_pool.capacity(found, per_token, settings["max_seq_len"])
    if log.allocated_bytes is not None and abs(log.allocated_bytes - pool["bytes"]) > _PRINTED_STEP_BYTES:
        raise BenchFailed(
            f"the log says {log.allocated_bytes} bytes for {pool['tokens']} tokens of {per_token} bytes"
        )
    tensorrt_llm_pool.check_as_asked(pool, first, log, settings["max_seq_len"], max_tokens)
    return pool


def check_settings(report: dict[str, Any], talk: Session) -> None:
    """The tool ran with what was asked. Raises BenchFailed."""
    world, configuration = report["world_info"], talk.configuration
    for name, told, wanted in (
        ("kv_cache_percentage", world["kv_cache_percentage"], configuration["memory_fraction"]),
        ("max_batch_size", world["max_batch_size"], configuration["max_batch_size"]),
        ("max_num_tokens", world["max_num_tokens"], configuration["max_num_tokens"]),
        ("tp_size", world["tp_size"], talk.engine["tensor_parallel_size"]),
    ):
        if told is None or abs(float(told) - wanted) > 1e-6:
            raise BenchFailed(f"{TOOL} ran with {name} {told}, asked was {wanted}")


def throughput(report: dict[str, Any]) -> dict[str, Any]:
    """Counted tokens and their time out of the report, which has averages. Raises BenchFailed where they disagree."""
    requests, performance = report["request_info"], report["performance"]
    count = int(requests["num_requests"])
    inputs, outputs = (
        round(float(requests[name]) * count) for name in ("avg_input_length", "avg_output_length")
    )
    duration = float(performance["total_latency_ms"]) / 1000
    if count < 1 or duration <= 0:
        raise BenchFailed(f"{TOOL} reports {count} requests in {duration} s")
    told = float(performance["system_output_throughput_tok_s"])
    if abs(told * duration - outputs) > 0.001 * outputs:
        raise BenchFailed(
            f"{TOOL} reports {told} tokens/s, its own {outputs} tokens in {duration} s are another number"
        )
    found: dict[str, Any] = {
        "requests": count, "input_tokens": inputs, "output_tokens": outputs, "duration_s": duration,
        "output_throughput_tokens_per_s": outputs / duration, "source": TOOL,
    }  # fmt: skip
    streamed = report.get("streaming_metrics")
    if streamed:
        found["latency"] = {"first_token": _spread(streamed["ttft_percentiles"], count)}
        if outputs > count:
            found["latency"]["per_output_token"] = _spread(streamed["tpot_percentiles"], count)
    return found


def _spread(told: dict[str, Any], count: int) -> dict[str, Any]:
    seconds = {
        name: float(told[key]) / 1000
        for name, key in (("mean_s", "average"), *((f"p{n}_s", f"p{n}") for n in (50, 90, 99)))
    }
    return {"n": count, **seconds}


def _failure(log: tensorrt_llm_log.Log, status: int, text: str) -> Exception:
    """What a tool that ended badly says: no memory, no room for what was asked, or something else."""
    report = log.out_of_memory or tensorrt_llm_oom.report(text.rpartition(_BUILT)[2])
    if report is not None:
        component = report.component
        return OutOfMemory(f"{TOOL}: {report.message}" + (f" ({component})" if component else ""))
    if log.reduced and log.peak_bytes is not None:  # before the Peak line they are the dry run's
        words = "; ".join(log.reduced)
        return Infeasible("max_seq_len_reduced", f"the pool is too small for what was asked: {words}")
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    return BenchFailed(f"{TOOL} ended with status {status}: {last.strip()[:500]}")


def _read_report(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchFailed(f"{TOOL} left no report that can be read: {error}") from None
    if not isinstance(found, dict):
        raise BenchFailed(f"the report of {TOOL} is not an object")
    return found


# ---- all of it ---------------------------------------------------------------------------------------------


def _prepare(talk: Session, folder: Path, known: dict[str, Any], measurements: dict[str, Any]) -> int | None:
    """Write what the tool reads. Returns the tokens that the pool is pinned to, if it is."""
    settings, max_tokens = talk.engine, None
    if settings["kv_cache"] is not None:
        if known["bytes_per_token"] is None:
            why = known["absent"]["bytes_per_token"]
            raise BenchFailed(f"engine.kv_cache cannot be turned into tokens: {why}; leave it out")
        max_tokens = int(settings["kv_cache"]) // int(known["bytes_per_token"])
    folder.mkdir()
    tensorrt_llm_api.prepare_environment(settings["worker"])
    offered = _offered(folder / "offered.json")
    _check_double("the installed tensorrt_llm", talk, is_double=offered["is_double"])
    measurements["engine"] = {
        "name": f"TensorRT-LLM ({TOOL})", "version": offered["version"], "sizing_moment": "before start",
        "version_known": tensorrt_llm_api.version_known(offered["version"]),
        "bench_warmup_requests": WARMUP_REQUESTS,
        **({"engine_is_double": True} if offered["is_double"] else {}),
    }  # fmt: skip
    options = json.dumps(_extra_options(talk, offered, max_tokens), indent=1)
    (folder / "options.yaml").write_text(options, encoding="utf-8")
    vocabulary = identity.vocabulary(Path(talk.request["model_path"]))
    _write_dataset(folder / "dataset.jsonl", talk.request["workload"], vocabulary)
    return max_tokens


def _execute(program: list[str], talk: Session, folder: Path, info: dict[str, Any]) -> tuple[int, _Followed]:
    """Run the tool once, until its processes are gone; those that had to be killed are named in `info`."""
    before = set(tensorrt_llm_api.children())
    log = _Followed(talk.folder / "worker.log")
    talk.settle()
    process = subprocess.Popen(command(program, talk, folder), stdin=subprocess.DEVNULL)
    status = log.wait(process, talk)
    # Device memory comes back when the engine's processes are gone, which can be after the tool.
    killed = tensorrt_llm_api.outlast(set(tensorrt_llm_api.children()) - before)
    if killed:
        info["killed_at_shutdown"] = ", ".join(each.name for each in killed)
    return status, log


def run(talk: Session, measurements: dict[str, Any]) -> None:
    """Write what the tool reads, run it once, read what it says."""
    settings, model = talk.engine, Path(talk.request["model_path"])
    program = _program(talk)
    _check_model(model, double=bool(settings["double"]))
    known = identity.of(model, settings["kv_dtype"], settings["tensor_parallel_size"])
    folder = talk.folder / "bench"
    max_tokens = _prepare(talk, folder, known, measurements)
    status, followed = _execute(program, talk, folder, measurements["engine"])
    at_sizing = followed.seen.get("sizing", {})
    if at_sizing:
        measurements["engine"]["sizing_moment"] = "log line"
    log = tensorrt_llm_log.parse(followed.text)
    measurements["model"] = known
    if log.weights_bytes is not None:
        rounded = {"weight_bytes": log.weights_bytes, "resolution_bytes": _PRINTED_STEP_BYTES}
        measurements["model"] = rounded | known
    tensorrt_llm_pool.check_fraction(log, talk.configuration["memory_fraction"])
    sizing = tensorrt_llm_law.sizing(log, talk.configuration["memory_fraction"])
    if sizing is not None:
        names = ("meminfo", "per_cpu_free_bytes")
        measurements["sizing"] = sizing | {name: at_sizing[name] for name in names if name in at_sizing}
    if status:
        raise _failure(log, status, followed.text)
    measurements["kv_cache"] = capacity(log, settings, known["bytes_per_token"], max_tokens)
    report = _read_report(folder / "report.json")
    try:
        check_settings(report, talk)
        served = throughput(report)
    except (KeyError, TypeError, ValueError) as error:
        raise BenchFailed(f"the report of {TOOL} lacks or garbles {error}") from error
    measurements["throughput"] = workload.check_whole(served, talk.request["workload"])
    talk.phase("end")


if __name__ == "__main__":
    os.environ.setdefault("TLLM_LOG_LEVEL", "INFO")
    _write_offered(Path(sys.argv[1]))
