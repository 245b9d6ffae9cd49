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


# ---- engine and model -------------------------------------------------------------------------------------

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
    tokens_per_block: PositiveInt = 64
    max_seq_len: PositiveInt = Field(
        default=1024, description="tokens one request may hold; the pool must fit at least one"
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: PositiveInt | None = Field(
        default=None, description="CPU threads of torch; default: torch's own choice"
    )


class FakeEngine(Spec):
    """No engine at all: allocates, hangs, crashes or exits on command. For tests; its numbers mean nothing."""

    kind: Literal["fake"]
    behaviour: Literal[
        "ok", "hang", "segfault", "exit", "raise", "infeasible", "allocate", "stop", "garbage"
    ] = "ok"
    only_in_arm: str | None = Field(default=None, description="misbehave in this arm only")
    allocate: SizeBytes | None = None
    hold: DurationS = Field(default="0s", validate_default=True)
    kv_cache: SizeBytes = Field(default="1GiB", validate_default=True)


Engine = Annotated[EmbeddedEngine | FakeEngine, Field(discriminator="kind")]


class RandomLlama(Spec):
    """A small Llama-architecture checkpoint with random weights, made once and cached: a real loading path, no hub."""

    hidden_size: PositiveInt = 512
    intermediate_size: PositiveInt = 1536
    layers: PositiveInt = 8
    attention_heads: PositiveInt = 8
    kv_heads: PositiveInt = 8
    head_dim: PositiveInt = 128
    vocabulary: PositiveInt = 4096
    seed: Seed = 0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.attention_heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("kv_heads must divide attention_heads, and head_dim must be even")
        return self


class Model(Spec):
    path: str | None = Field(
        default=None, description="folder of a Hugging Face checkpoint (config.json, *.safetensors)"
    )
    random_llama: RandomLlama | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.random_llama is None):
            raise ValueError("name exactly one of path and random_llama")
        return self


# ---- search -----------------------------------------------------------------------------------------------


class Range(Spec):
    """Any value from low to high; `levels` of them where a grid is asked for."""

    low: PositiveInt | Fraction
    high: PositiveInt | Fraction
    levels: Annotated[int, Field(ge=1, le=64, strict=True)] = Field(default=3, description="levels of a grid")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"the range is empty: low {self.low} is above high {self.high}")
        return self


class IntRange(Range):
    low: PositiveInt
    high: PositiveInt
    log: Flag = False


class FractionRange(Range):
    low: Fraction
    high: Fraction


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

    max_batch_size: IntAxis
    max_num_tokens: IntAxis
    memory_fraction: FractionAxis


class Search(Spec):
    sampler: Literal["grid", "random", "qmc", "tpe", "gp"] = "qmc"
    blocks: PositiveInt = Field(
        default=16, description="blocks to complete (a grid stops when it is exhausted)"
    )
    repetitions: PositiveInt = Field(default=1, description="blocks at each configuration")
    space: Space


# ---- arms -------------------------------------------------------------------------------------------------


class NativeEnvironment(Spec):
    kind: Literal["native"]


class ChrootEnvironment(Spec):
    kind: Literal["chroot"]
    rootfs: str = Field(
        default="host", description='a folder, or "host": made from this interpreter (spark-ray rootfs build)'
    )
    python: str | None = Field(
        default=None, description="interpreter inside; default: what the rootfs says, else python3"
    )


class DockerEnvironment(Spec):
    """A container made through the Docker Engine API. Defaults are the tight ones; each key is one docker flag."""

    kind: Literal["docker"]
    image: str = Field(
        default="host", description='an image present in the engine, or "host": made from the host rootfs'
    )
    python: str | None = Field(
        default=None, description="interpreter inside; default: what the rootfs says, else python3"
    )
    memory: SizeBytes | None = None
    memory_swap: SizeBytes | None = None
    shm_size: SizeBytes | None = None
    ipc: Literal["private", "host", "shareable", "none"] | None = None
    pid: Literal["host"] | None = None
    network: Literal["none", "host", "bridge"] = "none"
    cpuset_cpus: str | None = None
    cgroup_parent: str | None = None
    ulimits: dict[str, Annotated[int, Field(ge=-1, strict=True)]] = Field(
        default_factory=dict, description="soft = hard limit by name; -1 is unlimited"
    )
    privileged: Flag = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ("ALL",)
    no_new_privileges: Flag = True
    read_only: Flag = True
    gpus: Literal["all"] | None = None


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
        default=None, description="default: drop as root, else advise (and a warning)"
    )
    per_cpu_pages: Literal["as_is", "drained"] | None = Field(
        default=None,
        description="free pages held in per-CPU lists, invisible to MemFree; default: drained as root, else as_is",
    )


class Arm(Spec):
    environment: Environment
    treatment: Treatment = Field(default_factory=Treatment)
    engine: dict[str, Any] = Field(
        default_factory=dict, description="engine settings that differ in this arm"
    )
    required: Flag = True

    @field_validator(
        "environment",
        mode="before",
        json_schema_input_type=Literal["native", "chroot", "docker"] | Environment,
    )
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value


class Contrast(Spec):
    baseline: str
    against: str


# ---- the rest ---------------------------------------------------------------------------------------------


class Workload(Spec):
    """Fixed-length requests after the pool is sized. Zero requests: the KV-only trial."""

    requests: Annotated[int, Field(ge=0, strict=True)] = 4
    input_tokens: PositiveInt = 16
    output_tokens: PositiveInt = 8


class Limits(Spec):
    trial_timeout: DurationS = Field(default="10min", gt=0, validate_default=True)
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
    name: PlainName = Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})
    question: str = Field(default="", description="what this experiment answers, in a sentence")
    seed: Seed = 0
    engine: Engine
    model: Model | None = Field(default=None, validate_default=True)
    workload: Workload = Field(default_factory=Workload)
    search: Search
    arms: dict[PlainName, Arm] = Field(min_length=2)
    contrast: Contrast | None = Field(default=None, validate_default=True)
    limits: Limits = Field(default_factory=Limits)

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
