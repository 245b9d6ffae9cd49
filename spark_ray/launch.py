"""One attempt: prepare the host, start the worker, look at it from outside, end it, write its record.

Nothing is decided here but when to stop; what it means is `outcome.derive`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import shutil
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__, environments, guestfiles, host, nvml, outcome, receive, treatments
from .conditions import Limits
from .environments import EnvironmentSpec, Site
from .guest import ContainerGuest, Ended, EnvironmentLostError, Guest, ProcessGuest, StartError
from .result import Asked
from .store import RECORD, RECORD_VERSION, write_durably
from .worker import evidence, observe, protocol

_MOST_NOISE = 1 << 20  # bytes of what is no control line that are kept: a guest can print for ever
_MOST_OBSERVATIONS = 1000  # of one guest; an engine has a dozen phases


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


@dataclass
class _Watch:
    """What was seen from outside while the guest ran."""

    observations: list[dict[str, Any]] = field(default_factory=list)
    outside: dict[str, Any] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    at_sizing: dict[str, Any] | None = None
    stopped_by: str | None = None
    pid: int | None = None
    sampler: host.Sampler | None = None
    ended: Ended = field(default_factory=lambda: Ended(None, {}))
    start_error: str | None = None  # the environment refused
    lost: str | None = None  # the environment did not answer, or no longer
    noise: bytes = b""  # what the image's entrypoint and the like printed


class Launcher:
    """Launches attempts on one slot, one at a time."""

    def __init__(self, treater: treatments.Treatments, docker_client: Any | None) -> None:
        self._treater = treater
        self._docker = docker_client
        self._host = host.identity()
        self._gpus = nvml.Reader()
        self._wanted_bytes: int | None = None
        self.stop = threading.Event()

    def close(self) -> None:
        self._gpus.close()

    # -- one attempt --------------------------------------------------------------------------------------

    def run(self, job: Job) -> dict[str, Any]:
        """Execute one attempt and return its record, which is durable by then."""
        times = {"started_at": datetime.now(UTC).isoformat()}
        started = time.monotonic()
        wait = self._wait_for_memory(job.limits)
        start = environments.module_of(job.environment).start(job.environment, job.site)
        treated = self._treater.apply(job.treatment) if wait.reached else {}
        self._write_request(job, start)
        before = self._look("before_launch")
        # The level is the present one from here on: a program that came to stay disturbs once, not for ever.
        level = before["meminfo"]["MemAvailable"] + before.get("per_cpu_free_bytes", 0)
        self._wanted_bytes = level - job.limits.memory_tolerance
        watch = _Watch(observations=[before])
        kills_before = host.oom_kills()
        if wait.reached:
            self._execute(job, start, watch)
        ended = watch.ended
        kills = max(host.oom_kills() - kills_before, int(bool(ended.details.get("oom_killed"))))
        self._treater.undo()
        watch.observations.append(self._look("after_exit"))
        guestfiles.reopen(job.folder)
        shutil.rmtree(job.folder / environments.FRESH_HOME, ignore_errors=True)
        result, result_error = receive.read_result(job.folder, _asked(job, before))
        if watch.noise.strip():
            guestfiles.append(job.folder / "worker.log", watch.noise)
        facts = outcome.Facts(
            result=result,
            result_error=result_error,
            exit_code=ended.exit_code,
            oom_kills=kills,
            stopped_by=watch.stopped_by,
            not_reached=_not_reached(wait, treatments.not_held(job.treatment, watch.at_sizing)),
            contradictions=(*watch.contradictions, *self._inside_contradictions(job, watch, result)),
            start_error=watch.start_error,
            lost=watch.lost,
        )
        times |= {"ended_at": datetime.now(UTC).isoformat()}
        seen = {
            "observations": watch.observations, "outside": watch.outside, "at_sizing": watch.at_sizing, "wait": wait.as_dict(),
            "treatment": treated, "exit_code": ended.exit_code, "end": ended.details, "oom_kills": kills,
            "stopped_by": watch.stopped_by, "duration_s": time.monotonic() - started, "samples": self._save_samples(job, watch),
        }  # fmt: skip
        guestfiles.write(job.folder / "host.json", json.dumps(seen, allow_nan=False) + "\n")
        return self._record(job, start, seen, times, result, outcome.derive(facts))

    def _execute(self, job: Job, start: environments.Start, watch: _Watch) -> None:
        """Start the worker and stay with it until it has ended, one way or another."""
        try:
            guest = self._start(job, start)
        except StartError as error:
            watch.start_error = str(error) if error.refused else None
            watch.lost = None if error.refused else str(error)
            return
        try:
            self._follow(guest, job, watch)
        finally:
            watch.ended = guest.end()

    def _wait_for_memory(self, limits: Limits) -> host.Wait:
        wanted = self._wanted_bytes if self._wanted_bytes is not None else 0
        return host.wait_for_memory(wanted, limits.memory_wait, self.stop.is_set)

    def _write_request(self, job: Job, start: environments.Start) -> None:
        request = {
            "protocol_version": protocol.PROTOCOL_VERSION,
            "trial_id": job.trial["trial_id"],
            "attempt": job.trial["attempt"],
            "arm": job.trial["arm"],
            "engine": job.engine,
            "configuration": job.trial["configuration"],
            "workload": job.workload,
            "model_path": start.model,
            "bundle_sha256": job.bundle_sha256,
            "seed": job.seed,
        }
        (job.folder / environments.FRESH_HOME).mkdir()
        protocol.write_json(job.folder / "request.json", request)
        protocol.write_json(job.folder / "command.json", dataclasses.asdict(start))
        if start.enter is not None:
            protocol.write_json(job.folder / "enter.json", start.enter)

    def _start(self, job: Job, start: environments.Start) -> Guest:
        log = job.folder / "worker.log"
        if start.container is not None:
            return ContainerGuest(start, log, self._docker)
        return ProcessGuest(start, log)

    # -- while it runs ------------------------------------------------------------------------------------

    def _follow(self, guest: Guest, job: Job, watch: _Watch) -> None:
        """Answer the worker at its phases, sample between them, stop it when it must be stopped."""
        watch.sampler = host.Sampler(None, self._gpus)
        try:
            self._attend(guest, job, watch)
        finally:
            watch.sampler.close()

    def _attend(self, guest: Guest, job: Job, watch: _Watch) -> None:
        deadline = time.monotonic() + job.limits.trial_timeout
        poll = select.poll()
        poll.register(guest.control, select.POLLIN | select.POLLHUP)
        pending = b""
        while True:
            if poll.poll(int(host.SAMPLE_INTERVAL_S * 1000)):
                piece = guest.read()
                if not piece:
                    return
                *lines, pending = (pending + piece).split(b"\n")
                pending = pending[-_MOST_NOISE:]
                for line in lines:
                    self._hear(line, guest, job, watch)
            assert watch.sampler is not None  # noqa: S101  made in _follow
            available = watch.sampler.take()
            if available < job.limits.watchdog:
                watch.stopped_by = "watchdog"
            elif self.stop.is_set():
                watch.stopped_by = "interrupt"
            elif time.monotonic() > deadline:
                watch.stopped_by = "deadline"
            if watch.stopped_by:
                guest.kill()
                return

    def _hear(self, line: bytes, guest: Guest, job: Job, watch: _Watch) -> None:
        words = line.decode(errors="replace").split()
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it can die while we look
            match words:
                case [protocol.CONTROL, "ready", pid] if pid.isdigit():
                    try:
                        self._meet(guest, int(pid), job, watch)
                    except EnvironmentLostError as error:  # not seen, and that is no fault of the worker's
                        watch.lost = str(error)
                case [protocol.CONTROL, "phase", name] if name in protocol.PHASES:
                    self._observe(name, watch)
                case _:  # an entrypoint's banner
                    if line.strip() and len(watch.noise) < _MOST_NOISE:
                        watch.noise += line + b"\n"
                    return
        guest.answer()

    def _observe(self, phase: str, watch: _Watch) -> None:
        if phase == "sizing":
            watch.at_sizing = self._treater.seen_now()
        if watch.pid is not None and len(watch.observations) < _MOST_OBSERVATIONS:
            watch.observations.append(self._look(phase, watch.pid))

    def _look(self, phase: str, pid: int | None = None) -> dict[str, Any]:
        """One outside observation; of the process tree as well while there is one."""
        seen = observe.observe(phase, pid or "self", with_tree=pid is not None)
        gpus = self._gpus.read()
        return seen | {"gpus": gpus} if gpus else seen

    def _meet(self, guest: Guest, told_pid: int, job: Job, watch: _Watch) -> None:
        """Look at the live worker from outside: where it really runs."""
        watch.pid = guest.pid_of(told_pid)
        if watch.sampler is not None:
            watch.sampler.close()
        watch.sampler = host.Sampler(watch.pid, self._gpus)
        outside: dict[str, Any] = {
            **guest.identity(),
            "worker_pid": watch.pid,
            "cgroup": Path(f"/proc/{watch.pid}/cgroup").read_text().splitlines(),
            "namespaces": evidence.namespaces(watch.pid),
            "host": self._host,
        }
        if job.site.content.root:
            outside["expected_root"] = evidence.root_identity(job.site.content.root)
        with contextlib.suppress(PermissionError):
            outside["root"] = evidence.root_identity(f"/proc/{watch.pid}/root/")
        watch.outside = outside
        module = environments.module_of(job.environment)
        watch.contradictions += module.contradictions(job.environment, job.site, {}, outside)

    # -- after it -----------------------------------------------------------------------------------------

    def _inside_contradictions(self, job: Job, watch: _Watch, result: dict[str, Any] | None) -> list[str]:
        if result is None:
            return []
        if not watch.outside:
            return ["the host could not look at the worker while it lived"]
        inside = result["evidence"]
        return environments.common_contradictions(job.environment, inside, watch.outside, job.bundle_sha256)

    def _save_samples(self, job: Job, watch: _Watch) -> dict[str, Any]:
        """The time series beside the record, and what sampling cost."""
        if watch.sampler is None:
            return {"count": 0}
        rows, gpu_rows = watch.sampler.rows, watch.sampler.gpu_rows
        series: dict[str, Any] = {"fields": host.SAMPLE_FIELDS, "rows": rows}
        if gpu_rows:
            series |= {"gpu_fields": nvml.SAMPLE_FIELDS, "gpu_rows": gpu_rows}
        guestfiles.write(job.folder / "samples.json", json.dumps(series))
        lowest = min((row[2] for row in rows if row[2] is not None), default=None)
        return {
            "count": len(rows),
            "gpu_count": len(gpu_rows),
            "cpu_s": watch.sampler.cpu_s,
            "lowest_mem_available_bytes": lowest,
        }

    def _record(
        self,
        job: Job,
        start: environments.Start,
        seen: dict[str, Any],
        times: dict[str, str],
        result: dict[str, Any] | None,
        verdict: outcome.Outcome,
    ) -> dict[str, Any]:
        record = {
            "record_version": RECORD_VERSION,
            "spark_ray_version": __version__,
            **job.trial,
            **times,
            "engine": job.engine,
            "workload": job.workload,
            "environment": job.environment.model_dump(mode="json"),
            "treatment": job.treatment,
            "content": dataclasses.asdict(job.site.content),
            "bundle_sha256": job.bundle_sha256,
            "command": list(start.argv),
            "result": result,
            "inside": receive.read_observations(job.folder / "observations.jsonl"),
            "host": seen,
            "outcome": verdict.as_dict(),
        }
        write_durably(job.folder / RECORD, record)
        return record


def _not_reached(wait: host.Wait, lost: str | None) -> str | None:
    if not wait.reached:
        return f"memory did not come back: {wait.found_bytes} of {wait.wanted_bytes} bytes after {wait.waited_s:.0f} s"
    return lost


def _asked(job: Job, before: dict[str, Any]) -> Asked:
    """What the result is held against. A fake pool may be larger than this host: it is no memory."""
    info, gpus = before["meminfo"], nvml.memory_bytes()
    real = job.engine["kind"] != "fake" and gpus is not None
    return Asked(
        trial_id=job.trial["trial_id"],
        attempt=job.trial["attempt"],
        engine=job.engine,
        configuration=job.trial["configuration"],
        workload=job.workload,
        memory_bytes=info["MemTotal"] + info.get("SwapTotal", 0) + (gpus or 0) if real else None,
    )
