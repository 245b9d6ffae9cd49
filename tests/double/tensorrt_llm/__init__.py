"""A test double of the part of TensorRT-LLM that spark_ray uses. It is not TensorRT-LLM, and no model runs in it.

It takes exactly the arguments of the version it stands for (`surface.py`), sizes its KV cache by TensorRT-LLM's law
over a memory view that can be set (`settings.py`), prints the log lines of that version's generation, starts a worker
process as the real one does through MPI, and gives memory back late. Its numbers mean nothing: ENGINE_IS_DOUBLE says
so to whoever imports it, and every record made with it repeats that.

Written from public facts about the real package (names, defaults, log formats); none of its code is in here.
"""

import sys

from .llmapi import LLM, KvCacheConfig, LlmArgs, RequestOutput, SamplingParams, TorchLlmArgs
from .logger import logger
from .version import GENERATION, V1_2, __version__

ENGINE_IS_DOUBLE = True

__all__ = [
    "ENGINE_IS_DOUBLE",
    "LLM",
    "KvCacheConfig",
    "LlmArgs",
    "RequestOutput",
    "SamplingParams",
    "TorchLlmArgs",
    "__version__",
    "logger",
]

logger.info("Starting TensorRT LLM init." if GENERATION >= V1_2 else "Starting TensorRT-LLM init.")
logger.info("TensorRT LLM inited." if GENERATION >= V1_2 else "TensorRT-LLM inited.")
print(f"[TensorRT-LLM] {'TensorRT LLM' if GENERATION >= V1_2 else 'TensorRT-LLM'} version: {__version__}")
print("[double] DOUBLE: a test double of TensorRT-LLM, no engine; its numbers mean nothing")
sys.stdout.flush()
