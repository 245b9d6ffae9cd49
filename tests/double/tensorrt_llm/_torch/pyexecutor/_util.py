"""KvCacheCreator: how large the KV cache gets. At the module path of the real one, for whoever hooks into it.

available = (total - peak + temporary KV) x fraction, where peak = torch's peak during a dry run + everything on the
device that is not in this process's torch allocator.
"""

from __future__ import annotations

from typing import Any

from ...device import Device, torch
from ...logger import logger
from ...version import GENERATION, V1_0, V1_1, V1_3, V1_4
from .resource_manager import GIB, KVCacheManager, KVCacheManagerV2, ResourceManagerType, as_printed

RESERVED_BYTES = 32 << 20


class KvCacheCreator:
    def __init__(self, args: Any, device: Device, bytes_per_token: int) -> None:
        self._args, self._device = args, device
        self._config = args.kv_cache_config
        self._tokens_per_block = getattr(self._config, "tokens_per_block", 32)
        self._bytes_per_token = bytes_per_token
        self._max_tokens_in = self._config.max_tokens
        self._max_bytes_in = getattr(self._config, "max_gpu_total_bytes", 0)
        self._v2 = getattr(self._config, "use_kv_cache_manager_v2", False) is True

    def try_prepare_estimation(self) -> bool:
        """Size the temporary cache for requests that fill one step of max_num_tokens."""
        tokens = self._tokens_for_estimation()
        self._config.max_tokens = tokens
        if self._v2:
            self._config.max_gpu_total_bytes = int(self._fraction * self._device.mem_get_info()[0])
        return True

    @property
    def _fraction(self) -> float:
        fraction = self._config.free_gpu_memory_fraction
        return 0.9 if fraction is None else float(fraction)

    def _tokens_for_estimation(self) -> int:
        args, block = self._args, self._tokens_per_block
        longest = max(1, min(args.max_num_tokens, args.max_seq_len - 1))
        extra = 1 if args.disable_overlap_scheduler else 2
        whole, rest = divmod(args.max_num_tokens, longest)
        lengths = [longest] * whole + ([rest] if rest else [])
        blocks = sum(-(-(length + extra) // block) for length in lengths)
        if GENERATION < V1_3:
            return blocks * block
        graphs = args.cuda_graph_config.max_batch_size if args.cuda_graph_config else 1
        blocks = max(blocks, -(-(args.max_seq_len + 1) // block) + graphs - 1, args.max_batch_size)
        fitting = (
            int(self._fraction * self._device.mem_get_info()[0] / self._bytes_per_token) // block * block
        )
        return min(blocks * block, fitting)

    def build_managers(self, resources: dict[Any, Any], estimating_kv_cache: bool) -> None:
        manager = KVCacheManagerV2 if self._v2 else KVCacheManager
        resources[ResourceManagerType.KV_CACHE_MANAGER] = manager(
            self._config,
            self._device,
            bytes_per_token=self._bytes_per_token,
            tokens_per_block=self._tokens_per_block,
            max_seq_len=self._args.max_seq_len,
            estimating=estimating_kv_cache,
        )

    def configure_kv_cache_capacity(self, py_executor: Any = None) -> None:
        """Measure, run the dummy requests, measure again, and settle what the final cache may take.

        Without an executor (estimation skipped) the peak is what is used now.
        """
        device = self._device
        device.reset_peak()
        free, total = torch.cuda.mem_get_info()
        model = device.torch_allocated
        logger.info(_profiled("Memory used after loading model weights (inside torch)", model))
        outside = max(total - free - model, 0)
        logger.info(_profiled("Memory used after loading model weights (outside torch)", outside))
        if py_executor is None:
            self._conclude(total, total - free, temporary=0)
            return
        py_executor.run_dummy_requests()
        free, total = torch.cuda.mem_get_info()
        extra = max(total - free - device.torch_allocated, 0)
        activation = device.torch_peak - model
        logger.info(_profiled("Memory dynamically allocated during inference (inside torch)", activation))
        logger.info(_profiled("Memory used outside torch (e.g., NCCL and CUDA graphs)", extra))
        manager = py_executor.resource_manager.resource_managers[ResourceManagerType.KV_CACHE_MANAGER]
        self._conclude(total, device.torch_peak + extra, manager.get_kv_cache_stats().allocated_bytes)

    def _conclude(self, total: int, peak: int, temporary: int) -> None:
        available = int((total - peak + temporary) * self._fraction)
        logger.info(self._peak_line(peak, available, total, temporary))
        self._settle(max(0, available))

    def _peak_line(self, peak: int, available: int, total: int, temporary: int) -> str:
        size, fraction = self._bytes_per_token, as_printed(self._fraction)
        head = (
            f"Peak memory during memory usage profiling (torch + non-torch): {peak / GIB:.2f} GiB, available KV cache "
            f"memory when calculating max tokens: {available / GIB:.2f} GiB, fraction is set {fraction}, "
        )
        if GENERATION < V1_3:
            return f"{head}kv size is {size}. device total memory {total / GIB:.2f} GiB, , tmp kv_mem {temporary / GIB:.2f} GiB"
        unit = " bytes/token" if GENERATION >= V1_4 else ""
        return (
            f"{head}kv size per token is {size}{unit}. device total memory {total / GIB:.2f} GiB, "
            f"temporary kv cache memory during profiling {temporary / GIB:.2f} GiB"
        )

    def _settle(self, available: int) -> None:
        """Apply what the user capped, and write the result into the configuration."""
        if self._max_tokens_in is not None:
            cap = self._max_tokens_in * self._bytes_per_token
            available = min(available, cap)
            if GENERATION < V1_3:
                said = f"max_memory is set to {available / GIB:.2f} GiB"
            else:
                said = f"It limits max memory to {cap / GIB:.2f} GiB. New max_memory is set to {available / GIB:.2f} GiB"
            if GENERATION >= V1_1:
                joint = ", " if GENERATION < V1_3 else ". "
                logger.info(f"max_tokens={self._max_tokens_in} is provided{joint}{said}")
        tokens = available // self._bytes_per_token
        if GENERATION == V1_0:
            logger.info(f"Estimated max tokens in KV cache : {tokens}")
            self._config.max_tokens = tokens
            return
        # The byte cap comes after the tokens were settled: it says so, and V1 does not feel it.
        self._config.max_tokens = self._max_tokens_in if self._v2 else tokens
        if self._max_bytes_in:
            available = min(available, self._max_bytes_in)
            word = "max_memory is set to" if GENERATION < V1_3 else "New max memory is"
            joint = ", " if GENERATION < V1_3 else ". "
            logger.info(
                f"max_gpu_total_bytes={self._max_bytes_in / GIB:.2f} GiB is provided{joint}{word} {available / GIB:.2f} GiB"
            )
        logger.info(f"Estimated max memory in KV cache : {available / GIB:.2f} GiB")
        self._config.max_gpu_total_bytes = available


if GENERATION == V1_0:  # under its older name
    KvCacheCreator.estimate_max_tokens = KvCacheCreator.configure_kv_cache_capacity  # type: ignore[attr-defined]
    del KvCacheCreator.configure_kv_cache_capacity


def _profiled(what: str, size_bytes: int) -> str:
    return f"{what} in memory usage profiling: {size_bytes / GIB:.2f} GiB"


def adjust_torch_memory_fraction(device: Device) -> None:
    """The last line of a successful start."""
    free, total = device.mem_get_info()
    limit = free + device.torch_allocated - RESERVED_BYTES
    logger.info(f"Setting PyTorch memory fraction to {limit / total} ({limit / GIB} GiB)")
