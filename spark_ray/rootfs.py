"""A rootfs is a folder tree: chroot enters it as it is, and the Docker image is made from it.

Content has one name, its SHA-256. What the tree does not hold but expects to be bound into it is listed as mounts.
The description lies beside the tree, in `<folder>.json`, never in it.

The kernel's folders (/dev, /proc, /sys) belong to whoever starts the tree, so their content counts nowhere. Docker
empties /etc/hosts, /etc/hostname and /etc/resolv.conf, links /etc/mtab and adds /.dockerenv whenever it makes a
container; every tree here carries those in one fixed form, so the same content has the same hash however it came.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Self

from .errors import InputError, UnavailableError, typed

KERNEL_FOLDERS = ("dev", "proc", "sys")
MOUNT_POINTS = (
    "spark_ray/attempt",
    "spark_ray/bundle",
    "spark_ray/model",
    "spark_ray/driver",
    "spark_ray/cache",
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_FILES = {
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/hostname": "spark-ray\n",
    "etc/resolv.conf": "",
}


@dataclass(frozen=True)
class Mount:
    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class Rootfs:
    """A tree, what is bound into it, and how a program in it is started."""

    path: Path
    sha256: str
    mounts: tuple[Mount, ...]
    python: str
    env: dict[str, str]
    entrypoint: tuple[str, ...]
    origin: str
    cwd: str = "/"
    image_id: str | None = None  # of the image that it was extracted from

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "path": str(self.path)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        needed = {each.name for each in fields(cls) if each.default is MISSING}
        if not isinstance(data, dict) or not needed <= data.keys() <= {each.name for each in fields(cls)}:
            raise ValueError(f"it must hold {', '.join(sorted(needed))}")
        data["path"] = Path(data["path"])
        data["mounts"] = tuple(Mount(**mount) for mount in data["mounts"])
        data["entrypoint"] = tuple(data["entrypoint"])
        return cls(**data)


def sidecar(folder: Path) -> Path:
    return folder.with_name(folder.name + ".json")


def save(rootfs: Rootfs) -> Rootfs:
    """Write the description beside the tree, whole or not at all."""
    write_whole(sidecar(rootfs.path), rootfs.to_json())
    return rootfs


def write_whole(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)


def load(path: Path) -> Rootfs:
    """The rootfs in a folder, by its description."""
    path = path.resolve()
    if not path.is_dir() or not sidecar(path).is_file():
        raise UnavailableError(
            f"{path} is no rootfs with its description {sidecar(path)}",
            mend=typed(f"rootfs extract IMAGE {path}", sudo=True),
        )
    try:
        rootfs = Rootfs.from_json(sidecar(path).read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{sidecar(path)} does not describe a rootfs: {error}", mend="build or extract it again"
        ) from None
    return rootfs if rootfs.path == path else Rootfs(**{**vars(rootfs), "path": path})  # the folder was moved


_NO_INTERPRETER = tuple(map(Path, ("/run", "/var/lib", "/etc", "/dev", "/proc", "/sys", "/boot")))


def _is_of_an_interpreter(mount: Mount) -> bool:
    """Whether a build may have bound it: a folder, read-only, that neither holds nor is part of what is the system's own."""
    source = Path(mount.source).resolve()
    apart = not any(source.is_relative_to(each) or each.is_relative_to(source) for each in _NO_INTERPRETER)
    return mount.read_only and source.is_dir() and apart


def load_usable(path: Path) -> Rootfs:
    """As `load`; a tree that an older program made, without a mount point that is needed now, is refused.

    So is a description that binds what no interpreter is in: somebody else may have written it.
    """
    rootfs = load(path)
    strange = [mount.source for mount in rootfs.mounts if not _is_of_an_interpreter(mount)]
    if strange:
        raise InputError(
            f"{sidecar(rootfs.path)} binds {', '.join(strange)}, which no build of a rootfs does",
            mend="build or extract it again",
        )
    lacking = [f"/{name}" for name in MOUNT_POINTS if not (rootfs.path / name).is_dir()]
    if lacking:
        raise InputError(
            f"{rootfs.path} has no {', '.join(lacking)}: an older spark_ray made it",
            mend="build or extract it again",
        )
    return rootfs


# ---- content ----------------------------------------------------------------------------------------------


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Relative names with their lstat, in one order on every machine; nothing below the kernel's folders."""
    pending = [""]
    while pending:
        name = pending.pop()
        if name:
            found = os.lstat(folder / name)
            yield name, found
            if not stat.S_ISDIR(found.st_mode) or name in KERNEL_FOLDERS:
                continue
        inside = sorted((os.fsencode(child.name) for child in (folder / name).iterdir()), reverse=True)
        pending.extend(f"{name}/{os.fsdecode(child)}".lstrip("/") for child in inside)


def content_sha256(folder: Path) -> str:
    """Of every name, type, mode and content or link target. Owner, times and order of creation do not count."""
    total = hashlib.sha256()
    try:
        for name, found in walk(folder):
            kind = stat.S_IFMT(found.st_mode)
            if kind == stat.S_IFREG:
                with (folder / name).open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
            else:
                content = os.fsencode((folder / name).readlink()) if kind == stat.S_IFLNK else b""
            mode = 0 if kind == stat.S_IFLNK else stat.S_IMODE(found.st_mode)
            for part in (os.fsencode(name), b"%o %o" % (kind, mode), content):
                total.update(
                    b"%d:" % len(part) + part
                )  # with its length, so that parts cannot flow into each other
    except PermissionError as error:
        raise InputError(f"{error.filename} may not be read", mend="hash this tree as root") from None
    return total.hexdigest()


def folders_below(start: str) -> Iterator[tuple[str, list[str]]]:
    """A folder and each below it, with the names of its files; no link is followed, compiled Python left out.

    os.walk's nested generators take three times as long over a big environment, and every start waits for this.
    """
    pending = [start]
    while pending:
        place, files = pending.pop(), []
        try:
            entries = os.scandir(place)
        except OSError:  # gone meanwhile, or not ours to read
            continue
        with entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    files.append(entry.name)
                elif entry.name != "__pycache__":
                    pending.append(entry.path)
        yield place, files


def bound_sha256(mounts: Iterable[Mount]) -> str:
    """A cheap identity of what is bound: the interpreter, and every installed package's list of files and hashes."""
    total = hashlib.sha256(sys.version.encode())
    records = set()
    for mount in mounts:
        for place, files in folders_below(mount.source):
            if place.endswith(".dist-info") and "RECORD" in files:
                content = Path(place, "RECORD").read_bytes()
                records.add(f"{Path(place).name} {hashlib.sha256(content).hexdigest()}\n")
    total.update("".join(sorted(records)).encode())
    return total.hexdigest()


@contextmanager
def in_the_making(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, gone if making fails; locked while its maker lives, for `reap` to see."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    lock = os.open(making, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        making.chmod(0o755)
        yield making
    finally:
        os.close(lock)
        shutil.rmtree(making, ignore_errors=True)


def finish(tree: Path) -> None:
    """Mount points, and the files that engines put over any content, in their one fixed form."""
    for name in ("etc", "spark_ray", *KERNEL_FOLDERS, *MOUNT_POINTS):
        if (tree / name).is_symlink():  # an absolute link would lead out of the tree
            raise InputError(f"/{name} is a symbolic link in {tree}; it must be a folder")
        (tree / name).mkdir(exist_ok=True)
        if name != "etc":
            (tree / name).chmod(0o755)
    if not (tree / "tmp").is_symlink():
        (tree / "tmp").mkdir(exist_ok=True)
        (tree / "tmp").chmod(0o1777)
    for name, text in _FILES.items():
        (tree / name).unlink(missing_ok=True)
        (tree / name).write_text(text)
        (tree / name).chmod(0o644)
    (tree / "etc/mtab").unlink(missing_ok=True)
    (tree / "etc/mtab").symlink_to("/proc/mounts")
    (tree / ".dockerenv").unlink(missing_ok=True)


# ---- from the host or a distribution (from an image: `rootfs_image`) ----------------------------------------


def build_host(cache_dir: Path) -> Rootfs:
    """The running interpreter's environment as a rootfs, cached by content: see `rootfs_host`."""
    from .rootfs_host import build

    return build(cache_dir)


def host_mounts() -> tuple[Mount, ...]:
    """What `build_host` binds: the folders that the running interpreter imports from."""
    from .rootfs_host import mounts

    return mounts()


def vacant(folder: Path) -> Path:
    folder = folder.parent.resolve() / folder.name
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise InputError(f"{folder} is in the way", mend="name a new or an empty folder")
    return folder


def find_python(tree: Path, search: str) -> str:
    candidates = (f"{place}/{name}" for place in search.split(":") for name in ("python3", "python"))
    return next((path for path in candidates if os.path.lexists(f"{tree}{path}")), "python3")


def debootstrap(
    folder: Path, suite: str = "bookworm", packages: Sequence[str] = ("python3", "ca-certificates")
) -> Rootfs:
    """A minimal Debian or Ubuntu tree from the distribution's own packages, for this machine's architecture."""
    folder = vacant(folder)
    if shutil.which("debootstrap") is None:
        raise UnavailableError(
            "the program debootstrap is not installed", mend="sudo apt-get install debootstrap"
        )
    if os.geteuid() != 0:
        raise UnavailableError("debootstrap needs root", mend="run this command as root")
    with in_the_making(folder) as making:
        asked = ["dpkg", "--print-architecture"]
        arch = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        include = [f"--include={','.join(packages)}"] if packages else []
        command = ["debootstrap", "--variant=minbase", f"--arch={arch}", *include, suite, str(making)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        if done.returncode != 0:
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            raise UnavailableError(
                f"debootstrap failed: {' '.join(last)}", mend=" ".join([*command[:-1], "FOLDER"])
            )
        finish(making)
        with suppress(FileNotFoundError):
            shutil.rmtree(making / "var/cache/apt/archives")
        sha256 = content_sha256(making)
        making.rename(folder)
    return save(
        Rootfs(folder, sha256, (), find_python(folder, PATH), {"PATH": PATH}, (), f"debootstrap:{suite}")
    )
