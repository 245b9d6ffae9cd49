"""What an experiment demands of its host: the state set before an attempt, and what is waited for, counted and tolerated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from .spec import DurationS, Flag, Fraction, PositiveInt, SizeBytes, Spec, shape


class Fill(Spec):
    fill: SizeBytes = Field(description="page cache to hold, filled right before the worker starts")


PageCache = Annotated[
    Annotated[Literal["drop", "keep", "advise"], Tag("value")] | Annotated[Fill, Tag("mapping")],
    Discriminator(lambda value: "mapping" if shape(value) == "mapping" else "value"),
]


class Share(Spec):
    share: Fraction = Field(description="of the memory that is free right before the worker starts")


Ballast = Annotated[
    Annotated[SizeBytes, Tag("value")] | Annotated[Share, Tag("mapping")],
    Discriminator(lambda value: "mapping" if shape(value) == "mapping" else "value"),
]


class Treatment(Spec):
    """A state of the host, set and verified before each attempt. A key left out takes the strongest this user may."""

    page_cache: PageCache | None = Field(
        default=None,
        description="drop all of it (root), advise the files known to this tool away, keep it as it is, or hold "
        "a fill of a given size on top; default: drop as root, else advise and a warning",
    )
    per_cpu_pages: Literal["as_is", "drained"] | None = Field(
        default=None,
        description="free pages held in per-CPU lists, invisible to MemFree; default: drained as root where the "
        "engine waits for the host (TensorRT-LLM: worker single_process only), else as_is. "
        "drained: before the start, and again right before the engine reads free memory",
    )
    compile_cache: Literal["cold", "warm"] = Field(
        default="cold",
        description="compiled kernels: cold, an empty cache in every attempt; warm, one cache by arm, filled by an "
        "execution that is not measured",
    )
    swap: Literal["as_is", "require_off"] = Field(
        default="as_is", description="require_off: refuse to run while the host has swap space"
    )
    ballast: Ballast | None = Field(
        default=None,
        description="anonymous memory held by another process outside the environment, as a size or {share: 0.03}: a "
        "cause whose effect is known",
    )


class Gate(Spec):
    """What an attempt waits for beside memory; what was reached is on record, and what was not makes it disturbed."""

    longest: DurationS = Field(
        default="5min", validate_default=True, description="longest wait for all of it"
    )
    temperature_celsius: PositiveInt | None = Field(
        default=75, description="every GPU at most this warm; null: not waited for"
    )
    sm_clock_mhz: PositiveInt | None = Field(
        default=None,
        description="every GPU able to reach this clock: none of its throttle reasons may cap it below",
    )
    foreign_gpu_processes: Literal["wait", "accept"] = Field(
        default="wait",
        description="compute processes of others on a GPU: wait until they are gone, or accept them",
    )


class Guard(Spec):
    """What may happen on the host while a worker runs. All of it is counted; beyond a bound the attempt is disturbed."""

    swapped: SizeBytes | None = Field(
        default=None, description="pages swapped in and out together; null: counted only"
    )
    stalled: Fraction | None = Field(
        default=None,
        description="share of the attempt in which some task waited for memory (PSI); null: counted only",
    )
    throttled: Fraction | None = Field(
        default=None, description="share of GPU samples slowed for heat or power; null: counted only"
    )
    sm_clock_mhz: PositiveInt | None = Field(
        default=None, description="median clock of GPU samples under load, at least; null: counted only"
    )
    foreign_gpu_processes: Literal["disturb", "count"] = Field(
        default="disturb", description="what a foreign compute process on a GPU does to the attempt"
    )


class Limits(Spec):
    trial_timeout: DurationS = Field(
        default="10min", gt=0, validate_default=True, description="a trial that takes longer is killed"
    )
    expected_trial: DurationS | None = Field(
        default=None, description="how long one trial takes, for the plan's estimate"
    )
    memory_wait: DurationS = Field(
        default="60s",
        validate_default=True,
        description="longest wait for memory to come back before an attempt",
    )
    memory_tolerance: SizeBytes = Field(
        default="512MiB", validate_default=True, description="how far below the baseline counts as come back"
    )
    cache_tolerance: SizeBytes = Field(
        default="2GiB",
        validate_default=True,
        description="page cache at the sizing moment that neither the treatment, nor the model's files, nor files mapped "
        "by the worker explain; more is disturbed (page_cache drop, advise and fill)",
    )
    gate: Gate = Field(
        default_factory=Gate, description="what is waited for before an attempt, beside memory"
    )
    guard: Guard = Field(default_factory=Guard, description="what is counted and tolerated during an attempt")
    sampling: Flag = Field(
        default=True,
        description="cheap counters 20 times a second between phases; false: to see what that costs",
    )
    block_attempts: PositiveInt = Field(
        default=3, description="how often a disturbed block is executed before it is given up"
    )
    failed_share: Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)] = Field(
        default=0.2, description="failed trials beyond this: exit 4"
    )
    watchdog: SizeBytes = Field(
        default="1GiB",
        validate_default=True,
        description="MemAvailable below this kills the guest and stops the run",
    )
