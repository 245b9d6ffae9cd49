"""`spark-ray`: the commands around a sweep. Thin: each calls one function and prints what it says."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import IO

import click
from click.shell_completion import get_completion_class
from rich.console import Console

from . import (
    __version__,
    config,
    content,
    explain,
    image,
    pin,
    rootfs,
    rootfs_check,
    rootfs_image,
    running,
    selftest,
    several,
    spark_check,
    sweep,
)
from . import doctor as diagnose
from . import reap as reaper
from .completion import FOLDER, YAML
from .diagnose import explain_all
from .errors import EXIT_OK, EXIT_UNAVAILABLE, InputError, UnavailableError
from .store import Store
from .terminal import show_checks, show_overview, show_standing, show_summary
from .units import format_bytes


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Map where KV-cache capacity diverges between environments, and why."""


command.add_command(sweep.command, "sweep")


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
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def report(run: Path, as_json: bool) -> None:
    """Write RUN's tables and report again from its records; of a folder of runs each, and index.html over them."""
    from analysis import overview
    from analysis import report as writer

    if several.is_run(run):
        summary = writer.write(run)
        if as_json:
            click.echo(json.dumps(summary))
        else:
            show_summary(Console(), summary, str(run / "report.html"))
        return
    rows = overview.write(run, several.runs_in(run), again=True)
    if as_json:
        click.echo(json.dumps(rows))
    else:
        show_overview(Console(), rows, str(run / overview.PAGE))


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


# ---- rootfs and image -------------------------------------------------------------------------------------


@command.group("rootfs")
def rootfs_group() -> None:
    """Trees that chroot arms run in, and that images are made from."""


def _describe(tree: rootfs.Rootfs) -> None:
    click.echo(f"rootfs  {tree.path}\nsha256  {tree.sha256}\npython  {tree.python}")
    if tree.image_id:
        click.echo(
            f"image   {tree.origin}\nid      {tree.image_id}\nstarts  {' '.join(tree.entrypoint) or 'without an entrypoint'}"
        )
    for mount in tree.mounts:
        click.echo(f"bind    {mount.source}{' (read-only)' if mount.read_only else ''}")


@rootfs_group.command("build")
@click.option(
    "--debootstrap",
    "folder",
    type=click.Path(path_type=Path),
    help="Make a Debian tree in this folder instead.",
)
@click.option("--suite", default="bookworm", show_default=True, help="Debian release for --debootstrap.")
def rootfs_build(folder: Path | None, suite: str) -> None:
    """Make the host rootfs: a minimal tree with this interpreter and virtual environment bound read-only."""
    _describe(
        rootfs.debootstrap(folder, suite) if folder else rootfs.build_host(content.cache_folder() / "rootfs")
    )


@rootfs_group.command("extract")
@click.argument("reference", metavar="IMAGE")
@click.argument("folder", type=click.Path(path_type=Path))
def rootfs_extract(reference: str, folder: Path) -> None:
    """Unpack a local IMAGE into FOLDER, with its environment and entrypoint, for chroot arms."""
    console = Console(stderr=True)
    client = image.connect()
    try:
        with console.status("extracting") as shown:
            tree = rootfs_image.extract(
                client, reference, folder, lambda done: shown.update(f"extracting {format_bytes(done)}")
            )
    finally:
        client.close()
    _describe(tree)
    for seen in rootfs_check.look(tree):
        if seen.status != "ok":
            click.echo(f"{seen.status:7} {seen.found} (mend: {seen.mend})")


@command.group("image")
def image_group() -> None:
    """Docker images: made from a rootfs, or a vendor's."""


@image_group.command("build")
@click.option("--rootfs", "folder", type=FOLDER, help="The tree; default: the host rootfs.")
@click.option("--tag", help="Name of the image; default: spark_ray/rootfs:HASH.")
def image_build(folder: Path | None, tag: str | None) -> None:
    """Make the Docker image of a tree, without a registry."""
    tree = rootfs.load(folder) if folder else rootfs.build_host(content.cache_folder() / "rootfs")
    client = image.connect()
    try:
        made = image.build(client, tree, tag)
    finally:
        client.close()
    click.echo(f"image   {made.reference}\nid      {made.id}\nrootfs  {made.rootfs_sha256}")


@image_group.command("pull")
@click.argument("reference", metavar="IMAGE")
@click.option("--yes", is_flag=True, help="Do not ask.")
def image_pull(reference: str, yes: bool) -> None:
    """Fetch IMAGE from its registry, after asking. Nothing else here ever does."""
    registry = image.registry_of(reference)
    click.echo(
        f"{reference} would be fetched from {registry}. Its size is known there only; a TensorRT-LLM image takes tens of GB.",
        err=True,
    )
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("nothing was fetched: nobody is here to say yes", mend="add --yes")
        if not click.confirm("Fetch it?", err=True):
            click.echo("nothing was fetched")
            return
    console = Console(stderr=True)
    client = image.connect()
    try:
        with console.status("fetching") as shown:
            found = image.pull(client, reference, lambda done: shown.update(f"fetching {format_bytes(done)}"))
    finally:
        client.close()
    click.echo(
        f"image   {found.image.reference}\nid      {found.image.id}\nsize    {format_bytes(found.size_bytes)}"
    )
    for digest in found.digests:
        click.echo(f"digest  {digest}")


@image_group.command("pin")
@click.argument("what", metavar="EXPERIMENT|IMAGE")
@click.option("--write", is_flag=True, help="Put the digests into the file EXPERIMENT.")
def image_pin(what: str, write: bool) -> None:
    """Print the digest that the Docker engine recorded for IMAGE, or for each image that EXPERIMENT names."""
    path = pin.experiment_in(what)
    if write and path is None:
        raise click.UsageError("--write needs an EXPERIMENT, a YAML file")
    client = image.connect()
    try:
        found = pin.look_up(client, pin.images_of(pin.load(path)) if path else [what])
    finally:
        client.close()
    for reference, name in found.items():
        click.echo(name if path is None else f"{reference}  {name}")
    if path is not None and not found:
        click.echo("no docker arm names an image")
    if write and path is not None:
        pin.write(path, found)


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
