"""The NVIDIA driver's user-space side on this host: what a guest needs of it, as the container toolkit would give it.

A rootfs never holds these files: they belong to the kernel module of the moment. Where the Docker daemon has the
toolkit, `--gpus` brings them; a chroot, and a daemon without it, get the same files bound one by one, and the device
nodes. Which libraries: those that NVIDIA's toolkit brings for the capabilities "compute" and "utility"
(libnvidia-container, src/nvc_info.c).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSIDE = "/spark_ray/driver"

_LIBRARY = re.compile(
    r"lib(cuda|cudadebugger|nvidia-(ml|cfg|ptxjitcompiler|nvvm|gpucomp|allocator|opencl|compiler|fatbinaryloader"
    r"|pkcs11|pkcs11-openssl3))\.so\.[\d.]+"
)
_NODE = re.compile(r"nvidia(\d+|ctl|-uvm|-uvm-tools|-modeset)")
_CACHED = re.compile(r"^\s+(\S+) \(.*\) => (/.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Driver:
    """Device nodes, and libraries by the name that the loader asks for."""

    version: str
    devices: tuple[str, ...]
    libraries: dict[str, str]


def find(dev: Path = Path("/dev")) -> Driver | None:
    """The driver of this host; None without a GPU's device node or without libcuda."""
    devices = tuple(sorted(str(path) for path in dev.glob("nvidia*") if _NODE.fullmatch(path.name)))
    libraries: dict[str, str] = {}
    for name, path in _candidates():
        if name not in libraries and _LIBRARY.fullmatch(name) and _same_machine(path):
            libraries[name] = os.path.realpath(path)
    cuda = libraries.get("libcuda.so.1")
    if cuda is None or not any(re.search(r"nvidia\d+$", device) for device in devices):
        return None
    return Driver(Path(cuda).name.partition(".so.")[2], devices, dict(sorted(libraries.items())))


def _candidates() -> Iterator[tuple[str, str]]:
    """(name, path) of libraries in the loader's own order: LD_LIBRARY_PATH, then its cache."""
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and Path(folder).is_dir():
            yield from ((path.name, str(path)) for path in sorted(Path(folder).iterdir()))
    program = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is not None:
        done = subprocess.run([program, "-p"], capture_output=True, text=True, timeout=30, check=False)
        yield from _CACHED.findall(done.stdout)


def _same_machine(path: str) -> bool:
    """Whether a library is of this interpreter's word size and processor: hosts may hold 32-bit drivers as well."""
    return _elf_kind(path) == _elf_kind(sys.executable) is not None


def _elf_kind(path: str) -> tuple[bytes, bytes] | None:
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(20)
    except OSError:
        return None
    return (head[4:6], head[18:20]) if head.startswith(b"\x7fELF") else None
