"""What one YAML file says, as strict frozen models.

Sizes and durations are written with their unit ("2GiB", "90s") and held in bytes and seconds.
An unknown key is an error. `config.py` turns a file into these and locates errors; nothing here reads files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from . import knobs
from .conditions import Limits, Treatment
from .engines import AnyEngine, EmbeddedEngine, Engine, Model, TensorRTLLMEngine
from .environment_spec import Environment
from .search_spec import Configuration, Search
from .spec import (
    AS_WRITTEN,
    NAME,
    Flag,
    Fraction,
    PlainName,
    PositiveInt,
    Scalar,
    Seed,
    SizeBytes,
    Spec,
    own_problems,
    problem,
    refuse,
    with_own,
)

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

    @field_validator("search")
    @classmethod
    def _throughput_is_measured(cls, search: Search, info: ValidationInfo) -> Search:
        engine, workload = info.data.get("engine"), info.data.get("workload")
        if search.target.objective == "throughput" and engine is not None and workload is not None:
            generates = isinstance(engine, EmbeddedEngine | TensorRTLLMEngine)
            why = "workload.requests is 0" if generates else f"engine {engine.kind} generates no tokens"
            if not (generates and workload.requests):
                refuse([problem(f"is not measured: {why}", ("target", "objective"), "throughput", ())])
        return search

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

    @model_validator(mode="after")
    def _knobs_fit(self) -> Self:
        """Every value that a knob can have is tried; the ends also with those of each other knob."""
        further = self.search.space.further
        arms = self.as_written()["arms"] if further else {}
        refusals = {path: knobs.refusal(path, arms, further.keys() - {path}) for path in further}
        refuse([problem(why, knobs.loc(path), path, ()) for path, why in refusals.items() if why])
        tries = {path: list(knobs.tries(axis)) for path, axis in further.items()}
        alone = [self._misfits((path, *each)) for path, tried in tries.items() for each in tried]
        refuse(knobs.unique(itertools.chain.from_iterable(alone)))
        for (one, those), (other, these) in itertools.combinations(tries.items(), 2):
            for mine, beside in itertools.product(
                those[:: len(those) - 1 or 1], these[:: len(these) - 1 or 1]
            ):
                refuse(self._misfits((one, *mine), {other: beside[1]}))
        return self

    def _misfits(
        self,
        tried: tuple[str, tuple[str | int, ...], Scalar],
        beside: Mapping[str, Scalar] = MappingProxyType({}),
    ) -> list[InitErrorDetails]:
        """Why the experiment cannot be with a knob at a value."""
        path, where, value = tried
        try:
            self._with({path: value, **beside})
        except ValidationError as error:
            known = knobs.neighbours(self, path)
            return [
                knobs.said_of(each, path, where, known, beside) for each in error.errors(include_url=False)
            ]
        except ValueError as error:
            return [problem(str(error), knobs.loc(path), value, ())]
        return []

    def as_written(self) -> dict[str, Any]:
        """Plain data of which the same experiment can be made again: sizes and durations with their unit."""
        return self.model_dump(mode="json", context=AS_WRITTEN, exclude_unset=True)

    def at(self, configuration: Configuration) -> Experiment:
        """The experiment of one configuration: its knobs set, and that one configuration for a search space."""
        units = self.search.space.units
        values = {name: knobs.as_written(value, units.get(name, "")) for name, value in configuration.items()}
        return self._with(values)

    @property
    def variants(self) -> dict[str, Experiment]:
        """What a plan looks at: the experiment at each end of a knob's range and each value of its list, by "KNOB: VALUE".

        Without knobs it is this one alone.
        """
        further = self.search.space.further
        tried = [(path, value) for path, axis in further.items() for _, value in knobs.tries(axis)]
        each = {f"{path}: {knobs.scalar_words(value)}": self._with({path: value}) for path, value in tried}
        return each or {"": self}

    def _with(self, values: Mapping[str, Scalar]) -> Experiment:
        data = self.as_written()
        space = data["search"]["space"]
        space.pop("further", None)
        for name, value in values.items():
            knobs.put(space if name in space else data, name, value)
        return Experiment.model_validate(data)

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

    def treatment_of(self, arm: str) -> Treatment:
        """The arm's treatment. A simulated engine reads no memory: what it does not name is left as it is."""
        asked = self.arms[arm].treatment
        if self.engine.kind != "simulated":
            return asked
        unasked = {"page_cache": asked.page_cache or "keep", "per_cpu_pages": asked.per_cpu_pages or "as_is"}
        return asked.model_copy(update=unasked)

    def engine_of(self, arm: str) -> AnyEngine:
        """The engine settings of one arm: the common ones with the arm's own on top."""
        return with_own(self.engine, self.arms[arm].engine)
