"""What is pending, executed and stored: blocks on slots, each arm once, a void block again as a whole."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from . import config, content, digest, image, launch, nvml, plausible, treatments
from .divergence import contrast
from .environment_spec import DockerEnvironment
from .environments import Content, EnvironmentSpec, Site, docker
from .errors import UnavailableError, WatchdogStop
from .experiment import Experiment
from .outcome import ANSWERS, VOID
from .plan import Block, make_block
from .rootact import RootActs
from .store import RECORD, BlockState, Store, read_record
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


class Listener(Protocol):
    """Told what happens, for a terminal or a metric. Called from slot threads."""

    def trial_started(self, slot: str, block: Block, arm: str, attempt: int) -> None: ...
    def trial_ended(self, slot: str, block: Block, arm: str, outcome: Mapping[str, str]) -> None: ...
    def block_ended(self, state: BlockState, divergence: float | None) -> None: ...


class Searcher(Protocol):
    """What `drive` needs of a search; `search.Search` is one."""

    def ask(self) -> Any: ...
    def tell(self, study_trial: int, *, contrast: float | None, constraints: Mapping[str, float]) -> None: ...
    def abandon(self, study_trial: int, reason: str) -> None: ...


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
            bandwidth = _memory_bandwidth(folder)
            self._references = {arm: self._reference(experiment, arm, bandwidth) for arm in arms}
            trees = content.Trees()
            made = {arm: self._prepare(arm, spec, trees) for arm, spec in specs.items()}
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

    def _prepare(self, arm: str, spec: EnvironmentSpec, trees: content.Trees) -> Content:
        """Content of one arm; a flag that the daemon refuses is said now, before any trial."""
        made = content.prepare(spec, self._client, trees)
        if isinstance(spec, DockerEnvironment) and made.image_id is not None:
            refused = content.refused_flags(spec, self._client, made.image_id)
            if refused:
                raise UnavailableError(f"arm {arm}: {refused.what}", mend=refused.mend)
        return made

    def _reference(
        self, experiment: Experiment, arm: str, bandwidth: float | None
    ) -> plausible.Reference | None:
        engine = experiment.engine_of(arm).model_dump(mode="json")
        loads = engine["kind"] in {"embedded", "tensorrt_llm"}
        return plausible.reference(self._model, engine, bandwidth) if self._model and loads else None

    def _job(self, block: Block, arm: str, attempt: int) -> launch.Job:
        experiment, trial_id = self._experiment, block.trial_id(arm)
        folder = Store(self._folder, None).new_attempt_folder(trial_id, attempt)
        spec = experiment.arms[arm]
        can = self._root.available()[0]
        treatment = treatments.effective(spec.treatment, can, settles=experiment.settles(arm))[0]
        return launch.Job(
            folder=folder,
            trial={
                "run": experiment.name, "block_id": block.block_id, "trial_id": trial_id, "arm": arm, "attempt": attempt,
                "position": block.order.index(arm), "configuration": dict(block.configuration),
                "repetition": block.repetition, "slot": self.name, "study_trial": block.study_trial, "executor": self._executor,
            },
            engine=experiment.engine_of(arm).model_dump(mode="json"),
            workload=experiment.workload.model_dump(mode="json"),
            environment=spec.environment,
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
            reference=self._references[arm], needs_gpu=experiment.engine_of(arm).needs_gpu,
        )  # fmt: skip


def _memory_bandwidth(folder: Path) -> float | None:
    """Of this node: as the cluster file of the run says, else as its GPU is known to have."""
    file = folder / "cluster.yaml"
    said = config.load_cluster(file).memory_bandwidth_bytes_per_s if file.is_file() else None
    return nvml.memory_bandwidth_bytes_per_s() if said is None else said


class Drive:
    """Keeps every slot busy until the budget of blocks is complete, or someone says stop."""

    def __init__(
        self,
        store: Store,
        experiment: Experiment,
        arms: Sequence[str],
        search: Searcher,
        listener: Listener,
        interrupted: int = 0,
        *,
        enough: Callable[[int], bool] = lambda begun: False,  # noqa: ARG005
    ) -> None:
        """Drive a run.

        `interrupted`: how many blocks `search.recover` found open; the next asks propose those first.
        `enough`: asked with the number of blocks begun by this process; true and no further one is begun.
        """
        self._store = store
        self._experiment = experiment
        self._arms = tuple(arms)
        self._search = search
        self._listener = listener
        self._lock = threading.Lock()
        self._stop = threading.Event()
        blocks = store.blocks()
        self._known = {block.study_trial: block for block in blocks}
        self._interrupted = interrupted
        self._count = len(blocks)
        self._begun = 0
        self._enough = enough
        self.paused = False
        self._slots: Sequence[Slot] = ()
        self.given_up: list[str] = []
        self.errors: list[BaseException] = []

    def stop(self) -> None:
        """End soon: the present attempts are interrupted, their blocks stay open for --resume."""
        self._stop.set()
        for slot in self._slots:
            with contextlib.suppress(Exception):
                slot.stop()

    def run(self, slots: Sequence[Slot]) -> None:
        """Drive all slots in parallel, one thread each; raises the first error after every slot has ended."""
        self._slots = slots
        threads = [threading.Thread(target=self._serve, args=(slot,), name=slot.name) for slot in slots]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a plain join would keep Ctrl-C waiting
                thread.join(timeout=0.2)
        if self.errors:
            raise self.errors[0]

    def _serve(self, slot: Slot) -> None:
        try:
            for block in self._blocks():
                self._execute(slot, block)
        except BaseException as error:  # noqa: BLE001  handed to the thread that drives
            self.errors.append(error)
            self.stop()

    def _blocks(self) -> Iterator[Block]:
        while not self._stop.is_set():
            with self._lock:
                block = self._next_block()
            if block is None:
                return
            yield block

    def _next_block(self) -> Block | None:
        if not self._interrupted and self._count >= self._experiment.search.blocks:
            return None
        if self._enough(self._begun):
            self.paused = True
            return None
        self._begun += 1
        self._interrupted = max(0, self._interrupted - 1)
        proposal = self._search.ask()
        if proposal is None:
            return None
        block = self._known.get(proposal.study_trial)
        if block is None:
            block = make_block(
                self._count,
                proposal.study_trial,
                proposal.configuration,
                proposal.repetition,
                self._arms,
                self._experiment.seed,
            )
            self._store.save_block(block)
            self._count += 1
        return block

    def _execute(self, slot: Slot, block: Block) -> None:
        first = self._store.state(block).attempts + 1
        for attempt in range(first, first + self._experiment.limits.block_attempts):
            void = self._execute_once(slot, block, attempt)
            if self._stop.is_set() and void:
                return
            if not void:
                self._tell(self._store.state(block))
                return
        self.given_up.append(block.block_id)
        logger.warning("%s was disturbed too often and is given up", block.block_id)
        with self._lock:
            self._search.abandon(
                block.study_trial, f"disturbed {self._experiment.limits.block_attempts} times"
            )
        self._listener.block_ended(self._store.state(block), None)

    def _execute_once(self, slot: Slot, block: Block, attempt: int) -> bool:
        """Every arm once, in order. True when the block is void and has to run again."""
        for arm in block.order:
            if self._stop.is_set():
                return True
            self._listener.trial_started(slot.name, block, arm, attempt)
            folder = self._store.attempt_folder(block.trial_id(arm), attempt)
            logger.info("%s %s/%d begins on %s, in %s", block.block_id, arm, attempt, slot.name, folder)
            try:
                outcome = slot.run(block, arm, attempt)
            except SlotLost as error:
                outcome = {"kind": "disturbed", "reason": "slot_lost", "message": str(error)}
            self._log_end(block, arm, attempt, outcome)
            self._listener.trial_ended(slot.name, block, arm, outcome)
            if outcome["kind"] == "host_wedged":
                raise WatchdogStop(
                    f"{block.trial_id(arm)}: {outcome['message']}",
                    mend="free memory, then --resume, which begins with this block; or begin another run with a smaller fraction: "
                    "--set name=NAME --set search.space.memory_fraction=FRACTION",
                )
            if outcome["kind"] in VOID:
                return True
        return False

    def _log_end(self, block: Block, arm: str, attempt: int, outcome: Mapping[str, str]) -> None:
        """From the record, so that the log is the same wherever the attempt was executed."""
        name = f"{block.block_id} {arm}/{attempt}"
        folder = self._store.attempt_folder(block.trial_id(arm), attempt)
        record = read_record(folder / RECORD)
        for line in digest.lines(record, folder) if record else ():
            logger.info("%s %s", name, line)
        level = logging.INFO if outcome["kind"] in ANSWERS else logging.WARNING
        logger.log(level, "%s %s %s %s", name, outcome["kind"], outcome["reason"], outcome["message"])

    def _tell(self, state: BlockState) -> None:
        told = outcome_of(state, self._store, self._experiment)
        logger.info(
            "%s complete: contrast %s",
            state.block.block_id,
            told[0] if told else "none, a compared arm failed",
        )
        with self._lock:
            if told is None:
                self._search.abandon(state.block.study_trial, "a compared arm failed")
            else:
                self._search.tell(state.block.study_trial, contrast=told[0], constraints=told[1])
        self._listener.block_ended(state, told[0] if told else None)


def outcome_of(
    state: BlockState, store: Store, experiment: Experiment
) -> tuple[float | None, dict[str, float]] | None:
    """(contrast or None, constraint by arm: above 0 is violated) of a complete block; None if a compared arm failed."""
    pair = experiment.compared
    kinds = {arm: state.outcomes[arm]["kind"] for arm in (pair.baseline, pair.against)}
    if not set(kinds.values()) <= ANSWERS:
        return None
    sizes = store.capacities(state, list(kinds))
    constraints = {f"{arm}_has_no_capacity": -1.0 if size else 1.0 for arm, size in sizes.items()}
    baseline, against = sizes[pair.baseline], sizes[pair.against]
    if not baseline or not against:
        return None, constraints
    return contrast(baseline, against), constraints


class LocalSlots:
    """The executor without Ray: the same runner in this process, the same records."""

    def __init__(self, folder: Path, experiment: Experiment, arms: Sequence[str]) -> None:
        self.slots: list[Slot] = [SlotRunner(folder, experiment, arms, "local-0")]

    def close(self) -> None:
        for slot in self.slots:
            slot.close()


def failed_share(store: Store) -> tuple[int, int]:
    """(failed trials, all trials) over the executions that count; answers are not failures."""
    failed = total = 0
    for record in store.records():
        if record["standing"] == "counts":
            total += 1
            failed += record["outcome"]["kind"] not in ANSWERS
    return failed, total
