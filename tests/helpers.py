"""What several tests share: an experiment without an engine, and looking for what was left behind."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from spark_ray.experiment import Experiment

QUIET = {"page_cache": "keep", "per_cpu_pages": "as_is"}


def experiment_data(blocks=2, arms=("native", "native"), limits=None, **engine):
    """A fake-engine experiment with arms of the given environments, named a, b, c ..."""
    return {
        "name": "test",
        "engine": {"kind": "fake", **engine},
        "search": {
            "sampler": "random",
            "blocks": blocks,
            "space": {
                "max_batch_size": {"low": 1, "high": 64},
                "max_num_tokens": 512,
                "memory_fraction": {"low": 0.1, "high": 0.3},
            },
        },
        "arms": {
            "abcdefgh"[index]: {"environment": environment, "treatment": QUIET}
            for index, environment in enumerate(arms)
        },
        **({"contrast": {"baseline": "a", "against": "b"}} if len(arms) > 2 else {}),
        "limits": {"trial_timeout": "60s", **(limits or {})},
    }


def experiment(**options):
    return Experiment.model_validate(experiment_data(**options))


def write_yaml(folder: Path, data) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def guests_of(folder: Path) -> list[int]:
    """Live processes whose environment or command names this run folder's trials (label SPARK_RAY_TRIAL, or its paths)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            variables = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        ours = b"spark_ray_worker" in command or b"SPARK_RAY_TRIAL=" in variables
        if ours and state != "Z" and str(folder).encode() in command + variables + _mounts(entry):
            found.append(int(entry.name))
    return found


def _mounts(entry: Path) -> bytes:
    try:
        return (entry / "mountinfo").read_bytes()
    except OSError:
        return b""


def wait_until(condition, timeout_s=10.0, step_s=0.02):
    """Whether `condition()` became true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(step_s)
    return bool(condition())


def call(module, *arguments, **variables):
    """`python -m MODULE ARGUMENTS...` in a process of its own, with these variables on top; it never ends in a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, timeout=600, check=False, stdin=subprocess.DEVNULL, env={**os.environ, **variables},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


run = functools.partial(call, "spark_ray.sweep")
run_without_report = functools.partial(run, "--local", "--no-report")  # a report takes longer than a fake run
spark_ray = functools.partial(call, "spark_ray")
