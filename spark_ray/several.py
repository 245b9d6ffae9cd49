"""Several experiments into one folder, one after the other, each its own run in FOLDER/NAME.

Everything is planned before the first effect, and every run is begun before the first is driven: whatever ends this
process, what is still to be done is on disk, and `spark-ray resume FOLDER` needs nothing else. A run that ends with
too many failures does not stop the next; a lack, the watchdog and an interrupt do. Reports are written by processes of
their own, so that this one is as small for the last run as for the first.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from . import power
from .errors import EXIT_OK, InputError, RunError, SparkRayError, UnavailableError
from .reap import is_driven
from .running import (
    Ended,
    Options,
    Planned,
    begin_or_resume,
    check_address,
    execute,
    look,
)
from .search import attainable
from .store import PLAN, Store
from .terminal import show_lacking, show_overview, show_plan


@dataclass(frozen=True)
class Job:
    """One experiment of several; `folder` is known when its run is there."""

    path: Path
    overrides: tuple[str, ...]
    folder: Path | None = None

    def placed(self, base: Path, name: str) -> Path:
        """Where its run is, or will be."""
        return self.folder or base / name


# ---- folders of runs --------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    return (folder / PLAN).is_file()


def runs_in(folder: Path) -> list[Path]:
    """`folder` itself when it is a run, else the runs in it in the order they were begun; an error if there is none."""
    if is_run(folder):
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{PLAN}"))
    if not found:
        Store.read(folder)  # says what is wrong with it
    return sorted(found, key=lambda run: str(Store.read(run).plan.get("created_at")))


def standing(store: Store) -> dict[str, Any]:
    """Where a run stands, from its records alone; also while it is being driven."""
    states = [store.state(block) for block in store.blocks()]
    latest = {state.block.block_id: state.valid or state.attempts for state in states}
    records = list(store.records())
    counted = [record for record in records if record["attempt"] == latest[record["block_id"]]]
    return {
        "simulated": store.plan["experiment"]["engine"]["kind"] == "simulated",
        "blocks": attainable(power.experiment_of(store.plan).search).blocks,
        "complete": sum(state.complete for state in states),
        "outcomes": dict(sorted(Counter(record["outcome"]["kind"] for record in counted).items())),
        "superseded_attempts": len(records) - len(counted),
        "driven": is_driven(str(store.folder.absolute())),
        "map": _map(store),
        "open": [
            {
                "block_id": state.block.block_id,
                "configuration": state.block.configuration,
                "execution": state.attempts,
                "arms_done": len(state.outcomes),
                "arms": len(state.block.order),
            }
            for state in states
            if not state.complete
        ],
    }


def _map(store: Store) -> dict[str, Any] | None:
    """How well the map is known; None where no sampler seeks one."""
    if store.plan["experiment"]["search"].get("sampler") != "map":
        return None
    from . import mapping  # loads scikit-learn

    return dataclasses.asdict(mapping.decision(store, power.experiment_of(store.plan)))


# ---- the sweep --------------------------------------------------------------------------------------------


def _plan(jobs: list[Job], base: Path, options: Options) -> list[Planned]:
    """Plans of all, or one error with what is wrong with each."""
    found, wrong = [], []
    for job in jobs:
        try:
            found.append(look(job.path, job.overrides, options, partial(job.placed, base)))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("\n".join(wrong))
    named: dict[Path, Path] = {}
    for job, planned in zip(jobs, found, strict=True):
        if (other := named.setdefault(planned.folder, job.path)) is not job.path:
            raise InputError(
                f"{other} and {job.path} are both named {planned.name}, and each run has a folder of that name",
                mend="give one of them another name",
            )
    return found


def _refuse_if_impossible(planned: list[Planned]) -> None:
    lacks = []
    for each in planned:
        try:
            each.plan.refuse_if_impossible()
        except UnavailableError as error:
            lacks.append(f"{each.name}: {error}")
    if lacks:
        raise UnavailableError("\n".join(lacks))


def _refuse_taken(planned: list[Planned], base: Path, options: Options) -> None:
    if is_run(base):
        raise RunError(f"{base} is the run of one experiment", mend="name another folder with --out")
    for each in planned:
        free = not each.folder.exists() or not any(each.folder.iterdir()) or Store.was_torn(each.folder)
        if not (options.resume or free):
            raise RunError(
                f"{each.folder} is not empty",
                mend="continue what is there with --resume, or choose another folder with --out",
            )


def _open(planned: list[Planned], options: Options, stack: ExitStack) -> list[Store]:
    """Every run, locked: those that are there first, since they can be refused, then the new ones."""
    there = [options.resume and is_run(each.folder) for each in planned]
    stores: dict[int, Store] = {}
    for index in sorted(range(len(planned)), key=lambda index: not there[index]):
        store = begin_or_resume(planned[index], dataclasses.replace(options, resume=there[index]))
        stack.callback(store.close)
        stores[index] = store
    return [stores[index] for index in range(len(planned))]


def run(jobs: list[Job], base: Path, options: Options, continue_with: str) -> int:
    """The main job, for several. The exit code is the worst one."""
    console = Console(stderr=options.json, highlight=False)
    base = base.absolute()
    planned = _plan(jobs, base, options)
    for each in planned:
        show_plan(console, each.plan, str(each.folder), each.loaded.overrides)
        if options.plan:
            show_lacking(console, each.plan)
        console.print()
    if not options.plan:
        _refuse_if_impossible(planned)
    _refuse_taken(planned, base, options)
    if options.plan:
        return EXIT_OK
    check_address(options)
    ended: dict[str, Ended] = {}
    with ExitStack() as stack:
        stores = _open(planned, options, stack)
        stopped: SparkRayError | None = None
        try:
            _one_by_one(planned, stores, options, console, ended)
        except SparkRayError as error:
            stopped = error
        rows = _overview(base, console, options)
    left = [each.name for each in planned if each.name not in ended or ended[each.name].how != "finished"]
    if left:
        kept = (
            f"not finished: {', '.join(left)}; everything measured is kept. Continue with:\n  {continue_with}"
        )
        console.print(kept, soft_wrap=True, markup=False)
    if options.json:
        click.echo(json.dumps({"folder": str(base), "runs": rows}))
    if stopped is not None:
        raise stopped
    return max((each.code for each in ended.values()), default=EXIT_OK)


def _one_by_one(
    planned: list[Planned], stores: list[Store], options: Options, console: Console, ended: dict[str, Ended]
) -> None:
    """Drive each run; `ended` gets how. Ends early when the time is over, at an interrupt, and by what is raised."""
    started = time.monotonic()
    for number, (each, store) in enumerate(zip(planned, stores, strict=True), 1):
        left_s = None
        if options.max_time_s is not None:
            left_s = options.max_time_s - (time.monotonic() - started)
            if left_s <= 0:
                return
        console.print(f"\n[bold]{number} of {len(planned)}  {each.name}[/bold]")
        own = dataclasses.replace(options, max_time_s=left_s)
        ended[each.name] = execute(store, each, own, console, report_apart=True)
        if ended[each.name].how == "interrupted":
            return


def _overview(base: Path, console: Console, options: Options) -> list[dict[str, Any]]:
    """index.html, and one line a run on the terminal."""
    from analysis import overview

    rows = overview.write(base, runs_in(base))
    if not options.json:
        show_overview(console, rows, str(base / overview.PAGE))
    return rows


def resume(folder: Path, options: Options) -> int:
    """Finish what is missing in every run of a folder, each with the experiment and overrides it was begun with."""
    runs = runs_in(folder)
    plans = [Store.read(run).plan for run in runs]
    jobs = [
        Job(run / "experiment.yaml", tuple(plan["overrides"]), run.absolute())
        for run, plan in zip(runs, plans, strict=True)
    ]
    command = ["spark-ray", "resume", str(folder), *(["--local"] if options.local else [])]
    command += ["--address", options.address] if options.address else []
    return run(jobs, folder, dataclasses.replace(options, resume=True), shlex.join(command))
