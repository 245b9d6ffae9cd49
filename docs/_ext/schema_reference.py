"""A pydantic model's keys as text: where each stands, what may be written there, its default, what it means.

Pure: works on the JSON Schema of any model, which has its references, unions and constraints laid open. An alternative
that is told apart by `kind` becomes a section of its own; a model that is used in several places is described once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

Schema = dict[str, Any]

MISSING = "(no description)"
_NO_BOUND = 2**31 - 1  # integers that a machine word can hold: a bound that nobody meets


@dataclass(frozen=True)
class Key:
    """One key of a mapping."""

    path: str
    name: str
    type: str
    required: bool
    default: str | None
    meaning: str


@dataclass
class Section:
    """The keys of one mapping, at the first place where it is used; `also` are its other places."""

    path: str
    kind: str | None
    intro: str
    keys: list[Key]
    also: list[str] = field(default_factory=list)


def sections(
    model: type[BaseModel], mode: Literal["validation", "serialization"] = "validation"
) -> list[Section]:
    """Every mapping of `model`, outermost first."""
    schema = model.model_json_schema(mode=mode)
    walk = _Walk(schema.get("$defs", {}))
    walk.mapping(schema, "")
    return walk.found


def undescribed(found: list[Section]) -> list[str]:
    """The paths of keys that nobody has described."""
    return [key.path for section in found for key in section.keys if key.meaning == MISSING]


class _Walk:
    def __init__(self, definitions: Schema) -> None:
        self._definitions = definitions
        self._seen: dict[int, Section] = {}  # by the identity of the model's schema
        self.found: list[Section] = []

    def mapping(self, schema: Schema, path: str) -> None:
        properties: Schema = schema.get("properties", {})
        kind = properties.get("kind", {}).get("const")
        intro = schema.get("description", "") or (properties["kind"].get("description", "") if kind else "")
        section = Section(path, kind, intro, [])
        self.found.append(section)
        self._seen[id(schema)] = section
        for name, value in properties.items():
            here = f"{path}.{name}" if path else name
            section.keys.append(self._key(name, value, here, name in schema.get("required", ()), intro))
        for name, value in properties.items():
            self._below(value, f"{path}.{name}" if path else name)

    def _key(self, name: str, schema: Schema, path: str, required: bool, intro: str) -> Key:
        meaning = schema.get("description") or (intro if name == "kind" else "") or MISSING
        default = schema.get("default")
        return Key(
            path, name, self.words(schema), required, None if default is None else _yaml(default), meaning
        )

    def _below(self, schema: Schema, path: str) -> None:
        """Describe the mappings that a key's value is made of."""
        for below, deeper in self._mappings(schema, path):
            seen = self._seen.get(id(below))
            if seen is None:
                self.mapping(below, deeper)
            elif deeper not in {seen.path, *seen.also}:
                seen.also.append(deeper)

    def _mappings(self, schema: Schema, path: str) -> Iterator[tuple[Schema, str]]:
        schema = self._resolve(schema)
        if "properties" in schema:
            yield schema, path
        for option in _options(schema):
            yield from self._mappings(option, path)
        if isinstance(schema.get("additionalProperties"), dict):
            yield from self._mappings(schema["additionalProperties"], f"{path}.NAME")
        if isinstance(schema.get("items"), dict):
            yield from self._mappings(schema["items"], f"{path}[]")

    def _resolve(self, schema: Schema) -> Schema:
        if "$ref" not in schema:
            return schema
        target: Schema = self._definitions[schema["$ref"].rpartition("/")[2]]
        return target

    def words(self, schema: Schema) -> str:
        """What may be written: "integer from 1", "one of `a`, `b`", "mapping"."""
        schema = self._resolve(schema)
        options = _options(schema)
        if options:
            names = dict.fromkeys(self.words(option) for option in options if option.get("type") != "null")
            return ", or ".join(sorted(names, key=lambda name: name == "mapping"))  # plain forms first
        if "const" in schema or "enum" in schema:
            values = schema.get("enum", [schema.get("const")])
            return ("one of " if len(values) > 1 else "") + ", ".join(f"`{_yaml(value)}`" for value in values)
        kind = schema.get("type")
        if "prefixItems" in schema:
            return f"[{', '.join(map(self.words, schema['prefixItems']))}]"
        if kind == "array":
            return f"list, each {self.words(schema.get('items', {}))}"
        if "properties" in schema:
            return "mapping"
        if kind == "object":
            values = schema.get("additionalProperties")
            return (
                f"mapping of names, each {self.words(values)}"
                if isinstance(values, dict) and values
                else "mapping"
            )
        return _scalar(schema)


def _options(schema: Schema) -> list[Schema]:
    options: list[Schema] = [*schema.get("anyOf", []), *schema.get("oneOf", [])]
    return options


def _scalar(schema: Schema) -> str:
    kind = schema.get("type")
    if kind == "string" and schema.get("examples"):
        return f"text with its unit, such as `{schema['examples'][0]}`"
    if kind == "string" and "pattern" in schema and "maxLength" not in schema:
        return f"text that matches `{schema['pattern'].strip('^$')}`"
    if kind in {"integer", "number"}:
        return f"{kind}{_bounds(schema)}"
    words: dict[Any, str] = {"string": "text", "boolean": "true or false", None: "anything"}
    return words.get(kind, str(kind))


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if schema["type"] == "integer":
        low, above = (above + 1, None) if above is not None else (low, None)
        high, below = (below - 1, None) if below is not None else (high, None)
    if above is not None and low is not None and above >= low:
        low = None
    if low is not None and low == high:
        return f" {_yaml(low)}"
    words = [
        f"{word} {_yaml(bound)}"
        for word, bound in (("from", low), ("above", above), ("to", high), ("below", below))
        if bound is not None and abs(bound) < _NO_BOUND
    ]
    return " " + " ".join(words) if words else ""


def _yaml(value: Any) -> str:
    """A value as it is written in YAML; short ones only."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_yaml(each)}" for name, each in value.items()) + "}"
    return str(value)
