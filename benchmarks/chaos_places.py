"""Where the chaos happens: a Docker engine of the benchmark's own and a disk small enough to fill.

The machine's own Docker daemon is never touched: the private one has its own socket, data, containerd and cgroup
parent, and no network, so that it changes neither bridges nor firewall rules. As on a machine with systemd, containerd
is no child of the daemon and lives on when that dies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
START_BOUND_S = 30
CONTAINERD = """version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]
root = "{folder}/containerd"
state = "{folder}/containerd-state"
[grpc]
address = "{folder}/containerd.sock"
"""


def wait_until(condition: Callable[[], Any], bound_s: float, step_s: float = 0.02) -> Any:
    """The first true answer of `condition`, or its last answer at the bound."""
    deadline = time.monotonic() + bound_s
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(step_s)
    return found


class EngineError(Exception):
    """No private engine here, and why."""


def mounts_below(folder: Path) -> list[str]:
    """Mount points in or at a folder, the innermost first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].replace("\\040", " ") for line in lines]
    return sorted((point for point in points if Path(point).is_relative_to(folder)), key=len, reverse=True)


class Engine:
    """A private Docker daemon that is killed and started again at will. DOCKER_HOST names it while it is open."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            raise EngineError("not root")
        if missing := [name for name in ("dockerd", "containerd") if shutil.which(name) is None]:
            raise EngineError(f"there is no program {' and no '.join(missing)}")
        self.folder = folder
        self.cgroup = f"spark_ray_chaos-{os.getpid()}"
        self._process: subprocess.Popen[bytes] | None = None
        self._containerd: subprocess.Popen[bytes] | None = None
        self._host_before = os.environ.get("DOCKER_HOST")
        self.client: Any = None
        folder.mkdir(parents=True)
        try:
            (folder / "containerd.toml").write_text(CONTAINERD.format(folder=folder))
            self._containerd = self._spawn(["containerd", "--config", f"{folder}/containerd.toml"])
            wait_until((folder / "containerd.sock").exists, START_BOUND_S)
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        import docker

        command = [
            # A network namespace of its own: a daemon without a bridge removes docker0, which is another daemon's.
            "unshare", "--net", "dockerd", "--host", self.url, "--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec",
            "--pidfile", f"{self.folder}/pid", "--containerd", f"{self.folder}/containerd.sock",
            "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false",
            "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{self.cgroup}",
        ]  # fmt: skip
        self._process = self._spawn(command)
        wait_until(lambda: self._listens() or self._process.poll() is not None, START_BOUND_S, step_s=0.05)
        if not self._listens():
            last = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
            raise EngineError(f"a private dockerd does not start: {' '.join(last)}")
        self._hang_up()
        self.client = docker.DockerClient(base_url=self.url, timeout=60)
        self.client.ping()
        os.environ["DOCKER_HOST"] = self.url

    def _listens(self) -> bool:
        """A killed daemon leaves its socket behind: that it is there says nothing."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"{self.folder}/docker.sock")
            return True
        return False

    def _hang_up(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )

    def stop(self, number: int) -> None:
        """End the daemon by a signal, and wait until it has ended."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            self._process.wait(timeout=60)

    def running(self, run: Path) -> list[str]:
        """Ids of the running containers of a run."""
        return self._containers(run, everything=False)

    def containers(self, run: Path) -> list[str]:
        """Ids of the containers of a run, stopped ones included."""
        return self._containers(run, everything=True)

    def _containers(self, run: Path, *, everything: bool) -> list[str]:
        found = self.client.api.containers(all=everything, filters={"label": f"spark_ray.run={run}"})
        return [container["Id"] for container in found]

    def cgroups(self) -> list[Path]:
        """Groups of containers, of every controller, that exist now."""
        homes = [CGROUPS / self.cgroup, *CGROUPS.glob(f"*/{self.cgroup}")]
        return [path for home in homes if home.is_dir() for path in home.iterdir() if path.is_dir()]

    def trees(self) -> list[str]:
        """Mounted container trees."""
        return [point for point in mounts_below(self.folder / "data") if point.endswith("/merged")]

    def close(self) -> None:
        """End the daemon, and take away whatever it left: shims, mounts, groups, folder."""
        if self.client is not None:
            with contextlib.suppress(Exception):
                for container in self.client.api.containers(all=True):
                    self.client.api.remove_container(container["Id"], force=True)
            self._hang_up()
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGTERM)
        if self._containerd is not None:
            self._containerd.kill()
            self._containerd.wait()
        self._end_shims()
        self._end_groups()
        for point in mounts_below(self.folder):
            subprocess.run(["umount", "--lazy", point], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.pop("DOCKER_HOST", None)
        if self._host_before is not None:
            os.environ["DOCKER_HOST"] = self._host_before

    def _end_groups(self) -> None:
        """A container whose daemon could not end it: its processes, then its groups."""
        homes = [CGROUPS / self.cgroup, *CGROUPS.glob(f"*/{self.cgroup}")]
        for procs in [path for home in homes for path in home.glob("*/cgroup.procs")]:
            with contextlib.suppress(OSError):
                for pid in procs.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
        for path in [*(group for home in homes for group in home.glob("*/")), *homes]:
            wait_until(lambda path=path: not path.is_dir() or _removed(path), 2)  # type: ignore[misc]

    def _end_shims(self) -> None:
        """What a killed daemon left: a container's shim names our folder in its command."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != os.getpid():
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    ours = command[0].endswith(b"containerd-shim-runc-v2")
                    if ours and any(word.startswith(os.fsencode(self.folder)) for word in command):
                        os.kill(int(entry.name), signal.SIGKILL)


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):  # busy for as long as a process in it is dying
        group.rmdir()
    return not group.exists()


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A real file system of its own at `folder`, as full as it gets in a moment."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "spark_ray_chaos", str(folder)],
        check=True,
        capture_output=True,
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(disk: Path) -> Path:
    """Write until nothing more goes in, down to the last page; returns the file that holds it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(size))
    return filler
