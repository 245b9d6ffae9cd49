"""Arms that name their orchestrator: one slot of this host executes some of them through Ray, and some without any.

For an attempt of an arm with `orchestrator: ray` a process is started, `python -m spark_ray.orchestrator RUN BLOCK ARM
ATTEMPT`, which is what the driver of an ordinary run is to Ray: it starts a local Ray, has one actor execute the attempt
and stops all of it. So an attempt of another arm meets neither a process of Ray nor its libraries in this process.
It writes {"ready": true} and then {"outcome": ...}, {"lost": ...} or {"error": ...}, a line each; "stop" on its standard
input interrupts the attempt, and the end of its standard input is the end of the run's driver, and so its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from . import errors, footprint, host
from .errors import SparkRayError
from .execute import Slot, SlotLost, SlotRunner
from .experiment import Experiment
from .plan import Block
from .store import Store

_CLOSING_TIMEOUT_S = 60  # Ray needs 1 to 3 s to stop
_SETTLING_S = 20
_GROWN_BYTES = 4 << 20  # in a second: less is settled
_START_TIMEOUT_S = 400  # longer than `actors` waits for a slot that is not ready


def named(experiment: Experiment, arms: Sequence[str]) -> dict[str, str]:
    """What executes each arm, when one of them says so; {}: they are executed as the run is."""
    chosen = {arm: experiment.arms[arm].orchestrator for arm in arms}
    return {arm: name or "local" for arm, name in chosen.items()} if any(chosen.values()) else {}


# ---- in the run's driver ----------------------------------------------------------------------------------


class OrchestratedSlots:
    """The executor of a run whose arms name their orchestrator: one slot, here."""

    def __init__(self, folder: Path, experiment: Experiment, arms: Sequence[str]) -> None:
        self.slots: list[Slot] = [ArmSlot(folder, experiment, arms)]

    def close(self) -> None:
        for slot in self.slots:
            slot.close()


class ArmSlot:
    """One slot whose attempts are executed in this process, or through a Ray that lives as long as the attempt."""

    def __init__(self, folder: Path, experiment: Experiment, arms: Sequence[str]) -> None:
        self.name = "local-0"
        self._folder = folder
        self._limits = experiment.limits
        self._by = named(experiment, arms)
        here = [arm for arm in arms if self._by[arm] == "local"]
        self._local = SlotRunner(folder, experiment, here, self.name) if here else None
        self._level = host.Level(experiment.limits.memory_tolerance)
        self._through: RayDriver | None = None
        self._stopped = threading.Event()

    def run(self, block: Block, arm: str, attempt: int) -> dict[str, str]:
        if self._by[arm] == "local":
            assert self._local is not None  # noqa: S101  made for these arms
            return self._local.run(block, arm, attempt)
        return self._run_through_ray(block, arm, attempt)

    def _run_through_ray(self, block: Block, arm: str, attempt: int) -> dict[str, str]:
        """A Ray started, used once and stopped; memory is waited for on both sides, as between any two attempts."""
        wait = self._level.wait(self._limits.memory_wait, self._stopped.is_set)
        if not wait.reached:
            found = f"{wait.found_bytes} of {wait.wanted_bytes} bytes after {wait.waited_s:.0f} s"
            raise SlotLost(f"memory did not come back before Ray was started: {found}")
        self._level.expect_this()
        words = [str(self._folder), block.block_id, arm, str(attempt)]
        self._through = RayDriver([sys.executable, "-m", __name__, *words])
        try:
            if self._stopped.is_set():
                self._through.stop()
            return self._through.outcome()
        finally:
            self._through.close()
            self._through = None
            # this attempt is over: the next one waits again, and says so
            host.wait_for_memory(self._level.wanted_bytes, self._limits.memory_wait, self._stopped.is_set)

    def stop(self) -> None:
        self._stopped.set()
        if self._local is not None:
            self._local.stop()
        if (through := self._through) is not None:
            through.stop()

    def close(self) -> None:
        if self._local is not None:
            self._local.close()


class RayDriver:
    """This side of the process that starts Ray for one attempt."""

    def __init__(self, command: Sequence[str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True,
            env={**os.environ, footprint.DRIVER: footprint.driver_name()},
        )  # fmt: skip
        self._late = threading.Timer(_START_TIMEOUT_S, self._process.kill)
        self._late.daemon = True
        self._late.start()

    def outcome(self) -> dict[str, str]:
        """What became of the attempt; SlotLost when the process ended without saying."""
        assert self._process.stdout is not None  # noqa: S101  piped
        for line in self._process.stdout:
            message = json.loads(line)
            if "ready" in message:
                self._late.cancel()
            elif "lost" in message:
                raise SlotLost(message["lost"])
            elif "error" in message:
                raise _error(message["error"])
            else:
                outcome: dict[str, str] = message["outcome"]
                return outcome
        self._process.wait()
        raise SlotLost(
            f"the process that started Ray ended with {self._process.returncode}: {self._last_words()}"
        )

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def stop(self) -> None:
        assert self._process.stdin is not None  # noqa: S101  piped
        with contextlib.suppress(OSError, ValueError):  # it has ended, or is being closed
            self._process.stdin.write(b"stop\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Wait until Ray is stopped; a process that does not get there is killed, and its tether ends Ray."""
        self._late.cancel()
        try:
            self._process.wait(timeout=_CLOSING_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            assert stream is not None  # noqa: S101  piped
            with contextlib.suppress(OSError):
                stream.close()


def _error(said: Mapping[str, Any]) -> Exception:
    kind = getattr(errors, said["kind"], SparkRayError)
    made: Exception = kind(said["message"], mend=said["mend"])
    return made


# ---- in the process that starts Ray -----------------------------------------------------------------------


class _Control:
    """The driver's end of standard input, listened to while Ray starts and the attempt runs."""

    def __init__(self) -> None:
        self._slot: Slot | None = None
        self._ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def ready(self, slot: Slot) -> None:
        self._slot = slot
        self._ready.set()

    def _listen(self) -> None:
        for _ in sys.stdin.buffer:
            self._ready.wait()
            assert self._slot is not None  # noqa: S101  set before the event
            self._slot.stop()
        self._ready.wait(_START_TIMEOUT_S)  # from then on every process of Ray is tied to this one
        os._exit(128 + signal.SIGHUP)


def _settle() -> None:
    """Wait until Ray's processes have grown up: they still import and connect when the slot is ready."""
    deadline = time.monotonic() + _SETTLING_S
    before, now = None, _held_bytes()
    while (before is None or now > before + _GROWN_BYTES) and time.monotonic() < deadline:
        time.sleep(1.0)
        before, now = now, _held_bytes()


def _held_bytes() -> int:
    held = footprint.read()
    return sum(held[group].get("pss_anon_bytes", 0) for group in ("ray", "spark_ray"))


def _execute(folder: Path, block_id: str, arm: str, attempt: int, answers: IO[str]) -> dict[str, str]:
    from .actors import RaySlots  # the run's own driver does without

    control = _Control()
    store = Store.read(folder)
    experiment = Experiment.model_validate(store.plan["experiment"])
    block = next(block for block in store.blocks() if block.block_id == block_id)
    slots = RaySlots(folder, experiment, [arm], None)
    try:
        slot = slots.slots[0]
        control.ready(slot)
        _settle()
        print(json.dumps({"ready": True}), file=answers, flush=True)
        return slot.run(block, arm, attempt)
    finally:
        slots.close()


def main(words: Sequence[str]) -> int:
    folder, block_id, arm, attempt = words
    answers = os.fdopen(
        os.dup(1), "w"
    )  # not inherited: Ray's own processes could keep it open, or write to it
    os.dup2(2, 1)
    message: dict[str, Any]
    try:
        message = {"outcome": _execute(Path(folder), block_id, arm, int(attempt), answers)}
    except SlotLost as error:
        message = {"lost": str(error)}
    except SparkRayError as error:
        message = {"error": {"kind": type(error).__name__, "message": error.message, "mend": error.mend}}
    print(json.dumps(message), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
