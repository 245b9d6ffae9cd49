"""What TensorRT-LLM says about memory in its log: `parse(text) -> Log`.

The engine builds itself twice: once around a small temporary KV cache for a dry run, which it profiles, and once for
good. Most lines come from both builds, so of those only what follows the Peak line counts. Lines are found wherever they
stand, whatever a logger, MPI or another stream put before or after them.

Nothing is invented: a number counts only inside its whole phrase, in a range that memory can have, and a field that was not
said is None. Where lines contradict each other the last one counts, and `warnings` says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .tensorrt_llm_oom import ENDED, GIB, MOST, SIZE, OutOfMemoryReport, gib, report

_COUNT = r"(\d{1,18})"


@dataclass(frozen=True)
class Window:
    """Blocks of one attention window; models with one kind of attention have one window."""

    size: int
    primary_blocks: int
    secondary_blocks: int


@dataclass(frozen=True)
class Limit:
    """A cap that the user set, and what it left."""

    name: str  # max_tokens or max_gpu_total_bytes
    asked: int  # tokens or bytes, as the name says
    result_bytes: int


@dataclass(frozen=True)
class Log:
    """Sizes in bytes, rounded as they were printed (`resolution_bytes`); None or empty: not said."""

    announced_weights_bytes: int | None = None  # before loading
    prefetched_bytes: int | None = None  # of the checkpoint, into page cache
    weights_bytes: int | None = None  # in torch, before the dry run
    outside_after_load_bytes: int | None = None
    activation_bytes: int | None = None  # in torch, what the dry run needed on top
    outside_bytes: int | None = None  # after the dry run; on unified memory by anybody
    reserved_encoder_bytes: int | None = None  # added to the peak
    peak_bytes: int | None = None
    available_bytes: int | None = None  # negative where the peak is above the total
    fraction: float | None = None
    bytes_per_token: int | None = None
    fixed_cost_bytes: int | None = None  # of the cache, whatever its tokens (state of hybrid models)
    total_bytes: int | None = None
    temporary_kv_bytes: int | None = None
    resolution_bytes: int | None = None  # the step in which sizes were printed, rounded up
    limits: tuple[Limit, ...] = ()
    reserved_workspace_bytes: int | None = None  # taken from the budget
    estimated_bytes: int | None = None  # after caps
    estimated_tokens: int | None = None
    final_free_bytes: int | None = None  # when the final cache was built; exact
    final_total_bytes: int | None = None
    tokens_per_block: int | None = None
    windows: tuple[Window, ...] = ()
    primary_blocks: int | None = None  # over all windows
    reduced: tuple[str, ...] = ()  # what the engine cut since one sequence no longer fitted
    allocated_bytes: int | None = None
    allocated_tokens: int | None = None
    device_quota_bytes: int | None = None  # KV cache manager V2
    host_quota_bytes: int | None = None
    disk_quota_bytes: int | None = None
    torch_limit_bytes: int | None = None  # said last: the engine is built
    out_of_memory: OutOfMemoryReport | None = None
    warnings: tuple[str, ...] = ()


# ---- lines of which the last one counts -------------------------------------------------------------------


def _count(text: str) -> int | None:
    return int(text) if int(text) < MOST else None


def _fraction(text: str) -> float | None:
    return float(text) if 0 < float(text) <= 1 else None


def _reader(field: str) -> Callable[[str], Any]:
    if field == "fraction":
        return _fraction
    return gib if field.endswith("_bytes") and field != "fixed_cost_bytes" else _count


@dataclass(frozen=True)
class _Line:
    pattern: re.Pattern[str]
    fields: tuple[str, ...]  # one for each group
    final: bool  # printed by both builds: only the final one's count

    def values(self, text: str, start: int = 0) -> Iterator[dict[str, Any]]:
        for match in self.pattern.finditer(text, start):
            read = {
                name: _reader(name)(group)
                for name, group in zip(self.fields, match.groups(), strict=True)
                if group is not None
            }
            if None not in read.values():  # one impossible number: nothing on that line is believed
                yield read


def _line(pattern: str, *names: str, final: bool = False) -> _Line:
    return _Line(re.compile(pattern), names, final)


_PROFILED = " in memory usage profiling: " + SIZE + " GiB"
_BOTH_SET = r"Both free_gpu_memory_fraction and max_tokens are set \(to [\d.e-]{1,30} and [\d.]{1,45}"
_LINES = (
    _line("Use " + SIZE + " GB for model weights", "announced_weights_bytes"),
    _line("Prefetching " + SIZE + "GB checkpoint files", "prefetched_bytes"),
    _line(r"Memory used after loading model weights \(inside torch\)" + _PROFILED, "weights_bytes"),
    _line(r"Memory used after loading model weights \(outside torch\)" + _PROFILED, "outside_after_load_bytes"),
    _line(r"Memory dynamically allocated during inference \(inside torch\)" + _PROFILED, "activation_bytes"),
    _line(r"Memory used outside torch(?: \(e\.g\., NCCL and CUDA graphs\))?" + _PROFILED, "outside_bytes"),
    _line("Reserving " + SIZE + " GiB for (?:the )?multimodal encoder", "reserved_encoder_bytes"),
    _line("Reserving " + SIZE + " GiB for the context-MLA attention workspace", "reserved_workspace_bytes"),
    _line("Estimated max memory in KV cache : " + SIZE + " GiB", "estimated_bytes"),
    _line("Estimated max tokens in KV cache : " + _COUNT + ENDED, "estimated_tokens"),
    _line(
        _BOTH_SET + " with free memory " + SIZE + "GiB of total memory " + SIZE + r"GiB, respectively\)",
        "final_free_bytes", "final_total_bytes", final=True,
    ),
    _line(r"Number of tokens per block: " + _COUNT + r"\.", "tokens_per_block", final=True),
    _line("Setting PyTorch memory fraction to [\\d.e-]{1,30} \\(" + SIZE + r" GiB\)", "torch_limit_bytes"),
    _line("KV cache manager v2 device quota set to " + SIZE + "GiB", "device_quota_bytes", final=True),
    _line("KV cache manager v2 host cache quota set to " + SIZE + "GiB", "host_quota_bytes", final=True),
    _line("KV cache manager v2 disk cache quota set to " + SIZE + "GiB", "disk_quota_bytes", final=True),
)  # fmt: skip

# One version divides by 1 << 32 and prints no unit: numbers a quarter of what they should be.
_WITHOUT_UNIT = re.compile(r"with free memory [\d.e-]{1,30} of total memory [\d.e-]{1,30}, respectively\)")

# The Peak line grew over four generations: what follows the second size is read part by part.
_PEAK = re.compile(
    r"Peak memory during memory usage profiling \(torch \+ non-torch\): " + SIZE
    + r" GiB, available KV cache memory when calculating max tokens: (-?\d{1,12}(?:\.\d{1,25})?) GiB"
    r"((?:(?!Peak memory during)[^\n])*\n?)"
)  # fmt: skip
_PEAK_PARTS = (
    _line("fraction is set " + SIZE + ",", "fraction"),
    _line(
        r"kv size(?: per token)? is (\d{1,15})(?:\.0)?(?: bytes/token)?(?: \+ (\d{1,18}) bytes fixed cost)?(?=[.,]?\s)",
        "bytes_per_token",
        "fixed_cost_bytes",
    ),
    _line("device total memory " + SIZE + " GiB", "total_bytes"),
    _line("(?:tmp kv_mem|temporary kv cache memory during profiling) " + SIZE + " GiB", "temporary_kv_bytes"),
)
_LIMITS = (
    re.compile(
        "(max_tokens)=" + _COUNT + r" is provided\. It limits max memory to [\d.e-]{1,30} GiB\. New max_memory is set to " + SIZE + " GiB"
    ),
    re.compile("(max_tokens)=" + _COUNT + " is provided, max_memory is set to " + SIZE + " GiB"),
    re.compile("(max_gpu_total_bytes)=" + SIZE + r" GiB is provided(?:\. New max memory is|, max_memory is set to) " + SIZE + " GiB"),
)  # fmt: skip
_REDUCED = re.compile(
    r"Attention window size \d{1,18} exceeds upper bound \d{1,18} for available blocks\. Reducing to \d{1,18}\."
    r"|Adjusted max_attention_window_vec to \[[\d, ]{1,2000}\]"
    r"|Adjusted window size \d{1,18} to \d{1,18} in blocks_per_window"
    r"|Adjusted max_seq_len to \d{1,18}(?=\s)"
)
_WINDOW = re.compile(
    r"Max KV cache blocks per sequence: \d{1,18} \[window size=" + _COUNT + r"\], tokens per block=" + _COUNT
    + ", primary blocks=" + _COUNT + ", secondary blocks=" + _COUNT + r"(?=[,\s])"
)  # fmt: skip
_ALLOCATED = re.compile(
    r"\[MemUsageChange\] Allocated " + SIZE + r" GiB for max tokens in paged KV cache \(" + _COUNT + r"\)"
)
_DRY_RUN = "for estimation dry run"


class _Reading:
    """Fields as they are found; what contradicts an earlier line replaces it and is said."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.warnings: list[str] = []

    def take(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            before = self.found.get(name, value)
            said = f"{name}: lines disagree, the last one counts ({before}, then {value})"
            if before != value and said not in self.warnings:
                self.warnings.append(said)
            self.found[name] = value


def _peaks(text: str) -> Iterator[dict[str, Any]]:
    for match in _PEAK.finditer(text):
        peak, available = gib(match[1]), gib(match[2])
        if peak is None or available is None:
            continue
        decimals = len(match[1].partition(".")[2])
        step = math.ceil(GIB / 10**decimals)
        found = {"peak_bytes": peak, "available_bytes": available, "resolution_bytes": step}
        for part in _PEAK_PARTS:
            for values in part.values(match[3]):
                found |= values
        yield found


def _final_from(text: str, out_of_memory: bool) -> int:
    """Where the final build begins to speak; the end of the text where it never did."""
    peak, first = _PEAK.search(text), _ALLOCATED.search(text)
    if peak is not None:
        return peak.end(2)
    if first is not None and _ALLOCATED.search(text, first.end()):
        return first.end()  # the Python lines are hidden: of two allocations the first is the dry run's
    return len(text) if out_of_memory or _DRY_RUN in text else 0


def _allocations(text: str, start: int) -> Iterator[dict[str, Any]]:
    for match in _ALLOCATED.finditer(text, start):
        size, tokens = gib(match[1]), _count(match[2])
        if size is not None and tokens is not None:
            yield {"allocated_bytes": size, "allocated_tokens": tokens}


def _windows(text: str, start: int) -> tuple[dict[int, Window], set[int]]:
    """Windows by size, and the block sizes they were printed with."""
    found, block_tokens = {}, set()
    for match in _WINDOW.finditer(text, start):
        size, tokens, primary, secondary = (int(group) for group in match.groups())
        if max(size, tokens, primary, secondary) < MOST:
            found[size] = Window(size, primary, secondary)
            block_tokens.add(tokens)
    return found, block_tokens


def _limits(text: str) -> Iterator[tuple[int, Limit]]:
    for pattern in _LIMITS:
        for match in pattern.finditer(text):
            asked = _count(match[2]) if match[1] == "max_tokens" else gib(match[2])
            result = gib(match[3])
            if asked is not None and result is not None:
                yield match.start(), Limit(match[1], asked, result)


def _unique(values: list[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def parse(text: str) -> Log:
    """Everything that the log says about memory. It never raises, and a line that is not whole says nothing."""
    reading, out_of_memory = _Reading(), report(text)
    final = _final_from(text, out_of_memory is not None)
    peaks = list(_peaks(text))
    for peak in peaks:
        reading.take(peak)
    for name in {name for peak in peaks for name in peak.keys() - peaks[-1].keys()}:
        del reading.found[name]  # of another line: the last one counts, as a whole
    for line in _LINES:
        for values in line.values(text, final if line.final else 0):
            reading.take(values)
    for pool in _allocations(text, final):
        reading.take(pool)
    windows, block_tokens = _windows(text, final)
    for tokens in sorted(block_tokens):
        reading.take({"tokens_per_block": tokens})
    if windows:
        reading.take({"primary_blocks": sum(each.primary_blocks for each in windows.values())})
    if _WITHOUT_UNIT.search(text, final):
        reading.warnings.append(
            "free memory was printed without a unit (a version divides by 1 << 32): not believed"
        )
    if out_of_memory is not None and out_of_memory.component is None and "torch_limit_bytes" in reading.found:
        reading.warnings.append(f"the engine got over this: {out_of_memory.message}")
        out_of_memory = None
    return Log(
        **reading.found,
        limits=_unique([limit for _, limit in sorted(_limits(text), key=lambda found: found[0])]),
        windows=tuple(windows.values()),
        reduced=_unique([match[0] for match in _REDUCED.finditer(text, final)]),
        out_of_memory=out_of_memory,
        warnings=tuple(reading.warnings),
    )
