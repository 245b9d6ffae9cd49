"""One timed reading of memory counters, as the instrument writes it: the same model inside and outside, strict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from .result import Counter, Meminfo, OpenPart, Part, Seconds, Size, Word

Absent = dict[str, str]
"""What could not be read: name and reason. Never 0."""


class Cgroup(Part):
    """Memory accounting of the worker's group. usage and peak include page cache."""

    version: Literal[1, 2] | None = Field(default=None, description="cgroup version that accounts memory")
    path: str | None = Field(
        default=None, description="path of the group, as the observer's own namespace shows it"
    )
    seen_at: str | None = Field(
        default=None, description='"mount top": the path is not visible here, the mount\'s top was read'
    )
    usage_bytes: Size | None = Field(
        default=None, description="memory.usage_in_bytes or memory.current, page cache included"
    )
    peak_bytes: Size | None = Field(default=None, description="memory.max_usage_in_bytes or memory.peak")
    limit_bytes: Size | None = Field(
        default=None, description="memory.limit_in_bytes or memory.max; absent: unlimited"
    )
    anon_bytes: Size | None = Field(default=None, description="total_rss (v1) or anon (v2) of memory.stat")
    file_bytes: Size | None = Field(default=None, description="total_cache (v1) or file (v2) of memory.stat")
    stat: dict[str, Counter] | None = Field(
        default=None, description="memory.stat, all counters under the kernel's names"
    )
    events: dict[str, Counter] | None = Field(
        default=None, description="memory.oom_control (v1) or memory.events (v2)"
    )
    absent: Absent | None = Field(default=None, description="what could not be read: name and reason")


class Tree(Part):
    """Sums over the worker's process tree, from smaps_rollup."""

    processes: Size = Field(description="processes that could be read")
    rss_bytes: Size | None = Field(
        default=None, description="resident set; shared pages counted once per process"
    )
    pss_bytes: Size | None = Field(
        default=None, description="proportional set size: shared pages counted once"
    )
    pss_anon_bytes: Size | None = Field(default=None, description="anonymous part of pss_bytes")
    pss_file_bytes: Size | None = Field(default=None, description="file part of pss_bytes")
    pss_shmem_bytes: Size | None = Field(default=None, description="shared-memory part of pss_bytes")
    absent: Absent | None = Field(default=None, description="why members could not be read")


class Cuda(Part):
    free_bytes: Size = Field(description="free device memory, cudaMemGetInfo, inside")
    total_bytes: Size = Field(description="total device memory, cudaMemGetInfo, inside")
    torch_allocated_bytes: Size | None = Field(default=None, description="held by tensors, torch's allocator")


class GpuProcess(Part):
    pid: Size = Field(description="process id on the host")
    used_bytes: Size | None = Field(default=None, description="device memory it holds, where the driver says")


class Gpu(Part):
    """One device as NVML answers; a question it refuses is in `absent` (GB10 has no device memory of its own)."""

    device: Size = Field(description="NVML's index")
    memory_total_bytes: Size | None = Field(default=None, description="device memory")
    memory_used_bytes: Size | None = Field(
        default=None, description="device memory in use, the driver's own included"
    )
    temperature_celsius: Size | None = Field(default=None, description="of the chip")
    power_w: Seconds | None = Field(default=None, description="power drawn, watts")
    energy_j: Seconds | None = Field(default=None, description="energy since the driver was loaded, joules")
    sm_clock_mhz: Size | None = Field(default=None, description="clock of the multiprocessors, MHz")
    memory_clock_mhz: Size | None = Field(default=None, description="clock of the memory, MHz")
    utilization_percent: Size | None = Field(default=None, description="share of time with a kernel running")
    throttle_reasons: list[str] | None = Field(default=None, description="why the clocks are where they are")
    processes: list[GpuProcess] | None = Field(
        default=None, description="compute processes; says nothing from within a PID namespace"
    )
    absent: Absent | None = Field(default=None, description="what NVML refuses to say: name and reason")


class Observation(OpenPart):
    """One timed reading of memory counters at a named phase. An engine may add readings of its own."""

    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    phase: Word = Field(description="moment of the trial; `sizing` is when the engine reads free memory")
    monotonic_s: Seconds = Field(description="CLOCK_MONOTONIC at the start of the reading, seconds")
    cost_s: Seconds = Field(description="how long the reading took, seconds")
    meminfo: Meminfo = Field(description="/proc/meminfo, all fields, in bytes (HugePages_* are counts)")
    per_cpu_free_bytes: Size | None = Field(
        default=None,
        description="free pages in per-CPU lists, in no meminfo counter; sum of /proc/zoneinfo pagesets",
    )
    cgroup: Cgroup = Field(description="the group that accounts the process's memory")
    pressure: dict[str, Seconds] | None = Field(
        default=None,
        description="stalls for memory since boot: some_total_us, full_total_us, microseconds (PSI)",
    )
    tree: Tree | None = Field(
        default=None, description="the worker's process tree; not before and after its life"
    )
    cuda: Cuda | None = Field(default=None, description="device memory, where the engine runs on CUDA")
    gpus: list[Gpu] | None = Field(
        default=None, description="each GPU, from outside through NVML; only the host reads it"
    )
    absent: Absent | None = Field(default=None, description="what could not be read: name and reason")
