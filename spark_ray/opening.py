"""A run folder begun, or opened again: what must be the same, and how the study is made to agree with the records.

A block that was given up (disturbed `block_attempts` times) has no outcome, so it is open: whoever resumes has had the
time to mend what disturbed it, and it is executed again, up to `block_attempts` times more.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__, double, host, landscape
from .config import LoadedExperiment
from .errors import RunError
from .experiment import Experiment
from .preview import Preview
from .search import Abandoned, Search, Told
from .store import Store
from .told import told_of
from .worker import protocol

WORKER = Path(__file__).parent / "worker"
_MAY_CHANGE = ("limits", "question")  # on resume: they do not change what is measured
_HOW_LONG = {"blocks": None, "target": {"precision": None}}  # nor do these, of the search


def _comparable(resolved: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in resolved.items() if key not in _MAY_CHANGE}
    return kept | {"search": _without(resolved.get("search", {}), _HOW_LONG)}


def _without(data: dict[str, Any], left_out: dict[str, Any]) -> dict[str, Any]:
    """Nested data without the keys of `left_out` that are None there, and without what is empty then."""
    kept = {
        key: _without(value, left_out[key]) if left_out.get(key) and isinstance(value, dict) else value
        for key, value in data.items()
        if key not in left_out or left_out[key]
    }
    return {key: value for key, value in kept.items() if value != {} or key not in left_out}


def begin(
    folder: Path, loaded: LoadedExperiment, plan: Preview, *, cluster: str | None, executor: str
) -> Store:
    """A new run: experiment and cluster file verbatim, the worker as it is now, and what was planned."""
    files = {"experiment.yaml": loaded.text}
    stand_in, surface = double.package_of(loaded.experiment), landscape.file_of(loaded.experiment)
    beside = {double.PACKAGE: stand_in, landscape.MODULE: surface}
    if cluster is not None:
        files["cluster.yaml"] = cluster
    description = {
        "spark_ray_version": __version__,
        "created_at": datetime.now(UTC).isoformat(),
        "experiment": loaded.resolved,
        "overrides": list(loaded.overrides),
        "allowed_roots": [str(root) for root in loaded.allowed_roots],
        "begun_in": str(loaded.base),
        "arms": list(plan.executed),
        "executed_as": _executed_as(plan),
        "left_out": {
            arm.name: [str(problem) for problem in arm.problems] for arm in plan.arms if not arm.available
        },
        "warnings": {arm.name: list(arm.warnings) for arm in plan.arms if arm.warnings},
        "executor": executor,
        "host": host.describe(),
        "bundle_sha256": protocol.package_sha256(WORKER),
        "double_sha256": double.package_sha256(stand_in) if stand_in else None,
        "landscape_sha256": landscape.sha256(surface) if surface else None,
        "protocol_version": protocol.PROTOCOL_VERSION,
        "noise": asdict(plan.noise) if plan.noise else None,
    }
    return Store.create(
        folder,
        files,
        description,
        worker=WORKER,
        beside={name: path for name, path in beside.items() if path},
    )


def again(folder: Path, loaded: LoadedExperiment, plan: Preview) -> Store:
    """A run to be continued: the same experiment, worker, protocol and arms, or an error that says what differs.

    What may differ (limits, how many blocks, how precise) is in its plan from now on, for whoever reads or continues it.
    """
    store = Store.resume(folder)
    stored = store.plan
    before, now = (
        json.dumps(_comparable(x), indent=1, sort_keys=True) for x in (stored["experiment"], loaded.resolved)
    )
    if before != now:
        change = "\n".join(
            difflib.unified_diff(before.splitlines(), now.splitlines(), "run", "now", lineterm="", n=0)
        )
        raise RunError(
            f"the experiment is not the one of {folder}:\n{change}",
            mend="start a new run, or undo the change",
        )
    if stored["protocol_version"] != protocol.PROTOCOL_VERSION:
        raise RunError(
            f"the run's worker speaks protocol {stored['protocol_version']}, this program {protocol.PROTOCOL_VERSION}",
            mend=f"continue with spark_ray {stored['spark_ray_version']}, which began it",
        )
    if _bundle_changed(folder / "bundle", stored):
        raise RunError(f"{folder}/bundle was changed since the run began", mend="start a new run")
    if tuple(stored["arms"]) != plan.executed:
        raise RunError(
            f"the run was begun with arms {', '.join(stored['arms'])}; this host now offers {', '.join(plan.executed)}",
            mend="mend the host (see the plan above), or start a new run",
        )
    _refuse_other_treatments(stored, plan)
    asked = {"experiment": loaded.resolved, "overrides": list(loaded.overrides), "begun_in": str(loaded.base)}
    if json.dumps(asked) != json.dumps({key: stored.get(key) for key in asked}):
        store.replan(stored | asked)
    return store


def _executed_as(plan: Preview) -> dict[str, str]:
    return {arm.name: arm.what for arm in plan.arms if arm.available}


def _refuse_other_treatments(stored: dict[str, Any], plan: Preview) -> None:
    """Root, or its absence, makes of what a YAML leaves open another treatment: blocks of both are no pairs."""
    before, now = stored.get("executed_as"), _executed_as(plan)
    if before is None or stored["spark_ray_version"] != __version__:  # which may word it otherwise
        return
    differing = [f"{arm}: {before[arm]}; now {now[arm]}" for arm in stored["arms"] if before[arm] != now[arm]]
    if differing:
        raise RunError(
            "arms would be executed otherwise than before:\n" + "\n".join(differing),
            mend="continue with the rights that the run was begun with (root or not), or start a new run",
        )


def _bundle_changed(bundle: Path, stored: dict[str, Any]) -> bool:
    stand_in, surface = stored.get("double_sha256"), stored.get("landscape_sha256")
    return (
        stored["bundle_sha256"] != protocol.package_sha256(bundle / protocol.PACKAGE)
        or (stand_in is not None and stand_in != double.package_sha256(bundle / double.PACKAGE))
        or (surface is not None and surface != landscape.sha256(bundle / landscape.MODULE))
    )


def changes(stored: dict[str, Any]) -> list[str]:
    """What is not as it was when the run was begun, and does not forbid to go on with it."""
    found = []
    if stored["spark_ray_version"] != __version__:
        found.append(
            f"this run was begun with spark_ray {stored['spark_ray_version']} and is continued with {__version__}"
        )
    if stored["bundle_sha256"] != protocol.package_sha256(WORKER):
        found.append("the worker of this program is not the one of the run: the run's own, bundle/, is used")
    return found


def study(store: Store, experiment: Experiment, mark: str) -> Search:
    """The run's study; `mark` is said with its values, to whoever opens it in Optuna's dashboard."""
    pair = experiment.compared
    return Search(
        experiment.search,
        seed=experiment.seed,
        journal=store.journal,
        name=experiment.name,
        about={"question": experiment.question, "contrast": f"1 - KV({pair.against}) / KV({pair.baseline})"},
        mark=mark,
    )


def rebuild(store: Store, search: Search) -> list[str]:
    """Blocks on disk of a study whose journal is gone come into it again; what was done is for people to read."""
    blocks = store.blocks()
    count = search.rebuild([(block.study_trial, block.configuration, block.repetition) for block in blocks])
    return [f"study.journal was lost: made again from {count} blocks on disk"] if count else []


def recover(store: Store, search: Search, experiment: Experiment) -> int:
    """Make the study agree with the records; returns how many blocks are open, those given up before included."""
    finished: dict[int, Told | Abandoned] = {}
    for state in map(store.state, store.blocks()):
        if state.complete:
            told = told_of(state, store, experiment)
            finished[state.block.study_trial] = told or Abandoned("a compared arm failed")
    return len(search.recover(finished))
