"""The host's side of `privileged.py`: whether root acts are possible here, and how one is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .errors import UnavailableError

SCRIPT = Path(__file__).with_name("privileged.py")
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

    def argv(self, verb: str, *args: str) -> list[str]:
        """The command of one act. Through sudo the act is a child of the process started, not the process itself."""
        possible, reason = self.available()
        if not possible or self._prefix is None:
            raise UnavailableError(f"{verb} needs root: {reason}", mend=MEND)
        return [*self._prefix, sys.executable, "-I", "-S", str(SCRIPT), verb, *args]

    def run(self, verb: str, *args: str, timeout_s: float = 60) -> str:
        """Do one act and return what it printed."""
        command = self.argv(verb, *args)
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
            raise UnavailableError(f"{verb} did not end within {timeout_s:g} s", mend=MEND) from None
        if done.returncode != 0:
            raise UnavailableError(
                f"{verb} failed: {done.stderr.strip() or f'exit {done.returncode}'}", mend=MEND
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
