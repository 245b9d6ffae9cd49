"""The worker as an ordinary process of this host."""

from __future__ import annotations

from typing import Any

from ..environment_spec import NativeEnvironment
from . import FRESH_HOME, Offer, Problem, Site, Start, worker_argv, worker_variables


def problems(spec: NativeEnvironment, offer: Offer) -> list[Problem]:  # noqa: ARG001  same question for every kind
    return []


def start(spec: NativeEnvironment, site: Site) -> Start:  # noqa: ARG001
    folder = str(site.attempt)
    # As in a container and a chroot, nothing is left of the last trial: kernels compiled once would be found again
    # in the user's own HOME, and the native arm alone would be fast.
    home = str(site.attempt / FRESH_HOME)
    return Start(
        argv=worker_argv(site.content, folder),
        variables=worker_variables(str(site.bundle), site, str(site.compile_cache))
        | {"HOME": home, "TMPDIR": home},
        folder=folder,
        model=str(site.model) if site.model else None,
    )


def contradictions(
    spec: NativeEnvironment,  # noqa: ARG001
    site: Site,  # noqa: ARG001
    inside: dict[str, Any],  # noqa: ARG001
    outside: dict[str, Any],
) -> list[str]:
    host, found = outside["host"], []
    if "root" in outside and outside["root"] != host["root"]:
        found.append(f"root is {outside['root']}, the host's is {host['root']}")
    found += [
        f"{kind} namespace is {value}, the host's is {host['namespaces'].get(kind)}"
        for kind, value in outside["namespaces"].items()
        if kind in {"mnt", "pid"} and value != host["namespaces"].get(kind)
    ]
    return found
