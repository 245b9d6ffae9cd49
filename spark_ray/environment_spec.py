"""Environments as an experiment names them: how a worker is separated from its host, switch by switch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from .spec import Flag, SizeBytes, Spec, distinct


class NativeEnvironment(Spec):
    kind: Literal["native"] = Field(description="a plain process of this host")

    @property
    def sees_gpu(self) -> bool:
        return True


class ChrootEnvironment(Spec):
    kind: Literal["chroot"] = Field(description="another root folder, in its own mount namespace; as root")
    rootfs: str = Field(
        default="host", description='a folder, or "host": made from this interpreter (spark-ray rootfs build)'
    )
    python: str | None = Field(
        default=None, description="interpreter inside; default: what the rootfs says, else python3"
    )
    gpus: Literal["all"] | None = Field(
        default=None, description="bind the host's NVIDIA driver libraries into it; /dev is the host's anyway"
    )

    @property
    def sees_gpu(self) -> bool:
        return self.gpus is not None


class IsolatedEnvironment(Spec):
    """The steps between native and docker, each a switch of its own: none implies another."""

    kind: Literal["isolated"] = Field(
        description="a host process, separated by the mechanisms named here; as root"
    )
    root: Literal["host", "chroot", "overlay"] = Field(
        default="chroot",
        description="host: this host's own root folder; chroot: the rootfs; overlay: a fresh writable layer over it, "
        "as a container has",
    )
    rootfs: str = Field(
        default="host", description='a folder, or "host": made from this interpreter (spark-ray rootfs build)'
    )
    python: str | None = Field(
        default=None, description="interpreter inside; default: what the rootfs says, else python3"
    )
    cgroup: Flag = Field(
        default=False, description="a memory cgroup of its own, which accounts and limits nothing"
    )
    memory: SizeBytes | None = Field(default=None, description="limit of its cgroup; needs cgroup: true")
    namespaces: Annotated[
        tuple[Literal["pid", "ipc", "uts", "net", "cgroup"], ...], AfterValidator(distinct)
    ] = Field(default=(), description="own namespaces beside that of mounts, which every isolated worker has")
    gpus: Literal["all"] | None = Field(
        default=None, description="bind the host's NVIDIA driver libraries into it; /dev is the host's anyway"
    )

    @model_validator(mode="after")
    def _limit_has_a_group(self) -> Self:
        if self.memory is not None and not self.cgroup:
            raise ValueError("memory is the limit of a cgroup: say cgroup: true")
        return self

    @property
    def sees_gpu(self) -> bool:
        return self.root == "host" or self.gpus is not None


class DockerEnvironment(Spec):
    """A container made through the Docker Engine API. Defaults are the tight ones; each key is one docker flag."""

    kind: Literal["docker"]
    image: str = Field(
        default="host", description='an image present in the engine, or "host": made from the host rootfs'
    )
    python: str | None = Field(
        default=None, description="interpreter inside; default: what the rootfs says, else python3"
    )
    memory: SizeBytes | None = Field(default=None, description="--memory: limit of its cgroup")
    memory_swap: SizeBytes | None = Field(default=None, description="--memory-swap: memory plus swap")
    shm_size: SizeBytes | None = Field(default=None, description="--shm-size: size of /dev/shm")
    ipc: Literal["private", "host", "shareable", "none"] | None = Field(default=None, description="--ipc")
    pid: Literal["host"] | None = Field(default=None, description="--pid: host, or a namespace of its own")
    network: Literal["none", "host", "bridge"] = Field(default="none", description="--network")
    cpuset_cpus: str | None = Field(default=None, description="--cpuset-cpus, such as 0-3")
    cgroup_parent: str | None = Field(default=None, description="--cgroup-parent: the cgroup it is put under")
    ulimits: dict[str, Annotated[int, Field(ge=-1, strict=True)]] = Field(
        default_factory=dict, description="soft = hard limit by name; -1 is unlimited"
    )
    privileged: Flag = Field(default=False, description="--privileged: all capabilities and devices")
    cap_add: tuple[str, ...] = Field(default=(), description="--cap-add: capabilities given")
    cap_drop: tuple[str, ...] = Field(default=("ALL",), description="--cap-drop: capabilities taken away")
    no_new_privileges: Flag = Field(default=True, description="no set-user-ID program gains anything")
    read_only: Flag = Field(default=True, description="--read-only: its root file system")
    gpus: Literal["all"] | None = Field(
        default=None,
        description="--gpus; where the daemon has no NVIDIA toolkit, the driver's libraries and device nodes",
    )

    @property
    def sees_gpu(self) -> bool:
        return self.gpus is not None


class PodmanEnvironment(Spec):
    """A container made by podman, without a daemon, straight from the rootfs folder. Each key is one podman flag.

    No capability, no new privileges, a read-only root: as docker's defaults here.
    """

    kind: Literal["podman"]
    rootfs: str = Field(
        default="host", description='a folder, or "host": made from this interpreter (spark-ray rootfs build)'
    )
    python: str | None = Field(
        default=None, description="interpreter inside; default: what the rootfs says, else python3"
    )
    runtime: Literal["runc", "crun"] | None = Field(  # no other text: podman would execute a path, as root
        default=None, description="--runtime: what makes the container; default: podman's own"
    )
    memory: SizeBytes | None = Field(default=None, description="--memory: limit of its cgroup")
    shm_size: SizeBytes | None = Field(default=None, description="--shm-size: size of /dev/shm")
    ipc: Literal["private", "host"] | None = Field(default=None, description="--ipc")
    network: Literal["none", "host"] = Field(default="none", description="--network")
    ulimits: dict[str, Annotated[int, Field(ge=-1, strict=True)]] = Field(
        default_factory=dict, description="soft = hard limit by name; -1 is unlimited"
    )

    @property
    def sees_gpu(self) -> bool:
        return False


Environment = Annotated[
    NativeEnvironment | ChrootEnvironment | IsolatedEnvironment | DockerEnvironment | PodmanEnvironment,
    Field(discriminator="kind"),
]
