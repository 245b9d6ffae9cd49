"""What is searched and how: the `search` of an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from .spec import Flag, Fraction, PositiveInt, Scalar, Spec, distinct, held, shape, unit_of

Configuration = dict[str, Scalar]
"""One point of the search space: max_batch_size, max_num_tokens, memory_fraction, and each further knob by its path.

Sizes are bytes, durations seconds.
"""

Margin = Annotated[float, Field(ge=0, lt=1, strict=True)]

ANY_SAMPLER = frozenset({"margin", "pilot", "wished"})
"""Of a target, what a map is read with whoever chose its blocks; the rest says which to choose."""


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


Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True, allow_inf_nan=False)]


def _quantity(written: Number | str) -> Number | str:
    if isinstance(held(written), str):
        raise ValueError(  # noqa: TRY004  a problem of the file
            f"{written!r} is no number, size or duration: a range needs two; write words as a list"
        )
    return written


def _shown(written: Scalar) -> Scalar:
    if (
        isinstance(written, str) and not written.isprintable()
    ):  # it goes to terminals, as part of a configuration
        raise ValueError("holds characters that cannot be shown")
    return written


def _one_unit(written: list[Scalar]) -> list[Scalar]:
    units = {unit_of(each) for each in written if isinstance(held(each), int | float)}
    if len(units) > 1:
        raise ValueError("the list mixes plain numbers, sizes and durations")
    distinct([(type(value), value) for value in map(held, written)])
    return written


Quantity = Annotated[Number | str, AfterValidator(_quantity)]


class KnobRange(Spec):
    """Numbers, sizes or durations."""

    low: Quantity = Field(description="smallest value, included; sizes and durations with their unit")
    high: Quantity = Field(description="largest value, included")
    log: Flag = Field(default=False, description="spread over orders of magnitude, not evenly")
    levels: int = Field(default=3, ge=1, le=64, strict=True, description="how many of its values a grid has")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if unit_of(self.low) != unit_of(self.high):
            raise ValueError(f"low {self.low} and high {self.high} are not of one unit")
        low, high = self.ends
        if low > high:
            raise ValueError(f"the range is empty: low {self.low} is above high {self.high}")
        if self.log and low <= 0:
            raise ValueError("a range over orders of magnitude (log) begins above 0")
        return self

    @property
    def ends(self) -> tuple[int | float, int | float]:
        """As they are searched: in bytes, in seconds; both of one type."""
        low, high = held(self.low), held(self.high)
        assert isinstance(low, int | float)  # noqa: S101  _quantity
        assert isinstance(high, int | float)  # noqa: S101
        return (low, high) if isinstance(low, int) and isinstance(high, int) else (float(low), float(high))


KnobAxis = Annotated[
    Annotated[KnobRange, Tag("mapping")]
    | Annotated[
        list[Annotated[Scalar, AfterValidator(_shown)]],
        Field(min_length=1),
        AfterValidator(_one_unit),
        Tag("list"),
    ]
    | Annotated[Scalar, AfterValidator(_shown), Tag("value")],
    Discriminator(shape),
]


@dataclass(frozen=True)
class Span:
    """All values from low to high: whole numbers where both are."""

    low: int | float
    high: int | float
    log: bool
    levels: int


Axis = Span | tuple[Scalar, ...]


def _axis(written: IntRange | FractionRange | KnobRange | list[Scalar] | Scalar) -> Axis:
    match written:
        case KnobRange():
            return Span(*written.ends, written.log, written.levels)
        case IntRange() | FractionRange():
            return Span(written.low, written.high, getattr(written, "log", False), written.levels)
        case list():
            return tuple(map(held, written))
        case _:
            return (held(written),)


class Space(Spec):
    """Each axis is a range {low, high}, a list of values, or one value."""

    max_batch_size: IntAxis = Field(description="sequences that the engine runs at once, at most")
    max_num_tokens: IntAxis = Field(description="tokens of one engine step, at most; sets the profiling peak")
    memory_fraction: FractionAxis = Field(description="share of the memory found free that becomes KV cache")
    further: dict[str, KnobAxis] = Field(
        default_factory=dict,
        description="other settings, each by its place in this file: engine.KEY (of all arms), arms.ARM.engine.KEY, "
        "arms.ARM.environment.KEY, arms.ARM.treatment.KEY, workload.KEY",
    )

    @property
    def axes(self) -> dict[str, Axis]:
        """What is searched, by the key that a configuration has for it."""
        basic = {name: written for name, written in self if name != "further"}
        return {name: _axis(written) for name, written in (basic | self.further).items()}

    @property
    def units(self) -> dict[str, str]:
        """The unit of each further knob whose numbers have one: B or s."""
        found = {}
        for name, axis in self.further.items():
            written = (
                [axis.low] if isinstance(axis, KnobRange) else axis if isinstance(axis, list) else [axis]
            )
            found[name] = "".join({unit_of(each) for each in written})
        return {name: unit for name, unit in found.items() if unit}


class Target(Spec):
    """What is asked of the map. Which blocks are measured, and when they are enough, depends on it."""

    kind: Literal["level_set", "contrast", "boundary", "optimum"] = Field(
        default="level_set",
        description="level_set: where the contrast exceeds the margin; contrast: how large it is everywhere; boundary: where "
        "an arm stops working, and where only one of them does; optimum: the configuration that gives each arm most",
    )
    margin: Margin = Field(default=0.05, description="contrast above which arms diverge")
    precision: Fraction = Field(
        default=0.03,
        description="sampler map: stop when at most this share of the space is expected to be called wrongly",
    )
    objective: Literal["kv_capacity", "throughput"] = Field(
        default="kv_capacity",
        description="of kind optimum: what is to be large; throughput is that of the workload",
    )
    pilot: str | None = Field(
        default=None,
        description="folder of an A/A run of this engine (spark-ray pilot): the margin is at least its noise floor, and the "
        "plan says what the budget can show",
    )
    wished: Fraction | None = Field(
        default=None, description="a contrast that should be shown: the plan says how many blocks that takes"
    )

    @model_validator(mode="after")
    def _an_objective_is_of_an_optimum(self) -> Self:
        if self.objective != "kv_capacity" and self.kind != "optimum":
            raise ValueError(f"objective {self.objective} goes with kind optimum, not with {self.kind}")
        return self


class Search(Spec):
    sampler: Literal["grid", "random", "qmc", "tpe", "gp", "map"] = Field(
        default="qmc",
        description="who chooses: map learns where arms diverge, and stops when it knows; tpe and gp seek the largest "
        "contrast; qmc covers evenly",
    )
    blocks: PositiveInt = Field(
        default=16,
        description="blocks to complete (a grid stops when it is exhausted, map when it knows enough)",
    )
    repetitions: PositiveInt = Field(
        default=1, description="blocks at each configuration; map decides itself what it measures again"
    )
    space: Space = Field(description="what is searched")
    target: Target = Field(default_factory=Target, description="what is asked of the map")

    @model_validator(mode="after")
    def _a_target_needs_someone_who_seeks_it(self) -> Self:
        if self.sampler == "map":
            if self.repetitions > 1:
                raise ValueError(
                    "sampler map measures a configuration again where noise limits the map: leave repetitions out"
                )
            return self
        plain, said = Target(), set(Target.model_fields) - ANY_SAMPLER
        if sought := sorted(name for name in said if getattr(self.target, name) != getattr(plain, name)):
            raise ValueError(
                f"sampler {self.sampler} does not seek a target: target.{sought[0]} needs sampler map "
                f"(with any sampler: {', '.join(sorted(ANY_SAMPLER))})"
            )
        return self
