"""What earlier deaths left behind, found by label and folder, and removed: only that, and only of runs nobody drives.

A guest ends with its host side by itself. What can remain is a stopped container, a guest that was itself stopped
(SIGSTOP) when its host died, the memory cgroup of an isolated guest, the file that held a page-cache fill, compiled
kernels, a container that only tried flags, and a half-made tree or model in the cache. A process may also be the
ballast of a treatment. No mount remains: they live in the namespace of the process that made them. Docker removes a
container's group with it (a `cgroup_parent` was named by the user, and is the user's).

`stale` is another matter: trees and images that work, but were made from an environment that is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import group, guest_podman, image, rootfs
from .environments import RUN_VARIABLE
from .environments.docker import LABEL_RUN, LABEL_TRIAL
from .errors import SparkRayError, UnavailableError
from .rootact import RootActs

LABEL_PURPOSE = "spark_ray.purpose"
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_SELF = Path("/proc/self")
PROBE_AGE_S = 600  # a container that tries flags lives for seconds
EXTRACT_AGE_S = 24 * 3600  # one that is being unpacked lives as long as its image is large


@dataclass(frozen=True)
class Leftover:
    kind: (
        str  # container, podman container, process, cgroup, fill file, compile cache, unfinished, tree, image
    )
    name: str  # container id, process number, path, image reference
    run: str  # the run folder it belongs to; "" for what belongs to none
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
    """Everything of `run` (or of any run: of files, those below ./runs) that should not be there; nothing of a run that is being driven.

    `driver`: the caller is the one that drives `run`, and has not started anything yet.
    """
    found = [*_processes(), *_containers(docker_client), *_podman_containers()]
    wanted = str(run.absolute()) if run is not None else None
    here = Path("runs").absolute()
    runs = (
        [run.absolute()]
        if run is not None
        else [path.parent for depth in ("*", "*/*") for path in sorted(here.glob(f"{depth}/plan.json"))]
    )
    for folder in runs:
        fills = sorted(folder.glob("scratch/*/page-cache-fill-*"))
        found += [Leftover("fill file", str(path), str(folder), "held page cache") for path in fills]
        caches = [path for path in sorted(folder.glob("scratch/*/compile-cache")) if _holds_files(path)]
        found += [Leftover("compile cache", str(path), str(folder), "compiled kernels") for path in caches]
    if run is not None:
        found += _groups(run)  # after the processes, which may be in them
    driven: dict[str, bool] = {wanted: False} if wanted and driver else {}
    return [
        one
        for one in found
        if (wanted is None or one.run == wanted) and not driven.setdefault(one.run, is_driven(one.run))
    ]


def _holds_files(folder: Path) -> bool:
    return any(names for _, _, names in os.walk(folder))


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
    """A containerised guest goes with its container; killing it from here would hide how it ended.

    A pid namespace of its own may also be that of an isolated guest: what runs containers puts them into a group too.
    """
    try:
        if os.readlink(entry / "ns" / "pid") == os.readlink(_SELF / "ns" / "pid"):  # noqa: PTH115  not a path
            return False
        its, ours = (set(_CONTAINER_ID.findall((each / "cgroup").read_text())) for each in (entry, _SELF))
    except OSError:
        return True
    return bool(its - ours)


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


def _podman_containers() -> Iterator[Leftover]:
    for one in guest_podman.labelled(LABEL_RUN):
        what = f"{one.labels.get(LABEL_TRIAL, '')} {one.status}"
        yield Leftover("podman container", one.container_id, one.labels[LABEL_RUN], what)


def of_no_run(cache: Path, client: Any | None) -> list[Leftover]:
    """What died while it was made: trees and models in the cache, containers that tried flags or held an image.

    And memory cgroups, which only say a hash of their run's folder.
    """
    return [*_unfinished(cache), *_helpers(client), *_podman_helpers(), *_groups(None)]


def _groups(run: Path | None) -> Iterator[Leftover]:
    for name in group.left(run):
        yield Leftover("cgroup", name, str(run.absolute()) if run else "", "memory cgroup of a guest")


def _unfinished(cache: Path) -> Iterator[Leftover]:
    for path in sorted(cache.glob("models/*.part-*")):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            yield Leftover("unfinished", str(path), "", f"a model that process {pid} did not finish")
    for path in sorted(cache.glob("rootfs/.tree.*")):
        if path.is_dir() and not group.is_locked(path):
            yield Leftover("unfinished", str(path), "", "a tree whose maker died")


def _helpers(client: Any | None) -> Iterator[Leftover]:
    if client is None:
        return
    for container in client.api.containers(all=True, filters={"label": LABEL_PURPOSE}):
        purpose = container["Labels"][LABEL_PURPOSE]
        age_s = time.time() - container["Created"]
        if age_s > (EXTRACT_AGE_S if purpose == "extract" else PROBE_AGE_S):
            yield Leftover("container", container["Id"], "", f"{purpose}, {container['Status']}")


def _podman_helpers() -> Iterator[Leftover]:
    for one in guest_podman.labelled(LABEL_PURPOSE):
        if time.time() - one.created_s > PROBE_AGE_S:
            yield Leftover("podman container", one.container_id, "", f"probe, {one.status}")


def stale(cache: Path, client: Any | None) -> list[Leftover]:
    """Host trees in the cache, and their images, made from an environment that no longer exists here.

    A driven run cannot need one: it runs from its own environment, which exists.
    """
    found = [*_stale_images(client)] if client is not None else []
    for note in sorted((cache / "rootfs").glob("*.json")):
        tree = note.with_suffix("")
        if note.name.startswith("key-") or not tree.is_dir():
            continue
        try:
            gone = [mount.source for mount in rootfs.load(tree).mounts if not Path(mount.source).exists()]
        except SparkRayError:
            continue  # not one of ours, or one that `rootfs` refuses in its own words
        if gone:
            found.append(Leftover("tree", str(tree), "", f"{gone[0]} is gone"))
    return found


def _stale_images(client: Any) -> Iterator[Leftover]:
    """A host image's PATH begins with the folder of the interpreter that it was made from."""
    for reference, folder in image.ours(client):
        if folder and not Path(folder).exists():
            yield Leftover("image", reference, "", f"{folder} is gone")


def remove(one: Leftover, docker_client: Any | None) -> str | None:
    """Remove one leftover; why it stays, if it does. That it is gone already is success."""
    match one.kind:
        case "process":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(one.name), signal.SIGKILL)
        case "container":
            image.remove_container(docker_client, one.name)
        case "cgroup":
            try:
                RootActs().run("remove-group", one.name)
            except UnavailableError as error:
                return error.message
        case "podman container":
            guest_podman.remove(one.name)
        case "image":
            return image.remove_image(docker_client, one.name)
        case "tree" | "unfinished" | "compile cache":
            return _remove_tree(Path(one.name), described=one.kind == "tree")
        case _:
            Path(one.name).unlink(missing_ok=True)
    return None


def _remove_tree(tree: Path, *, described: bool) -> str | None:
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if inside := [place for place in mounted if Path(place).is_relative_to(tree)]:
        return f"something is mounted at {inside[0]}"
    try:
        if described:
            for note in (rootfs.sidecar(tree), *_keys_of(tree)):
                note.unlink(missing_ok=True)
        shutil.rmtree(tree)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def _keys_of(tree: Path) -> Iterator[Path]:
    """The cache's notes that lead to this tree."""
    for note in tree.parent.glob("key-*.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(note.read_text()).get("tree") == tree.name:
                yield note
