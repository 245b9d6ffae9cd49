"""`spark-ray`: the commands around a sweep. Thin: each calls one function and prints what it says."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import click
from click.shell_completion import get_completion_class
from rich.console import Console

from . import __version__, config, content, explain, image, rootfs, running, several, sweep
from . import doctor as diagnose
from . import reap as reaper
from .completion import FOLDER, YAML
from .errors import EXIT_OK, EXIT_UNAVAILABLE, UnavailableError
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
def plan(
    experiment: Path, overrides: tuple[str, ...], cluster: Path | None, allow_roots: tuple[Path, ...]
) -> int:
    """Print everything a sweep would do, and do nothing."""
    options = running.Options(plan=True, cluster=cluster, allow_roots=allow_roots)
    return running.run(experiment, overrides, options)


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
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@sweep.ALLOW_ROOT
def doctor(experiment: Path | None, as_json: bool, allow_roots: tuple[Path, ...]) -> int:
    """What this host has and lacks, each with the mend; for EXPERIMENT, only what it needs. Exit 3 if something is missing."""
    wanted = config.load_experiment(experiment, (), allow_roots).experiment if experiment else None
    progress = Console(stderr=True)
    say = functools.partial(progress.print, style="dim", soft_wrap=True)
    found = list(diagnose.checks(wanted, Path("runs").absolute(), say))
    if as_json:
        versions = diagnose.environment_summary()
        click.echo(
            json.dumps({"versions": versions, "checks": [check.as_dict() for check in found]}, indent=1)
        )
    else:
        show_checks(Console(), [check.as_dict() for check in found])
    return EXIT_UNAVAILABLE if diagnose.worst(found) == "missing" else EXIT_OK


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
            tree = rootfs.extract(
                client, reference, folder, lambda done: shown.update(f"extracting {format_bytes(done)}")
            )
    finally:
        client.close()
    _describe(tree)


@command.group("image")
def image_group() -> None:
    """Docker images made from a rootfs."""


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


def main(arguments: list[str] | None = None) -> int:
    """The console script."""
    return sweep.call(command, arguments)
