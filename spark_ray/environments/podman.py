"""The worker as the first process of a podman container: no daemon, no image, the rootfs folder itself.

As tight as docker's defaults here: no capability, no new privileges, a read-only root file system with a /tmp in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..environment_spec import PodmanEnvironment
from . import (
    ATTEMPT_INSIDE,
    BUNDLE_INSIDE,
    CACHE_INSIDE,
    MODEL_INSIDE,
    Offer,
    Problem,
    Site,
    Start,
    worker_argv,
    worker_variables,
)
from .docker import LABEL_RUN, LABEL_TRIAL, of_container


def problems(spec: PodmanEnvironment, offer: Offer) -> list[Problem]:
    found = []
    if offer.podman is not None:
        found.append(Problem(offer.podman, offer.podman_mend))
    if spec.memory is not None and offer.memory_total_bytes and spec.memory > offer.memory_total_bytes:
        found.append(Problem("the memory limit is above this host's memory", "lower environment.memory"))
    return found


def flags(spec: PodmanEnvironment) -> list[str]:
    """What podman is told about the container, one key of the YAML a flag."""
    found = [
        "--read-only",
        "--read-only-tmpfs=false",  # it would give /run and /var/tmp as well, which no other environment has
        "--tmpfs=/tmp:rw,exec,mode=1777",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        f"--network={spec.network}",
        "--no-hosts",  # the rootfs has its own, the same everywhere
        "--log-driver=none",  # what the worker prints is read as it comes; a second copy would be page cache
    ]
    if spec.runtime is not None:
        found.append(f"--runtime={spec.runtime}")
    if spec.memory is not None:  # with as much memory plus swap: no swap
        found += [f"--memory={spec.memory}", f"--memory-swap={spec.memory}"]
    if spec.shm_size is not None:
        found.append(f"--shm-size={spec.shm_size}b")
    if spec.ipc is not None:
        found.append(f"--ipc={spec.ipc}")
    return found + [f"--ulimit={name}={limit}:{limit}" for name, limit in sorted(spec.ulimits.items())]


def root_flags(root: str | Path) -> list[str]:
    """The last flags before the command. `:O` is an overlay, or podman would make its mount points in the tree."""
    return ["--rootfs", f"{root}:O"]


def _volumes(site: Site) -> list[str]:
    mounts = [
        (str(site.attempt), ATTEMPT_INSIDE, False),
        (str(site.bundle), BUNDLE_INSIDE, True),
        *([(str(site.model), MODEL_INSIDE, True)] if site.model else []),
        *([(str(site.compile_cache), CACHE_INSIDE, False)] if site.compile_cache else []),
        *site.content.mounts,
    ]
    return [
        f"--volume={source}:{target}:{'ro' if read_only else 'rw'}" for source, target, read_only in mounts
    ]


def start(spec: PodmanEnvironment, site: Site) -> Start:
    assert site.content.root is not None  # noqa: S101  made ready by content.prepare
    variables = worker_variables(BUNDLE_INSIDE, site)
    argv = [
        "podman", "create", "--interactive", *flags(spec),
        f"--label={LABEL_RUN}={site.run_label}", f"--label={LABEL_TRIAL}={site.label}",
        f"--user={site.uid}:{site.gid}", "--workdir=/", *_volumes(site),
        *(f"--env={name}={value}" for name, value in variables.items()),
        *root_flags(site.content.root), *worker_argv(site.content, ATTEMPT_INSIDE),
    ]  # fmt: skip
    return Start(
        argv=tuple(argv),
        variables=variables,
        folder=ATTEMPT_INSIDE,
        model=MODEL_INSIDE if site.model else None,
    )


def contradictions(
    spec: PodmanEnvironment,
    site: Site,  # noqa: ARG001
    inside: dict[str, Any],  # noqa: ARG001
    outside: dict[str, Any],
) -> list[str]:
    shared = {"ipc": spec.ipc == "host", "net": spec.network == "host"}
    return of_container(outside, {"mnt": False, "pid": False, **shared}, spec.memory)
