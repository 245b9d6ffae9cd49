"""One timed reading of memory counters, as the instrument writes it: the same model inside and outside, strict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from .measurements import Counter, Meminfo, OpenPart, Part, Seconds, Size, Word

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
    effective_limit_bytes: Size | None = Field(
        default=None,
        description="smallest limit of the group and all groups above it: what bounds it; absent: unlimited",
    )
    effective_limit_at: str | None = Field(
        default=None,
        description="the group whose limit that is (v2), or hierarchical_memory_limit (v1 does not say whose)",
    )
    swap_usage_bytes: Size | None = Field(
        default=None, description="total_swap of memory.stat (v1) or memory.swap.current"
    )
    swap_limit_bytes: Size | None = Field(
        default=None, description="memory.swap.max (v2); absent: unlimited, or v1"
    )
    memory_and_swap_limit_bytes: Size | None = Field(
        default=None, description="memory.memsw.limit_in_bytes (v1 limits both together)"
    )
    anon_bytes: Size | None = Field(default=None, description="total_rss (v1) or anon (v2) of memory.stat")
    file_bytes: Size | None = Field(
        default=None, description="total_cache (v1) or file (v2) of memory.stat, shared memory included"
    )
    shmem_bytes: Size | None = Field(
        default=None, description="total_shmem (v1) or shmem (v2) of memory.stat"
    )
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


class Steadiness(Part):
    """meminfo and the per-CPU lists are read until two readings of MemFree plus the lists agree."""

    tries: Size = Field(description="readings that were made, three at most; the last one is kept")
    spread_bytes: Size = Field(
        description="largest difference between the two that agreed, or between all where none did"
    )
    agreed: bool = Field(description="whether two in a row were within 1 MiB")


class Batches(Part):
    """The most that counters may lag behind: each CPU keeps changes up to a threshold to itself (/proc/zoneinfo)."""

    free_bytes: Size = Field(description="of MemFree: thresholds of all zones and CPUs")
    counter_bytes: Size = Field(
        description="of any other counter of pages: the largest threshold of a node, over its CPUs"
    )


class SwapTraffic(Part):
    in_bytes: Size = Field(description="read from swap since boot: pswpin of /proc/vmstat")
    out_bytes: Size = Field(description="written to swap since boot: pswpout")


class Residency(Part):
    """What of files is in the page cache."""

    files: Size = Field(description="files that could be asked")
    size_bytes: Size | None = Field(default=None, description="their size")
    resident_bytes: Size | None = Field(default=None, description="of it in the page cache, in whole pages")
    source: Word | None = Field(default=None, description="cachestat, mincore, or both with a plus sign")
    absent: Absent | None = Field(default=None, description="what could not be asked: path and reason")


class Cuda(Part):
    free_bytes: Size = Field(description="free device memory, cudaMemGetInfo, inside")
    total_bytes: Size = Field(description="total device memory, cudaMemGetInfo, inside")
    torch_allocated_bytes: Size | None = Field(default=None, description="held by tensors, torch's allocator")


class GpuProcess(Part):
    pid: Size = Field(description="process id on the host")
    used_bytes: Size | None = Field(default=None, description="device memory it holds, where the driver says")
    own: bool | None = Field(default=None, description="true: of this attempt, its engine's processes too")


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
    max_sm_clock_mhz: Size | None = Field(
        default=None, description="highest clock the multiprocessors may reach, MHz"
    )
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
    steadiness: Steadiness | None = Field(
        default=None, description="how still the counters were while they were read"
    )
    batches: Batches | None = Field(
        default=None,
        description="how far the kernel's counters may lag behind; absent: zoneinfo does not say",
    )
    cgroup: Cgroup = Field(description="the group that accounts the process's memory")
    pressure: dict[str, Seconds] | None = Field(
        default=None,
        description="stalls for memory since boot: some_total_us, full_total_us, microseconds (PSI)",
    )
    swap_traffic: SwapTraffic | None = Field(default=None, description="swapping of the whole host")
    model_files: Residency | None = Field(
        default=None,
        description="the model's files in the page cache; inside, at after_load, sizing and end",
    )
    tree: Tree | None = Field(
        default=None, description="the worker's process tree; not before and after its life"
    )
    cuda: Cuda | None = Field(default=None, description="device memory, where the engine runs on CUDA")
    gpus: list[Gpu] | None = Field(
        default=None, description="each GPU, from outside through NVML; only the host reads it"
    )
    absent: Absent | None = Field(default=None, description="what could not be read: name and reason")


# ---- observations balanced: see ledger.py -----------------------------------------------------------------


class Quantity(Part):
    """One quantity that more than one source tells: all are kept, one is used."""

    name: Word = Field(description="what is told twice")
    values: dict[str, int] = Field(description="bytes by source")
    used: Word = Field(description="the source that is used")
    why: str = Field(description="why that one, and how the others may differ")
    difference_bytes: int = Field(description="largest less smallest value")
    bar_bytes: int | None = Field(
        default=None, description="how far they may be apart; null: they count different things on purpose"
    )
    agree: bool | None = Field(
        default=None, description="whether the difference is within the bar; null: there is no bar"
    )


class Ledger(Part):
    """One observation balanced: total_bytes = sum of parts + residual_bytes, exactly."""

    phase: Word = Field(description="phase of the host's observation it is made from")
    total_bytes: int | None = Field(default=None, description="MemTotal; null: not in meminfo")
    parts: dict[str, int] = Field(
        description="disjoint parts by name, in bytes: free, per_cpu_free, page_cache, shared_memory, anonymous, kernel, huge_pages"
    )
    residual_bytes: int | None = Field(
        default=None,
        description="total_bytes less all parts: memory in no counter of the kernel; may be negative",
    )
    driver_bytes: int | None = Field(
        default=None,
        description="the same number, on unified memory only: what the GPU driver holds is in no counter",
    )
    error_bytes: int = Field(description="error bar of residual_bytes: sum of error_terms")
    error_terms: dict[str, int] = Field(
        description="spread: of the reading; batches: most that counters lag behind; swap_cache: may be counted twice; "
        "in_flight: pages that are on a reclaim list and of no kind, or the reverse"
    )
    quantities: list[Quantity] = Field(description="what more than one source tells")
    notes: list[str] = Field(description="what limits this ledger, in words")
    absent: Absent | None = Field(
        default=None, description="what could not be read and is in the residual therefore: name and reason"
    )
