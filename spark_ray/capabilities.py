"""Why a Docker daemon refuses container settings: Linux capabilities they need and the machine does not have to give."""

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
    for process in (_daemon(pid_file), "self"):
        try:
            for line in (proc / process / "status").read_text().splitlines():
                if line.startswith("CapBnd:"):
                    return int(line.split()[1], 16)
        except (OSError, ValueError):
            continue
    return (1 << len(NAMES)) - 1


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
