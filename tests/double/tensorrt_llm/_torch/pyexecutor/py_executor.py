"""The engine: what holds the weights, runs dummy requests, and makes up tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ...device import Device
from ...logger import logger
from ...version import GENERATION, LATE_1_3
from .resource_manager import ResourceManager, ResourceManagerType

STEP_S = 1e-4
MOST_S = 0.5
"""A step makes one token of every running request; all requests together take no longer than the second."""
MIB = 1 << 20
CONTEXT_BYTES = 128 * MIB
GRAPH_BYTES = 2 * MIB  # each captured batch size
ACTIVATION_PER_TOKEN_AND_WIDTH = 64  # bytes


class PyExecutor:
    def __init__(
        self, args: Any, device: Device, managers: dict[ResourceManagerType, Any], width: int, vocabulary: int
    ) -> None:
        self._args, self._device, self._width, self._vocabulary = args, device, width, vocabulary
        self.resource_manager = ResourceManager(managers)
        self._stats: deque[dict[str, Any]] = deque(maxlen=1000)
        self._iteration = 0
        self._warm_up()

    def _warm_up(self) -> None:
        """Capture CUDA graphs: memory that no torch allocator knows."""
        args, manager = self._args, self._manager
        logger.info(
            f"max_seq_len={manager.max_seq_len}, max_num_requests={args.max_batch_size}, "
            f"max_num_tokens={args.max_num_tokens}, max_batch_size={args.max_batch_size}"
        )
        if args.cuda_graph_config is None:
            return
        sizes = [size for size in args.cuda_graph_config.batch_sizes if size <= args.max_batch_size]
        logger.info(f"Creating CUDA graph instances for {len(sizes)} batch sizes.")
        for size in reversed(sizes):
            logger.info(f"Run generation only CUDA graph warmup for batch size={size}, draft_len=0")
        self._device.take("graphs", len(sizes) * GRAPH_BYTES)

    @property
    def _manager(self) -> Any:
        return self.resource_manager.resource_managers[ResourceManagerType.KV_CACHE_MANAGER]

    def run_dummy_requests(self) -> None:
        size = self._args.max_num_tokens * self._width * ACTIVATION_PER_TOKEN_AND_WIDTH
        self._device.take("activation", size)
        self._device.give_back("activation")
        self._device.leave_waiting(size)

    def shutdown(self) -> None:
        """The temporary executor and its cache go; weights and context stay."""
        self._manager.shutdown()
        self._device.give_back("graphs")

    # -- requests ---------------------------------------------------------------------------------------------

    def generate(self, requests: list[dict[str, Any]], tell: Callable[[int, list[int], bool], None]) -> None:
        """Run requests {id, prompt, max_tokens, stops, streaming} in batches; `tell(id, new tokens, done)` as they come."""
        size = self._args.max_batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        for batch in batches:
            self._run(batch, MOST_S / len(batches), tell)

    def _run(
        self, batch: list[dict[str, Any]], most_s: float, tell: Callable[[int, list[int], bool], None]
    ) -> None:
        """One batch: a token a step where somebody streams, else everything at once."""
        left = {each["id"]: self._length(each) for each in batch}
        longest = max(left.values())
        chunk = 1 if any(each["streaming"] for each in batch) else longest
        for _ in range(0, longest, chunk):
            time.sleep(min(STEP_S * chunk, most_s * chunk / longest))
            self._iteration += chunk
            if self._args.enable_iter_perf_stats:
                self._stats.append(self._stats_now(len(left)))
            for each in batch:
                if (number := each["id"]) in left:
                    made = min(chunk, left[number])
                    left[number] -= made
                    first = sum(each["prompt"]) + left[number] * 31
                    tell(
                        number,
                        [(first + place) % self._vocabulary for place in range(made)],
                        left[number] == 0,
                    )
                    if not left[number]:
                        del left[number]

    def _length(self, request: dict[str, Any]) -> int:
        """Tokens to make: as many as asked, fewer at the end of the sequence or where an end token may come."""
        room = max(1, self._manager.max_seq_len - len(request["prompt"]))
        wanted = min(request["max_tokens"], room)
        return max(1, wanted // 2) if request["stops"] else wanted

    def _stats_now(self, active: int) -> dict[str, Any]:
        free, total = self._device.mem_get_info()
        kv = self._manager.get_kv_cache_stats()
        return {
            "iter": self._iteration,
            "gpuMemUsage": total - free,
            "cpuMemUsage": 0,
            "pinnedMemUsage": 0,
            "numActiveRequests": active,
            "maxBatchSizeStatic": self._args.max_batch_size,
            "maxNumTokensStatic": self._args.max_num_tokens,
            "kvCacheStats": {
                "maxNumBlocks": kv.max_num_blocks,
                "freeNumBlocks": kv.free_num_blocks,
                "usedNumBlocks": kv.used_num_blocks,
                "tokensPerBlock": kv.tokens_per_block,
                "allocTotalBlocks": kv.alloc_total_blocks,
                "allocNewBlocks": kv.alloc_new_blocks,
                "reusedBlocks": kv.reused_blocks,
                "missedBlocks": kv.missed_blocks,
                "cacheHitRate": kv.cache_hit_rate,
            },
        }

    def get_latest_iteration_stats(self) -> list[dict[str, Any]]:
        """What came since the last call: nothing before a request."""
        stats = list(self._stats)
        self._stats.clear()
        return stats

    def get_kv_cache_capacity(self) -> dict[str, int]:
        kv = self._manager.get_kv_cache_stats()
        tokens = kv.max_num_blocks * kv.tokens_per_block
        return {
            "maxNumBlocks": kv.max_num_blocks,
            "tokensPerBlock": kv.tokens_per_block,
            "maxNumTokens": tokens,
        }


if GENERATION < LATE_1_3:
    del PyExecutor.get_kv_cache_capacity
