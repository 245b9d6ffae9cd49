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

from .conditions import Limits, Treatment
from .engines import AnyEngine, EmbeddedEngine, Engine, Model, TensorRTLLMEngine
from .environment_spec import Environment
from .spec import (
    NAME,
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


# ---- arms -----------------------------------------------------------------------------------------------


class Arm(Spec):
    environment: Environment = Field(description="where the worker runs; a bare kind stands for its defaults")
    treatment: Treatment = Field(default_factory=Treatment, description="host state set before an attempt")
    engine: dict[str, Any] = Field(
        default_factory=dict, description="engine settings that differ in this arm"
    )
    builds_on: PlainName | None = Field(
        default=None,
        description="the arm to which this one adds a single mechanism: a rung of a ladder, compared with that neighbour",
    )
    orchestrator: Literal["ray", "local"] | None = Field(
        default=None,
        description="execute this arm through a Ray cluster started for the attempt, or without any; default: as the run",
    )
    required: Flag = Field(default=True, description="false: left out, and said so, where the host lacks it")

    @field_validator(
        "environment",
        mode="before",
        json_schema_input_type=Literal["native", "chroot", "isolated", "docker", "podman"] | Environment,
    )
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value


class Contrast(Spec):
    baseline: str = Field(description="the arm that the other is compared with")
    against: str = Field(description="the other one; less capacity is a positive contrast")


class Prediction(Spec):
    """What an arm's KV capacity should do, said beforehand; the report says held, not held or undecided.

    Expected: times x memory_fraction x (the quantity in the arm - in the baseline), each read at the sizing moment.
    """

    arm: str = Field(description="the arm that is predicted")
    baseline: str | None = Field(
        default=None, description="compared with which arm; default: contrast.baseline"
    )
    quantity: Literal["page_cache", "fill", "ballast", "orchestrator", "view_free", "none"] = Field(
        description="what changes: page cache, the fill's resident bytes, the ballast's, what the memory view calls free "
        "(a limit), what this program, its Ray and the container services hold (orchestrator: read before the start), or "
        "none: no effect is expected"
    )
    times: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = Field(
        default=-1.0,
        description="-1: each byte costs memory_fraction bytes of KV; 0: none; 1: each byte gives them",
    )
    share: Fraction = Field(default=0.02, description="tolerance as a share of the expected effect")
    within: SizeBytes = Field(
        default="32MiB",
        validate_default=True,
        description="tolerance in bytes, where that is more than the share",
    )
    because: str = Field(default="", description="why this is expected, in a sentence")


# ---- the rest ---------------------------------------------------------------------------------------------


class Matmul(Spec):
    """A square matrix product, repeated: a load that no engine and no KV cache has a part in."""

    size: PositiveInt = Field(default=10_000, description="rows and columns")
    runs: PositiveInt = Field(default=10, description="products that are timed, after one that is not")
    device: Literal["any", "cuda"] = Field(
        default="any", description="cuda: fail where torch sees no GPU, instead of taking the CPU"
    )


class Workload(Spec):
    """Fixed-length requests after the pool is sized. Zero requests: the KV-only trial."""

    requests: int = Field(default=4, ge=0, strict=True, description="requests sent at once; 0: KV only")
    input_tokens: PositiveInt = Field(default=16, description="length of each prompt")
    output_tokens: PositiveInt = Field(default=8, description="tokens generated for each")
    streaming: Flag = Field(
        default=False, description="take each token as it comes: time to the first, and between tokens"
    )
    tool: Literal["worker", "trtllm_bench"] = Field(
        default="worker",
        description="who sends the requests: the worker through the engine's API, or NVIDIA's own trtllm-bench, which "
        "starts the engine itself (engine tensorrt_llm only)",
    )
    matmul: Matmul | None = Field(
        default=None,
        description="also time a matrix product, before the engine is there; {} for 10 of 10 000 x 10 000",
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
    predictions: tuple[Prediction, ...] = Field(
        default=(), description="what is expected, held against what is measured"
    )
    limits: Limits = Field(default_factory=Limits, description="how long, how often, how much memory")

    # Consistency is checked field by field, against the fields before (`info.data` has those that are valid),
    # so that its problems are reported together with those of other fields, each at its own place.

    @field_validator("model")
    @classmethod
    def _model_for_engine(cls, value: Model | None, info: ValidationInfo) -> Model | None:
        engine = info.data.get("engine")
        if value is None and isinstance(engine, EmbeddedEngine | TensorRTLLMEngine):
            raise ValueError(
                f"engine {engine.kind} needs a model: {{random_llama: {{}}}} or {{path: FOLDER}}"
            )
        return value

    @field_validator("workload")
    @classmethod
    def _workload_for_engine(cls, workload: Workload, info: ValidationInfo) -> Workload:
        engine = info.data.get("engine")
        if engine is not None:
            own, streams = isinstance(engine, TensorRTLLMEngine), EmbeddedEngine | TensorRTLLMEngine
            found = []
            if workload.tool == "trtllm_bench" and not own:
                found.append(
                    problem(f"starts TensorRT-LLM; the engine is {engine.kind}", ("tool",), workload.tool, ())
                )
            elif workload.tool == "trtllm_bench" and not workload.requests:
                found.append(
                    problem("must be at least 1: trtllm-bench has no KV-only trial", ("requests",), 0, ())
                )
            if workload.streaming and not isinstance(engine, streams):
                found.append(problem(f"engine {engine.kind} generates no tokens", ("streaming",), True, ()))
            refuse(found)
        return workload

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
                problem("the engine needs a GPU: say gpus: all", (name, "environment"), None, ())
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

    @field_validator("arms")
    @classmethod
    def _rungs(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        """Every `builds_on` names an arm above it, so that rungs form trees."""
        before: list[str] = []
        found = []
        for name, arm in arms.items():
            if arm.builds_on is not None and arm.builds_on not in before:
                found.append(
                    problem("is not an arm above this one", (name, "builds_on"), arm.builds_on, before)
                )
            before.append(name)
        refuse(found)
        return arms

    @field_validator("predictions")
    @classmethod
    def _predicted_arms(
        cls, predictions: tuple[Prediction, ...], info: ValidationInfo
    ) -> tuple[Prediction, ...]:
        names = list(info.data.get("arms", ()))
        refuse(
            [
                problem(f"is not an arm (arms: {', '.join(names)})", (place, role), value, names)
                for place, each in enumerate(predictions)
                for role, value in (("arm", each.arm), ("baseline", each.baseline))
                if names and value is not None and value not in names
            ]
        )
        return predictions

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

    def settles(self, arm: str) -> bool:
        """Whether the arm's engine waits for the host right before it reads free memory."""
        engine = self.engine_of(arm)
        if not isinstance(engine, TensorRTLLMEngine):
            return True
        return engine.worker == "single_process" and self.workload.tool == "worker"

    def engine_of(self, arm: str) -> AnyEngine:
        """The engine settings of one arm: the common ones with the arm's own on top."""
        return with_own(self.engine, self.arms[arm].engine)
