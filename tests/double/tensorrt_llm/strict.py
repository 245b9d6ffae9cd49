"""Settings classes that take exactly the names and types of a table: what the real package does with pydantic.

Stricter than pydantic in one thing: "8" is not 8, and True is not 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class Field:
    """One setting: what is asked of pydantic's FieldInfo, and in which versions it exists."""

    def __init__(
        self,
        default: Any,
        *types: Any,
        choices: tuple[Any, ...] = (),
        low: float | None = None,
        high: float | None = None,
        since: int = 0,
        until: int = 99,
        required: bool = False,
        optional: bool = False,
    ) -> None:
        self.default = default  # a class: made anew each time, as by default_factory
        self.types = types  # none given: anything
        self.choices = choices
        self.low, self.high = low, high
        self.since, self.until = since, until
        self.required = required
        self.optional = optional or (default is None and not required)

    def is_required(self) -> bool:
        return self.required

    def get_default(self, *, call_default_factory: bool = False) -> Any:
        if not isinstance(self.default, type):
            return self.default
        return self.default() if call_default_factory else None

    @property
    def annotation(self) -> Any:
        return self.types[0] if self.types else Any

    def misfit(self, value: Any) -> str | None:
        """Why a value is none for this setting."""
        if value is None and self.optional:
            return None
        if self.types and not any(_is(value, each) for each in self.types):
            return (
                f"Input should be a valid {' or '.join(each.__name__ for each in self.types)} [got {value!r}]"
            )
        if self.choices and value not in self.choices:
            return f"Input should be one of {', '.join(map(str, self.choices))} [got {value!r}]"
        if self.low is not None and value < self.low:
            return f"Input should be greater than or equal to {self.low} [got {value!r}]"
        if self.high is not None and value > self.high:
            return f"Input should be less than or equal to {self.high} [got {value!r}]"
        return None


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


Table = list[tuple[str, Field]]
"""Name and setting; a name may be there twice, for different versions."""


def of_version(table: Table, minor: int) -> dict[str, Field]:
    """What exists in 1.`minor`."""
    return {name: field for name, field in table if field.since <= minor <= field.until}


class StrictModel:
    """`model_fields` is the class's table of this version; an unknown name or a wrong value is a ValueError."""

    model_fields: ClassVar[dict[str, Field]] = {}

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        problems = [f"{name}\n  Extra inputs are not permitted" for name in values if name not in fields]
        for name, field in fields.items():
            if name not in values:
                if field.required:
                    problems.append(f"{name}\n  Field required")
                setattr(self, name, field.get_default(call_default_factory=True))
                continue
            value = _made(values[name], field)
            if (why := field.misfit(value)) is not None:
                problems.append(f"{name}\n  {why}")
            setattr(self, name, value)
        if problems:
            count = f"{len(problems)} validation error{'s' if len(problems) > 1 else ''}"
            raise ValueError("\n".join([f"{count} for {type(self).__name__}", *problems]))
        self.model_fields_set = set(values)

    def model_dump(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value.model_dump() if isinstance(value, StrictModel) else value
            for name, value in values.items()
        }


def _made(value: Any, field: Field) -> Any:
    """A mapping given for a settings class becomes one, as in YAML."""
    models = [each for each in field.types if isinstance(each, type) and issubclass(each, StrictModel)]
    return models[0](**value) if models and isinstance(value, Mapping) else value
