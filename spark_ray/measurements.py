"""What an engine measured, as it stands in result.json: `Measurements`, each part in agreement with itself.

Every field has one type (true is not 1, 1.0 is not 1), an unknown field is an error, NaN and infinity are refused.
Sizes are bytes, durations seconds. A field that may be missing was not measured when it is missing: never 0.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(ge=0, lt=1 << 60)]
"""Bytes, or a count: no memory has an exbibyte."""
Counter = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
"""What a kernel counter or limit can hold; -1 is "unlimited" in limits."""
Seconds = Annotated[float, Field(ge=0)]
Word = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A short text in one line."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Meminfo = dict[str, Counter]

LAW = (
    "(total - peak) x fraction"  # worker/sizing.py; of a law that is not named here the terms are not checked
)
LAW_TRT_LLM = (
    "(total - peak + temporary KV) x fraction"  # worker/tensorrt_llm_law.py; terms as printed: rounded
)
LAW_VLLM = "total x fraction - peak"  # vLLM's and SGLang's
SIMULATED = "simulated: "
"""Begins the law and the view of what no engine and no memory had a part in; the rest of them is what was simulated."""
SPARE_BLOCKS = (
    4  # blocks that a tensor may hold beyond the pool: transformers keeps two that are never given out
)


def law_bytes(law: str, total: int, free: int, transient: int, fraction: float) -> int | None:
    """What a law gives for exact terms; None for one whose terms are not checked."""
    law = law.removeprefix(SIMULATED)
    if law == LAW:
        return max(0, int((free - transient) * fraction))
    if law == LAW_VLLM:
        return max(0, int(total * fraction) - (total - free + transient))
    return None


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class OpenPart(Part):
    """With further fields, named by an engine or a library."""

    model_config = ConfigDict(extra="allow")


# ---- result.json: measurements ----------------------------------------------------------------------------


class SecondSource(Part):
    bytes: Size = Field(
        description="size of the pool by another way of asking; within one block of kv_cache.bytes"
    )
    source: Word = Field(description="where this second number was read")


class KvCache(Part):
    """The KV capacity as the engine has it, after allocation. Capacity exists only with all of these and a source."""

    bytes: Size = Field(description="size of the pool in bytes: blocks x tokens_per_block x bytes_per_token")
    blocks: Size = Field(description="blocks (pages) of the pool that requests can use")
    tokens: Size = Field(description="tokens the pool can hold: blocks x tokens_per_block")
    tokens_per_block: Annotated[Size, Field(ge=1)] = Field(description="tokens in one block")
    bytes_per_token: Annotated[Size, Field(ge=1)] = Field(
        description="bytes of keys and values of one token over all layers"
    )
    sequences: Size = Field(description="requests of the longest allowed length that fit at once")
    source: Word = Field(description="where the number of blocks was read: the engine's object or message")
    tensor_bytes: Size | None = Field(
        default=None,
        description="bytes of the tensor behind the pool; may hold a few blocks more than requests can use",
    )
    second_source: SecondSource | None = Field(
        default=None, description="the same capacity, asked another way"
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.tokens != self.blocks * self.tokens_per_block:
            raise ValueError("tokens is not blocks x tokens_per_block")
        if self.bytes != self.tokens * self.bytes_per_token:
            raise ValueError("bytes is not tokens x bytes_per_token")
        if self.sequences > self.tokens:
            raise ValueError("sequences is more than tokens")
        block = self.tokens_per_block * self.bytes_per_token
        tensor, second = self.tensor_bytes, self.second_source
        if tensor is not None and not 0 <= tensor - self.bytes <= SPARE_BLOCKS * block:
            raise ValueError(f"tensor_bytes {tensor} does not fit a pool of {self.bytes} bytes")
        if second is not None and abs(second.bytes - self.bytes) > block:
            raise ValueError(f"second_source has {second.bytes} bytes, the first {self.bytes}")
        return self


class Sizing(Part):
    """The terms from which the engine sized its pool, read at the sizing moment."""

    law: Word = Field(description="the formula, in words")
    view: Word | None = Field(
        default=None,
        description="which memory counts as free: memfree, memavailable, cgroup, cuda …; `simulated: ` in front: of no real one",
    )
    fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="share of the free memory that the pool may take; as in configuration.memory_fraction",
    )
    total_bytes: Size | None = Field(default=None, description="total memory in that view")
    free_bytes: Size | None = Field(
        default=None, description="free memory in that view, as the engine read it"
    )
    transient_bytes: Size | None = Field(
        default=None, description="what the profiling pass needed for a moment and gave back"
    )
    temporary_kv_bytes: Size | None = Field(
        default=None,
        description="the profiling pass's own KV cache, in the peak and given back (TensorRT-LLM)",
    )
    peak_bytes: Size | None = Field(default=None, description="total_bytes - free_bytes + transient_bytes")
    available_bytes: Size | None = Field(default=None, description="what the law allows the pool")
    final_available_bytes: Size | None = Field(
        default=None,
        description="fraction x what was free when the pool was built: the engine takes the smaller of the two (TensorRT-LLM)",
    )
    resolution_bytes: Size | None = Field(
        default=None,
        description="each term is rounded to this step, as printed by the engine; null: terms are exact",
    )
    law_residual_bytes: Counter | None = Field(
        default=None, description="available_bytes less what the terms give by the law"
    )
    read_from: Word | None = Field(
        default=None,
        description="where the terms were read: the engine's log or its objects; null: by the worker itself",
    )
    cgroup_limit_bytes: Size | None = Field(
        default=None, description="memory limit of the worker's group; null: none (view cgroup only)"
    )
    cgroup_charged_bytes: Size | None = Field(
        default=None,
        description="memory charged to the group that reclaim cannot take back (view cgroup only)",
    )
    meminfo: Meminfo | None = Field(
        default=None,
        description="/proc/meminfo at that moment, all fields, in bytes (HugePages_* are counts); of TensorRT-LLM when the host looked (engine.sizing_moment), of a simulated engine its machine's",
    )
    per_cpu_free_bytes: Size | None = Field(
        default=None,
        description="free pages in per-CPU lists, in no meminfo counter, read right after that meminfo",
    )
    terms: dict[str, Size] | None = Field(
        default=None, description="further terms in the engine's own words, in bytes: name to size"
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        total, free, transient = self.total_bytes, self.free_bytes, self.transient_bytes
        info = {"memfree": "MemFree", "memavailable": "MemAvailable"}.get(
            (self.view or "").removeprefix(SIMULATED)
        )
        if (
            info
            and self.meminfo is not None
            and (self.meminfo.get("MemTotal"), self.meminfo.get(info)) != (total, free)
        ):
            raise ValueError(f"total_bytes and free_bytes are not MemTotal and {info} of its meminfo")
        if total is not None and free is not None and free > total:
            raise ValueError("free_bytes is more than total_bytes")
        if total is None or free is None or transient is None:
            return self
        slack = 2 * (self.resolution_bytes or 0)  # four rounded terms, each half a step off at most
        if self.peak_bytes is not None and abs(self.peak_bytes - (total - free + transient)) > slack:
            raise ValueError("peak_bytes is not total_bytes - free_bytes + transient_bytes")
        if self.fraction is not None and self.available_bytes is not None:
            law = law_bytes(self.law, total, free, transient, self.fraction)
            if law is not None and self.available_bytes != law:
                raise ValueError(f"available_bytes is {self.available_bytes}, its terms give {law}")
        return self


class EngineInfo(OpenPart):
    """The engine as it named itself, with the versions and settings of the libraries under it (text or numbers)."""

    __pydantic_extra__: dict[str, str | int | float | bool | None] = Field(init=False)
    name: Word = Field(description="the engine's own name")
    version: Word = Field(description="version of the engine's library")
    fake: bool | None = Field(default=None, description="true: no engine ran, the numbers mean nothing")
    engine_is_double: bool | None = Field(
        default=None,
        description="true: a test double stood in for the engine's library, the numbers are no measurements",
    )
    simulated: bool | None = Field(
        default=None, description="true: no engine ran and no memory was read, a formula made the numbers"
    )
    probe: bool | None = Field(
        default=None, description="true: the sizing law over real memory, no inference engine ran"
    )


class ModelInfo(Part):
    weight_bytes: Size | None = Field(
        default=None, description="bytes of all parameters as loaded; null: the engine did not say"
    )
    parameters: Size | None = Field(default=None, description="number of parameters as loaded")
    resolution_bytes: Size | None = Field(
        default=None, description="weight_bytes is rounded to this step, as printed by the engine"
    )
    disk_bytes: Size | None = Field(
        default=None,
        description="bytes of all tensors in the weight files of the model's folder, by their headers",
    )
    file_bytes: Size | None = Field(default=None, description="size of those files, headers included")
    config_sha256: Sha256 | None = Field(default=None, description="hash of the model's config.json")
    resolved_path: str | None = Field(
        default=None, description="the model's folder with every link followed, as the worker sees it"
    )
    architecture: Word | None = Field(default=None, description="first of config.json's architectures")
    bytes_per_token: Size | None = Field(
        default=None,
        description="KV bytes of one token on one GPU over all layers, by config.json; null where its attention is not known here",
    )
    absent: dict[str, str] | None = Field(
        default=None, description="what the model's folder does not say, and why"
    )


class Spread(Part):
    """A quantity over many requests or tokens, in seconds. A percentile is the smallest value that so many are not above."""

    n: Annotated[Size, Field(ge=1)] = Field(description="how many values")
    mean_s: Seconds = Field(description="their mean")
    p50_s: Seconds = Field(description="median")
    p90_s: Seconds = Field(description="90th percentile")
    p99_s: Seconds = Field(description="99th percentile")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.p50_s <= self.p90_s <= self.p99_s:
            raise ValueError("its percentiles are not in order")
        return self


class Latency(Part):
    """What a streaming client sees."""

    first_token: Spread = Field(description="from sending a request to its first token")
    inter_token: Spread | None = Field(
        default=None, description="between two tokens of one request; null: one token each"
    )
    per_output_token: Spread | None = Field(
        default=None,
        description="mean time between tokens of each request, over requests: trtllm-bench reports this instead",
    )


class Matmul(Part):
    """The control that uses no engine: a square matrix product, repeated."""

    size: Annotated[Size, Field(ge=1)] = Field(description="rows and columns")
    library: Word = Field(description="what multiplied: torch or numpy, with version")
    device: Word = Field(description="where: cpu or the GPU's name")
    dtype: Word = Field(description="type of the elements")
    durations_s: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(
        description="of each run, after one that is not counted"
    )
    median_flop_per_s: Seconds = Field(description="2 x size^3 / median duration")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        law = 2 * self.size**3 / statistics.median(self.durations_s)
        if abs(self.median_flop_per_s - law) > 1e-6 * law:
            raise ValueError("median_flop_per_s is not 2 x size^3 / median duration")
        return self


class Throughput(Part):
    """The workload, measured after the pool was sized."""

    requests: Size = Field(description="requests that were finished")
    input_tokens: Size = Field(description="prompt tokens of all requests together")
    output_tokens: Size = Field(description="tokens produced by all requests together, counted")
    duration_s: Annotated[Seconds, Field(gt=0)] = Field(
        description="from the first request to the last token, in seconds"
    )
    output_throughput_tokens_per_s: Seconds = Field(description="output_tokens / duration_s")
    source: Word | None = Field(default=None, description="who measured, when not the worker: trtllm-bench")
    latency: Latency | None = Field(default=None, description="with workload.streaming")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (
            abs(self.output_throughput_tokens_per_s * self.duration_s - self.output_tokens)
            > 1e-6 * self.output_tokens
        ):
            raise ValueError("output_throughput_tokens_per_s is not output_tokens / duration_s")
        return self


class Measurements(Part):
    """What the engine measured before it ended; each part exists from its phase on."""

    engine: EngineInfo | None = Field(
        default=None, description="name and versions; from phase after_import on"
    )
    model: ModelInfo | None = Field(default=None, description="what was loaded; from after_load on")
    sizing: Sizing | None = Field(default=None, description="the terms of the pool's size; from sizing on")
    kv_cache: KvCache | None = Field(default=None, description="the KV capacity; from after_kv on")
    throughput: Throughput | None = Field(
        default=None, description="the workload; absent when it has no requests"
    )
    matmul: Matmul | None = Field(default=None, description="the matrix product, with workload.matmul")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        sizing, kv = self.sizing, self.kv_cache
        if kv is None or sizing is None or sizing.available_bytes is None:
            return self
        if sizing.law.removeprefix(SIMULATED) not in {LAW, LAW_VLLM}:
            return self
        if kv.bytes > sizing.available_bytes:
            raise ValueError(f"kv_cache.bytes is {kv.bytes}, the law allows {sizing.available_bytes}")
        return self
