"""Sweeps killed at random instants until they are whole, and what their deaths cost; beside them Optuna and Ray Tune.

    python benchmarks/chaos.py [--quick] [--kills N] [--seed N] [--save]

Runs of the fake and the embedded engine, in every environment that this machine has, are struck by faults of every
kind (`chaos_faults.KINDS`), resumed, and struck again; then each must be whole. Docker is a private engine of the
benchmark's own. Exit status 1 if anything of ours was lost, counted twice or left behind; times are reported only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_faults import KINDS, Kind, Struck, driver_of
from chaos_places import Engine, EngineError, small_disk
from chaos_rivals import Row, cells_of, compare
from chaos_sweep import Run, experiment, score
from overhead import aim, machine, options, save, scratch
from rich.console import Console
from rich.table import Table

AIM_RESTART_S = 2.0
DISK_BYTES = 64 << 20
BLOCKS = {"fake": 6, "disk": 4, "ray": 4, "embedded": 2}
BLOCKS_QUICK = {"fake": 4, "disk": 2, "ray": 2, "embedded": 1}
SAMPLERS = ("random", "qmc", "tpe")
NOT_QUICK = {"guest's supervisor", "Docker daemon, SIGTERM", "driver (Ray)", "guest's worker, embedded engine",
             "container, embedded engine"}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What this machine has."""

    folder: Path
    engine: Engine | None
    left_out: dict[str, str]  # environment or tier: why
    blocks: Mapping[str, int]  # of a run, by its kind

    @property
    def environments(self) -> list[str]:
        kinds = [
            "native",
            *(["chroot"] if "root" not in self.left_out else []),
            *(["docker"] if self.engine else []),
        ]
        return kinds if len(kinds) > 1 else ["native", "native"]

    def has(self, kind: Kind) -> bool:
        needed = {kind.needs, "embedded" if kind.setting == "embedded" else None}
        return needed.isdisjoint(self.left_out)


@dataclass
class Played:
    """A run that was struck until nothing was left to strike it with, and then left to complete."""

    setting: str
    sampler: str
    struck: list[Struck]
    codes: list[int]
    score: dict[str, int]
    restart_s: list[float]
    seconds: float = 0.0
    local: bool = True
    log: str = field(default="", repr=False)


# ---- what will be done ------------------------------------------------------------------------------------


def plan(
    kinds: Sequence[Kind], kills: int, generator: random.Random, *, quick: bool
) -> dict[str, deque[Kind]]:
    """Faults by kind of run, in random order: `kills` of those that kill, in proportion to their shares; others ride along."""
    total = sum(kind.share for kind in kinds if kind.kills)
    counts = {kind: 1 if quick else max(1, kind.share * kills // total) for kind in kinds}
    most = max((kind for kind in kinds if kind.kills), key=lambda kind: kind.share)
    counts[most] += max(0, kills - sum(count for kind, count in counts.items() if kind.kills))
    faults: dict[str, deque[Kind]] = {}
    for setting in dict.fromkeys(kind.setting for kind in kinds):
        here = [kind for kind in kinds if kind.setting == setting for _ in range(counts[kind])]
        faults[setting] = deque(generator.sample(here, len(here)))
    return faults


def look_around(folder: Path, stack: ExitStack, *, quick: bool) -> Place:
    left_out: dict[str, str] = {}
    if os.geteuid() != 0:
        left_out["root"] = "not root"
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        left_out["embedded"] = f"{' and '.join(missing)} not installed"
    engine = None
    try:
        engine = Engine(folder / "engine")
        stack.callback(engine.close)
    except EngineError as error:
        left_out["docker"] = str(error)
    return Place(folder, engine, left_out, BLOCKS_QUICK if quick else BLOCKS)


# ---- doing it ---------------------------------------------------------------------------------------------


def play(
    place: Place, setting: str, number: int, faults: deque[Kind], generator: random.Random, most: int
) -> Played:
    """One run: up to `most` faults, then to its end. Faults that found the sweep already over stay in the queue."""
    sampler = generator.choice(SAMPLERS)
    engine = "embedded" if setting == "embedded" else "fake"
    data = experiment(
        place.environments, place.blocks[setting], engine=engine, sampler=sampler, seed=number, hold="200ms"
    )
    name, began = f"{setting}-{number}", time.monotonic()
    notes = place.folder / f"{name}-notes"
    notes.mkdir()
    with ExitStack() as stack:
        home = place.folder / name
        if setting == "disk":
            stack.enter_context(small_disk(home, DISK_BYTES))
        else:
            home.mkdir()
        run = Run(home / "run", notes, data, [] if setting == "ray" else ["--local"], place.engine)
        stack.callback(run.abort)
        struck = list(strikes(run, faults, generator, most))
        codes = run.complete()
        stopped = sum("deadline" in each.detail for each in struck)
        return Played(
            setting, sampler, struck, codes, score(run, codes, stopped), run.restart_s, time.monotonic() - began,
            run.local, run.log.read_text(errors="replace"),
        )  # fmt: skip


def strikes(run: Run, faults: deque[Kind], generator: random.Random, most: int) -> Iterator[Struck]:
    stops = 0
    while faults and most > 0:
        kind = faults[0]
        driver = driver_of(run)
        if (found := kind.strike(run, generator)) is None:
            stops += 1
            if driver.process.poll() in {None, 0} or stops == 10:
                return
            run.ended(driver)  # it stopped by itself, say because the daemon was away: it will be resumed
            continue
        detail, gone_s, left = found
        faults.popleft()
        most -= 1
        yield Struck(kind.name, time.time() - driver.started_at, detail, gone_s, left)


def play_all(
    place: Place, faults: Mapping[str, deque[Kind]], generator: random.Random, console: Console
) -> list[Played]:
    played: list[Played] = []
    for setting, waiting in faults.items():
        fruitless = 0
        while waiting and fruitless < 5:
            done = play(place, setting, len(played), waiting, generator, generator.randint(4, 8))
            fruitless = 0 if done.struck else fruitless + 1
            played.append(done)
            wrong = bad(done)
            console.print(
                f"run {len(played)} ({setting}, {done.sampler}): {len(done.struck)} faults, {done.seconds:.0f} s, "
                + (f"[red]{wrong}[/red]" if wrong else "whole"),
                highlight=False,
            )
            if wrong:
                console.print(
                    *[f"  {each.kind}: {each.detail} {each.left or ''}" for each in done.struck], sep="\n"
                )
                console.print(done.log[-3000:], markup=False, highlight=False)
    return played


def bad(done: Played) -> dict[str, Any]:
    """What is not zero and should be."""
    wrong: dict[str, Any] = {
        name: count for name, count in done.score.items() if count and not name.startswith("info_")
    }
    if left := [line for each in done.struck for line in each.left]:
        wrong["left_behind"] = left
    return wrong


# ---- what it says -----------------------------------------------------------------------------------------


def rows_of(played: Sequence[Played]) -> list[dict[str, Any]]:
    """By kind of fault: how often, after how many of them something was left at the bound, seconds until all was gone."""
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        here = [each for done in played for each in done.struck if each.kind == kind.name]
        if here:
            gone = [each.gone_s for each in here]
            rows.append({
                "kind": kind.name, "struck": len(here), "left_behind": sum(bool(each.left) for each in here),
                "gone_median_s": statistics.median(gone), "gone_max_s": max(gone),
            })  # fmt: skip
    return rows


def table_of(played: Sequence[Played]) -> Table:
    table = Table(title="faults, and what they left", title_justify="left", box=None, pad_edge=False)
    for heading in ("kind", "struck", "left behind", "gone after s, median", "max"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for row in rows_of(played):
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def table_of_rivals(rows: Sequence[Row]) -> Table:
    table = Table(
        title="the same kill -9 of the driver, trials of 0.4 s",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    headings = ("system", "kills", "trials", "lost", "executed twice", "counted twice", "left RUNNING", "left behind",
                "gone after s", "restart to trial s")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for row in rows:
        table.add_row(*cells_of(row)[: len(headings)])
    return table


def rivals_of(
    folder: Path, chosen: argparse.Namespace, generator: random.Random, console: Console
) -> list[Row]:
    """Ours must not be lost because a peer could not run."""
    try:
        return compare(folder, chosen, generator, console.print)
    except Exception as error:  # noqa: BLE001  whatever a peer's library raises
        console.print(f"[red]the race against the peers broke off: {error!r}[/red]")
        return []


def totals_of(played: Sequence[Played]) -> dict[str, int]:
    total = Counter[str]()
    for done in played:
        total.update(done.score)
    total["left_behind"] = sum(bool(each.left) for done in played for each in done.struck)
    return dict(total)


def restarts(played: Sequence[Played], engine: str) -> list[float]:
    """Seconds from the start of a resuming driver to its first new trial, without Ray."""
    return [value for done in played if done.local and (done.setting == "embedded") == (engine == "embedded")
            for value in done.restart_s]  # fmt: skip


def lines_of(played: Sequence[Played]) -> list[str]:
    killing = {kind.name for kind in KINDS if kind.kills}
    struck = [each for done in played for each in done.struck]
    kills = sum(each.kind in killing for each in struck)
    lines = [
        f"{len(struck)} faults, {kills} of them kills, in {len(played)} runs of {sum(done.score['info_blocks'] for done in played)} blocks"
    ]
    lines += [
        aim(
            f"restart to the first new trial, {engine} engine, --local, median of {len(values)}",
            statistics.median(values), AIM_RESTART_S, at_most=True, unit=" s",
        )
        for engine in ("fake", "embedded") if (values := restarts(played, engine))
    ]  # fmt: skip
    return lines


def docker_version(engine: Engine | None) -> str | None:
    return None if engine is None else str(engine.client.version()["Version"])


def main() -> int:
    parser = options(__doc__, rounds=2, trials=12)
    parser.add_argument("--kills", type=int, help="default: 50; with --quick one fault of each kind")
    parser.add_argument("--without-ray", action="store_true", help="nothing of Ray runs at all")
    parser.add_argument("--without-rivals", action="store_true")
    parser.add_argument("--only", action="append", help="kinds of fault whose name contains this")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything made here goes away
    began, generator, console = machine(), random.Random(chosen.seed), Console(width=120)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch(chosen.folder))
        folder.chmod(0o755)
        place = look_around(folder, stack, quick=chosen.quick)
        kinds = [
            kind for kind in KINDS if place.has(kind) and not (chosen.without_ray and kind.setting == "ray")
        ]
        if chosen.quick:
            kinds = [kind for kind in kinds if kind.name not in NOT_QUICK]
        if chosen.only:
            kinds = [kind for kind in kinds if any(part in kind.name for part in chosen.only)]
        for what, why in place.left_out.items():
            console.print(f"left out: {what} ({why})", highlight=False)
        wanted = chosen.kills if chosen.kills is not None else 0 if chosen.quick else 50
        faults = plan(kinds, wanted, generator, quick=chosen.quick)
        played = play_all(place, faults, generator, console)
        version = docker_version(place.engine)
        rivals = [] if chosen.without_rivals else rivals_of(folder, chosen, generator, console)
    totals, lines = totals_of(played), lines_of(played)
    wrong = {name: count for name, count in totals.items() if count and not name.startswith("info_")}
    missed = sum(len(waiting) for waiting in faults.values())
    console.print(table_of(played))
    console.print(*[f"{name}: {count}" for name, count in totals.items()], sep="\n", highlight=False)
    if rivals:
        console.print(table_of_rivals(rivals))
    console.print(*lines, sep="\n", highlight=False)
    if missed:
        console.print(f"[red]{missed} faults found no sweep to strike[/red]")
    if chosen.save:
        save("chaos", {"machine": began, "load_average_at_end": os.getloadavg(), "seed": chosen.seed, "engine": version,
                       "left_out": place.left_out, "totals": totals, "aims": lines, "kinds": rows_of(played), "runs": [_plain(done) for done in played],
                       "rivals": [dataclasses.asdict(each) for each in rivals]})  # fmt: skip
    return int(bool(wrong or missed))


def _plain(done: Played) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(done).items() if name != "log"}


if __name__ == "__main__":
    sys.exit(main())
