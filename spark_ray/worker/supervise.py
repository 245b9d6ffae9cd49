"""The first process of the guest: waits, and makes sure that nothing outlives the host or the worker.

The worker may hang in native code, stop, fork, or be killed; this process does nothing else and so can always act.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent() -> None:
    """SIGKILL when the parent ends. It works on a stopped process too; closing standard input is the other way."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Grandchildren whose parent dies become ours, so that they can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        own, found = os.getpid(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text(errors="replace")
                except OSError:
                    continue
                if int(stat.rsplit(")", 1)[1].split()[1]) == own:
                    found.append(int(entry.name))
        return found


def end_all() -> None:
    """Kill and collect every descendant: each dead generation hands its children to us, until none is left."""
    while True:
        for pid in _children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _wait(worker: int, stdin: int) -> int | None:
    """The worker's wait status, or None when standard input closed first (the host is gone)."""
    poll = select.poll()
    poll.register(
        stdin, 0
    )  # no event asked for: only POLLHUP and POLLERR, the answers are the worker's to read
    try:
        handle = os.pidfd_open(worker)
        poll.register(handle, select.POLLIN)
        timeout = None
    except OSError:  # an old kernel or seccomp profile
        timeout = 20
    while True:
        events = poll.poll(timeout)
        # Adopted orphans end here too: collect whatever ended, until it is the worker.
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == worker:
                return status
            if pid == 0:
                break
        if any(descriptor == stdin for descriptor, _ in events):
            return None


def supervise(worker: int) -> int:
    """Wait for the worker or for the end of the host; then end every descendant. Returns the exit status to use."""

    def stop(*_: object) -> None:  # a container is asked to stop by SIGTERM to its first process
        end_all()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the group; the host decides
    status = _wait(worker, 0)
    end_all()
    if status is None:
        return 128 + signal.SIGHUP
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)
