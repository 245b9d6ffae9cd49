"""`python -m spark_ray.sweep EXPERIMENT.yaml`: from one YAML to records and a report."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console

from . import __version__, config, image, opening, reap
from .cluster import Cluster, one_local_node
from .errors import (
    DISK_ERRORS,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TOO_MANY_FAILURES,
    InputError,
    RunError,
    SparkRayError,
    cannot_write,
)
from .execute import Drive, LocalSlots, failed_share
from .experiment import DockerEnvironment
from .preview import Preview, preview, probe
from .search import Search
from .store import Store
from .terminal import Terminal, show_plan, show_summary
from .units import parse_duration_s

logger = logging.getLogger("spark_ray")


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
    max_blocks: int | None = None
    max_time_s: float | None = None
    verbose: bool = False

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


# ---- the run ----------------------------------------------------------------------------------------------


def _slots(
    store: Store, loaded: config.LoadedExperiment, plan: Preview, options: Options, console: Console
) -> Any:
    if options.local:
        return LocalSlots(store.folder, loaded.experiment, plan.executed)
    from .actors import RaySlots

    slots = RaySlots(store.folder, loaded.experiment, plan.executed, options.address)
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


class _Interrupt:
    """Ctrl-C and SIGTERM: end the present attempts, keep everything; a second one is not waited for."""

    def __init__(self, drive: Drive) -> None:
        self.hit = False
        self._drive = drive
        self._old = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True
        self._drive.stop()

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _drive(
    store: Store, loaded: config.LoadedExperiment, plan: Preview, options: Options, console: Console
) -> str:
    """Execute what is pending; says whether it finished, paused (--max-blocks, --max-time), or was interrupted."""
    experiment = loaded.experiment
    search = Search(experiment.search, seed=experiment.seed, journal=store.journal, name=experiment.name)
    interrupted = opening.recover(store, search, experiment)
    done = sum(state.complete for state in map(store.state, store.blocks()))
    if options.resume:
        _reap(store.folder, plan, console)
    console.print(f"preparing {', '.join(plan.executed)} ...", highlight=False)
    slots = _slots(store, loaded, plan, options, console)
    terminal = Terminal(console, experiment.search.blocks, done, len(plan.executed), quiet=options.json)
    try:
        with _logging(store.folder, verbose=options.verbose), terminal:
            drive = Drive(
                store, experiment, plan.executed, search, terminal, interrupted, enough=options.enough()
            )
            interrupt = _Interrupt(drive)
            try:
                drive.run(slots.slots)
            finally:
                interrupt.restore()
        for block_id in drive.given_up:
            console.print(
                f"[yellow]{block_id} was disturbed {experiment.limits.block_attempts} times and given up[/yellow]"
            )
        return "interrupted" if interrupt.hit else "paused" if drive.paused else "finished"
    finally:
        slots.close()


def _begin(folder: Path, loaded: config.LoadedExperiment, plan: Preview, options: Options) -> Store:
    cluster = options.cluster.read_text(encoding="utf-8") if options.cluster else None
    return opening.begin(folder, loaded, plan, cluster=cluster, executor="local" if options.local else "ray")


def run(path: Path, overrides: tuple[str, ...], options: Options) -> int:
    """The main job. Returns the exit code; raises SparkRayError for what the user must mend."""
    console = Console(stderr=options.json, highlight=False)
    loaded = config.load_experiment(path, overrides)
    cluster: Cluster = config.load_cluster(options.cluster) if options.cluster else one_local_node()
    folder = run_folder(options, loaded.experiment.name)
    plan = preview(loaded.experiment, cluster, probe(loaded.experiment))
    show_plan(console, plan, str(folder))
    plan.refuse_if_impossible()
    if options.plan:
        return EXIT_OK
    if options.address:
        from .actors import check_address

        check_address(options.address)
    store = opening.again(folder, loaded, plan) if options.resume else _begin(folder, loaded, plan, options)
    try:
        ended = _drive(store, loaded, plan, options, console)
        summary = finish(store, console, options)
    finally:
        store.close()
    if ended != "finished":
        line = resume_line(path, overrides, options, folder)
        console.print(f"{ended}; everything measured is kept. Continue with:\n  {line}", soft_wrap=True)
    if ended == "interrupted":
        return EXIT_INTERRUPTED
    failed, total = failed_share(store)
    if options.json:
        click.echo(json.dumps(summary))
    if total and failed / total > loaded.experiment.limits.failed_share:
        console.print(f"[red]{failed} of {total} trials failed: more than limits.failed_share allows[/red]")
        return EXIT_TOO_MANY_FAILURES
    return EXIT_OK


def finish(store: Store, console: Console, options: Options) -> dict[str, Any]:
    """Table, summary and report from the records. pandas is loaded here, after the measuring."""
    from analysis import report

    summary: dict[str, Any] = report.write(store.folder)
    if not options.json:
        show_summary(console, summary, str(store.folder / "report.html"))
    return summary


def resume_line(path: Path, overrides: tuple[str, ...], options: Options, folder: Path) -> str:
    words = [sys.executable, "-m", "spark_ray.sweep", str(path)]
    for override in overrides:
        words += ["--set", override]
    words += ["--resume", "--out", str(folder)]
    if options.local:
        words.append("--local")
    if options.address:
        words += ["--address", options.address]
    return shlex.join(words)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The run folder. Default: runs/NAME.")
@click.option("--address", help="Join the Ray cluster at this address (auto, or HOST:6379).")
@click.option("--cluster", type=click.Path(path_type=Path), help="Cluster file whose slots the plan counts.")
@click.option("--local", is_flag=True, help="Without Ray: one slot, in this process. Records are the same.")
@click.option("--resume", is_flag=True, help="Finish exactly what is missing in a run.")
@click.option("--seed", type=click.IntRange(min=0), help="The same as --set seed=N.")
@click.option(
    "--max-blocks",
    type=click.IntRange(min=1),
    help="Begin no more than this many blocks now; --resume does the rest.",
)
@click.option(
    "--max-time",
    metavar="DURATION",
    help="Begin no block after this long (90s, 20min, 8h); --resume does the rest.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print the log (run.log) on standard error as well.")
@click.option("--plan", is_flag=True, help="Print everything that would happen, and stop.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change one value of the experiment."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the summary as JSON on standard output, the rest on standard error.",
)
@click.version_option(__version__)
def command(
    experiment: Path, out: Path | None, address: str | None, cluster: Path | None, local: bool, resume: bool, plan: bool,
    overrides: tuple[str, ...], as_json: bool, seed: int | None, max_blocks: int | None, max_time: str | None, verbose: bool,
) -> int:  # fmt: skip
    """Execute EXPERIMENT (a YAML file) as blocks of paired trials, and write its report."""
    if local and address:
        raise click.UsageError("--local is without Ray, --address joins one: choose")
    try:
        max_time_s = parse_duration_s(max_time) if max_time else None
    except ValueError as error:
        raise InputError(f"--max-time: {error}") from error
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    options = Options(
        out=out, address=address, cluster=cluster, local=local, resume=resume, plan=plan, json=as_json,
        max_blocks=max_blocks, max_time_s=max_time_s, verbose=verbose,
    )  # fmt: skip
    return run(experiment, overrides, options)


def call(function: click.Command, arguments: list[str] | None) -> int:
    """Run a click command; errors become one message on standard error and an exit code, never a traceback."""
    try:
        code = function.main(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except SparkRayError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        click.echo(f"error: {cannot_write(error)}", err=True)
        return RunError.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED


def main(arguments: list[str] | None = None) -> int:
    return call(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
