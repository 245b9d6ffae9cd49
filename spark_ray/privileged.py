"""The few acts that need root, in one small script: standard library only, imports nothing of this package.

It is run as `python -I -S privileged.py VERB ...`, as root or with `sudo -n` in front. The verbs are

    drop-caches                sync, then drop the page cache, dentries and inodes
    drain-per-cpu              give the free pages that wait in per-CPU lists back to MemFree; prints before and after
    make-group NAME [BYTES]    make the memory cgroup spark_ray/NAME (v1 and v2), limited to BYTES, swap included
    remove-group NAME          kill what is left in it, and remove it

and nothing else: any other word ends with status 2 and one line on standard error. What separates a program from its
host is `isolate.py`.
"""

from __future__ import annotations

import os
import sys

CGROUP = "/sys/fs/cgroup"
GROUPS = "spark_ray"  # the group that holds all of ours
REPEATS = 5
REMOVAL_ROUNDS = 500  # at 10 ms

HIGH_FRACTION = "/proc/sys/vm/percpu_pagelist_high_fraction"
DRAIN_BYTES = 4 << 20  # measured: 4 MiB freed above the lowered mark take 0.8 GiB with them
DRAIN_ROUNDS = 16


class Refused(Exception):
    """Said in one line on standard error, with status 2."""


def drop_caches() -> None:
    os.sync()
    _write("/proc/sys/vm/drop_caches", "3")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123 (importing pathlib would double the start-up time)
        file.write(text)


# ---- drain-per-cpu ----------------------------------------------------------------------------------------


def per_cpu_free_bytes() -> int:
    """Free pages in the per-CPU lists of every zone: in no counter of /proc/meminfo."""
    with open("/proc/zoneinfo") as file:  # noqa: PTH123
        pages = sum(int(line.split()[1]) for line in file if line.lstrip().startswith("count:"))
    return pages * os.sysconf("SC_PAGE_SIZE")


def drain_per_cpu() -> None:
    """Lower the lists' high mark and free a little on each CPU: a free above the mark trims the list in big steps."""
    import fcntl
    import json
    import signal
    import time

    def stop(signum: int, _frame: object) -> None:
        raise SystemExit(128 + signum)  # so that the `finally` below restores the old value

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    start = time.monotonic()
    with open(HIGH_FRACTION) as file:  # noqa: PTH123
        fcntl.flock(file, fcntl.LOCK_EX)  # two drains at once would restore each other's lowered value
        old = file.read().strip()
        before = per_cpu_free_bytes()
        try:
            _write(HIGH_FRACTION, "1000")
            rounds = _trim(before)
        finally:
            _write(HIGH_FRACTION, old)
        after = per_cpu_free_bytes()
    seconds = time.monotonic() - start
    result = {"before_bytes": before, "after_bytes": after, "rounds": rounds, "duration_s": round(seconds, 4)}
    print(json.dumps(result))  # noqa: T201


def _trim(left: int) -> int:
    """Rounds of freeing on every CPU until a round gains less than 1 MiB."""
    for done in range(1, DRAIN_ROUNDS + 1):
        for cpu in range(os.sysconf("SC_NPROCESSORS_CONF")):
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError:  # offline, or outside our cpuset
                continue
            _touch_and_free(DRAIN_BYTES)
        left, previous = per_cpu_free_bytes(), left
        if previous - left < 1 << 20:
            return done
    return DRAIN_ROUNDS


def _touch_and_free(size: int) -> None:
    import mmap

    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # huge pages pass the lists by
        memory.write(bytes(size))


# ---- memory cgroups ---------------------------------------------------------------------------------------


def memory_hierarchy() -> tuple[int, str]:
    """(version, mount point) of the cgroup hierarchy that has the memory controller, for this process."""
    with open("/proc/self/cgroup") as file:  # noqa: PTH123
        v1 = any("memory" in line.split(":", 2)[1].split(",") for line in file)
    return (1, f"{CGROUP}/memory") if v1 else (2, CGROUP)


def make_group(name: str, limit: str | None) -> None:
    """The group and, above it, that of all our groups. On v2 a controller is handed down by each group on the way."""
    version, top = memory_hierarchy()
    parent, folder = f"{top}/{GROUPS}", _folder(top, name)
    for _ in range(REPEATS):  # a removal may take the parent away in between
        os.makedirs(parent, exist_ok=True)  # noqa: PTH103
        try:
            if version == 2:
                for above in (top, parent):
                    _hand_down_memory(above)
            os.mkdir(folder)  # noqa: PTH102
            break
        except FileNotFoundError:
            continue
    else:
        raise Refused(f"{parent} goes away as soon as it is made")
    if limit is not None:
        try:
            _limit(version, folder, limit)
        except OSError:
            os.rmdir(folder)  # noqa: PTH106
            raise


def _hand_down_memory(folder: str) -> None:
    with open(f"{folder}/cgroup.controllers") as file:  # noqa: PTH123
        if "memory" not in file.read().split():
            raise Refused(f"no memory controller in {folder}/cgroup.controllers")
    _write(f"{folder}/cgroup.subtree_control", "+memory")


def _limit(version: int, folder: str, limit: str) -> None:
    """Without swap, as Docker limits when memory and memory-swap are the same."""
    if version == 1:
        names = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
    else:
        names = {"memory.max": limit, "memory.swap.max": "0"}
    for name, value in names.items():
        if name in {"memory.limit_in_bytes", "memory.max"} or os.path.exists(f"{folder}/{name}"):  # noqa: PTH110
            _write(f"{folder}/{name}", value)


def remove_group(name: str) -> None:
    """Kill what is left in it and remove it; and the group of all our groups with the last one."""
    import time

    _, top = memory_hierarchy()
    folder, reason = _folder(top, name), None
    for _ in range(REMOVAL_ROUNDS):
        _kill_all(folder)
        try:
            os.rmdir(folder)  # noqa: PTH106
            break
        except FileNotFoundError:
            break
        except OSError as error:  # a process that ends is still in it
            reason = error.strerror
            time.sleep(0.01)
    else:
        raise Refused(f"{folder} cannot be removed: {reason}")
    try:
        os.rmdir(f"{top}/{GROUPS}")  # noqa: PTH106
    except OSError:  # another group is in it
        return


def _kill_all(folder: str) -> None:
    import signal

    try:
        if os.path.exists(f"{folder}/cgroup.kill"):  # noqa: PTH110  v2, Linux 5.14: all at once, forks included
            _write(f"{folder}/cgroup.kill", "1")
            return
        with open(f"{folder}/cgroup.procs") as file:  # noqa: PTH123
            pids = [int(line) for line in file]
    except FileNotFoundError:
        return
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _folder(top: str, name: str) -> str:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise Refused(f"{name!r} is no name of a group: letters, digits and -_. only")
    return f"{top}/{GROUPS}/{name}"


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["drop-caches"]:
                drop_caches()
            case ["drain-per-cpu"]:
                drain_per_cpu()
            case ["make-group", name]:
                make_group(name, None)
            case ["make-group", name, limit] if limit.isdigit():
                make_group(name, limit)
            case ["remove-group", name]:
                remove_group(name)
            case _:
                raise Refused(
                    f"{' '.join(arguments)!r} is not one of: drop-caches, drain-per-cpu, make-group NAME [BYTES], "
                    "remove-group NAME"
                )
    except (Refused, OSError) as error:
        print(f"privileged: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
