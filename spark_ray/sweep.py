"""`python -m spark_ray.sweep EXPERIMENT.yaml`: from one YAML to records and a report."""

from __future__ import annotations

import compileall
import difflib
import json
import logging
import py_compile
import signal
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console

from . import __version__, config, host, image, reap
from .cluster import Cluster, one_local_node
from .errors import (
    DISK_ERRORS,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TOO_MANY_FAILURES,
    RunError,
    SparkRayError,
    cannot_write,
)
from .execute import Drive, LocalSlots, failed_share, outcome_of
from .experiment import DockerEnvironment
from .preview import Preview, preview, probe
from .search import Abandoned, Search, Told
from .store import Store, copy_bundle
from .terminal import Terminal, show_plan, show_summary
from .worker import protocol

_WORKER = Path(__file__).parent / "worker"
_MAY_CHANGE = ("limits", "question")  # on resume, beside the budget: they do not change what is measured
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
    report: bool = True


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


# ---- the run folder ---------------------------------------------------------------------------------------


def _comparable(resolved: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in resolved.items() if key not in _MAY_CHANGE}
    return kept | {
        "search": {key: value for key, value in resolved.get("search", {}).items() if key != "blocks"}
    }


def _new_store(folder: Path, loaded: config.LoadedExperiment, plan: Preview, options: Options) -> Store:
    files = {"experiment.yaml": loaded.text}
    if options.cluster is not None:
        files["cluster.yaml"] = options.cluster.read_text(encoding="utf-8")
    description = {
        "spark_ray_version": __version__,
        "created_at": datetime.now(UTC).isoformat(),
        "experiment": loaded.resolved,
        "overrides": list(loaded.overrides),
        "arms": list(plan.executed),
        "left_out": {
            arm.name: [str(problem) for problem in arm.problems] for arm in plan.arms if not arm.available
        },
        "warnings": {arm.name: list(arm.warnings) for arm in plan.arms if arm.warnings},
        "executor": "local" if options.local else "ray",
        "host": host.describe(),
        "bundle_sha256": protocol.package_sha256(_WORKER),
    }
    store = Store.create(folder, files, description)
    bundle = folder / "bundle" / protocol.PACKAGE
    copy_bundle(_WORKER, bundle)
    compileall.compile_dir(bundle, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return store


def _resumed_store(folder: Path, loaded: config.LoadedExperiment, plan: Preview) -> Store:
    store = Store.resume(folder)
    stored = store.plan
    before, now = (
        json.dumps(_comparable(x), indent=1, sort_keys=True) for x in (stored["experiment"], loaded.resolved)
    )
    if before != now:
        change = "\n".join(
            difflib.unified_diff(before.splitlines(), now.splitlines(), "run", "now", lineterm="", n=0)
        )
        raise RunError(
            f"the experiment is not the one of {folder}:\n{change}",
            mend="start a new run, or undo the change",
        )
    if stored["bundle_sha256"] != protocol.package_sha256(folder / "bundle" / protocol.PACKAGE):
        raise RunError(f"{folder}/bundle was changed since the run began", mend="start a new run")
    if tuple(stored["arms"]) != plan.executed:
        raise RunError(
            f"the run was begun with arms {', '.join(stored['arms'])}; this host now offers {', '.join(plan.executed)}",
            mend="mend the host (see the plan above), or start a new run",
        )
    return store


def _recover(store: Store, search: Search, loaded: config.LoadedExperiment) -> int:
    """Make the study agree with the records; returns how many blocks are open."""
    finished: dict[int, Told | Abandoned] = {}
    for state in map(store.state, store.blocks()):
        if state.complete:
            told = outcome_of(state, store, loaded.experiment)
            finished[state.block.study_trial] = Told(*told) if told else Abandoned("a compared arm failed")
    return len(search.recover(finished))


# ---- the run ----------------------------------------------------------------------------------------------


def _slots(
    store: Store, loaded: config.LoadedExperiment, plan: Preview, options: Options, console: Console
) -> Any:
    if options.local:
        return LocalSlots(store.folder, loaded.experiment, plan.executed)
    from .actors import RaySlots

    slots = RaySlots(store.folder, loaded.experiment, plan.executed, options.address)
    if slots.dashboard_url:
        console.print(f"Ray dashboard  http://{slots.dashboard_url}", highlight=False)
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


def _log_to(folder: Path) -> logging.Handler:
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


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
) -> bool:
    """Execute what is pending. True when it was interrupted."""
    experiment = loaded.experiment
    search = Search(experiment.search, seed=experiment.seed, journal=store.journal, name=experiment.name)
    interrupted = _recover(store, search, loaded)
    done = sum(state.complete for state in map(store.state, store.blocks()))
    if options.resume:
        _reap(store.folder, plan, console)
    console.print(f"preparing {', '.join(plan.executed)} ...", highlight=False)
    slots = _slots(store, loaded, plan, options, console)
    handler = _log_to(store.folder)
    try:
        with Terminal(
            console, experiment.search.blocks, done, len(plan.executed), quiet=options.json
        ) as terminal:
            drive = Drive(store, experiment, plan.executed, search, terminal, interrupted)
            interrupt = _Interrupt(drive)
            try:
                drive.run(slots.slots)
            finally:
                interrupt.restore()
        for block_id in drive.given_up:
            console.print(
                f"[yellow]{block_id} was disturbed {experiment.limits.block_attempts} times and given up[/yellow]"
            )
        return interrupt.hit
    finally:
        slots.close()
        logger.removeHandler(handler)
        handler.close()


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
    store = (
        _resumed_store(folder, loaded, plan) if options.resume else _new_store(folder, loaded, plan, options)
    )
    try:
        hit = _drive(store, loaded, plan, options, console)
        summary = finish(store, console, options)
    finally:
        store.close()
    if hit:
        console.print(
            f"interrupted; everything measured is kept. Continue with:\n  {resume_line(path, overrides, options, folder)}",
            soft_wrap=True,
        )
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
    words = [
        "python -m spark_ray.sweep",
        str(path),
        *(f"--set {override}" for override in overrides),
        "--resume",
        f"--out {folder}",
    ]
    if options.local:
        words.append("--local")
    if options.address:
        words.append(f"--address {options.address}")
    return " ".join(words)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The run folder. Default: runs/NAME.")
@click.option("--address", help="Join the Ray cluster at this address (auto, or HOST:6379).")
@click.option("--cluster", type=click.Path(path_type=Path), help="Cluster file whose slots the plan counts.")
@click.option("--local", is_flag=True, help="Without Ray: one slot, in this process. Records are the same.")
@click.option("--resume", is_flag=True, help="Finish exactly what is missing in a run.")
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
    overrides: tuple[str, ...], as_json: bool,
) -> int:  # fmt: skip
    """Execute EXPERIMENT (a YAML file) as blocks of paired trials, and write its report."""
    if local and address:
        raise click.UsageError("--local is without Ray, --address joins one: choose")
    options = Options(
        out=out, address=address, cluster=cluster, local=local, resume=resume, plan=plan, json=as_json
    )
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
