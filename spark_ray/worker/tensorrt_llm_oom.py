"""TensorRT-LLM's account of memory that ran out, and how the engine prints numbers.

When a component of the executor cannot be created the engine says which, how much memory there was, and what was free before
and after each component before it. Where there is no such report, torch's own message stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

GIB = 1 << 30  # what the engine prints as GiB, and as GB where it speaks of weights
MOST = 1 << 60  # no memory has an exbibyte, no cache as many tokens
SIZE = r"(\d{1,12}(?:\.\d{1,25})?(?:e[+-]?\d{1,3})?)"  # Python prints tiny floats with an exponent
ENDED = r"(?=\s)"  # a number at the end of a line that was cut short is no number


def gib(text: str) -> int | None:
    """Bytes of a number of GiB; None for what no memory has."""
    size = float(text) * GIB
    return round(size) if abs(size) < MOST else None


@dataclass(frozen=True)
class Stage:
    """A component that was created before memory ran out."""

    name: str
    free_before_bytes: int
    free_after_bytes: int


@dataclass(frozen=True)
class OutOfMemoryReport:
    """The engine's own account, or torch's where there is no other (then without component and stages)."""

    message: str
    component: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None  # before the component, or when torch asked
    requested_bytes: int | None = None
    stages: tuple[Stage, ...] = ()


_FAILED = re.compile(
    r"Executor creation failed (?:due to insufficient GPU memory"
    r"|with an error which might indicate insufficient GPU memory)\."
)
_COMPONENT = re.compile(r"The following component could not be created: ([^\n]{1,200})")
_TOTAL = re.compile(r"Total GPU memory \(GiB\): " + SIZE + ENDED)
_FREE = re.compile(r"Free GPU memory before component creation attempt \(GiB\): " + SIZE + ENDED)
_CREATED = re.compile(
    r"Previously created components and free GPU memory before/after creation \(GiB\):[ \t\r]*\n"
)
_STAGE = re.compile(r"([^:\n]{1,120}): " + SIZE + " / " + SIZE + r"\s*")
_PREFIX = re.compile(
    r"\s*(?:\[[^\]\n]{0,60}\]\s*(?:<\w{1,10}>)?:?\s*)*"
)  # of loggers, and MPI's [1,0]<stdout>:
_REPORT_CHARS = 20_000
_NUMBER, _UNIT = r"(\d{1,12}(?:\.\d{1,5})?)", "([KMG]iB|bytes)"
_TORCH = re.compile(
    rf"CUDA out of memory\. Tried to allocate {_NUMBER} {_UNIT}\."
    rf"(?:[^\n]{{0,40}}?total capacity of {_NUMBER} {_UNIT} of which {_NUMBER} {_UNIT} is free)?"
    r"|CUDA error: out of memory"
)
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}


def _stages(report: str) -> Iterator[Stage]:
    """The list of components, up to the empty line that ends it; lines of others in between are passed over."""
    created = _CREATED.search(report)
    lines = report[created.end() :].split("\n") if created else []
    for line in lines[:-1]:  # the last one has not ended
        plain = _PREFIX.sub("", line, count=1)
        if not plain.strip():
            return
        match = _STAGE.fullmatch(plain)
        before, after = (gib(match[2]), gib(match[3])) if match else (None, None)
        if match and before is not None and after is not None:
            yield Stage(match[1].strip(), before, after)


def _sized(pattern: re.Pattern[str], report: str) -> int | None:
    match = pattern.search(report)
    return None if match is None else gib(match[1])


def _own(text: str, start: re.Match[str], end: int) -> OutOfMemoryReport:
    report = text[start.start() : min(end, start.start() + _REPORT_CHARS)]
    component = _COMPONENT.search(report)
    return OutOfMemoryReport(
        message=start[0],
        component=component[1].strip() if component else None,
        total_bytes=_sized(_TOTAL, report),
        free_bytes=_sized(_FREE, report),
        stages=tuple(_stages(report)),
    )


def _of_torch(match: re.Match[str]) -> OutOfMemoryReport:
    def size(group: int) -> int | None:
        if match[group] is None:
            return None
        found = round(float(match[group]) * _UNITS[match[group + 1]])
        return found if found < MOST else None

    return OutOfMemoryReport(match[0], None, size(3), size(5), size(1))


def _tried(text: str, match: re.Match[str]) -> bool:
    """Whether the autotuner said that: it tries kernels that may not fit, and goes on with others."""
    return "[Autotuner]" in text[text.rfind("\n", 0, match.start()) + 1 : match.start()]


def report(text: str) -> OutOfMemoryReport | None:
    """The last report that names a component, else the last of the engine's, else torch's last message."""
    starts = list(_FAILED.finditer(text))
    ends = [*(start.start() for start in starts[1:]), len(text)]
    own = [_own(text, start, end) for start, end in zip(starts, ends, strict=False)]
    named = [each for each in own if each.component is not None]
    said = _TORCH.finditer(text) if not own else ()
    torch = [_of_torch(match) for match in said if not _tried(text, match)]
    for reports in (named, own, torch):
        if reports:
            return reports[-1]
    return None


def account(report: OutOfMemoryReport) -> str:
    """The engine's own account of memory that ran out, in a line."""
    parts = [report.message]
    if report.component:
        parts.append(f"it could not create: {report.component}")
    if report.free_bytes is not None:
        parts.append(f"free before that: {report.free_bytes} of {report.total_bytes} bytes")
    parts += [
        f"{each.name} took {each.free_before_bytes - each.free_after_bytes} bytes" for each in report.stages
    ]
    return "; ".join(parts)
