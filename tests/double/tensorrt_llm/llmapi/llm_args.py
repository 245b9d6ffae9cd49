"""The settings classes, with the names of the version this stands for."""

from __future__ import annotations

import enum
import math
from typing import Any, ClassVar

from ..logger import logger
from ..strict import Field, StrictModel, of_version
from ..surface import CUDA_GRAPH_CONFIG, KV_CACHE_CONFIG, torch_llm_args
from ..version import GENERATION, V1_3


class LoadFormat(enum.Enum):
    AUTO = 0
    DUMMY = 1
    VISION_ONLY = 2


class KvCacheConfig(StrictModel):
    model_fields: ClassVar[dict[str, Field]] = of_version(KV_CACHE_CONFIG, GENERATION)


class CudaGraphConfig(StrictModel):
    """Given one of batch_sizes and max_batch_size, it makes the other."""

    model_fields: ClassVar[dict[str, Field]] = of_version(CUDA_GRAPH_CONFIG, GENERATION)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.batch_sizes:
            self.batch_sizes = sorted(self.batch_sizes)
            if self.max_batch_size not in (0, self.batch_sizes[-1]):
                raise ValueError(
                    "CudaGraphConfig.max_batch_size is incompatible with CudaGraphConfig.batch_sizes."
                )
        else:
            self.batch_sizes = _graph_batch_sizes(self.max_batch_size or 128, padded=self.enable_padding)
        self.max_batch_size = self.batch_sizes[-1]


def _graph_batch_sizes(largest: int, *, padded: bool) -> list[int]:
    sizes = [1, 2, 4, *range(8, 129, 8)] if padded else [*range(1, 33), 64, 128]
    if padded and GENERATION >= V1_3:
        sizes += range(192, largest + 1, 64)
    elif largest > 1:
        sizes += [2**power for power in range(8, math.ceil(math.log2(largest)))]
    return sorted({size for size in sizes if size <= largest} | {largest})


class TorchLlmArgs(StrictModel):
    model_fields: ClassVar[dict[str, Field]] = of_version(
        torch_llm_args(KvCacheConfig, CudaGraphConfig), GENERATION
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for name, usual in (("max_batch_size", 2048), ("max_num_tokens", 8192), ("max_beam_width", 1)):
            if getattr(self, name) is None:
                setattr(self, name, usual)
        if self.max_batch_size > self.max_num_tokens:
            logger.warning(
                f"max_batch_size [{self.max_batch_size}] should be less than or equal to max_num_tokens [{self.max_num_tokens}]"
            )
        if isinstance(self.load_format, str):
            if self.load_format.upper() not in LoadFormat.__members__:
                raise ValueError(f"Invalid LoadFormat: {self.load_format}")
            self.load_format = LoadFormat[self.load_format.upper()]


LlmArgs = TorchLlmArgs
