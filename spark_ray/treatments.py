"""Host state set on purpose before an attempt, and verified at the moment that counts: the engine's sizing."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

from .conditions import Fill, Treatment
from .errors import RunError
from .rootact import RootActs
from .worker import observe

_SYS_CACHESTAT = 451  # the same number on every architecture; Linux 6.5 and later
_HELD_SHARE = 0.98  # of a fill that must still be resident at the sizing moment
_CHUNK = 4 << 20


def resident_bytes(path: Path) -> int:
    """Bytes of a file in the page cache now: cachestat, else mincore."""
    size = path.stat().st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        span = (ctypes.c_uint64 * 2)(0, 0)  # offset 0, length 0: the whole file
        counts = (ctypes.c_uint64 * 5)()
        if libc.syscall(_SYS_CACHESTAT, descriptor, span, counts, 0) == 0:
            return int(counts[0]) * mmap.PAGESIZE
        pages = -(-size // mmap.PAGESIZE)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        vector = (ctypes.c_ubyte * pages)()
        libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector)
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
        return sum(byte & 1 for byte in vector) * mmap.PAGESIZE
    finally:
        os.close(descriptor)


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


def effective(treatment: Treatment, root_acts: bool) -> tuple[dict[str, Any], list[str]]:
    """What this user can have of a treatment: (treatment with every key set, warnings)."""
    warnings = []
    cache: object = treatment.page_cache
    if cache is None:
        cache = "drop" if root_acts else "advise"
        if not root_acts:
            warnings.append(
                "page_cache: drop needs root; known files are advised away instead, others stay cached"
            )
    pages = treatment.per_cpu_pages
    if pages is None:
        pages = "drained" if root_acts else "as_is"
        if not root_acts:
            warnings.append(
                "per_cpu_pages: drained needs root; freed memory may hide in per-CPU lists for a minute"
            )
    value = {"fill_bytes": cache.fill} if isinstance(cache, Fill) else cache
    return {"page_cache": value, "per_cpu_pages": pages}, warnings


def missing(treatment: Treatment, root_acts: bool) -> str | None:
    """Why a treatment that is asked for by name cannot be had here."""
    if root_acts:
        return None
    asked = [f"page_cache: {treatment.page_cache}"] if treatment.page_cache == "drop" else []
    if treatment.per_cpu_pages == "drained":
        asked.append("per_cpu_pages: drained")
    return f"{' and '.join(asked)} needs root" if asked else None


class Treatments:
    """Applies treatments on one slot. `scratch` holds the fill file and must be on a disk, not in memory."""

    def __init__(self, root_acts: RootActs, scratch: Path, known_files: list[Path]) -> None:
        self._root = root_acts
        self._can = root_acts.available()[0]
        self._scratch = scratch
        self._known = known_files
        self._fill: Path | None = None

    def apply(self, treatment: dict[str, Any]) -> dict[str, Any]:
        """Bring the host into the state; returns what was done and read. `treatment` comes from `effective`."""
        cache = treatment["page_cache"]
        done: dict[str, Any] = {}
        if cache != "keep":
            if cache != "advise" and self._can:
                self._root.run("drop-caches")
                done["dropped"] = True
            else:
                advise_away(self._known)
                done["advised_files"] = len(self._known)
        if treatment["per_cpu_pages"] == "drained":
            self._root.run("drain-per-cpu")
        if isinstance(cache, dict):
            done["filled_bytes"] = self._fill_cache(cache["fill_bytes"])
        info = observe.meminfo()
        return done | {
            "asked": treatment,
            "mem_free_bytes": info["MemFree"],
            "cached_bytes": info["Cached"] + info["Buffers"],
        }

    def _fill_cache(self, size_bytes: int) -> int:
        path = self._scratch / f"page-cache-fill-{size_bytes}"
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                # Allocated but never written: reading it fills the cache with no disk traffic.
                part = path.with_suffix(".part")
                with part.open("wb") as stream:
                    os.posix_fallocate(stream.fileno(), 0, size_bytes)
                part.replace(path)
            read_through(path)
        except OSError as error:
            path.with_suffix(".part").unlink(missing_ok=True)
            raise RunError(
                f"cannot make the page-cache fill file {path}: {error.strerror}",
                mend=f"free {size_bytes >> 20} MiB on that disk, or lower page_cache: {{fill: ...}}",
            ) from error
        self._fill = path
        return resident_bytes(path)

    def seen_now(self) -> dict[str, Any]:
        """What of the state can be read back: asked for at the sizing moment."""
        return {"fill_resident_bytes": resident_bytes(self._fill)} if self._fill else {}

    def undo(self) -> None:
        """After the attempt: the fill leaves the cache."""
        if self._fill:
            advise_away([self._fill])
            self._fill = None

    def close(self) -> None:
        """Remove what treatments left on disk."""
        for path in self._scratch.glob("page-cache-fill-*"):
            path.unlink(missing_ok=True)


def not_held(treatment: dict[str, Any], seen: dict[str, Any] | None) -> str | None:
    """Why the state did not hold until the sizing moment; None when it did or the worker never got there."""
    cache = treatment["page_cache"]
    if not isinstance(cache, dict) or seen is None:
        return None
    resident = seen.get("fill_resident_bytes", 0)
    if resident < _HELD_SHARE * cache["fill_bytes"]:
        return f"page cache fill: {resident} of {cache['fill_bytes']} bytes were still resident at the sizing moment"
    return None
