"""One sweep under fire: its driver processes, its guests, what a death left behind, and whether the run came out whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import yaml
from chaos_places import Engine, mounts_below, wait_until

from spark_ray.environments import RUN_VARIABLE
from spark_ray.outcome import VOID
from spark_ray.plan import Block
from spark_ray.store import Store
from spark_ray.worker.observe import descendants

TOKEN = (
    "SPARK_RAY_CHAOS"  # set for drivers, and inherited by all they start but the guests, who have their own
)
SETTLE_BOUND_S = 5.0
LONGEST_DRIVER_S = 300.0
QUIET = {"page_cache": "keep", "per_cpu_pages": "as_is"}
SPACE = {
    "max_batch_size": {"low": 1, "high": 64},
    "max_num_tokens": {"low": 256, "high": 1024},
}
# Deaths are the subject here, not memory: a noisy neighbour must not void a block as well.
LIMITS = {"memory_tolerance": "64GiB", "memory_wait": "5s", "failed_share": 1.0}
TINY = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "attention_heads": 2, "kv_heads": 2,
        "head_dim": 32, "vocabulary": 256}  # fmt: skip


def experiment(
    kinds: Sequence[str], blocks: int, *, engine: str = "fake", sampler: str = "random", seed: int = 0, hold: str = "200ms",
    timeout: str = "8s",
) -> dict[str, Any]:  # fmt: skip
    """An experiment whose arms are of these kinds, named after them."""
    names = [f"{kind}-{kinds[:index].count(kind) + 1}" for index, kind in enumerate(kinds)]
    settings: dict[str, Any] = {"kind": "fake", "hold": hold}
    fractions, more = {"low": 0.05, "high": 0.15}, dict[str, Any]()
    if engine == "embedded":
        fractions = {"low": 0.004, "high": 0.01}  # a real pool, small enough for any machine
        settings = {"kind": "embedded", "tokens_per_block": 64, "max_seq_len": 128, "threads": 1}
        more = {
            "model": {"random_llama": TINY},
            "workload": {"requests": 1, "input_tokens": 8, "output_tokens": 2},
        }
    return {
        "name": f"chaos-{engine}", "seed": seed, "engine": settings, **more,
        "search": {"sampler": sampler, "blocks": blocks, "space": SPACE | {"memory_fraction": fractions}},
        "arms": {name: {"environment": kind, "treatment": QUIET} for name, kind in zip(names, kinds, strict=True)},
        "contrast": {"baseline": names[0], "against": names[1]},
        "limits": {"trial_timeout": "120s" if engine == "embedded" else timeout, **LIMITS},
    }  # fmt: skip


# ---- processes --------------------------------------------------------------------------------------------


def command_of(pid: int) -> str:
    """Empty when the process has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def started_ticks(pid: int) -> str | None:
    """With the number this names one process for good: numbers are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[19]
    except OSError:
        return None


def marked(variable: str, value: str) -> dict[int, dict[str, str]]:
    """Live processes whose environment sets `variable` to `value`, with their environment."""
    mark, found = f"{variable}={value}".encode(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in words and command_of(int(entry.name)):
            pairs = (word.decode(errors="replace").partition("=") for word in words)
            found[int(entry.name)] = {name: text for name, _, text in pairs}
    return found


@dataclass(frozen=True)
class GuestProcess:
    pid: int
    label: str  # trial/attempt
    role: str  # supervisor or worker

    @property
    def kind(self) -> str:
        """The environment's kind: arms are named KIND-NUMBER."""
        return self.label.split("/")[0].split(".", 1)[1].rsplit("-", 1)[0]


def guests(run: Path) -> list[GuestProcess]:
    found = marked(RUN_VARIABLE, str(run))
    roles = {}
    for pid in found:
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        roles[pid] = "worker" if parent in found else "supervisor"
    return [GuestProcess(pid, found[pid].get("SPARK_RAY_TRIAL", ""), role) for pid, role in roles.items()]


# ---- a run ------------------------------------------------------------------------------------------------


@dataclass
class Driver:
    process: subprocess.Popen[bytes]
    resumed: bool
    started_at: float  # on the clock that stamps files
    known: set[Path]  # attempts that were there before
    tree: dict[int, str | None] = field(default_factory=dict)  # what it had started when last looked at

    def look(self) -> None:
        """Remember its processes: Ray's overwrite their environment, so a mark in it does not find them."""
        below = [pid for pid in descendants(self.process.pid) if pid != self.process.pid]
        self.tree |= {pid: started_ticks(pid) for pid in below}

    def orphans(self) -> dict[int, str]:
        """What it had started and still lives."""
        same = (pid for pid, ticks in self.tree.items() if ticks is not None and started_ticks(pid) == ticks)
        return {pid: command for pid in same if (command := command_of(pid))}


class Run:
    """A run folder and whoever drives it at the moment."""

    def __init__(
        self,
        folder: Path,
        notes: Path,
        data: Mapping[str, Any],
        options: Sequence[str],
        engine: Engine | None,
    ) -> None:
        self.folder = folder
        self.data = data
        self.engine = engine
        self.options = list(options)
        self.log = notes / "output.log"
        self._yaml = notes / "experiment.yaml"
        self._yaml.write_text(yaml.safe_dump(dict(data), sort_keys=False))
        self._starts = 0
        self.driver: Driver | None = None
        self.restart_s: list[float] = []

    @property
    def local(self) -> bool:
        return "--local" in self.options

    def attempts(self) -> set[Path]:
        return set(self.folder.glob("trials/*/*"))

    def start(self) -> Driver:
        """A driver: the first begins the run, every later one resumes it, unless the first died before there was a folder."""
        resume = ["--resume"] if self._starts and any(self.folder.glob("*")) else []
        command = [sys.executable, "-m", "spark_ray.sweep", str(self._yaml), "--out", str(self.folder)]
        known, self._starts = self.attempts(), self._starts + 1
        with self.log.open("ab") as log:
            started_at = time.time()
            process = subprocess.Popen(
                [*command, *self.options, *resume], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env={**os.environ, TOKEN: str(self.folder)},
            )  # fmt: skip
        self.driver = Driver(process, self._starts > 1, started_at, known)
        return self.driver

    def ended(self, driver: Driver) -> None:
        """Nobody drives now. Note when the driver's first new trial began, if it had come back and got that far."""
        self.driver = None
        stamps = []
        for path in self.attempts() - driver.known:
            request = path / "request.json"
            if request.is_file():
                stamps.append(request.stat().st_mtime)
        if stamps and driver.resumed:
            self.restart_s.append(min(stamps) - driver.started_at)

    def wait_for_attempt(self, driver: Driver, known: set[Path]) -> bool:
        """Until an attempt begins that is not in `known`; False when the driver ended before."""
        wait_until(lambda: self.attempts() - known or driver.process.poll() is not None, LONGEST_DRIVER_S)
        return driver.process.poll() is None

    def left(self, driver: Driver) -> list[str]:
        """What should not be there once a driver and everything of it has ended."""
        found = [f"process {pid} {command[:80]}" for pid, command in driver.orphans().items()]
        found += [
            f"process {pid} {command_of(pid)[:80]}"
            for pid in {**marked(TOKEN, str(self.folder)), **marked(RUN_VARIABLE, str(self.folder))}
        ]
        found += [f"mount {point}" for point in mounts_below(self.folder) if Path(point) != self.folder]
        if self.engine is not None:
            running = self.engine.running(self.folder)
            found += [f"running container {each[:12]}" for each in running]
            found += [f"cgroup {path}" for path in self.engine.cgroups()]
            found += [f"mount {point}" for point in self.engine.trees()]
        return found

    def settle(self, look: Callable[[], list[str]]) -> tuple[float, list[str]]:
        """Seconds until `look` finds nothing, and what it still finds at the bound."""
        began, left = time.monotonic(), look()
        while left and time.monotonic() - began < SETTLE_BOUND_S:
            time.sleep(0.02)
            left = look()
        return time.monotonic() - began, left

    def whole(self) -> bool:
        """Whether every block that was begun is complete: one disturbed too often is given up until the next resume."""
        store = Store.read(self.folder)
        return all(store.state(block).complete for block in store.blocks())

    def abort(self) -> None:
        """End whatever still runs of it, when the benchmark itself stops in the middle."""
        if self.driver is not None:
            self.driver.look()
            self.driver.process.kill()
            self.driver.process.wait()
            for pid in (*self.driver.orphans(), *marked(RUN_VARIABLE, str(self.folder))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def complete(self) -> list[int]:
        """Let it run to its end, as a user would: resume what stopped or gave a block up. Returns the exit codes."""
        codes: list[int] = []
        while len(codes) < 5:
            driver = self.driver or self.start()
            try:
                codes.append(driver.process.wait(LONGEST_DRIVER_S))
            except subprocess.TimeoutExpired:
                driver.process.kill()
                codes.append(driver.process.wait())
            self.ended(driver)
            if codes[-1] == 0 and self.whole():
                break
        return codes


# ---- whether it came out whole ----------------------------------------------------------------------------


def study_states(folder: Path) -> Counter[str]:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = str(folder / "study.journal")
    study = optuna.load_study(
        study_name=None, storage=JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    )
    return Counter(trial.state.name for trial in study.get_trials(deepcopy=False))


def counted_trials(folder: Path) -> list[str]:
    """The trials that the tables, which all analysis reads, count."""
    try:
        table = pandas.read_parquet(folder / "trials.parquet")
    except FileNotFoundError:
        return []
    return list(table[table["standing"] == "counts"]["trial_id"])


def whole_executions(blocks: Sequence[Block], records: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """By block: executions in which every arm has an answer. Beside the store's own view, which takes the first."""
    arms = Counter((r["block_id"], r["attempt"]) for r in records if r["outcome"]["kind"] not in VOID)
    sizes = {block.block_id: len(block.order) for block in blocks}
    return Counter(block_id for (block_id, _), count in arms.items() if count == sizes[block_id])


def score(run: Run, codes: Sequence[int], timeouts_allowed: int) -> dict[str, int]:
    """What is wrong with a run that should be whole; every value should be 0 but those named `info_...`."""
    store = Store.read(run.folder)
    blocks = store.blocks()
    states = [store.state(block) for block in blocks]
    planned = run.data["search"]["blocks"]
    records = list(store.records())
    valid = Counter(counted_trials(run.folder))
    failed = Counter(
        record["outcome"]["kind"]
        for record in records
        if record["standing"] == "counts" and record["outcome"]["kind"] != "ok"
    )
    ended = Counter(record["trial_id"] for record in records if record["outcome"]["kind"] == "ok")
    excused = min(failed["timeout"], timeouts_allowed)
    report = run.folder / "report.html"
    return {
        "blocks_lost": planned - sum(state.complete for state in states),
        "blocks_counted_twice": sum(max(0, count - 1) for count in whole_executions(blocks, records).values())
        + max(0, len(blocks) - planned),
        "trials_lost": planned * len(run.data["arms"]) - len(valid),
        "trials_counted_twice": sum(valid.values()) - len(valid),
        "trials_failed_by_a_fault": sum(failed.values()) - excused,
        "left_running": study_states(run.folder)["RUNNING"],
        "containers_left": len(run.engine.containers(run.folder)) if run.engine else 0,
        "tracebacks": run.log.read_text(errors="replace").count("Traceback (most recent call last)"),
        "not_ended_well": int(codes[-1] != 0),
        "without_report": int(not report.is_file()),
        "info_blocks": planned,
        "info_timeouts": excused,
        "info_trials_executed_again": sum(ended.values()) - len(ended),
    }  # fmt: skip
