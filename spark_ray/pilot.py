"""`spark-ray pilot EXPERIMENT.yaml`: the noise floor of an experiment, measured before it by its baseline against a copy of itself."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from . import config, power, running
from .cluster import one_local_node
from .errors import EXIT_OK, InputError
from .experiment import Experiment

_SUFFIX, _LONGEST_NAME = "-pilot", 40
_COPY = "again"
_OF_THE_WHOLE = ("contrast", "predictions", "question")


def derived(experiment: Experiment, blocks: int) -> dict[str, Any]:
    """Plain data of the A/A experiment: the baseline and a copy of it, at configurations that fill the same space.

    Knobs of single arms stay at their first value: those of the baseline in both arms, so that these are the same.
    """
    data = experiment.at(_first_of_arms(experiment)).as_written()
    baseline = experiment.compared.baseline
    arm = {key: each for key, each in data["arms"][baseline].items() if key not in {"builds_on", "required"}}
    copy = _COPY if baseline != _COPY else f"{_COPY}-{_COPY}"
    search = experiment.as_written()["search"]
    further = {
        path: axis
        for path, axis in search["space"].get("further", {}).items()
        if not path.startswith("arms.")
    }
    kept = {key: each for key, each in data.items() if key not in _OF_THE_WHOLE}
    kept["engine"].pop("only_in_arm", None)
    return kept | {
        "name": experiment.name[: _LONGEST_NAME - len(_SUFFIX)] + _SUFFIX,
        "question": f"How far apart are two arms that are the same, {baseline} of {experiment.name} and a copy of it?",
        "arms": {baseline: arm, copy: arm},
        "search": {"sampler": "qmc", "blocks": blocks, "space": search["space"] | {"further": further}},
    }


def _first_of_arms(experiment: Experiment) -> dict[str, Any]:
    """The knobs of single arms, each at the first of its values."""
    axes = {name: axis for name, axis in experiment.search.space.axes.items() if name.startswith("arms.")}
    return {name: axis[0] if isinstance(axis, tuple) else axis.low for name, axis in axes.items()}


def run(path: Path, overrides: tuple[str, ...], blocks: int, options: running.Options) -> int:
    """Plan and execute the pilot of an experiment, and say what it found and how to use it."""
    loaded = config.load_experiment(path, overrides, options.allow_roots)
    data = derived(loaded.experiment, blocks)
    made = Experiment.model_validate(data)
    if power.twins(made) is None:
        raise InputError(
            f"{path} has no pilot: engine.landscape is told the name of its arm, so that no two arms are the same",
            mend="say target.margin, from what you know of the landscape's noise",
        )
    text = f"# made by spark-ray pilot\n{json.dumps(data, indent=2)}\n"
    begun = replace(loaded, experiment=made, text=text, overrides=(), resolved=data)
    folder = running.run_folder(options, data["name"])
    cluster = config.load_cluster(options.cluster) if options.cluster else one_local_node()
    planned = running.look_at(begun, options, folder, cluster)
    flags = ["--local"] if options.local else ["--address", options.address] if options.address else []
    code = running.carry_out(planned, options, shlex.join(["spark-ray", "resume", str(folder), *flags]))
    if options.plan or code != EXIT_OK:
        return code
    console = Console(highlight=False)
    noise = power.of_pilot(folder, loaded.experiment)
    for line in power.said(noise, loaded.experiment.search, mark=planned.plan.mark):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"use it in {path}:\n\nsearch:\n  target:\n    pilot: {_short(folder)}", markup=False)
    return code


def _short(folder: Path) -> Path:
    """From the current folder, as the YAML is read from there."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
