"""The LLM API, as far as it is used."""

from ..executor.result import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from .llm import LLM
from .llm_args import CudaGraphConfig, KvCacheConfig, LlmArgs, LoadFormat, TorchLlmArgs

__all__ = [
    "LLM",
    "CompletionOutput",
    "CudaGraphConfig",
    "KvCacheConfig",
    "LlmArgs",
    "LoadFormat",
    "RequestOutput",
    "SamplingParams",
    "TorchLlmArgs",
]
