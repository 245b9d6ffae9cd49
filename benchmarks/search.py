"""How many blocks does a map need? Our search beside Optuna's samplers, grids, bisection and AIPerf's planners.

    python benchmarks/search.py [--quick] [--save] [--folder CELLS] [--only METHOD,LANDSCAPE,…] [--seeds N] [--workers N]

A cell is (landscape, method, seed): one line of JSON in CELLS/METHOD.jsonl, not executed again while it is there, so that an
interrupted benchmark goes on where it was, and the tables are printed from whatever is there. Simulated throughout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import landscapes
import search_metrics as metrics
import search_ours as ours
import search_rivals as rivals
import search_tables
from landscapes import Block, Landscape, Machine
from search_ours import Contender

from spark_ray.search_spec import Configuration

CELLS = Path(__file__).parent.parent / "runs" / "search_benchmark"
BLOCKS = 150
FIRST_SEED = 100  # nothing was tuned on these
CHECKPOINTS = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 150)
ON_A_LINE = (*range(4, 21), *(n for n in CHECKPOINTS if n > 20))
SETTLED = 3  # checkpoints in a row at which the target holds end a cell
QUICK = (("steep_low", FIRST_SEED), ("line_steep", FIRST_SEED))
QUICK_BLOCKS = 24
TIMED = (190, 25)  # asks and tells after so many blocks, and how many

SEVERAL_SLOTS = (
    "steep_low",
    "steep_high",
    "flat_low",
    "heavy",
    "memavailable",
    "interaction",
    "bump",
    "wrong_law",
)


@dataclass(frozen=True)
class Method:
    start: Any  # (landscape, seed) -> Contender; of the grid: None
    seeds: int
    blocks: int = BLOCKS
    dimensions: tuple[int, ...] = (1, 2, 3)
    slots: int = 1
    stops: bool = False  # by itself: a cell then goes on until it would have
    only: tuple[str, ...] = ()  # landscapes; none named: all
    in_three: int | None = None  # seeds in three dimensions, where a cell takes long

    def seeds_on(self, landscape: str) -> int:
        dimension = len(landscapes.make(landscape, FIRST_SEED).searched)
        if dimension not in self.dimensions or (self.only and landscape not in self.only):
            return 0
        fewer = dimension == 3 and landscape not in search_tables.NULLS  # ten seeds tell no rate of 5 %
        return self.in_three if self.in_three and fewer else self.seeds

    def explores(self, landscape: str) -> bool:
        return self.seeds_on(landscape) > 0


def _rival(sampler: Any, chart: Any = rivals.PlainMap) -> Any:
    return lambda landscape, seed: ours.Mapped(sampler(landscape, seed), chart(landscape))


METHODS: dict[str, Method] = {
    "random": Method(_rival(rivals.random), 20),
    "qmc": Method(_rival(rivals.qmc), 20),
    "tpe": Method(_rival(rivals.tpe), 20),
    "optuna_gp": Method(_rival(rivals.optuna_gp), 8, blocks=search_tables.CUT["optuna_gp"]),
    "grid": Method(None, 8),
    "bisection": Method(_rival(rivals.Bisection), 20, dimensions=(1,)),
    "monotonic": Method(_rival(rivals.Monotonic), 20, dimensions=(1,)),
    "smooth_isotonic": Method(_rival(rivals.SmoothIsotonic), 20, dimensions=(1,)),
    "qmc_our_map": Method(_rival(rivals.qmc, ours.LawMap), 8),
    "ours_no_law": Method(ours.without_law, 8, dimensions=(3,)),
    "ours": Method(ours.with_law, 20, stops=True, in_three=10),
    "ours_8_slots": Method(ours.with_law, 8, slots=8, only=SEVERAL_SLOTS),
}


# ---- one cell ---------------------------------------------------------------------------------------------------


def execute(name: str, landscape_name: str, seed: int, blocks: int | None = None) -> dict[str, Any]:
    """One cell, as it is stored."""
    began = time.process_time()
    method = METHODS[name]
    landscape = landscapes.make(landscape_name, seed)
    if method.start is None:
        path = list(_grids(landscape, seed, blocks))
    else:
        path = list(_checkpoints(method, landscape, seed, min(blocks or BLOCKS, method.blocks)))
    rounded = [{key: _rounded(value) for key, value in found.items()} for found in path]
    spent_s = _rounded(time.process_time() - began)
    return {"method": name, "landscape": landscape_name, "seed": seed, "cpu_s": spent_s, "path": rounded}


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _checkpoints(method: Method, landscape: Landscape, seed: int, blocks: int) -> Iterator[dict[str, Any]]:
    """Blocks one after the other, each begun while `slots` - 1 others are pending; judged at the checkpoints.

    Ends when the target has held for long and, where a method stops by itself, it would have.
    """
    known, contender = metrics.truth(landscape), method.start(landscape, seed)
    held, stopped = 0, False
    spent_s: list[float] = []
    checkpoints = ON_A_LINE if len(landscape.searched) == 1 else CHECKPOINTS
    for done, over in _executed(contender, Machine(landscape, seed), method.slots, blocks, spent_s):
        if not over and len(done) not in checkpoints:
            continue
        began = time.process_time()
        if (said := contender.predict(done, known.points)) is None:
            continue
        found = {"blocks": len(done), **metrics.score(known, said, contender.diverges(known.points))}
        found["map_s"] = time.process_time() - began
        found["ask_tell_s"] = sum(spent_s) / len(spent_s)
        spent_s.clear()
        found |= contender.declared()
        yield found
        stopped |= not method.stops or found["stop"]
        held = held + 1 if metrics.holds(found) else 0
        if held >= SETTLED and stopped:
            return


def _executed(
    contender: Contender, machine: Machine, slots: int, blocks: int, spent_s: list[float]
) -> Iterator[tuple[list[Block], bool]]:
    """The blocks so far, after each, and whether that is all. `spent_s` gets the seconds of tell and the asks after it."""
    pending: deque[Configuration] = deque()
    done: list[Block] = []

    def fill() -> None:
        while len(pending) < slots and len(done) + len(pending) < blocks:
            if (asked := contender.ask()) is None:
                return
            pending.append(asked)

    fill()
    while pending:
        done.append(machine.execute(pending.popleft()))
        began = time.process_time()
        contender.tell(done[-1])
        fill()
        spent_s.append(time.process_time() - began)
        yield done, not pending


def _grids(landscape: Landscape, seed: int, most: int | None) -> Iterator[dict[str, Any]]:
    """Ever finer full grids, each on its own; more blocks than others may have, so that some grid suffices."""
    known = metrics.truth(landscape)
    for levels in rivals.GRID_LEVELS[len(landscape.searched)]:
        points = rivals.grid(landscape, levels)
        if most is not None and len(points) > most:
            return
        machine = Machine(landscape, seed * 100 + levels)
        order = machine.shuffled(points)
        said = rivals.PlainMap(landscape).predict([machine.execute(point) for point in order], known.points)
        yield {"blocks": len(points), **metrics.score(known, said)}


# ---- all cells --------------------------------------------------------------------------------------------------


def wanted(only: Sequence[str], seeds: int | None) -> Iterator[tuple[str, str, int]]:
    """Cells, seed by seed, so that an unfinished benchmark has something of everything."""
    most = max(method.seeds for method in METHODS.values()) if seeds is None else seeds
    for seed, landscape, (name, method) in itertools.product(range(most), landscapes.MAKERS, METHODS.items()):
        chosen = _named(only, name, METHODS) and _named(only, landscape, landscapes.MAKERS)
        if chosen and seed < min(method.seeds_on(landscape), most):
            yield name, landscape, FIRST_SEED + seed


def _named(only: Sequence[str], name: str, kind: Mapping[str, object]) -> bool:
    """Whether it is among those of its kind that were named; none named: all are."""
    return name in only or not set(only) & set(kind)


def stored(folder: Path) -> list[dict[str, Any]]:
    """Every whole line; one that a killed benchmark left torn is no cell."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                print(f"{file.name}: a torn line, its cell is executed again", file=sys.stderr)
    return found


def store(folder: Path, cell: Mapping[str, Any]) -> None:
    with (folder / f"{cell['method']}.jsonl").open("a+", encoding="utf-8") as file:
        if file.tell() and not _ends_whole(folder / f"{cell['method']}.jsonl"):
            file.write("\n")
        file.write(json.dumps(cell) + "\n")


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _end_with_parent() -> None:
    """A worker whose benchmark was killed would wait for ever."""
    if (parent := parent_process()) is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def execute_all(
    folder: Path, cells: Sequence[tuple[str, str, int]], blocks: int | None, workers: int
) -> list[str]:
    """What failed, by cell; the others go on."""
    began, failed = time.monotonic(), []
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:
        asked = {pool.submit(execute, *cell, blocks): " ".join(map(str, cell)) for cell in cells}
        try:
            for count, future in enumerate(as_completed(asked), 1):
                if error := future.exception():
                    failed.append(f"{asked[future]}: {error!r}")
                else:
                    store(folder, future.result())
                minutes = (time.monotonic() - began) / 60
                print(f"{count}/{len(cells)} after {minutes:.1f} min: {asked[future]}", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise an interrupt waits for all that is left
            raise
    return failed


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=CELLS, help="where cells are kept")
    parser.add_argument("--only", default="", help="methods and landscapes, by name, with commas; none: all")
    parser.add_argument("--seeds", type=int, help="fewer of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="for CI: shows that it works, not how well")
    parser.add_argument("--table", action="store_true", help="execute nothing, print what is there")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/search.json")
    chosen = parser.parse_args()
    chosen.only = [name for name in chosen.only.split(",") if name]
    if unknown := set(chosen.only) - set(METHODS) - set(landscapes.MAKERS):
        parser.error(f"no such method or landscape: {', '.join(sorted(unknown))}")
    return chosen


def main() -> None:
    chosen = options()
    # one thread a worker: matrices are small, and workers share the cores
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    blocks, cells = None, list(wanted(chosen.only, chosen.seeds))
    with ExitStack() as stack:
        folder = chosen.folder
        if chosen.quick:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            blocks, cells = QUICK_BLOCKS, [cell for cell in cells if cell[1:] in QUICK]
        folder.mkdir(parents=True, exist_ok=True)
        there = {(cell["method"], cell["landscape"], cell["seed"]) for cell in stored(folder)}
        missing = [] if chosen.table else [cell for cell in cells if cell not in there]
        failed = execute_all(folder, missing, blocks, chosen.workers)
        found = stored(folder)
    land = landscapes.make("steep_high", FIRST_SEED)
    timed = [] if chosen.table else ours.ask_tell_s(land, FIRST_SEED, *TIMED)
    summary = search_tables.summary(found, timed)
    search_tables.show(summary)
    if chosen.save:
        from overhead import machine, save  # and with it all that races there

        save("search", {"machine": machine(), **summary})
    if failed:
        sys.exit("\n".join(("failed:", *failed)))


if __name__ == "__main__":
    main()
