"""Further knobs of a search: a setting anywhere in an experiment, named by its place, and a value put there.

What decides which content an arm runs on, and which engine, is no knob: content is prepared, checked and hashed once in
a run, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from .search_spec import KnobAxis, KnobRange
from .spec import Scalar, Spec, problem, with_unit

KeyPath = tuple[str | int, ...]
WHERE = ("search", "space", "further")
"""Where knobs are written in an experiment."""

_FIXED = {
    "engine": {"kind", "double", "device", "landscape.file", "landscape.function"},
    "environment": {"kind", "image", "rootfs", "root", "python", "gpus", "runtime"},
    "treatment": set[str](),
    "workload": {"tool"},
}
_PLACES = "engine.KEY, arms.ARM.engine.KEY, arms.ARM.environment.KEY, arms.ARM.treatment.KEY, workload.KEY"


def refusal(path: str, arms: Mapping[str, Any], others: Collection[str]) -> str | None:
    """Why a place cannot be a knob. `arms`: plain data by name; `others`: the places of the other knobs."""
    steps = path.split(".")
    of_arm = steps[0] == "arms"
    if of_arm and len(steps) > 1 and steps[1] not in arms:
        return f"{steps[1]} is not an arm (arms: {', '.join(arms)})"
    part, *keys = (steps[2:] if of_arm else steps) or [""]
    if not of_arm and part in {"environment", "treatment"}:
        return f"is of an arm: write arms.ARM.{path}"
    plain = all(
        each.replace("-", "_").isidentifier() for each in keys
    )  # it is shown in tables, pages and terminals
    if part not in _FIXED or (of_arm and part == "workload") or not keys or not plain:
        return f"is no place of a knob: {_PLACES}"
    if ".".join(keys) in _FIXED[part]:
        return "decides what is run, which is prepared once in a run: it cannot be a knob"
    around = next((other for other in others if path.startswith(f"{other}.")), None)
    if around:
        return f"is inside of {around}, which is a knob itself"
    return _shadowed(keys[0], arms, others) if part == "engine" and not of_arm else None


def _shadowed(key: str, arms: Mapping[str, Any], others: Collection[str]) -> str | None:
    """Where an arm has a setting of the common engine for itself, which a knob for all arms would not reach."""
    own = [arm for arm, said in arms.items() if key in said.get("engine", {})]
    own += [arm for arm in arms for other in others if f"{other}.".startswith(f"arms.{arm}.engine.{key}.")]
    return f"does not reach arm {own[0]}, which has engine.{key} of its own" if own else None


def put(data: dict[str, Any], path: str, value: Scalar) -> None:
    """Set a value in plain data, in place; mappings that are not there are made.

    Raises:
        ValueError: what is around it is no mapping.
    """
    *around, last = path.split(".")
    here = data
    for depth, step in enumerate(around, 1):
        if here.get(step) is None:
            here[step] = {}
        here = here[step]
        if not isinstance(here, dict):
            raise ValueError(f"{'.'.join(around[:depth])} is no mapping but {here!r}")  # noqa: TRY004
    here[last] = value


def as_written(value: Scalar, unit: str) -> Scalar:
    """A value of a configuration as an author would write it."""
    counts = isinstance(value, int | float) and not isinstance(value, bool)
    return with_unit(value, unit) if unit and counts else value  # type: ignore[arg-type]


def scalar_words(value: Scalar) -> str:
    """As the YAML has it, floats shorter."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def axis_words(axis: KnobAxis) -> str:
    if isinstance(axis, KnobRange):
        return f"{axis.low} to {axis.high}{', log' if axis.log else ''}"
    return ", ".join(map(scalar_words, axis if isinstance(axis, list) else [axis]))


# ---- every value is tried before any is used ----------------------------------------------------------------


def tries(axis: KnobAxis) -> Iterator[tuple[KeyPath, Scalar]]:
    """The values of a knob that are tried, as written, each with its place below the knob's own."""
    match axis:
        case KnobRange():
            yield from ((("low",), axis.low), (("high",), axis.high))
        case list():
            yield from (((index,), value) for index, value in enumerate(axis))
        case _:
            yield (), axis


def loc(path: str, where: KeyPath = ()) -> KeyPath:
    """Where a knob is written in an experiment."""
    return (*WHERE, path, *where)


def steps(key: str, known: object) -> list[str]:
    """The keys that a `key.path` on the command line goes through.

    A knob's own key has dots; what is inside of it (`.low`, `.0`) can be named where it is among the knobs `known`.
    """
    around = ".".join((*WHERE, ""))
    if not key.startswith(around):
        return key.split(".")
    path = key.removeprefix(around)
    inside = [name for name in known if path.startswith(f"{name}.")] if isinstance(known, dict) else []
    knob = max(inside, key=len, default=path)
    return [*WHERE, knob, *path.removeprefix(knob).split(".")[1:]]


def neighbours(experiment: Any, path: str) -> list[str]:
    """The settings beside a knob's, or beside what is misspelt on the way to it: places, as the models know them."""
    *around, _ = path.split(".")
    here, steps = (experiment.engine, around[3:]) if around[2:3] == ["engine"] else (experiment, around)
    around = around[: len(around) - len(steps)]
    for step in steps:
        below = here.get(step) if isinstance(here, dict) else getattr(here, step, None)
        if not isinstance(below, dict | Spec):
            break
        here, around = below, [*around, step]
    return [".".join((*around, name)) for name in type(here).model_fields] if isinstance(here, Spec) else []


def said_of(
    found: ErrorDetails, path: str, where: KeyPath, known: Collection[str], beside: Mapping[str, Scalar]
) -> InitErrorDetails:
    """What is wrong with the experiment that a knob makes, said of the knob where it is written."""
    message, last = found["msg"].removeprefix("Value error, "), path.rpartition(".")[2]
    if found["type"] == "extra_forbidden":
        context: dict[str, Any] = {"expected": ", ".join(map(repr, known))}
        kind = PydanticCustomError("extra_forbidden", "unknown key", context)
        return InitErrorDetails(type=kind, loc=loc(path), input=found["input"])
    if last in found["loc"] and not beside:
        kind = PydanticCustomError(found["type"], found["msg"], found.get("ctx", {}))
        return InitErrorDetails(type=kind, loc=loc(path, where), input=found["input"])
    others = "".join(f" (with {other}: {value})" for other, value in beside.items())
    place = ".".join(map(str, found["loc"]))
    return problem(f"does not fit {place}{others}: {message}", loc(path, where), found["input"], ())


def unique(problems: Iterable[InitErrorDetails]) -> list[InitErrorDetails]:
    """The same mistake once, though several values met it."""
    return [*{(each["loc"], str(each["type"])): each for each in problems}.values()]
