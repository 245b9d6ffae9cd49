"""Build the engine: weights, a dry run with a temporary cache, the final cache; and explain a lack of memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ... import checkpoint
from ...device import Device, OutOfMemoryError, meminfo
from ...llmapi.llm_args import LoadFormat
from ...logger import logger
from ...version import GENERATION, V1_0, V1_2, V1_3
from ._util import KvCacheCreator, adjust_torch_memory_fraction
from .py_executor import CONTEXT_BYTES, PyExecutor

GIB = 1 << 30
_STAGES = {  # value and friendly name; until 1.1 the value was a friendly name as well
    "model": "Model",
    "_no_capture_init_kv_cache": "Initial KV Cache (temporary for KV cache size estimation)",
    "_no_capture_init_extra_resources": "Additional executor resources (temporary for KV cache size estimation)",
    "kv_cache": "KV cache",
    "executor_extra": "Additional executor resources",
}
_REFERENCE = (
    "Please refer to the TensorRT LLM documentation for information on how to control the memory usage through "
    "TensorRT LLM configuration options. Possible options include:"
)
_ADVICE = {
    "model": "reduce max_num_tokens and/or shard the model weights across GPUs by enabling pipeline and/or tensor parallelism",
    "kv_cache": "reduce free_gpu_memory_fraction",
}


class _MemoryMonitor:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._samples: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        before = self._device.mem_get_info()[0]
        try:
            yield
        except OutOfMemoryError as error:
            raise RuntimeError(self._explain(stage, before)) from error
        self._samples.append((stage, before, self._device.mem_get_info()[0]))

    def _explain(self, stage: str, free: int) -> str:
        seen = [
            f"{each if GENERATION >= V1_2 else _STAGES[each]}: {before / GIB:.2f} / {after / GIB:.2f}"
            for each, before, after in self._samples
        ]
        advised = [*(each for each, _, _ in self._samples), stage]
        lines = [
            "Executor creation failed due to insufficient GPU memory.",
            "",
            f"The following component could not be created: {_STAGES[stage]}",
            f"Total GPU memory (GiB): {self._device.mem_get_info()[1] / GIB:.2f}",
            f"Free GPU memory before component creation attempt (GiB): {free / GIB:.2f}",
            "",
            "Previously created components and free GPU memory before/after creation (GiB):",
            *seen,
            "",
            _REFERENCE,
            *(f"  {each}: {_ADVICE.get(each, 'reduce max_num_tokens')}" for each in advised),
        ]
        return "\n".join(lines)


def _load(args: Any, found: checkpoint.Checkpoint, device: Device) -> None:
    device.take("context", CONTEXT_BYTES)
    size = found.weight_bytes // args.tensor_parallel_size
    if args.load_format is LoadFormat.AUTO:
        if GENERATION < V1_2:
            logger.info(f"Use {size / GIB:.2f} GB for model weights.")
        elif found.weight_bytes < 0.9 * meminfo()["MemAvailable"]:
            logger.info(f"Prefetching {found.weight_bytes / GIB:.2f}GB checkpoint files.")
    device.take("weights", size)
    if args.load_format is LoadFormat.AUTO:
        found.read_weights()


def create_py_executor(args: Any) -> PyExecutor:
    """As the real one, step by step; the KV cache is built twice, and only the second counts."""
    device = Device()
    monitor = _MemoryMonitor(device)
    found = checkpoint.load(str(args.model))
    with monitor.stage("model"):
        _load(args, found, device)
    if args.max_seq_len is None:
        args.max_seq_len = int(found.config.get("max_position_embeddings", 2048))
        logger.info(f"max_seq_len is not specified, using inferred value {args.max_seq_len}")
    size = found.kv_bytes_per_token(args.kv_cache_config.dtype, args.tensor_parallel_size)
    creator = KvCacheCreator(args, device, size)
    resources: dict[Any, Any] = {}
    width, vocabulary = int(found.config["hidden_size"]), int(found.config["vocab_size"])
    if os.environ.get("TRTLLM_SKIP_KV_CACHE_ESTIMATION") != "1" or GENERATION < V1_3:
        creator.try_prepare_estimation()
        with monitor.stage("_no_capture_init_kv_cache"):
            creator.build_managers(resources, True)
        with monitor.stage("_no_capture_init_extra_resources"):
            first = PyExecutor(args, device, resources, width, vocabulary)
        older = GENERATION == V1_0
        size_kv_cache = creator.estimate_max_tokens if older else creator.configure_kv_cache_capacity
        size_kv_cache(first)
        first.shutdown()
    else:
        creator.configure_kv_cache_capacity()
    with monitor.stage("kv_cache"):
        creator.build_managers(resources, False)
    with monitor.stage("executor_extra"):
        executor = PyExecutor(args, device, resources, width, vocabulary)
    adjust_torch_memory_fraction(device)
    return executor
