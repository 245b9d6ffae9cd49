"""SamplingParams: a dataclass in the real package, so that an unknown name is a TypeError there and here."""

from __future__ import annotations

from typing import Any, ClassVar

from .strict import Field, of_version
from .surface import SAMPLING_PARAMS
from .version import GENERATION


class SamplingParams:
    __dataclass_fields__: ClassVar[dict[str, Field]] = of_version(SAMPLING_PARAMS, GENERATION)

    def __init__(self, **values: Any) -> None:
        fields = type(self).__dataclass_fields__
        for name in values:
            if name not in fields:
                raise TypeError(f"SamplingParams.__init__() got an unexpected keyword argument {name!r}")
        for name, field in fields.items():
            value = values.get(name, field.default)
            if name in values and (why := field.misfit(value)) is not None:
                raise TypeError(f"SamplingParams.{name}: {why}")
            setattr(self, name, value)
