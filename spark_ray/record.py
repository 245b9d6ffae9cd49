"""What record.json holds: `Record`, every field with its meaning, unit and source; the reference of records is made from it.

At run time only `observation.Observation` is used, for what a guest observed: the host writes records, `store.read_record` reads them
tolerantly (also those of an older program), and tests hold that what is written is what is described here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from .host_view import Gate, Guard, Plausibility, Samples, Wait, Warming, Watchdog
from .measurements import Part, Seconds, Sha256, Size, Word
from .observation import Ledger, Observation
from .outcome import OutcomeKind
from .result import Result
from .search_spec import Configuration

__all__ = ["Observation", "Record", "Result"]

Stamp = Annotated[AwareDatetime, Field(strict=False)]  # written as ISO 8601 text


# ---- what the host saw ------------------------------------------------------------------------------------


class HostIdentity(Part):
    root: str = Field(description="device and inode of the host's root folder, as major:minor:inode")
    namespaces: dict[str, str] = Field(description="the launcher's own namespaces by kind, as type:[inode]")


class Outside(Part):
    """The live worker seen from outside when it said `ready`; empty when the host could not look."""

    pid: Size | None = Field(
        default=None, description="process started: the supervisor, or what waits for it"
    )
    container_id: Word | None = Field(default=None, description="the container (docker, podman)")
    worker_pid: Size | None = Field(default=None, description="process id of the worker on the host")
    cgroup: list[str] | None = Field(default=None, description="lines of its /proc/PID/cgroup")
    namespaces: dict[str, str] | None = Field(
        default=None, description="its namespaces by kind, as type:[inode]"
    )
    host: HostIdentity | None = Field(default=None, description="the host's own, to compare with")
    root: str | None = Field(
        default=None, description="device and inode of its root; absent without the right to look"
    )
    expected_root: str | None = Field(default=None, description="the same of the rootfs folder")
    root_filesystem: str | None = Field(default=None, description="type of the file system that is its root")
    memory_group: str | None = Field(default=None, description="path of its memory cgroup")
    launcher_memory_group: str | None = Field(default=None, description="the same of the launcher")
    group_limit_bytes: Size | None = Field(
        default=None,
        description="limit of its own memory cgroup, read back; null: none (isolated, docker, podman)",
    )


class EffectiveFill(Part):
    fill_bytes: Size = Field(description="page cache to hold, in bytes")


class EffectiveBallast(Part):
    """By size or by share."""

    size_bytes: Size | None = Field(default=None, description="memory to hold, in bytes")
    share: float | None = Field(default=None, description="of the memory that is free before the start")


class Drain(Part):
    """What draining the per-CPU lists did."""

    before_bytes: Size = Field(description="free pages in the lists before")
    after_bytes: Size = Field(description="and afterwards")
    rounds: Size = Field(description="rounds over all CPUs")
    duration_s: Seconds = Field(description="how long it took, seconds")


class Treatment(Part):
    """The host state asked for, with every key set."""

    page_cache: Literal["drop", "keep", "advise"] | EffectiveFill = Field(
        description="page cache before the start"
    )
    per_cpu_pages: Literal["drained", "as_is"] = Field(
        description="free pages in per-CPU lists before the start, and again before the engine reads"
    )
    compile_cache: Literal["cold", "warm"] | None = Field(
        default=None,
        description="compiled kernels; null: by a program that gave the worker no folder for them",
    )
    swap: Literal["as_is", "require_off"] | None = Field(default=None, description="swap space of the host")
    ballast: EffectiveBallast | None = Field(default=None, description="memory held beside the environment")


class Treated(Part):
    """The host state as it was read after the treatment; empty when nothing was executed."""

    asked: Treatment | None = Field(default=None, description="the treatment")
    dropped: bool | None = Field(default=None, description="true: the page cache was dropped")
    advised_files: Size | None = Field(
        default=None, description="files advised out of the page cache instead"
    )
    filled_bytes: Size | None = Field(default=None, description="bytes of the fill file that were resident")
    mem_free_bytes: Size | None = Field(default=None, description="MemFree afterwards")
    cached_bytes: Size | None = Field(default=None, description="Cached + Buffers afterwards")
    page_cache_bytes: Size | None = Field(default=None, description="Cached + Buffers - Shmem afterwards")
    model_resident_bytes: Size | None = Field(
        default=None, description="of the model's files in the page cache afterwards; null: cannot be known"
    )
    swap_total_bytes: Size | None = Field(default=None, description="SwapTotal")
    drained: Drain | None = Field(default=None, description="draining of the per-CPU lists before the start")
    ballast_bytes: Size | None = Field(default=None, description="size of the ballast")
    ballast_pid: Size | None = Field(default=None, description="the process that holds it")
    ballast_locked: bool | str | None = Field(default=None, description="true: mlocked; else why not")
    ballast_root_cgroup: bool | str | None = Field(
        default=None, description="true: moved to the root of the memory hierarchy; else why not"
    )
    compile_cache_warm: bool | None = Field(
        default=None, description="whether an execution that is not measured had filled the compile cache"
    )
    compile_cache_files: Size | None = Field(
        default=None, description="files in the compile cache before the start; cold: 0"
    )
    compile_cache_bytes: Size | None = Field(default=None, description="their size")


class AtSizing(Part):
    """The treatment, read back when the engine was about to read free memory."""

    fill_resident_bytes: Size | None = Field(
        default=None, description="bytes of the fill file still in the page cache"
    )
    refilled_bytes: Size | None = Field(
        default=None,
        description="of the fill, what the kernel had reclaimed meanwhile and was read again right before",
    )
    page_cache_bytes: Size | None = Field(default=None, description="Cached + Buffers - Shmem")
    model_resident_bytes: Size | None = Field(
        default=None, description="of the model's files in the page cache; null: cannot be known"
    )
    mapped_file_bytes: Size | None = Field(
        default=None, description="files mapped by the worker's tree: its PSS_file; null: not read"
    )
    unexplained_cache_bytes: Size | None = Field(
        default=None,
        description="page cache that came since the treatment and is neither the fill, nor the model's, nor mapped by the "
        "worker; beyond limits.cache_tolerance the attempt is disturbed",
    )
    drained: Drain | None = Field(default=None, description="the second draining, right before")
    drain_error: str | None = Field(default=None, description="why it could not be done")
    per_cpu_free_bytes: Size | None = Field(default=None, description="free pages in per-CPU lists")
    per_cpu_allowed_bytes: Size | None = Field(
        default=None, description="the most of them that still counts as drained: 0.5 % of MemTotal"
    )
    swap_total_bytes: Size | None = Field(default=None, description="SwapTotal")
    ballast_bytes: Size | None = Field(default=None, description="size of the ballast")
    ballast_resident_bytes: Size | None = Field(
        default=None, description="of it resident, without the interpreter's own"
    )
    compile_cache_warm: bool | None = Field(
        default=None, description="whether an execution that is not measured had filled the compile cache"
    )
    compile_cache_files: Size | None = Field(default=None, description="files in the compile cache")
    compile_cache_bytes: Size | None = Field(default=None, description="their size")


class End(Part):
    """How a container ended, or a process with a memory cgroup of its own; for others only what the host had to do."""

    container_id: Word | None = Field(default=None, description="the container")
    oom_killed: bool | None = Field(
        default=None, description="the daemon's OOMKilled, or an oom_kill in the group"
    )
    cgroup_peak_bytes: Size | None = Field(default=None, description="peak usage of its own group (isolated)")
    group_left: str | None = Field(default=None, description="why its own group could not be removed")
    killed_by_host: bool | None = Field(
        default=None, description="true: it had said its last word, did not end, and was killed for that"
    )
    error: str | None = Field(default=None, description="the daemon's State.Error")
    inspect_error: str | None = Field(default=None, description="why the daemon could not be asked")


class Held(Part):
    """Memory of some processes, as smaps_rollup says."""

    processes: Size = Field(description="how many there are")
    pss_bytes: Size | None = Field(
        default=None, description="proportional set size: shared pages counted once, file pages included"
    )
    pss_anon_bytes: Size | None = Field(default=None, description="anonymous part of pss_bytes")
    absent: dict[str, str] | None = Field(default=None, description="what could not be read: name and reason")


class Footprint(Part):
    """What everything but the guest and the ballast held, while no guest lived."""

    spark_ray: Held = Field(description="the driver, its helpers, the actor that executes attempts")
    ray: Held = Field(
        description="the Ray that executes this attempt: raylet, control store, dashboard, agents, idle workers"
    )
    docker: Held = Field(description="dockerd, containerd and its shims; not the containers")
    podman: Held = Field(description="podman, conmon and network helpers; not the containers")
    object_store_bytes: Size | None = Field(
        default=None, description="of Ray's object store in memory; mapped pages are in the groups as well"
    )
    absent: dict[str, str] | None = Field(default=None, description="what could not be read: name and reason")
    cost_s: Seconds = Field(description="how long the reading took, seconds")


class Orchestrator(Part):
    before: Footprint | None = Field(default=None, description="before the treatment and the start")
    after: Footprint | None = Field(default=None, description="after the guest had ended")


class HostView(Part):
    """host.json: everything the host saw of one attempt."""

    observations: list[Observation] = Field(
        description="readings of the host: before_launch, each phase, after_exit"
    )
    outside: Outside = Field(description="the worker as seen from outside while it lived")
    at_sizing: AtSizing | None = Field(
        description="what of the treatment could be read back at the sizing moment; null: never reached"
    )
    wait: Wait = Field(description="the wait for memory before the attempt")
    treatment: Treated = Field(description="what the treatment did and left")
    exit_code: Size | None = Field(
        description="exit status of the guest, 128 + n after signal n; null: unknown"
    )
    end: End = Field(description="how the container ended")
    oom_kills: Size = Field(
        description="kernel out-of-memory kills meanwhile: /proc/vmstat, or the container's own"
    )
    stopped_by: Literal["deadline", "watchdog", "interrupt"] | None = Field(
        description="what of ours ended it; null: nothing"
    )
    duration_s: Seconds = Field(description="whole attempt, all waits and the treatment included, seconds")
    samples: Samples = Field(description="the time series beside the record")
    gate: Gate | None = Field(
        default=None, description="the wait for everything but memory, before the attempt"
    )
    warming: Warming | None = Field(
        default=None, description="null: the compile cache needed none (cold, or warm already)"
    )
    guard: Guard | None = Field(default=None, description="what happened on the host meanwhile")
    watchdog: Watchdog | None = Field(default=None, description="null: nothing was executed")
    back: Wait | None = Field(
        default=None, description="the wait for memory after the attempt: how late it comes back"
    )
    ledger: list[Ledger] | None = Field(
        default=None,
        description="each of the host's observations balanced; null: by a program without a ledger",
    )
    orchestrator: Orchestrator | None = Field(
        default=None, description="what this program, its Ray and the container services held themselves"
    )
    plausibility: Plausibility | None = Field(
        default=None, description="bounds on what was measured; null: no model is loaded, or no result"
    )


# ---- record.json ------------------------------------------------------------------------------------------


class AskedMatmul(Part):
    size: Size = Field(description="rows and columns")
    runs: Size = Field(description="products that are timed")
    device: Literal["any", "cuda"] = Field(default="any", description="cuda: no product without a GPU")


class Workload(Part):
    requests: Size = Field(description="requests after the pool is sized; 0: the KV-only trial")
    input_tokens: Size = Field(description="prompt tokens of each request")
    output_tokens: Size = Field(description="tokens asked of each request")
    streaming: bool = Field(default=False, description="each token is taken as it comes")
    tool: Literal["worker", "trtllm_bench"] = Field(default="worker", description="who sends the requests")
    matmul: AskedMatmul | None = Field(default=None, description="the matrix product; null: none")


class GpuExposure(Part):
    """How an isolated guest gets the GPU."""

    exposure: Literal["request", "cdi", "devices"] = Field(
        description="request, cdi: the daemon's own ways (--gpus, --device); devices: driver files and device nodes, bound"
    )
    driver: str | None = Field(description="version of the driver whose files are bound; null: not bound")
    devices: list[str] = Field(description="device nodes given")
    source: str | None = Field(
        default=None,
        description="what said which files: a CDI specification of the host, or files (found by name)",
    )
    left_out: list[str] = Field(
        default_factory=list, description="what that specification asks for as well and was not given"
    )


class ContentView(Part):
    """What the worker ran on."""

    python: str = Field(description="interpreter inside the environment")
    variables: dict[str, str] = Field(description="environment variables that the content brings")
    entrypoint: list[str] = Field(description="entrypoint of the image or tree, in front of the command")
    root: str | None = Field(description="folder of the rootfs (chroot)")
    mounts: list[Annotated[tuple[str, str, bool], Field(strict=False)]] = Field(
        description="bound into it: [source, target, read-only]"
    )
    gpu: GpuExposure | None = Field(default=None, description="the GPU; null: the environment asks for none")
    image_id: str | None = Field(
        description="image ID (docker; chroot: of the image that the tree was extracted from)"
    )
    sha256: Sha256 | None = Field(description="content hash of the tree")
    bound_sha256: Sha256 | None = Field(description="content hash of what is bound into it")


class Verdict(Part):
    kind: OutcomeKind = Field(description="what became of the attempt")
    reason: str = Field(description="a short code for why")
    message: str = Field(description="the same in words; empty for ok")


class Record(Part):
    """record.json: one attempt of one trial. Present means that the attempt is over; it is never rewritten.

    `Store.records` adds `standing`: counts, open or superseded.
    """

    record_version: Annotated[int, Field(ge=1, le=1)] = Field(description="version of this format")
    spark_ray_version: Word = Field(description="the program that wrote it")
    run: Word = Field(description="name of the experiment")
    block_id: Word = Field(description="one configuration x one repetition")
    trial_id: Word = Field(description="BLOCK.ARM")
    arm: Word = Field(description="environment and treatment, by the YAML's name")
    attempt: Annotated[Size, Field(ge=1)] = Field(description="execution of the block, from 1")
    executor: Literal["ray", "local"] | None = Field(
        default=None, description="what executed it: a Ray actor, or the driver's own process"
    )
    position: Size = Field(description="place of the arm in the block's order, from 0")
    configuration: Configuration = Field(
        description="max_batch_size, max_num_tokens (counts), memory_fraction (0 to 1), and each further knob by its place in "
        "the YAML; sizes in bytes, durations in seconds"
    )
    repetition: Size = Field(description="repetition of the configuration, from 0")
    slot: Word = Field(description="where it was executed")
    study_trial: int = Field(description="number of the block's trial in Optuna's study")
    started_at: Stamp = Field(description="start of the attempt, wait included; UTC, ISO 8601")
    ended_at: Stamp = Field(description="end of the attempt; UTC, ISO 8601")
    engine: dict[str, Any] = Field(
        description="engine settings of the arm, as the YAML's `engine`; sizes in bytes, durations in seconds"
    )
    workload: Workload = Field(description="the requests")
    environment: dict[str, Any] = Field(
        description="the arm's environment with all defaults, as the YAML's; sizes in bytes"
    )
    treatment: Treatment = Field(description="host state asked for")
    content: ContentView = Field(description="what the worker ran on")
    bundle_sha256: Sha256 = Field(description="hash of the worker's files as the run began")
    command: list[str] = Field(description="how it was started; command.json has all of it")
    result: Result | None = Field(
        description="what the worker said; null: nothing that can be believed (result.json is kept)"
    )
    inside: list[Observation] = Field(description="readings of the worker, as far as it got")
    host: HostView = Field(description="what the host saw")
    outcome: Verdict = Field(description="what became of it")
