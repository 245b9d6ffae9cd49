"""The peers that `overhead.py` races against, each doing a no-op trial in its own way."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna


def timed(act: Callable[[], object], trials: int) -> list[float]:
    stamps = [time.monotonic()]
    for _ in range(trials):
        act()
        stamps.append(time.monotonic())
    return [after - before for before, after in pairwise(stamps)]


def plain_process() -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def optuna_and_process(study: optuna.Study) -> None:
    trial = study.ask()
    batch, tokens = trial.suggest_int("b", 1, 256), trial.suggest_int("t", 256, 16384)
    plain_process()
    study.tell(trial, trial.suggest_float("f", 0.3, 0.95) * batch * tokens)


def optuna_study(folder: Path) -> optuna.Study:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    return optuna.create_study(storage=storage, direction="maximize")


def fresh_actor() -> None:
    import ray

    class NoOp:
        def run(self, point: dict[str, float]) -> float:
            return point["f"]

    actor = ray.remote(NoOp).remote()
    ray.get(actor.run.remote({"f": 0.5}))
    ray.kill(actor)


def ray_tune(folder: Path, trials: int, reuse_actors: bool) -> list[float]:
    """Intervals between completed trials of one `fit`; its start-up (before the first) is left out in Tune's favour."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    stamps: list[float] = []

    class Stamp(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
            stamps.append(time.monotonic())

    space = {
        "b": tune.randint(1, 256),
        "t": tune.randint(256, 16384),
        "f": tune.uniform(0.3, 0.95),
    }
    results = tune.Tuner(
        lambda point: {"y": point["f"] * point["b"] * point["t"]},
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="y", mode="max", num_samples=trials + 1, search_alg=OptunaSearch(),
            max_concurrent_trials=1, reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0, callbacks=[Stamp()]),
    ).fit()  # fmt: skip
    if results.errors or len(stamps) != trials + 1:
        raise RuntimeError(f"Ray Tune completed {len(stamps)} of {trials + 1}: {results.errors}")
    return [after - before for before, after in pairwise(stamps)]
