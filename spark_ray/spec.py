"""What the models of an experiment are made of: strict scalars with units, and problems that know their place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from .units import parse_duration_s, parse_size_bytes

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


def _plain(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a plain name: lower-case letters, digits, - and _, at most 40")
    return name


def _text_schema(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


AS_WRITTEN = {"as_written": True}
"""Context of a dump that can be validated again: sizes and durations with their unit, as an author writes them."""


def with_unit(value: float, unit: str) -> str:
    """A number as text that `held` reads back.

    >>> with_unit(1.5, "s")
    '1.5s'
    """
    return f"{Decimal(repr(value)):f}{unit}"


def _written_with(unit: str) -> PlainSerializer:
    def write(value: float, info: SerializationInfo) -> Any:
        return with_unit(value, unit) if info.context == AS_WRITTEN else value

    return PlainSerializer(write)


_NUMBER = r"^\s*[0-9]+(\.[0-9]+)?\s*"
PlainName = Annotated[str, AfterValidator(_plain)]
SizeBytes = Annotated[
    int,
    BeforeValidator(parse_size_bytes),
    _written_with("B"),
    _text_schema(_NUMBER + r"([KMGT]iB|[kKMGT]?B)\s*$", "2GiB"),
]
DurationS = Annotated[
    float,
    BeforeValidator(parse_duration_s),
    _written_with("s"),
    _text_schema(_NUMBER + r"(ms|s|min|h)\s*$", "90s"),
]
# Strict: a quoted number or "yes" is refused here, as an editor with the schema refuses it there.
Flag = Annotated[bool, Field(strict=True)]
Fraction = Annotated[float, Field(gt=0, lt=1, strict=True)]
PositiveInt = Annotated[int, Field(gt=0, le=2**31 - 1, strict=True)]
Scalar = (
    Annotated[bool, Field(strict=True)]
    | Annotated[int, Field(strict=True)]
    | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    | str
    | None
)
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def shape(value: object) -> str:
    """The form in which a value is written: tells a union which member is meant, so that an error is about that one."""
    if isinstance(value, dict | Spec):
        return "mapping"
    return "list" if isinstance(value, list) else "value"


def held(written: Scalar) -> Scalar:
    """A value as programs hold it: a size in bytes, a duration in seconds, anything else as it is."""
    if isinstance(written, str):
        for parse in (parse_size_bytes, parse_duration_s):
            with contextlib.suppress(ValueError):
                return parse(written)
    return written


def unit_of(written: Scalar) -> str:
    """B of a size, s of a duration; nothing of anything else."""
    value = held(written)
    return "" if value is written else "B" if isinstance(value, int) else "s"


Items = TypeVar("Items", list[Any], tuple[Any, ...])


def distinct(values: Items) -> Items:
    """Refuse a list that repeats itself: its levels would not be equally likely."""
    if len(set(values)) < len(values):
        raise ValueError("the list holds a value twice")
    return values


def problem(
    message: str, loc: tuple[str | int, ...], got: object, expected: Iterable[str]
) -> InitErrorDetails:
    """One located problem. `expected` is what would be right there, written as pydantic does, for suggestions."""
    context = {"expected": ", ".join(map(repr, expected))}
    return InitErrorDetails(type=PydanticCustomError("inconsistent", message, context), loc=loc, input=got)


def refuse(problems: list[InitErrorDetails]) -> None:
    """Raise all problems at once; pydantic puts the place of the validator before their own."""
    if problems:
        raise ValidationError.from_exception_data("Experiment", problems)


S = TypeVar("S", bound=Spec)


def with_own(common: S, own: dict[str, Any]) -> S:
    """Common settings with some own ones on top."""
    # Only the own ones are validated: the common ones are already held in bytes and seconds.
    required = {name: getattr(common, name) for name in _required(common)}
    fresh = type(common).model_validate(required | own)
    return common.model_copy(update={name: getattr(fresh, name) for name in own})


def own_problems(common: Spec, own: dict[str, Any], loc: tuple[str | int, ...]) -> list[InitErrorDetails]:
    """What is wrong with own settings, which are written at `loc`."""
    settable = [name for name in type(common).model_fields if name not in _required(common)]
    fixed = [name for name in own if name in _required(common)]
    if fixed:
        return [
            problem(f"cannot differ here (can: {', '.join(settable)})", (*loc, name), own[name], ())
            for name in fixed
        ]
    try:
        with_own(common, own)
    except ValidationError as error:
        expected = {"expected": ", ".join(map(repr, settable))}
        return [
            InitErrorDetails(
                type=PydanticCustomError(each["type"], each["msg"], expected | each.get("ctx", {})),
                loc=(*loc, *each["loc"]),
                input=each["input"],
            )
            for each in error.errors(include_url=False)
        ]
    return []


def _required(common: Spec) -> list[str]:
    return [name for name, field in type(common).model_fields.items() if field.is_required()]
