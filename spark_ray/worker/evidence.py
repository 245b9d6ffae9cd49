"""What the worker reads about where it really is. A label on an arm is a claim; this is the evidence."""

from __future__ import annotations

import os
import re
import resource
import stat
import sys
from pathlib import Path
from typing import Any

NOT_RECORDED = "(not recorded)"
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "APIKEY", "API_KEY")
_BY_CHANCE = re.compile(r"[0-9a-f]{12}")  # a container's or namespace's number in a mount point
_PATH_OPTIONS = ("lowerdir", "upperdir", "workdir", "datadir")  # an overlay's folders, new ones each time
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def namespaces(pid: int | str = "self") -> dict[str, str]:
    """Identity of each namespace of a process, as `type:[inode]`. Inodes are recycled: compare only what lives."""
    found = {}
    for name in _NAMESPACES:
        try:
            found[name] = os.readlink(f"/proc/{pid}/ns/{name}")  # noqa: PTH115  not a path: `mnt:[4026531841]`
        except OSError:
            continue
    return found


def root_identity(path: str = "/") -> str:
    """Device and inode of a root directory, e.g. "254:0:2". Two processes with the same value see the same root."""
    status = os.stat(path)  # noqa: PTH116  also asked of /proc/PID/root/, where pathlib would drop the last slash
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}"


def _limits() -> dict[str, list[int]]:
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {name[7:].lower(): list(resource.getrlimit(getattr(resource, name))) for name in names}


def _status_fields() -> dict[str, str]:
    wanted = {"CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Cpus_allowed_list", "THP_enabled"}
    pairs = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: value.strip() for name, value in pairs if name in wanted}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _root_mount() -> dict[str, str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == "/":
            kind = fields[fields.index("-") + 1]
            return {"filesystem": kind, "options": fields[5]}
    return {"filesystem": "not a mount point (a chroot inside one)"}


def mounts() -> list[dict[str, str]]:
    """What is mounted where, as far as this root shows it, without what differs between any two mount namespaces.

    Left out: numbers and propagation of mounts, the folders behind an overlay, and mount points named after a container.
    """
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        target, options = before.split(" ")[4:6]
        kind, source, *more = after.split(" ")
        if _BY_CHANCE.search(target) or kind == "nsfs":
            continue
        kept = [each for each in ",".join([options, *more]).split(",") if not each.startswith(_PATH_OPTIONS)]
        if "ro" in kept:  # of the mount or of the filesystem: one is enough
            kept = [each for each in kept if each != "rw"]
        found.append(
            {"source": source, "target": target, "type": kind, "options": ",".join(dict.fromkeys(kept))}
        )
    return sorted(found, key=lambda mount: mount["target"])


def environment_variables() -> dict[str, str]:
    """The environment after any entrypoint; values whose names speak of secrets are not written down."""
    return {name: NOT_RECORDED if is_secret(name) else value for name, value in sorted(os.environ.items())}


def is_secret(name: str) -> bool:
    """Whether a variable's name speaks of a secret."""
    return any(word in name.upper() for word in _SECRET_WORDS)


def docker_sockets() -> list[str]:
    """Ways to a Docker daemon from here, each of which would make this process the host's root."""
    found = []
    for path in ("/run/docker.sock", "/var/run/docker.sock"):
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116  half the time of pathlib
                found.append(path)
        except OSError:
            continue
    return found + (["DOCKER_HOST"] if "DOCKER_HOST" in os.environ else [])


def libraries() -> list[str]:
    """Shared objects mapped into this process now, with their real paths as seen inside."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted(
        {line.split(maxsplit=5)[5] for line in maps if ".so" in line.rsplit("/", 1)[-1] and "/" in line}
    )


def gather() -> dict[str, Any]:
    """Everything that identifies the place, cheap enough for every trial (below 3 ms)."""
    system = os.uname()
    return {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "namespaces": namespaces(),
        "root": root_identity(),
        "root_mount": _root_mount(),
        "cgroup": (_read("/proc/self/cgroup") or "").splitlines(),
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "prefix": sys.prefix,
        "kernel": system.release,
        "machine": system.machine,
        "libc": os.confstr("CS_GNU_LIBC_VERSION"),
        "limits": _limits(),
        "status": _status_fields(),
        "environment": environment_variables(),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "overcommit_memory": _read("/proc/sys/vm/overcommit_memory"),
        "swappiness": _read("/proc/sys/vm/swappiness"),
        "shm_bytes": _shm_bytes(),
        "mounts": mounts(),
        "docker_sockets": docker_sockets(),
    }


def _shm_bytes() -> int | None:
    try:
        status = os.statvfs("/dev/shm")  # noqa: S108  its size is what is asked
    except OSError:
        return None
    return status.f_blocks * status.f_frsize
