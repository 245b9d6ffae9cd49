"""Two maps of real memory, each checked against configurations that were measured afterwards.

    python benchmarks/real_maps.py [--quick] [--save] [--folder RUNS] [--only cgroup,boundaries]

`experiments/map_cgroup.yaml` asks how large the contrast is everywhere, `experiments/map_boundaries.yaml` where only one
arm starts: native against docker with a memory limit. The map is made by the search itself; then as many random
configurations as HELD_OUT are measured in the same way, which no search has seen, and the map's predictions are held
against them, beside those of a plain Gaussian process over the same blocks. With --folder a run that is there is not
executed again. Aims are reported, never asserted. The engine is the probe: the sizing law over memory really taken.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from overhead import machine, save, scratch
from rich.console import Console
from rich.table import Table

from spark_ray import mapping
from spark_ray.config import load_experiment
from spark_ray.experiment import Experiment
from spark_ray.search.surrogate import Observation, Prediction, Surrogate
from spark_ray.store import Store

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
MAPS = {"cgroup": EXPERIMENTS / "map_cgroup.yaml", "boundaries": EXPERIMENTS / "map_boundaries.yaml"}
HELD_OUT = 32
QUICK_BLOCKS = 6
Z = 1.96


def execute(experiment: Path, folder: Path) -> None:
    """The experiment as a run in the folder; one that is there already goes on, and a finished one stays."""
    resume = ["--resume"] if folder.exists() else []
    command = [sys.executable, "-m", "spark_ray.sweep", str(experiment), "--local", "--no-report"]
    subprocess.run([*command, "--out", str(folder), *resume], check=True, stdout=sys.stderr)


def held_out(experiment: Path, folder: Path, blocks: int) -> Path:
    """The same experiment at random configurations."""
    text = yaml.safe_load(experiment.read_text(encoding="utf-8"))
    search = {"sampler": "random", "blocks": blocks, "space": text["search"]["space"]}
    changed = text | {"name": text["name"] + "-held-out", "seed": text["seed"] + 1000, "search": search}
    path = folder / f"{changed['name']}.yaml"
    path.write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    return path


def read(folder: Path) -> tuple[Experiment, tuple[Observation, ...]]:
    experiment = load_experiment(folder / "experiment.yaml").experiment
    return experiment, mapping.observations(Store.read(folder), experiment)


# ---- what a map is held against ---------------------------------------------------------------------------------


def judge(said: Prediction, measured: Sequence[Observation], margin: float) -> dict[str, float | int]:
    """Errors over the held-out configurations; contrasts in points (0.01), capacities relative."""
    kv = np.array([[np.nan if arm is None else arm for arm in each.kv] for each in measured])
    works, both = ~np.isnan(kv), ~np.isnan(kv).any(axis=1)
    predicted = np.stack([said.feasible_a, said.feasible_b], axis=1)
    called = predicted > 0.5
    found: dict[str, float | int] = {
        "configurations": len(kv),
        "both_work": int(both.sum()),
        "only_baseline_works": int((works[:, 0] & ~works[:, 1]).sum()),
        "neither_works": int((~works).all(axis=1).sum()),
        "baseline_called_wrong": float((called[:, 0] != works[:, 0]).mean()),
        "against_called_wrong": float((called[:, 1] != works[:, 1]).mean()),
        "difference_called_wrong": float(
            ((called[:, 0] != called[:, 1]) != (works[:, 0] != works[:, 1])).mean()
        ),
        "surely_wrong": float(((np.abs(predicted - works) > 0.975).any(axis=1)).mean()),
    }
    if both.any():
        contrast = 1 - kv[both, 1] / kv[both, 0]
        off = np.abs(said.contrast_mean[both] - contrast)
        found |= {
            "contrast_least": float(contrast.min()),
            "contrast_most": float(contrast.max()),
            "contrast_error_median": float(np.median(off)),
            "contrast_error_p90": float(np.quantile(off, 0.9)),
            "contrast_error_relative_median": float(np.median(off / np.abs(contrast))),
            "contrast_covered": float((off <= Z * said.contrast_sd[both]).mean()),
            "level_called_wrong": float(((said.contrast_mean[both] > margin) != (contrast > margin)).mean()),
        }
    for arm, (mean, name) in enumerate(((said.kv_a_mean, "baseline"), (said.kv_b_mean, "against"))):
        if works[:, arm].any():
            error = np.abs(mean[works[:, arm]] / kv[works[:, arm], arm] - 1)
            found[f"{name}_capacity_error_median"] = float(np.median(error))
    return found


def check(made: Path, checked: Path) -> dict[str, Any]:
    experiment, blocks = read(made)
    _, measured = read(checked)
    assert experiment.search.target
    configurations = [each.configuration for each in measured]
    found: dict[str, Any] = {"blocks": len(blocks)}
    for name, law in (("map", True), ("plain_process", False)):
        surrogate = Surrogate.fit(experiment.search.space, blocks, law=law, seed=experiment.seed)
        found[name] = judge(surrogate.predict(configurations), measured, experiment.search.target.margin)
        if law:
            found["family"] = surrogate.family
            decided = mapping.decision(Store.read(made), experiment)
            found["declared"] = decided.expected_misclassified
            found["undecided_volume"] = decided.undecided_volume
    return found


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    for name, found in results.items():
        table = Table(title=f"{name}: {found['blocks']} blocks, law: {found['family']}")
        table.add_column("against held-out configurations")
        for column in ("map", "plain_process"):
            table.add_column(column, justify="right")
        for row, value in found["map"].items():
            cells = [value, found["plain_process"][row]]
            table.add_row(
                row, *(str(each) if isinstance(each, int) else f"{100 * each:.2f} %" for each in cells)
            )
        Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="for CI: shows that it works, not how well")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/real_maps.json")
    parser.add_argument("--folder", type=Path, help="keep the runs there; must be a disk, not memory")
    parser.add_argument("--only", default=",".join(MAPS), help="which maps, with commas")
    chosen = parser.parse_args()
    results = {}
    with scratch(None) as own:
        folder = (chosen.folder or own).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for name in chosen.only.split(","):
            source, blocks = MAPS[name], HELD_OUT
            if chosen.quick:
                blocks = QUICK_BLOCKS
                text = yaml.safe_load(source.read_text(encoding="utf-8"))
                text["search"]["blocks"] = QUICK_BLOCKS
                source = folder / source.name
                source.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
            execute(source, folder / name)
            checked = folder / f"{name}-held-out"
            execute(held_out(source, folder, blocks), checked)
            results[name] = check(folder / name, checked)
    show(results)
    if chosen.save:
        save("real_maps", {"machine": machine(), "load_average": os.getloadavg(), "maps": results})


if __name__ == "__main__":
    main()
