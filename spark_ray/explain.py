"""What pydantic found wrong with an experiment, in the words of the file: where, what, and what was probably meant."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from .experiment import Experiment

KeyPath = tuple[str | int, ...]

_NO_MAPPING = {"model_type", "model_attributes_type", "dict_type"}
_OWN_WORDS = {"value_error", "inconsistent"}  # our own messages: some have the value in them
_MISSING, _MEANT = "this key is missing", "did you mean "
_YES, _NO = {"yes", "on", "y"}, {"no", "off", "n"}


@functools.cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema of an experiment, for editors."""
    schema = Experiment.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "spark_ray experiment",
    }


def explain_all(errors: Sequence[ErrorDetails], data: Any) -> list[tuple[KeyPath, str]]:
    """Every error's path and words; a required key that was only misspelt is one problem, not two."""
    found = [explain(error, data) for error in errors]
    meant = {
        (*path[:-1], message.rpartition(_MEANT)[2].rstrip("?"))
        for error, (path, message) in zip(errors, found, strict=True)
        if error["type"] == "extra_forbidden" and _MEANT in message
    }
    return [(path, message) for path, message in found if message != _MISSING or path not in meant]


def explain(error: ErrorDetails, data: Any) -> tuple[KeyPath, str]:
    """The path in `data` of one validation error, and what is wrong there."""
    kind, got, context = error["type"], error["input"], error.get("ctx", {})
    path = _locate(error["loc"], data)
    choices = re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags") or ""))
    if kind == "missing":
        return (*path, error["loc"][-1]), _MISSING
    if kind == "union_tag_not_found":
        return (*path, "kind"), f"this key is missing: one of {', '.join(_kinds(path))}"
    if kind == "extra_forbidden":
        known = choices or _known_keys(path[:-1], at(data, (*path[:-1], "kind")))
        return path, "unknown key" + _suggest(path[-1], known, otherwise="keys here")
    if kind == "union_tag_invalid":
        got = context["tag"]
        if has(at(data, path), "kind"):  # otherwise a bare name stands for {kind: name}
            path = (*path, "kind")
    elif not isinstance(at(data, path), dict | list):
        got = at(data, path)  # as written: "0s", not 0.0
    message = _message(kind, error["msg"], choices, context)
    if not path:  # a key that is not there, though another makes it necessary
        return error["loc"][:1], message
    if kind == "too_short":
        got = context["actual_length"]
    if not (kind in _OWN_WORDS and (isinstance(got, dict | list) or show(got) in message)):
        message += f": got {show(got)}"
    return path, message + _hint(kind, got, choices)


def _message(kind: str, message: str, choices: Sequence[str], context: dict[str, Any]) -> str:
    if kind in {"literal_error", "union_tag_invalid"}:
        return f"must be {'one of ' if len(choices) > 1 else ''}{', '.join(choices)}"
    if kind in _NO_MAPPING:
        return "must be a mapping (key: value)"
    if kind == "bool_type":
        return "must be true or false"
    if kind == "too_short":
        return f"must have at least {context['min_length']}"
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


def _hint(kind: str, got: object, choices: Sequence[str]) -> str:
    if kind == "bool_type" and isinstance(got, str) and got.lower() in _YES | _NO:
        return f"; did you mean {'true' if got.lower() in _YES else 'false'}?"
    if kind == "string_type" and isinstance(got, bool | int | float):
        return "; write it in quotes"
    return _suggest(got, choices) if isinstance(got, str) else ""


def _suggest(word: object, choices: Iterable[str], otherwise: str = "") -> str:
    choices = sorted(choices)
    close = difflib.get_close_matches(str(word).lower()[:100], choices, 1, 0.6)
    if close:
        return f"; {_MEANT}{close[0]}?"
    return f"; {otherwise}: {', '.join(choices)}" if otherwise and choices else ""


def has(data: Any, step: str | int) -> bool:
    """Whether a mapping has a key, or a list an index."""
    if isinstance(data, list):
        return isinstance(step, int) and 0 <= step < len(data)
    return isinstance(data, dict) and step in data


def at(data: Any, path: KeyPath) -> Any:
    """The data at a path; None where there is none."""
    for step in path:
        if not has(data, step):
            return None
        data = data[step]
    return data


def _locate(loc: tuple[str | int, ...], data: Any) -> KeyPath:
    # pydantic's own path has the names of union members in it: they are not in the file, so left out.
    path: KeyPath = ()
    for step in loc:
        if has(data, step):
            path, data = (*path, step), data[step]
    return path


def _known_keys(path: KeyPath, kind: object) -> set[str]:
    """Keys that the models know at a path of the file."""
    return {
        key
        for schema in _schemas(path)
        if "kind" not in schema.get("properties", {})
        or schema["properties"]["kind"].get("const", kind) == kind
        for key in schema.get("properties", {})
    }


def _kinds(path: KeyPath) -> list[str]:
    kinds = [schema.get("properties", {}).get("kind", {}).get("const") for schema in _schemas(path)]
    return [kind for kind in kinds if kind]


def _schemas(path: KeyPath) -> list[dict[str, Any]]:
    # Looked up in the JSON Schema, which has the references and unions of the models laid open.
    schemas = _members(json_schema())
    for step in path:
        children = [
            child
            for schema in schemas
            for child in (
                schema.get("properties", {}).get(step),
                schema.get("additionalProperties"),
                schema.get("items"),
            )
            if isinstance(child, dict)
        ]
        schemas = [member for child in children for member in _members(child)]
    return schemas


def _members(schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in schema:
        return _members(json_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    options = schema.get("anyOf", []) + schema.get("oneOf", [])
    return [member for option in options for member in _members(option)] or [schema]


def show(value: object) -> str:
    """A value as its author would know it, in one short line."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return shorten(repr(value))


def printable(text: str) -> str:
    """Text that is safe to print in one line."""
    return text if text.isprintable() else ascii(text)[1:-1]


def shorten(text: str) -> str:
    """Printable text that fits into a message."""
    text = printable(text)
    return text if len(text) <= 80 else text[:79] + "…"
