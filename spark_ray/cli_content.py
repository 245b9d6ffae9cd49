"""`spark-ray rootfs` and `spark-ray image`: the content that arms run in."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from . import content, image, pin, rootfs, rootfs_check, rootfs_image
from .completion import FOLDER
from .errors import InputError
from .units import format_bytes


@click.group("rootfs")
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


@click.group("image")
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
