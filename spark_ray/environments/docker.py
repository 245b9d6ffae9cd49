"""The worker as the first process of a container, made through the Docker Engine API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..environment_spec import DockerEnvironment
from . import (
    ATTEMPT_INSIDE,
    BUNDLE_INSIDE,
    CACHE_INSIDE,
    MODEL_INSIDE,
    Gpu,
    Offer,
    Problem,
    Site,
    Start,
    limit_contradictions,
    worker_argv,
    worker_variables,
)

LABEL_RUN = "spark_ray.run"
LABEL_TRIAL = "spark_ray.trial"
_ASKED = {"request": "all", "cdi": "cdi", "devices": None}


def problems(spec: DockerEnvironment, offer: Offer) -> list[Problem]:
    found = []
    if offer.docker is not None:
        found.append(Problem(offer.docker, offer.docker_mend))
    if spec.memory is not None and offer.memory_total_bytes and spec.memory > offer.memory_total_bytes:
        found.append(Problem("the memory limit is above this host's memory", "lower environment.memory"))
    return found


def flags(spec: DockerEnvironment, gpu: Gpu | None = None) -> dict[str, Any]:
    """Settings of the container's host side, one key of the YAML a flag; `image.host_config` makes them docker's."""
    config: dict[str, Any] = {
        "network_mode": spec.network,
        "read_only": spec.read_only,
        "tmpfs": {"/tmp": "exec"},  # noqa: S108  inside the container
        "privileged": spec.privileged,
        "auto_remove": False,  # a removed container cannot be asked whether it was killed for memory
        "ulimits": dict(spec.ulimits),
        "gpus": spec.gpus if gpu is None else _ASKED[gpu.exposure],
    }
    if spec.no_new_privileges and not spec.privileged:
        config["security_opt"] = ["no-new-privileges"]
    if not spec.privileged:
        config["cap_drop"] = list(spec.cap_drop)
    optional = {
        "mem_limit": spec.memory,
        "memswap_limit": spec.memory_swap if spec.memory_swap is not None else spec.memory,
        "shm_size": spec.shm_size,
        "ipc_mode": spec.ipc,
        "pid_mode": spec.pid,
        "cpuset_cpus": spec.cpuset_cpus,
        "cgroup_parent": spec.cgroup_parent,
        "cap_add": list(spec.cap_add) or None,
        "devices": [f"{node}:{node}:rw" for node in gpu.devices] if gpu and gpu.devices else None,
    }
    return config | {name: value for name, value in optional.items() if value is not None}


def changed_flags(spec: DockerEnvironment) -> list[str]:
    """The keys that differ from the tight defaults, which every engine grants."""
    return sorted(set(spec.model_dump(exclude_defaults=True)) - {"kind", "image", "python"})


def _binds(site: Site) -> list[str]:
    """SOURCE:TARGET:MODE, as docker takes them; one source may have several targets."""
    mounts = [
        (str(site.attempt), ATTEMPT_INSIDE, False),
        (str(site.bundle), BUNDLE_INSIDE, True),
        *([(str(site.model), MODEL_INSIDE, True)] if site.model else []),
        *([(str(site.compile_cache), CACHE_INSIDE, False)] if site.compile_cache else []),
        *site.content.mounts,
    ]
    return [f"{source}:{target}:{'ro' if read_only else 'rw'}" for source, target, read_only in mounts]


def start(spec: DockerEnvironment, site: Site) -> Start:
    variables = worker_variables(BUNDLE_INSIDE, site)
    argv = worker_argv(site.content, ATTEMPT_INSIDE)
    container = {
        "image": site.content.image_id,
        "command": list(argv[len(site.content.entrypoint) :]),  # the image keeps its own entrypoint
        "environment": variables,
        "user": f"{site.uid}:{site.gid}",
        "working_dir": "/",
        "labels": {LABEL_RUN: site.run_label, LABEL_TRIAL: site.label},
        "host_config": flags(spec, site.content.gpu) | {"binds": _binds(site)},
    }
    return Start(
        argv=argv,
        variables=variables,
        folder=ATTEMPT_INSIDE,
        model=MODEL_INSIDE if site.model else None,
        container=container,
    )


def of_container(outside: dict[str, Any], of_host: Mapping[str, bool], memory_bytes: int | None) -> list[str]:
    """A group names the container and has its limit, its root is not the host's, and each namespace is the host's or its own as `of_host` says."""
    host, found = outside["host"], []
    container_id = outside["container_id"]
    if not any(container_id in line for line in outside["cgroup"]):
        found.append(f"no cgroup of the process names container {container_id[:12]}")
    for kind, shared in sorted(of_host.items()):
        is_hosts = outside["namespaces"].get(kind) == host["namespaces"].get(kind)
        if is_hosts != shared:
            found.append(f"the {kind} namespace is {'the host' if is_hosts else 'not the host'}'s own")
    if outside.get("root") == host["root"]:
        found.append("root is the host's own")
    if memory_bytes is not None and "group_limit_bytes" in outside:
        found += limit_contradictions(memory_bytes, outside["group_limit_bytes"])
    return found


def contradictions(
    spec: DockerEnvironment,
    site: Site,  # noqa: ARG001
    inside: dict[str, Any],  # noqa: ARG001
    outside: dict[str, Any],
) -> list[str]:
    shared = {"ipc": spec.ipc == "host", "net": spec.network == "host", "pid": spec.pid == "host"}
    return of_container(outside, {"mnt": False, **shared}, spec.memory)
