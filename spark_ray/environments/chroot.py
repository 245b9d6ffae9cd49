"""The worker as a host process whose root folder is a rootfs, in a private mount namespace: `isolated` with no switch."""

from __future__ import annotations

from typing import Any

from ..environment_spec import ChrootEnvironment, IsolatedEnvironment
from . import Offer, Problem, Site, Start, isolated


def problems(spec: ChrootEnvironment, offer: Offer) -> list[Problem]:
    return isolated.problems(spec, offer)


def start(spec: ChrootEnvironment, site: Site) -> Start:
    return isolated.start(_isolated(spec), site)


def contradictions(
    spec: ChrootEnvironment, site: Site, inside: dict[str, Any], outside: dict[str, Any]
) -> list[str]:
    return isolated.contradictions(_isolated(spec), site, inside, outside)


def _isolated(spec: ChrootEnvironment) -> IsolatedEnvironment:
    return IsolatedEnvironment(
        kind="isolated", root="chroot", rootfs=spec.rootfs, python=spec.python, gpus=spec.gpus
    )
