"""One attempt: prepare the host, start the worker, have it attended, and write its record.

Nothing is decided here but when to begin; what it means is `outcome.derive`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from . import (
    __version__,
    diagnose,
    environments,
    footprint,
    gate,
    guard,
    guestfiles,
    host,
    ledger,
    nvml,
    outcome,
    plausible,
    receive,
    treatments,
)
from .attend import Attendance, Job, Tools, Watch, look
from .environment_spec import PodmanEnvironment
from .guest import ContainerGuest, Guest, ProcessGuest, StartError
from .guest_podman import PodmanGuest
from .result import Asked
from .store import RECORD, RECORD_VERSION, write_durably
from .watchdog import Watchdog
from .worker import evidence, protocol

__all__ = ["Job", "Launcher"]

WARMING = "warming"
"""Folder of the attempt in which an execution that is not measured fills the compile cache."""
_LOG_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class _Ready:
    """What was waited for before an attempt."""

    wait: host.Wait
    gate: dict[str, Any]
    why_not: str | None


class Launcher:
    """Launches attempts on one slot, one at a time."""

    def __init__(self, treater: treatments.Treatments, docker_client: Any | None) -> None:
        self._treater = treater
        self._docker = docker_client
        self._gpus = nvml.Reader()
        self._watchdog = Watchdog()
        self._level: host.Level | None = None
        self._vain_s = 0.0  # how long memory was waited for after the last attempt, in vain
        self.stop = threading.Event()
        self._tools = Tools(treater, self._gpus, self._watchdog, host.identity(), self.stop)

    def close(self) -> None:
        self._watchdog.close()
        self._gpus.close()

    # -- one attempt --------------------------------------------------------------------------------------

    def run(self, job: Job) -> dict[str, Any]:
        """Execute one attempt and return its record, which is durable by then."""
        started, times = time.monotonic(), {"started_at": datetime.now(UTC).isoformat()}
        self._watchdog.start()
        kin = host.Kin(environments.RUN_VARIABLE, job.site.run_label)
        level = self._level = self._level or host.Level(job.limits.memory_tolerance)
        ready, warming = self._make_ready(job, kin, level)
        watch, orchestrator = Watch(), {"before": footprint.read()}
        treated: dict[str, Any] = {}
        start = environments.module_of(job.environment).start(job.environment, job.site)
        _write_request(job, start)
        try:
            if ready.why_not is None:
                treated = self._treat(job)
            watch.observations.append(look("before_launch", self._gpus))
            kills_before = host.oom_kills()
            if ready.why_not is None:
                self._execute(job, start, watch, kin)
            kills = max(host.oom_kills() - kills_before, int(_own_oom_kill(watch)))
        finally:
            self._treater.undo()
        watch.observations.append(look("after_exit", self._gpus))
        back = self._wait_until_back(job, level)
        orchestrator["after"] = footprint.read()
        _clean(job, watch)
        asked = _asked(job, watch.observations[0])
        result, result_error = receive.read_result(job.folder, asked)
        judged = _judge(job, asked, result)
        inside = receive.read_observations(job.folder / "observations.jsonl")
        facts = outcome.Facts(
            result=result,
            result_error=result_error,
            exit_code=watch.ended.exit_code,
            oom_kills=kills,
            killed_by_host=bool(watch.ended.details.get("killed_by_host")),
            own_oom_kill=_own_oom_kill(watch),
            stopped_by=watch.stopped_by,
            not_reached=ready.why_not or treatments.not_held(job.treatment, watch.at_sizing, job.limits),
            not_quiet=guard.not_quiet(watch.guard, job.limits.guard),
            contradictions=(*watch.contradictions, *_inside_contradictions(job, watch, result)),
            start_error=watch.start_error,
            lost=watch.lost,
            implausible=judged.first if judged else None,
        )
        times |= {"ended_at": datetime.now(UTC).isoformat()}
        seen = {
            "observations": watch.observations, "outside": watch.outside, "at_sizing": watch.at_sizing,
            "wait": ready.wait.as_dict(), "gate": ready.gate, "treatment": treated, "warming": warming,
            "exit_code": watch.ended.exit_code, "end": watch.ended.details, "oom_kills": kills,
            "stopped_by": watch.stopped_by, "duration_s": time.monotonic() - started, "samples": watch.samples,
            "guard": watch.guard, "watchdog": watch.watchdog, "back": back.as_dict(), "orchestrator": orchestrator,
            "ledger": ledger.ledgers(inside, watch.observations),
            "plausibility": judged.as_dict() if judged else None,
        }  # fmt: skip
        guestfiles.write(job.folder / "host.json", json.dumps(seen, allow_nan=False) + "\n")
        return _record(job, start, seen, times, result, inside, outcome.derive(facts))

    def _treat(self, job: Job) -> dict[str, Any]:
        return self._treater.apply(
            job.treatment,
            arm=job.trial["arm"],
            configuration=job.trial["configuration"],
            spare_bytes=job.limits.watchdog,
        )

    def _execute(self, job: Job, start: environments.Start, watch: Watch, kin: host.Kin) -> None:
        """Start the worker and stay with it until it has ended, one way or another."""
        try:
            guest = self._start(job, start)
        except StartError as error:
            watch.start_error = str(error) if error.refused else None
            watch.lost = None if error.refused else str(error)
            return
        Attendance(guest, job, watch, self._tools, kin).run()

    def _start(self, job: Job, start: environments.Start) -> Guest:
        log = job.folder / "worker.log"
        if start.container is not None:
            return ContainerGuest(start, log, self._docker)
        if isinstance(job.environment, PodmanEnvironment):
            return PodmanGuest(start, log)
        return ProcessGuest(start, log)

    # -- before and after it ------------------------------------------------------------------------------

    def _make_ready(self, job: Job, kin: host.Kin, level: host.Level) -> tuple[_Ready, dict[str, Any] | None]:
        """Wait for the host, with an execution to warm up in between where one is needed; what came of that."""
        ready, warming = self._wait(job, kin, level), None
        if ready.why_not is None and self._needs_warming(job):
            level.expect_this()
            warming = self._warm(job, kin)
            ready = self._wait(job, kin, level)
        if ready.wait.reached:
            level.expect_this()
        return ready, warming

    def _wait(self, job: Job, kin: host.Kin, level: host.Level) -> _Ready:
        """For memory, then for everything else. What was waited for in vain after the last attempt is not waited for twice."""
        patience_s = max(0.0, job.limits.memory_wait - self._vain_s)
        wait = level.wait(patience_s, self.stop.is_set)
        self._vain_s = 0.0
        if not wait.reached:
            unlooked = dict.fromkeys(gate.CONDITIONS, "not looked at: memory had not come back")
            return _Ready(wait, {"reached": None, "waited_s": 0.0, "absent": unlooked}, _no_memory(wait))
        found = gate.wait(job.limits.gate, self._gpus, kin, self.stop.is_set)
        return _Ready(wait, found, gate.not_reached(found))

    def _wait_until_back(self, job: Job, level: host.Level) -> host.Wait:
        """How late memory comes back is a measurement of its own; the next attempt then finds it there."""
        back = host.wait_for_memory(level.wanted_bytes, job.limits.memory_wait, self.stop.is_set)
        self._vain_s = 0.0 if back.reached else back.waited_s
        return back

    def _needs_warming(self, job: Job) -> bool:
        return self._treater.needs_warming(job.treatment, job.trial["arm"], job.trial["configuration"])

    def _warm(self, job: Job, kin: host.Kin) -> dict[str, Any]:
        """An execution that is not measured, in a folder of its own: it fills the arm's cache of compiled kernels."""
        started = time.monotonic()
        folder = job.folder / WARMING
        folder.mkdir()
        mine = dataclasses.replace(job, folder=folder, site=dataclasses.replace(job.site, attempt=folder))
        start = environments.module_of(mine.environment).start(mine.environment, mine.site)
        _write_request(mine, start)
        watch = Watch()
        try:
            self._treat(mine)
            self._execute(mine, start, watch, kin)
        finally:
            self._treater.undo()
        kin.guest = None
        _clean(mine, watch)
        result, error = receive.read_result(folder, _asked(mine, look("after_exit", self._gpus)))
        failure = result["failure"] if result else None
        note = {
            "duration_s": time.monotonic() - started, "exit_code": watch.ended.exit_code, "stopped_by": watch.stopped_by,
            "failure": error or watch.start_error or watch.lost or (failure["message"] if failure else None),
        }  # fmt: skip
        # A disturbance says nothing of the cache; any answer of the engine does.
        if watch.ended.exit_code is not None and watch.stopped_by not in {"interrupt", "watchdog"}:
            self._treater.warmed(job.trial["arm"], job.trial["configuration"], note)
        return note


# ---- the files of an attempt -----------------------------------------------------------------------------


def _told(job: Job) -> dict[str, Any]:
    """The engine's settings; a simulated one, which remembers nothing, is told where in the run it stands."""
    simulated = job.engine["kind"] == "simulated"
    return job.engine | {"moment": job.moment} if simulated else job.engine


def _write_request(job: Job, start: environments.Start) -> None:
    request = {
        "protocol_version": protocol.PROTOCOL_VERSION,
        "trial_id": job.trial["trial_id"],
        "attempt": job.trial["attempt"],
        "arm": job.trial["arm"],
        "engine": _told(job),
        "configuration": job.trial["configuration"],
        "workload": job.workload,
        "model_path": start.model,
        "bundle_sha256": job.bundle_sha256,
        "seed": job.seed,
    }
    (job.folder / environments.FRESH_HOME).mkdir()
    protocol.write_json(job.folder / "request.json", request)
    protocol.write_json(job.folder / "command.json", _without_secrets(dataclasses.asdict(start)))
    if start.enter is not None:
        protocol.write_json(job.folder / "enter.json", start.enter)


_ENV = "--env="


def _without_secrets(data: Any) -> Any:
    """Nested data in which values of variables whose names speak of secrets are not written down, --env=NAME=VALUE among them."""
    if isinstance(data, dict):
        return {
            name: evidence.NOT_RECORDED
            if isinstance(value, str) and evidence.is_secret(name)
            else _without_secrets(value)
            for name, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [_without_secrets(each) for each in data]
    if isinstance(data, str) and data.startswith(_ENV):
        name, _, _ = data.removeprefix(_ENV).partition("=")
        return f"{_ENV}{name}={evidence.NOT_RECORDED}" if evidence.is_secret(name) else data
    return data


def _clean(job: Job, watch: Watch) -> None:
    """The guest has ended: its rights are undone, its home goes, and what only memory holds is written down."""
    guestfiles.reopen(job.folder)
    shutil.rmtree(job.folder / environments.FRESH_HOME, ignore_errors=True)
    if watch.noise.strip():
        guestfiles.append(job.folder / "worker.log", watch.noise)
    if watch.series is not None:
        guestfiles.write(job.folder / "samples.json", json.dumps(watch.series))


def _explained(job: Job, result: dict[str, Any] | None, verdict: outcome.Outcome) -> outcome.Outcome:
    """A failure that ended with a known error says what that means, and what mends it."""
    if verdict.kind not in {"engine_error", "crashed"}:
        return verdict
    log = b""
    with contextlib.suppress(OSError):
        log = guestfiles.tail(job.folder / "worker.log", _LOG_TAIL_BYTES)
    failure = (result["failure"] if result else None) or {}
    said = (verdict.message, failure.get("traceback") or "", log.decode(errors="replace"))
    known = next(filter(None, map(diagnose.explain, said)), None)
    return dataclasses.replace(verdict, message=f"{verdict.message}: {known}") if known else verdict


def _record(
    job: Job,
    start: environments.Start,
    seen: dict[str, Any],
    times: dict[str, str],
    result: dict[str, Any] | None,
    inside: list[dict[str, Any]],
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
        "content": _without_secrets(dataclasses.asdict(job.site.content)),
        "bundle_sha256": job.bundle_sha256,
        "command": _without_secrets(list(start.argv)),
        "result": result,
        "inside": inside,
        "host": seen,
        "outcome": _explained(job, result, verdict).as_dict(),
    }
    write_durably(job.folder / RECORD, record)
    return record


def _own_oom_kill(watch: Watch) -> bool:
    return bool(watch.ended.details.get("oom_killed"))


def _no_memory(wait: host.Wait) -> str:
    return f"memory did not come back: {wait.found_bytes} of {wait.wanted_bytes} bytes after {wait.waited_s:.0f} s"


def _inside_contradictions(job: Job, watch: Watch, result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return []
    if not watch.outside:
        return ["the host could not look at the worker while it lived"]
    inside = result["evidence"]
    return environments.common_contradictions(job.environment, inside, watch.outside, job.bundle_sha256)


def _judge(job: Job, asked: Asked, result: dict[str, Any] | None) -> plausible.Findings | None:
    """What was measured, held against what the model and the node allow; None where there is nothing to hold."""
    if job.reference is None or result is None:
        return None
    held_to = plausible.Asked(
        job.reference, job.engine, job.trial["configuration"], job.workload, asked.memory_bytes, job.needs_gpu
    )
    return plausible.judge(result["measurements"], held_to)


def _asked(job: Job, before: dict[str, Any]) -> Asked:
    """What the result is held against."""
    return Asked(
        trial_id=job.trial["trial_id"],
        attempt=job.trial["attempt"],
        engine=job.engine,
        configuration=job.trial["configuration"],
        workload=job.workload,
        memory_bytes=_memory_bytes(job, before["meminfo"]),
    )


def _memory_bytes(job: Job, info: dict[str, int]) -> int | None:
    """All memory that an engine can use here: of the GPUs, which is the host's where they have none of their own.

    None: unknown, or not held to it: a fake or simulated pool may be larger than this host, since it is no memory.
    """
    if job.engine["kind"] in {"fake", "simulated"}:
        return None
    if not job.needs_gpu:
        return info["MemTotal"] + info.get("SwapTotal", 0)
    gpus = nvml.memory_bytes()  # swap never holds what CUDA allocated
    return None if gpus is None else gpus or info["MemTotal"]
