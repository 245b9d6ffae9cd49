"""result.json, written by the guest: `Result`, and whether it fits what was asked.

The guest is a stranger, so its file is read strictly. Every field has one type (true is not 1, 1.0 is not 1), an unknown
field is an error, NaN and infinity are refused, and numbers that must agree with each other do. Dictionaries are open
only where the kernel or a library chooses the names. Sizes are bytes, durations seconds, time stamps UTC. A field
that may be missing was not measured when it is missing: never 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from .explain import printable, show
from .measurements import SIMULATED, Counter, KvCache, Measurements, Part, Sha256, Size, Word
from .search_spec import Configuration
from .worker.protocol import PROTOCOL_VERSION

# ---- result.json --------------------------------------------------------------------------------


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
    configuration: Configuration
    workload: dict[str, Any]
    memory_bytes: int | None = (
        None  # all that the engine can use: of the GPUs, or memory and swap; None: unknown, or not held to it
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
    yield from _mark_misfits(result.measurements, asked.engine)
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
    yield from _workload_misfits(result.measurements, asked.workload)
    if result.failure is None:
        yield from _unfinished(result.measurements, asked)


def _mark_misfits(found: Measurements, engine: dict[str, Any]) -> Iterator[Misfit]:
    """Nothing that a double or a formula made may come without its mark, and no real engine bears it."""
    numbers = any((found.engine, found.model, found.sizing, found.kv_cache, found.throughput))
    for mark, wanted, asked in (
        ("engine_is_double", engine.get("double") is not None, "engine.double was {}set"),
        ("simulated", engine["kind"] == "simulated", "the engine is {}simulated"),
    ):
        marked = found.engine is not None and getattr(found.engine, mark) is True
        if numbers and marked != wanted:
            said = f"is {'' if marked else 'not '}true, {asked.format('' if wanted else 'not ')}"
            yield ("measurements", "engine", mark), said
    if found.sizing is not None and found.sizing.law.startswith(SIMULATED) != (engine["kind"] == "simulated"):
        yield ("measurements", "sizing", "law"), f"is {show(found.sizing.law)} of an engine {engine['kind']}"


_GENERATING = frozenset({"embedded", "tensorrt_llm"})  # the other engines serve no requests


def _unfinished(found: Measurements, asked: Asked) -> Iterator[Misfit]:
    """What a worker that met no failure must have measured, and has not; or did, unasked."""
    work, asked_work = found.throughput, asked.workload
    pairs: list[tuple[str, Part | None, object]] = [("matmul", found.matmul, asked_work.get("matmul"))]
    if asked.engine["kind"] in _GENERATING:
        pairs.append(("throughput", work, asked_work["requests"]))
    for name, measured, wanted in pairs:
        if (measured is not None) != bool(wanted):
            yield ("measurements", name), f"is {'missing' if wanted else 'there, and was not asked for'}"
    if work is not None and work.output_tokens < asked_work["requests"] * asked_work["output_tokens"]:
        yield ("measurements", "throughput", "output_tokens"), f"is {work.output_tokens}, less than asked"


def _workload_misfits(found: Measurements, asked: dict[str, Any]) -> Iterator[Misfit]:
    work, product = found.throughput, found.matmul
    if work is not None:
        tool = asked.get("tool", "worker")
        if (work.source == "trtllm-bench") != (tool == "trtllm_bench"):
            yield (
                ("measurements", "throughput", "source"),
                f"is {show(work.source)}, workload.tool was {tool}",
            )
        if (work.latency is not None) != asked.get("streaming", False):
            said = "there" if work.latency is not None else "missing"
            yield ("measurements", "throughput", "latency"), f"is {said}; it goes with workload.streaming"
    wanted = asked.get("matmul") or {}
    if product is not None and (product.size, len(product.durations_s)) != (
        wanted.get("size"),
        wanted.get("runs"),
    ):
        yield (
            ("measurements", "matmul"),
            f"is {len(product.durations_s)} of {product.size}, asked was {show(wanted)}",
        )


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
