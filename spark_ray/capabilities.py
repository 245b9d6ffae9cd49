"""Why a Docker daemon refuses container settings, and a kernel a way of separating: Linux capabilities they need and the machine does not have to give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
    "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE",
    "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
    "PERFMON", "BPF", "CHECKPOINT_RESTORE",
)  # fmt: skip
"""In the kernel's order: the place is the bit (include/uapi/linux/capability.h)."""
_LAYERS = re.compile(
    r"^(failed to create (shim )?task(?: for container)?: )?(OCI runtime create failed: )?(runc create failed: )?"
    r"(unable to start container process: )?(error during container init: )?"
)
_PID_FILE = Path("/var/run/docker.pid")
_PROC = Path("/proc")


def bounding_set(proc: Path = _PROC, pid_file: Path = _PID_FILE) -> int:
    """What the Docker daemon of this machine may ever have, as bits; where it cannot be seen, what we may."""
    of_daemon = _bounds_of(_daemon(pid_file), proc)
    return own_bounding_set(proc) if of_daemon is None else of_daemon


def own_bounding_set(proc: Path = _PROC) -> int:
    """What this process, and root acts started by it, may ever have; everything where it cannot be seen."""
    bounds = _bounds_of("self", proc)
    return (1 << len(NAMES)) - 1 if bounds is None else bounds


def _bounds_of(process: str, proc: Path) -> int | None:
    try:
        for line in (proc / process / "status").read_text().splitlines():
            if line.startswith("CapBnd:"):
                return int(line.split()[1], 16)
    except (OSError, ValueError):
        return None
    return None


def _daemon(pid_file: Path) -> str:
    try:
        return pid_file.read_text().strip()
    except OSError:
        return "none"


def last(proc: Path = _PROC) -> int:
    """The number of the highest capability that this kernel knows."""
    try:
        return int((proc / "sys/kernel/cap_last_cap").read_text())
    except (OSError, ValueError):
        return len(NAMES) - 1


def needed(settings: Mapping[str, Any]) -> list[str]:
    """Capabilities that a daemon must have itself to grant these container settings."""
    known = list(NAMES[: last() + 1])
    added = [str(name).upper().removeprefix("CAP_") for name in settings.get("cap_add") or ()]
    if settings.get("privileged") or "ALL" in added:
        return known
    raised = ["SYS_RESOURCE"] if settings.get("ulimits") else []  # to raise a hard limit
    return [name for name in known if name in {*added, *raised}]


def lacking(settings: Mapping[str, Any], bounds: int | None = None) -> list[str]:
    """Those of `needed` that are not in the bounding set, by their full names."""
    bounds = bounding_set() if bounds is None else bounds
    return [f"CAP_{name}" for name in needed(settings) if not bounds >> NAMES.index(name) & 1]


def explain(refusal: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """(the daemon's words without the layers they came through, and the capability it lacks; the mend)."""
    words = _LAYERS.sub("", refusal).removesuffix(": unknown")
    names = ", ".join(lacking(settings))
    if not names:
        return words, "leave that out, or give the daemon what it lacks"
    return f"{words} (it lacks {names})", f"leave that out, or give {names} to what the daemon runs in"


_OF_ISOLATION = {
    "net": ["SYS_ADMIN", "NET_ADMIN"],  # the second one to set its loopback up
    "overlay": ["SYS_ADMIN", "MKNOD"],
    "memory": ["DAC_OVERRIDE"],
}


def explain_isolation(way: str, reason: str, bounds: int | None = None) -> str:
    """What `isolate.py` or `privileged.py` said, and the capability that is missing, or what else forbids it."""
    words = reason.rpartition("isolate: ")[2].rpartition("privileged: ")[2]
    bounds = own_bounding_set() if bounds is None else bounds
    needed = _OF_ISOLATION.get(way, ["SYS_ADMIN"])
    names = ", ".join(f"CAP_{name}" for name in needed if not bounds >> NAMES.index(name) & 1)
    if names:
        return f"{words} (it lacks {names})"
    if "Operation not permitted" in words or "Permission denied" in words:
        return f"{words} (no capability is missing: a security module or a seccomp filter forbids it)"
    return words
