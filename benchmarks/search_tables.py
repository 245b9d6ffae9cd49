"""The tables of `search.py`, and what it aims at, from the cells that are there."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import landscapes
import search_metrics as metrics
from rich.console import Console
from rich.table import Table

Path_ = Sequence[Mapping[str, Any]]
Paths = dict[tuple[str, str], list[Path_]]
"""Checkpoints of every seed, by method and landscape."""

OPTUNA = ("random", "qmc", "tpe", "optuna_gp")
CUT = {"optuna_gp": 40}  # blocks, for its time: its asks grow slow, and all is to take 90 minutes
BUDGET = 150
NULLS = ("null", "near_null")
FLOOR_SEED = 100
CALIBRATION = (
    "contrast_coverage",
    "capacity_coverage",
    "contrast_width",
    "capacity_width",
    "confidently_wrong",
)
SPACE_FILLED = 16  # blocks before calibration is asked for


def summary(cells: Iterable[Mapping[str, Any]], ask_tell_s: Sequence[float]) -> dict[str, Any]:
    """Everything printed, as data."""
    paths: Paths = defaultdict(list)
    cpu_s: dict[str, float] = defaultdict(float)
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        cpu_s[cell["method"]] += cell.get("cpu_s", 0.0)
        if cell["path"]:  # no grid fits into few blocks
            paths[cell["method"], cell["landscape"]].append(cell["path"])
    methods = list(dict.fromkeys(method for method, _ in paths))
    floors = {name: metrics.floor(landscapes.make(name, FLOOR_SEED)) for name in landscapes.MAKERS}
    return {
        "rows": {
            name: {
                "floor_t1_blocks": floors[name].t1 if floors[name] else None,  # type: ignore[union-attr]
                "floor_iou_95_blocks": floors[name].iou_95 if floors[name] else None,  # type: ignore[union-attr]
                "methods": {
                    method: _row(paths[method, name]) for method in methods if (method, name) in paths
                },
            }
            for name in landscapes.MAKERS
            if any((method, name) in paths for method in methods)
        },
        "calibration": {method: dict(_calibration(method, paths)) for method in methods if method != "grid"},
        "cpu_s": {method: round(spent) for method, spent in cpu_s.items()},
        "ask_tell_s": list(ask_tell_s),
        "aims": list(_aims(paths, floors, ask_tell_s)),
    }


def _row(paths: Sequence[Path_]) -> dict[str, Any]:
    firsts = [metrics.blocks_of_a_seed(path) for path in paths]
    reached = sorted(first if first is not None else 10**6 for first in firsts)
    middle = reached[len(reached) // 2]
    ious = [path[-1]["iou"] for path in paths if path[-1]["iou"] is not None]
    return {
        "seeds": len(paths),
        "n80": metrics.n80(paths),
        "median_blocks": middle if middle < 10**6 else None,
        "n80_boundary": metrics.n80(paths, metrics.boundary_holds),
        "last_iou": statistics.median(ious) if ious else None,
        "ask_tell_s": statistics.median(found.get("ask_tell_s", 0.0) for path in paths for found in path),
    }


# ---- calibration ------------------------------------------------------------------------------------------------


def _settled(paths: Iterable[Path_]) -> Iterator[Mapping[str, Any]]:
    return (found for path in paths for found in path if found["blocks"] >= SPACE_FILLED)


def _calibration(method: str, paths: Paths) -> Iterator[tuple[str, Any]]:
    """Means over landscapes of means over checkpoints and seeds, and the worst landscape."""
    by_landscape = {
        name: list(_settled(paths[method, name])) for name in landscapes.MAKERS if (method, name) in paths
    }
    for what in CALIBRATION:
        means = {
            name: statistics.fmean(row[what] for row in rows) for name, rows in by_landscape.items() if rows
        }
        if means:
            worst = (min if what.endswith("coverage") else max)(means, key=means.__getitem__)
            yield what, {"pooled": statistics.fmean(means.values()), "worst": means[worst], "where": worst}


def _interval_ratio(method: str, plain: str, paths: Paths, what: str) -> float | None:
    """Interval scores of one method over another's at the same landscape and checkpoint, geometric mean."""
    ratios = []
    for name in landscapes.MAKERS:
        scores: list[dict[int, list[float]]] = [defaultdict(list), defaultdict(list)]
        for each, found in zip((method, plain), scores, strict=True):
            for row in _settled(paths.get((each, name), [])):
                found[row["blocks"]].append(row[what])
        ratios += [
            statistics.fmean(scores[0][blocks]) / statistics.fmean(scores[1][blocks])
            for blocks in scores[0].keys() & scores[1].keys()
        ]
    return metrics.geometric_mean(ratios) if ratios else None


# ---- aims -------------------------------------------------------------------------------------------------------


def aim(
    what: str, found: float | None, wanted: float, unit: str = "", *, at_least: bool = False, note: str = ""
) -> str:
    if found is None:
        return f"{what}: nothing there yet"
    met = found >= wanted if at_least else found <= wanted
    sign = ">=" if at_least else "<="
    return f"{what}: {found:.3g}{unit}{note}, aim {sign} {wanted:g}{unit}: {'met' if met else 'NOT met'}"


def _aims(
    paths: Paths, floors: Mapping[str, metrics.Floor | None], ask_tell_s: Sequence[float]
) -> Iterator[str]:
    yield from _against_optuna(paths)
    yield from _against_grid(paths)
    yield from _absolute(paths, floors)
    yield from _against_floor(paths, floors)
    yield from _on_a_line(paths)
    yield from _trust(paths)
    yield from _stops(paths)
    spent_s = statistics.fmean(ask_tell_s) if ask_tell_s else None
    note = f" (longest {max(ask_tell_s, default=0):.2g} s)"
    yield aim("ask and tell at 200 blocks, mean", spent_s, 0.3, " s", note=note)
    yield from _in_parallel(paths)


def _n80(paths: Paths, method: str, name: str) -> tuple[float, bool] | None:
    """Blocks, and whether that is only where the budget ended."""
    if not paths.get((method, name)):
        return None
    found = metrics.n80(paths[method, name])
    return (CUT.get(method, BUDGET), True) if found is None else (found, False)


def _ratios(paths: Paths, rivals: Sequence[str]) -> dict[str, tuple[float, bool, bool]]:
    """Of n80 to the best rival's by landscape, whether ours reached the target, and whether any rival did.

    A sampler that was cut is no bound: one that did not reach the target counts with the whole budget.
    """
    found = {}
    for name in landscapes.MAKERS:
        own = _n80(paths, "ours", name)
        theirs = [each for rival in rivals if (each := _n80(paths, rival, name))]
        if name in NULLS or own is None or not theirs:
            continue
        reached = [blocks for blocks, censored in theirs if not censored]
        best = min(reached, default=BUDGET)
        found[name] = (own[0] / best, not own[1], bool(reached))
    return found


def _against_optuna(paths: Paths) -> Iterator[str]:
    ratios = _ratios(paths, OPTUNA)
    mean = metrics.geometric_mean([ratio for ratio, _, _ in ratios.values()]) if ratios else None
    censored = sum(not theirs for _, _, theirs in ratios.values())
    note = f" (on {censored} of {len(ratios)} no Optuna sampler reached it and counts {BUDGET})"
    yield aim("n80 over that of the best Optuna sampler, geometric mean", mean, 0.35, note=note)
    if ratios:
        worst = max(ratios, key=lambda name: ratios[name][0])
        yield aim("... worst landscape", ratios[worst][0], 1.2, note=f" ({worst})")
        told = [ratio for ratio, ours, theirs in ratios.values() if ours or theirs]
        nobody = ", ".join(name for name, (_, ours, theirs) in ratios.items() if not (ours or theirs))
        if nobody and told:
            yield f"... geometric mean without {nobody}, mapped by none of them and not by ours: {metrics.geometric_mean(told):.3g}"


def _against_grid(paths: Paths) -> Iterator[str]:
    ratios = []
    for name in landscapes.MAKERS:
        own, grid = _n80(paths, "ours", name), paths.get(("grid", name))
        if own and grid and name not in NULLS:
            largest = max(found["blocks"] for path in grid for found in path)
            ratios.append(own[0] / (metrics.n80(grid) or largest))
    yield aim(
        "n80 over the smallest sufficient grid, geometric mean",
        metrics.geometric_mean(ratios) if ratios else None,
        1 / 6,
        note=" (a grid that never sufficed counts as the largest)",
    )


def _contrast_noise(name: str) -> float:
    """Standard deviation of one block's contrast in the middle of the space."""
    land = landscapes.make(name, FLOOR_SEED)
    points = landscapes.cells(land.searched)
    kv, gain = land.uncapped_gib(points)[:, 0], land.gain(points)
    return float(statistics.median(2**0.5 * land.noise.arm_gib * gain / kv))


def _absolute(paths: Paths, floors: Mapping[str, metrics.Floor | None]) -> Iterator[str]:
    """Not asked of a landscape whose floor is above the aim: nobody gets there."""
    groups: dict[str, tuple[int, Callable[[landscapes.Landscape], bool]]] = {
        "where the law holds and a block's noise is at most 1.6 %": (
            20,
            lambda land: land.contained and round(_contrast_noise(land.name), 3) <= 0.016,
        ),
        "off the law": (80, lambda land: not land.contained and land.beyond is None),
        "at the cliff": (160, lambda land: land.beyond is not None),
    }
    for what, (most, belongs) in groups.items():
        found = {
            name: float("inf") if each[1] else each[0]  # the budget is no answer
            for name in landscapes.MAKERS
            if name not in NULLS
            and belongs(landscapes.make(name, FLOOR_SEED))
            and (each := _n80(paths, "ours", name))
        }
        least = {name: floor.t1 for name, floor in floors.items() if floor and floor.t1}
        for name in [name for name in found if least.get(name, 0) > most]:
            yield f"{name}: {most} blocks are not asked for, its floor is {least[name]}; n80 {found.pop(name):g}"
        if found:
            worst = max(found, key=found.__getitem__)
            within = sum(blocks <= most for blocks in found.values())
            note = f" ({worst}; {within} of {len(found)} landscapes within)"
            yield aim(f"n80 {what}, the worst", found[worst], most, " blocks", note=note)


def _against_floor(paths: Paths, floors: Mapping[str, metrics.Floor | None]) -> Iterator[str]:
    """Where the law holds; the start takes 8 blocks, whatever the floor."""
    found = {
        name: own[0] / (2 * floor.t1 + 8)
        for name, floor in floors.items()
        if floor is not None and floor.t1 is not None
        if landscapes.make(name, FLOOR_SEED).contained
        and name not in NULLS
        and (own := _n80(paths, "ours", name))
    }
    if found:
        worst = max(found, key=found.__getitem__)
        note = f" ({worst}; {sum(ratio <= 1 for ratio in found.values())} of {len(found)} landscapes within)"
        yield aim("n80 where the law holds, over 2 x floor + 8 blocks, the worst", found[worst], 1, note=note)


def _on_a_line(paths: Paths) -> Iterator[str]:
    for name in landscapes.MAKERS:
        if ("ours", name) not in paths or ("bisection", name) not in paths:
            continue
        own, theirs = (
            metrics.n80(paths[method, name], metrics.boundary_holds) for method in ("ours", "bisection")
        )
        if theirs is None:
            yield f"{name}: bisection never finds the boundary in 80 % of seeds; ours by {own} blocks"
        else:
            yield aim(
                f"{name}: blocks to the boundary more than bisection's {theirs}", (own or BUDGET) - theirs, 2
            )


def _trust(paths: Paths) -> Iterator[str]:
    found = dict(_calibration("ours", paths))
    for what in ("contrast", "capacity"):
        if f"{what}_coverage" in found:
            coverage, width = found[f"{what}_coverage"], found[f"{what}_width"]
            where = f" ({coverage['where']})"
            yield aim(f"95 % band of {what}, coverage", 100 * coverage["pooled"], 93, " %", at_least=True)
            yield aim("... worst landscape", 100 * coverage["worst"], 88, " %", at_least=True, note=where)
            yield aim("... median width", 100 * width["pooled"], 6, " %")
            ratio = _interval_ratio("ours", "qmc", paths, f"{what}_interval_score")
            yield aim("... interval score over the plain process's at QMC points", ratio, 1)
    if "confidently_wrong" in found:
        wrong = found["confidently_wrong"]
        note = f" (worst {100 * wrong['worst']:.2g} %, {wrong['where']})"
        yield aim("confidently wrong volume", 100 * wrong["pooled"], 0.5, " %", note=note)
    for name in NULLS:
        if own := paths.get(("ours", name)):
            most = [
                max((row["confident_false_divergence"] for row in _settled([path])), default=0)
                for path in own
            ]
            false = [each > metrics.MOST_MISCLASSIFIED for each in most]
            yield aim(
                f"{name}: seeds that ever were sure of a divergence in over 1 % of the volume",
                100 * statistics.fmean(false),
                5,
                " %",
            )


def _stops(paths: Paths) -> Iterator[str]:
    """True over declared misclassification where our search would have stopped by itself."""
    ratios = {}
    for name in landscapes.MAKERS:
        found = [[row for row in path if row.get("stop")] for path in paths.get(("ours", name), [])]
        stops = [rows[0] for rows in found if rows]
        declared = sum(row["declared"] for row in stops)
        if stops and declared > 0:
            ratios[name] = sum(row["divergence_misclassified_all"] for row in stops) / declared
    if ratios:
        worst = max(ratios, key=ratios.__getitem__)
        note = f" ({worst}; median {statistics.median(ratios.values()):.2g}, {len(ratios)} landscapes with a stop)"
        yield aim(
            "at a self-declared stop, true over declared error, worst landscape",
            ratios[worst],
            1.5,
            note=note,
        )


def _in_parallel(paths: Paths) -> Iterator[str]:
    ratios = []
    for name in landscapes.MAKERS:
        pair = [paths.get((method, name), []) for method in ("ours_8_slots", "ours")]
        seeds = min(map(len, pair))  # the same first ones of both
        if name not in NULLS and seeds:
            means = [
                metrics.geometric_mean([metrics.blocks_of_a_seed(path) or BUDGET for path in each[:seeds]])
                for each in pair
            ]
            ratios.append(means[0] / means[1])
    mean = metrics.geometric_mean(ratios) if ratios else None
    yield aim("8 slots: blocks over those of one slot, geometric mean", mean, 1.15)


# ---- print ------------------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any]) -> None:
    # not a terminal: tables as wide as they are, so that a log can be read
    console = Console(width=None if os.isatty(1) else 200)
    methods = list(dict.fromkeys(method for row in found["rows"].values() for method in row["methods"]))
    table = Table(
        title="SIMULATED. Blocks to T1: n80 (median over seeds); -: not within the blocks spent, floor: none off the law"
    )
    for heading in ("landscape", "floor T1", "floor IoU .95", *methods):
        table.add_column(heading, justify="left" if heading == "landscape" else "right")
    for name, row in found["rows"].items():
        cells = [_counts(row["methods"].get(method)) for method in methods]
        table.add_row(name, _blocks(row["floor_t1_blocks"]), _blocks(row["floor_iou_95_blocks"]), *cells)
    console.print(table)
    table = Table(title="SIMULATED. From 16 blocks on: pooled over landscapes (worst landscape), %")
    for heading in ("method", *CALIBRATION):
        table.add_column(heading.replace("_", " "), justify="right")
    for method, kinds in found["calibration"].items():
        if kinds:
            cells = (f"{100 * each['pooled']:.2f} ({100 * each['worst']:.2f})" for each in kinds.values())
            table.add_row(method, *cells)
    console.print(table)
    lines = {name: row for name, row in found["rows"].items() if name.startswith("line")}
    if lines:
        table = Table(
            "landscape", *methods, title="SIMULATED. On a line: blocks until the boundary is found, n80"
        )
        for name, row in lines.items():
            each = [row["methods"].get(method) for method in methods]
            table.add_row(name, *("" if found is None else _blocks(found["n80_boundary"]) for found in each))
        console.print(table)
    spent = ", ".join(f"{method} {seconds / 60:.0f}" for method, seconds in found["cpu_s"].items())
    console.print(f"All cells took {sum(found['cpu_s'].values()) / 60:.0f} min of one core: {spent}")
    console.print("SIMULATED. What is aimed at:")
    for line in found["aims"]:
        console.print(line, highlight=False)


def _counts(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{_blocks(found['n80'])} ({_blocks(found['median_blocks'])})"


def _blocks(count: int | None) -> str:
    return "-" if count is None else str(count)
