"""A running worker, seen from the host: one interface for a host process and for a container.

`control` is a file descriptor to poll; `read` gives what the worker wrote on its control channel; `answer` lets it
go on. `end` kills whatever is left and says how it ended. Closing the host side ends the worker by itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from . import guestfiles, image
from .environments import Start
from .errors import UnavailableError
from .group import Group
from .worker import observe
from .worker.observe import descendants


class StartError(Exception):
    """The worker was not started: refused by the environment, or (not `refused`) the environment does not answer."""

    def __init__(self, message: str, *, refused: bool = True) -> None:
        super().__init__(message)
        self.refused = refused


class EnvironmentLostError(Exception):
    """What runs the worker does not answer any more: nothing can be said about the worker."""


PATIENCE_S = (120, 30)
"""How long a guest that has said its last word may take to end, and once more after it was killed: an engine's memory of
100 GiB and more is taken down in that time, and to kill what takes it down would leave it there."""


@dataclass(frozen=True)
class Ended:
    """How a worker ended: 128 + n after signal n; None when nobody can say."""

    exit_code: int | None
    details: dict[str, Any]


class Guest(Protocol):
    control: int

    def read(self) -> bytes: ...
    def answer(self) -> None: ...
    def pid_of(self, told: int) -> int: ...
    def identity(self) -> dict[str, Any]: ...
    def kill(self) -> None: ...
    def end(self) -> Ended: ...


def _has_room(stream: Any) -> bool:
    """Whether an answer can be written without waiting: who floods us and reads none must not hold the host."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(0))


def _signal_to_code(code: int) -> int:
    return 128 - code if code < 0 else code


class ProcessGuest:
    """A host process (native, chroot, isolated) in its own session; standard error goes straight to the log."""

    def __init__(self, start: Start, log: Path) -> None:
        self._group = _make_group(start)
        self._own_pids = "pid" in (start.enter or {}).get("namespaces", ())
        self._worker: int | None = None
        with log.open("ab") as stream:
            try:
                self._process = subprocess.Popen(
                    start.argv, env=start.variables, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=stream, bufsize=0, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                if self._group is not None:
                    self._group.finish()
                raise StartError(f"{start.argv[0]}: {error.strerror}") from error
        assert self._process.stdout is not None  # noqa: S101  piped above
        self._out: IO[bytes] = self._process.stdout
        self.control = self._out.fileno()

    def read(self) -> bytes:
        return os.read(self.control, 65536)

    def answer(self) -> None:
        assert self._process.stdin is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):
            if _has_room(self._process.stdin):
                self._process.stdin.write(b"go\n")

    def pid_of(self, told: int) -> int:
        """The worker only knows its number inside its own pid namespace, where it has one.

        A guest that names another process would be seen in that one's place: only its own are asked.
        """
        for pid in descendants(self._process.pid):
            numbers = _numbers(pid)
            if numbers[-1:] == [told] and (len(numbers) > 1) == self._own_pids:
                self._worker = pid
                return pid
        raise ProcessLookupError

    def identity(self) -> dict[str, Any]:
        """What the environment's switches are checked by, beside namespaces and root."""
        found: dict[str, Any] = {"pid": self._process.pid}
        with contextlib.suppress(OSError):
            found["launcher_memory_group"] = observe.cgroup_path("self")[1]
            if self._worker is not None:
                found["memory_group"] = observe.cgroup_path(self._worker)[1]
                found["root_filesystem"] = _root_filesystem(self._worker)
            if self._group is not None and (limit := self._group.limit_bytes()) is not None:
                found["group_limit_bytes"] = limit
        return found

    def kill(self) -> None:
        """Kill the supervisor: its worker follows by parent-death signal, the rest of the session by the group.

        What started a session of its own (MPI's daemon with the ranks below it) is killed one by one. It is looked for
        first: nobody finds what a dead supervisor would have collected.
        """
        tree = descendants(self._process.pid)[1:] if self._process.returncode is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in tree:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _wait(self, longest_s: float) -> int:
        """As Popen.wait(timeout), but woken by the end itself: that one looks now and then, up to 50 ms late."""
        try:
            handle = os.pidfd_open(self._process.pid)
        except OSError:  # an old kernel, or a seccomp profile
            return self._process.wait(timeout=longest_s)
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll(int(longest_s * 1000))
        finally:
            os.close(handle)
        return self._process.wait(timeout=0)

    def end(self) -> Ended:
        """Collect the status; what may be left of the session is killed.

        Standard input stays open until then: closing it tells the supervisor that the host is gone, and a worker
        that has just closed its control channel is not yet a dead one.
        """
        assert self._process.stdin is not None  # noqa: S101
        code: int | None = None
        details: dict[str, Any] = {}
        for patience_s in PATIENCE_S:
            try:
                code = _signal_to_code(self._wait(patience_s))
                break
            except subprocess.TimeoutExpired:  # after the second: in the kernel, uninterruptible
                self.kill()
                details["killed_by_host"] = True
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self.kill()
        self._out.close()
        return Ended(code, details | (self._group.finish() if self._group is not None else {}))


def _make_group(start: Start) -> Group | None:
    if start.group is None:
        return None
    try:
        return Group(start.group.name, start.group.limit_bytes, start.group.root_argv)
    except (UnavailableError, OSError) as error:
        raise StartError(str(error)) from error


def known_inside(first: int, told: int) -> int:
    """The process of a container's tree that has this number there: what an entrypoint started beside it has another."""
    for pid in descendants(first):
        if _numbers(pid)[-1:] == [told]:
            return pid
    raise ProcessLookupError(told)


def _numbers(pid: int) -> list[int]:
    """Process ids of one process, from our own pid namespace inwards; empty when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
    return []


def _root_filesystem(pid: int) -> str | None:
    """Type of the file system that a process has as its root; None where its root is a folder inside one."""
    kind = None
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == "/":
            kind = fields[fields.index("-") + 1]  # the last one lies on top
    return kind


class ContainerGuest:
    """A container with our labels. Its removal is certain once `end` has run; until then nothing removes it."""

    def __init__(self, start: Start, log: Path, client: Any) -> None:
        assert start.container is not None  # noqa: S101
        self._log = log
        self._client = client
        self._api = client.api
        self._errors = _docker_errors()
        self._buffer = b""
        self._keep: Any = None
        self._socket: Any = None
        try:
            self.container_id = self._create(start.container)
        except self._errors as error:
            raise _start_error(error) from error
        try:
            stream = self._api.attach_socket(
                self.container_id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            )
            self._keep = stream  # owns the descriptor
            self._socket = getattr(stream, "_sock", stream)
            self._api.start(self.container_id)
        except self._errors as error:
            self._remove()
            self._hang_up()
            raise _start_error(error) from error
        self._socket.setblocking(True)
        self.control = self._socket.fileno()

    def _create(self, container: dict[str, Any]) -> str:
        # detach=False sets StdinOnce: when our connection ends, so does the worker's standard input.
        created = self._api.create_container(
            container["image"], command=container["command"], environment=container["environment"],
            user=container["user"], working_dir=container["working_dir"], labels=container["labels"],
            stdin_open=True, detach=False, tty=False, host_config=image.host_config(self._client, container["host_config"]),
            network_disabled=False,
        )  # fmt: skip
        return str(created["Id"])

    def read(self) -> bytes:
        """Control lines from standard output; standard error goes to the log. Frames have an 8-byte header."""
        try:
            piece = self._socket.recv(65536)
        except OSError:  # the daemon went away
            return b""
        if not piece:
            return b""
        self._buffer += piece
        out = b""
        while len(self._buffer) >= 8:
            kind, size = struct.unpack(">BxxxL", self._buffer[:8])
            if len(self._buffer) < 8 + size:
                break
            payload, self._buffer = self._buffer[8 : 8 + size], self._buffer[8 + size :]
            if kind == 2:
                guestfiles.append(self._log, payload)
            else:
                out += payload
        return out or b"\n"

    def answer(self) -> None:
        with contextlib.suppress(OSError):
            if _has_room(self._socket):
                self._socket.sendall(b"go\n")

    def pid_of(self, told: int) -> int:
        """The worker only knows its number inside."""
        try:
            first = int(self._api.inspect_container(self.container_id)["State"]["Pid"])
        except self._errors as error:
            raise EnvironmentLostError(_explain(error)) from error
        if first == 0:
            raise ProcessLookupError
        return known_inside(first, told)

    def identity(self) -> dict[str, Any]:
        return {"container_id": self.container_id}

    def kill(self) -> None:
        with contextlib.suppress(*self._errors):
            self._api.kill(self.container_id)

    def end(self) -> Ended:
        """Status and OOMKilled, then removal."""
        details: dict[str, Any] = {"container_id": self.container_id}
        code: int | None = None
        started = time.monotonic()
        try:
            try:
                self._api.wait(self.container_id, timeout=PATIENCE_S[0])
            except Exception:  # noqa: BLE001  requests raises several kinds for a timeout
                self.kill()
                if time.monotonic() - started >= PATIENCE_S[0]:  # else it is the daemon that went away
                    details["killed_by_host"] = True
                self._api.wait(self.container_id, timeout=PATIENCE_S[1])
            state = self._api.inspect_container(self.container_id)["State"]
            code = int(state["ExitCode"])
            details |= {"oom_killed": bool(state["OOMKilled"]), "error": state.get("Error", "")}
        except Exception as error:  # noqa: BLE001  the daemon may be gone: the attempt is then void, not the run
            details["inspect_error"] = _explain(error)
        self._remove()
        self._hang_up()
        return Ended(code, details)

    def _hang_up(self) -> None:
        """Close the attached connection; the engine then closes the worker's standard input (StdinOnce)."""
        for part in (self._keep, self._socket):
            if part is not None:
                with contextlib.suppress(OSError):
                    part.close()

    def _remove(self) -> None:
        with contextlib.suppress(*self._errors):
            self._api.remove_container(self.container_id, v=True, force=True)  # with what VOLUME made


def _docker_errors() -> tuple[type[BaseException], ...]:
    import docker.errors
    import requests

    return (docker.errors.DockerException, requests.exceptions.RequestException)


def _start_error(error: BaseException) -> StartError:
    import docker.errors

    return StartError(
        _explain(error), refused=isinstance(error, docker.errors.APIError | docker.errors.InvalidArgument)
    )


def _explain(error: BaseException) -> str:
    return str(getattr(error, "explanation", None) or error)
