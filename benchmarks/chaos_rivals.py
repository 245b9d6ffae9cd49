"""The same kill for the peers: Optuna and Ray Tune, each by its own documented way to survive it, around the same trial.

    Optuna    study.optimize over RDBStorage with heartbeat and RetryHeartbeatStaleTrialCallback, a subprocess a trial
    Ray Tune  OptunaSearch, Tuner.restore(resume_unfinished=True, restart_errored=True), state saved each second

A trial is a process that appends a line to a file when it begins and when it has come to its end; the file, not what
a system believes, says what was executed. Ours is scored by the same columns from its own attempt folders.
`python chaos_rivals.py SYSTEM FOLDER TRIALS` is the driver that is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_places import wait_until
from chaos_sweep import SETTLE_BOUND_S, TOKEN, Driver, Run, command_of, experiment, marked, score

HOLD_S = 0.4
SPREAD_S = 2.0
LONGEST_S = 300.0
OPTUNA, TUNE = "Optuna", "Ray Tune"
OURS, OURS_RAY = "ours, --local", "ours, Ray slot"
TRIAL = """
import os, sys, time
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(what): os.write(log, f"{what} {sys.argv[2]} {time.time()}\\n".encode())
note("begin"); time.sleep(float(sys.argv[3])); note("end")
"""


def execute_trial(folder: str, key: str) -> None:
    log = f"{folder}/executions"
    subprocess.run([sys.executable, "-I", "-S", "-c", TRIAL, log, key, str(HOLD_S)], check=True)


# ---- the drivers that are killed --------------------------------------------------------------------------


def drive_optuna(folder: str, trials: int) -> dict[str, Any]:
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    storage = RDBStorage(
        f"sqlite:///{folder}/study.db", heartbeat_interval=1,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )  # fmt: skip
    study = optuna.create_study(storage=storage, study_name="chaos", load_if_exists=True)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        execute_trial(folder, repr(x))
        return x

    def measured() -> list[float]:
        return [trial.params["x"] for trial in study.get_trials(states=(TrialState.COMPLETE,))]

    if len(measured()) < trials:
        study.optimize(objective, callbacks=[MaxTrialsCallback(trials, states=(TrialState.COMPLETE,))])
    running = len(study.get_trials(states=(TrialState.RUNNING,)))
    return {"measured": [repr(x) for x in measured()], "left_running": running}


def drive_tune(folder: str, trials: int) -> dict[str, Any]:
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": "1",  # of its state: by itself every 10 s at best
    }
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
    )

    def trial(point: dict[str, float]) -> dict[str, float]:
        execute_trial(folder, repr(point["x"]))
        return {"y": point["x"]}

    path = f"{folder}/tune/chaos"
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable=trial, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trial, param_space={"x": tune.uniform(0, 1)},
            tune_config=tune.TuneConfig(metric="y", mode="max", num_samples=trials, search_alg=OptunaSearch(), max_concurrent_trials=1),
            run_config=tune.RunConfig(name="chaos", storage_path=f"{folder}/tune", verbose=0),
        )  # fmt: skip
    results = tuner.fit()
    measured = [
        repr(result.config["x"])
        for result in results
        if result.error is None and "y" in (result.metrics or {})
    ]
    return {"measured": measured, "left_running": len(results) - results.num_terminated - results.num_errors}


# ---- the race ---------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One system over all its runs."""

    name: str
    kills: int = 0
    trials: int = 0
    lost: int = 0
    executed_twice: int = 0
    counted_twice: int = 0
    left_running: int = 0
    left_behind: int = 0  # kills after which something of it still lived at the bound
    gone_s: list[float] = field(default_factory=list)
    restart_s: list[float] = field(default_factory=list)
    failed: int = 0  # runs that did not come to an end


class Peer:
    """A run of a peer: what drives it, and what was executed."""

    def __init__(self, system: str, folder: Path, trials: int) -> None:
        folder.mkdir()
        self._command = [sys.executable, __file__, system, str(folder), str(trials)]
        self.folder = folder
        self.trials = trials
        self._starts = 0
        self._drivers: list[Driver] = []

    def start(self) -> Driver:
        self._starts += 1
        with (self.folder / "output").open("ab") as log:
            started_at = time.time()
            process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, TOKEN: str(self.folder)},
            )  # fmt: skip
        self._drivers.append(Driver(process, self._starts > 1, started_at, set()))
        return self._drivers[-1]

    def executions(self) -> list[tuple[str, str, float]]:
        path = self.folder / "executions"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(what, key, float(at)) for what, key, at in map(str.split, lines)]

    def first_trial_s(self, driver: Driver) -> float | None:
        began = [at for what, _, at in self.executions() if what == "begin" and at > driver.started_at]
        return min(began) - driver.started_at if began else None

    def left(self, driver: Driver) -> list[str]:
        alive = {**driver.orphans(), **{pid: command_of(pid) for pid in marked(TOKEN, str(self.folder))}}
        return [f"{pid} {command[:60]}" for pid, command in alive.items()]

    def kill(self, driver: Driver, row: Row) -> None:
        driver.look()
        driver.process.kill()
        driver.process.wait()
        began = time.monotonic()
        wait_until(lambda: not self.left(driver), SETTLE_BOUND_S)
        row.gone_s.append(time.monotonic() - began)
        row.left_behind += bool(self.left(driver))

    def sweep_up(self) -> None:
        """What it left would disturb the next contender."""
        for driver in self._drivers:
            pids = [
                *driver.orphans(),
                *marked(TOKEN, str(self.folder)),
                *([driver.process.pid] if driver.process.poll() is None else []),
            ]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def race_peer(system: str, row: Row, folder: Path, trials: int, delays: list[float]) -> None:
    peer = Peer(system, folder, trials)
    try:
        for delay_s in delays:
            driver = peer.start()
            wait_until(
                lambda d=driver: peer.first_trial_s(d) is not None or d.process.poll() is not None, LONGEST_S
            )  # type: ignore[misc]
            time.sleep(delay_s)
            first_s = peer.first_trial_s(driver)
            if driver.resumed and first_s is not None:
                row.restart_s.append(first_s)
            if driver.process.poll() is not None:
                break
            row.kills += 1
            peer.kill(driver, row)
        last = peer.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            last.process.wait(LONGEST_S)
        if (first_s := peer.first_trial_s(last)) is not None:
            row.restart_s.append(first_s)
        _score_peer(peer, row)
    finally:
        peer.sweep_up()


def _score_peer(peer: Peer, row: Row) -> None:
    begun = Counter(key for what, key, _ in peer.executions() if what == "begin")
    ended = Counter(key for what, key, _ in peer.executions() if what == "end")
    try:
        said = json.loads((peer.folder / "said.json").read_text())
    except FileNotFoundError:
        said = {"measured": [], "left_running": 0}
        row.failed += 1
    row.trials += peer.trials
    row.lost += max(len(set(begun) - set(ended)), peer.trials - len(said["measured"]))
    row.executed_twice += sum(ended.values()) - len(ended)
    row.counted_twice += len(said["measured"]) - len(set(said["measured"]))
    row.left_running += said["left_running"]


def race_ours(options: list[str], row: Row, folder: Path, trials: int, delays: list[float]) -> None:
    """Blocks of two native arms, so as many trials; a block in which the driver died is executed again as a whole."""
    folder.mkdir()
    data = experiment(["native", "native"], trials // 2, hold=f"{int(HOLD_S * 1000)}ms", timeout="30s")
    run = Run(folder / "run", folder, data, options, engine=None)
    try:
        for delay_s in delays:
            driver = run.start()
            if not run.wait_for_attempt(driver, driver.known):
                break
            time.sleep(delay_s)
            if driver.process.poll() is not None:
                break
            driver.look()
            driver.process.kill()
            driver.process.wait()
            gone_s, left = run.settle(lambda d=driver: run.left(d))  # type: ignore[misc]
            run.ended(driver)
            row.kills += 1
            row.gone_s.append(gone_s)
            row.left_behind += bool(left)
        found = score(run, run.complete(), 0)
    finally:
        run.abort()
    whole = Counter(path.parent.parent.name for path in run.folder.glob("trials/*/*/result.json"))
    row.trials += found["info_blocks"] * 2
    row.lost += found["trials_lost"] + found["trials_failed_by_a_fault"]
    row.executed_twice += sum(whole.values()) - len(whole)
    row.counted_twice += found["trials_counted_twice"] + found["blocks_counted_twice"]
    row.left_running += found["left_running"]
    row.restart_s += run.restart_s
    row.failed += found["not_ended_well"]


def compare(
    folder: Path, chosen: argparse.Namespace, generator: random.Random, say: Callable[[str], None]
) -> list[Row]:
    """Rounds of all systems in random order, killed after the same delays. The short form is without Ray's two."""
    rounds, trials, kills = (1, 6, 1) if chosen.quick else (chosen.rounds, chosen.trials, 3)
    acts: dict[str, Callable[[Row, Path, list[float]], None]] = {
        OURS: lambda row, home, delays: race_ours(["--local"], row, home, trials, delays),
        OPTUNA: lambda row, home, delays: race_peer("optuna", row, home, trials, delays),
    }
    if not chosen.without_ray and not chosen.quick:
        acts[OURS_RAY] = lambda row, home, delays: race_ours([], row, home, trials, delays)
        try:
            import ray.tune.search.optuna  # noqa: F401

            acts[TUNE] = lambda row, home, delays: race_peer("tune", row, home, trials, delays)
        except ImportError as error:
            say(f"left out: Ray Tune ({error}; pip install 'ray[tune]')")
    rows = {name: Row(name) for name in acts}
    for number in range(rounds):
        delays = [generator.uniform(0, SPREAD_S) for _ in range(kills)]
        for index, name in enumerate(generator.sample(list(acts), len(acts))):
            acts[name](rows[name], folder / f"race-{number}-{index}", delays)
        say(f"race {number + 1} of {rounds}: {len(acts)} systems killed {kills} time(s) each")
    return list(rows.values())


def cells_of(row: Row) -> list[str]:
    middle = [f"{statistics.median(values):.2f}" if values else "–" for values in (row.gone_s, row.restart_s)]
    counts = (
        row.kills,
        row.trials,
        row.lost,
        row.executed_twice,
        row.counted_twice,
        row.left_running,
        row.left_behind,
    )
    return [row.name, *map(str, counts), *middle, *(["did not end"] if row.failed else [])]


def main() -> None:
    system, folder, trials = sys.argv[1:]
    said = {"optuna": drive_optuna, "tune": drive_tune}[system](folder, int(trials))
    Path(folder, "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
