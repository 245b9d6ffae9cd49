"""The run folder. Records are the truth; everything else in it can be derived from them again.

One attempt of one trial is one folder, `trials/<block>.<arm>/<attempt>/`; its `record.json` present means that the
attempt is over. An attempt number counts executions of the *block*: attempt 2 of any arm belongs to the second
execution of its block. The block's outcome is that of its first execution in which every arm has a record and none
was disturbed; other attempts are open until there is one, superseded from then on. Nothing here is ever rewritten.

One driver at a time: the folder is locked while a driver lives. Readers need no lock.
"""

from __future__ import annotations

import compileall
import dataclasses
import fcntl
import json
import os
import py_compile
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from . import guestfiles
from .errors import RunError, cannot_write
from .outcome import VOID
from .plan import Block
from .worker import protocol

RECORD_VERSION = 1
RECORD = "record.json"
MOST_RECORD_BYTES = 64 << 20  # result and observations are 16 MiB each at most, and JSON may escape bytes
PLAN = "plan.json"  # written last by create: it makes a folder a run
LOCK = "run.lock"
MAKING = ".making"  # first in a new folder, and gone when it is a run


def write_durably(path: Path, data: Any) -> None:
    """JSON by rename, with file and folder synced: after this returns, a power cut does not lose it."""
    try:
        guestfiles.write(path, json.dumps(data, allow_nan=False) + "\n", durable=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise cannot_write(error) from error


def read_record(path: Path) -> dict[str, Any] | None:
    """A whole record of this version, or None: a torn one is the same as none, its attempt did not end."""
    try:
        record: Any = json.loads(guestfiles.read(path, MOST_RECORD_BYTES).decode())
    except (OSError, ValueError, RecursionError):
        return None
    outcome = record.get("outcome") if isinstance(record, dict) else None
    if not isinstance(outcome, dict) or not isinstance(outcome.get("kind"), str) or "trial_id" not in record:
        return None
    if record.get("record_version") != RECORD_VERSION:
        raise RunError(
            f"{path} is a record of version {record.get('record_version')!r}; this program writes {RECORD_VERSION}",
            mend="use the version of spark_ray that wrote the run (see its record's spark_ray_version)",
        )
    return dict(record)


@dataclass(frozen=True)
class BlockState:
    """Where a block stands, derived from its records."""

    block: Block
    attempts: int  # executions begun
    valid: int | None  # the execution that counts
    outcomes: dict[str, dict[str, str]]  # by arm, of the execution that counts (or the last one)

    @property
    def complete(self) -> bool:
        return self.valid is not None


class Store:
    """A run folder. `create` and `resume` lock it for driving; `read` does not."""

    def __init__(self, folder: Path, lock: IO[str] | None) -> None:
        self.folder = folder
        self._lock = lock

    # -- opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: Path,
        files: dict[str, str],
        plan: dict[str, Any],
        worker: Path | None = None,
        beside: Mapping[str, Path] | None = None,
    ) -> Store:
        """A new run: `files` verbatim, `worker` as the bundle with packages and modules `beside` it, by name.

        `plan` (plan.json) is written last and makes it a run.
        """
        if (folder / LOCK).exists():
            cls._take_lock(folder).close()  # if it is being driven now, that is what to say
        cls._require_vacant(folder)
        store = cls(folder, None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MAKING).touch()
            store._lock = cls._take_lock(folder)  # from here on nobody else makes or clears it
            cls._require_vacant(folder)
            _clear(folder)
            for name in ("trials", "blocks", "samples"):
                (folder / name).mkdir()
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
            if worker is not None:
                copy_bundle(worker, folder / "bundle" / protocol.PACKAGE)
            for name, source in (beside or {}).items():
                copy_bundle(source, folder / "bundle" / name)
        except OSError as error:
            store.close()
            raise RunError(
                f"cannot create {error.filename or folder}: {error.strerror}", mend="choose another --out"
            ) from error
        write_durably(folder / PLAN, plan)
        (folder / MAKING).unlink()
        return store

    def replan(self, plan: dict[str, Any]) -> None:
        """What a run is asked for from now on: how many blocks, within which limits."""
        write_durably(self.folder / PLAN, plan)

    @classmethod
    def _require_vacant(cls, folder: Path) -> None:
        if folder.exists() and any(folder.iterdir()) and not cls.was_torn(folder):
            raise RunError(
                f"{folder} is not empty",
                mend="continue that run with --resume, or choose another folder with --out",
            )

    @staticmethod
    def was_torn(folder: Path) -> bool:
        """Whether whoever made this folder died before it was a run: nothing has been measured in it."""
        return (folder / MAKING).exists() and not (folder / PLAN).exists()

    @classmethod
    def read(cls, folder: Path) -> Store:
        if not (folder / PLAN).is_file():
            why = "it has no plan.json" if folder.is_dir() else "there is no such folder"
            raise RunError(f"{folder} is not a run: {why}", mend="name a folder that sweep has made")
        return cls(folder, None)

    @classmethod
    def resume(cls, folder: Path) -> Store:
        store = cls.read(folder)
        store._lock = cls._take_lock(folder)
        return store

    @staticmethod
    def _take_lock(folder: Path) -> IO[str]:
        stream = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            stream.close()
            raise RunError(
                f"{folder} is being driven by process {holder}", mend="wait for it, or end it first"
            ) from error
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        return stream

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- plan and blocks ----------------------------------------------------------------------------------

    @property
    def plan(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        return data

    @property
    def journal(self) -> Path:
        return self.folder / "study.journal"

    def save_block(self, block: Block) -> None:
        write_durably(self.folder / "blocks" / f"{block.block_id}.json", dataclasses.asdict(block))

    def blocks(self) -> list[Block]:
        found = []
        for path in sorted((self.folder / "blocks").glob("b*.json")):
            data = json.loads(path.read_text(encoding="utf-8"))
            found.append(Block(**data | {"order": tuple(data["order"])}))
        return found

    # -- attempts -----------------------------------------------------------------------------------------

    def attempt_folder(self, trial_id: str, attempt: int) -> Path:
        return self.folder / "trials" / trial_id / str(attempt)

    def new_attempt_folder(self, trial_id: str, attempt: int) -> Path:
        folder = self.attempt_folder(trial_id, attempt)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise RunError(
                f"cannot create {folder}: {error.strerror}", mend="free space, then continue with --resume"
            ) from error
        return folder

    def state(self, block: Block) -> BlockState:
        """Derived from the records alone."""
        attempts = 0
        for arm in block.order:
            folder = self.folder / "trials" / block.trial_id(arm)
            if folder.is_dir():
                attempts = max([attempts, *(int(p.name) for p in folder.iterdir() if p.name.isdigit())])
        outcomes: dict[str, dict[str, str]] = {}
        for attempt in range(1, attempts + 1):
            records = {
                arm: read_record(self.attempt_folder(block.trial_id(arm), attempt) / RECORD)
                for arm in block.order
            }
            outcomes = {arm: record["outcome"] for arm, record in records.items() if record}
            if len(outcomes) == len(block.order) and not any(o["kind"] in VOID for o in outcomes.values()):
                return BlockState(block, attempts, attempt, outcomes)
        return BlockState(block, attempts, None, outcomes)

    def records(self) -> Iterator[dict[str, Any]]:
        """Every record, in block order, each with its `standing` added.

        counts: its block is complete, and this is the execution that says so. open: the latest execution of a block
        that is not complete yet. superseded: another execution of its block counts, or was begun since.
        """
        for block in self.blocks():
            state = self.state(block)
            for attempt in range(1, state.attempts + 1):
                for arm in block.order:
                    record = read_record(self.attempt_folder(block.trial_id(arm), attempt) / RECORD)
                    if record is not None:
                        yield record | {"standing": _standing(state, attempt)}

    def capacities(self, state: BlockState, arms: Sequence[str]) -> dict[str, int | None]:
        """KV bytes by arm of a complete block; None for an arm whose answer is that it does not fit."""
        found: dict[str, int | None] = {}
        for arm in arms:
            record = read_record(
                self.attempt_folder(state.block.trial_id(arm), state.valid or state.attempts) / RECORD
            )
            ok = record is not None and record["outcome"]["kind"] == "ok"
            found[arm] = (
                record["result"]["measurements"]["kv_cache"]["bytes"] if record is not None and ok else None
            )
        return found


def _standing(state: BlockState, attempt: int) -> str:
    if attempt != (state.valid or state.attempts):
        return "superseded"
    return "counts" if state.complete else "open"


def _clear(folder: Path) -> None:
    """Take away what a driver that died while it made this folder had put into it."""
    for path in folder.iterdir():
        if path.name in {MAKING, LOCK}:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def copy_bundle(source: Path, target: Path) -> None:
    """A package or module under the name it runs by, compiled; a file that is changed is compiled again."""
    if source.is_file():
        shutil.copyfile(source, target)
        return
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    compileall.compile_dir(target, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
