"""A worker in a podman container, seen from the host. Podman is a program here: it has no daemon to ask.

`create`, then `init` (what the host refuses, it refuses there), then `start --attach`: that process has the worker's
standard streams, and what closes its input closes the worker's. Removal is ours and comes last, or nobody could say
whether the kernel killed it for memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import select
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment_spec import PodmanEnvironment
from .environments import Problem, Start, podman
from .guest import Ended, EnvironmentLostError, ProcessGuest, StartError, known_inside

INSTALL = "sudo apt-get install podman"
LABEL_PURPOSE = "spark_ray.purpose"
_LOW_LIMIT = 16384  # podman lowers its own nproc to twice that, and cannot give more than it has
_LAYERS = re.compile(
    r"^(\w+: )?(runc create failed: )?(unable to start container process: )?(error during container init: )?"
)
_LIMIT_S = 60  # a call takes a tenth of a second; under memory pressure far more
_TIDY_LIMIT_S = 10
_NO_PROGRAM = "/spark_ray-tries-the-flags"
_NOT_FOUND = "attempted to invoke a command that was not found"  # podman's words, whatever the runtime


def ask(*words: str, folder: Path | None = None) -> str:
    """What podman answers; StartError with its own words where it refuses. `folder`: where it is started."""
    try:
        done = subprocess.run(
            ["podman", *words], capture_output=True, text=True, timeout=_LIMIT_S, check=False, stdin=subprocess.DEVNULL,
            errors="replace", cwd=folder,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise StartError("the program podman is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentLostError(f"podman {words[0]} did not answer within {_LIMIT_S} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"podman {words[0]} ended with status {done.returncode}"]
        raise StartError(said[-1].removeprefix("Error: "))
    return done.stdout.strip()


class PodmanGuest:
    """A container with our labels; `podman start --attach` is its near end."""

    _first = 0
    _monitor: int | None = None

    def __init__(self, start: Start, log: Path) -> None:
        try:
            self.container_id = ask(*start.argv[1:])
        except EnvironmentLostError as error:
            raise StartError(str(error), refused=False) from error
        try:
            # conmon stays where it was started, and notes there that its container ran out of memory, in a file `oom`.
            ask("init", self.container_id, folder=log.parent)
            self._meet()
            near = ("podman", "start", "--attach", "--interactive", "--sig-proxy=false", self.container_id)
            variables = dict(os.environ)  # podman's, not the worker's
            self._near = ProcessGuest(dataclasses.replace(start, argv=near, variables=variables), log)
        except (StartError, EnvironmentLostError) as error:
            remove(self.container_id)
            self._forget_monitor()
            raise StartError(str(error), refused=isinstance(error, StartError)) from error
        self.control = self._near.control

    def _meet(self) -> None:
        """The container's first process, and the one that watches it: its end is the end of podman's own tidying up."""
        state = self._state()
        self._first = int(state["Pid"])
        with contextlib.suppress(OSError):  # it has ended, or an old kernel
            self._monitor = os.pidfd_open(int(state.get("ConmonPid", 0)))

    def _wait_for_monitor(self) -> None:
        """Until then a process of podman's would be in the next attempt's memory."""
        if self._monitor is not None:
            poll = select.poll()
            poll.register(self._monitor, select.POLLIN)
            poll.poll(_TIDY_LIMIT_S * 1000)
        self._forget_monitor()

    def _forget_monitor(self) -> None:
        if self._monitor is not None:
            os.close(self._monitor)
            self._monitor = None

    def read(self) -> bytes:
        return self._near.read()

    def answer(self) -> None:
        self._near.answer()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(ask("inspect", "--format={{json .State}}", self.container_id))
        return state

    def pid_of(self, told: int) -> int:
        """The worker only knows its number inside."""
        return known_inside(self._first, told)

    def identity(self) -> dict[str, Any]:
        return {"container_id": self.container_id}

    def kill(self) -> None:
        with contextlib.suppress(StartError, EnvironmentLostError):
            ask("kill", self.container_id)

    def end(self) -> Ended:
        """Status and OOMKilled, then removal."""
        self._near.end()  # ends when the container has; it is waited for, then killed
        details: dict[str, Any] = {"container_id": self.container_id}
        code: int | None = None
        try:
            state = self._state()
            if state["Running"]:
                self.kill()
                details["killed_by_host"] = True
                ask("wait", self.container_id)
            self._wait_for_monitor()
            state = self._state()
            if state["Status"] in {"exited", "stopped"}:
                code = int(state["ExitCode"])
            details |= {"oom_killed": bool(state["OOMKilled"]), "error": state.get("Error", "")}
        except (StartError, EnvironmentLostError) as error:
            details["inspect_error"] = str(error)
        remove(self.container_id)
        self._forget_monitor()
        return Ended(code, details)


# ---- before any trial -------------------------------------------------------------------------------------


def lacking() -> tuple[str, str] | None:
    """(why there is no podman for us here, the mend)."""
    if shutil.which("podman") is None:
        return "the program podman is not installed", INSTALL
    if os.geteuid() != 0:  # rootless podman adds a user namespace, and limits memory only on some hosts
        return "podman is used as root", "run as root"
    return None


def refused_flags(spec: PodmanEnvironment) -> list[Problem]:
    """What podman says to this environment here, in its own words, tried on a container that runs nothing."""
    words = _refusal(spec)
    if words is None:
        return []
    # Without CAP_SYS_RESOURCE no limit can be raised: podman's defaults are higher than what such a host has.
    may = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    ulimits = {
        name: min(resource.getrlimit(kind)[1], _LOW_LIMIT) for name, kind in may.items()
    } | spec.ulimits
    for runtime in dict.fromkeys((spec.runtime, "runc")):
        other = spec.model_copy(update={"runtime": runtime, "ulimits": ulimits})
        if _refusal(other) is None:
            keys = [f"runtime: {runtime}"] if runtime != spec.runtime else []
            limits = ", ".join(f"{name}: {limit}" for name, limit in ulimits.items())
            keys.append(f"ulimits: {{{limits}}}")
            return [Problem(f"podman refuses: {words}", f"add {' and '.join(keys)} to this environment")]
    return [Problem(f"podman refuses: {words}", "leave that out, or give podman what it lacks")]


def _refusal(spec: PodmanEnvironment) -> str | None:
    """A container is made as far as its program, which is not there: podman has granted the flags by then."""
    with tempfile.TemporaryDirectory(prefix="spark_ray-") as empty:
        made = None
        try:
            label = f"--label={LABEL_PURPOSE}=probe"
            made = ask("create", label, *podman.flags(spec), *podman.root_flags(empty), _NO_PROGRAM)
            ask("init", made)
        except (StartError, EnvironmentLostError) as error:
            return None if _NOT_FOUND in str(error) else _LAYERS.sub("", str(error))
        finally:
            if made is not None:
                remove(made)
    return None


# ---- what is left of earlier deaths -----------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    container_id: str
    labels: dict[str, str]
    status: str
    created_s: float  # since the epoch


def labelled(label: str) -> list[Listed]:
    """Containers that have this label, running or not; none where there is no podman for us."""
    if lacking() is not None:
        return []
    try:
        rows = json.loads(ask("ps", "--all", f"--filter=label={label}", "--format=json") or "[]")
    except (StartError, EnvironmentLostError):
        return []
    return [Listed(row["Id"], row["Labels"], row["State"], float(row["Created"])) for row in rows]


def remove(container_id: str) -> None:
    """Remove a container, running or not. That it is gone already is success."""
    with contextlib.suppress(StartError, EnvironmentLostError):
        ask("rm", "--force", "--time=0", container_id)
