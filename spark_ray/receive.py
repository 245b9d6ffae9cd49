"""What comes back from a guest, read as a stranger's: files that are not files, too large, not JSON, or not believable.

Nothing here raises for what a guest wrote. What is refused stays in the attempt folder, and the reason names the field.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from . import guestfiles
from .explain import printable
from .observation import Observation
from .result import KV_CACHE, Asked, Misfit, Result, misfits, problems

MOST_BYTES = 16 << 20
_SHOWN = 3  # problems in a message


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


def parse(data: bytes) -> Any:
    """JSON to the letter: UTF-8, no repeated names, no NaN, no infinity. Raises ValueError for anything else."""
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_object, parse_float=_number, parse_constant=_number
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_result(folder: Path, asked: Asked) -> tuple[dict[str, Any] | None, str | None]:
    """(result, why something of it is missing): no result at all, or one whose kv_cache was not believed.

    (None, None): the guest wrote none.
    """
    try:
        result = parse(guestfiles.read(folder / "result.json", MOST_BYTES))
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        return None, _refusal(getattr(error, "strerror", None) or str(error))
    found = _judge(result, asked)
    if not found:
        return result, None
    why = _refusal("; ".join(_sentence(each) for each in found[:_SHOWN]) + _more(len(found) - _SHOWN))
    if not all(path[:2] == KV_CACHE for path, _ in found):
        return None, why
    # Everything but the capacity can be believed, and says under which conditions the engine was wrong about it.
    kept = {name: part for name, part in result["measurements"].items() if name != KV_CACHE[-1]}
    return {**result, "measurements": kept}, why


def _judge(result: Any, asked: Asked) -> list[Misfit]:
    try:
        return list(misfits(Result.model_validate(result), asked))
    except ValidationError as error:
        return problems(error)


def _refusal(why: str) -> str:
    return f"result.json cannot be believed: {printable(why)}"


def _sentence(found: Misfit) -> str:
    path, message = found
    return f"{'.'.join(map(str, path))}: {message}" if path else message


def _more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""


def read_observations(path: Path) -> list[dict[str, Any]]:
    """What the worker observed, as far as it got. A torn last line, and what is no observation, is left out."""
    try:
        lines = guestfiles.read(path, MOST_BYTES).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            seen = parse(line)
            Observation.model_validate(seen)
        except ValueError:  # of pydantic's errors as well
            continue
        found.append(seen)
    return found
