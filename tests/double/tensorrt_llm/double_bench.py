"""Stands for the program `trtllm-bench`: the documented options of its `throughput`, its printed headings, its JSON report.

    python -m tensorrt_llm.double_bench -m MODEL --model_path DIR throughput --dataset FILE --report_json FILE ...

As there, what --extra_llm_api_options names replaces a whole argument: a kv_cache_config in it has the last word on
the memory fraction as well, whatever --kv_cache_free_gpu_mem_fraction says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from . import LLM, SamplingParams, __version__, logger
from .version import GENERATION, V1_2, V1_3

_AVERAGED = ("minimum", "maximum", "average", "p50", "p90", "p95", "p99")


def _parser() -> argparse.ArgumentParser:
    tool = argparse.ArgumentParser("trtllm-bench", allow_abbrev=False)
    tool.add_argument("-m", "--model", required=True)
    tool.add_argument("--model_path", type=Path)
    tool.add_argument("-w", "--workspace", type=Path)
    tool.add_argument("--log_level", default="info")
    if GENERATION >= V1_3:
        tool.add_argument("--telemetry", action=argparse.BooleanOptionalAction, default=True)
    commands = tool.add_subparsers(dest="command", required=True)
    run = commands.add_parser("throughput", allow_abbrev=False)
    _engine_options(run)
    _request_options(run)
    return tool


def _engine_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--engine_dir", type=Path)
    run.add_argument(
        "--backend",
        default="pytorch",
        choices=("pytorch", "_autodeploy", "tensorrt")[: 3 if GENERATION < V1_3 else 2],
    )
    run.add_argument("--extra_llm_api_options", *(["--config"] if GENERATION >= V1_2 else []), type=Path)
    for name in ("--max_batch_size", "--max_num_tokens", "--max_seq_len"):
        run.add_argument(name, type=int)
    run.add_argument("--beam_width", type=int, default=1)
    run.add_argument("--kv_cache_free_gpu_mem_fraction", type=float, default=0.9)
    for name in ("--tp", "--pp"):
        run.add_argument(name, type=int, default=1)
    for name in ("--ep", "--cluster_size"):
        run.add_argument(name, type=int)
    run.add_argument("--enable_chunked_context", action="store_true")
    run.add_argument(
        "--scheduler_policy",
        default="guaranteed_no_evict",
        choices=("guaranteed_no_evict", "max_utilization"),
    )


def _request_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--dataset", type=Path, required=True)
    run.add_argument("--eos_id", type=int, default=-1)
    run.add_argument("--modality", choices=("image", "video"))
    run.add_argument("--num_requests", type=int, default=0)
    run.add_argument("--warmup", type=int, default=2)
    for name in ("--target_input_len", "--target_output_len"):
        run.add_argument(name, type=int)
    run.add_argument("--concurrency", type=int, default=-1)
    run.add_argument("--streaming", action="store_true")
    for name in ("--report_json", "--iteration_log", "--output_json", "--request_json"):
        run.add_argument(name, type=Path)


def _dataset(asked: argparse.Namespace) -> list[tuple[list[int], int]]:
    lines = [
        json.loads(line) for line in asked.dataset.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    requests = []
    for line in lines[: asked.num_requests or None]:
        ids = line.get("input_ids", line.get("logits"))
        if ids is None:
            raise SystemExit("the double has no tokenizer: requests need input_ids")
        requests.append((ids, int(line["output_tokens"])))
    return requests


def _arguments(asked: argparse.Namespace, requests: list[tuple[list[int], int]]) -> dict[str, Any]:
    """As the tool makes them; where not both limits are given it picks its own."""
    longest = max(len(ids) + made for ids, made in requests)
    both = asked.max_batch_size and asked.max_num_tokens
    arguments: dict[str, Any] = {
        "model": str(asked.model_path or asked.model),
        "skip_tokenizer_init": True,
        "tensor_parallel_size": asked.tp,
        "max_batch_size": asked.max_batch_size if both else 256,
        "max_num_tokens": asked.max_num_tokens if both else 4096,
        "max_seq_len": asked.max_seq_len or longest,
        "enable_chunked_prefill": asked.enable_chunked_context,
        "kv_cache_config": {
            "free_gpu_memory_fraction": asked.kv_cache_free_gpu_mem_fraction,
            "enable_block_reuse": False,
        },
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": asked.max_batch_size or 256},
        "backend": asked.backend,
    }
    if asked.extra_llm_api_options:
        arguments |= json.loads(asked.extra_llm_api_options.read_text(encoding="utf-8"))
    return arguments


def _run(
    llm: LLM, requests: list[tuple[list[int], int]], asked: argparse.Namespace
) -> list[dict[str, float]]:
    """Times of each request, in ms."""
    if asked.warmup:
        logger.info("Running warmup.")
        for ids, _ in (requests * asked.warmup)[: asked.warmup]:
            llm.generate(ids, SamplingParams(end_id=asked.eos_id, pad_id=asked.eos_id, max_tokens=2))
        logger.info("Warmup done.")
    sent = []
    for ids, made in requests:
        chosen = SamplingParams(end_id=asked.eos_id, pad_id=asked.eos_id, max_tokens=made)
        sent.append((time.monotonic(), llm.generate_async(ids, chosen, streaming=asked.streaming)))
    found = []
    for started, result in sent:
        first = None
        for _ in result:
            first = first or time.monotonic()
        ended, count = time.monotonic(), len(result.outputs[0].token_ids)
        assert first is not None
        each = (ended - first) / (count - 1) if count > 1 else 0.0
        found.append({"start": started, "end": ended, "ttft": first - started, "tpot": each, "tokens": count})
    return found


def _percentiles(values_s: list[float]) -> dict[str, float]:
    """In ms."""
    ordered = sorted(value * 1000 for value in values_s)
    at = {
        name: ordered[min(len(ordered) - 1, int(len(ordered) * int(name[1:]) / 100))]
        for name in _AVERAGED[3:]
    }
    return {"minimum": ordered[0], "maximum": ordered[-1], "average": statistics.fmean(ordered), **at}


def _report(
    asked: argparse.Namespace, llm: LLM, requests: list[tuple[list[int], int]], times: list[dict[str, float]]
) -> dict[str, Any]:
    duration = max(each["end"] for each in times) - min(each["start"] for each in times)
    made, read = sum(each["tokens"] for each in times), sum(len(ids) for ids, _ in requests)
    latencies = [each["end"] - each["start"] for each in times]
    report: dict[str, Any] = {
        "engine": {
            "model": asked.model, "model_path": str(asked.model_path), "engine_dir": str(asked.engine_dir),
            "version": __version__, "backend": "Pytorch", "dtype": "bfloat16",
            "kv_cache_dtype": None, "quantization": None,
        },
        "machine": None,
        "world_info": {
            "tp_size": asked.tp, "pp_size": asked.pp, "ep_size": asked.ep, "world_size": asked.tp * asked.pp,
            "max_batch_size": llm.args.max_batch_size, "max_num_tokens": llm.args.max_num_tokens,
            "scheduling_policy": asked.scheduler_policy.upper(),
            "kv_cache_percentage": llm.args.kv_cache_config.free_gpu_memory_fraction, "issue_rate": len(times) / duration,
        },
        "request_info": {
            "num_requests": len(times), "avg_num_concurrent_requests": sum(latencies) / duration,
            "avg_input_length": read / len(times), "avg_output_length": made / len(times),
        },
        "performance": {
            "total_latency_ms": duration * 1000, "avg_request_latency_ms": statistics.fmean(latencies) * 1000,
            "request_throughput_req_s": len(times) / duration, "system_output_throughput_tok_s": made / duration,
            "system_total_throughput_tok_s": (made + read) / duration,
            "output_throughput_per_user_tok_s": statistics.fmean(e["tokens"] / (e["end"] - e["start"]) for e in times),
            "output_throughput_per_gpu_tok_s": made / duration / asked.tp,
            "request_latency_percentiles_ms": _percentiles(latencies),
        },
        "dataset": {"num_requests": len(requests)},
    }  # fmt: skip
    if asked.streaming:
        report["streaming_metrics"] = {
            "avg_ttft_ms": statistics.fmean(each["ttft"] for each in times) * 1000,
            "avg_tpot_ms": statistics.fmean(each["tpot"] for each in times) * 1000,
            "ttft_percentiles": _percentiles([each["ttft"] for each in times]),
            "tpot_percentiles": _percentiles([each["tpot"] for each in times]),
        }
    return report


def _print(report: dict[str, Any]) -> None:
    bar = "=" * 59
    engine, world, requests = report["engine"], report["world_info"], report["request_info"]
    performance = report["performance"]
    logger.info(
        f"\n\n{bar}\n= PYTORCH BACKEND\n{bar}\nModel:\t\t\t{engine['model']}\nTensorRT LLM Version:\t{engine['version']}\n"
        f"KV Cache Dtype:\t\t{engine['kv_cache_dtype']}\n\n{bar}\n= WORLD + RUNTIME INFORMATION \n{bar}\n"
        f"Max Runtime Batch Size: {world['max_batch_size']}\nMax Runtime Tokens:     {world['max_num_tokens']}\n"
        f"KV Memory Percentage:   {world['kv_cache_percentage'] * 100:.2f}%\n\n{bar}\n= REQUEST DETAILS \n{bar}\n"
        f"Number of requests:             {requests['num_requests']}\n\n{bar}\n= PERFORMANCE OVERVIEW \n{bar}\n"
        f"Total Output Throughput (tokens/sec):             {performance['system_output_throughput_tok_s']:.4f}\n"
        f"Total Latency (ms):                               {performance['total_latency_ms']:.4f}\n"
    )


def main() -> int:
    asked = _parser().parse_args()
    logger.set_level(asked.log_level)
    logger.info("Preparing to run throughput benchmark...")
    requests = _dataset(asked)
    with LLM(**_arguments(asked, requests)) as llm:
        report = _report(asked, llm, requests, _run(llm, requests, asked))
    _print(report)
    if asked.report_json:
        asked.report_json.write_text(json.dumps(report, indent=4), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
