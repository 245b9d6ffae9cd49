"""`python tether.py PID...`: when standard input closes, kill these processes. Standard library only, run as a script.

Ray's per-node agents outlive a killed driver for about a minute, while they try to report it to a control store that
died with it (Ray 2.60, `process_watcher.report_raylet_error_logs`). On a machine whose free memory is the measurement
that is a disturbance; so the driver of a local Ray holds the other end of this process's standard input.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main(pids: list[int]) -> None:
    handles = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handles.append(
                os.pidfd_open(pid)
            )  # names this very process: a recycled number is not mistaken for it
    sys.stdin.buffer.read()
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
