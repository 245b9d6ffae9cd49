"""Blocks driven over slots: what is pending is executed, each arm once, a void block again as a whole, and told."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

from . import digest
from .errors import WatchdogStop
from .execute import Slot, SlotLost
from .experiment import Experiment
from .outcome import ANSWERS, VOID
from .plan import Block, make_block
from .store import RECORD, BlockState, Store, read_record
from .told import Told, told_of

logger = logging.getLogger("spark_ray")
STOP_S = 0.2  # until whoever waits sees that it should stop


class Known(Protocol):
    """How well the map is known; `search.stopping.Decision` is one."""

    @property
    def stop(self) -> bool: ...
    @property
    def expected_misclassified(self) -> float: ...
    @property
    def undecided_volume(self) -> float: ...


class Listener(Protocol):
    """Told what happens, for a terminal or a metric. Called from slot threads."""

    def trial_started(self, slot: str, block: Block, arm: str, attempt: int) -> None: ...
    def trial_ended(self, slot: str, block: Block, arm: str, outcome: Mapping[str, str]) -> None: ...
    def block_ended(
        self, state: BlockState, divergence: float | None, known: Known | None = None
    ) -> None: ...


class Searcher(Protocol):
    """What `drive` needs of a search; `search.Search` is one."""

    def ask(self) -> Any: ...
    def tell(
        self,
        study_trial: int,
        *,
        contrast: float | None,
        constraints: Mapping[str, float],
        attributes: Mapping[str, object] = ...,
    ) -> None: ...
    def abandon(self, study_trial: int, reason: str) -> None: ...


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
        look: Callable[[], Known] | None = None,
    ) -> None:
        """Drive a run.

        `interrupted`: how many blocks `search.recover` found open; the next asks propose those first.
        `enough`: asked with the number of blocks begun by this process; true and no further one is begun.
        `look`: asked before and after each block what is known; when that is all that was wished, the run is finished.
        """
        self._store = store
        self._experiment = experiment
        self._arms = tuple(arms)
        self._search = search
        self._listener = listener
        self._lock = threading.Condition()
        self._open = 0  # blocks that slots are executing
        self._stop = threading.Event()
        blocks = store.blocks()
        self._begun_before = {block.study_trial: block for block in blocks}
        self._interrupted = interrupted
        self._count = len(blocks)
        self._begun = 0
        self._enough = enough
        self._look = look
        self._known = look() if look and blocks else None
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
            while (block := self._wait_for_block()) is not None:
                try:
                    self._execute(slot, block)
                finally:
                    with self._lock:
                        self._open -= 1
                        self._lock.notify_all()
        except BaseException as error:  # noqa: BLE001  handed to the thread that drives
            self.errors.append(error)
            self.stop()

    def _wait_for_block(self) -> Block | None:
        """The next one; None when all are done. What a block that is still open says may reverse that the map is known."""
        with self._lock:
            while not self._stop.is_set():
                block = self._next_block()
                if block is not None:
                    self._open += 1
                    return block
                if not (self._is_known and self._open):
                    return None
                self._lock.wait(STOP_S)
        return None

    @property
    def _is_known(self) -> bool:
        return self._known is not None and self._known.stop

    def _next_block(self) -> Block | None:
        if not self._interrupted and (self._is_known or self._count >= self._experiment.search.blocks):
            return None
        if self._enough(self._begun):
            self.paused = True
            return None
        self._begun += 1
        self._interrupted = max(0, self._interrupted - 1)
        proposal = self._search.ask()
        if proposal is None:
            return None
        block = self._begun_before.get(proposal.study_trial)
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
        told = told_of(state, self._store, self._experiment)
        contrast = told.contrast if told else "none, a compared arm failed"
        logger.info("%s complete: contrast %s", state.block.block_id, contrast)
        with self._lock:
            self._tell_search(state.block.study_trial, told)
            self._known = self._look() if self._look else None
        self._listener.block_ended(state, told.contrast if told else None, self._known)

    def _tell_search(self, study_trial: int, told: Told | None) -> None:
        if told is None:
            self._search.abandon(study_trial, "a compared arm failed")
        else:
            self._search.tell(
                study_trial,
                contrast=told.contrast,
                constraints=told.constraints,
                attributes=told.attributes,
            )


class Interrupt:
    """Ctrl-C and SIGTERM: end the present attempts, keep everything; a second one is not waited for."""

    def __init__(self, drive: Drive) -> None:
        self.hit = False
        self._drive = drive
        self._old = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True
        self._drive.stop()

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def failed_share(store: Store) -> tuple[int, int]:
    """(failed trials, all trials) over the executions that count; answers are not failures."""
    failed = total = 0
    for record in store.records():
        if record["standing"] == "counts":
            total += 1
            failed += record["outcome"]["kind"] not in ANSWERS
    return failed, total
