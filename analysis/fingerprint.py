"""What differs between arms beside what was meant to: each difference is a rival explanation.

Values that change from trial to trial (container ids, process numbers) are made anonymous where they are known. Of others
all values of an arm count: two arms that both vary, and have a value in common, do not differ.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spark_ray.environments import ATTEMPT_INSIDE, BUNDLE_INSIDE, CACHE_INSIDE, RUN_VARIABLE

from .frames import words
from .reading import Record, at, text

ABSENT = "–"
_EXPECTED = (
    "namespaces.",
    "root",
    "cgroup",
    "pid",
    "variable.HOSTNAME",
    "variable.SPARK_RAY_TRIAL",
    "arm.",
    "gpu.",
)
"""Prefixes of what an environment is made of: these may differ, or there would be no arms."""
_ENVIRONMENT = "arm.environment"
_IDENTIFIER = re.compile(r"\b[0-9a-f]{12}\b|\b[0-9a-f]{64}\b|\[\d{10}\]")
_NAMED_BY_CHANCE = ("cgroup", "variable.", "namespaces.")
_MADE_OF = ("mounts",)
"""What an environment is made of as well, but is nobody's name: expected to differ only where environments do."""
_OWN_FOLDERS = (
    ("/bundle", BUNDLE_INSIDE),
    ("/trials/[^/]+/[0-9]+", ATTEMPT_INSIDE),
    ("/scratch/[^/]+/compile-cache/[^/]+/[^/:]+", CACHE_INSIDE),
)
"""Folders of the run that isolated workers find at one place and native ones where the run is: their names say nothing."""
_RECORDED = {
    "content.image_id": ("content", "image_id"),
    "content.sha256": ("content", "sha256"),
    "content.bound_sha256": ("content", "bound_sha256"),
    "bundle_sha256": ("bundle_sha256",),
    "spark_ray_version": ("spark_ray_version",),
    "arm.environment": ("environment",),
    "arm.treatment": ("treatment",),
    "workload": ("workload",),
    "engine.settings": ("engine",),
    "executor": ("executor",),
    "model.weight_bytes": ("result", "measurements", "model", "weight_bytes"),
    "gpu.driver": ("content", "gpu", "driver"),
    "gpu.exposure": ("content", "gpu", "exposure"),
}
_COUNTED = ("engine.log_warnings",)
"""Texts with amounts in them, which are those of one attempt."""
_QUANTITIES = ("_s", "_bytes")
"""Ends of names of what an engine measured about itself in one attempt: no property of an arm."""
_LISTED = 12  # of many: named in a cell


@dataclass(frozen=True)
class Row:
    """One property: its value in each arm."""

    name: str
    values: tuple[str, ...]
    differs: bool
    expected: bool
    seen: tuple[frozenset[str], ...] = ()  # all values that trials of each arm had; of a set: empty

    def apart(self, first: int, second: int) -> bool:
        """Whether the arms at these places differ in it."""
        if not self.seen:
            return self.values[first] != self.values[second]
        one, other = self.seen[first], self.seen[second]
        return one != other and (min(len(one), len(other)) < 2 or not one & other)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(f"{prefix}.{text(str(key))}" if prefix else text(str(key)) or "", each)
    elif value is not None:
        shown = words(value)
        if prefix.startswith(_NAMED_BY_CHANCE):
            shown = _IDENTIFIER.sub("<id>", shown)
        yield prefix, re.sub(r"\d+", "N", shown) if prefix in _COUNTED else shown


def _placed(value: str, run: str | None) -> str:
    """A value in which this run's own folders stand where every isolated worker finds them."""
    for folder, inside in _OWN_FOLDERS if run else ():
        value = re.sub(f"{re.escape(run or '')}{folder}(?![^/:])", inside, value)
    return value


def _properties(record: Record) -> dict[str, str]:
    evidence, found = at(record, "result", "evidence"), dict[str, str]()
    run = text(at(evidence, "environment", RUN_VARIABLE))
    renamed = {"environment": "variable", "status": "process"}
    for key, value in evidence.items() if isinstance(evidence, Mapping) else ():
        if key not in {"libraries", "mounts"}:
            found |= _flat(renamed.get(key, text(key) or ""), value)
    engine = at(record, "result", "measurements", "engine")
    for key, value in engine.items() if isinstance(engine, Mapping) else ():
        if not str(key).endswith(_QUANTITIES):
            found |= _flat(f"engine.{text(str(key))}", value)
    for name, path in _RECORDED.items():
        found |= _flat(name, at(record, *path))
    return {name: _placed(value, run) for name, value in found.items()}


# ---- sets: libraries and mounts ---------------------------------------------------------------------------


def _strings(value: Any) -> list[str]:
    return [text(each) or "" for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _bound(record: Record) -> dict[str, str]:
    """What is bound into the environment: target to source."""
    mounts = at(record, "content", "mounts")
    rows = [each for each in mounts if isinstance(each, list | tuple)] if isinstance(mounts, list) else []
    return {
        row[1]: row[0] for row in rows if len(row) >= 2 and all(isinstance(each, str) for each in row[:2])
    }


def _source(path: str, bound: Mapping[str, str]) -> str | None:
    """The host's own path of a file that is bound into the environment; None where it is not."""
    for target in sorted(bound, key=len, reverse=True):
        if path == target or path.startswith(f"{target}/"):
            return bound[target] + path.removeprefix(target)
    return None


def _libraries(record: Record) -> set[str]:
    """Loaded libraries, those that are bound into the environment by the host's own path: they are the same files."""
    bound = _bound(record)
    return {_source(path, bound) or path for path in _strings(at(record, "result", "evidence", "libraries"))}


def _mounts(record: Record) -> set[str]:
    """Mounts by target, type and options; a source is a name of the host's, and often made by chance."""
    found, listed = set(), at(record, "result", "evidence", "mounts")
    for each in listed if isinstance(listed, list) else ():
        target, kind, options = (words(at(each, name)) for name in ("target", "type", "options"))
        found.add(_IDENTIFIER.sub("<id>", f"{target} ({kind}; {options})"))
    return found


def _set_row(
    name: str, noun: str, read: Callable[[Record], set[str]], by_arm: Mapping[str, Sequence[Record]]
) -> Row | None:
    """A property that is a set: of all that any trial of an arm had."""
    seen = [set().union(*map(read, records)) for records in by_arm.values()]
    if not any(seen):
        return None
    common = set.intersection(*seen)
    values = tuple(
        f"{len(each)} {noun}"
        + (
            f"; only here or not everywhere: {', '.join(sorted(each - common)[:_LISTED])}"
            if each - common
            else ""
        )
        for each in seen
    )
    return Row(name, values, any(each != common for each in seen), expected=False)


def _shown(found: Sequence[frozenset[str]]) -> tuple[str, ...]:
    """The values of each arm in words: of many those first that not every arm has."""
    everywhere = frozenset.intersection(*found)
    return tuple(
        next(iter(values), ABSENT)
        if len(values) < 2
        else f"varies: {', '.join(sorted(values, key=lambda value: (value in everywhere, value))[:3])}"
        f"{', …' if len(values) > 3 else ''}"
        for values in found
    )


def compare(records: Iterable[Record], arms: Sequence[str]) -> list[Row]:
    """Properties by arm: unexpected differences first, then expected ones, then what is the same everywhere."""
    by_arm: dict[str, list[Record]] = {arm: [] for arm in arms}
    for record in records:
        if record.get("arm") in by_arm and isinstance(at(record, "result", "evidence"), Mapping):
            by_arm[record["arm"]].append(record)
    by_arm = {arm: each for arm, each in by_arm.items() if each}
    seen = {arm: [_properties(record) for record in each] for arm, each in by_arm.items()}
    rows = []
    for name in sorted({name for each in seen.values() for one in each for name in one}):
        found = tuple(frozenset(one[name] for one in seen.get(arm, ()) if name in one) for arm in arms)
        row = Row(name, _shown(found), differs=False, expected=name.startswith(_EXPECTED), seen=found)
        places = [place for place, arm in enumerate(arms) if arm in seen]
        rows.append(replace(row, differs=any(row.apart(*pair) for pair in itertools.combinations(places, 2))))
    for made in (
        _set_row("libraries", "libraries", _libraries, by_arm),
        _set_row("mounts", "mounts", _mounts, by_arm),
    ):
        if made is not None:
            filled = dict(zip(by_arm, made.values, strict=True))
            values = tuple(filled.get(arm, ABSENT) for arm in arms)
            rows.append(Row(made.name, values, made.differs, _made_of(made.name, rows)))
    return sorted(rows, key=lambda row: (not row.differs, row.expected, row.name))


def _made_of(name: str, rows: Sequence[Row]) -> bool:
    """Whether a property may differ because the arms are different environments."""
    return name in _MADE_OF and any(row.name.startswith(_ENVIRONMENT) and row.differs for row in rows)


def rivals(rows: Sequence[Row], arms: Sequence[str], baseline: str, against: str) -> list[Row]:
    """Unexpected differences between the two compared arms; none where one of them left no evidence."""
    if baseline not in arms or against not in arms:
        return []
    pair = arms.index(baseline), arms.index(against)
    if any(all(row.values[place] == ABSENT for row in rows) for place in pair):
        return []
    differ = {row.name for row in rows if row.differs and row.apart(*pair)}
    same_place = not any(name.startswith(_ENVIRONMENT) for name in differ)
    return [
        row
        for row in rows
        if row.name in differ and (not row.expected or (same_place and row.name in _MADE_OF))
    ]
