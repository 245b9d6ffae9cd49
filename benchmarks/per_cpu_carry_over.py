"""Free pages that wait in per-CPU lists: what a predecessor freed is missing from the next trial's KV cache, unless drained.

    python benchmarks/per_cpu_carry_over.py [--quick] [--save]

Before every trial another process takes N GiB on all CPUs and frees them. Both arms of a block get the same N and come
in random order; one leaves the per-CPU lists as they are, the other drains them. The engine is the probe: the real
sizing law over the real MemFree, fraction 0.9. Afterwards it is watched how long the lists keep the pages by themselves,
and how soon the gate, which counts them, lets a trial begin. Draws docs/per-cpu-carry-over.svg with --save.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from driving import Quiet, Run
from overhead import machine, options, save, scratch
from rich.console import Console

from analysis import statistics
from spark_ray import host
from spark_ray.plan import Block
from spark_ray.rootact import RootActs
from spark_ray.worker import observe

MIB, GIB = 1 << 20, 1 << 30
FRACTION = 0.9
SHARE, WITHIN_BYTES = 0.02, 32 * MIB
TOLERANCE_BYTES = 512 * MIB  # limits.memory_tolerance's default
FIGURE = Path(__file__).parent.parent / "docs" / "per-cpu-carry-over.svg"

PREDECESSOR = """
import mmap, os, sys
size = int(sys.argv[1]) // os.cpu_count() // mmap.PAGESIZE * mmap.PAGESIZE
children = []
for cpu in sorted(os.sched_getaffinity(0)):
    if not (child := os.fork()):
        os.sched_setaffinity(0, {cpu})
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block[::mmap.PAGESIZE] = b"." * (size // mmap.PAGESIZE)
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


def predecessor(size_bytes: int) -> None:
    """Take memory on every CPU and free it there, in a process that is gone afterwards."""
    subprocess.run([sys.executable, "-I", "-S", "-c", PREDECESSOR, str(size_bytes)], check=True)


def arm(per_cpu_pages: str) -> dict[str, Any]:
    return {"environment": "native", "treatment": {"page_cache": "drop", "per_cpu_pages": per_cpu_pages}}


def experiment(seed: int, pairs: int) -> dict[str, Any]:
    return {
        "name": "per_cpu_carry_over",
        "seed": seed,
        "engine": {"kind": "probe", "memory_view": "memfree", "pool": "none"},
        "workload": {"requests": 0},
        "search": {
            "sampler": "grid", "blocks": pairs, "repetitions": pairs,
            "space": {"max_batch_size": 8, "max_num_tokens": 256, "memory_fraction": FRACTION},
        },
        "arms": {"as_is": arm("as_is"), "drained": arm("drained")},
        "contrast": {"baseline": "drained", "against": "as_is"},
    }  # fmt: skip


class Predecessor(Quiet):
    """The same size before both arms of a block, random between blocks."""

    def __init__(self, generator: random.Random, most_bytes: int) -> None:
        self._generator, self._most_bytes = generator, most_bytes
        self.size_bytes: dict[str, int] = {}

    def trial_started(self, slot: str, block: Block, arm: str, attempt: int) -> None:  # noqa: ARG002
        drawn = self._generator.randint(self._most_bytes // 8, self._most_bytes)
        predecessor(self.size_bytes.setdefault(block.block_id, drawn))


def point(record: Mapping[str, Any]) -> dict[str, Any]:
    """What one trial found: its capacity, what waited in the lists when it was sized, and what the gate saw."""
    measured = record["result"]["measurements"]
    return {
        "kv_cache_bytes": measured["kv_cache"]["bytes"],
        "per_cpu_free_bytes": measured["sizing"]["per_cpu_free_bytes"],
        "mem_free_bytes": measured["sizing"]["free_bytes"],
        "position": record["position"],
        "gate_waited_s": record["host"]["wait"]["waited_s"],
        "gate_reached": record["host"]["wait"]["reached"],
        "treatment": record["host"]["treatment"],
    }


def pairs_of(run: Run, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    found = []
    for block in run.blocks():
        if any(record["outcome"]["kind"] != "ok" for record in block.values()):
            continue
        made = {name: point(record) for name, record in block.items()}
        waiting = made["as_is"]["per_cpu_free_bytes"] - made["drained"]["per_cpu_free_bytes"]
        found.append(
            made
            | {
                "freed_before_bytes": sizes[block["as_is"]["block_id"]],
                "short_bytes": made["drained"]["kv_cache_bytes"] - made["as_is"]["kv_cache_bytes"],
                "expected_bytes": FRACTION * waiting,
            }
        )
    return found


# ---- without a drain ----------------------------------------------------------------------------------------


def recovery(size_bytes: int, longest_s: float) -> dict[str, Any]:
    """How the lists give back by themselves, and when each gate would have let the next trial begin."""
    RootActs().run("drain-per-cpu")
    info, before = observe.meminfo(), host.releasable_bytes()
    predecessor(size_bytes)
    started, rows = time.monotonic(), []
    blind_s = counting_s = None
    while True:
        after_s, now = time.monotonic() - started, observe.meminfo()
        waiting = observe.per_cpu_free_bytes()
        rows.append([round(after_s, 3), now["MemFree"], now["MemAvailable"], waiting])
        if counting_s is None and now["MemAvailable"] + waiting >= before - TOLERANCE_BYTES:
            counting_s = after_s
        if blind_s is None and now["MemAvailable"] >= info["MemAvailable"] - TOLERANCE_BYTES:
            blind_s = after_s
        if after_s >= longest_s:
            break
        time.sleep(min(1.0, longest_s / 10))
    drain_started = time.monotonic()
    RootActs().run("drain-per-cpu")
    return {
        "freed_bytes": size_bytes, "watched_s": longest_s, "gate_that_counts_lists_s": counting_s, "gate_blind_to_lists_s": blind_s,
        "columns": ["after_s", "mem_free_bytes", "mem_available_bytes", "per_cpu_free_bytes"], "rows": rows,
        "drain_s": time.monotonic() - drain_started, "left_after_drain_bytes": observe.per_cpu_free_bytes(),
    }  # fmt: skip


# ---- what it says -------------------------------------------------------------------------------------------


def lines_of(pairs: Sequence[Mapping[str, Any]], alone: Mapping[str, Any]) -> list[str]:
    short = statistics.paired([each["short_bytes"] for each in pairs])
    off = statistics.paired([each["short_bytes"] - each["expected_bytes"] for each in pairs])
    assert short.mean is not None
    assert off.mean is not None
    expected = short.mean - off.mean
    drained = max(each["drained"]["per_cpu_free_bytes"] for each in pairs)
    met = "met" if abs(off.mean) <= max(SHARE * abs(expected), WITHIN_BYTES) else "NOT met"
    firsts = sum(each["as_is"]["position"] == 0 for each in pairs)
    waits = max(each["as_is"]["gate_waited_s"] for each in pairs)

    def seconds(value: float | None) -> str:
        return f"not within {alone['watched_s']:.0f} s" if value is None else f"{value:.2f} s"

    gates = (
        f"memory back for a gate that counts the lists after {seconds(alone['gate_that_counts_lists_s'])}, "
        f"for one that does not after {seconds(alone['gate_blind_to_lists_s'])}"
    )
    drain = (
        f"a drain takes {alone['drain_s']:.2f} s and leaves {alone['left_after_drain_bytes'] / MIB:.0f} MiB"
    )
    return [
        f"{len(pairs)} pairs, as_is first in {firsts}: KV short by {mean_of(short)} when left as it is",
        f"0.9 x what waited in the lists: {expected / MIB:.0f} MiB; the rest {mean_of(off)}, aim within 2 % or 32 MiB: {met}",
        f"drained: at most {drained / MIB:.0f} MiB waited at the sizing moment",
        f"the gate before as_is trials waited {waits:.2f} s at most: it counts what waits, and says so in the record",
        f"after {alone['freed_bytes'] / GIB:.1f} GiB were freed: {gates}; {drain}",
    ]


def mean_of(found: statistics.Paired) -> str:
    said = f"{(found.mean or 0.0) / MIB:.1f} MiB"
    if found.low is None or found.high is None:
        return said
    return f"{said} (95 %: {found.low / MIB:.1f} to {found.high / MIB:.1f})"


def figure(pairs: Sequence[Mapping[str, Any]]) -> str:
    """KV capacity against what waited in the lists, each trial a point, with the law's line. Plain SVG."""
    level = sum(each["drained"]["kv_cache_bytes"] for each in pairs) / len(pairs)
    points = {
        name: [(each[name]["per_cpu_free_bytes"] / GIB, (each[name]["kv_cache_bytes"] - level) / GIB) for each in pairs]
        for name in ("as_is", "drained")
    }  # fmt: skip
    every = [value for each in points.values() for value in each]
    most = 1.05 * max(0.5, *(x for x, _ in every))
    low = 1.05 * min(-FRACTION * most, *(y for _, y in every))
    high = max(-0.1 * low, 1.05 * max(y for _, y in every))
    left, top, width, height = 70, 60, 560, 300

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * x / most, top + height * (high - y) / (high - low)

    def text(x: float, y: float, said: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{said}</text>'

    step = next(each for each in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if max(most, high - low) / each <= 10)
    parts = []
    for number in range(int(most / step) + 1):
        x = at(number * step, 0)[0]
        parts += [
            f'<path d="M{x:.1f} {top}V{top + height}" stroke="#e3e3e3"/>',
            text(x, top + height + 18, f"{number * step:.1f}", 'text-anchor="middle"'),
        ]
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = at(0, number * step)[1]
        parts += [
            f'<path d="M{left} {y:.1f}H{left + width}" stroke="{"#999" if number == 0 else "#e3e3e3"}"/>',
            text(left - 8, y + 4, f"{number * step:.1f}", 'text-anchor="end"'),
        ]
    (x0, y0), (x1, y1) = at(0, 0), at(most, -FRACTION * most)
    parts.append(f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="#555" stroke-dasharray="5 4"/>')
    colours = {"as_is": "#c2410c", "drained": "#1d4ed8"}
    for name, found in points.items():
        parts += [
            f'<circle cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" r="5" fill="{colours[name]}" fill-opacity=".7"/>'
            for x, y in found
        ]
    key = left + width - 195
    parts += [
        text(left, 22, "KV capacity after a predecessor freed memory", 'font-size="15" font-weight="bold"'),
        text(left, 42, f"{len(pairs)} pairs, random order; GiB against the mean of the drained trials"),
        text(left + width / 2, top + height + 38, "free pages in per-CPU lists when the engine was sized, GiB", 'text-anchor="middle"'),
        *(text(key, top + 24 + 18 * row, f'<tspan fill="{colours[name]}">●</tspan> {said}')
          for row, (name, said) in enumerate({"as_is": "lists left as they are", "drained": "lists drained"}.items())),
        text(key, top + 60, f"- - the law: −{FRACTION:g} × what waits"),
    ]  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {top + height + 50}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    parser = options(__doc__, rounds=12, trials=1)
    parser.add_argument("--figure", type=Path, help=f"where the figure is drawn (with --save: {FIGURE.name})")
    chosen = parser.parse_args()
    if not (root := RootActs()).available()[0]:
        raise SystemExit(f"draining per-CPU lists needs root: {root.available()[1]}")
    if chosen.quick:
        chosen.rounds = 3
    most = min(2 * GIB if chosen.quick else 8 * GIB, observe.meminfo()["MemAvailable"] * 2 // 5)
    began = machine()
    with scratch(chosen.folder) as folder:
        before = Predecessor(random.Random(chosen.seed), most)
        run = Run(folder / "carry", experiment(chosen.seed, chosen.rounds))
        try:
            run.drive(chosen.rounds, before)
            pairs = pairs_of(run, before.size_bytes)
        finally:
            run.close()
        if not pairs:
            raise SystemExit("no pair of trials has a capacity: see the records with --folder")
        alone = recovery(most, 2.0 if chosen.quick else 120.0)
    lines = lines_of(pairs, alone)
    Console(width=140).print(*lines, sep="\n", highlight=False)
    target = chosen.figure or (FIGURE if chosen.save else None)
    if target:
        target.write_text(figure(pairs), encoding="utf-8")
        print(f"drew {target.name}", file=sys.stderr)
    if chosen.save:
        save("per_cpu_carry_over", {"machine": began, "load_average_at_end": os.getloadavg(), "fraction": FRACTION, "pairs": pairs,
                                    "without_drain": alone, "said": lines})  # fmt: skip


if __name__ == "__main__":
    main()
