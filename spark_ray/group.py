"""The memory cgroup of one attempt: made before its worker starts, read after its end, removed. cgroup v1 and v2 alike.

Its folder is locked while somebody drives it, so `reap` can tell a group that a dead driver left from one in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import privileged, rootact
from .errors import UnavailableError


def name_of(run_label: str, label: str) -> str:
    """RUN-TRIAL-ATTEMPT, where RUN is a hash of the run folder's path."""
    return f"{_hash(run_label)}-{label.replace('/', '-')}"


def _hash(run_label: str) -> str:
    return hashlib.sha256(run_label.encode()).hexdigest()[:12]


def _all(hierarchy: tuple[int, str] | None = None) -> Path:
    return Path((hierarchy or privileged.memory_hierarchy())[1], privileged.GROUPS)


class Group:
    """Makes the group; `finish` reads and removes it, with everything that is still in it."""

    def __init__(self, name: str, limit_bytes: int | None, root_prefix: Sequence[str]) -> None:
        self._name = name
        self._prefix = root_prefix
        self._version, _ = hierarchy = privileged.memory_hierarchy()
        self.folder = _all(hierarchy) / name
        limit = [] if limit_bytes is None else [str(limit_bytes)]
        self._act("make-group", name, *limit)
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _act(self, verb: str, *args: str) -> None:
        rootact.run(rootact.act(self._prefix, verb, *args), verb)

    def limit_bytes(self) -> int | None:
        """The limit as the kernel holds it; None for none."""
        text = (self.folder / ("memory.limit_in_bytes" if self._version == 1 else "memory.max")).read_text()
        none = text.strip() == "max" or int(text) >= 1 << 60  # v1 writes none as a very large number
        return None if none else int(text)

    def finish(self) -> dict[str, Any]:
        """What the group saw, then its removal; a removal that fails is said, and left to `reap`."""
        found = read(self.folder, self._version)
        os.close(self._lock)
        try:
            self._act("remove-group", self._name)
        except UnavailableError as error:
            found["group_left"] = error.message
        return found


def read(folder: Path, version: int) -> dict[str, Any]:
    """Whether the kernel killed in the group for memory, and its peak; a counter that the kernel lacks is absent."""
    found: dict[str, Any] = {}
    events, peak = (
        ("memory.oom_control", "memory.max_usage_in_bytes")
        if version == 1
        else ("memory.events", "memory.peak")
    )
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / events).read_text().splitlines():
            if line.startswith("oom_kill "):
                found["oom_killed"] = int(line.split()[1]) > 0
    with contextlib.suppress(OSError, ValueError):
        found["cgroup_peak_bytes"] = int((folder / peak).read_text())
    return found


def left(run: Path | None = None) -> Iterator[str]:
    """Names of groups that nobody drives: those of one run, or all."""
    mark = f"{_hash(str(run.absolute()))}-" if run is not None else ""
    try:
        folders = sorted(each for each in _all().iterdir() if each.is_dir() and each.name.startswith(mark))
    except OSError:
        return
    for folder in folders:
        if not is_locked(folder):
            yield folder.name


def is_locked(folder: Path) -> bool:
    """Whether somebody who lives holds the folder's lock: this group's driver, or the maker of a tree (`rootfs.in_the_making`)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True  # removed meanwhile
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return time.time() - folder.stat().st_mtime < 1  # made this moment: its maker is about to lock it
