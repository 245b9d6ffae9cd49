"""What one YAML file says, as strict frozen models.

Sizes and durations are written with their unit ("2GiB", "90s") and held in bytes and seconds.
An unknown key is an error. `config.py` turns a file into these and locates errors; nothing here reads files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .engines import EmbeddedEngine, Engine, FakeEngine, Model
from .spec import (
    NAME,
    DurationS,
    Flag,
    Fraction,
    PlainName,
    PositiveInt,
    Seed,
    SizeBytes,
    Spec,
    distinct,
    own_problems,
    problem,
    refuse,
    shape,
    with_own,
)

Configuration = dict[str, int | float]
"""One point of the search space: max_batch_size, max_num_tokens, memory_fraction."""


# ---- search -----------------------------------------------------------------------------------------------


class Range(Spec):
    """Any value from low to high; `levels` of them where a grid is asked for."""

    low: PositiveInt | Fraction
    high: PositiveInt | Fraction
    levels: int = Field(default=3, ge=1, le=64, strict=True, description="how many of its values a grid has")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"the range is empty: low {self.low} is above high {self.high}")
        return self


class IntRange(Range):
    low: PositiveInt = Field(description="smallest value, included")
    high: PositiveInt = Field(description="largest value, included")
    log: Flag = Field(default=False, description="spread over orders of magnitude, not evenly")


class FractionRange(Range):
    low: Fraction = Field(description="smallest value, included")
    high: Fraction = Field(description="largest value, included")


IntAxis = Annotated[
    Annotated[IntRange, Tag("mapping")]
    | Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(distinct), Tag("list")]
    | Annotated[PositiveInt, Tag("value")],
    Discriminator(shape),
]
FractionAxis = Annotated[
    Annotated[FractionRange, Tag("mapping")]
    | Annotated[list[Fraction], Field(min_length=1), AfterValidator(distinct), Tag("list")]
    | Annotated[Fraction, Tag("value")],
    Discriminator(shape),
]


class Space(Spec):
    """Each axis is a range {low, high}, a list of values, or one value."""

    max_batch_size: IntAxis = Field(description="sequences that the engine runs at once, at most")
    max_num_tokens: IntAxis = Field(description="tokens of one engine step, at most; sets the profiling peak")
    memory_fraction: FractionAxis = Field(description="share of the memory found free that becomes KV cache")


class Search(Spec):
    sampler: Literal["grid", "random", "qmc", "tpe", "gp"] = Field(
        default="qmc", description="who chooses: tpe and gp seek the largest contrast; qmc covers evenly"
    )
    blocks: PositiveInt = Field(
        default=16, description="blocks to complete (a grid stops when it is exhausted)"
    )
    repetitions: PositiveInt = Field(default=1, description="blocks at each configuration")
    space: Space = Field(description="what is searched")


# ---- arms -------------------------------------------------------------------------------------------------


class NativeEnvironment(Spec):
    kind: Literal["native"] = Field(description="a plain process of this host")

    @property
    def sees_gpu(self) -> bool:
        return True


class ChrootEnvironment(Spec):
    kind: Literal["chroot"] = Field(description="another root folder, in its own mount namespace; as root")
    rootfs: str = Field(
        default="host", description='a folder, or "host": made from this interpreter (spark-ray rootfs build)'
    )
    python: str | None = Field(
        default=None, description="interpreter inside; default: what the rootfs says, else python3"
    )
    gpus: Literal["all"] | None = Field(
        default=None, description="bind the host's NVIDIA driver libraries into it; /dev is the host's anyway"
    )

    @property
    def sees_gpu(self) -> bool:
        return self.gpus is not None


class DockerEnvironment(Spec):
    """A container made through the Docker Engine API. Defaults are the tight ones; each key is one docker flag."""

    kind: Literal["docker"]
    image: str = Field(
        default="host", description='an image present in the engine, or "host": made from the host rootfs'
    )
    python: str | None = Field(
        default=None, description="interpreter inside; default: what the rootfs says, else python3"
    )
    memory: SizeBytes | None = Field(default=None, description="--memory: limit of its cgroup")
    memory_swap: SizeBytes | None = Field(default=None, description="--memory-swap: memory plus swap")
    shm_size: SizeBytes | None = Field(default=None, description="--shm-size: size of /dev/shm")
    ipc: Literal["private", "host", "shareable", "none"] | None = Field(default=None, description="--ipc")
    pid: Literal["host"] | None = Field(default=None, description="--pid: host, or a namespace of its own")
    network: Literal["none", "host", "bridge"] = Field(default="none", description="--network")
    cpuset_cpus: str | None = Field(default=None, description="--cpuset-cpus, such as 0-3")
    cgroup_parent: str | None = Field(default=None, description="--cgroup-parent: the cgroup it is put under")
    ulimits: dict[str, Annotated[int, Field(ge=-1, strict=True)]] = Field(
        default_factory=dict, description="soft = hard limit by name; -1 is unlimited"
    )
    privileged: Flag = Field(default=False, description="--privileged: all capabilities and devices")
    cap_add: tuple[str, ...] = Field(default=(), description="--cap-add: capabilities given")
    cap_drop: tuple[str, ...] = Field(default=("ALL",), description="--cap-drop: capabilities taken away")
    no_new_privileges: Flag = Field(default=True, description="no set-user-ID program gains anything")
    read_only: Flag = Field(default=True, description="--read-only: its root file system")
    gpus: Literal["all"] | None = Field(
        default=None,
        description="--gpus; where the daemon has no NVIDIA toolkit, the driver's libraries and device nodes",
    )

    @property
    def sees_gpu(self) -> bool:
        return self.gpus is not None


Environment = Annotated[
    NativeEnvironment | ChrootEnvironment | DockerEnvironment, Field(discriminator="kind")
]


class Fill(Spec):
    fill: SizeBytes = Field(description="page cache to hold, filled right before the worker starts")


PageCache = Annotated[
    Annotated[Literal["drop", "keep", "advise"], Tag("value")] | Annotated[Fill, Tag("mapping")],
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
        description="free pages held in per-CPU lists, invisible to MemFree; default: drained as root, else as_is",
    )


class Arm(Spec):
    environment: Environment = Field(description="where the worker runs; a bare kind stands for its defaults")
    treatment: Treatment = Field(default_factory=Treatment, description="host state set before an attempt")
    engine: dict[str, Any] = Field(
        default_factory=dict, description="engine settings that differ in this arm"
    )
    required: Flag = Field(default=True, description="false: left out, and said so, where the host lacks it")

    @field_validator(
        "environment",
        mode="before",
        json_schema_input_type=Literal["native", "chroot", "docker"] | Environment,
    )
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value


class Contrast(Spec):
    baseline: str = Field(description="the arm that the other is compared with")
    against: str = Field(description="the other one; less capacity is a positive contrast")


# ---- the rest ---------------------------------------------------------------------------------------------


class Workload(Spec):
    """Fixed-length requests after the pool is sized. Zero requests: the KV-only trial."""

    requests: int = Field(default=4, ge=0, strict=True, description="requests sent at once; 0: KV only")
    input_tokens: PositiveInt = Field(default=16, description="length of each prompt")
    output_tokens: PositiveInt = Field(default=8, description="tokens generated for each")


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


class Experiment(Spec):
    name: PlainName = Field(
        json_schema_extra={"pattern": f"^{NAME.pattern}$"}, description="names the run: runs/NAME"
    )
    question: str = Field(default="", description="what this experiment answers, in a sentence")
    seed: Seed = Field(default=0, description="of everything random: configurations and the order of arms")
    engine: Engine = Field(description="the engine whose capacity is measured")
    model: Model | None = Field(default=None, validate_default=True, description="what the engine loads")
    workload: Workload = Field(default_factory=Workload, description="what it generates afterwards")
    search: Search = Field(description="how configurations are chosen")
    arms: dict[PlainName, Arm] = Field(min_length=2, description="what is compared, by name; at least two")
    contrast: Contrast | None = Field(
        default=None, validate_default=True, description="which two are compared"
    )
    limits: Limits = Field(default_factory=Limits, description="how long, how often, how much memory")

    # Consistency is checked field by field, against the fields before (`info.data` has those that are valid),
    # so that its problems are reported together with those of other fields, each at its own place.

    @field_validator("model")
    @classmethod
    def _model_for_engine(cls, value: Model | None, info: ValidationInfo) -> Model | None:
        if value is None and isinstance(info.data.get("engine"), EmbeddedEngine):
            raise ValueError("engine embedded needs a model: {random_llama: {}} or {path: FOLDER}")
        return value

    @field_validator("arms")
    @classmethod
    def _arms_fit_engine(cls, arms: dict[str, Arm], info: ValidationInfo) -> dict[str, Arm]:
        engine = info.data.get("engine")
        if engine is not None:
            problems = [own_problems(engine, arm.engine, (name, "engine")) for name, arm in arms.items()]
            refuse([each for of_arm in problems for each in of_arm])
            engines = {name: with_own(engine, arm.engine) for name, arm in arms.items()}
            misfits = [
                problem(made.misfit, (name, "engine"), arms[name].engine, ())
                for name, made in engines.items()
                if made.misfit
            ]
            blind = [
                problem("engine.device is cuda: say gpus: all", (name, "environment"), None, ())
                for name, made in engines.items()
                if made.needs_gpu and not arms[name].environment.sees_gpu
            ]
            refuse(misfits + blind)
        return arms

    @field_validator("contrast")
    @classmethod
    def _two_arms(cls, contrast: Contrast | None, info: ValidationInfo) -> Contrast | None:
        names = list(info.data.get("arms", ()))
        if not names:
            return contrast
        if contrast is None:
            if len(names) > 2:
                example = f"contrast: {{baseline: {names[0]}, against: {names[1]}}}"
                raise ValueError(f"with {len(names)} arms, say which two are compared: {example}")
            return None
        unknown = [(role, name) for role, name in contrast if name not in names]
        refuse(
            [
                problem(f"is not an arm (arms: {', '.join(names)})", (role,), name, names)
                for role, name in unknown
            ]
        )
        if contrast.baseline == contrast.against:
            raise ValueError("compares an arm with itself; for A/A give two arms the same content")
        return contrast

    @model_validator(mode="after")
    def _known_culprit(self) -> Self:
        culprit = getattr(self.engine, "only_in_arm", None)
        if culprit is not None and culprit not in self.arms:
            loc = ("engine", "only_in_arm")
            refuse([problem(f"is not an arm (arms: {', '.join(self.arms)})", loc, culprit, self.arms)])
        return self

    @property
    def compared(self) -> Contrast:
        """The two arms whose contrast is the outcome; with two arms the first named is the baseline."""
        if self.contrast is not None:
            return self.contrast
        baseline, against = self.arms
        return Contrast(baseline=baseline, against=against)

    def engine_of(self, arm: str) -> EmbeddedEngine | FakeEngine:
        """The engine settings of one arm: the common ones with the arm's own on top."""
        return with_own(self.engine, self.arms[arm].engine)
