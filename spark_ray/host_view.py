"""What a record holds of the host around an attempt: what was waited for, sampled, counted, and guarded against."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from .measurements import Part, Seconds, Size, Word

Stamp = Annotated[AwareDatetime, Field(strict=False)]  # written as ISO 8601 text


class Wait(Part):
    reached: bool = Field(description="whether memory came back before the attempt")
    waited_s: Seconds = Field(description="how long that took, seconds")
    wanted_bytes: int = Field(
        description="MemAvailable plus per-CPU lists that were wanted: the last level less limits.memory_tolerance"
    )
    found_bytes: Size = Field(description="what was there")


class Peak(Part):
    """The kernel's own high-water marks: what lies between two samples is in them."""

    cgroup_bytes: Size | None = Field(
        default=None, description="largest usage of the guest's own group, page cache included"
    )
    cgroup_source: Word | None = Field(default=None, description="the counter it was read from")
    worker_bytes: Size | None = Field(
        default=None, description="largest resident set of the worker's process, its children not included"
    )
    worker_source: Word | None = Field(default=None, description="the counter it was read from")
    absent: dict[str, str] | None = Field(
        default=None, description="which cannot tell, and why: a native worker shares its group with others"
    )


class Samples(Part):
    """The time series beside the record: how densely was looked, and what that cost."""

    count: Size = Field(description="rows in samples.json")
    gpu_count: Size = Field(
        default=0, description="rows of GPU counters in samples.json: one per device every 200 ms"
    )
    interval_s: Seconds | None = Field(
        default=None, description="median time between two rows, seconds: 0.045 is meant"
    )
    longest_gap_s: Seconds | None = Field(default=None, description="longest time between two rows, seconds")
    cpu_s: Seconds | None = Field(default=None, description="CPU time of the sampling thread, seconds")
    core_share: Seconds | None = Field(
        default=None, description="cpu_s over the time sampled: share of one core"
    )
    lowest_mem_available_bytes: Size | None = Field(
        default=None, description="smallest MemAvailable of all rows"
    )
    peak: Peak | None = Field(default=None, description="what catches a peak that no sample saw")
    absent: dict[str, str] | None = Field(default=None, description="why nothing was sampled")


class ForeignProcess(Part):
    """A compute process on a GPU that is neither ours nor of this run."""

    pid: Size = Field(description="process id on the host")
    name: str = Field(description="its name")
    device: Size = Field(description="NVML's index of the GPU")
    used_bytes: Size | None = Field(default=None, description="device memory it holds, where the driver says")


class GateCondition(Part):
    reached: bool = Field(description="whether it held when the wait was over")
    waited_s: Seconds = Field(description="how long until it held, seconds")


class GateTemperature(GateCondition):
    wanted_celsius: Size = Field(description="limits.gate.temperature_celsius")
    found_celsius: list[Size] = Field(description="of each GPU that says it, when the wait was over")


class GateClock(GateCondition):
    wanted_mhz: Size = Field(description="limits.gate.sm_clock_mhz")
    found_mhz: list[Size] = Field(description="clock of each GPU; low and not capped is idle, and reached")
    capped_by: list[str] = Field(description="throttle reasons that hold one of them below")


class GateForeign(GateCondition):
    wanted: Literal["wait", "accept"] = Field(description="limits.gate.foreign_gpu_processes")
    found: list[ForeignProcess] = Field(description="who computed on a GPU when the wait was over")


class Gate(Part):
    """What was waited for beside memory, before an attempt."""

    reached: bool | None = Field(description="whether all of it held at one moment; null: nothing to look at")
    waited_s: Seconds = Field(description="how long the wait was, seconds")
    temperature: GateTemperature | None = Field(default=None, description="every GPU cool enough")
    sm_clock: GateClock | None = Field(default=None, description="no GPU's clock capped")
    foreign_gpu_processes: GateForeign | None = Field(default=None, description="nobody else on a GPU")
    unmet: str | None = Field(default=None, description="what did not hold, in words")
    absent: dict[str, str] | None = Field(default=None, description="what was not looked at, and why")


class Guard(Part):
    """What happened on the host while the guest ran; empty when nothing was executed."""

    watched_s: Seconds | None = Field(default=None, description="how long was counted, seconds")
    swapped_bytes: Size | None = Field(default=None, description="pages swapped in and out, in bytes")
    stalled_share: Seconds | None = Field(
        default=None,
        description="share of the time in which some task waited for memory (PSI), the guest's too",
    )
    throttled_share: Seconds | None = Field(
        default=None, description="share of samples slowed for heat or power, of the worst GPU"
    )
    throttle_reasons: dict[str, float] | None = Field(default=None, description="the same by reason")
    busy_sm_clock_mhz: Seconds | None = Field(
        default=None, description="median clock of the samples with a kernel running, of the slowest GPU, MHz"
    )
    foreign_gpu_processes: list[ForeignProcess] | None = Field(
        default=None, description="who else computed on a GPU, looked for every second"
    )
    absent: dict[str, str] | None = Field(default=None, description="what could not be counted, and why")


class Killed(Part):
    pid: Size = Field(description="process id on the host")
    name: str = Field(description="its name")
    part: Literal["guest", "helper"] = Field(description="guest: its tree or group; helper: a ballast")


class Fired(Part):
    at: Stamp = Field(description="when; UTC, ISO 8601")
    available_bytes: Size = Field(description="MemAvailable that it saw")
    killed: list[Killed] = Field(description="what it killed, in this order")


class Watchdog(Part):
    """The process that kills the guest before the host runs out of memory."""

    threshold_bytes: Size = Field(description="limits.watchdog")
    protections: dict[str, bool | str] = Field(
        description="true, or why not: cgroup (in no memory group but the root), oom_score (-1000), priority (nice -10), "
        "mlock (its memory cannot be paged out)"
    )
    fired: Fired | None = Field(description="null: it had no reason to")
    replaced: Size = Field(description="how often it ended and was replaced meanwhile")
    looks: Size | None = Field(
        default=None, description="how often it read MemAvailable; null: it did not say"
    )
    longest_gap_s: Seconds | None = Field(default=None, description="longest time between two looks, seconds")
    cpu_s: Seconds | None = Field(default=None, description="its CPU time, seconds")


class Plausibility(Part):
    """What was measured, held against what the model that was named and the node allow: model, weights, footprint, throughput."""

    held: list[Word] = Field(description="bounds that were applied and hold")
    violated: dict[str, str] = Field(
        description="bounds that do not hold, and how; then the trial has failed"
    )
    not_applied: dict[str, str] = Field(description="bounds that could not be applied, and why")


class Warming(Part):
    """An execution that is not measured, which filled the compile cache; its files are in `warming/`."""

    duration_s: Seconds = Field(description="how long it took, seconds")
    exit_code: Size | None = Field(description="exit status of its guest; null: unknown")
    stopped_by: Literal["deadline", "watchdog", "interrupt"] | None = Field(
        description="what of ours ended it; null: nothing"
    )
    failure: str | None = Field(description="why it did not end well; null: it did")
