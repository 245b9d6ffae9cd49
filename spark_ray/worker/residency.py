"""Which part of a file is in the page cache now: cachestat (Linux 6.5), else mincore. Part of the instrument, `observe`.

Two traps, both seen: cachestat on a file of an overlay filesystem counts the overlay's own mapping, which is always
empty; and mincore tells somebody who neither owns a file nor may write to it that all of it is resident. So a 0 of
cachestat is asked again of mincore, and mincore is only asked where it tells the truth; else the answer is absent.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SYS_CACHESTAT = 451  # the same number on every architecture
_WINDOW = 1 << 30  # of a file that mincore is asked about at once
_RESIDENT = bytes(value & 1 for value in range(256))  # only the lowest bit of mincore's bytes means anything


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return libc


def _failed() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _cachestat(descriptor: int) -> int:
    """Resident bytes by cachestat. OSError where the kernel lacks it (ENOSYS) or something refuses it (EPERM)."""
    span = (ctypes.c_uint64 * 2)(0, 0)  # offset 0, length 0: the whole file
    counts = (ctypes.c_uint64 * 5)()
    if _libc().syscall(_SYS_CACHESTAT, descriptor, span, counts, 0) != 0:
        raise _failed()
    return int(counts[0]) * mmap.PAGESIZE


def _mincore(descriptor: int, size: int) -> int:
    """Resident bytes by mincore, a window at a time."""
    libc, resident = _libc(), 0
    for start in range(0, size, _WINDOW):
        length = min(_WINDOW, size - start)
        address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
        if address == ctypes.c_void_p(-1).value:
            raise _failed()
        try:
            vector = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
            if libc.mincore(address, length, vector) != 0:
                raise _failed()
        finally:
            libc.munmap(address, length)
        resident += vector.raw.translate(_RESIDENT).count(1) * mmap.PAGESIZE
    return resident


def _mincore_is_honest(path: Path, owner: int) -> bool:
    return owner == os.geteuid() or os.access(path, os.W_OK)


def _ask(path: Path) -> tuple[int, int, str]:
    """(size, resident bytes, source) of one file; OSError says why it cannot be known."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        if status.st_size == 0:
            return 0, 0, "cachestat"
        try:
            if resident := _cachestat(descriptor):
                return status.st_size, resident, "cachestat"
        except OSError as error:
            # Old seccomp profiles of container engines answer EPERM for a system call they do not know.
            if error.errno not in {errno.ENOSYS, errno.EPERM}:
                raise
        if not _mincore_is_honest(path, status.st_uid):
            raise OSError(errno.EPERM, "mincore tells only a file's owner, or who may write to it")
        return status.st_size, _mincore(descriptor, status.st_size), "mincore"
    finally:
        os.close(descriptor)


def resident_bytes(path: Path) -> int:
    """Bytes of a file in the page cache now. Raises OSError where that cannot be known."""
    return _ask(path)[1]


def resident(paths: Iterable[Path]) -> dict[str, Any]:
    """Sums over files: how many were asked, their size, what of it is in the page cache, and by which call.

    A file that cannot be asked is in `absent` with its reason and in no sum; with none left there is no sum.
    """
    values: dict[str, Any] = {"files": 0}
    sources, absent = set(), {}
    for path in paths:
        try:
            size, there, source = _ask(path)
        except OSError as error:
            absent[str(path)] = error.strerror or str(error)
            continue
        values["files"] += 1
        values["size_bytes"] = values.get("size_bytes", 0) + size
        values["resident_bytes"] = values.get("resident_bytes", 0) + there
        if size:
            sources.add(source)
    if sources:
        values["source"] = "+".join(sorted(sources))
    if absent:
        values["absent"] = absent
    return values


def files_under(path: Path) -> list[Path]:
    """The file itself, or all regular files below a folder, in name order."""
    if os.path.isfile(path):  # noqa: PTH113  pathlib's raises where a folder may not be entered
        return [path]
    found = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sorted(each for each in found if os.path.isfile(each))  # noqa: PTH113  no device, no pipe
