"""One guest while it runs: answered at its phases, observed, sampled, guarded, and stopped when it must be stopped."""

from __future__ import annotations

import contextlib
import select
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import environments, host, nvml, sampler
from .conditions import Limits
from .environments import EnvironmentSpec, Site
from .guard import Guard
from .guest import Ended, EnvironmentLostError, Guest
from .plausible import Reference
from .treatments import Treatments
from .watchdog import Watchdog
from .worker import evidence, observe, protocol

_MOST_NOISE = 1 << 20  # bytes of what is no control line that are kept: a guest can print for ever
_MOST_OBSERVATIONS = 1000  # of one guest; an engine has a dozen phases
_LISTEN_S = 0.2  # how late a deadline or a stop may be noticed


@dataclass(frozen=True)
class Job:
    """Everything about one attempt that was decided before it starts."""

    folder: Path
    trial: dict[str, Any]  # run, block_id, trial_id, arm, attempt, position, configuration, repetition, slot
    engine: dict[str, Any]
    workload: dict[str, Any]
    environment: EnvironmentSpec
    site: Site
    treatment: dict[str, Any]  # effective
    limits: Limits
    bundle_sha256: str
    seed: int
    reference: Reference | None = None  # what its measurements are held against; None: no model is loaded
    needs_gpu: bool = False  # weights and pool are device memory, which swap cannot hold
    moment: dict[str, int] = field(default_factory=dict)  # where in the run it stands: block, position, arms


@dataclass
class Watch:
    """What was seen from outside while the guest ran."""

    observations: list[dict[str, Any]] = field(default_factory=list)
    outside: dict[str, Any] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    at_sizing: dict[str, Any] | None = None
    stopped_by: str | None = None
    ended: Ended = field(default_factory=lambda: Ended(None, {}))
    start_error: str | None = None  # the environment refused
    lost: str | None = None  # the environment did not answer, or no longer
    noise: bytes = b""  # what the image's entrypoint and the like printed
    samples: dict[str, Any] = field(default_factory=lambda: {"count": 0})
    series: dict[str, Any] | None = None  # samples.json
    guard: dict[str, Any] = field(default_factory=dict)
    watchdog: dict[str, Any] | None = None


@dataclass(frozen=True)
class Tools:
    """What a slot attends its guests with."""

    treater: Treatments
    gpus: nvml.Reader
    watchdog: Watchdog
    own: dict[str, Any]  # this host's identity
    stop: threading.Event


def look(phase: str, gpus: nvml.Reader, pid: int | None = None, first: int | None = None) -> dict[str, Any]:
    """One outside observation; of the process tree as well while there is one. `first`: process of the guest."""
    seen = observe.observe(phase, pid or "self", with_tree=pid is not None)
    found = gpus.read()
    own = set(observe.descendants(first)) if first is not None and found else set()
    for process in (each for gpu in found for each in gpu.get("processes") or ()):
        if process["pid"] in own:
            process["own"] = True
    return seen | {"gpus": found} if found else seen


class Attendance:
    """Stays with one guest from its start to its end, one way or another; everything seen goes into `watch`."""

    def __init__(self, guest: Guest, job: Job, watch: Watch, tools: Tools, kin: host.Kin) -> None:
        self._guest, self._job, self._watch, self._tools, self._kin = guest, job, watch, tools, kin
        self._pid: int | None = None  # the worker's
        self._first: int | None = None  # process of the guest
        self._guard = Guard(tools.gpus, kin)
        self._peaks = sampler.Peaks()
        self._sampler = sampler.Sampler(tools.gpus, self._guard.look) if job.limits.sampling else None

    def run(self) -> None:
        first = self._guest.identity().get("pid")
        self._protect([first] if first is not None else [], None)
        if self._sampler:
            self._sampler.start()
        try:
            self._attend()
        finally:
            try:
                self._watch.ended = self._guest.end()
            finally:
                self._conclude()

    def _protect(self, guest: list[int], group: Path | None) -> None:
        """Tell the watchdog what to kill: the guest first, then what the treatment holds."""
        self._tools.watchdog.guard(self._job.limits.watchdog, guest, group, self._tools.treater.children())

    # -- while it runs ------------------------------------------------------------------------------------

    def _attend(self) -> None:
        deadline = time.monotonic() + self._job.limits.trial_timeout
        watchdog = self._tools.watchdog
        pending = b""
        while True:
            poll = select.poll()
            poll.register(self._guest.control, select.POLLIN | select.POLLHUP)
            poll.register(watchdog.descriptor, select.POLLIN | select.POLLHUP)
            longest_s = min(_LISTEN_S, max(0.0, deadline - time.monotonic()))
            ready = {descriptor for descriptor, _ in poll.poll(int(longest_s * 1000) + 1)}
            if watchdog.descriptor in ready:
                watchdog.hear()
            if self._guest.control in ready:
                piece = self._guest.read()
                if not piece:
                    return
                *lines, pending = (pending + piece).split(b"\n")
                pending = pending[-_MOST_NOISE:]
                for line in lines:
                    if not self._must_stop(deadline):  # a guest can say much at once
                        self._hear(line)
            if self._must_stop(deadline):
                self._guest.kill()
                return

    def _must_stop(self, deadline: float) -> bool:
        if self._tools.watchdog.fired:
            self._watch.stopped_by = "watchdog"
        elif self._tools.stop.is_set():
            self._watch.stopped_by = "interrupt"
        elif time.monotonic() > deadline:
            self._watch.stopped_by = "deadline"
        return self._watch.stopped_by is not None

    def _hear(self, line: bytes) -> None:
        words = line.decode(errors="replace").split()
        watch = self._watch
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it can die while we look
            match words:
                case [protocol.CONTROL, "ready", pid] if pid.isdigit():
                    try:
                        self._meet(int(pid))
                    except EnvironmentLostError as error:  # not seen, and that is no fault of the worker's
                        watch.lost = str(error)
                case [protocol.CONTROL, "settle"]:
                    self._tools.treater.settle()
                case [protocol.CONTROL, "phase", name] if name in protocol.PHASES:
                    self._observe(name)
                case _:  # an entrypoint's banner
                    if line.strip() and len(watch.noise) < _MOST_NOISE:
                        watch.noise += line + b"\n"
                    return
        self._guest.answer()

    def _observe(self, phase: str) -> None:
        watch, mapped_bytes = self._watch, None
        if self._pid is not None and self._first is not None and len(watch.observations) < _MOST_OBSERVATIONS:
            seen = look(phase, self._tools.gpus, self._pid, self._first)
            watch.observations.append(seen)
            mapped_bytes = seen["tree"].get("pss_file_bytes")
            self._peaks.look(self._pid, self._first)
        if phase == "sizing":
            watch.at_sizing = self._tools.treater.at_sizing(mapped_file_bytes=mapped_bytes)
        self._guard.look()

    def _meet(self, told_pid: int) -> None:
        """Look at the live worker from outside: where it really runs."""
        job, watch = self._job, self._watch
        self._pid = pid = self._guest.pid_of(told_pid)
        self._first = self._kin.guest = host.first_of(pid)
        self._protect([self._first, pid], sampler.own_group(self._first))
        if self._sampler:
            self._sampler.attach(pid)
        outside: dict[str, Any] = {
            **self._guest.identity(),
            "worker_pid": pid,
            "cgroup": Path(f"/proc/{pid}/cgroup").read_text().splitlines(),
            "namespaces": evidence.namespaces(pid),
            "host": self._tools.own,
        }
        if job.site.content.root:
            outside["expected_root"] = evidence.root_identity(job.site.content.root)
        with contextlib.suppress(PermissionError):
            outside["root"] = evidence.root_identity(f"/proc/{pid}/root/")
        if "container_id" in outside:  # a daemon may grant less than it was asked for, and only warn
            outside |= _limit_of(pid)
        watch.outside = outside
        module = environments.module_of(job.environment)
        watch.contradictions += module.contradictions(job.environment, job.site, {}, outside)

    # -- when it has ended --------------------------------------------------------------------------------

    def _conclude(self) -> None:
        watch = self._watch
        watch.watchdog = self._tools.watchdog.rest()
        if watch.watchdog["fired"]:  # the guest may have ended before it was heard of
            watch.stopped_by = "watchdog"
        if self._sampler:
            self._sampler.stop()
            watch.series = self._sampler.series()
            watch.samples = self._sampler.summary()
        else:
            watch.samples = {"count": 0, "absent": {"count": "limits.sampling is false"}}
        self._peaks.told(
            watch.ended.details.get("cgroup_peak_bytes"), "the guest's own group, as it was removed"
        )
        watch.samples |= {"peak": self._peaks.as_dict()}
        watch.guard = self._guard.end(self._sampler.gpu_rows if self._sampler else None)


def _limit_of(pid: int) -> dict[str, int | None]:
    """The memory limit of the group that a process is in, None without one; nothing where that cannot be read."""
    seen = observe.cgroup(pid)
    unlimited = seen.get("absent", {}).get("limit_bytes") == "unlimited"
    if "seen_at" in seen or not ("limit_bytes" in seen or unlimited):
        return {}
    return {"group_limit_bytes": seen.get("limit_bytes")}
