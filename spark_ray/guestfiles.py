"""Files in a folder that a guest can write to, handled so that nothing it planted there does harm.

Where a file is expected there may be a link to another file, a pipe that nobody fills, a device, a folder, or more
bytes than memory holds. No link is followed, nothing waits, and only regular files of a bounded size are read.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

_PLANTED = {
    errno.ELOOP,
    errno.ENXIO,
    errno.EISDIR,
    errno.ENODEV,
}  # what opening a link, a pipe, a folder, a device says
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _require_file(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise OSError(errno.EINVAL, f"it is {kind}", str(path))


def read(path: Path, most_bytes: int) -> bytes:
    """A regular file of at most `most_bytes`; else OSError, FileNotFoundError if there is nothing."""
    _require_file(path.lstat(), path)  # first: opening a device can have effects
    descriptor = os.open(path, os.O_RDONLY | _SAFELY)
    with open(descriptor, "rb") as stream:  # noqa: PTH123  a descriptor, not a path
        _require_file(os.fstat(descriptor), path)
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes >> 20} MiB", str(path))
    return data


def tail(path: Path, most_bytes: int) -> bytes:
    """The end of a regular file, of whatever size; else OSError."""
    _require_file(path.lstat(), path)
    descriptor = os.open(path, os.O_RDONLY | _SAFELY)
    with open(descriptor, "rb") as stream:  # noqa: PTH123
        status = os.fstat(descriptor)
        _require_file(status, path)
        stream.seek(max(0, status.st_size - most_bytes))
        return stream.read(most_bytes)


def append(path: Path, data: bytes) -> None:
    """Add to a regular file; where the guest has put something else, nothing is written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _SAFELY, 0o644)
    except OSError as error:
        if error.errno in _PLANTED:
            return
        raise
    with open(descriptor, "ab") as stream:  # noqa: PTH123
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            stream.write(data)


def write(path: Path, text: str, *, durable: bool = False) -> None:
    """By rename of a file that is new for certain: a reader sees a whole file or none, and no link is followed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY, 0o666)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:  # noqa: PTH123
            stream.write(text)
            stream.flush()
            if durable:
                os.fsync(descriptor)
        try:
            temporary.replace(path)
        except IsADirectoryError:
            path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.planted"))
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def reopen(folder: Path) -> None:
    """Give this user's rights on a folder back, if the guest took them away."""
    mode = folder.stat().st_mode
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        folder.chmod(stat.S_IMODE(mode) | stat.S_IRWXU)
