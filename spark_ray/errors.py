"""Every way the framework itself can stop, with its exit code.

A failed *trial* is a row in the results, never an exception. These are for the framework: bad input, a host
that cannot do what was asked, a run that must not go on. Each message says what, where and what to do.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

EXIT_OK = 0
"""done"""
EXIT_BAD_INPUT = 2
"""bad input: the experiment, the cluster file, an option, or a run folder that cannot be used"""
EXIT_UNAVAILABLE = 3
"""something required is unavailable here; nothing was done"""
EXIT_TOO_MANY_FAILURES = 4
"""done, but a larger share of trials failed than limits.failed_share allows"""
EXIT_WATCHDOG = 5
"""stopped by the memory watchdog; everything measured is kept"""
EXIT_INTERRUPTED = 130
"""interrupted; everything measured is kept"""


class SparkRayError(Exception):
    """An error the user can act on. `mend` is the command or the change that helps."""

    exit_code = 1

    def __init__(self, message: str, *, mend: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message}\n  mend: {self.mend}" if self.mend else self.message


class InputError(SparkRayError):
    """The experiment, the cluster file or an option is wrong."""

    exit_code = EXIT_BAD_INPUT


class UnavailableError(SparkRayError):
    """A required environment, engine or host capability is missing here."""

    exit_code = EXIT_UNAVAILABLE


class RunError(SparkRayError):
    """The run folder cannot be used: locked, changed, broken, disk full."""

    exit_code = EXIT_BAD_INPUT


def typed(words: str, *, sudo: bool = False) -> str:
    """A command of this program as it can be typed here: sudo's PATH has no virtual environment, and yours may not either."""
    program = Path(sys.executable).parent / "spark-ray"
    return f"{'sudo ' if sudo else ''}{program if program.is_file() else 'spark-ray'} {words}"


DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM})


def cannot_write(error: OSError) -> RunError:
    """A full, failing or forbidden disk, in words."""
    return RunError(
        f"cannot write {error.filename or 'to the disk'}: {error.strerror or error}",
        mend="free space on that disk (or mend its permissions), then continue with --resume",
    )


class WatchdogStop(SparkRayError):
    """The host ran so low on memory that going on would risk wedging it."""

    exit_code = EXIT_WATCHDOG
