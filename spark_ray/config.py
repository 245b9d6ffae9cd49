"""From YAML to models, strictly: all problems of a file at once, each with its line. The only home of `yaml`.

Scalars are read by the core rules of YAML 1.2, as editors do: `on`, `yes`, `1:30` and `2024-01-01` are text, so
nothing turns into a boolean, a number of minutes or a date behind the author's back. Plain data only: no tags, no
merge keys, no repeated keys.

`python -m spark_ray.config` prints the JSON Schema for editors.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from . import knobs, roots
from .cluster import Cluster, Node, memory_bandwidth
from .errors import InputError
from .experiment import Experiment
from .explain import KeyPath, at, explain_all, json_schema, printable, shorten, show

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000  # aliases multiply: a file of a few lines can stand for billions of values
MAX_DEPTH = 32
MAX_DIGITS = 40
MAX_PROBLEMS = 50  # shown


@dataclass(frozen=True)
class LoadedExperiment:
    experiment: Experiment
    text: str
    """The file, verbatim."""
    overrides: tuple[str, ...]
    resolved: dict[str, Any]
    """Plain data of the file with the overrides in it, and paths absolute."""
    allowed_roots: tuple[Path, ...]
    """Folders that the file may name."""
    base: Path
    """The folder from which relative paths are meant, absolute."""


def load_experiment(
    path: Path, overrides: Sequence[str] = (), allow_roots: Iterable[str | Path] = (), base: Path = Path()
) -> LoadedExperiment:
    """Read an experiment. `overrides` are `key.path=value`, as in YAML; relative paths are meant from `base`."""
    text = _read(path)
    document = _parse(text, path)
    for order, override in enumerate(overrides):
        _override(document, override, order)
    allowed = roots.allowed(path, allow_roots)
    _confine(document, allowed, base)
    try:
        experiment = Experiment.model_validate(document.data)
    except ValidationError as error:
        for problem in explain_all(error.errors(include_url=False), document.data):
            document.complain(*problem)
        raise document.error() from None
    document.refuse_problems()
    return LoadedExperiment(experiment, text, tuple(overrides), document.data, allowed, base.absolute())


# ---- paths ------------------------------------------------------------------------------------------------


def _paths(document: Document) -> Iterator[KeyPath]:
    """The keys whose value is a folder or a file."""
    arms = document.at("arms")
    places = (("environment", "rootfs"), ("engine", "double"), ("engine", "landscape", "file"))
    of_arms = [("arms", arm, *place) for arm in arms for place in places] if isinstance(arms, dict) else []
    for path in [("model", "path"), ("search", "target", "pilot"), *places[1:], *of_arms]:
        value = document.at(*path)
        if isinstance(value, str) and (path[-1], value) != ("rootfs", "host"):
            yield path


def _confine(document: Document, allowed: Sequence[Path], base: Path) -> None:
    """Make paths absolute; those of the file must be in an allowed folder, those of --set are the user's own word."""
    for path in _paths(document):
        written = document.at(*path)
        try:
            found = roots.real(written, base)
        except ValueError:
            document.complain(path, f"cannot be a path: got {show(written)}")
            continue
        if not document.typed(path) and not any(map(found.is_relative_to, allowed)):
            document.complain(path, printable(roots.refusal(found, allowed)))
        document.at(*path[:-1])[path[-1]] = str(found)


# ---- text to plain data, with the place of each part ------------------------------------------------------


class Place(NamedTuple):
    """Where something was written; `order` sorts lines of the file before overrides."""

    order: int
    where: str


Where = Callable[[yaml.Node], Place]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - typed by PyYAML


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))


_WORDS: dict[str, dict[str, bool | None]] = {
    "bool": {"true": True, "false": False},
    "null": {"null": None, "~": None, "": None},
}


class Document:
    """Plain data, the place of each part of it, and the problems found so far."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.data: Any = None
        self._places: dict[KeyPath, Place] = {}
        self._problems: list[tuple[Place, KeyPath, str]] = []
        self._unread: set[KeyPath] = set()
        self._values = 0

    def line(self, number: int) -> Place:
        return Place(number, f"{self.source}:{number}")

    def place(self, path: KeyPath) -> Place:
        """Where a part was written; a missing part is missing from the part around it."""
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, self.line(1))

    def typed(self, path: KeyPath) -> bool:
        """Whether the user wrote this part on the command line."""
        return self.place(path).order >= MAX_BYTES

    def move(self, path: KeyPath, place: Place) -> None:
        """Forget what the file had here: it was replaced."""
        self._places = {known: old for known, old in self._places.items() if known[: len(path)] != path}
        self._places[path] = place

    def complain(self, path: KeyPath, message: str, place: Place | None = None) -> None:
        # One cause, one line: what cannot be read has no right type either.
        if not any(path[:length] in self._unread for length in range(len(path) + 1)):
            self._problems.append((place or self.place(path), path, message))

    def error(self) -> InputError:
        problems = sorted(self._problems, key=lambda problem: problem[0].order)
        lines = [_sentence(*problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            lines.append(f"{self.source}: and {len(problems) - MAX_PROBLEMS} more problems")
        return InputError("\n".join(lines))

    def refuse_problems(self) -> None:
        if self._problems:
            raise self.error()

    def at(self, *path: str | int) -> Any:
        return at(self.data, path)

    def plain(self, node: yaml.Node, path: KeyPath, where: Where) -> Any:
        """The plain data of a node; notes places and problems on the way."""
        self._values += 1
        if self._values > MAX_VALUES or len(path) > MAX_DEPTH:
            limit = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels"
            raise InputError(
                _sentence(where(node), path[:3], f"{limit}: does an alias (*name) repeat itself?")
            )
        self._places.setdefault(path, where(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, where)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.plain(item, (*path, index), where) for index, item in enumerate(node.value)]
        try:
            return _scalar(node)
        except ValueError as error:
            self.complain(path, str(error))
            self._unread.add(path)
            return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, where: Where) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or not _encodable(key.value):
                self.complain((*path, "?"), "a key must be plain text", where(key))
            elif key.value == "<<" and key.style is None:
                self.complain((*path, "<<"), "merge keys are not read here: write the keys out", where(key))
                self._unread.add(path)
            elif key.value in data:
                first = self.place((*path, key.value)).where
                self.complain((*path, key.value), f"this key is here twice, first at {first}", where(key))
            else:
                self._places[*path, key.value] = where(key)
                data[key.value] = self.plain(value, (*path, key.value), where)
        return data


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    kind = node.tag.removeprefix(_TAG)
    if not isinstance(node, yaml.ScalarNode) or kind not in {"str", "int", "float", "bool", "null"}:
        raise ValueError(f"the tag {node.tag.replace(_TAG, '!!')} is not read here: write plain data")
    text: str = node.value
    if not _encodable(text):
        raise ValueError("half of a surrogate pair is not a character")
    if kind == "str":
        return text
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} characters is too long")
    if kind in {"int", "float"}:
        number = int(text, 0) if kind == "int" else float(text)
        if math.isfinite(number):
            return number
    elif text.lower() in _WORDS[kind]:
        return _WORDS[kind][text.lower()]
    raise ValueError(f"{text!r} is not a {kind} here")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        mend = f"did you mean {path.with_name(near[0])}?" if near else "name the YAML file of an experiment"
        raise InputError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", mend=mend
        ) from None
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{path}: larger than {MAX_BYTES >> 20} MiB, too large for a file written by a person"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8: got byte 0x{data[error.start]:02x}") from None


def _compose(text: str, at_line: Callable[[int], Place]) -> yaml.Node | None:
    """The one document in a text, as nodes; PyYAML's errors in our words."""
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = at_line(mark.line + 1 if mark else 1)
        if "'\\t'" in str(error.problem):
            raise InputError(f"{place.where}: not YAML: a tab; indent with spaces") from None
        words = " ".join(part for part in (error.context, error.problem) if part)
        begun = error.context_mark.line + 1 if error.context_mark else 0
        hint = f" (begun on line {begun})" if begun and mark and begun != mark.line + 1 else ""
        raise InputError(f"{place.where}: not YAML: {words}{hint}") from None
    except yaml.reader.ReaderError as error:
        place = at_line(text.count("\n", 0, error.position) + 1)
        raise InputError(f"{place.where}: not YAML: the character {chr(error.character)!a}") from None
    except RecursionError:
        raise InputError(f"{at_line(1).where}: not YAML: deeper than {MAX_DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # what malformed escapes leave PyYAML as
        raise InputError(f"{at_line(1).where}: not YAML: {error}") from None


def _parse(text: str, path: Path) -> Document:
    document = Document(printable(str(path)))
    node = _compose(text, document.line)
    if node is None:
        raise InputError(f"{document.source}: the file is empty")
    document.data = document.plain(node, (), lambda part: document.line(part.start_mark.line + 1))
    if not isinstance(document.data, dict):
        document.complain((), f"the file must be a mapping (key: value): got {show(document.data)}")
        document.refuse_problems()
    return document


def _override(document: Document, override: str, order: int) -> None:
    """Put one `key.path=value` into a document, in place."""
    place = Place(MAX_BYTES + order, f"--set {shorten(override)}")  # after the last line a file can have
    key, equals, value = override.partition("=")
    steps = knobs.steps(key.strip(), document.at(*knobs.WHERE))
    if not equals or not all(steps) or not _encodable(override):
        raise InputError(f"{place.where}: write it as key.path=value, such as search.blocks=8")
    container, path = document.data, ()  # type: Any, KeyPath
    for depth, step in enumerate(steps):
        if isinstance(container, list) and step.isdecimal() and int(step[:9]) < len(container):
            here: str | int = int(step)
        elif isinstance(container, dict):
            here = step
        else:
            what = f"has no item {step}" if isinstance(container, list) else "is not a mapping"
            raise InputError(_sentence(place, path, f"{what}: got {show(container)}"))
        path = (*path, here)
        if depth < len(steps) - 1:
            if isinstance(container, dict) and container.get(step) is None:
                container[step] = {}
                document.move(path, place)
            container = container[here]
    document.move(path, place)
    node = _compose(value, lambda _: place)
    container[path[-1]] = None if node is None else document.plain(node, path, lambda _: place)


def _sentence(place: Place, path: KeyPath, message: str) -> str:
    keys = shorten(".".join(map(str, path)))
    return f"{place.where}: {keys}: {message}" if keys else f"{place.where}: {message}"


def load_plain(path: Path) -> Any:
    """Plain data of a YAML or JSON file that a program wrote."""
    document = _parse(_read(path), path)
    document.refuse_problems()
    return document.data


# ---- the cluster file -------------------------------------------------------------------------------------


def load_cluster(path: Path) -> Cluster:
    """Read nodes and slots from a file of Ray's cluster launcher; the rest of the file is Ray's own business."""
    document = _parse(_read(path), path)
    name, provider = document.at("cluster_name"), document.at("provider", "type")
    head, workers = document.at("provider", "head_ip"), document.at("provider", "worker_ips")
    if not isinstance(name, str):
        document.complain(("cluster_name",), f"must be a name: got {show(name)}")
    if provider != "local":
        document.complain(
            ("provider", "type"), f"must be local, for machines that are there: got {show(provider)}"
        )
    if not isinstance(workers, list):
        document.complain(("provider", "worker_ips"), f"must be a list, [] for none: got {show(workers)}")
        workers = []
    addresses = [head, *workers]
    for index, address in enumerate(addresses):
        key: KeyPath = ("provider", "worker_ips", index - 1) if index else ("provider", "head_ip")
        if not isinstance(address, str) or not address:
            document.complain(key, f"must be the address of a machine: got {show(address)}")
        elif address in addresses[:index]:
            document.complain(key, f"this machine is here twice: got {show(address)}")
    nodes = [Node("head", head, _slots(document, "head_start_ray_commands"))]
    if workers:
        slots = _slots(document, "worker_start_ray_commands")
        nodes += [Node(f"worker-{index}", address, slots) for index, address in enumerate(workers, 1)]
    key = ("provider", "memory_bandwidth")
    speed = memory_bandwidth(document.at(*key), lambda why: document.complain(key, why))
    document.refuse_problems()
    if not any(node.slots for node in nodes):
        raise InputError(
            f"{document.source}: no node offers a slot: give ray start --resources='{{\"slot\": 1}}'"
        )
    return Cluster(name, tuple(nodes), speed)


def _slots(document: Document, key: str) -> int:
    """The slots that a node offers: from `ray start … --resources='{"slot": N}'`, as Ray itself reads it."""
    commands = document.at(key)
    for index, command in enumerate(commands if isinstance(commands, list) else ()):
        if not re.search(r"\bray start\b", str(command)):
            continue
        try:
            options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
            options.add_argument("--resources", default={}, type=json.loads)
            slots = options.parse_known_args(shlex.split(command))[0].resources.get("slot", 0)
        except (ValueError, AttributeError, argparse.ArgumentError) as error:
            document.complain((key, index), f"cannot be read: {error}: got {show(command)}")
            return 0
        if type(slots) is not int or slots < 0:
            document.complain((key, index), f"slot in --resources must be a whole number: got {show(slots)}")
            return 0
        return slots
    document.complain((key,), "has no `ray start` command, which says how many slots a node offers")
    return 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
