"""Engines and models as an experiment names them: which library, how it sizes its pool, which checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .simulated import SimulatedEngine
from .spec import DurationS, Flag, PositiveInt, Seed, SizeBytes, Spec

MemoryView = Literal["memfree", "memavailable", "cgroup", "engine"]


class EmbeddedEngine(Spec):
    """transformers' continuous batching with its paged KV cache; the pool is sized by a stated law and view."""

    kind: Literal["embedded"]
    memory_view: MemoryView = Field(
        default="memfree",
        description="which memory counts as free when the pool is sized: memfree (TensorRT-LLM's law as it meets "
        "GB10), memavailable (vLLM, SGLang), cgroup (the smaller of MemFree and what the limit leaves), "
        "engine (transformers' own)",
    )
    tokens_per_block: PositiveInt = Field(default=64, description="tokens that one block of the cache holds")
    max_seq_len: PositiveInt = Field(
        default=1024, description="tokens one request may hold; the pool must fit at least one"
    )
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="of weights and KV cache")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where the model and its cache live")
    threads: PositiveInt | None = Field(
        default=None, description="CPU threads of torch; default: torch's own choice"
    )

    @model_validator(mode="after")
    def _view_of_this_device(self) -> Self:
        if self.misfit:
            raise ValueError(self.misfit)
        return self

    @property
    def misfit(self) -> str | None:
        """Why memory_view does not go with device."""
        if self.device == "cpu" or self.memory_view in {"memfree", "engine"}:
            return None
        return (
            f"memory_view {self.memory_view} is of main memory; with device cuda it is memfree (what "
            "cudaMemGetInfo calls free) or engine"
        )

    @property
    def needs_gpu(self) -> bool:
        return self.device == "cuda"


class ProbeEngine(Spec):
    """The sizing law alone: no model, no engine library.

    It reads the real memory view in its environment, needs the profiling peak it is told, and takes a pool of the
    resulting size for real, in a fraction of a second. For noise floors, ladders, pilots, and a quick answer to what
    an engine with this law would read here.
    """

    kind: Literal["probe"]
    memory_view: Literal["memfree", "memavailable", "cgroup", "cuda"] = Field(
        default="memfree",
        description="which memory counts as free when the pool is sized: memfree (TensorRT-LLM's law as it meets "
        "GB10), memavailable (vLLM, SGLang), cgroup (the smaller of MemFree and what the limit leaves), "
        "cuda (what cudaMemGetInfo says)",
    )
    tokens_per_block: PositiveInt = Field(default=64, description="tokens that one block of the pool holds")
    bytes_per_token: PositiveInt = Field(
        default=32768, description="bytes of keys and values of one token over all layers"
    )
    max_seq_len: PositiveInt = Field(
        default=1024, description="tokens one request may hold; the pool must fit at least one"
    )
    weights: SizeBytes = Field(
        default="0B",
        validate_default=True,
        description="anonymous memory really held before sizing, as loaded weights are",
    )
    transient_per_token: SizeBytes = Field(
        default="16KiB",
        validate_default=True,
        description="memory really touched and given back before sizing, for each of max_num_tokens tokens; the law "
        "subtracts it as the profiling peak",
    )
    graphs_per_sequence: SizeBytes = Field(
        default="0B",
        validate_default=True,
        description="anonymous memory really held before sizing, for each of max_batch_size sequences, as CUDA graphs are",
    )
    pool: Literal["touched", "mapped", "none"] | None = Field(
        default=None,
        description="how the pool is taken: touched commits every page, mapped only reserves addresses, none takes "
        "nothing; default: touched, and none with memory_view cuda (device memory is not the probe's to take)",
    )

    @model_validator(mode="after")
    def _pool_of_this_view(self) -> Self:
        if self.misfit:
            raise ValueError(self.misfit)
        return self

    @property
    def misfit(self) -> str | None:
        """Why pool does not go with memory_view."""
        if self.memory_view != "cuda" or self.pool in {None, "none"}:
            return None
        return f"pool {self.pool} would take main memory; with memory_view cuda it is none"

    @property
    def needs_gpu(self) -> bool:
        return self.memory_view == "cuda"


class TensorRTLLMEngine(Spec):
    """TensorRT-LLM's LLM API (PyTorch backend), with every knob pinned that moves the pool."""

    kind: Literal["tensorrt_llm"]
    max_seq_len: PositiveInt = Field(
        default=2048, description="tokens one request may hold; the pool must fit at least one"
    )
    tokens_per_block: PositiveInt = Field(default=32, description="tokens that one block of the cache holds")
    kv_dtype: Literal["auto", "fp8", "nvfp4"] = Field(
        default="auto", description="of the KV cache; auto: what the checkpoint says"
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="dummy: random weights, no weight file is read (and none fills the page cache)",
    )
    tensor_parallel_size: PositiveInt = Field(default=1, description="GPUs that share one model")
    cuda_graphs: Flag = Field(
        default=True,
        description="captured for batches up to max_batch_size, padded; they hold memory outside torch",
    )
    worker: Literal["mpi", "single_process"] = Field(
        default="mpi",
        description="mpi: the engine in a process of its own, as its users have it; single_process: in the worker's own, "
        "where the pool can be read from the manager itself",
    )
    kv_cache_manager: Literal["v1", "v2"] = Field(
        default="v1", description="decided here, since `auto` differs between versions and models"
    )
    kv_cache: SizeBytes | None = Field(
        default=None,
        description="pin the pool to these bytes (through max_tokens) instead of mapping what fits",
    )
    double: str | None = Field(
        default=None,
        description="a folder with a stand-in package tensorrt_llm, for rehearsals and tests; its numbers mean nothing, "
        "and every record says so",
    )

    @model_validator(mode="after")
    def _one_process_one_gpu(self) -> Self:
        if self.misfit:
            raise ValueError(self.misfit)
        return self

    @property
    def misfit(self) -> str | None:
        """Why worker does not go with tensor_parallel_size."""
        if self.worker == "single_process" and self.tensor_parallel_size > 1:
            return "worker single_process is one process: tensor_parallel_size must be 1"
        return None

    @property
    def needs_gpu(self) -> bool:
        return self.double is None


class FakeEngine(Spec):
    """No engine at all: allocates, hangs, crashes or exits on command. For tests; its numbers mean nothing."""

    kind: Literal["fake"]
    behaviour: Literal[
        "ok", "hang", "segfault", "exit", "raise", "infeasible", "allocate", "stop", "garbage", "eat", "burst"
    ] = Field(default="ok", description="what it does after it was started")
    only_in_arm: str | None = Field(default=None, description="misbehave in this arm only")
    allocate: SizeBytes | None = Field(
        default=None,
        description="memory it really takes, before sizing; eat: at most, step by step; burst: for 50 ms, after sizing",
    )
    hold: DurationS = Field(
        default="0s", validate_default=True, description="wait after sizing; eat: after each step of 64 MiB"
    )
    kv_cache: SizeBytes = Field(
        default="1GiB", validate_default=True, description="its made-up capacity at memory_fraction 1"
    )

    @property
    def needs_gpu(self) -> bool:
        return False

    @property
    def misfit(self) -> str | None:
        return None


AnyEngine = EmbeddedEngine | ProbeEngine | TensorRTLLMEngine | SimulatedEngine | FakeEngine
Engine = Annotated[AnyEngine, Field(discriminator="kind")]


class RandomLlama(Spec):
    """A small Llama-architecture checkpoint with random weights, made once and cached: a real loading path, no hub."""

    hidden_size: PositiveInt = Field(default=512, description="width of the residual stream")
    intermediate_size: PositiveInt = Field(default=1536, description="width of the feed-forward layers")
    layers: PositiveInt = Field(default=8, description="decoder layers; each adds to the KV bytes of a token")
    attention_heads: PositiveInt = Field(default=8, description="query heads")
    kv_heads: PositiveInt = Field(default=8, description="key-value heads; must divide attention_heads")
    head_dim: PositiveInt = Field(default=128, description="width of a head; must be even")
    vocabulary: PositiveInt = Field(default=4096, description="tokens in the vocabulary")
    seed: Seed = Field(default=0, description="of the random weights")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.attention_heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("kv_heads must divide attention_heads, and head_dim must be even")
        return self


class Model(Spec):
    path: str | None = Field(
        default=None, description="folder of a Hugging Face checkpoint (config.json, *.safetensors)"
    )
    random_llama: RandomLlama | None = Field(
        default=None, description="instead of a folder: a small checkpoint made here; {} for its defaults"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.random_llama is None):
            raise ValueError("name exactly one of path and random_llama")
        return self
