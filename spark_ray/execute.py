"""Slots: where an attempt is executed, on the node that they live on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from . import config, content, image, launch, nvml, plausible, treatments
from .environment_spec import DockerEnvironment
from .environments import Content, EnvironmentSpec, Site, docker
from .errors import UnavailableError
from .experiment import Experiment
from .plan import Block
from .rootact import RootActs
from .store import Store
from .worker import protocol

logger = logging.getLogger("spark_ray")
Executor = Literal["ray", "local"]
ENGINE_WAIT_S = 60  # a Docker daemon that is restarted is back in seconds


class Slot(Protocol):
    """A place where exactly one engine may live. `run` blocks until the attempt's record is durable."""

    name: str

    def run(self, block: Block, arm: str, attempt: int) -> dict[str, str]: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


class SlotLost(Exception):
    """The slot's actor died; its attempt has no record, and its guest ended with it."""


class SlotRunner:
    """Runs attempts on the node it lives on: in this process (--local), or inside an actor."""

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        arms: Sequence[str],
        name: str,
        lost: str | None = None,
        executor: Executor = "local",
    ) -> None:
        """`lost`: label of the attempt in which the runner before this one died. `executor`: for the record."""
        self.name = name
        self._executor = executor
        self._folder = folder
        self._experiment = experiment
        self._bundle = folder / "bundle"
        self._bundle_sha256 = protocol.package_sha256(self._bundle / protocol.PACKAGE)
        self._root = RootActs()
        specs = {arm: experiment.arms[arm].environment for arm in arms}
        wants_docker = any(isinstance(spec, DockerEnvironment) for spec in specs.values())
        self._client = image.connect() if wants_docker else None
        try:
            self._model = content.prepare_model(experiment)
            self._bandwidth = _memory_bandwidth(folder)
            self._references: dict[str, plausible.Reference | None] = {}
            trees = content.Trees()
            made = {arm: self._prepare(arm, trees) for arm in arms}
            self._contents = content.agree(made)
        except BaseException:
            self._hang_up()
            raise
        known = sorted(p for p in self._model.rglob("*") if p.is_file()) if self._model else []
        self._treater = treatments.Treatments(self._root, folder / "scratch" / name, known, run=str(folder))
        self._launcher = launch.Launcher(self._treater, self._client)
        # Labels of attempts after which the engine has not been looked at.
        self._disturbed = [lost] if lost else []

    def run(self, block: Block, arm: str, attempt: int) -> dict[str, str]:
        self._recover_engine()
        job = self._job(block, arm, attempt)
        outcome: dict[str, str] = self._launcher.run(job)["outcome"]
        if outcome["kind"] == "disturbed":
            self._disturbed.append(job.site.label)
        return outcome

    def _recover_engine(self, longest_s: float = ENGINE_WAIT_S) -> None:
        """After a disturbance: the Docker engine must answer again, or its restart would use up every attempt of a block.

        What it could not remove of such attempts while it was away goes now.
        """
        if self._client is None or not self._disturbed:
            return
        image.wait_for_engine(self._client, longest_s, self._launcher.stop.is_set)
        with contextlib.suppress(OSError):  # it went away again: the next attempt will wait for it
            while self._disturbed:
                labels = {docker.LABEL_RUN: str(self._folder), docker.LABEL_TRIAL: self._disturbed[-1]}
                image.remove_labelled(self._client, labels)
                self._disturbed.pop()

    def stop(self) -> None:
        """End the present attempt, if any: its outcome is disturbed/interrupted."""
        self._launcher.stop.set()

    def close(self) -> None:
        with contextlib.suppress(UnavailableError):
            self._recover_engine(longest_s=0)
        self._launcher.close()
        self._treater.close()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()

    def _prepare(self, arm: str, trees: content.Trees) -> Content:
        """Content of one arm, the same whatever its knobs are; a flag that the daemon refuses is said now, before any trial."""
        made = content.prepare(self._experiment.arms[arm].environment, self._client, trees)
        tried: list[EnvironmentSpec] = []
        for each in self._experiment.variants.values():
            spec = each.arms[arm].environment
            if isinstance(spec, DockerEnvironment) and made.image_id is not None and spec not in tried:
                tried.append(spec)
                refused = content.refused_flags(spec, self._client, made.image_id)
                if refused:
                    raise UnavailableError(f"arm {arm}: {refused.what}", mend=refused.mend)
        return made

    def _reference(self, engine: dict[str, Any]) -> plausible.Reference | None:
        """What the model's files say of this engine; looked up once for each that knobs and arms make."""
        if self._model is None or engine["kind"] not in {"embedded", "tensorrt_llm"}:
            return None
        key = json.dumps(engine, sort_keys=True)
        if key not in self._references:
            self._references[key] = plausible.reference(self._model, engine, self._bandwidth)
        return self._references[key]

    def _job(self, block: Block, arm: str, attempt: int) -> launch.Job:
        experiment, trial_id = self._experiment.at(block.configuration), block.trial_id(arm)
        folder = Store(self._folder, None).new_attempt_folder(trial_id, attempt)
        engine = experiment.engine_of(arm).model_dump(mode="json")
        can = self._root.available()[0]
        treatment = treatments.effective(experiment.treatment_of(arm), can, settles=experiment.settles(arm))[
            0
        ]
        return launch.Job(
            folder=folder,
            trial={
                "run": experiment.name, "block_id": block.block_id, "trial_id": trial_id, "arm": arm, "attempt": attempt,
                "position": block.order.index(arm), "configuration": dict(block.configuration),
                "repetition": block.repetition, "slot": self.name, "study_trial": block.study_trial, "executor": self._executor,
            },
            engine=engine,
            workload=experiment.workload.model_dump(mode="json"),
            environment=experiment.arms[arm].environment,
            site=Site(
                attempt=folder, bundle=self._bundle, model=self._model, content=self._contents[arm],
                label=f"{trial_id}/{attempt}", run_label=str(self._folder), uid=os.getuid(), gid=os.getgid(),
                root_argv=self._root.prefix() if can else (),
                compile_cache=self._treater.compile_cache(treatment, arm, block.configuration),
            ),
            treatment=treatment,
            limits=experiment.limits,
            bundle_sha256=self._bundle_sha256,
            seed=experiment.seed,
            reference=self._reference(engine), needs_gpu=experiment.engine_of(arm).needs_gpu,
            moment={"block": block.index, "position": block.order.index(arm), "arms": len(block.order)},
        )  # fmt: skip


def _memory_bandwidth(folder: Path) -> float | None:
    """Of this node: as the cluster file of the run says, else as its GPU is known to have."""
    file = folder / "cluster.yaml"
    said = config.load_cluster(file).memory_bandwidth_bytes_per_s if file.is_file() else None
    return nvml.memory_bandwidth_bytes_per_s() if said is None else said


class LocalSlots:
    """The executor without Ray: the same runner in this process, the same records."""

    def __init__(self, folder: Path, experiment: Experiment, arms: Sequence[str]) -> None:
        self.slots: list[Slot] = [SlotRunner(folder, experiment, arms, "local-0")]

    def close(self) -> None:
        for slot in self.slots:
            slot.close()
