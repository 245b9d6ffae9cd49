"""The KV cache managers, at the module path of the real ones, with what can be read from them."""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass
from typing import Any

from ...device import Device
from ...logger import logger
from ...version import GENERATION, LATE_1_3, V1_2, V1_3

GIB = 1 << 30


class ResourceManagerType(enum.Enum):
    KV_CACHE_MANAGER = "KV_CACHE_MANAGER"
    DRAFT_KV_CACHE_MANAGER = "DRAFT_KV_CACHE_MANAGER"


@dataclass(frozen=True)
class KvCacheStats:
    max_num_blocks: int
    free_num_blocks: int
    used_num_blocks: int
    tokens_per_block: int
    allocated_bytes: int
    alloc_total_blocks: int = 0
    alloc_new_blocks: int = 0
    reused_blocks: int = 0
    missed_blocks: int = 0
    cache_hit_rate: float = 0.0


class ResourceManager:
    def __init__(self, managers: dict[ResourceManagerType, Any]) -> None:
        self.resource_managers = managers


class _Manager:
    """What both generations have: a pool that is allocated, and a sequence length that is cut to it."""

    def __init__(
        self, config: Any, device: Device, *, bytes_per_token: int, tokens_per_block: int, max_seq_len: int, estimating: bool
    ) -> None:  # fmt: skip
        self._device, self._bytes_per_token = device, bytes_per_token
        self.tokens_per_block = tokens_per_block
        self.max_seq_len = max_seq_len
        self.max_attention_window_vec = [max_seq_len]
        self._primary = self._count_blocks(config, estimating=estimating)
        self._secondary = (config.host_cache_size or 0) // (bytes_per_token * tokens_per_block)
        if self._primary < 1:
            raise AssertionError("max_blocks_per_seq > 0")
        self._shorten()
        self.blocks_per_window = {self.max_attention_window_vec[0]: (self._primary, self._secondary)}
        self._allocate()

    def _count_blocks(self, config: Any, *, estimating: bool) -> int:
        raise NotImplementedError

    def _shorten(self) -> None:
        """A sequence longer than the pool is cut: its window, and max_seq_len itself."""
        window, bound = self.max_seq_len, self._primary * self.tokens_per_block
        if window <= bound:
            return
        logger.warning(
            f"Attention window size {window} exceeds upper bound {bound} for available blocks. Reducing to {bound}."
        )
        self.max_attention_window_vec = [bound]
        logger.warning(f"Adjusted max_attention_window_vec to {self.max_attention_window_vec}")
        logger.warning(f"Adjusted window size {window} to {bound} in blocks_per_window")
        self.max_seq_len = bound
        logger.warning(f"Adjusted max_seq_len to {bound}")

    def _allocate(self) -> None:
        tokens = self._primary * self.tokens_per_block
        self._device.take("kv_cache", tokens * self._bytes_per_token)
        if GENERATION >= V1_2:
            per_sequence = -(-self.max_seq_len // self.tokens_per_block)
            logger.cpp(
                f"Max KV cache blocks per sequence: {per_sequence} [window size={self.max_attention_window_vec[0]}], "
                f"tokens per block={self.tokens_per_block}, primary blocks={self._primary}, "
                f"secondary blocks={self._secondary}, max sequence length={self.max_seq_len}"
            )
        logger.cpp(f"Number of tokens per block: {self.tokens_per_block}.")
        size = tokens * self._bytes_per_token / GIB
        logger.cpp(f"[MemUsageChange] Allocated {size:.2f} GiB for max tokens in paged KV cache ({tokens}).")

    def get_cache_bytes_per_token(self) -> int:
        return self._bytes_per_token

    def get_max_resource_count(self) -> int:
        return self._primary

    def get_num_free_blocks(self) -> int:
        return self._primary

    def get_kv_cache_stats(self) -> KvCacheStats:
        return KvCacheStats(
            max_num_blocks=self._primary,
            free_num_blocks=self._primary,
            used_num_blocks=0,
            tokens_per_block=self.tokens_per_block,
            allocated_bytes=self._primary * self.tokens_per_block * self._bytes_per_token,
        )

    def shutdown(self) -> None:
        self._device.give_back("kv_cache")


class KVCacheManager(_Manager):
    """V1. It measures free memory once more: the pool may come out smaller than what was estimated."""

    @property
    def blocks_in_primary_pool(self) -> int:
        return self._primary

    @property
    def blocks_in_secondary_pool(self) -> int:
        return self._secondary

    def _count_blocks(self, config: Any, *, estimating: bool) -> int:
        if estimating and GENERATION >= V1_2:  # a dry run knows that it is one
            blocks = int(config.max_tokens // self.tokens_per_block)
            windows = {self.max_seq_len: (blocks, 0)}
            logger.info(
                f"[kv cache manager] Primary/secondary blocks for window sizes set to {windows} for estimation dry run"
            )
            return blocks
        fraction = 0.9 if config.free_gpu_memory_fraction is None else config.free_gpu_memory_fraction
        assert fraction < 1.0, f"Invalid freeMemFraction, freeMemFraction {fraction} must be smaller than 1.0"
        free, total = self._device.mem_get_info()
        tokens = fraction * free / self._bytes_per_token
        if config.max_tokens is not None:
            tokens = min(config.max_tokens, tokens)
            _warn_of_both(as_printed(fraction), config.max_tokens, tokens, free, total)
        return (
            int(tokens // self.tokens_per_block)
            if GENERATION >= V1_3
            else math.ceil(tokens / self.tokens_per_block)
        )


class KVCacheManagerV2(_Manager):
    """V2: sized by a quota in bytes; it has no `blocks_in_primary_pool`."""

    def _count_blocks(self, config: Any, *, estimating: bool) -> int:  # noqa: ARG002  a dry run is sized alike
        quota = config.max_gpu_total_bytes
        if config.max_tokens is not None:
            allowed = int(config.max_tokens * self._bytes_per_token / config.max_util_for_resume)
            quota = min(quota, allowed)
            logger.info(
                f"max_tokens {config.max_tokens} is provided. Allowed quota from max_tokens is {allowed / GIB}GiB. "
                f"New quota is {quota / GIB}GiB"
            )
        logger.info(f"KV cache manager v2 device quota set to {quota / GIB}GiB")
        host = config.host_cache_size
        if host is None or (host == 0 and GENERATION < LATE_1_3):  # an early 0 meant: decide for me
            host = quota
        if host:
            logger.info(f"KV cache manager v2 host cache quota set to {host / GIB:.2f}GiB")
        return int(quota // (self._bytes_per_token * self.tokens_per_block))


def _warn_of_both(fraction: float, asked: int, tokens: float, free: int, total: int) -> None:
    if GENERATION < V1_2:
        numbers = f"{fraction} and {asked}"
    elif GENERATION == V1_2:  # the generation that divides by 4 GiB and prints no unit
        numbers = (
            f"{fraction} and {tokens} with free memory {free / (1 << 32)} of total memory {total / (1 << 32)}"
        )
    else:
        numbers = f"{fraction} and {tokens} with free memory {free / GIB}GiB of total memory {total / GIB}GiB"
    logger.warning(
        f"Both free_gpu_memory_fraction and max_tokens are set (to {numbers}, respectively). "
        "The smaller value will be used."
    )


def as_printed(fraction: float) -> float:
    """Until 1.1 the fraction goes through the C++ settings, which hold it in 32 bits."""
    return fraction if GENERATION >= V1_2 else float(struct.unpack("f", struct.pack("f", fraction))[0])
