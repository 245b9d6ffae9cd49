"""What this host has and lacks, and the command that mends it: for an experiment, only what it needs.

What is required is `missing` when it is not there. Without an experiment nothing but the programs of this package is:
two native arms always exist.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from . import capabilities, content, image, nvml, preview, rootfs, watchdog
from .cluster import one_local_node
from .environment_spec import DockerEnvironment
from .environments import isolated
from .errors import InputError, SparkRayError, UnavailableError
from .experiment import Arm, Experiment
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


def checks(
    experiment: Experiment | None,
    runs: Path,
    say: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> Iterator[Check]:
    """Every check that applies, in the order a person would mend things. `say` is told what takes a while."""
    kinds = (
        {arm.environment.kind for arm in experiment.arms.values()}
        if experiment
        else {"native", "chroot", "isolated", "docker"}
    )
    required = {arm.environment.kind for arm in _required_arms(experiment).values()}
    yield _python()
    yield _package("ray", "ray", "pip install -c constraints.txt -e .")
    yield from _engine(experiment)
    yield from _memory()
    yield from _cgroup()
    yield watchdog_check()
    yield _disk(runs)
    yield _root(needed=bool({"chroot", "isolated"} & required))
    if {"chroot", "isolated"} & kinds:
        yield from _isolation()
    if _on_host_tree(experiment):
        yield _host_rootfs()
    if "docker" in kinds:
        yield from _docker(experiment, "docker" in required, say)
    if experiment is None or _wants_gpu(experiment):
        yield from _gpu(needed=experiment is not None)
    if experiment is not None:
        yield from _arms(experiment)
        yield from _trees(experiment)


def _required_arms(experiment: Experiment | None) -> dict[str, Arm]:
    """Arms without which the experiment is refused."""
    if experiment is None:
        return {}
    compared = set(vars(experiment.compared).values())
    return {name: arm for name, arm in experiment.arms.items() if arm.required or name in compared}


def _wants_gpu(experiment: Experiment) -> bool:
    on_gpu = (experiment.engine_of(name).needs_gpu for name in experiment.arms)
    granted = (getattr(arm.environment, "gpus", None) for arm in experiment.arms.values())
    return any(on_gpu) or any(granted)


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
    for problem in content.engine_problems(experiment) if experiment is not None else ():
        yield Check("engine", "missing", problem.what, problem.mend)
    if experiment is not None and experiment.model is not None:
        problems = content.model_problems(experiment)
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


def watchdog_check() -> Check:
    """What protects the process that kills a guest before this host is out of memory."""
    lacking = [f"{name}: {why}" for name, why in watchdog.try_out().items() if why is not True]
    if not lacking:
        return Check("watchdog", "ok", "outside every memory group, locked, spared by the kernel")
    return Check(
        "watchdog",
        "warn",
        "; ".join(lacking),
        "run as root with CAP_SYS_RESOURCE and CAP_IPC_LOCK: short of memory it may otherwise be slow, or the victim",
    )


CONTROLLERS = {"memory": "docker arms with a limit and the cgroup terms", "cpuset": "cpuset_cpus"}


def _cgroup() -> Iterator[Check]:
    group = observe.cgroup()
    if "absent" in group and "usage_bytes" not in group:
        absent = ", ".join(f"{name}: {why}" for name, why in group["absent"].items())
        yield Check("cgroup", "warn", absent, "the cgroup terms will be absent from records")
    else:
        peak = "peak readable" if "peak_bytes" in group else "no peak counter"
        limit = format_bytes(group["limit_bytes"]) if "limit_bytes" in group else "no limit"
        yield Check("cgroup", "ok", f"v{group['version']}, {limit}, {peak}, this process in {group['path']}")
    enabled = cgroup_controllers(int(group.get("version", 2)))
    lacking = [f"{name} (for {use})" for name, use in CONTROLLERS.items() if name not in enabled]
    found = f"{', '.join(sorted(enabled)) or 'none'}"
    if lacking:
        found += f"; not {', '.join(lacking)}"
    yield Check(
        "cgroup controllers", "warn" if lacking else "ok", found,
        "enable them on the kernel's command line: cgroup_enable=memory" if lacking else "",
    )  # fmt: skip


def cgroup_controllers(version: int, proc: Path = Path("/proc"), top: Path = observe.CGROUP) -> set[str]:
    """Controllers that are enabled: v1 mounts each as a hierarchy of its own, v2 lists them at the mount's top."""
    try:
        if version == 2:
            return set((top / "cgroup.controllers").read_text().split())
        rows = [line.split() for line in (proc / "cgroups").read_text().splitlines() if line[:1] != "#"]
    except OSError:
        return set()
    return {row[0] for row in rows if row[3] == "1" and row[1] != "0"}


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


def _isolation() -> Iterator[Check]:
    """Each way of separating a worker, tried for real; an arm that needs one that fails says so itself."""
    acts = RootActs()
    if not acts.available()[0]:
        return
    cache = content.cache_folder()
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    try:
        failed = acts.isolation(there)
    except UnavailableError as error:
        yield Check("isolation", "warn", error.message, error.mend or "")
        return
    works = [way for way in isolated.SWITCHES if way not in failed]
    yield Check("isolation", "ok" if works else "warn", f"works: {', '.join(works) or 'nothing'}")
    for way, reason in failed.items():
        yield Check(
            f"isolation {way}", "warn", reason, f"arms with {isolated.SWITCHES[way]} are not possible here"
        )


def _on_host_tree(experiment: Experiment | None) -> bool:
    return experiment is None or any(
        content.on_host_tree(arm.environment) for arm in experiment.arms.values()
    )


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
    "defaults of docker arms": {
        "cap_drop": ["ALL"], "read_only": True, "security_opt": ["no-new-privileges"],
    },
    "--privileged": {"privileged": True},
    "--ulimit memlock=-1": {"ulimits": {"memlock": -1}},
    "--ulimit nofile=65536": {"ulimits": {"nofile": 65536}},
}  # fmt: skip


def _docker(experiment: Experiment | None, needed: bool, say: Callable[[str], None]) -> Iterator[Check]:
    try:
        client = image.connect(timeout_s=20)
    except UnavailableError as error:
        yield Check("docker", "missing" if needed else "warn", error.message, error.mend or "")
        return
    try:
        info = client.info()
        found = f"{info['ServerVersion']}, {info['Driver']}, cgroup v{info.get('CgroupVersion', '1')}"
        yield Check("docker", "ok", found)
        arms = list(experiment.arms.values()) if experiment else []
        specs = [arm.environment for arm in arms if isinstance(arm.environment, DockerEnvironment)]
        for reference in sorted({spec.image for spec in specs if spec.image != "host"}):
            yield _image(client, reference, needed)
        if experiment is None or any(spec.image == "host" for spec in specs):
            say("making the host rootfs and its Docker image, unless they are there, to try flags on ...")
            made = image.build(client, rootfs.build_host(content.cache_folder() / "rootfs"))
            yield Check("docker image host", "ok", f"{made.reference}, {made.id[:19]}")
            if experiment is None:
                say(f"trying {len(FLAGS)} flags ...")
                yield from _flags(client, made.id)
    finally:
        client.close()


def _image(client: Any, reference: str, needed: bool) -> Check:
    try:
        return Check(f"image {reference}", "ok", image.inspect(client, reference).image.id[:19])
    except (InputError, UnavailableError) as error:
        return Check(f"image {reference}", "missing" if needed else "warn", error.message, error.mend or "")


def _flags(client: Any, image_id: str) -> Iterator[Check]:
    """Each flag tried on a container of the host image; what the daemon refuses is named in its own words."""
    for flag, settings in FLAGS.items():
        refusal = image.try_flag(client, image_id, settings)
        if refusal is None:
            yield Check(f"docker {flag}", "ok", "works")
        else:
            yield Check(f"docker {flag}", "warn", *capabilities.explain(refusal, settings))


def _arms(experiment: Experiment) -> Iterator[Check]:
    """What the plan says of each arm: the environment, the flags it uses, the treatment it asks for."""
    required = _required_arms(experiment)
    plan = preview.preview(experiment, one_local_node(), preview.probe(experiment))
    for arm in plan.arms:
        if arm.available:
            yield Check(f"arm {arm.name}", "ok", arm.what)
            continue
        found = "; ".join(problem.what for problem in arm.problems)
        mend = "; ".join(dict.fromkeys(problem.mend for problem in arm.problems))
        yield Check(f"arm {arm.name}", "missing" if arm.name in required else "warn", found, mend)


def _trees(experiment: Experiment) -> Iterator[Check]:
    """What can be seen in the trees of vendor images; what is missing in one is said with its arm."""
    for name, arm in experiment.arms.items():
        with contextlib.suppress(SparkRayError):
            for seen in content.tree_findings(
                arm.environment, content.library_of(experiment.engine_of(name))
            ):
                if seen.status != "missing":
                    yield Check(f"{name}: {seen.name}", seen.status, seen.found, seen.mend)


# ---- GPU --------------------------------------------------------------------------------------------------


def _gpu(*, needed: bool) -> Iterator[Check]:
    fields = nvml.fields()
    if isinstance(fields, str):
        mend = "install the NVIDIA driver (nvidia-smi must answer)"
        if needed:
            yield Check("gpu", "missing", fields, mend)
        else:
            yield Check("gpu", "warn", fields, f"only needed for engines on a GPU: {mend}")
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
