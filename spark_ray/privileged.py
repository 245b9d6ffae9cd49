"""The few acts that need root, in one small script: standard library only, imports nothing of this package.

It is run as `python -I -S privileged.py VERB ...`, as root or with `sudo -n` in front. The verbs are

    drop-caches        sync, then drop the page cache, dentries and inodes
    drain-per-cpu      give the free pages that wait in per-CPU lists back to MemFree; prints before and after
    enter SPEC.json    become the program of SPEC in a private mount namespace, chrooted into its root

and nothing else: any other word ends with status 2 and one line on standard error.

SPEC is `{"root", "mounts": [{"source", "target", "read_only"}], "argv", "env", "cwd", "uid", "gid", "tmp", "read_only"}`.
A mount whose source is null is a fresh tmpfs; the points of mounts below it are made in it, and `read_only` closes it
after them. `mounts`, `cwd`, `uid`, `gid`, `tmp` (a fresh tmpfs on /tmp, default false) and `read_only` (the root itself, default
true: a guest must not change content that is named by its hash) may be left out. /proc, /sys (read-only) and /dev are
the host's. `enter` forks nothing: the process id stays, and every mount ends with the last process of the namespace,
however it dies.
"""

from __future__ import annotations

import os
import sys

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
CLONE_NEWNS = 0x20000
ATTR_READ_ONLY, ATTR_NOSUID = 1, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the same number on every architecture; Linux 5.12

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


# ---- enter ------------------------------------------------------------------------------------------------


def enter(spec_path: str) -> None:
    import signal
    import warnings  # noqa: F401  execvpe wants it, and after chroot the standard library may be out of reach

    for signum in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and exec would hand that on
        signal.signal(signum, signal.SIG_DFL)
    spec = _read_spec(spec_path)
    root = os.path.realpath(spec["root"])
    mounts = [
        {"source": "/dev", "target": "/dev", "read_only": False},
        {"source": "/proc", "target": "/proc", "read_only": False},
        {"source": "/sys", "target": "/sys", "read_only": True},
        *sorted(spec["mounts"], key=lambda mount: mount["target"]),  # parents before what lies in them
    ]
    if spec["tmp"]:
        mounts.insert(0, {"source": None, "target": "/tmp", "read_only": False})  # noqa: S108
    for number, mount in enumerate(mounts):
        _check(root, mount, mounts[:number])
    system = _System()
    system.own_namespace()
    system.bind(root, root, ATTR_NOSUID | (ATTR_READ_ONLY if spec["read_only"] else 0))
    for mount in mounts:
        _mount(system, root, mount)
    for mount in mounts:
        if mount["source"] is None and mount["read_only"]:  # only now: it held the points of other mounts
            system.set_attributes(root + mount["target"], ATTR_READ_ONLY | ATTR_NOSUID)
    os.chroot(root)
    os.chdir(spec["cwd"])
    _become(spec["uid"], spec["gid"])
    _execute(spec["argv"], spec["env"])


def _read_spec(path: str) -> dict:  # type: ignore[type-arg]
    import json

    needed = {"root", "argv", "env"}
    defaults: dict[str, object] = {
        "mounts": [],
        "cwd": "/",
        "uid": None,
        "gid": None,
        "tmp": False,
        "read_only": True,
    }
    try:
        with open(path) as file:  # noqa: PTH123
            spec = json.load(file)
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read the spec {path}: {error}") from None
    if not isinstance(spec, dict) or not needed <= spec.keys() <= needed | defaults.keys():
        raise Refused(
            f"{path} must hold {', '.join(sorted(needed))} and may hold {', '.join(sorted(defaults))}"
        )
    if not os.path.isdir(spec["root"]) or os.path.realpath(spec["root"]) == "/":  # noqa: PTH112
        raise Refused(f"the root {spec['root']} is not a folder to change root into")
    return {**defaults, **spec}


def _check(root: str, mount: dict, earlier: list) -> None:  # type: ignore[type-arg]
    """Refuse a mount that cannot work, before any effect."""
    source, target = mount["source"], mount["target"]
    if not target.startswith("/") or os.path.normpath(target) != target:
        raise Refused(f"the mount point {target} is not a plain absolute path")
    if source is not None and not os.path.exists(source):  # noqa: PTH110
        raise Refused(f"{source}, to be mounted at {target}, does not exist")
    point = root + target
    for under in earlier:  # a mount point inside another mount lies in that mount's source
        if target.startswith(under["target"] + "/"):
            if under["source"] is None:
                return  # made in our own fresh tmpfs
            point = under["source"] + target[len(under["target"]) :]
    if point == root + target and os.path.realpath(point) != point:
        raise Refused(f"the mount point {target} in {root} goes through a symbolic link")
    if not os.path.exists(point):  # noqa: PTH110
        raise Refused(f"the mount point {target} is missing in {root}")
    if source is not None and os.path.isdir(source) != os.path.isdir(point):  # noqa: PTH112
        raise Refused(f"{source} and the mount point {target} in {root} are not both folders or both files")


def _mount(system: _System, root: str, mount: dict) -> None:  # type: ignore[type-arg]
    source, point = mount["source"], root + mount["target"]
    if source is None:
        system.tmpfs(point)
        return
    if not os.path.exists(point):  # noqa: PTH110
        _make_point(point, os.path.isdir(source))  # noqa: PTH112
    system.bind(source, point, ATTR_NOSUID | (ATTR_READ_ONLY if mount["read_only"] else 0))


def _make_point(point: str, folder: bool) -> None:
    os.makedirs(point if folder else os.path.dirname(point), exist_ok=True)  # noqa: PTH103, PTH120
    if not folder:
        os.close(os.open(point, os.O_CREAT | os.O_WRONLY, 0o644))


def _become(uid: int | None, gid: int | None) -> None:
    if gid is not None:
        os.setgroups([gid])
        os.setgid(gid)
    if uid is not None:
        if gid is None:
            os.setgroups([])
        os.setuid(uid)


def _execute(argv: list[str], env: dict[str, str]) -> None:
    try:
        os.execvpe(argv[0], argv, env)  # noqa: S606
    except OSError as error:
        raise Refused(f"cannot execute {argv[0]} in the new root: {error.strerror}") from None


class _System:
    """The mount calls of the C library; `os` has none of them before Python 3.12."""

    def __init__(self) -> None:
        import ctypes

        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)

    def _call(self, what: str, result: int) -> None:
        if result != 0:
            raise Refused(f"{what}: {os.strerror(self._ctypes.get_errno())}")

    def own_namespace(self) -> None:
        self._call("a mount namespace of its own", self._libc.unshare(CLONE_NEWNS))
        self._call(
            "keep mounts private", self._libc.mount(None, b"/", None, self._flags(MS_REC | MS_PRIVATE), None)
        )

    def tmpfs(self, point: str) -> None:
        flags = self._flags(MS_NOSUID | MS_NODEV)
        result = self._libc.mount(b"tmpfs", os.fsencode(point), b"tmpfs", flags, b"mode=1777")
        self._call(f"mount a tmpfs at {point}", result)

    def bind(self, source: str, point: str, attributes: int) -> None:
        result = self._libc.mount(
            os.fsencode(source), os.fsencode(point), None, self._flags(MS_BIND | MS_REC), None
        )
        self._call(f"mount {source} at {point}", result)
        self.set_attributes(point, attributes)

    def set_attributes(self, point: str, attributes: int) -> None:
        """Applies to what is mounted below as well, which a remount would leave writable."""
        wanted = (self._ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
        number, here, recursive, size = (
            self._ctypes.c_long(value)
            for value in (MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, self._ctypes.sizeof(wanted))
        )
        result = self._libc.syscall(
            number, here, os.fsencode(point), recursive, self._ctypes.byref(wanted), size
        )
        self._call(f"set mount attributes of {point}", result)

    def _flags(self, value: int) -> object:
        return self._ctypes.c_ulong(value)


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["drop-caches"]:
            drop_caches()
        elif arguments == ["drain-per-cpu"]:
            drain_per_cpu()
        elif len(arguments) == 2 and arguments[0] == "enter":
            enter(arguments[1])
        else:
            raise Refused(
                f"{' '.join(arguments)!r} is not one of: drop-caches, drain-per-cpu, enter SPEC.json"
            )
    except (Refused, OSError) as error:
        print(f"privileged: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
