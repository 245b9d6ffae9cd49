"""`spark-ray doctor --spark`: what this host has of what docs/spark.md expects of a DGX Spark.

`look` reads, and changes nothing; `checks` judges what was read, and reads nothing. What a Spark has by reports of its
owners and not by our own measuring is a warning when it is otherwise, with a word on what that would mean.
"""

from __future__ import annotations

import platform
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cdi, cuda_view, image, nvml, rootfs
from .doctor import Check, watchdog_check
from .errors import InputError, UnavailableError, typed
from .rootact import RootActs
from .units import GIB, MIB, format_bytes
from .worker import observe

IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc13"
"""As in experiments/spark_kv_divergence.yaml."""
ROOTFS = "rootfs/tensorrt-llm"
MODELS = "models"
PAGE = "docs/spark.md"

# Estimates: sizes of NVIDIA's images are not known beforehand, and those of earlier ones were 17 to 32 GB.
IMAGE_BYTES, ROOTFS_BYTES, MODEL_BYTES = 40 * GIB, 40 * GIB, 20 * GIB
RUN_BYTES = 9 * GIB  # of the map: its page-cache fill, and its records
MEMORY_BYTES = 115 * GIB  # a Spark has 119.6 to 121.7 GiB, as its firmware is
FREE_BYTES = 100 * GIB
SAME_BYTES = 64 * MIB  # two readings of one number, a moment apart
DRIVER, CUDA_VERSION = 580, 13000
CLOCK_MHZ = 2000  # owners see 2400 under load, and less than 1400 on a machine that is held back
COOL_CELSIUS = 60  # as in the experiments
KILLERS = ("earlyoom", "systemd-oomd")


@dataclass(frozen=True)
class DockerFacts:
    error: str = ""
    mend: str = ""
    version: str = ""
    runtimes: tuple[str, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    has_image: bool = False
    root: str = "/var/lib/docker"


@dataclass(frozen=True)
class Readings:
    """Everything that is judged."""

    machine: str
    kernel: str
    system: str
    meminfo: dict[str, int]
    gpus: tuple[dict[str, Any], ...]
    no_gpu: str
    cuda: cuda_view.Reading | str
    docker: DockerFacts
    cdi_files: tuple[str, ...]
    cdi_error: str
    memlock_bytes: int | None
    """None: unlimited."""
    disks: dict[str, tuple[int, int]]
    """By folder: its file system and what is free there."""
    has_rootfs: bool
    has_model: bool
    root_acts: tuple[bool, str]
    killers: tuple[str, ...]
    watchdog: Check


# ---- looking ----------------------------------------------------------------------------------------------


def look(
    folder: Path,
    proc: Path = observe.PROC,
    etc: Path = Path("/etc"),
    var_run: Path = Path("/var/run"),
    cuda_command: tuple[str, ...] = cuda_view.READER,
) -> Readings:
    """Read this host. `folder`: where the rootfs and the models will lie."""
    gpus, no_gpu = _gpus()
    docker = _docker()
    cdi_files, cdi_error = _cdi_files(etc / "cdi", var_run / "cdi")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Readings(
        machine=platform.machine(),
        kernel=platform.release(),
        system=_system(etc),
        meminfo=observe.meminfo(proc),
        gpus=gpus,
        no_gpu=no_gpu,
        cuda=cuda_view.once(cuda_command),
        docker=docker,
        cdi_files=cdi_files,
        cdi_error=cdi_error,
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        disks={place: _disk(Path(place)) for place in {str(folder), docker.root}},
        has_rootfs=rootfs.sidecar(folder / ROOTFS).is_file() and (folder / ROOTFS).is_dir(),
        has_model=any((folder / MODELS).glob("*/config.json")),
        root_acts=RootActs().available(),
        killers=tuple(_running(proc, KILLERS)),
        watchdog=watchdog_check(),
    )


def _gpus() -> tuple[tuple[dict[str, Any], ...], str]:
    with nvml.Reader() as reader:
        if reader.why_not is not None:
            return (), reader.why_not
        both = zip(reader.describe(), reader.read(), strict=True)
        return tuple(said | reading for said, reading in both), ""


def _docker() -> DockerFacts:
    try:
        client = image.connect(timeout_s=20)
    except UnavailableError as error:
        return DockerFacts(error=error.message, mend=error.mend or "")
    try:
        info = client.info()
        has_image = True
        try:
            image.inspect(client, IMAGE)
        except (InputError, UnavailableError):
            has_image = False
        devices = info.get("DiscoveredDevices") or ()
        return DockerFacts(
            version=info["ServerVersion"],
            runtimes=tuple(sorted(info.get("Runtimes") or ())),
            cdi_devices=tuple(each["ID"] for each in devices if each.get("Source") == "cdi"),
            has_image=has_image,
            root=info.get("DockerRootDir") or DockerFacts.root,
        )
    finally:
        client.close()


def _system(etc: Path) -> str:
    """The system's own name, and NVIDIA's release of it."""
    found = []
    for name, key in (("os-release", "PRETTY_NAME"), ("dgx-release", "DGX_SWBUILD_VERSION")):
        try:
            lines = (etc / name).read_text(errors="replace").splitlines()
        except OSError:
            continue
        pairs = dict(line.split("=", 1) for line in lines if "=" in line)
        if key in pairs:
            found.append(f"{'DGX ' if name == 'dgx-release' else ''}{pairs[key].strip(chr(34))}")
    return ", ".join(found) or "unknown"


def _cdi_files(*folders: Path) -> tuple[tuple[str, ...], str]:
    """Files of the Container Device Interface that describe an NVIDIA GPU; and what is wrong with one that should."""
    found: list[str] = []
    for folder in folders:
        try:
            for path, document in cdi.specifications(folder):
                cdi.read(document, str(path))  # or it says what is wrong
                found.append(str(path))
        except InputError as error:
            return tuple(found), error.message
    return tuple(found), ""


def _disk(place: Path) -> tuple[int, int]:
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    return there.stat().st_dev, shutil.disk_usage(there).free


def _running(proc: Path, names: tuple[str, ...]) -> Iterator[str]:
    found = set()
    for entry in proc.iterdir():
        try:
            found.add((entry / "comm").read_text(errors="replace").strip() if entry.name.isdigit() else "")
        except OSError:
            continue
    return (name for name in names if name[:15] in found)  # the kernel keeps fifteen characters


# ---- judging ----------------------------------------------------------------------------------------------


def checks(seen: Readings) -> Iterator[Check]:
    """Each line of the page, in the order a person would mend things."""
    is_arm, mend = seen.machine == "aarch64", f"a Spark is aarch64, and {PAGE} is about Sparks"
    yield _judged("machine", is_arm, seen.machine, mend, needed=True)
    yield _judged("system", seen.system.startswith("Ubuntu"), seen.system, "DGX OS is Ubuntu 24.04")
    yield _judged(
        "kernel",
        "nvidia" in seen.kernel,
        seen.kernel,
        "not NVIDIA's: boot the kernel of DGX OS (linux-nvidia)",
    )
    yield from _gpu(seen)
    yield from _unified(seen)
    yield from _memory(seen.meminfo)
    yield from _limits(seen)
    yield from _containers(seen)
    yield from _space(seen)


def _judged(name: str, good: bool, found: str, mend: str, *, needed: bool = False) -> Check:
    """A check that is ok, or else a warning; `needed`: without it nothing on the page can be done."""
    return Check(name, "ok" if good else "missing" if needed else "warn", found, "" if good else mend)


def _gpu(seen: Readings) -> Iterator[Check]:
    if not seen.gpus:
        why = seen.no_gpu or "NVML lists no GPU"
        yield _judged("gpu", False, why, "install the NVIDIA driver: nvidia-smi must answer", needed=True)
        return
    gpu = seen.gpus[0]
    name, driver = str(gpu.get("name", gpu.get("error"))), str(gpu.get("driver", "unknown"))
    mend = "on a GPU with memory of its own: experiments/discrete_gpu_control.yaml"
    yield _judged("gpu", "GB10" in name, name, mend, needed=True)
    major = driver.partition(".")[0]
    yield _judged(
        "driver", major.isdigit() and int(major) >= DRIVER, driver, f"{DRIVER} or newer: update DGX OS"
    )
    if "memory_used_bytes" in gpu:
        found = f"answers {format_bytes(gpu['memory_total_bytes'])} in all, which owners of GB10 report it does not"
        yield _judged("nvml memory", False, found, "nothing to mend; please report it: spark-ray selftest")
    else:
        yield _judged(
            "nvml memory", True, "not answered, as owners report: CUDA and /proc are read instead", ""
        )
    yield _clocks(gpu)
    others = ", ".join(str(process["pid"]) for process in gpu.get("processes", ()))
    found = f"process {others} computes now" if others else "nobody else computes"
    yield _judged("gpu processes", not others, found, "end it: each attempt waits until it is gone")


def _clocks(gpu: dict[str, Any]) -> Check:
    clock, highest, warmth = (
        gpu.get(name) for name in ("sm_clock_mhz", "max_sm_clock_mhz", "temperature_celsius")
    )
    slowed = sorted(nvml.SLOWED.intersection(gpu.get("throttle_reasons", ())))
    found = f"{clock} of {highest} MHz, {warmth} °C" + (f", held back: {', '.join(slowed)}" if slowed else "")
    if slowed or (highest is not None and highest < CLOCK_MHZ):
        return _judged(
            "clocks", False, found, "look at the power supply and the cooling; the gate waits for it"
        )
    cool = warmth is None or warmth <= COOL_CELSIUS
    return _judged("clocks", cool, found, f"the gate waits until it is {COOL_CELSIUS} °C")


def _unified(seen: Readings) -> Iterator[Check]:
    """What all of this rests on: one memory, and CUDA calls free what the kernel calls free."""
    cuda, total = seen.cuda, seen.meminfo["MemTotal"]
    if isinstance(cuda, str):
        yield _judged("cuda", False, cuda, "a driver whose libcuda.so.1 the loader finds", needed=True)
        return
    major, minor = divmod(cuda.cuda_version, 1000)
    new = cuda.cuda_version >= CUDA_VERSION
    yield _judged("cuda", new, f"driver for CUDA {major}.{minor // 10}", "13.0 or newer: update DGX OS")
    found = f"cudaMemGetInfo's total is {format_bytes(cuda.total_bytes)}, MemTotal {format_bytes(total)}"
    mend = "not one memory, or not all of it: what is predicted of page cache may not hold"
    yield _judged("unified memory", cuda.total_bytes == total, found, mend)
    found = f"cudaMemGetInfo's free is {format_bytes(cuda.free_bytes)}, MemFree {format_bytes(cuda.mem_free_bytes)}"
    same = abs(cuda.free_bytes - cuda.mem_free_bytes) <= SAME_BYTES
    yield _judged(
        "free is MemFree", same, found, "not as reported: see the page-cache part of spark-ray selftest"
    )


def _memory(info: dict[str, int]) -> Iterator[Check]:
    total, available = info["MemTotal"], info["MemAvailable"]
    found = f"{format_bytes(available)} available of {format_bytes(total)}"
    if total < MEMORY_BYTES:
        found += "; a Spark has 119.6 to 121.7 GiB"
        yield _judged("memory", False, found, f"{PAGE} is about a DGX Spark", needed=True)
    else:
        yield _judged("memory", available >= FREE_BYTES, found, "end other engines, and the desktop session")
    swap = info.get("SwapTotal", 0)
    used = swap - info.get("SwapFree", swap)
    found = f"{format_bytes(used)} of {format_bytes(swap)} used; it delays the end of memory and does not avoid it"
    yield _judged("swap", not swap, found if swap else "none", "for the time of the run: sudo swapoff -a")


def _limits(seen: Readings) -> Iterator[Check]:
    limit = "unlimited" if seen.memlock_bytes is None else format_bytes(seen.memlock_bytes)
    mend = "`* - memlock unlimited` in /etc/security/limits.d/ and a new login; or no such ulimit in the docker arm"
    yield _judged("memlock", seen.memlock_bytes is None, f"{limit} here, unlimited in the docker arm", mend)
    yield seen.watchdog
    killers = ", ".join(seen.killers)
    found = (
        f"{killers} may kill a guest from outside (`disturbed`)"
        if killers
        else "no out-of-memory daemon runs"
    )
    mend = f"for the time of the run: sudo systemctl stop {' '.join(seen.killers)}"
    yield _judged("other watchdogs", not killers, found, mend)
    possible, why = seen.root_acts
    found = f"{why}: " + (
        "page cache is dropped, a chroot entered"
        if possible
        else "no page cache is dropped, no chroot entered"
    )
    mend = f"run it with sudo, or allow `sudo -n` for this user ({PAGE}, step 2)"
    yield _judged("root acts", possible, found, mend, needed=True)


def _containers(seen: Readings) -> Iterator[Check]:
    docker = seen.docker
    if docker.error:
        yield _judged("docker", False, docker.error, docker.mend, needed=True)
        return
    yield _judged("docker", True, docker.version, "")
    devices = ", ".join(name for name in docker.cdi_devices if name.startswith("nvidia.com/gpu"))
    ways = ["the runtime nvidia"] if "nvidia" in docker.runtimes else []
    ways += [f"CDI in the daemon ({devices})"] if devices else []
    ways += [f"CDI in {', '.join(seen.cdi_files)}"] if seen.cdi_files else []
    found = "; ".join(ways) or "neither the runtime nvidia nor a CDI description of the GPU"
    mend = "sudo nvidia-ctk runtime configure --runtime=docker, then sudo systemctl restart docker"
    if seen.cdi_error:
        found, mend = f"{found}; {seen.cdi_error}", cdi.MEND
    yield _judged("docker gpu", bool(ways) and not seen.cdi_error, found, mend)
    pull, extract = typed(f"image pull {IMAGE}"), typed(f"rootfs extract {IMAGE} {ROOTFS}", sudo=True)
    yield _judged("image", docker.has_image, f"{IMAGE}{'' if docker.has_image else ' is not here yet'}", pull)
    yield _judged(
        "rootfs", seen.has_rootfs, f"{ROOTFS}{'' if seen.has_rootfs else ' is not here yet'}", extract
    )


def _space(seen: Readings) -> Iterator[Check]:
    """What is still to come, by file system."""
    folder = next((place for place in seen.disks if place != seen.docker.root), seen.docker.root)
    missing_bytes = (0 if seen.has_model else MODEL_BYTES) + (0 if seen.has_rootfs else ROOTFS_BYTES)
    wanted = {folder: RUN_BYTES + missing_bytes}
    if not seen.docker.has_image:
        wanted[seen.docker.root] = wanted.get(seen.docker.root, 0) + IMAGE_BYTES
    by_disk: dict[int, list[str]] = {}
    for place in wanted:
        by_disk.setdefault(seen.disks[place][0], []).append(place)
    for number, places in enumerate(by_disk.values()):
        need, free = sum(wanted[place] for place in places), seen.disks[places[0]][1]
        found = f"{format_bytes(free)} free at {' and '.join(places)}; about {format_bytes(need)} are to come"
        yield _judged(
            f"disk {number + 1}" if number else "disk",
            free >= need,
            found,
            "free space, or another disk",
            needed=True,
        )
