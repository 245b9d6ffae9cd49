"""Separates a program from its host, or tries whether it could: standard library only, imports nothing of this package.

It is run as `python -I -S isolate.py VERB ...`, as root or with `sudo -n` in front. The verbs are

    enter SPEC.json    become the program of SPEC, separated from the host as SPEC says
    probe FOLDER       try each way of separating in a process of its own; prints why which one fails, as JSON

and nothing else: any other word ends with status 2 and one line on standard error.

SPEC holds `argv`, `env` and `root`, and may hold the rest. No key implies another.

    root         folder to change root into; in it /proc, /sys (read-only) and /dev are the host's. null: the host's root
    overlay      put a fresh writable layer, held in memory, over that folder (default false)
    read_only    the root itself (default true: a guest must not change content that is named by its hash)
    mounts       [{"source", "target", "read_only"}]. A source of null is a fresh tmpfs: the points of mounts below it
                 are made in it, and `read_only` closes it after them
    tmp          a fresh tmpfs on /tmp (default false)
    group        the memory cgroup to join, made by `privileged.py make-group`
    namespaces   which of pid, ipc, uts, net, cgroup are its own, each with what shows it: pid a fresh /proc; ipc a fresh
                 /dev/shm (64 MiB, as Docker's) and /dev/mqueue; net a loopback that is up; cgroup its own group as
                 the top of the memory hierarchy. The mount namespace always is
    cwd, uid, gid

The order is that of container runtimes: group, namespaces, root, mounts, user, program. Every mount ends with the last
process of the namespace, however it dies. Without a pid namespace nothing is forked and the process id stays. With
one, this process stays outside of group and namespaces, hands signals on, and ends as the program does (128 + n after
signal n); when it dies, so does the program, and with that everything in the namespace.
"""

from __future__ import annotations

import os
import select  # here, as after chroot the standard library may be out of reach
import signal
import sys

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
CLONE = {"cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "pid": 0x20000000, "net": 0x40000000}
ATTR_READ_ONLY, ATTR_NOSUID, CLONE_NEWNS, PR_SET_PDEATHSIG = 1, 2, 0x20000, 1
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the same number on every architecture; Linux 5.12
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
SHM_BYTES = 64 << 20  # Docker's default, so that the step to docker does not change it
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Refused(Exception):
    """Said in one line on standard error, with status 2."""


# ---- enter ------------------------------------------------------------------------------------------------


def enter(spec_path: str) -> None:
    import warnings  # noqa: F401  execvpe wants it, and after chroot the standard library may be out of reach

    for signum in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and exec would hand that on
        signal.signal(signum, signal.SIG_DFL)
    spec = _read_spec(spec_path)
    root = os.path.realpath(spec["root"]) if spec["root"] is not None else ""
    mounts = _mounts(spec)
    for number, mount in enumerate(mounts):
        _check(root, mount, mounts[:number])
    system = _System()
    waiting = _separate(system, spec["namespaces"], spec["group"])
    if spec["overlay"]:
        system.overlay(root)
    elif root:
        system.bind(root, root, ATTR_NOSUID | (ATTR_READ_ONLY if spec["read_only"] else 0))
    for mount in mounts:
        _mount(system, root, mount)
    for mount in mounts:
        if mount["source"] is None and mount["read_only"]:  # only now: it held the points of other mounts
            system.set_attributes(root + mount["target"], ATTR_READ_ONLY | ATTR_NOSUID)
    _show(system, root, spec["namespaces"])
    if root:
        os.chroot(root)
    os.chdir(spec["cwd"])
    _become(spec["uid"], spec["gid"])
    if waiting is not None:
        _follow(system, waiting)
    try:
        os.execvpe(spec["argv"][0], spec["argv"], spec["env"])  # noqa: S606
    except OSError as error:
        raise Refused(f"cannot execute {spec['argv'][0]} in the new root: {error.strerror}") from None


def _read_spec(path: str) -> dict:  # type: ignore[type-arg]
    import json

    needed = {"root", "argv", "env"}
    defaults: dict[str, object] = {
        "overlay": False, "read_only": True, "mounts": [], "tmp": False, "group": None, "namespaces": [], "cwd": "/",
        "uid": None, "gid": None,
    }  # fmt: skip
    try:
        with open(path) as file:  # noqa: PTH123 (importing pathlib would double the start-up time)
            spec = json.load(file)
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read the spec {path}: {error}") from None
    if not isinstance(spec, dict) or not needed <= spec.keys() <= needed | defaults.keys():
        names = [", ".join(sorted(each)) for each in (needed, defaults)]
        raise Refused(f"{path} must hold {names[0]} and may hold {names[1]}")
    spec = {**defaults, **spec}
    root = spec["root"]
    if root is None and (spec["mounts"] or spec["tmp"] or spec["overlay"]):
        raise Refused("mounts, tmp and overlay need a root of their own")
    if root is not None and (not os.path.isdir(root) or os.path.realpath(root) == "/"):  # noqa: PTH112
        raise Refused(f"the root {root} is not a folder to change root into")
    if unknown := sorted(set(spec["namespaces"]) - CLONE.keys()):
        raise Refused(f"{unknown[0]} is not one of the namespaces {', '.join(sorted(CLONE))}")
    return spec


def _mounts(spec: dict) -> list:  # type: ignore[type-arg]
    """What is mounted, parents before what lies in them."""
    if spec["root"] is None:
        return []
    tmp = [{"source": None, "target": "/tmp", "read_only": False}] if spec["tmp"] else []  # noqa: S108
    proc = [{"source": "/proc", "target": "/proc", "read_only": False}]
    return [
        *tmp,
        {"source": "/dev", "target": "/dev", "read_only": False},
        *([] if "pid" in spec["namespaces"] else proc),
        {"source": "/sys", "target": "/sys", "read_only": True},
        *sorted(spec["mounts"], key=lambda mount: mount["target"]),
    ]


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
        system.mount("tmpfs", point, "mode=1777")
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


# ---- group and namespaces ---------------------------------------------------------------------------------


def _separate(system: _System, namespaces: list[str], group: str | None) -> select.poll | None:
    """Join the group and leave the host's namespaces, but for that of cgroups: see `_show`.

    With a pid namespace only its first process returns: with a poll object that says whether the one that waits is dead.
    """
    waiting = None
    if "pid" in namespaces:
        system.unshare("pid")  # takes effect for children: this process stays where it is
        waiting = _fork(system)
    if group is not None:
        top, _ = _memory_cgroup()
        with open(f"{top}/spark_ray/{group}/cgroup.procs", "w") as file:  # noqa: PTH123
            file.write("0")  # this process
    for kind in namespaces:
        if kind not in {"pid", "cgroup"}:
            system.unshare(kind)
    system.own_mounts()
    return waiting


def _fork(system: _System) -> select.poll:
    """Go on as the first process of the new pid namespace. The present one waits, and ends as that one does."""
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        os.read(alive, 1)  # not before the other hands signals on: one that comes now would end it instead
        poll = select.poll()
        poll.register(alive, 0)
        return poll
    system.die_with_parent()
    for channel in (0, 1):  # they are the guest's alone: the host must see them close
        os.dup2(os.open("/dev/null", os.O_RDWR), channel)
    handle = os.pidfd_open(child)  # a recycled number is not mistaken for it

    def pass_on(signum: int, _frame: object) -> None:
        try:
            signal.pidfd_send_signal(handle, signum)
        except ProcessLookupError:
            return

    for signum in PASSED_ON:
        signal.signal(signum, pass_on)
    os.write(held, b".")
    _, status = os.waitpid(child, 0)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _follow(system: _System, waiting: select.poll) -> None:
    """Die with the process that waits; it may be dead by now. After the change of user, which would undo this."""
    system.die_with_parent()
    if waiting.poll(0):
        os._exit(128 + signal.SIGKILL)


def _memory_cgroup() -> tuple[str, str]:
    """(mount point of the hierarchy that has the memory controller, folder of this process's own group in it)."""
    top, own = "/sys/fs/cgroup", "/"
    with open("/proc/self/cgroup") as file:  # noqa: PTH123
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if "memory" in controllers.split(","):  # cgroup v1: a mount for each controller
                return f"{top}/memory", f"{top}/memory{path}"
            if not controllers:
                own = path
    return top, top + own


def _show(system: _System, root: str, namespaces: list[str]) -> None:
    """Make anew what shows each namespace in the file system, as a container's is made."""
    if "cgroup" in namespaces:
        top, own = _memory_cgroup()
        system.unshare("cgroup")  # last, as its top is where this process is by now
        if os.path.isdir(own):  # noqa: PTH112
            system.bind(own, root + top, ATTR_NOSUID | ATTR_READ_ONLY)
    if "pid" in namespaces:
        system.mount("proc", root + "/proc")
    if "ipc" in namespaces:
        system.mount("tmpfs", root + "/dev/shm", f"mode=1777,size={SHM_BYTES}")  # noqa: S108
        if os.path.isdir(root + "/dev/mqueue"):  # noqa: PTH112
            system.mount("mqueue", root + "/dev/mqueue")
    if "net" in namespaces:
        _loopback_up()


def _loopback_up() -> None:
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = struct.pack("16sh14x", b"lo", 0)  # struct ifreq
        flags = struct.unpack("16sh14x", fcntl.ioctl(asked, SIOCGIFFLAGS, request)[:32])[1]
        fcntl.ioctl(asked, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


# ---- probe ------------------------------------------------------------------------------------------------


def probe(folder: str) -> None:
    """Each way in a child that ends at once, so that nothing of it lasts. `folder` lies where the rootfs will."""
    import json

    tried = {name: _tried(name, folder) for name in ("mount", "overlay", *CLONE)}
    print(json.dumps({name: reason for name, reason in tried.items() if reason}))  # noqa: T201


def _tried(name: str, folder: str) -> str:
    """Why it does not work; empty when it does."""
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        reason = ""
        try:
            _try(name, folder)
        except BaseException as error:  # noqa: BLE001  whatever it is: it does not work
            reason = str(error) or type(error).__name__
        os.write(said, reason.encode())
        os._exit(0)
    os.close(said)
    with open(heard, "rb") as stream:  # noqa: PTH123
        reason = stream.read().decode()
    os.waitpid(child, 0)
    return reason


def _try(name: str, folder: str) -> None:
    if os.path.realpath(folder) == "/":
        raise Refused("the folder to try it on must not be /")
    system, namespaces = _System(), [name] if name in CLONE else []
    _separate(system, namespaces, None)
    if name == "overlay":
        system.overlay(folder)
    elif name == "mount":
        system.bind(folder, folder, ATTR_NOSUID | ATTR_READ_ONLY)
    _show(system, "", namespaces)


# ---- the kernel -------------------------------------------------------------------------------------------


class _System:
    """Calls of the C library; `os` has none of them before Python 3.12, and those of mounts in no version."""

    def __init__(self) -> None:
        import ctypes

        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)

    def _call(self, what: str, result: int) -> None:
        if result != 0:
            raise Refused(f"{what}: {os.strerror(self._ctypes.get_errno())}")

    def die_with_parent(self) -> None:
        self._call("die with the parent", self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))

    def unshare(self, kind: str) -> None:
        self._call(f"a {kind} namespace of its own", self._libc.unshare(CLONE[kind]))

    def own_mounts(self) -> None:
        self._call("a mount namespace of its own", self._libc.unshare(CLONE_NEWNS))
        result = self._libc.mount(None, b"/", None, self._flags(MS_REC | MS_PRIVATE), None)
        self._call("keep mounts private", result)

    def mount(self, kind: str, point: str, options: str = "") -> None:
        """A file system without a device."""
        flags = self._flags(MS_NOSUID | MS_NODEV | (0 if kind in {"tmpfs", "overlay"} else MS_NOEXEC))
        name = kind.encode()
        result = self._libc.mount(name, os.fsencode(point), name, flags, os.fsencode(options))
        self._call(f"mount {kind} at {point}", result)

    def overlay(self, root: str) -> None:
        """A writable layer over `root`, at the same place. Layer and mount points need no name on the host."""
        lower = os.open(root, os.O_PATH | os.O_DIRECTORY)  # it stays reachable when it is covered
        status = os.fstat(lower)
        self.mount("tmpfs", root)
        os.chdir(root)
        os.mkdir("work")  # noqa: PTH102
        os.mkdir("upper")  # noqa: PTH102
        os.chmod("upper", status.st_mode & 0o7777)  # noqa: PTH101  a layer's folder is the root that is seen
        os.chown("upper", status.st_uid, status.st_gid)
        self.mount("overlay", root, f"lowerdir=/proc/self/fd/{lower},upperdir=upper,workdir=work")
        os.chdir("/")
        os.close(lower)

    def bind(self, source: str, point: str, attributes: int) -> None:
        flags = self._flags(MS_BIND | MS_REC)
        result = self._libc.mount(os.fsencode(source), os.fsencode(point), None, flags, None)
        self._call(f"mount {source} at {point}", result)
        self.set_attributes(point, attributes)

    def set_attributes(self, point: str, attributes: int) -> None:
        """Applies to what is mounted below as well, which a remount would leave writable."""
        wanted, long = (self._ctypes.c_uint64 * 4)(attributes, 0, 0, 0), self._ctypes.c_long
        place, new, size = os.fsencode(point), self._ctypes.byref(wanted), self._ctypes.sizeof(wanted)
        result = self._libc.syscall(
            long(MOUNT_SETATTR), long(AT_FDCWD), place, long(AT_RECURSIVE), new, long(size)
        )
        self._call(f"set mount attributes of {point}", result)

    def _flags(self, value: int) -> object:
        return self._ctypes.c_ulong(value)


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["enter", spec]:
                enter(spec)
            case ["probe", folder]:
                probe(folder)
            case _:
                raise Refused(f"{' '.join(arguments)!r} is not one of: enter SPEC.json, probe FOLDER")
    except (Refused, OSError) as error:
        print(f"isolate: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
