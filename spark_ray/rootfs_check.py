"""What can be said of a vendor's tree without starting anything in it: its machine, its engine, its MPI, its links.

Paths are followed as they would be inside: an absolute link leads to the tree's own root, so that the folders of the
tree's processor are found (/usr/lib/aarch64-linux-gnu), whatever this host's is.
"""

from __future__ import annotations

import platform
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from . import driver
from .diagnose import CATALOGUE, IMAGE_TREE
from .rootfs import PATH, Rootfs

_MACHINES = {b"\x3e\x00": "x86_64", b"\xb7\x00": "aarch64"}  # e_machine of ELF, little-endian
_MOST_LINKS = 40
_LEADING = {".pth", ".egg-link"}  # files by which site-packages names further folders
_SHELL_STARTS = ("/etc/shinit_v2", "/etc/bash.bashrc")
_DISTRIBUTION = ("/usr/lib/", "/lib/", "/usr/lib64/", "/lib64/")
_ADDED = re.compile(r"\bLD_LIBRARY_PATH=[\"']?([^\"'\s;]+)")
_WHY = {each.name: each for each in CATALOGUE}


@dataclass(frozen=True)
class Finding:
    """One thing seen. `missing`: nothing can run; `warn`: it may not."""

    name: str
    status: Literal["ok", "warn", "missing"]
    found: str
    mend: str = ""


def inside(tree: Path, path: str) -> Path | None:
    """The host's path of what a path means inside a tree; None where it leads nowhere."""
    here, parts, links = tree, deque(PurePosixPath(path).parts[1:]), 0
    while parts:
        part = parts.popleft()
        if part == "..":
            here = here.parent if here != tree else tree
            continue
        here /= part
        if here.is_symlink():
            links += 1
            target = here.readlink()
            if links > _MOST_LINKS:
                return None
            parts.extendleft(reversed(target.parts[target.is_absolute() :]))
            here = tree if target.is_absolute() else here.parent
    return here if here.exists() else None


def look(rootfs: Rootfs, python: str | None = None, module: str | None = None) -> Iterator[Finding]:
    """Every finding on a tree that a vendor's image was unpacked to. `module`: the engine's library that must be in it."""
    python = python or rootfs.python
    yield _machine(rootfs, python)
    yield from _entrypoint(rootfs)
    if module is not None:
        yield _module(rootfs, python, module)
    if module == "tensorrt_llm":
        yield from _mpi(rootfs)
        yield from _cuda(rootfs.path)


def _machine(rootfs: Rootfs, python: str) -> Finding:
    program = inside(rootfs.path, _absolute(rootfs, python))
    if program is None:
        return Finding(
            "python", "missing", f"{python} is not in {rootfs.path}", "name it: environment.python"
        )
    of_tree, of_host = driver.elf_kind(program), driver.elf_kind(sys.executable)
    if of_tree is None:
        return Finding("python", "ok", f"{python} is a script")
    machine = _MACHINES.get(of_tree[1], of_tree[1].hex())
    if of_tree != of_host:
        found = f"{rootfs.path} is for {machine}, this host is {platform.machine()}"
        return Finding("machine", "missing", found, _WHY["wrong-machine"].mend)
    return Finding("machine", "ok", f"{machine}, as this host")


def _absolute(rootfs: Rootfs, program: str) -> str:
    """A program as the image's PATH finds it."""
    if program.startswith("/"):
        return program
    folders = rootfs.env.get("PATH", PATH).split(":")
    return next(
        (f"{folder}/{program}" for folder in folders if inside(rootfs.path, f"{folder}/{program}")),
        f"/{program}",
    )


def _entrypoint(rootfs: Rootfs) -> Iterator[Finding]:
    if rootfs.entrypoint:
        program = _absolute(rootfs, rootfs.entrypoint[0])
        there = inside(rootfs.path, program) is not None
        said = " ".join(rootfs.entrypoint)
        mend = "extract the image again, or build one whose ENTRYPOINT is in it"
        yield (
            Finding("entrypoint", "ok", said)
            if there
            else Finding("entrypoint", "missing", f"{said}: not in the tree", mend)
        )
    elif set_by_shell := _set_by_shell(rootfs.path):
        yield Finding(
            "entrypoint",
            "warn",
            f"the image has none, but sets {set_by_shell[0]} and more library paths where only a shell reads them",
            "take NVIDIA's own image, or keep its ENTRYPOINT in yours",
        )


def _module(rootfs: Rootfs, python: str, module: str) -> Finding:
    led_elsewhere = False
    for folder in _site_folders(rootfs, python):
        if (place := inside(rootfs.path, f"{folder}/{module}/__init__.py")) is not None:
            return Finding(module, "ok", f"/{place.parent.relative_to(rootfs.path)}")
        here = inside(rootfs.path, folder)
        led_elsewhere |= here is not None and any(path.suffix in _LEADING for path in here.iterdir())
    mend = f"{IMAGE_TREE}, of an image that holds it"
    found = f"no {module} where {python} of {rootfs.path} imports from"
    if led_elsewhere:  # only that interpreter knows
        return Finding(module, "warn", f"{found}, unless a .pth file there leads to it", mend)
    return Finding(module, "missing", found, mend)


def _site_folders(rootfs: Rootfs, python: str) -> Iterator[str]:
    """Where an interpreter of a tree looks for packages: beside itself, in Debian's folders, and in PYTHONPATH."""
    yield from filter(None, rootfs.env.get("PYTHONPATH", "").split(":"))
    binary = PurePosixPath(_absolute(rootfs, python))
    real = inside(rootfs.path, str(binary))
    homes = [binary.parent.parent]
    if real is not None:
        homes.append(PurePosixPath("/") / real.relative_to(rootfs.path).parent.parent)
    for home in dict.fromkeys(map(str, [*homes, "/usr/local", "/usr"])):
        library = inside(rootfs.path, f"{home}/lib")
        for version in sorted(library.glob("python3*")) if library else ():
            yield from (f"{home}/lib/{version.name}/{kind}-packages" for kind in ("site", "dist"))


# ---- libraries --------------------------------------------------------------------------------------------


def providers(rootfs: Rootfs, name: str) -> list[str]:
    """Where a library lies in a tree, in the order in which its loader looks: LD_LIBRARY_PATH, then the loader's cache.

    The paths are those of the image's ENV, and before them those that its shell's start-up files add.
    """
    folders = [*_set_by_shell(rootfs.path), *rootfs.env.get("LD_LIBRARY_PATH", "").split(":")]
    paths = [f"{folder.rstrip('/')}/{name}" for folder in folders if folder.startswith("/")]
    paths += [path for cached, path in driver.loader_cache(rootfs.path) if cached == name]
    return list(dict.fromkeys(path for path in paths if inside(rootfs.path, path) is not None))


def _set_by_shell(tree: Path) -> list[str]:
    """Folders that the start-up files of an image's shell put in front of LD_LIBRARY_PATH; the last line comes first."""
    folders: list[str] = []
    for name in _SHELL_STARTS:
        path = inside(tree, name)
        text = path.read_text(errors="replace") if path is not None and path.is_file() else ""
        for value in _ADDED.findall(text):
            folders = [*(each for each in value.split(":") if each.startswith("/")), *folders]
    return folders


def _mpi(rootfs: Rootfs) -> Iterator[Finding]:
    for name, why in (("libmpi.so.40", "no-mpi"), ("libucs.so.0", "no-ucx")):
        found = providers(rootfs, name)
        if not found:
            yield Finding(
                name,
                "warn",
                f"neither the loader's cache of {rootfs.path} nor its variables lead to one",
                _WHY[why].mend,
            )
        elif (
            name.startswith("libucs")
            and found[0].startswith(_DISTRIBUTION)
            and any(not each.startswith(_DISTRIBUTION) for each in found)
        ):
            said = f"the distribution's comes before the vendor's: {', '.join(found)}"
            yield Finding(name, "warn", said, _WHY["two-ucx"].mend)
        else:
            yield Finding(name, "ok", found[0])


def _cuda(tree: Path) -> Iterator[Finding]:
    link = "/usr/local/cuda"
    place = inside(tree, link)
    if place is not None:
        yield Finding(link, "ok", f"/{place.relative_to(tree)}")
    elif (tree / link[1:]).is_symlink():
        target = (tree / link[1:]).readlink()
        yield Finding(link, "warn", f"leads to {target}, which is not in the tree", "extract the image again")
