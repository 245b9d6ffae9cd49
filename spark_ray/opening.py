"""A run folder begun, or opened again: what must be the same, and how the study is made to agree with the records.

A block that was given up (disturbed `block_attempts` times) has no outcome, so it is open: whoever resumes has had the
time to mend what disturbed it, and it is executed again, up to `block_attempts` times more.
"""

from __future__ import annotations

import difflib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__, double, host
from .config import LoadedExperiment
from .errors import RunError
from .execute import outcome_of
from .experiment import Experiment
from .preview import Preview
from .search import Abandoned, Search, Told
from .store import Store
from .worker import protocol

WORKER = Path(__file__).parent / "worker"
_MAY_CHANGE = ("limits", "question")  # on resume, beside the budget: they do not change what is measured


def _comparable(resolved: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in resolved.items() if key not in _MAY_CHANGE}
    return kept | {
        "search": {key: value for key, value in resolved.get("search", {}).items() if key != "blocks"}
    }


def begin(
    folder: Path, loaded: LoadedExperiment, plan: Preview, *, cluster: str | None, executor: str
) -> Store:
    """A new run: experiment and cluster file verbatim, the worker as it is now, and what was planned."""
    files = {"experiment.yaml": loaded.text}
    stand_in = double.package_of(loaded.experiment)
    if cluster is not None:
        files["cluster.yaml"] = cluster
    description = {
        "spark_ray_version": __version__,
        "created_at": datetime.now(UTC).isoformat(),
        "experiment": loaded.resolved,
        "overrides": list(loaded.overrides),
        "allowed_roots": [str(root) for root in loaded.allowed_roots],
        "arms": list(plan.executed),
        "left_out": {
            arm.name: [str(problem) for problem in arm.problems] for arm in plan.arms if not arm.available
        },
        "warnings": {arm.name: list(arm.warnings) for arm in plan.arms if arm.warnings},
        "executor": executor,
        "host": host.describe(),
        "bundle_sha256": protocol.package_sha256(WORKER),
        "double_sha256": double.package_sha256(stand_in) if stand_in else None,
        "protocol_version": protocol.PROTOCOL_VERSION,
    }
    return Store.create(folder, files, description, worker=WORKER, beside=stand_in)


def again(folder: Path, loaded: LoadedExperiment, plan: Preview) -> Store:
    """A run to be continued: the same experiment, worker, protocol and arms, or an error that says what differs."""
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
    stand_in = folder / "bundle" / double.PACKAGE
    if stored["bundle_sha256"] != protocol.package_sha256(folder / "bundle" / protocol.PACKAGE) or (
        stored.get("double_sha256") is not None and stored["double_sha256"] != double.package_sha256(stand_in)
    ):
        raise RunError(f"{folder}/bundle was changed since the run began", mend="start a new run")
    if tuple(stored["arms"]) != plan.executed:
        raise RunError(
            f"the run was begun with arms {', '.join(stored['arms'])}; this host now offers {', '.join(plan.executed)}",
            mend="mend the host (see the plan above), or start a new run",
        )
    return store


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
            told = outcome_of(state, store, experiment)
            finished[state.block.study_trial] = Told(*told) if told else Abandoned("a compared arm failed")
    return len(search.recover(finished))
