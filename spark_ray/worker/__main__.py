"""`python -m spark_ray_worker ATTEMPT_FOLDER`: supervise one worker, which runs one engine once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from . import evidence, protocol, session, supervise

ENGINES = {
    "embedded": "engine_embedded",
    "probe": "engine_probe",
    "tensorrt_llm": "engine_tensorrt_llm",
    "simulated": "engine_simulated",
    "fake": "engine_fake",
}


def _trace() -> str | None:
    """The present traceback; None when there is no memory left to make it."""
    try:
        import traceback  # 5 ms, and only failures need it

        return traceback.format_exc()
    except MemoryError:
        return None


def _failure(kind: str, reason: str, message: str, trace: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "reason": reason, "message": message, "traceback": trace}


def _run_engine(talk: session.Session) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(measurements, failure): whatever the engine measured before it failed is kept."""
    measurements: dict[str, Any] = {}
    try:
        asked = (talk.request["workload"] or {}).get("matmul")
        if asked:  # before the engine: it runs in a process of its own, which is gone by then
            from . import workload

            measurements["matmul"] = workload.matmul(asked)
        engine = importlib.import_module("." + ENGINES[talk.engine["kind"]], __package__)
        engine.run(talk, measurements)
    except session.Infeasible as error:
        return measurements, _failure("infeasible", error.reason, str(error))
    except (MemoryError, session.OutOfMemory) as error:
        return measurements, _failure("out_of_memory", "engine_report", str(error) or "MemoryError", _trace())
    except ImportError as error:
        return measurements, _failure("engine_error", "import_failed", str(error), _trace())
    except Exception as error:  # noqa: BLE001  every engine failure becomes data; the host decides what it means
        return measurements, _failure("engine_error", type(error).__name__, str(error), _trace())
    return measurements, None


def _work(folder: Path, control: int, answers: int) -> int:
    request = protocol.check_fields(
        "request.json", protocol.read_json(folder / "request.json"), protocol.REQUEST_FIELDS
    )
    talk = session.Session(folder, request, control, answers)
    proof = evidence.gather()
    proof["bundle_sha256"] = protocol.package_sha256(Path(__file__).parent)
    talk.exchange("ready", os.getpid())
    measurements, failure = _run_engine(talk)
    proof["libraries"] = evidence.libraries()
    protocol.write_json(
        folder / "result.json",
        {
            "protocol_version": protocol.PROTOCOL_VERSION,
            "trial_id": request["trial_id"],
            "attempt": request["attempt"],
            "engine": request["engine"]["kind"],
            "evidence": proof,
            "measurements": measurements,
            "failure": failure,
            "observer": {"clock": "CLOCK_MONOTONIC"},
        },
    )
    return 0


def _keep_answers() -> int:
    """Take the host's answers off standard input: a process that the engine starts inherits that, and may read it.

    Standard input then ends at once. Returns the descriptor of the answers, which nothing inherits.
    """
    answers = os.dup(0)
    nothing, end = os.pipe()
    os.close(end)
    os.dup2(nothing, 0)
    os.close(nothing)
    return answers


def main(arguments: list[str]) -> int:
    """Redirect the log, split into supervisor and worker. Returns the supervisor's exit status."""
    folder = Path(arguments[0])
    log = os.open(folder / "worker.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    control = os.dup(1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    parent = os.getpid()
    if os.getppid() > 0:  # the first process of a container has no parent to follow
        supervise.die_with_parent()
    supervise.adopt_orphans()
    worker = os.fork()
    if worker:
        os.close(control)
        return supervise.supervise(worker)
    supervise.die_with_parent()
    if os.getppid() != parent:
        return 128 + signal.SIGHUP
    status = 1
    try:
        status = _work(folder, control, _keep_answers())
    except session.HostGone:
        status = 128 + signal.SIGHUP
    except BaseException:  # noqa: BLE001  the log must say why, whatever it was
        sys.stderr.write(_trace() or "no memory left for a traceback\n")
    finally:
        # Engine libraries leave threads behind that can hang at interpreter exit; the result is on disk already.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # everything is on disk; tearing the interpreter down takes 5 ms
