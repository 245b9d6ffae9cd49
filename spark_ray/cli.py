"""`spark-ray`: the commands around a sweep. Thin: each calls one function and prints what it says."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import IO

import click
from click.shell_completion import get_completion_class
from rich.console import Console

from . import (
    __version__,
    cli_content,
    config,
    content,
    explain,
    image,
    power,
    running,
    selftest,
    several,
    spark_check,
    sweep,
)
from . import doctor as diagnose
from . import pilot as pilot_run
from . import reap as reaper
from .completion import FOLDER, YAML
from .diagnose import explain_all
from .errors import EXIT_OK, EXIT_UNAVAILABLE, UnavailableError
from .store import Store
from .terminal import show_checks, show_overview, show_standing, show_summary


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Map where KV-cache capacity diverges between environments, and why."""


command.add_command(sweep.command, "sweep")
command.add_command(cli_content.rootfs_group)
command.add_command(cli_content.image_group)


@command.command()
@click.argument("experiment", type=YAML)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change one value of the experiment."
)
@click.option("--cluster", type=YAML, help="Cluster file whose slots the plan counts.")
@sweep.ALLOW_ROOT
@sweep.DOUBLE
def plan(
    experiment: Path,
    overrides: tuple[str, ...],
    cluster: Path | None,
    allow_roots: tuple[Path, ...],
    double_folder: Path | None,
) -> int:
    """Print everything a sweep would do, and do nothing."""
    options = running.Options(plan=True, cluster=cluster, allow_roots=allow_roots)
    return running.run(experiment, sweep.rehearsed(experiment, double_folder) + overrides, options)


@command.command()
@click.argument("experiment", type=YAML)
@click.option(
    "--blocks", type=click.IntRange(min=power.FEWEST_BLOCKS), default=8, show_default=True, help="Its budget."
)
@click.option("--out", type=FOLDER, help="The run folder (default: runs/NAME-pilot).")
@click.option("--local", is_flag=True, help="Without Ray.")
@click.option("--address", help="Join the Ray cluster at this address.")
@click.option("--plan", "plan_only", is_flag=True, help="Print everything that would happen, and stop.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change one value of the experiment."
)
@sweep.ALLOW_ROOT
@sweep.DOUBLE
def pilot(
    experiment: Path, blocks: int, out: Path | None, local: bool, address: str | None, plan_only: bool,
    overrides: tuple[str, ...], allow_roots: tuple[Path, ...], double_folder: Path | None,
) -> int:  # fmt: skip
    """Measure the noise floor of EXPERIMENT: its baseline arm beside a copy of itself, over the same space."""
    options = running.Options(out=out, local=local, address=address, plan=plan_only, allow_roots=allow_roots)
    changes = sweep.rehearsed(experiment, double_folder) + overrides
    return pilot_run.run(experiment, changes, blocks, options)


@command.command()
@click.argument("run", type=FOLDER)
@click.option("--local", is_flag=True, help="Without Ray.")
@click.option("--address", help="Join the Ray cluster at this address.")
@click.option("-v", "--verbose", is_flag=True, help="Print the log (run.log) on standard error as well.")
def resume(run: Path, local: bool, address: str | None, verbose: bool) -> int:
    """Finish exactly what is missing in RUN (or in a folder of runs), with the experiment and the overrides it was begun with."""
    options = running.Options(resume=True, local=local, address=address, verbose=verbose)
    if not several.is_run(run):
        return several.resume(run, options)
    overrides = tuple(Store.read(run).plan["overrides"])
    return running.run(run / "experiment.yaml", overrides, dataclasses.replace(options, out=run))


@command.command()
@click.argument("run", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(run: Path, as_json: bool) -> None:
    """Where RUN (or each run of a folder) stands, from its records alone; also while it is being driven."""
    run = run.absolute()
    found = {each.name: several.standing(Store.read(each)) for each in several.runs_in(run)}
    if as_json:
        click.echo(json.dumps(found[run.name] if several.is_run(run) else found))
    else:
        show_standing(Console(), found, whole=several.is_run(run))


@command.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--map", "with_map", is_flag=True, help="With a map, though another sampler chose the blocks of RUN."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def report(run: Path, with_map: bool, as_json: bool) -> None:
    """Write RUN's tables and report again from its records; of a folder of runs each, and index.html over them."""
    from analysis import overview
    from analysis import report as writer

    if several.is_run(run):
        summary = writer.write(run, with_map=with_map)
        if as_json:
            click.echo(json.dumps(summary))
        else:
            show_summary(Console(), summary, str(run / "report.html"))
        return
    if with_map:
        raise click.UsageError("--map is of one run: name its folder")
    rows = overview.write(run, several.runs_in(run), again=True)
    if as_json:
        click.echo(json.dumps(rows))
    else:
        show_overview(Console(), rows, str(run / overview.PAGE))


@command.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="AXIS=VALUE",
    help="Where on an axis that RUN searched; once for each of them.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def predict(run: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """KV capacity of both arms at a configuration that RUN did not measure, from those that it did, with 95 % intervals."""
    from . import predict as mapped  # takes the libraries of the map, which no other command should wait for

    found = mapped.predict(Store.read(run), settings)
    click.echo(json.dumps(found.as_dict()) if as_json else mapped.words(found))


@command.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: eval "$(spark-ray completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101  click knows these three
    click.echo(kind(command, {}, "spark-ray", "_SPARK_RAY_COMPLETE").source())


@command.command()
def schema() -> None:
    """Print the JSON Schema of an experiment, for editors."""
    click.echo(json.dumps(explain.json_schema(), indent=2))


@command.command()
@click.argument("experiment", type=YAML, required=False)
@click.option("--spark", is_flag=True, help="What docs/spark.md expects of a DGX Spark, on one page.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@sweep.ALLOW_ROOT
def doctor(experiment: Path | None, spark: bool, as_json: bool, allow_roots: tuple[Path, ...]) -> int:
    """What this host has and lacks, each with the mend; for EXPERIMENT, only what it needs. Exit 3 if something is missing."""
    if spark and experiment:
        raise click.UsageError("--spark is about the host: choose it or an EXPERIMENT")
    wanted = config.load_experiment(experiment, (), allow_roots).experiment if experiment else None
    progress = Console(stderr=True)
    say = functools.partial(progress.print, style="dim", soft_wrap=True)
    if spark:
        found = list(spark_check.checks(spark_check.look(Path.cwd())))
    else:
        found = list(diagnose.checks(wanted, Path("runs").absolute(), say))
    if as_json:
        versions = diagnose.environment_summary()
        click.echo(
            json.dumps({"versions": versions, "checks": [check.as_dict() for check in found]}, indent=1)
        )
    else:
        show_checks(Console(), [check.as_dict() for check in found])
    return EXIT_UNAVAILABLE if diagnose.worst(found) == "missing" else EXIT_OK


@command.command("selftest")
@click.option(
    "--engine",
    type=click.Choice(["tensorrt_llm"]),
    help="Also this engine, once in a chroot and once in Docker (with --model).",
)
@click.option("--model", type=FOLDER, help="Folder of the checkpoint for --engine.")
@click.option("--double", type=FOLDER, help="A stand-in for the engine's library, for a rehearsal.")
@click.option(
    "--blocks", type=click.IntRange(min=1), default=4, show_default=True, help="Blocks of each probe run."
)
def selftest_command(engine: str | None, model: Path | None, double: Path | None, blocks: int) -> None:
    """Test in minutes what the tool takes for granted of this host, and print a block to paste into an issue.

    The page cache is dropped if this user may. What stays is what any run makes: the tree of this interpreter in the cache, and
    its Docker image. In the block are versions, counters and findings, and how the log of a trial that failed ends: no path of
    yours, no name of yours or the machine's.
    """
    if (engine is None) != (model is None):
        raise click.UsageError("--engine and --model go together")
    options = selftest.Options(
        blocks=blocks,
        model=str(model.absolute()) if model else None,
        double=str(double.absolute()) if double else None,
    )
    progress = Console(stderr=True)
    click.echo(
        selftest.run(options, Path.cwd(), functools.partial(progress.print, style="dim", soft_wrap=True))
    )


@command.command()
@click.argument("run", type=FOLDER, required=False)
@click.option(
    "--cache",
    "with_cache",
    is_flag=True,
    help="Also host trees and images made from environments that are gone.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def reap(run: Path | None, with_cache: bool, dry_run: bool) -> None:
    """Remove what earlier deaths left, of RUN or of any run that nobody drives, and only that."""
    try:
        client = image.connect(timeout_s=10)
    except UnavailableError:
        client = None  # without a daemon there are no containers of ours either
    cache = content.cache_folder()
    try:
        found = reaper.leftovers(run, client)
        found += reaper.of_no_run(cache, client) if run is None else []
        found += reaper.stale(cache, client) if with_cache else []
        for one in found:
            kept = None if dry_run else reaper.remove(one, client)
            did = "would remove" if dry_run else "removed" if kept is None else "kept"
            why = kept or one.run
            click.echo(f"{did} {one.kind} {one.name[:100]}  {one.what}" + (f"  ({why})" if why else ""))
    finally:
        if client is not None:
            client.close()
    if not found:
        click.echo("nothing is left behind")


# ---- errors -----------------------------------------------------------------------------------------------


@command.command("explain-error")
@click.argument("file", type=click.File("r", errors="replace"))
def explain_error(file: IO[str]) -> None:
    """Say what the known errors in FILE (a log, or - for standard input) mean, and what mends them."""
    found = explain_all(file.read())
    for each in found:
        click.echo(f"{each.name}\n  it means: {each.what}\n  mend: {each.mend}")
    if not found:
        click.echo("no known error in it")


def main(arguments: list[str] | None = None) -> int:
    """The console script."""
    return sweep.call(command, arguments)
