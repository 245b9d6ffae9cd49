"""What earlier deaths left behind, found by label and folder, and removed: only that, and only of runs nobody drives.

A guest ends with its host side by itself. What can remain is a stopped container, a guest that was itself stopped
(SIGSTOP) when its host died, and the file that held a page-cache fill.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import image
from .environments import RUN_VARIABLE
from .environments.docker import LABEL_RUN, LABEL_TRIAL


@dataclass(frozen=True)
class Leftover:
    kind: str  # container, process, fill file
    name: str  # container id, process number, path
    run: str  # the run folder it belongs to
    what: str  # for people


def is_driven(run: str) -> bool:
    """Whether a live driver holds the folder's lock."""
    try:
        with (Path(run) / "run.lock").open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def leftovers(run: Path | None, docker_client: Any | None, *, driver: bool = False) -> list[Leftover]:
    """Everything of `run` (or of any run) that should not be there; nothing of a run that is being driven.

    `driver`: the caller is the one that drives `run`, and has not started anything yet.
    """
    found = [*_processes(), *_containers(docker_client)]
    wanted = str(run.absolute()) if run is not None else None
    if run is not None:
        fills = sorted(run.absolute().glob("scratch/*/page-cache-fill-*"))
        found += [Leftover("fill file", str(path), str(run.absolute()), "held page cache") for path in fills]
    driven: dict[str, bool] = {wanted: False} if wanted and driver else {}
    return [
        one
        for one in found
        if (wanted is None or one.run == wanted) and not driven.setdefault(one.run, is_driven(one.run))
    ]


def _processes() -> Iterator[Leftover]:
    mark = f"{RUN_VARIABLE}=".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        run = next((v[len(mark) :].decode(errors="replace") for v in variables if v.startswith(mark)), None)
        if run is not None and not _in_container(entry):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            yield Leftover("process", entry.name, run, command)


def _in_container(entry: Path) -> bool:
    """A containerised guest goes with its container; killing it from here would hide how it ended."""
    try:
        return os.readlink(entry / "ns" / "pid") != os.readlink("/proc/self/ns/pid")  # noqa: PTH115  not a path
    except OSError:
        return True


def _containers(client: Any | None) -> Iterator[Leftover]:
    if client is None:
        return
    for container in client.api.containers(all=True, filters={"label": LABEL_RUN}):
        labels = container["Labels"]
        yield Leftover(
            "container",
            container["Id"],
            labels[LABEL_RUN],
            f"{labels.get(LABEL_TRIAL, '')} {container['Status']}",
        )


def remove(one: Leftover, docker_client: Any | None) -> None:
    """Remove one leftover. That it is gone already is success."""
    match one.kind:
        case "process":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(one.name), signal.SIGKILL)
        case "container":
            image.remove_container(docker_client, one.name)
        case _:
            Path(one.name).unlink(missing_ok=True)
