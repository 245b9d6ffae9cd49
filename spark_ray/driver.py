"""The NVIDIA driver's user-space side on this host: what a guest needs of it, as the container toolkit would give it.

A rootfs never holds these files: they belong to the kernel module of the moment. Where the Docker daemon has the
toolkit, `--gpus` brings them; a chroot, and a daemon without it, get the same files bound one by one, and the device
nodes. Where the toolkit has written down what it gives (a CDI specification, see `cdi`), that is what is given; else
it is looked for here: the libraries that NVIDIA's toolkit brings for the capabilities "compute" and "utility"
(libnvidia-container, src/nvc_info.c).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    """Device nodes; libraries by the name that the loader asks for, and programs by theirs: each with the host's file."""

    version: str
    devices: tuple[str, ...]
    libraries: dict[str, str]
    programs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    source: str = "files"  # or the CDI specification that says all this
    left_out: tuple[str, ...] = ()  # what the specification asks for and is not given


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
    tool = shutil.which("nvidia-smi")
    programs = {"nvidia-smi": os.path.realpath(tool)} if tool else {}
    return Driver(version_of(cuda), devices, dict(sorted(libraries.items())), programs)


def version_of(libcuda: str) -> str:
    """NVIDIA names the file after the driver."""
    return Path(libcuda).name.partition(".so.")[2]


def _candidates() -> Iterator[tuple[str, str]]:
    """(name, path) of libraries in the loader's own order: LD_LIBRARY_PATH, then its cache."""
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and Path(folder).is_dir():
            yield from ((path.name, str(path)) for path in sorted(Path(folder).iterdir()))
    yield from loader_cache()


def ldconfig() -> str | None:
    """The program, which lies where only root looks for programs."""
    return shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def loader_cache(tree: Path | None = None) -> list[tuple[str, str]]:
    """(name, path) of each library in the loader's cache, of this host or of a tree, in the loader's order."""
    program = ldconfig()
    if program is None:
        return []
    command = [program, *(["-r", str(tree)] if tree else []), "-p"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return _CACHED.findall(done.stdout)


def _same_machine(path: str) -> bool:
    """Whether a library is of this interpreter's word size and processor: hosts may hold 32-bit drivers as well."""
    return elf_kind(path) == elf_kind(sys.executable) is not None


def elf_kind(path: str | Path) -> tuple[bytes, bytes] | None:
    """Word size and byte order, and processor, of a program or library; None for anything else."""
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(20)
    except OSError:
        return None
    return (head[4:6], head[18:20]) if head.startswith(b"\x7fELF") else None
