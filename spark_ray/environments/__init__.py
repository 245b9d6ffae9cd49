"""Ways of starting the same worker. An environment is data: it says how, and starts nothing.

Every environment module answers three questions, each by a pure function:
`problems(spec, offer)` what is missing here, `start(spec, site)` how the worker is started, and
`contradictions(spec, site, inside, outside)` whether the evidence says that it ran elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..environment_spec import (
    ChrootEnvironment,
    DockerEnvironment,
    IsolatedEnvironment,
    NativeEnvironment,
    PodmanEnvironment,
)

ATTEMPT_INSIDE = "/spark_ray/attempt"
BUNDLE_INSIDE = "/spark_ray/bundle"
MODEL_INSIDE = "/spark_ray/model"
CACHE_INSIDE = "/spark_ray/cache"

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

FRESH_HOME = "home"
"""Folder of the attempt that is a native worker's HOME and TMPDIR; removed when the worker has ended."""

RUN_VARIABLE = "SPARK_RAY_RUN"
"""Names the run folder in every worker's environment, so that what outlives a run can be told whose it was."""

PASSED_VARIABLES = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
"""The only variables of the host that reach a worker which uses the host's own libraries."""

_MPI_INTERFACES = "OMPI_MCA_btl_tcp_if_"
_MPI_REACH = {f"{_MPI_INTERFACES}include": "lo"}
_MPI_AS_ROOT = dict.fromkeys(
    [f"{who}_ALLOW_RUN_AS_ROOT{which}" for who in ("OMPI", "PRTE") for which in ("", "_CONFIRM")], "1"
)
MPI_VARIABLES = (*_MPI_AS_ROOT, *_MPI_REACH)

EnvironmentSpec = (
    NativeEnvironment | ChrootEnvironment | IsolatedEnvironment | DockerEnvironment | PodmanEnvironment
)


@dataclass(frozen=True)
class Problem:
    """Something missing, and the command or change that mends it."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what} (mend: {self.mend})"


@dataclass(frozen=True)
class Offer:
    """What this host offers, probed once."""

    root_acts: str | None  # None: available; else why not
    docker: str | None  # None: the daemon answers; else why not
    docker_mend: str = "start the Docker service"
    podman: str | None = None  # likewise
    podman_mend: str = ""
    memory_total_bytes: int = 0
    isolation: Mapping[str, str] = field(
        default_factory=dict
    )  # what `RootActs.isolation` found not to work, and why


@dataclass(frozen=True)
class Gpu:
    """How an isolated guest gets the GPU: the daemon's own ways (`request`: --gpus, `cdi`: --device), or the driver's files bound (`devices`)."""

    exposure: Literal["request", "cdi", "devices"]
    driver: str | None = None  # version, where its files are bound
    devices: tuple[str, ...] = ()
    source: str | None = None  # where it is written what was bound: "files", or a CDI specification
    left_out: tuple[str, ...] = ()  # of that specification


@dataclass(frozen=True)
class Content:
    """What the worker runs on: the interpreter, and the tree and image behind an isolated environment."""

    python: str
    variables: dict[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    root: str | None = None
    mounts: tuple[tuple[str, str, bool], ...] = ()  # source, target, read-only
    gpu: Gpu | None = None
    image_id: str | None = None
    sha256: str | None = None  # of the tree; bound content has its own
    bound_sha256: str | None = None


@dataclass(frozen=True)
class Site:
    """Everything one start needs to know."""

    attempt: Path
    bundle: Path
    model: Path | None
    content: Content
    label: str  # trial id and attempt
    run_label: str  # the run folder
    uid: int
    gid: int
    root_argv: tuple[
        str, ...
    ] = ()  # what stands in front of a root act: interpreter, with sudo before it if needed
    compile_cache: Path | None = (
        None  # of the arm, see `compile_cache`; null: the worker keeps compiled kernels in its HOME
    )


@dataclass(frozen=True)
class OwnGroup:
    """A memory cgroup to be made for one attempt, and removed after it."""

    name: str
    limit_bytes: int | None
    root_argv: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """How a worker is started: a host process, or a container to be made by the engine's API."""

    argv: tuple[str, ...]
    variables: dict[str, str]
    folder: str  # the attempt folder as the worker sees it
    model: str | None  # likewise
    container: dict[str, Any] | None = None
    enter: dict[str, Any] | None = None  # specification for the `enter` root act, written beside the request
    group: OwnGroup | None = None


def worker_variables(bundle: str, site: Site, cache: str = CACHE_INSIDE) -> dict[str, str]:
    """The worker's whole environment: nothing of the caller's leaks in but what is named here.

    `bundle` and `cache`: the folders as the worker sees them.
    """
    return {
        "PATH": DEFAULT_PATH,
        "HOME": "/tmp",  # noqa: S108  the worker's own; in a container and a chroot it is private
        "LANG": "C.UTF-8",
        **site.content.variables,
        **mpi_variables(site),
        **(compile_cache_variables(cache) if site.compile_cache else {}),
        "PYTHONPATH": ":".join(filter(None, (bundle, site.content.variables.get("PYTHONPATH")))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "SPARK_RAY_TRIAL": site.label,
        RUN_VARIABLE: site.run_label,
    }


def mpi_variables(site: Site) -> dict[str, str]:
    """What OpenMPI must be told to start a second process on one machine, in every environment alike.

    It refuses root unless told twice (PRTE is the launcher of its version 5). A process that it spawns it reaches by TCP
    only, and leaves the loopback out by itself: in a container without a network nothing would be left.
    """
    chosen = any(name.startswith(_MPI_INTERFACES) for name in site.content.variables)
    return (_MPI_AS_ROOT if site.uid == 0 else {}) | ({} if chosen else _MPI_REACH)


def compile_cache_variables(folder: str) -> dict[str, str]:
    """Where every library that compiles kernels at run time keeps them: one folder, in every environment alike.

    Each library's own variable as well: an image may set it, and then XDG_CACHE_HOME says nothing. What an autotuner
    measured is no compiled kernel: it is written nowhere (TLLM_AUTOTUNER_CACHE_PATH stays unset).
    """
    return {
        "XDG_CACHE_HOME": folder,
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TORCH_EXTENSIONS_DIR": f"{folder}/torch_extensions",
        "CUDA_CACHE_PATH": f"{folder}/cuda",
        "FLASHINFER_WORKSPACE_BASE": f"{folder}/flashinfer",
        "TRTLLM_DG_CACHE_DIR": f"{folder}/deep_gemm",
    }


def worker_argv(content: Content, folder: str) -> tuple[str, ...]:
    return (*content.entrypoint, content.python, "-m", "spark_ray_worker", folder)


def module_of(spec: EnvironmentSpec) -> Any:
    """The module that answers for a kind of environment."""
    from . import chroot, docker, isolated, native, podman

    match spec:
        case NativeEnvironment():
            return native
        case ChrootEnvironment():
            return chroot
        case IsolatedEnvironment():
            return isolated
        case DockerEnvironment():
            return docker
        case PodmanEnvironment():
            return podman


def limit_contradictions(memory_bytes: int | None, limit_bytes: int | None) -> list[str]:
    """The limit that was asked for against the one of the group, read back; None for none."""
    page = os.sysconf("SC_PAGE_SIZE")
    wanted = None if memory_bytes is None else memory_bytes // page * page  # the kernel counts pages
    return [] if limit_bytes == wanted else [f"the limit of the memory cgroup is {limit_bytes}, not {wanted}"]


def common_contradictions(
    spec: EnvironmentSpec, inside: dict[str, Any], outside: dict[str, Any], bundle_sha256: str
) -> list[str]:
    """What must hold anywhere: same worker, both sides describe the same process, and isolation has no back door."""
    found = []
    if inside.get("bundle_sha256") != bundle_sha256:
        found.append("the worker's files differ from the run's bundle")
    if "root" in outside and inside.get("root") != outside["root"]:
        found.append(f"the worker saw root {inside.get('root')}, the host sees {outside['root']} for it")
    on_host_root = isinstance(spec, NativeEnvironment) or getattr(spec, "root", None) == "host"
    if inside.get("docker_sockets") and not on_host_root:
        found.append(f"the worker can reach a Docker daemon: {', '.join(inside['docker_sockets'])}")
    return found
