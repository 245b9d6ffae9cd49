"""`spark-ray`: the commands around a sweep. Thin: each calls one function and prints what it says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click
from rich.console import Console

from . import __version__, config, content, explain, image, rootfs, sweep
from . import doctor as diagnose
from . import reap as reaper
from .errors import EXIT_OK, EXIT_UNAVAILABLE, UnavailableError
from .store import Store
from .terminal import configuration_words, show_checks, show_summary
from .units import format_bytes

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Map where KV-cache capacity diverges between environments, and why."""


command.add_command(sweep.command, "sweep")


@command.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change one value of the experiment."
)
@click.option("--cluster", type=click.Path(path_type=Path), help="Cluster file whose slots the plan counts.")
def plan(experiment: Path, overrides: tuple[str, ...], cluster: Path | None) -> int:
    """Print everything a sweep would do, and do nothing."""
    return sweep.run(experiment, overrides, sweep.Options(plan=True, cluster=cluster))


@command.command()
@click.argument("run", type=_FOLDER)
@click.option("--local", is_flag=True, help="Without Ray.")
@click.option("--address", help="Join the Ray cluster at this address.")
def resume(run: Path, local: bool, address: str | None) -> int:
    """Finish exactly what is missing in RUN, with the experiment and the overrides it was begun with."""
    store = Store.read(run)
    options = sweep.Options(out=run, resume=True, local=local, address=address)
    return sweep.run(run / "experiment.yaml", tuple(store.plan["overrides"]), options)


@command.command()
@click.argument("run", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(run: Path, as_json: bool) -> None:
    """Where RUN stands, from its records alone; also while it is being driven."""
    store = Store.read(run)
    states = [store.state(block) for block in store.blocks()]
    budget = store.plan["experiment"]["search"].get("blocks", 16)
    latest = {state.block.block_id: state.valid or state.attempts for state in states}
    records = list(store.records())
    counted = [record for record in records if record["attempt"] == latest[record["block_id"]]]
    outcomes = Counter(record["outcome"]["kind"] for record in counted)
    complete, void = sum(state.complete for state in states), len(records) - len(counted)
    if as_json:
        data = {"blocks": budget, "complete": complete, "outcomes": outcomes, "superseded_attempts": void}
        click.echo(json.dumps(data))
        return
    click.echo(f"{complete} of {budget} blocks complete; {void} superseded attempts")
    for kind, count in sorted(outcomes.items()):
        click.echo(f"  {kind}: {count}")
    for state in states:
        if not state.complete:
            words = configuration_words(state.block.configuration)
            done = f"{len(state.outcomes)} of {len(state.block.order)} arms done"
            click.echo(f"  open: {state.block.block_id} ({words}), execution {state.attempts}, {done}")


@command.command()
@click.argument("run", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def report(run: Path, as_json: bool) -> None:
    """Write RUN's tables and report again from its records."""
    from analysis import report as writer

    store = Store.read(run)
    summary = writer.write(store.folder)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        show_summary(Console(), summary, str(store.folder / "report.html"))


@command.command()
def schema() -> None:
    """Print the JSON Schema of an experiment, for editors."""
    click.echo(json.dumps(explain.json_schema(), indent=2))


@command.command()
@click.argument("experiment", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(experiment: Path | None, as_json: bool) -> int:
    """What this host has and lacks, each with the mend; for EXPERIMENT, only what it needs. Exit 3 if something is missing."""
    wanted = config.load_experiment(experiment).experiment if experiment else None
    found = list(diagnose.checks(wanted, Path("runs").absolute()))
    if as_json:
        versions = diagnose.environment_summary()
        click.echo(
            json.dumps({"versions": versions, "checks": [check.as_dict() for check in found]}, indent=1)
        )
    else:
        show_checks(Console(), [check.as_dict() for check in found])
    return EXIT_UNAVAILABLE if diagnose.worst(found) == "missing" else EXIT_OK


@command.command()
@click.argument("run", type=_FOLDER, required=False)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def reap(run: Path | None, dry_run: bool) -> None:
    """Remove what earlier deaths left, of RUN or of any run that nobody drives, and only that."""
    try:
        client = image.connect(timeout_s=10)
    except UnavailableError:
        client = None  # without a daemon there are no containers of ours either
    try:
        found = reaper.leftovers(run, client)
        for one in found:
            click.echo(
                f"{'would remove' if dry_run else 'removed'} {one.kind} {one.name[:80]}  {one.what}  ({one.run})"
            )
            if not dry_run:
                reaper.remove(one, client)
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
@click.option("--rootfs", "folder", type=_FOLDER, help="The tree; default: the host rootfs.")
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
