"""The worker as a host process, separated by single mechanisms: the steps between native and docker, each a switch.

The mount namespace is always its own. A chroot is this with no switch at all.
"""

from __future__ import annotations

from typing import Any

from .. import driver, group, rootact
from ..environment_spec import ChrootEnvironment, IsolatedEnvironment, NativeEnvironment
from . import (
    ATTEMPT_INSIDE,
    BUNDLE_INSIDE,
    CACHE_INSIDE,
    MODEL_INSIDE,
    Offer,
    OwnGroup,
    Problem,
    Site,
    Start,
    limit_contradictions,
    native,
    worker_argv,
    worker_variables,
)

SWITCHES = {
    "mount": "a mount namespace",
    "overlay": "an overlay root",
    "memory": "a memory cgroup",
    **{kind: f"a {kind} namespace" for kind in ("pid", "ipc", "uts", "net", "cgroup")},
}


def problems(spec: IsolatedEnvironment | ChrootEnvironment, offer: Offer) -> list[Problem]:
    if offer.root_acts is not None:
        mend = "run as root, or allow `sudo -n` for this user"
        return [Problem(f"{spec.kind} needs root: {offer.root_acts}", mend)]
    found = [
        Problem(
            f"{SWITCHES[way]} is not possible here: {offer.isolation[way]}", "leave that out, or allow it"
        )
        for way in _ways(spec)
        if way in offer.isolation
    ]
    memory = spec.memory if isinstance(spec, IsolatedEnvironment) else None
    if memory is not None and offer.memory_total_bytes and memory > offer.memory_total_bytes:
        found.append(Problem("the memory limit is above this host's memory", "lower environment.memory"))
    return found


def _ways(spec: IsolatedEnvironment | ChrootEnvironment) -> list[str]:
    if isinstance(spec, ChrootEnvironment):
        return ["mount"]
    overlay = ["overlay"] if spec.root == "overlay" else []
    return ["mount", *overlay, *(["memory"] if spec.cgroup else []), *spec.namespaces]


def start(spec: IsolatedEnvironment, site: Site) -> Start:
    base = _on_host_root(site) if spec.root == "host" else _in_rootfs(spec, site)
    own = OwnGroup(group.name_of(site.run_label, site.label), spec.memory, site.root_argv)
    enter = {
        **(base.enter or {}),
        "group": own.name if spec.cgroup else None,
        "namespaces": list(spec.namespaces),
        "argv": list(base.argv),
        "env": base.variables,
    }
    return Start(
        argv=tuple(rootact.act(site.root_argv, "enter", str(site.attempt / "enter.json"))),
        variables={},
        folder=base.folder,
        model=base.model,
        enter=enter,
        group=own if spec.cgroup else None,
    )


def _on_host_root(site: Site) -> Start:
    """As native, so that only the switches differ. A root that stays root keeps its supplementary groups, as there."""
    user = {"uid": site.uid, "gid": site.gid} if site.uid else {}
    base = native.start(NativeEnvironment(kind="native"), site)
    return Start(base.argv, base.variables, base.folder, base.model, enter={"root": None, **user})


def _in_rootfs(spec: IsolatedEnvironment, site: Site) -> Start:
    mounts: list[tuple[str | None, str, bool]] = [
        *site.content.mounts,
        (str(site.attempt), ATTEMPT_INSIDE, False),
        (str(site.bundle), BUNDLE_INSIDE, True),
    ]
    if site.model:
        mounts.append((str(site.model), MODEL_INSIDE, True))
    if site.compile_cache:
        mounts.append((str(site.compile_cache), CACHE_INSIDE, False))
    if site.content.gpu:
        mounts.append(
            (None, driver.INSIDE, True)
        )  # a tmpfs that holds the mount points of the driver's files
    enter = {
        "root": site.content.root,
        "overlay": spec.root == "overlay",
        "mounts": [{"source": source, "target": target, "read_only": ro} for source, target, ro in mounts],
        "uid": site.uid,
        "gid": site.gid,
        "tmp": True,
    }
    return Start(
        argv=worker_argv(site.content, ATTEMPT_INSIDE),
        variables=worker_variables(BUNDLE_INSIDE, site),
        folder=ATTEMPT_INSIDE,
        model=MODEL_INSIDE if site.model else None,
        enter=enter,
    )


def contradictions(
    spec: IsolatedEnvironment,
    site: Site,
    inside: dict[str, Any],  # noqa: ARG001
    outside: dict[str, Any],
) -> list[str]:
    """Exactly what was switched on must be there: no less, and no more."""
    return [*_of_root(spec, outside), *_of_namespaces(spec, outside), *_of_group(spec, site, outside)]


def _of_root(spec: IsolatedEnvironment, outside: dict[str, Any]) -> list[str]:
    if "root" not in outside:  # not ours to look at
        return []
    root, of_host = outside["root"], outside["host"]["root"]
    if spec.root == "host":
        return [] if root == of_host else [f"root is {root}, the host's is {of_host}"]
    if root == of_host:
        return ["root is the host's own"]
    expected, kind = outside["expected_root"], outside.get("root_filesystem")
    if spec.root == "overlay":
        return [] if kind == "overlay" and root != expected else [f"root is on {kind}, not an overlay"]
    return [] if root == expected else [f"root is {root}, the rootfs is {expected}"]


def _of_namespaces(spec: IsolatedEnvironment, outside: dict[str, Any]) -> list[str]:
    found, seen, of_host = [], outside["namespaces"], outside["host"]["namespaces"]
    for kind in sorted(seen.keys() | {"mnt", *spec.namespaces}):
        own = seen.get(kind) != of_host.get(kind)
        wanted = kind == "mnt" or kind in spec.namespaces
        if wanted and not own:
            found.append(f"the {kind} namespace is the host's own")
        if own and not wanted:
            found.append(f"the {kind} namespace is not the host's: this is more than was asked for")
    return found


def _of_group(spec: IsolatedEnvironment, site: Site, outside: dict[str, Any]) -> list[str]:
    seen, launchers = outside.get("memory_group"), outside.get("launcher_memory_group")
    if not spec.cgroup:
        return [] if seen == launchers else [f"the memory cgroup is {seen}, the launcher's is {launchers}"]
    name = group.name_of(site.run_label, site.label)
    if seen is None or not seen.endswith(f"/{name}"):
        return [f"the memory cgroup is {seen}, not {name}"]
    return limit_contradictions(spec.memory, outside.get("group_limit_bytes"))
