"""One experiment: planned, begun or opened again, driven, reported."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console

from . import config, image, opening, orchestrator, power, reap
from .cluster import Cluster, one_local_node
from .drive import Drive, Interrupt, Known, failed_share
from .environment_spec import DockerEnvironment
from .errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_TOO_MANY_FAILURES, InputError, RunError
from .execute import LocalSlots
from .experiment import Experiment
from .preview import Preview, in_force, preview, probe
from .store import PLAN, Store
from .terminal import Terminal, show_lacking, show_plan, show_summary

logger = logging.getLogger("spark_ray")

REPORT_LIMIT_S = 1800


@dataclass(frozen=True)
class Options:
    """What the command line says beside the experiment."""

    out: Path | None = None
    address: str | None = None
    cluster: Path | None = None
    local: bool = False
    resume: bool = False
    plan: bool = False
    json: bool = False
    report: bool = True
    max_blocks: int | None = None
    max_time_s: float | None = None
    verbose: bool = False
    allow_roots: tuple[Path, ...] = ()

    def enough(self) -> Callable[[int], bool]:
        """Whether this process has begun as many blocks, or run as long, as it was told to."""
        started = time.monotonic()

        def ask(begun: int) -> bool:
            late = self.max_time_s is not None and time.monotonic() - started >= self.max_time_s
            return late or (self.max_blocks is not None and begun >= self.max_blocks)

        return ask


def run_folder(options: Options, name: str) -> Path:
    """--out, or runs/NAME: a number is added to a new run whose name is taken; --resume takes the latest."""
    if options.out is not None:
        return options.out.absolute()
    base = Path("runs").absolute()
    taken = [base / name] + [base / f"{name}-{number}" for number in range(2, 10_000)]
    used = 0
    while taken[used].exists():
        used += 1
    if options.resume:
        if used == 0:
            raise RunError(
                f"there is no run {taken[0]} to resume",
                mend="leave out --resume, or name the folder with --out",
            )
        return taken[used - 1]
    return taken[used]


# ---- looking: no effect yet -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """An experiment that can be read, what this host makes of it, and the folder its run has or will have."""

    loaded: config.LoadedExperiment
    plan: Preview
    folder: Path

    @property
    def name(self) -> str:
        return self.loaded.experiment.name


def _folders(path: Path, options: Options) -> tuple[list[str | Path], Path]:
    """--allow-root, and the present folder; a run that is resumed by its own file keeps those it was begun with."""
    begun = Store.read(path.parent).plan if options.resume and path.with_name(PLAN).is_file() else {}
    return [*options.allow_roots, *begun.get("allowed_roots", ())], Path(begun.get("begun_in", ""))


def look(
    path: Path,
    overrides: tuple[str, ...],
    options: Options,
    folder_of: Callable[[str], Path] | None = None,
) -> Planned:
    """`folder_of` an experiment's name, where its run is; left out, what --out says."""
    loaded = config.load_experiment(path, overrides, *_folders(path, options))
    if (options.address or options.cluster) and orchestrator.named(
        loaded.experiment, list(loaded.experiment.arms)
    ):
        raise InputError(
            f"{path}: arms name their orchestrator, so this run is executed on this host alone",
            mend="leave out --address and --cluster",
        )
    cluster = config.load_cluster(options.cluster) if options.cluster else one_local_node()
    name = loaded.experiment.name
    return look_at(loaded, options, folder_of(name) if folder_of else run_folder(options, name), cluster)


def look_at(loaded: config.LoadedExperiment, options: Options, folder: Path, cluster: Cluster) -> Planned:
    """What this host makes of an experiment; its margin is at least the noise floor of its pilot."""
    if ":" in str(folder):
        raise InputError(
            f"{folder}: a colon ends a path in PYTHONPATH and in Docker's mounts",
            mend="name another folder with --out",
        )
    noise, pilot, begun = None, loaded.experiment.search.target.pilot, None
    if options.resume and (folder / PLAN).is_file():
        begun = Store.read(folder).plan
        noise = power.of_plan(begun)
    elif pilot is not None:
        noise = power.of_pilot(Path(pilot), loaded.experiment)
    experiment = in_force(loaded.experiment, noise)
    plan = preview(experiment, cluster, probe(experiment), noise)
    return Planned(
        replace(loaded, experiment=experiment), plan.limited_to(begun["arms"]) if begun else plan, folder
    )


def check_address(options: Options) -> None:
    if options.cluster and not options.address:
        raise InputError(
            f"--cluster {options.cluster} says which machines there are, and nobody says where their Ray is",
            mend="add --address auto on the head node, or leave --cluster out",
        )
    if options.address:
        from .actors import check_address

        check_address(options.address)


# ---- the run ----------------------------------------------------------------------------------------------


How = Literal["finished", "paused", "interrupted", "blocks were given up"]
"""Paused: by --max-blocks or --max-time. Given up: what disturbs them is still there."""


@dataclass(frozen=True)
class Ended:
    """How a drive ended, and what its records say."""

    how: How
    summary: dict[str, Any]
    code: int


def begin_or_resume(planned: Planned, options: Options) -> Store:
    if options.resume and not Store.was_torn(planned.folder):
        return opening.again(planned.folder, planned.loaded, planned.plan)
    cluster = options.cluster.read_text(encoding="utf-8") if options.cluster else None
    executor = "local" if options.local else "ray"
    if orchestrator.named(planned.loaded.experiment, planned.plan.executed):
        executor = "by arm"
    return opening.begin(planned.folder, planned.loaded, planned.plan, cluster=cluster, executor=executor)


def _slots(store: Store, planned: Planned, options: Options, console: Console) -> Any:
    experiment, arms = planned.loaded.experiment, planned.plan.executed
    if orchestrator.named(experiment, arms):
        return orchestrator.OrchestratedSlots(store.folder, experiment, arms)
    if options.local:
        return LocalSlots(store.folder, experiment, arms)
    from .actors import RaySlots

    slots = RaySlots(store.folder, experiment, arms, options.address)
    if slots.dashboard_url:
        token = Path(sys.executable).parent / "ray"
        console.print(
            f"Ray dashboard  http://{slots.dashboard_url}  (its token: {token} get-auth-token)",
            highlight=False,
            soft_wrap=True,
        )
    return slots


def _reap(folder: Path, plan: Preview, console: Console) -> None:
    """What the last driver's death left of this run goes before anything is measured."""
    wants_docker = any(
        isinstance(plan.experiment.arms[arm].environment, DockerEnvironment) for arm in plan.executed
    )
    client = image.connect() if wants_docker else None
    try:
        for one in reap.leftovers(folder, client, driver=True):
            reap.remove(one, client)
            console.print(f"removed {one.kind} {one.name[:80]} of the last driver", highlight=False)
    finally:
        if client is not None:
            client.close()


@contextlib.contextmanager
def _logging(folder: Path, *, verbose: bool) -> Iterator[None]:
    """Log to run.log, and to standard error if asked."""
    handlers: list[logging.Handler] = [logging.FileHandler(folder / "run.log", encoding="utf-8")]
    if verbose:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _drive(store: Store, planned: Planned, options: Options, console: Console) -> How:
    """Execute what is pending."""
    experiment, arms = planned.loaded.experiment, planned.plan.executed
    search = opening.study(store, experiment, planned.plan.mark)
    notes = [*opening.changes(store.plan), *opening.rebuild(store, search)]
    for note in notes:
        console.print(note, style="yellow", soft_wrap=True, markup=False)
    interrupted = opening.recover(store, search, experiment)
    done = sum(state.complete for state in map(store.state, store.blocks()))
    if options.resume:
        _reap(store.folder, planned.plan, console)
    look = _looker(store, experiment)
    spent = len(store.blocks()) >= experiment.search.blocks
    if not interrupted and (spent or (look is not None and look().stop)):
        return "finished"
    console.print(f"preparing {', '.join(arms)} ...", highlight=False)
    slots = _slots(store, planned, options, console)
    terminal = Terminal(
        console, experiment.search.blocks, done, len(arms), quiet=options.json, mark=planned.plan.mark
    )
    try:
        with (
            terminal,
            _logging(store.folder, verbose=options.verbose),
        ):  # a live panel takes standard error over first
            for note in notes:
                logger.warning("%s", note)
            drive = Drive(
                store, experiment, arms, search, terminal, interrupted, enough=options.enough(), look=look
            )
            interrupt = Interrupt(drive)
            try:
                drive.run(slots.slots)
            finally:
                interrupt.restore()
        for block_id in drive.given_up:
            times = experiment.limits.block_attempts
            given_up = f"{block_id} was disturbed {times} times and given up; --resume tries it again"
            console.print(given_up, style="yellow", soft_wrap=True)
        if interrupt.hit:
            return "interrupted"
        return "paused" if drive.paused else "blocks were given up" if drive.given_up else "finished"
    finally:
        slots.close()


def _looker(store: Store, experiment: Experiment) -> Callable[[], Known] | None:
    """Says how well the map is known; None where nobody draws one to know when it is enough."""
    if experiment.search.sampler != "map":
        return None
    from . import mapping  # loads scikit-learn

    return lambda: mapping.decision(store, experiment)


def _show_map(store: Store, planned: Planned, console: Console) -> None:
    experiment = planned.loaded.experiment
    if experiment.search.sampler == "map":
        from . import mapping

        mark = f"{planned.plan.mark} " if planned.plan.mark else ""
        why = mapping.decision(store, experiment).why
        console.print(f"{mark}map: {why}", soft_wrap=True, markup=False, highlight=False)


def execute(
    store: Store, planned: Planned, options: Options, console: Console, *, report_apart: bool = False
) -> Ended:
    """Drive an open run and report it."""
    how = _drive(store, planned, options, console)
    _show_map(store, planned, console)
    if not options.report:
        later = f"records only; their report: spark-ray report {store.folder}"
        console.print(later, soft_wrap=True, markup=False)
        summary = {}
    else:
        summary = _report_apart(store.folder, console) if report_apart else _report(store.folder)
    if summary and not options.json:
        show_summary(console, summary, str(store.folder / "report.html"))
    if how == "interrupted":
        return Ended(how, summary, EXIT_INTERRUPTED)
    if how == "blocks were given up":
        return Ended(how, summary, EXIT_TOO_MANY_FAILURES)
    failed, total = failed_share(store)
    if total and failed / total > planned.loaded.experiment.limits.failed_share:
        console.print(f"[red]{failed} of {total} trials failed: more than limits.failed_share allows[/red]")
        return Ended(how, summary, EXIT_TOO_MANY_FAILURES)
    return Ended(how, summary, EXIT_OK)


def _report(folder: Path) -> dict[str, Any]:
    """Tables, summary and report from the records. pandas is loaded here, after the measuring."""
    from analysis import report

    summary: dict[str, Any] = report.write(folder)
    return summary


def _report_apart(folder: Path, console: Console) -> dict[str, Any]:
    """The same by another process: pandas stays out of this one, and what fails there ends nothing here."""
    command = [sys.executable, "-m", "analysis.report", str(folder)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=REPORT_LIMIT_S,
            start_new_session=True,
        )
        said = done.stderr.strip().splitlines() or ["error: it ended early"]
        error = next((line for line in said if line.startswith("error: ")), said[-1])
        why = error.removeprefix("error: ") if done.returncode else None
    except subprocess.TimeoutExpired as late:
        why = str(late)
    if why is not None:
        text = f"no report of {folder}: {why}\n  mend: spark-ray report {folder}"
        console.print(text, style="yellow", soft_wrap=True, markup=False)
        return {}
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def run(path: Path, overrides: tuple[str, ...], options: Options) -> int:
    """The main job. Returns the exit code; raises SparkRayError for what the user must mend."""
    planned = look(path, overrides, options)
    return carry_out(planned, options, resume_line([path], overrides, options, planned.folder))


def carry_out(planned: Planned, options: Options, resume: str) -> int:
    """Show the plan and, unless nothing else was asked, execute it. `resume`: the command that continues the run."""
    console = Console(stderr=options.json, highlight=False)
    show_plan(console, planned.plan, str(planned.folder), planned.loaded.overrides)
    if options.plan:
        show_lacking(console, planned.plan)
        return EXIT_OK
    planned.plan.refuse_if_impossible()
    check_address(options)
    store = begin_or_resume(planned, options)
    try:
        ended = execute(store, planned, options, console)
    finally:
        store.close()
    if ended.how != "finished":
        kept = f"{ended.how}; everything measured is kept. Continue with:\n  {resume}"
        console.print(kept, soft_wrap=True, markup=False)
    if options.json and ended.how != "interrupted":
        click.echo(json.dumps(ended.summary))
    return ended.code


def resume_line(paths: Sequence[Path], overrides: tuple[str, ...], options: Options, folder: Path) -> str:
    words = [sys.executable, "-m", "spark_ray.sweep", *map(str, paths)]
    for override in overrides:
        words += ["--set", override]
    for folder_allowed in options.allow_roots:
        words += ["--allow-root", str(folder_allowed)]
    words += ["--resume", "--out", str(folder)]
    if options.local:
        words.append("--local")
    if options.address:
        words += ["--address", options.address]
    if not options.report:
        words.append("--no-report")
    return shlex.join(words)
