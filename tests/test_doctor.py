import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import experiment, experiment_data, write_yaml

from spark_ray import doctor, image
from spark_ray.experiment import Experiment

ROOT = Path(__file__).parent.parent


def by_name(found):
    return {check.name: check for check in found}


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "spark_ray", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_an_experiment_is_asked_only_for_what_it_needs(tmp_path):
    found = by_name(doctor.checks(experiment(), tmp_path))
    assert {"python", "ray", "memory", "disk", "cgroup"} <= set(found)
    assert not {"docker", "torch", "host rootfs"} & set(found)
    assert found["root acts"].status in {"ok", "warn"}, "native arms can do without"


def test_every_finding_that_is_not_ok_has_words(tmp_path):
    for check in doctor.checks(experiment(), tmp_path):
        assert check.found
        if check.status == "missing":
            assert check.mend


def test_a_missing_daemon_is_missing_with_a_mend_and_exit_3(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    done = run(write_yaml(tmp_path, experiment_data(arms=("native", "docker"))), "--json")
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["docker"]["status"] == "missing"
    assert checks["docker"]["mend"]
    assert report["versions"]["spark_ray"] == "0.1.0"


@pytest.mark.docker
def test_the_daemon_is_asked_for_each_flag_and_its_refusal_is_told():
    client = image.connect()
    found = by_name(doctor._docker(None))
    try:
        assert found["docker"].status == "ok"
        assert found["docker --memory 64m"].status == "ok"
        assert len([name for name in found if name.startswith("docker --")]) == len(doctor.FLAGS)
        for check in found.values():
            assert (check.status == "ok") == (check.found == "works") or check.name == "docker"
        assert client.containers.list(all=True, filters={"label": "spark_ray.purpose=probe"}) == []
    finally:
        client.close()


@pytest.mark.docker
def test_a_missing_image_is_named(tmp_path):
    data = experiment_data()
    data["arms"]["a"]["environment"] = {"kind": "docker", "image": "nobody/nothing:0"}
    found = by_name(doctor.checks(Experiment.model_validate(data), tmp_path))
    assert found["image nobody/nothing:0"].status == "missing"
    assert "docker pull" in found["image nobody/nothing:0"].mend


def test_a_broken_model_folder_is_missing(tmp_path):
    data = experiment_data()
    data |= {"engine": {"kind": "embedded"}, "model": {"path": str(tmp_path)}}
    found = by_name(doctor.checks(Experiment.model_validate(data), tmp_path))
    assert found["model"].status == "missing"


def test_no_gpu_is_a_warning_not_an_error(tmp_path):
    gpu = [check for check in doctor.checks(experiment(), tmp_path) if check.name.startswith("gpu")]
    assert gpu
    assert all(check.status in {"ok", "warn"} for check in gpu)
