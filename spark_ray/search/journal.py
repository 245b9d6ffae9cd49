"""The journal of the study: one JSON record a line, appended and fsynced by Optuna before a call returns."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ..errors import RunError


def open_journal(path: Path) -> JournalStorage:
    """The storage over this file, whatever the last writer's death left at its end."""
    drop_torn_tail(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path)))


def drop_torn_tail(path: Path) -> bool:
    """Cut what is no record off the end, kept in PATH.torn. True if there was something.

    Optuna does not open a journal with a garbage line at the end, and appends to a torn one, which makes it garbage.
    Nothing is lost: an unfinished record belongs to a call that never returned.
    """
    content = path.read_bytes() if path.exists() else b""
    *lines, _ = content.split(b"\n")  # after the last newline: nothing, or a torn line
    sound = [_is_record(line) for line in lines]
    kept = sound.index(False) if False in sound else len(lines)
    if any(sound[kept:]):
        raise RunError(
            f"{path}: line {kept + 1} is not a record of the study, but records follow it",
            mend=f"this is damage, not a crash: restore the file, or delete line {kept + 1}",
        )
    size = sum(len(line) + 1 for line in lines[:kept])
    if size == len(content):
        return False
    with path.with_name(path.name + ".torn").open("ab") as copy:
        copy.write(content[size:] + b"\n")
        copy.flush()
        os.fsync(copy.fileno())
    with path.open("r+b") as journal:
        journal.truncate(size)
        os.fsync(journal.fileno())
    return True


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "op_code" in record


class _Lock:
    """A lock the kernel lets go of when its holder dies.

    Optuna's own is a link beside the file: after a kill -9 inside an append it makes the next start wait 30 s.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: int | None = None

    def acquire(self) -> bool:
        held = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(held, fcntl.LOCK_EX)
        self._held = held
        return True

    def release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None
