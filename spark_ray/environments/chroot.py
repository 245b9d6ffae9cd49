"""The worker in another root directory, in a private mount namespace: no mount outlives the process."""

from __future__ import annotations

from typing import Any

from .. import driver
from ..environment_spec import ChrootEnvironment
from . import (
    ATTEMPT_INSIDE,
    BUNDLE_INSIDE,
    MODEL_INSIDE,
    Offer,
    Problem,
    Site,
    Start,
    worker_argv,
    worker_variables,
)


def problems(spec: ChrootEnvironment, offer: Offer) -> list[Problem]:  # noqa: ARG001
    if offer.root_acts is not None:
        return [
            Problem(f"chroot needs root: {offer.root_acts}", "run as root, or allow `sudo -n` for this user")
        ]
    return []


def start(spec: ChrootEnvironment, site: Site) -> Start:  # noqa: ARG001
    mounts: list[tuple[str | None, str, bool]] = [
        *site.content.mounts,
        (str(site.attempt), ATTEMPT_INSIDE, False),
        (str(site.bundle), BUNDLE_INSIDE, True),
    ]
    if site.model:
        mounts.append((str(site.model), MODEL_INSIDE, True))
    if site.content.gpu:
        mounts.append(
            (None, driver.INSIDE, True)
        )  # a tmpfs that holds the mount points of the driver's files
    variables = worker_variables(BUNDLE_INSIDE, site)
    enter = {
        "root": site.content.root,
        "mounts": [{"source": source, "target": target, "read_only": ro} for source, target, ro in mounts],
        "argv": list(worker_argv(site.content, ATTEMPT_INSIDE)),
        "env": variables,
        "cwd": "/",
        "uid": site.uid,
        "gid": site.gid,
        "tmp": True,
    }
    return Start(
        argv=(*site.root_argv, "enter", str(site.attempt / "enter.json")),
        variables={},
        folder=ATTEMPT_INSIDE,
        model=MODEL_INSIDE if site.model else None,
        enter=enter,
    )


def contradictions(
    spec: ChrootEnvironment,  # noqa: ARG001
    site: Site,  # noqa: ARG001
    inside: dict[str, Any],  # noqa: ARG001
    outside: dict[str, Any],
) -> list[str]:
    host, found = outside["host"], []
    if "root" in outside:
        if outside["root"] == host["root"]:
            found.append("root is the host's own")
        elif outside["root"] != outside["expected_root"]:
            found.append(f"root is {outside['root']}, the rootfs is {outside['expected_root']}")
    spaces = outside["namespaces"]
    if spaces.get("mnt") == host["namespaces"].get("mnt"):
        found.append("the mount namespace is the host's own")
    if "pid" in spaces and spaces["pid"] != host["namespaces"].get("pid"):
        found.append("the pid namespace is not the host's: this is more than a chroot")
    return found
