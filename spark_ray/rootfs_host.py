"""The host's own Python environment as a rootfs: interpreter and packages are bound, the system around them is copied.

Native, chroot and Docker then run the same files, and nothing has to be downloaded. Bound read-only at the same
absolute paths: the installation of the running interpreter, its virtual environment and site folders. Copied: the
dynamic loader and each system library that any shared object in those needs. A Python that lives in the system itself
(/usr) is copied with its libraries, and only its standard library and site folders are bound. Libraries of the NVIDIA
driver are left out: they belong to the kernel module of the moment, and whoever grants a GPU brings them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import pwd
import re
import shutil
import site
import stat
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, UnavailableError
from .rootfs import (
    Mount,
    Rootfs,
    content_sha256,
    finish,
    folders_below,
    in_the_making,
    load,
    save,
    sidecar,
    walk,
    write_whole,
)

SYSTEM_PREFIXES = (Path("/"), Path("/usr"), Path("/usr/local"))  # too much to bind whole
TOOLS = ("/bin/sh", "/bin/cat", "/bin/true")
OPENED_AT_RUN_TIME = (
    "libnss_files.so.2",
    "libnss_dns.so.2",
    "libresolv.so.2",
    "libgcc_s.so.1",
    "libstdc++.so.6",
)
TMP = Path("/tmp")  # noqa: S108  the one folder a guest may write; empty at its start
LOADER_FOLDERS = {Path("/lib"), Path("/usr/lib"), Path("/lib64"), Path("/usr/lib64")}
_DRIVER = re.compile(r"lib(cuda|nvidia-[\w-]+)\.so(\.|$)")
_LDD_PATH = re.compile(r"(/\S.*) \(0x[0-9a-f]+\)$", re.MULTILINE)
_LDD_FILES = 400
_NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\n"


def build(cache_dir: Path) -> Rootfs:
    """The tree for the running interpreter, from the cache when nothing it is made from has changed."""
    cache_dir = cache_dir.resolve()
    cache_dir.mkdir(parents=True, exist_ok=True)
    bound = _bound()
    objects = list(_shared_objects(bound))
    note = cache_dir / f"key-{_key(bound, objects)}.json"
    if (known := _known(note)) is not None:
        return known
    with in_the_making(cache_dir / "tree") as making:
        sources = _fill(making, bound, objects)
        finish(making)
        sha256 = content_sha256(making)
        path = cache_dir / sha256[:16]
        try:
            making.rename(path)
        except OSError:  # somebody made the same tree first; it has the same content, or it was changed since
            _unchanged(path, sha256)
    binaries = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": binaries, "HOME": str(TMP), "LANG": "C.UTF-8"}
    mounts = tuple(Mount(str(folder), str(folder)) for folder in bound)
    rootfs = save(Rootfs(path, sha256, mounts, sys.executable, env, (), "host"))
    write_whole(
        note, json.dumps({"tree": path.name, "sources": {source: _stamp(source) for source in sources}})
    )
    return rootfs


def mounts() -> tuple[Mount, ...]:
    """What a tree of the running interpreter has bound into it."""
    return tuple(Mount(str(folder), str(folder)) for folder in _bound())


def _bound() -> list[Path]:
    """Folders the interpreter imports from, outermost only, by their real path."""
    users = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    libraries = [
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix}),
    ]
    prefixes = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    wanted = [Path(name).resolve() for name in (*prefixes, *libraries, *site.getsitepackages(), *users)]
    real = {path for path in wanted if path.is_dir() and path not in SYSTEM_PREFIXES}
    return sorted(path for path in real if real.isdisjoint(path.parents))


def _shared_objects(bound: list[Path]) -> Iterator[str]:
    """The interpreter and every shared object in the bound folders."""
    yield os.path.realpath(sys.executable)
    for start in bound:
        below = folders_below(str(start))
        paths = sorted(f"{folder}/{name}" for folder, files in below for name in files if ".so" in name)
        yield from (path for path in paths if _is_elf(path))


def _is_elf(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:  # a dangling link
        return False


def _key(bound: list[Path], objects: list[str]) -> str:
    """Changes with this recipe, the interpreter, the mounts, the user and each shared object."""
    recipe = [Path(__file__).read_text(), Path(__file__).with_name("rootfs.py").read_text()]
    parts = [
        *recipe,
        platform.machine(),
        sys.version,
        sys.executable,
        str(os.geteuid()),
        os.environ.get("LD_LIBRARY_PATH"),
    ]
    stamps = [(name, _stamp(name)) for name in objects]
    return hashlib.sha256(repr((parts, bound, stamps)).encode()).hexdigest()[:16]


def _stamp(name: str) -> list[int] | None:
    try:
        found = Path(name).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _known(note: Path) -> Rootfs | None:
    """The tree a former build made from the same things, if the system's files it copied are the same still."""
    try:
        said = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    path = note.with_name(said["tree"])
    if not sidecar(path).is_file() or any(_stamp(name) != stamp for name, stamp in said["sources"].items()):
        return None
    rootfs = load(path)
    _unchanged(path, rootfs.sha256)
    return rootfs


def _unchanged(path: Path, sha256: str) -> None:
    if content_sha256(path) != sha256:
        raise InputError(
            f"the rootfs {path} was changed after it was made", mend=f"rm -r {path}, then build again"
        )


# ---- what goes into the tree ------------------------------------------------------------------------------


def _fill(tree: Path, bound: list[Path], objects: list[str]) -> list[str]:
    """Fill an empty tree; returns the host's files that were copied."""
    tools = [os.path.realpath(tool) for tool in TOOLS]
    needed = _needed([*objects, *tools])
    homes = {path.parent for path in map(Path, needed) if path.name.startswith(("libc.so", "ld-"))}
    opened = (home / name for home in homes for name in OPENED_AT_RUN_TIME)
    needed |= {str(path) for path in opened if path.exists()}
    needed |= _needed(sorted(needed))
    python = [sys.executable, sys.prefix, sys.base_prefix]  # as spelled, which may go through links
    wanted = ["/bin", "/sbin", "/lib", "/lib64", *TOOLS, *python, *map(str, bound)]
    copied = {name for path in (*wanted, *sorted(needed)) if (name := bring(tree, path, bound))}
    (tree / "etc").mkdir(exist_ok=True)
    for name, text in {"passwd": _passwd(), "group": _group(), "nsswitch.conf": _NSSWITCH}.items():
        (tree / "etc" / name).write_text(text)
    unbound = {path.parent for path in map(Path, needed) if not _under(path, bound)}
    if elsewhere := unbound - homes - LOADER_FOLDERS:
        _tell_loader(tree, sorted(elsewhere))
    for name, found in walk(tree):
        if stat.S_ISDIR(found.st_mode):
            (tree / name).chmod(0o755)  # whatever this user's umask is
    return sorted(copied)


def _needed(objects: list[str]) -> set[str]:
    """Paths of the libraries that the loader finds for these objects."""
    if shutil.which("ldd") is None:
        raise UnavailableError("the program ldd is not installed", mend="sudo apt-get install libc-bin")
    found: set[str] = set()
    for start in range(0, len(objects), _LDD_FILES):
        command = [
            "ldd",
            *objects[start : start + _LDD_FILES],
        ]  # a status above 0 says only that some are static
        done = subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", timeout=120, check=False
        )
        found.update(_LDD_PATH.findall(done.stdout))
    return {os.path.normpath(name) for name in found if not _DRIVER.match(Path(name).name)}


def bring(tree: Path, path: str, bound: list[Path]) -> str | None:
    """Make the host's `path` exist in the tree: each symbolic link on the way, then the folder or a copy of the file.

    Nothing is made inside of bound folders. Returns the real path of a file that was copied.
    """
    here, parts = Path("/"), deque(Path(path).parts[1:])
    while parts:
        part = parts.popleft()
        here = here.parent if part == ".." else here / part
        place = tree / here.relative_to("/")
        if here.is_symlink():
            link = Path(here.readlink())
            if not _inside(here, bound) and not place.is_symlink():
                _not_in_tmp(here, path)
                place.symlink_to(link)
            parts.extendleft(reversed(link.parts[link.is_absolute() :]))
            here = Path("/") if link.is_absolute() else here.parent
        elif here.is_dir():
            if not _inside(here, bound):
                place.mkdir(exist_ok=True)
        elif here.exists():
            if _under(here, bound):
                return None
            if not place.exists():
                shutil.copyfile(here, place)
                place.chmod(0o755 if os.access(here, os.X_OK) else 0o644)
            return str(here)
    return None


def _not_in_tmp(link: Path, path: str) -> None:
    if TMP in link.parents:
        raise InputError(
            f"{path} goes through the symbolic link {link}, and {TMP} is fresh in every environment",
            mend=f"start spark_ray from {os.path.realpath(Path(path).parent)}, or keep it outside of {TMP}",
        )


def _under(path: Path, bound: list[Path]) -> bool:
    return path in bound or _inside(path, bound)


def _inside(path: Path, bound: list[Path]) -> bool:
    """Below a bound folder, the folder itself (the mount point) not counted."""
    return not set(bound).isdisjoint(path.parents)


def _tell_loader(tree: Path, folders: list[Path]) -> None:
    """Libraries outside of the loader's own folders are found through its cache."""
    program = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise UnavailableError("the program ldconfig is not installed", mend="sudo apt-get install libc-bin")
    (tree / "etc/ld.so.conf").write_text("".join(f"{folder}\n" for folder in folders))
    command = [program, "-X", "-r", str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise UnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()}", mend="run it as root")
    shutil.rmtree(tree / "var", ignore_errors=True)  # ldconfig's own notes hold times


def _passwd() -> str:
    lines = ["root:x:0:0:root:/tmp:/bin/sh", "nobody:x:65534:65534:nobody:/tmp:/bin/sh"]
    if uid := os.geteuid():
        lines.insert(1, f"{pwd.getpwuid(uid).pw_name}:x:{uid}:{os.getegid()}::/tmp:/bin/sh")
    return "".join(f"{line}\n" for line in lines)


def _group() -> str:
    own = [f"user:x:{gid}:"] if (gid := os.getegid()) else []
    return "".join(f"{line}\n" for line in ("root:x:0:", *own, "nogroup:x:65534:"))
