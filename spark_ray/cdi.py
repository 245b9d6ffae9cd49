"""The GPU as a Container Device Interface specification describes it: read for guests that no container runtime makes.

NVIDIA's toolkit writes one (`nvidia-ctk cdi generate`; newer ones at every boot): device nodes, files to mount, variables,
and hooks that a runtime runs when the container exists. Two of the hooks are done here by other means: the folder in which
every library lies under each of its names stands for `update-ldcache` and `create-symlinks`. What else is asked for and is
not given is named in `left_out`, so that it can be read in every record.

The format: https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import config, driver
from .driver import Driver
from .errors import InputError

FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
"""The later one wins, as with container runtimes: it is the generated one."""
KIND = "nvidia.com/gpu"
ALL = "all"
_DONE = {"update-ldcache", "create-symlinks"}
_PROGRAMS = {"bin", "sbin"}
MEND = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)


class DeviceNode(_Part):
    path: str
    host_path: str | None = Field(default=None, alias="hostPath")


class Mount(_Part):
    host_path: str = Field(alias="hostPath")
    container_path: str = Field(alias="containerPath")


class Hook(_Part):
    path: str
    args: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`update-ldcache` of ["nvidia-cdi-hook", "update-ldcache", ...] and of ["nvidia-ctk", "hook", "update-ldcache", ...]."""
        words = [word for word in self.args[1:] if word != "hook"]
        return words[0] if words else PurePosixPath(self.path).name

    def links(self) -> Iterator[tuple[str, str]]:
        """(target, link) of each --link TARGET::LINK."""
        for option, value in zip(self.args, self.args[1:], strict=False):
            if option == "--link" and "::" in value:
                target, _, link = value.partition("::")
                yield target, link


class Edits(_Part):
    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = Field(default=(), alias="deviceNodes")
    mounts: tuple[Mount, ...] = ()
    hooks: tuple[Hook, ...] = ()


class Device(_Part):
    name: str
    edits: Edits = Field(default=Edits(), alias="containerEdits")


class Specification(_Part):
    kind: str
    devices: tuple[Device, ...]
    edits: Edits = Field(default=Edits(), alias="containerEdits")

    def applied(self) -> list[Edits]:
        """What asking for every GPU applies: the device `all` where there is one, and what goes with any device."""
        whole = [device for device in self.devices if device.name == ALL]
        return [*(device.edits for device in whole or self.devices), self.edits]


def find(folders: Sequence[Path] | None = None) -> Driver | None:
    """The driver as this host's specification gives it; None where there is none of NVIDIA's GPUs."""
    for folder in reversed(FOLDERS if folders is None else folders):
        for path, document in specifications(folder):
            found = read(document, str(path))
            if found is not None:
                return found
    return None


def specifications(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Each file of a folder that describes NVIDIA's GPUs. InputError for one that would and cannot be read."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix not in {".json", ".yaml"}:
            continue
        try:
            document = config.load_plain(path)
        except InputError as error:
            if _is_of_another(path):  # and no business of ours
                continue
            raise InputError(f"{path} is no CDI specification: {error.message}", mend=MEND) from None
        if isinstance(document, Mapping) and document.get("kind") == KIND:
            yield path, document


def _is_of_another(path: Path) -> bool:
    """Whether a file that is no plain data does not speak of NVIDIA's GPUs; one that may not be read is nobody's."""
    try:
        return KIND.encode() not in path.read_bytes()
    except OSError:
        return True


def read(document: Mapping[str, Any], source: str) -> Driver | None:
    """The driver that a specification gives; None without a libcuda."""
    try:
        applied = Specification.model_validate(document).applied()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{source} is no CDI specification: {place}: {first['msg'].lower()}", mend=MEND
        ) from None
    mounts = list({mount.container_path: mount for each in applied for mount in each.mounts}.values())
    hooks = [hook for each in applied for hook in each.hooks]
    libraries = _libraries(mounts)
    left_out = list(_add_links(libraries, hooks))
    cuda = libraries.get("libcuda.so.1")
    if cuda is None:
        return None
    programs = {_name(mount): mount.host_path for mount in mounts if _is_program(mount)}
    kept = {mount.container_path for mount in mounts if _is_library(mount) or _is_program(mount)}
    left_out += [mount.container_path for mount in mounts if mount.container_path not in kept]
    left_out += [f"hook {hook.name}" for hook in hooks if hook.name not in _DONE]
    devices, missing = _devices(applied)
    return Driver(
        version=driver.version_of(cuda),
        devices=tuple(devices),
        libraries=dict(sorted(libraries.items())),
        programs=programs,
        variables=dict(entry.split("=", 1) for each in applied for entry in each.env if "=" in entry),
        source=source,
        left_out=tuple(dict.fromkeys([*missing, *left_out])),
    )


def _name(mount: Mount) -> str:
    return PurePosixPath(mount.container_path).name


def _is_library(mount: Mount) -> bool:
    return ".so" in PurePosixPath(_name(mount)).suffixes


def _is_program(mount: Mount) -> bool:
    return PurePosixPath(mount.container_path).parent.name in _PROGRAMS


def _libraries(mounts: Sequence[Mount]) -> dict[str, str]:
    """Each library under its own name, and under every name by which it is linked on the host: `ldconfig` made those."""
    found: dict[str, str] = {}
    for mount in filter(_is_library, mounts):
        host = Path(mount.host_path)
        stem = host.name.partition(".so")[0]
        for near in host.parent.glob(f"{stem}.so*"):
            if near.is_symlink() and near.resolve() == host.resolve():
                found.setdefault(near.name, str(host))
        found[_name(mount)] = str(host)
    return found


def _add_links(libraries: dict[str, str], hooks: Sequence[Hook]) -> Iterator[str]:
    """Add the names that `create-symlinks` makes; the links to anything but a library are yielded."""
    for hook in hooks:
        for target, link in hook.links() if hook.name == "create-symlinks" else ():
            host = libraries.get(PurePosixPath(target).name)
            name = PurePosixPath(link).name
            if host is None or ".so" not in PurePosixPath(name).suffixes:
                yield f"link {link}"
            else:
                libraries.setdefault(name, host)


def _devices(applied: Sequence[Edits]) -> tuple[list[str], list[str]]:
    """(device nodes of the host, what cannot be given: renamed ones, and those that are not there)."""
    nodes: dict[str, None] = {}
    left_out = []
    for node in (node for each in applied for node in each.device_nodes):
        if node.host_path not in {None, "", node.path}:
            left_out.append(f"device {node.path} (from {node.host_path})")
        elif not Path(node.path).exists():
            left_out.append(f"device {node.path} (not on this host)")
        else:
            nodes[node.path] = None
    return list(nodes), left_out
