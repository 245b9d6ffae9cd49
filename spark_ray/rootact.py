"""The host's side of the root acts, `privileged.py` and `isolate.py`: whether they are possible here, and how one is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import capabilities
from .errors import UnavailableError

SCRIPT = Path(__file__).with_name("privileged.py")
ISOLATE = Path(__file__).with_name("isolate.py")
MEND = "run as root, or let this user run sudo without a password"


class RootActs:
    """Root acts as root or through `sudo -n`, which never asks."""

    def __init__(self) -> None:
        self._prefix: tuple[str, ...] | None = () if os.geteuid() == 0 else None

    def available(self) -> tuple[bool, str]:
        """Whether root acts work here, and why (not)."""
        if self._prefix is None and (reason := _sudo_problem()):
            return False, reason
        if self._prefix is None:
            self._prefix = ("sudo", "-n", "--")
        return True, "through sudo" if self._prefix else "this is root"

    def prefix(self, what: str = "a root act") -> tuple[str, ...]:
        """What stands in front of every act. Through sudo the act is a child of the process started, not the process itself."""
        possible, reason = self.available()
        if not possible or self._prefix is None:
            raise UnavailableError(f"{what} needs root: {reason}", mend=MEND)
        return (*self._prefix, sys.executable, "-I", "-S")

    def argv(self, verb: str, *args: str) -> list[str]:
        """The command of one act."""
        return act(self.prefix(verb), verb, *args)

    def run(self, verb: str, *args: str, timeout_s: float = 60) -> str:
        """Do one act and return what it printed."""
        return run(self.argv(verb, *args), verb, timeout_s)

    def isolation(self, folder: Path) -> dict[str, str]:
        """Ways of separating a worker that do not work here, with the reason; each tried for real, and nothing lasts.

        `folder` lies where the rootfs will. Ways: mount, overlay, each kind of namespace, and memory (a cgroup).
        """
        failed: dict[str, str] = json.loads(self.run("probe", str(folder)))
        name = f"probe-{os.getpid()}"
        try:
            self.run("make-group", name, str(64 << 20))
        except UnavailableError as error:
            failed["memory"] = error.message
        else:
            self.run("remove-group", name)
        return {way: capabilities.explain_isolation(way, reason) for way, reason in failed.items()}


def act(prefix: Sequence[str], verb: str, *args: str) -> list[str]:
    """The command of one act, given what stands in front of every one."""
    return [*prefix, str(ISOLATE if verb in {"enter", "probe"} else SCRIPT), verb, *args]


def run(command: Sequence[str], what: str, timeout_s: float = 60) -> str:
    """Do one act and return what it printed; UnavailableError with its own words when it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{what} did not end within {timeout_s:g} s", mend=MEND) from None
    if done.returncode != 0:
        raise UnavailableError(
            f"{what} failed: {done.stderr.strip() or f'exit {done.returncode}'}", mend=MEND
        )
    return done.stdout


def _sudo_problem() -> str:
    if shutil.which("sudo") is None:
        return "this is not root and there is no sudo"
    try:
        done = subprocess.run(
            ["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return "sudo does not answer"
    return "" if done.returncode == 0 else "sudo asks for a password"
