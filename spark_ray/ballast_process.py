"""`python -I -S ballast_process.py BYTES`: hold that much anonymous memory until standard input closes.

Standard library only, run as a script. It says on one line of standard output, as JSON, what it holds: `base_bytes` (its
own anonymous memory before), `locked` and `root_cgroup` (true, or why not); or `error`, and ends. It ends with its
parent however that dies: the kernel kills it (PDEATHSIG), and a closed standard input is the end as well.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_CHUNK = 1 << 20
_ROOT_GROUPS = ("/sys/fs/cgroup/memory/cgroup.procs", "/sys/fs/cgroup/cgroup.procs")  # cgroup v1, v2


def leave_group() -> bool | str:
    """Move to the root of the memory hierarchy, which no guest can be limited by; true, or why not."""
    for path in _ROOT_GROUPS:
        if os.path.exists(path):  # noqa: PTH110  importing pathlib would double the start-up time
            try:
                with open(path, "w") as stream:  # noqa: PTH123
                    stream.write("0")
            except OSError as error:
                return error.strerror or str(error)
            return True
    return "no memory hierarchy is mounted"


def anonymous_bytes() -> int:
    with open("/proc/self/status") as stream:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon:"))


def touch(memory: mmap.mmap, size: int) -> None:
    """Write every page: memory that was only asked for is not held. Random, so that nothing can compress it."""
    chunk = os.urandom(_CHUNK)
    for start in range(0, size, _CHUNK):
        length = min(_CHUNK, size - start)
        memory[start : start + length] = chunk[:length]


def lock(memory: mmap.mmap, size: int) -> bool | str:
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) != 0:
        return os.strerror(ctypes.get_errno())
    return True


def main(size: int) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    root_cgroup = leave_group()  # first: memory is charged to the group in which it is touched
    base = anonymous_bytes()
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        touch(memory, size)
    except (OSError, MemoryError) as error:
        print(json.dumps({"error": getattr(error, "strerror", None) or "out of memory"}))  # noqa: T201
        return 1
    locked = lock(memory, size)
    print(json.dumps({"base_bytes": base, "locked": locked, "root_cgroup": root_cgroup}), flush=True)  # noqa: T201
    sys.stdin.buffer.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
