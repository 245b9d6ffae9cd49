"""What differs between arms beside what was meant to: each difference is a rival explanation.

Values that change from trial to trial within an arm (container ids, process numbers) are made anonymous or shown as
such, so that they cannot pass for a difference between arms.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .frames import words
from .reading import Record, at, text

ABSENT = "–"
_EXPECTED = ("namespaces.", "root", "cgroup", "pid", "variable.HOSTNAME", "variable.SPARK_RAY_TRIAL", "arm.")
"""Prefixes of what an environment is made of: these may differ, or there would be no arms."""
_IDENTIFIER = re.compile(r"\b[0-9a-f]{12}\b|\b[0-9a-f]{64}\b|\[\d{10}\]")
_NAMED_BY_CHANCE = ("cgroup", "variable.", "namespaces.")
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
}


@dataclass(frozen=True)
class Row:
    """One property: its value in each arm."""

    name: str
    values: tuple[str, ...]
    differs: bool
    expected: bool


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(f"{prefix}.{text(str(key))}" if prefix else text(str(key)) or "", each)
    elif value is not None:
        shown = words(value)
        yield prefix, _IDENTIFIER.sub("<id>", shown) if prefix.startswith(_NAMED_BY_CHANCE) else shown


def _properties(record: Record) -> dict[str, str]:
    evidence, found = at(record, "result", "evidence"), dict[str, str]()
    renamed = {"environment": "variable", "status": "process"}
    for key, value in evidence.items() if isinstance(evidence, Mapping) else ():
        if key != "libraries":
            found |= _flat(renamed.get(key, text(key) or ""), value)
    found |= _flat("engine", at(record, "result", "measurements", "engine"))
    for name, path in _RECORDED.items():
        found |= _flat(name, at(record, *path))
    return found


def _libraries(records: Iterable[Record]) -> set[str]:
    found: set[str] = set()
    for record in records:
        listed = at(record, "result", "evidence", "libraries")
        found |= (
            {text(each) or "" for each in listed if isinstance(each, str)}
            if isinstance(listed, list)
            else set()
        )
    return found


def _library_row(by_arm: Mapping[str, Sequence[Record]]) -> Row | None:
    loaded = [_libraries(records) for records in by_arm.values()]
    common = set.intersection(*loaded) if loaded else set()
    if not any(loaded):
        return None
    values = tuple(
        f"{len(each)} libraries"
        + (f"; only here or not everywhere: {', '.join(sorted(each - common)[:12])}" if each - common else "")
        for each in loaded
    )
    return Row("libraries", values, any(each != common for each in loaded), expected=False)


def _value(seen: list[dict[str, str]], name: str) -> str:
    values = {each[name] for each in seen if name in each}
    if not values:
        return ABSENT
    return (
        values.pop()
        if len(values) == 1
        else f"varies: {', '.join(sorted(values)[:3])}{', …' if len(values) > 3 else ''}"
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
        values = tuple(_value(seen[arm], name) if arm in seen else ABSENT for arm in arms)
        known = {value for arm, value in zip(arms, values, strict=True) if arm in seen}
        rows.append(Row(name, values, len(known) > 1, name.startswith(_EXPECTED)))
    libraries = _library_row(by_arm)
    if libraries is not None:
        filled = dict(zip(by_arm, libraries.values, strict=True))
        rows.append(
            Row(
                libraries.name,
                tuple(filled.get(arm, ABSENT) for arm in arms),
                libraries.differs,
                expected=False,
            )
        )
    return sorted(rows, key=lambda row: (not row.differs, row.expected, row.name))


def rivals(rows: Sequence[Row], arms: Sequence[str], baseline: str, against: str) -> list[Row]:
    """Unexpected differences between the two compared arms; none where one of them left no evidence."""
    if baseline not in arms or against not in arms:
        return []
    pair = arms.index(baseline), arms.index(against)
    if any(all(row.values[place] == ABSENT for row in rows) for place in pair):
        return []
    return [row for row in rows if not row.expected and row.values[pair[0]] != row.values[pair[1]]]
