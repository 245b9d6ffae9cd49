"""How long a trial will take: parts, and what they are held against."""

import math
import re
from pathlib import Path

import pytest
from helpers import experiment_data

from spark_ray import content, duration, image, sweep
from spark_ray.cluster import one_local_node
from spark_ray.errors import UnavailableError
from spark_ray.experiment import Experiment, Workload
from spark_ray.preview import ArmPlan, Preview


def tensorrt_llm(path, workload=None, limits=None, **engine):
    data = experiment_data()
    data |= {"engine": {"kind": "tensorrt_llm", **engine}, "model": {"path": str(path)}}
    data |= {"workload": workload or {"requests": 0}, "limits": limits or {}}
    return Experiment.model_validate(data)


def checkpoint(folder, size):
    with (folder / "model.safetensors").open("wb") as stream:
        stream.truncate(size)
    return folder


def test_the_published_start_is_within_the_estimate(tmp_path):
    """63.3 GB in 126 s with a warm page cache, from the shell's line to the last line of the log."""
    trial = duration.of_trial(tensorrt_llm(checkpoint(tmp_path, round(63.3e9))), 0)
    assert 126 < trial.start_s < 2 * 126
    assert math.isclose(trial.start_s, 60 + 15 + 46 + 47)


def test_requests_are_bound_by_the_bandwidth():
    """The published study: 50 requests of 128 tokens in 53 s, in batches of 8."""
    asked = Workload(requests=50, output_tokens=128)
    assert 53 <= duration.requests_s(asked, duration.ASSUMED_WEIGHT_BYTES, 8) <= 1.2 * 53
    assert duration.requests_s(Workload(requests=0), 1 << 40, 8) == 0


def test_what_is_assumed_is_said(tmp_path):
    here = duration.of_trial(tensorrt_llm(checkpoint(tmp_path, 1 << 30)), 0)
    gone = duration.of_trial(tensorrt_llm(tmp_path / "gone"), 0)
    assert "assumed" not in here.basis
    assert "15.2 GB of weights are assumed" in gone.basis
    dummy = duration.of_trial(tensorrt_llm(tmp_path / "gone", load_format="dummy"), 0)
    assert dummy.start_s < gone.start_s


def test_the_yaml_knows_better(tmp_path):
    made = tensorrt_llm(tmp_path, limits={"expected_trial": "7s"})
    assert duration.of_trial(made, 0).total_s == 7
    assert duration.of_trial(tensorrt_llm(tmp_path, double="here"), 0).total_s < 5
    assert duration.of_trial(Experiment.model_validate(experiment_data()), 0) is None, "the fake engine"


@pytest.mark.parametrize(
    ("available", "required", "counted"), [(True, False, 3), (False, False, 2), (False, True, 3)]
)
def test_the_estimate_counts_what_would_run(available, required, counted):
    data = experiment_data(arms=("native",) * 3, blocks=4)
    made = Experiment.model_validate(data)
    arms = [ArmPlan(name, "", (), (), True) for name in "ab"]
    arms.append(ArmPlan("c", "", () if available else ("missing",), (), required))
    plan = Preview(made, tuple(arms), (), (), one_local_node(), duration.TrialTime(10))
    assert plan.trials == 4 * counted
    assert plan.expected_s == 40 * counted


EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NAMES = ("spark_kv_divergence", "phase1_replication", "phase2_docker_flags", "discrete_gpu_control")


def no_engine(timeout_s=60):  # noqa: ARG001
    raise UnavailableError("no Docker engine answers", mend="start it")


@pytest.mark.parametrize("name", NAMES)
def test_a_laptop_plans_them_and_is_told_hours_and_lacks(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image, "connect", no_engine)
    monkeypatch.setattr(content, "host_driver", lambda: None)
    file, folder = str(EXPERIMENTS / f"{name}.yaml"), str(tmp_path / "run")
    assert sweep.main([file, "--plan", "--out", folder]) == 0
    plan = capsys.readouterr().out
    assert re.search(r"^time +about \d+ h \d+ min", plan, re.MULTILINE)
    assert re.search(r"trials of .*: start .*, cooldown .* \(estimate: published figures", plan)
    for lack in (
        "no NVIDIA driver",
        "no Docker engine answers",
        "models/DeepSeek-R1-Distill-Qwen-7B does not exist",
    ):
        assert lack in plan.rpartition("this host lacks")[2]
    assert "would end here with exit 3" in plan
    assert sweep.main([file, "--out", folder, "--local"]) == 3
    assert "no NVIDIA driver" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
