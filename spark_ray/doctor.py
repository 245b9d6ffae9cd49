"""What this host has and lacks, and the command that mends it: for an experiment, only what it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from . import content, host, image, rootfs
from .errors import SparkRayError, UnavailableError
from .experiment import DockerEnvironment, Experiment
from .rootact import RootActs
from .units import GIB, format_bytes
from .worker import observe

Status = Literal["ok", "warn", "missing"]


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    found: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def checks(experiment: Experiment | None, runs: Path) -> Iterator[Check]:
    """Every check that applies, in the order a person would mend things."""
    kinds = (
        {arm.environment.kind for arm in experiment.arms.values()}
        if experiment
        else {"native", "chroot", "docker"}
    )
    yield _python()
    yield _package("ray", "ray", "pip install -c constraints.txt -e .")
    yield from _engine(experiment)
    yield from _memory()
    yield _cgroup()
    yield _disk(runs)
    yield _root(needed="chroot" in kinds)
    if "chroot" in kinds or "docker" in kinds:
        yield _host_rootfs()
    if "docker" in kinds:
        yield from _docker(experiment)
    yield from _gpu()


def _python() -> Check:
    version, virtual = platform.python_version(), sys.prefix != sys.base_prefix
    found = f"{version} at {sys.executable}"
    if not virtual:
        return Check("python", "warn", found + ", not a virtual environment", "python3 -m venv .venv")
    return Check("python", "ok", found)


def _package(name: str, module: str, mend: str) -> Check:
    if importlib.util.find_spec(module) is None:
        return Check(name, "missing", "not installed", mend)
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "ok", "present, version unknown")


def _engine(experiment: Experiment | None) -> Iterator[Check]:
    if experiment is None or experiment.engine.kind == "embedded":
        for name in ("torch", "transformers"):
            yield _package(name, name, "pip install -c constraints.txt -e '.[embedded]'")
    if experiment is not None and experiment.model is not None:
        problems = content.model_problems(experiment.model)
        for problem in problems:
            yield Check("model", "missing", problem.what, problem.mend)
        if not problems:
            making = content.model_to_make(experiment)
            yield Check("model", "ok", f"will be made in {making}" if making else "present")


def _memory() -> Iterator[Check]:
    info = observe.meminfo()
    cached = info["Cached"] + info["Buffers"] - info["Shmem"]
    found = f"{format_bytes(info['MemFree'])} free, {format_bytes(cached)} page cache, of {format_bytes(info['MemTotal'])}"
    yield Check("memory", "ok" if info["MemAvailable"] > 2 * GIB else "warn", found, "end other programs")
    try:
        waiting = observe.per_cpu_free_bytes()
        many = waiting > 0.02 * info["MemTotal"]
        yield Check(
            "per-CPU lists", "warn" if many else "ok", f"{format_bytes(waiting)} of freed memory outside MemFree",
            "treatment per_cpu_pages: drained (the default as root)" if many else "",
        )  # fmt: skip
    except OSError as error:
        yield Check(
            "per-CPU lists",
            "warn",
            f"/proc/zoneinfo: {error.strerror}",
            "their size is then part of the residual",
        )
    if info["SwapTotal"]:
        used = info["SwapTotal"] - info["SwapFree"]
        status: Status = "warn" if used else "ok"
        yield Check(
            "swap",
            status,
            f"{format_bytes(used)} of {format_bytes(info['SwapTotal'])} used",
            "swapoff -a && swapon -a",
        )
    else:
        yield Check("swap", "ok", "none")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    yield Check("memlock", "ok", "unlimited" if limit == resource.RLIM_INFINITY else format_bytes(limit))
    pressure = observe.pressure()
    yield Check(
        "pressure",
        "ok" if pressure else "warn",
        "readable" if pressure else "this kernel has no PSI: stalls go unseen",
    )


def _cgroup() -> Check:
    group = observe.cgroup()
    if "absent" in group and "usage_bytes" not in group:
        return Check("cgroup", "warn", str(group["absent"]), "the cgroup terms will be absent from records")
    peak = "peak readable" if "peak_bytes" in group else "no peak counter"
    limit = format_bytes(group["limit_bytes"]) if "limit_bytes" in group else "no limit"
    return Check("cgroup", "ok", f"v{group['version']}, this process in {group['path']}, {limit}, {peak}")


def _disk(runs: Path) -> Check:
    there = next(folder for folder in [runs, *runs.parents] if folder.exists())
    free = shutil.disk_usage(there).free
    return Check(
        "disk",
        "ok" if free > 5 * GIB else "warn",
        f"{format_bytes(free)} free at {there}",
        "free space, or --out on another disk",
    )


def _root(*, needed: bool) -> Check:
    available, reason = RootActs().available()
    if available:
        return Check("root acts", "ok", reason)
    status: Status = "missing" if needed else "warn"
    return Check("root acts", status, reason, "run as root, or allow `sudo -n` for this user")


def _host_rootfs() -> Check:
    folder = content.cache_folder() / "rootfs"
    built = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            built.append(rootfs.load(path.with_suffix("")).path.name)
        except SparkRayError:
            continue
    return Check(
        "host rootfs",
        "ok",
        f"{len(built)} built in {folder}" if built else "will be built on first use (about 10 s)",
    )


# ---- Docker -----------------------------------------------------------------------------------------------

FLAGS: dict[str, dict[str, Any]] = {
    "--memory 64m": {"mem_limit": 64 << 20},
    "--ipc=host": {"ipc_mode": "host"},
    "--pid=host": {"pid_mode": "host"},
    "--shm-size 64m": {"shm_size": 64 << 20},
    "--network=host": {"network_mode": "host"},
    "--network=bridge": {"network_mode": "bridge"},
    "--cpuset-cpus 0": {"cpuset_cpus": "0"},
    "--cap-add IPC_LOCK": {"cap_add": ["IPC_LOCK"]},
    "--cap-add SYS_RESOURCE": {"cap_add": ["SYS_RESOURCE"]},
    "--cap-drop ALL --read-only --security-opt no-new-privileges": {
        "cap_drop": ["ALL"], "read_only": True, "security_opt": ["no-new-privileges"],
    },
    "--privileged": {"privileged": True},
    "--ulimit memlock=-1": {"ulimits": {"memlock": -1}},
    "--ulimit nofile=65536": {"ulimits": {"nofile": 65536}},
}  # fmt: skip


def _docker(experiment: Experiment | None) -> Iterator[Check]:
    try:
        client = image.connect(timeout_s=20)
    except UnavailableError as error:
        yield Check("docker", "missing", error.message, error.mend or "")
        return
    try:
        info = client.info()
        found = f"{info['ServerVersion']}, {info['Driver']}, cgroup v{info.get('CgroupVersion', '1')}"
        yield Check("docker", "ok", found)
        wanted = [arm.environment for arm in experiment.arms.values()] if experiment else []
        for spec in wanted:
            if isinstance(spec, DockerEnvironment) and spec.image != "host":
                yield _image(client, spec.image)
        if experiment is None:
            yield from _flags(client)
    finally:
        client.close()


def _image(client: Any, reference: str) -> Check:
    try:
        return Check(f"image {reference}", "ok", image.inspect(client, reference).image.id[:19])
    except UnavailableError as error:
        return Check(f"image {reference}", "missing", error.message, error.mend or "")


def _flags(client: Any) -> Iterator[Check]:
    """Each flag tried on a container of the host image; what the daemon refuses is named in its own words."""
    tree = rootfs.build_host(content.cache_folder() / "rootfs")
    made = image.build(client, tree)
    for flag, settings in FLAGS.items():
        refusal = image.try_flag(client, made.id, settings)
        mend = "do without this flag, or give the daemon what it lacks" if refusal else ""
        yield Check(f"docker {flag}", "warn" if refusal else "ok", refusal or "works", mend)


# ---- GPU --------------------------------------------------------------------------------------------------


def _gpu() -> Iterator[Check]:
    fields = host.nvml_fields()
    if isinstance(fields, str):
        yield Check("gpu", "warn", fields, "only needed for engines on a GPU")
        return
    for device, answers in fields.items():
        good = sorted(name for name, answer in answers.items() if answer is None)
        bad = [f"{name} ({answer})" for name, answer in sorted(answers.items()) if answer is not None]
        found = f"answers {', '.join(good)}" + (f"; not {', '.join(bad)}" if bad else "")
        yield Check(
            f"gpu {device}",
            "warn" if bad else "ok",
            found,
            "memory then comes from CUDA and /proc (GB10)" if bad else "",
        )


def worst(found: list[Check]) -> Status:
    for status in ("missing", "warn"):
        if any(check.status == status for check in found):
            return status
    return "ok"


def environment_summary() -> dict[str, str]:
    """Versions for a bug report."""
    names = ("spark_ray", "ray", "optuna", "docker", "torch", "transformers")
    found = {"python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"user": "root" if os.geteuid() == 0 else "not root"}
