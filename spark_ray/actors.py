"""Ray: one long-lived, named actor per slot. It launches fresh guest processes and imports no engine.

The actor is never restarted and its calls are never retried: a retried measurement is another measurement, and the
run folder, not a return value, says what was measured. The folder must be visible on every node that has a slot.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import footprint, tether
from .errors import SparkRayError, UnavailableError
from .execute import Slot, SlotLost, SlotRunner
from .experiment import Experiment
from .plan import Block
from .store import Store
from .worker import observe

OBJECT_STORE_BYTES = 100 << 20  # Ray's default, 30 % of memory, is the pool under study
_READY_TIMEOUT_S = 300


class SlotActor:
    """What runs on the slot's node. `lost`: the attempt in which its predecessor died."""

    def __init__(self, folder: str, arms: Sequence[str], driver: str, name: str, lost: str | None) -> None:
        from ray.util import metrics

        os.environ[footprint.DRIVER] = driver
        experiment = Experiment.model_validate(Store.read(Path(folder)).plan["experiment"])
        self._runner = SlotRunner(Path(folder), experiment, arms, name, lost, executor="ray")
        self._trials = metrics.Counter(
            "spark_ray_trials", description="attempts ended", tag_keys=("arm", "outcome")
        )

    def ready(self) -> int:
        return os.getpid()

    def run(self, block: Block, arm: str, attempt: int) -> dict[str, str]:
        outcome = self._runner.run(block, arm, attempt)
        self._trials.inc(1, tags={"arm": arm, "outcome": outcome["kind"]})
        return outcome

    def stop(self) -> None:
        self._runner.stop()

    def close(self) -> None:
        self._runner.close()


class RaySlot:
    """The driver's end of one actor; a dead actor is replaced before the next attempt."""

    def __init__(self, owner: RaySlots, name: str, bundle: int) -> None:
        self.name = name
        self._owner = owner
        self._bundle = bundle
        self._actor = owner.make_actor(name, bundle)

    def ready(self) -> None:
        import ray

        try:
            ray.get(self._actor.ready.remote(), timeout=_READY_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise UnavailableError(
                f"slot {self.name} did not start in {_READY_TIMEOUT_S} s",
                mend="see `ray status` and the dashboard",
            ) from error
        except ray.exceptions.RayActorError as error:
            raise _cause(error) from error

    def run(self, block: Block, arm: str, attempt: int) -> dict[str, str]:
        import ray

        label = f"{block.block_id}.{arm}/{attempt}"
        try:
            outcome: dict[str, str] = ray.get(self._actor.run.options(name=label).remote(block, arm, attempt))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except ray.exceptions.RayActorError as error:
            if not self._owner.closing.is_set():
                lost = f"{block.trial_id(arm)}/{attempt}"
                self._actor = self._owner.make_actor(self.name, self._bundle, lost)
                self.ready()
            raise SlotLost(f"the actor of {self.name} died: {str(error).splitlines()[0]}") from error
        return outcome

    def stop(self) -> None:
        self._owner.closing.set()
        self._actor.stop.remote()

    def close(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._actor.close.remote(), timeout=20)


def _cause(error: Any) -> Exception:
    """Our own error out of Ray's wrapping, so that the user reads one sentence and not a remote traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, SparkRayError):
        return cause
    for base in type(error).__mro__:  # Ray makes a class that is both its own and the cause's
        if issubclass(base, SparkRayError) and isinstance(error, SparkRayError):
            return error
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def check_address(address: str) -> None:
    """Raise UnavailableError at once if nothing listens at HOST:PORT; Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto" and the like: Ray knows where to look, and says at once if there is nothing
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UnavailableError(
            f"Ray at {address} cannot be reached: {error}",
            mend="start it with `ray start --head`, or use --local",
        ) from error


class RaySlots:
    """A local Ray of our own, or a cluster joined at `address`; one actor per slot, placed by a placement group."""

    def __init__(
        self, folder: Path, experiment: Experiment, arms: Sequence[str], address: str | None
    ) -> None:
        # Ray kills by MemTotal - MemAvailable, which on unified memory is the engine itself; our watchdog watches.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        # An actor without GPUs of its own must not hide them from the guests it launches.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._arguments = (str(folder), list(arms), footprint.driver_name())
        self._experiment = experiment.name
        self.closing = threading.Event()
        self._group: Any = None
        common: dict[str, Any] = {"namespace": "spark_ray", "log_to_driver": False, "logging_level": "error"}
        try:
            if address is None:
                self._context = ray.init(
                    address="local", resources={"slot": 1}, object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=True, dashboard_host="127.0.0.1", **common,
                )  # fmt: skip
            else:
                self._context = ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UnavailableError(
                f"Ray at {address or 'local'} cannot be reached: {error}",
                mend="start it with `ray start --head`, or use --local",
            ) from error
        self.dashboard_url: str | None = self._context.dashboard_url or None
        self._tether: subprocess.Popen[bytes] | None = None
        try:
            self.slots: list[Slot] = list(self._make_slots())
            if address is None:
                self._tether = _tie_to_this_process()
        except BaseException:
            self.close()
            raise

    def _make_slots(self) -> list[RaySlot]:
        import ray
        from ray.util.placement_group import placement_group

        count = int(ray.cluster_resources().get("slot", 0))
        if count == 0:
            raise UnavailableError(
                "the Ray cluster offers no slot",
                mend="start its nodes with `ray start ... --resources='{\"slot\": 1}'`",
            )
        self._group = placement_group(
            [{"slot": 1}] * count, strategy="SPREAD", name=f"spark_ray-{self._experiment}"
        )
        if not self._group.wait(60):
            raise UnavailableError(
                "the slots of the Ray cluster are taken", mend="end the other run, or wait for it"
            )
        slots = [RaySlot(self, f"slot-{index}", index) for index in range(count)]
        for slot in slots:
            slot.ready()
        return slots

    def make_actor(self, name: str, bundle: int, lost: str | None = None) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        remote = ray.remote(
            num_cpus=0, resources={"slot": 1}, max_restarts=0, max_task_retries=0, max_concurrency=2
        )(SlotActor)
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return remote.options(
            name=f"spark_ray.{self._experiment}.{name}.{os.urandom(3).hex()}", scheduling_strategy=strategy
        ).remote(*self._arguments, name, lost)

    def close(self) -> None:
        """Give the slots back. A local Ray ends with us; a joined cluster stays as it was."""
        import ray

        for slot in getattr(self, "slots", ()):
            slot.close()
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
        ray.shutdown()
        if self._tether is not None:
            assert self._tether.stdin is not None  # noqa: S101  piped
            self._tether.stdin.close()
            self._tether.wait(timeout=30)


def _tie_to_this_process() -> subprocess.Popen[bytes]:
    """See `tether`: every process of the local Ray ends at once with this one, however that ends."""
    started = [str(pid) for pid in observe.descendants(os.getpid()) if pid != os.getpid()]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(tether.__file__)), *started],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
