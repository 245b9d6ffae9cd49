"""Causes of known size, done for real through the product: is the change of KV capacity the one that was said beforehand?

    python benchmarks/known_effects.py [--quick] [--save] [--folder RUNS]

A cell is one environment, one memory view and one group of causes: a fill of page cache and a ballast, or the limit of
a cgroup, each of a random size. It is an experiment whose YAML holds the predictions, executed by `spark_ray.sweep
--local`, with the page cache dropped and per-CPU lists drained. Three checks: the product's own verdict on its
predictions; this file's own arithmetic on the records, from what the host (not the engine) read; and whether the
product's attribution gives the effect to the right term. With --folder a cell that is there is not executed again.
Aims are reported, never asserted.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from overhead import machine, options, save, scratch
from rich.console import Console
from rich.table import Table

from spark_ray.rootact import RootActs
from spark_ray.store import Store
from spark_ray.worker import observe

MIB, GIB = 1 << 20, 1 << 30
SHARE, WITHIN_BYTES = 0.02, 32 * MIB
ATTRIBUTED_SHARE = 0.95
ENVIRONMENTS = ("native", "chroot", "docker")
VIEWS = ("memfree", "memavailable", "cgroup", "engine")
CAUSES, LIMIT = ("fill", "ballast"), ("limit",)

# Which bytes of KV each byte of a cause costs, by view; what is left out costs nothing.
COSTS = {
    "memfree": {"fill", "ballast"},
    "memavailable": {"ballast"},  # page cache counts as available
    "cgroup": {"fill", "ballast", "limit"},  # without a limit it is MemFree
    "engine": set(),  # transformers sizes a CPU pool by total memory: nothing outside reaches it
}
TERM = {"fill": "cache_fill", "ballast": "ballast", "limit": "view"}


@dataclass(frozen=True)
class Cell:
    environment: str
    view: str
    causes: tuple[str, ...]
    fraction: float
    sizes: Mapping[str, int]  # bytes by cause

    @property
    def name(self) -> str:
        return f"{self.environment}-{self.view}-{'-'.join(self.causes)}"


def cells(generator: random.Random, views: Sequence[str], low_mib: int, high_mib: int) -> list[Cell]:
    """Every environment with every view and group of causes, in random order.

    A limit that the view does not see must hold the whole pool: it is a large one, and the fraction is small.
    """
    total = observe.meminfo()["MemTotal"]
    found = []
    for environment in ENVIRONMENTS:
        for view in views:
            for causes in (CAUSES, LIMIT):
                blind = causes == LIMIT and "limit" not in COSTS[view]
                low = high_mib // 2 if blind else low_mib
                sizes = {cause: generator.randint(low, high_mib) * MIB for cause in causes}
                fraction = 0.4 * sizes["limit"] / total if blind else generator.uniform(0.1, 0.2)
                found.append(Cell(environment, view, causes, round(fraction, 4), sizes))
    generator.shuffle(found)
    return found


# ---- one cell ---------------------------------------------------------------------------------------------


def environment_of(cell: Cell, limit_bytes: int | None) -> dict[str, Any]:
    """A limit needs a group: its baseline is the same environment with a group that limits nothing."""
    memory = {} if limit_bytes is None else {"memory": f"{limit_bytes // MIB}MiB"}
    if cell.environment == "docker":
        return {"kind": "docker", **memory}
    if cell.causes == LIMIT:
        root = "host" if cell.environment == "native" else "chroot"
        return {"kind": "isolated", "root": root, "cgroup": True, **memory}
    return {"kind": cell.environment}


def arm_of(cell: Cell, cause: str | None) -> dict[str, Any]:
    size = f"{cell.sizes[cause] // MIB}MiB" if cause else ""
    treatment: dict[str, Any] = {"page_cache": "drop", "per_cpu_pages": "drained"}
    if cause == "fill":
        treatment["page_cache"] = {"fill": size}
    elif cause == "ballast":
        treatment["ballast"] = size
    limit = cell.sizes["limit"] if cause == "limit" else None
    return {"environment": environment_of(cell, limit), "treatment": treatment}


def prediction(cell: Cell, cause: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "arm": cause,
        "baseline": "base",
        "share": SHARE,
        "within": f"{WITHIN_BYTES // MIB}MiB",
    }
    if cause not in COSTS[cell.view]:
        return said | {"quantity": "none", "times": 0, "because": f"{cell.view} does not see a {cause}"}
    if cause == "limit":
        return said | {
            "quantity": "view_free",
            "times": 1,
            "because": "what the limit leaves is all that is free",
        }
    return said | {"quantity": cause, "times": -1, "because": "each byte of it is a byte less free"}


def experiment_of(cell: Cell, engine: str, blocks: int) -> dict[str, Any]:
    model = {"model": {"random_llama": {}}} if engine == "embedded" else {}
    return {
        "name": cell.name,
        "engine": {"kind": engine, "memory_view": cell.view},
        **model,
        "workload": {"requests": 0},
        "search": {
            "sampler": "grid", "blocks": blocks, "repetitions": blocks,
            "space": {"max_batch_size": 8, "max_num_tokens": 256, "memory_fraction": cell.fraction},
        },
        "arms": {"base": arm_of(cell, None), **{cause: arm_of(cell, cause) for cause in cell.causes}},
        "contrast": {"baseline": "base", "against": cell.causes[0]},
        "predictions": [prediction(cell, cause) for cause in cell.causes],
        # The fill is explained by the treatment; images and trees read anew are not, and are not in question.
        "limits": {"trial_timeout": "2min", "cache_tolerance": "4GiB"},
    }  # fmt: skip


def execute(cell: Cell, engine: str, blocks: int, folder: Path) -> dict[str, Any]:
    """Execute a cell and read its records; what went wrong is in `failed`."""
    folder.mkdir(parents=True, exist_ok=True)
    file, run = folder / f"{cell.name}.yaml", folder / cell.name
    file.write_text(yaml.safe_dump(experiment_of(cell, engine, blocks), sort_keys=False))
    again = ["--resume"] if run.exists() else []
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray.sweep", str(file), "--local", "--out", str(run), *again],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    said: dict[str, Any] = {
        "cell": cell.name, "environment": cell.environment, "view": cell.view, "fraction": cell.fraction,
        "sizes_bytes": dict(cell.sizes), "engine": engine, "exit": done.returncode, "duration_s": time.monotonic() - started,
        "effects": [],
    }  # fmt: skip
    if done.returncode:
        return said | {"failed": "\n".join(done.stderr.strip().splitlines()[-3:])}
    records = [each for each in Store.read(run).records() if each["standing"] == "counts"]
    summary = json.loads((run / "summary.json").read_text())
    said["effects"] = [effect(cell, cause, records, summary) for cause in cell.causes]
    said["disturbed_attempts"] = sum(
        each["outcome"]["kind"] == "disturbed" for each in Store.read(run).records()
    )
    return said


# ---- what the records say -----------------------------------------------------------------------------------


def at_sizing(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the host read when the engine was about to: the instrument's second view, not the engine's."""
    found: Mapping[str, Any] = next(o for o in record["host"]["observations"] if o["phase"] == "sizing")
    return found


def left_by_limit(group: Mapping[str, Any], limit_bytes: int) -> int:
    """What a limited group may still take: its limit, less what is charged and cannot be reclaimed."""
    stat, prefix = group["stat"], "total_" if group["version"] == 1 else ""
    reclaimable: int = (
        stat[f"{prefix}inactive_file"] + stat[f"{prefix}active_file"] + stat.get("slab_reclaimable", 0)
    )
    left: int = limit_bytes - (group["usage_bytes"] - reclaimable)
    return left


def expected_bytes(cell: Cell, cause: str, base: Mapping[str, Any], arm: Mapping[str, Any]) -> float:
    """The change of KV that this cause alone makes, from what the host read."""
    if cause not in COSTS[cell.view]:
        return 0.0
    if cause == "limit":
        free = left_by_limit(at_sizing(arm)["cgroup"], cell.sizes["limit"])
        return cell.fraction * (free - at_sizing(base)["meminfo"]["MemFree"])
    resident: int = arm["host"]["at_sizing"][f"{cause}_resident_bytes"]
    return -cell.fraction * resident


def kv_bytes(record: Mapping[str, Any]) -> int | None:
    result = record["result"]
    cache = result and result["measurements"].get("kv_cache")
    return cache["bytes"] if cache and record["outcome"]["kind"] == "ok" else None


def effect(
    cell: Cell, cause: str, records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, Any]:
    by_block: dict[str, dict[str, Mapping[str, Any]]] = {}
    for each in records:
        by_block.setdefault(each["block_id"], {})[each["arm"]] = each
    changes, expected = [], []
    for arms in by_block.values():
        before, after = (kv_bytes(arms[name]) if name in arms else None for name in ("base", cause))
        if before is not None and after is not None:
            changes.append(after - before)
            expected.append(expected_bytes(cell, cause, arms["base"], arms[cause]))
    said: dict[str, Any] = {
        "cause": cause, "size_bytes": cell.sizes[cause], "n": len(changes), "changes_bytes": changes,
        "expected_bytes": expected, "product_says": product_verdict(summary, cause),
    }  # fmt: skip
    if not changes:
        outcomes = {arms[cause]["outcome"]["kind"] for arms in by_block.values() if cause in arms}
        return said | {"held": False, "why": f"no pair with a capacity: {', '.join(sorted(outcomes))}"}
    change, wanted = fmean(changes), fmean(expected)
    said |= {"mean_change_bytes": change, "mean_expected_bytes": wanted,
             "held": abs(change - wanted) <= max(SHARE * abs(wanted), WITHIN_BYTES)}  # fmt: skip
    if abs(wanted) >= WITHIN_BYTES:
        term = mean_term(summary, cause, TERM[cause])
        said["attributed"] = None if term is None else term / wanted
        said["attribution_held"] = term is not None and abs(term / wanted - 1) <= 1 - ATTRIBUTED_SHARE
    return said


def product_verdict(summary: Mapping[str, Any], arm: str) -> str | None:
    return next((each["verdict"] for each in summary.get("predictions", ()) if each["arm"] == arm), None)


def mean_term(summary: Mapping[str, Any], arm: str, term: str) -> float | None:
    terms = next((each["mean_term_bytes"] for each in summary["contrasts"] if each["arm"] == arm), {})
    value: float | None = terms.get(term)
    return value


# ---- all of them --------------------------------------------------------------------------------------------


def table_of(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="change of KV capacity, MiB (mean over blocks)", title_justify="left", box=None, pad_edge=False
    )
    for heading in (
        "environment",
        "view",
        "cause",
        "MiB",
        "fraction",
        "n",
        "expected",
        "found",
        "held",
        "product",
        "right term",
    ):
        table.add_column(
            heading,
            justify="left" if heading in {"environment", "view", "cause", "held", "product"} else "right",
        )
    for cell in sorted(results, key=lambda each: (each["environment"], each["view"])):
        if "failed" in cell:
            table.add_row(
                cell["environment"], cell["view"], "-", "", "", "", "", cell["failed"][:60], "NO", "", ""
            )
        for each in cell["effects"]:
            found = each.get("mean_change_bytes")
            share = each.get("attributed")
            table.add_row(
                cell["environment"], cell["view"], each["cause"], f"{each['size_bytes'] / MIB:.0f}", f"{cell['fraction']:g}",
                str(each["n"]), "-" if found is None else f"{each['mean_expected_bytes'] / MIB:+.1f}",
                each.get("why", "") if found is None else f"{found / MIB:+.1f}", "yes" if each["held"] else "NO",
                each["product_says"] or "-", "-" if share is None else f"{share:.1%}",
            )  # fmt: skip
    return table


def aims_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    effects = [each for cell in results for each in cell["effects"]]
    judged = [each for each in effects if "attribution_held" in each]
    counts = {
        "change within 2 % or 32 MiB of what was expected": [each["held"] for each in effects],
        "the product says held": [each["product_says"] == "held" for each in effects],
        "at least 95 % of the effect in the right term": [each["attribution_held"] for each in judged],
        "cells executed": ["failed" not in cell for cell in results],
    }
    return [
        f"{what}: {sum(held)} of {len(held)}: {'met' if all(held) else 'NOT met'}"
        if held
        else f"{what}: nothing to ask"
        for what, held in counts.items()
    ]


@contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """The folder given, whose cells are kept; else one that goes."""
    if folder is None:
        with scratch(None) as made:
            yield made
    else:
        yield folder


def main() -> None:
    parser = options(__doc__, rounds=3, trials=1)
    parser.add_argument(
        "--engine", choices=("embedded", "probe"), default="embedded",
        help="of the views that both have; the view `engine` is the embedded engine's alone",
    )  # fmt: skip
    chosen = parser.parse_args()
    if not (root := RootActs()).available()[0]:
        raise SystemExit(f"draining per-CPU lists, chroot and cgroups need root: {root.available()[1]}")
    engine, views, sizes = chosen.engine, VIEWS, (256, 4096)
    if chosen.quick:
        engine, views, sizes, chosen.rounds = "probe", ("memfree", "memavailable", "cgroup"), (256, 768), 1
    planned = cells(random.Random(chosen.seed), views, *sizes)
    if chosen.quick:  # every cause (a limit where it is seen), view and environment at least once
        planned = one_of_each(
            [each for each in planned if each.causes == CAUSES or "limit" in COSTS[each.view]]
        )
    began, results = machine(), []
    with kept(chosen.folder) as folder:
        for number, cell in enumerate(planned, 1):
            done = folder / "cells" / f"{cell.name}.json"
            if done.exists():
                results.append(json.loads(done.read_text()))
                continue
            kind = "embedded" if cell.view == "engine" else engine
            found = execute(cell, kind, chosen.rounds, folder)
            if "failed" not in found:
                done.parent.mkdir(exist_ok=True)
                done.write_text(json.dumps(found, indent=1))
            results.append(found)
            print(f"{number} of {len(planned)}: {cell.name}, {found['duration_s']:.0f} s", file=sys.stderr)
    console = Console(width=150)
    console.print(table_of(results))
    lines = aims_of(results)
    console.print(*lines, sep="\n", highlight=False)
    if chosen.save:
        save("known_effects", {"machine": began, "load_average_at_end": os.getloadavg(), "seed": chosen.seed, "blocks": chosen.rounds,
                               "tolerance": {"share": SHARE, "bytes": WITHIN_BYTES}, "cells": results, "aims": lines})  # fmt: skip


def one_of_each(planned: Sequence[Cell]) -> list[Cell]:
    """A small cover of environments, views and groups of causes: always the cell that brings most of what is missing."""
    found: list[Cell] = []
    seen: set[object] = set()

    def brings(cell: Cell) -> int:
        return len({cell.environment, cell.view, cell.causes} - seen)

    while brings(best := max(planned, key=brings)):
        found.append(best)
        seen |= {best.environment, best.view, best.causes}
    return found


if __name__ == "__main__":
    main()
