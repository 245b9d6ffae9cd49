"""result.json, written by the guest: `Result`, and whether it fits what was asked.

The guest is a stranger, so its file is read strictly. Every field has one type (true is not 1, 1.0 is not 1), an unknown
field is an error, NaN and infinity are refused, and numbers that must agree with each other do. Dictionaries are open
only where the kernel or a library chooses the names. Sizes are bytes, durations seconds, time stamps UTC. A field
that may be missing was not measured when it is missing: never 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .explain import printable, show
from .worker.protocol import PROTOCOL_VERSION

Size = Annotated[int, Field(ge=0, lt=1 << 60)]
"""Bytes, or a count: no memory has an exbibyte."""
Counter = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
"""What a kernel counter or limit can hold; -1 is "unlimited" in limits."""
Seconds = Annotated[float, Field(ge=0)]
Word = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A short text in one line."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Meminfo = dict[str, Counter]

LAW = "(total - peak) x fraction"  # worker/sizing.py; of any other law the terms are not checked
SPARE_BLOCKS = (
    4  # blocks that a tensor may hold beyond the pool: transformers keeps two that are never given out
)


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
        default=None, description="which memory counts as free: memfree, memavailable, cgroup, cuda …"
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
    peak_bytes: Size | None = Field(default=None, description="total_bytes - free_bytes + transient_bytes")
    available_bytes: Size | None = Field(default=None, description="what the law allows the pool")
    cgroup_limit_bytes: Size | None = Field(
        default=None, description="memory limit of the worker's group; null: none (view cgroup only)"
    )
    cgroup_charged_bytes: Size | None = Field(
        default=None,
        description="memory charged to the group that reclaim cannot take back (view cgroup only)",
    )
    meminfo: Meminfo | None = Field(
        default=None,
        description="/proc/meminfo at that moment, all fields, in bytes (HugePages_* are counts)",
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
        info = {"memfree": "MemFree", "memavailable": "MemAvailable"}.get(self.view or "")
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
        if self.peak_bytes is not None and self.peak_bytes != total - free + transient:
            raise ValueError("peak_bytes is not total_bytes - free_bytes + transient_bytes")
        if self.law == LAW and self.fraction is not None and self.available_bytes is not None:
            law = max(0, int((free - transient) * self.fraction))
            if self.available_bytes != law:
                raise ValueError(f"available_bytes is {self.available_bytes}, its terms give {law}")
        return self


class EngineInfo(OpenPart):
    """The engine as it named itself, with the versions and settings of the libraries under it (text or numbers)."""

    __pydantic_extra__: dict[str, str | int | float | bool | None] = Field(init=False)
    name: Word = Field(description="the engine's own name")
    version: Word = Field(description="version of the engine's library")
    fake: bool | None = Field(default=None, description="true: no engine ran, the numbers mean nothing")
    probe: bool | None = Field(
        default=None, description="true: the sizing law over real memory, no inference engine ran"
    )


class ModelInfo(Part):
    weight_bytes: Size = Field(description="bytes of all parameters as loaded")
    parameters: Size | None = Field(default=None, description="number of parameters as loaded")


class Throughput(Part):
    """The workload, measured after the pool was sized."""

    requests: Size = Field(description="requests that were finished")
    input_tokens: Size = Field(description="prompt tokens of all requests together")
    output_tokens: Size = Field(description="tokens produced by all requests together, counted")
    duration_s: Annotated[Seconds, Field(gt=0)] = Field(
        description="from the first request to the last token, in seconds"
    )
    output_throughput_tokens_per_s: Seconds = Field(description="output_tokens / duration_s")

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

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        sizing, kv = self.sizing, self.kv_cache
        if kv is None or sizing is None or sizing.law != LAW or sizing.available_bytes is None:
            return self
        if kv.bytes > sizing.available_bytes:
            raise ValueError(f"kv_cache.bytes is {kv.bytes}, the law allows {sizing.available_bytes}")
        return self


# ---- result.json: the rest --------------------------------------------------------------------------------


class RootMount(Part):
    filesystem: str = Field(description="type of the filesystem on /, as the guest's mountinfo says")
    options: str | None = Field(default=None, description="its mount options: ro or rw first")


class Mount(Part):
    source: str = Field(
        description="what is mounted: a device, a server's folder, or the filesystem's own word"
    )
    target: str = Field(description="where, as the worker's root shows it")
    type: str = Field(description="type of the filesystem")
    options: str = Field(
        description="options of the mount, then of the filesystem; folders of an overlay left out"
    )


class Evidence(Part):
    """What the worker read about where it really was, before the engine was imported."""

    pid: Size = Field(description="the worker's process id, as it sees it")
    uid: Size = Field(description="its user id")
    namespaces: dict[str, str] = Field(description="each namespace by kind, as type:[inode]")
    root: str = Field(description="device and inode of its root folder, as major:minor:inode")
    root_mount: RootMount = Field(description="what is mounted on its root")
    cgroup: list[str] = Field(description="lines of its /proc/self/cgroup")
    python: Word = Field(description="version of the interpreter")
    executable: str = Field(description="path of the interpreter inside")
    prefix: str = Field(description="its sys.prefix")
    kernel: Word = Field(description="kernel release")
    machine: Word = Field(description="hardware name, such as aarch64")
    libc: str | None = Field(description="C library and version; null where it does not say")
    limits: dict[str, Annotated[list[Counter], Field(min_length=2, max_length=2)]] = Field(
        description="resource limits by name: [soft, hard], -1 is unlimited"
    )
    status: dict[str, str] = Field(
        description="CapEff, CapBnd, NoNewPrivs, Seccomp … of /proc/self/status, as written there"
    )
    environment: dict[str, str] = Field(
        description="environment variables after the entrypoint; those that sound secret without value"
    )
    transparent_hugepages: str | None = Field(
        description="/sys/kernel/mm/transparent_hugepage/enabled, verbatim; null if unreadable"
    )
    overcommit_memory: str | None = Field(
        description="/proc/sys/vm/overcommit_memory, verbatim; null if unreadable"
    )
    swappiness: str | None = Field(
        default=None, description="/proc/sys/vm/swappiness, verbatim; null if unreadable"
    )
    shm_bytes: Size | None = Field(description="size of /dev/shm in bytes; null if there is none")
    mounts: list[Mount] | None = Field(
        default=None,
        description="what is mounted under its root, without what differs between any two mount namespaces",
    )
    docker_sockets: list[str] | None = Field(
        default=None,
        description="ways to a Docker daemon that the worker found: a socket's path or DOCKER_HOST",
    )
    bundle_sha256: Sha256 = Field(description="hash of the worker's own files, computed inside")
    libraries: list[str] = Field(
        description="shared objects that were mapped when the engine had ended, paths inside"
    )


class Failure(Part):
    """Why the engine did not finish. Whatever it measured before is kept."""

    kind: Literal["infeasible", "out_of_memory", "engine_error"] = Field(
        description="what the failure says about the configuration"
    )
    reason: Word = Field(description="a short code, such as the name of the exception")
    message: str = Field(description="the engine's own words")
    traceback: str | None = Field(default=None, description="Python traceback; null where there is none")


class Observer(Part):
    clock: Literal["CLOCK_MONOTONIC"] = Field(
        description="clock of every monotonic_s: the same inside and outside"
    )


class Result(Part):
    """result.json: what the worker says of one attempt, written last, by rename."""

    protocol_version: Annotated[int, Field(ge=PROTOCOL_VERSION, le=PROTOCOL_VERSION)] = Field(
        description="version of the protocol between host and worker"
    )
    trial_id: Word = Field(description="the trial of the request")
    attempt: Size = Field(description="the attempt of the request")
    engine: Word = Field(description="kind of engine that ran, as in the request")
    evidence: Evidence = Field(description="where the worker really was")
    measurements: Measurements = Field(description="what was measured")
    failure: Failure | None = Field(description="null: the engine ended as it should")
    observer: Observer = Field(description="how times were taken")


# ---- does it fit what was asked ---------------------------------------------------------------------------

KeyPath = tuple[str | int, ...]
Misfit = tuple[KeyPath, str]
KV_CACHE: KeyPath = ("measurements", "kv_cache")
_FAKE_MAX_SEQ_LEN = 1024  # the fake engine has no such setting; it counts in these


@dataclass(frozen=True)
class Asked:
    """What the host knows of the attempt, to hold the result against."""

    trial_id: str
    attempt: int
    engine: dict[str, Any]
    configuration: dict[str, int | float]
    workload: dict[str, Any]
    memory_bytes: int | None = (
        None  # all memory and swap of the host and its GPUs; None: unknown, or not held to it
    )


def problems(error: ValidationError) -> list[Misfit]:
    """Pydantic's findings as (path, sentence)."""
    found = []
    for each in error.errors(include_url=False):
        message = each["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if each["type"] == "extra_forbidden":
            message = "unknown field"
        elif each["type"] == "missing":
            message = "this field is missing"
        elif each["type"] != "value_error":
            message += f": got {show(each['input'])}"
        found.append((each["loc"], printable(message)))
    return found


def misfits(result: Result, asked: Asked) -> Iterator[Misfit]:
    """What a result that agrees with itself says differently from what was asked."""
    for name, told, wanted in (
        ("trial_id", result.trial_id, asked.trial_id),
        ("attempt", result.attempt, asked.attempt),
        ("engine", result.engine, asked.engine["kind"]),
    ):
        if told != wanted:
            yield (name,), f"is {show(told)}, this attempt's is {show(wanted)}"
    sizing, kv, work = (
        result.measurements.sizing,
        result.measurements.kv_cache,
        result.measurements.throughput,
    )
    fraction = asked.configuration["memory_fraction"]
    if sizing is not None and sizing.fraction not in (None, fraction):
        yield ("measurements", "sizing", "fraction"), f"is {sizing.fraction}, asked was {fraction}"
    if kv is not None:
        yield from _capacity_misfits(kv, asked)
    if work is not None:
        requests = asked.workload["requests"]
        if (work.requests, work.input_tokens) != (requests, requests * asked.workload["input_tokens"]):
            yield (
                ("measurements", "throughput"),
                f"requests and input_tokens are not those of {requests} requests",
            )
        if work.output_tokens > requests * asked.workload["output_tokens"]:
            yield ("measurements", "throughput", "output_tokens"), f"is {work.output_tokens}, more than asked"


def _capacity_misfits(kv: KvCache, asked: Asked) -> Iterator[Misfit]:
    block_tokens = asked.engine.get("tokens_per_block", kv.tokens_per_block)
    if kv.tokens_per_block != block_tokens:
        yield (*KV_CACHE, "tokens_per_block"), f"is {kv.tokens_per_block}, asked was {block_tokens}"
    longest = asked.engine.get("max_seq_len", _FAKE_MAX_SEQ_LEN)
    fitting = {
        kv.tokens // longest,
        kv.blocks // -(-longest // kv.tokens_per_block),
    }  # a block may hold two requests
    if kv.sequences not in fitting:
        yield (
            (*KV_CACHE, "sequences"),
            f"is {kv.sequences}; {kv.tokens} tokens hold {max(fitting)} of {longest}",
        )
    if asked.memory_bytes is not None and kv.bytes > asked.memory_bytes:
        yield (
            (*KV_CACHE, "bytes"),
            f"is {kv.bytes}, this host has {asked.memory_bytes} bytes of memory in all",
        )
