"""The file system of a vendor's image as a tree, so that a chroot runs what a container of it runs.

Nothing of it is started. How the image starts a program, its variables and entrypoint, goes into the tree's description:
NVIDIA's images set their library paths there, and a chroot without them finds the wrong MPI or none.
"""

from __future__ import annotations

import glob
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from . import driver
from .errors import InputError, UnavailableError, typed
from .group import is_locked
from .image import in_words, inspect
from .rootfs import (
    KERNEL_FOLDERS,
    PATH,
    Rootfs,
    content_sha256,
    find_python,
    finish,
    in_the_making,
    save,
    vacant,
)
from .rootfs_check import inside
from .units import format_bytes

_CACHE, _CONFIG, _NOTES = "etc/ld.so.cache", "etc/ld.so.conf", "var/cache/ldconfig/aux-cache"


def extract(client: Any, image: str, folder: Path, progress: Callable[[int], None] | None = None) -> Rootfs:
    """The file system of an image that the engine has, as a tree. `progress` is told the bytes so far."""
    if os.geteuid() != 0:
        again = typed(f"rootfs extract {image} {folder}", sudo=True)
        raise UnavailableError("unpacking an image with its owners needs root", mend=again)
    folder = vacant(folder)
    facts = inspect(client, image)
    _remove_unfinished(folder)
    _room(folder, facts.size_bytes)
    with in_words(f"unpacking {image}"), in_the_making(folder) as making:
        _export(client, facts.image.id, making, progress)
        renew_loader_cache(making)
        finish(making)
        # Before the renaming, as hashing takes minutes: a folder without its description would be in the way.
        made = Rootfs(
            path=folder,
            sha256=content_sha256(making),
            mounts=(),
            python=find_python(making, facts.env.get("PATH", PATH)),
            env=facts.env,
            entrypoint=facts.entrypoint,
            origin=image,
            cwd=facts.cwd,
            image_id=facts.image.id,
        )
        making.rename(folder)
    return save(made)


def _export(client: Any, image_id: str, making: Path, progress: Callable[[int], None] | None) -> None:
    never_run = ["spark_ray never starts this"]
    container = client.containers.create(
        image_id, never_run, network_mode="none", labels={"spark_ray.purpose": "extract"}
    )
    try:
        unpack(container.export(chunk_size=1 << 20), making, progress)
    finally:
        container.remove(force=True, v=True)


def _remove_unfinished(folder: Path) -> None:
    """What an extraction to the same folder left when it was killed: as large as a whole tree, and hidden."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.????????"):  # as `in_the_making` names them
        if left.is_dir() and not left.is_symlink() and not is_locked(left):
            shutil.rmtree(left)


def _room(folder: Path, needed_bytes: int) -> None:
    there = next(each for each in folder.parents if each.is_dir())
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < needed_bytes:
        raise InputError(
            f"the image takes {format_bytes(needed_bytes)} unpacked, and {there} has {format_bytes(free_bytes)} free",
            mend="free space, or name a folder on another disk",
        )


def renew_loader_cache(tree: Path) -> bool:
    """Make the loader's cache anew where the image's is missing or names files that are not there; whether that was so.

    The container toolkit does so whenever a container starts. A tree of another machine keeps what it has.
    """
    program = driver.ldconfig()
    ours = driver.elf_kind(inside(tree, "/bin/sh") or tree) == driver.elf_kind(sys.executable)
    if program is None or not ours or not (tree / _CONFIG).is_file() or (tree / _CACHE).is_symlink():
        return False
    known = driver.loader_cache(tree) if (tree / _CACHE).is_file() else []
    if known and all(inside(tree, path) is not None for _, path in known):
        return False
    had_notes = (tree / _NOTES).exists()
    command = [program, "-X", "-r", str(tree)]  # -X: the tree's links are the image's, and stay
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not had_notes:
        (tree / _NOTES).unlink(missing_ok=True)  # ldconfig's own, with times in it
    return done.returncode == 0


def unpack(chunks: Iterable[bytes], folder: Path, progress: Callable[[int], None] | None = None) -> None:
    """Unpack a tar stream with owners and modes, without devices, and never outside of `folder`."""
    folders: list[tuple[Path, tarfile.TarInfo]] = []
    with tarfile.open(fileobj=_Stream(chunks, progress), mode="r|", errorlevel=2) as archive:
        archive.extraction_filter = lambda member, _folder: member  # ours is stricter: `_place`
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or a big image keeps its whole list in memory
            if (path := _place(folder, member)) is None:
                continue
            if member.islnk():
                os.link(_inside(folder, member.linkname), path, follow_symlinks=False)
                continue
            archive.extract(member, folder, set_attrs=not member.isdir(), numeric_owner=True)
            if member.isdir():
                folders.append((path, member))
    for path, member in reversed(folders):  # last, or a read-only folder could not be filled
        if os.geteuid() == 0:
            os.chown(path, member.uid, member.gid)
        path.chmod(member.mode & 0o7777)


class _Stream(io.RawIOBase):
    """Chunks as a file that tarfile can read."""

    def __init__(self, chunks: Iterable[bytes], progress: Callable[[int], None] | None) -> None:
        self._chunks = filter(None, chunks)
        self._progress = progress
        self._done = 0

    def read(self, _size: int = -1, /) -> bytes:
        chunk = next(self._chunks, b"")
        self._done += len(chunk)
        if self._progress is not None and chunk:
            self._progress(self._done)
        return chunk


def _place(folder: Path, member: tarfile.TarInfo) -> Path | None:
    """Where a member goes; None when it is left out. Refuses what would follow a link or replace anything."""
    parts = PurePosixPath(member.name).parts
    left_out = not parts or (parts[0] in KERNEL_FOLDERS and len(parts) > 1)
    if left_out or not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return None
    path = _inside(folder, member.name)
    if os.path.lexists(path) and (path.is_symlink() or not (member.isdir() and path.is_dir())):
        raise InputError(f"the archive holds {member.name!r} twice")
    return path


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    path = folder
    for part in parts:
        if path.is_symlink() or part in ("/", "//", ".."):
            raise InputError(f"the archive holds {name!r}, which leads out of the folder")
        path /= part
    return path
