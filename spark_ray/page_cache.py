"""The page cache as a treatment: files advised out of it, and a fill held in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .errors import RunError
from .worker import observe

_CHUNK = 4 << 20
_FILL = "page-cache-fill-"
_MOST_FILLS = 4
"""Files kept for arms of different fills; where the fill is a knob, every block may need another one."""

_READINGS = 3
"""A large file may lose its first pages while its last ones are read."""


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def advise_away(paths: list[Path]) -> None:
    """Ask the kernel to forget clean cached pages of files; needs no privilege beyond reading them."""
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def bring_back(path: Path) -> int:
    """Read a file again if the kernel has reclaimed some of it meanwhile, as it may with what nobody uses; the bytes that were gone."""
    gone = path.stat().st_size - observe.resident_bytes(path)
    if gone > 0:
        read_through(path)
    return max(gone, 0)


def fill(folder: Path, size_bytes: int) -> Path:
    """The fill file of that size in `folder`, made if it is not there, and now in the page cache."""
    path = folder / f"{_FILL}{size_bytes}"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            for old in sorted(folder.glob(f"{_FILL}*"), key=lambda each: each.stat().st_mtime)[
                : 1 - _MOST_FILLS
            ]:
                old.unlink()
            # Allocated but never written: reading it fills the cache with no disk traffic.
            with part.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, size_bytes)
            part.replace(path)
        for _ in range(_READINGS):
            if not bring_back(path):
                break
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(
            f"cannot make the page-cache fill file {path}: {error.strerror}",
            mend=f"free {size_bytes >> 20} MiB on that disk, or lower page_cache: {{fill: ...}}",
        ) from error
    return path


def remove_fills(folder: Path) -> None:
    for path in folder.glob(f"{_FILL}*"):
        path.unlink(missing_ok=True)


def of_files_bytes(info: Mapping[str, int]) -> int:
    """Page cache proper, from /proc/meminfo: the kernel counts shared memory in Cached."""
    return info["Cached"] + info["Buffers"] - info["Shmem"]
