"""Content made ready on a node: what a killed driver leaves of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import experiment_data, wait_until
from test_identity import DENSE, LLAMA_8B, folder_with

from spark_ray import content, duration
from spark_ray.experiment import Experiment


def with_model(folder, *environments):
    data = experiment_data(arms=environments)
    data |= {"engine": {"kind": "embedded"}, "model": {"path": str(folder)}}
    return Experiment.model_validate(data)


@pytest.fixture
def snapshot(tmp_path):
    """A model as a cache of the hub keeps it: links to files beside the folder."""
    whole = folder_with(tmp_path / "blobs", LLAMA_8B, DENSE)
    made = tmp_path / "snapshots" / "1"
    made.mkdir(parents=True)
    for path in whole.iterdir():
        (made / path.name).symlink_to(f"../../blobs/{path.name}")
    return made


@pytest.mark.parametrize(
    ("environment", "complaints"),
    [
        ("native", 0),
        ({"kind": "isolated", "root": "host"}, 0),
        ({"kind": "isolated"}, 1),
        ("chroot", 1),
        ("docker", 1),
        ("podman", 1),
    ],
)
def test_links_out_of_a_model_folder_dangle_where_only_the_folder_is_bound(snapshot, environment, complaints):
    found = content.model_problems(with_model(snapshot, "native", environment))
    assert len(found) == complaints
    for each in found:
        assert "config.json leads out of its folder, which is all that arm b would have of it" in each.what
        assert "--local-dir" in each.mend


def test_links_inside_a_model_folder_are_as_good_as_files(tmp_path):
    folder = folder_with(tmp_path / "model", LLAMA_8B, DENSE)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert content.model_problems(with_model(tmp_path / "link", "native", "docker")) == []


@pytest.mark.parametrize("target", ["../../blobs/gone", "model.safetensors"])
def test_a_weight_file_that_leads_nowhere_is_a_problem_of_the_plan(snapshot, target):
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(target)
    (problem,) = content.model_problems(with_model(snapshot, "native", "native"))
    assert f"{snapshot}/model.safetensors cannot be read" in problem.what
    assert duration.weight_bytes(snapshot) is None


MAKE = """
from spark_ray import content
from spark_ray.experiment import Experiment
from spark_ray.engines import Model
class Only:
    model = Model.model_validate({"random_llama": {"layers": 2}})
print(content.prepare_model(Only), flush=True)
"""


def children_of(pid):
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(place.parent.name))
    return found


@pytest.mark.process
@pytest.mark.embedded
def test_making_a_checkpoint_ends_with_the_driver_that_wanted_it(tmp_path):
    variables = os.environ | {"SPARK_RAY_CACHE": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", MAKE], env=variables, stdout=subprocess.PIPE) as driver:
        assert wait_until(lambda: children_of(driver.pid))
        (maker,) = children_of(driver.pid)
        handle = os.pidfd_open(maker)
        try:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            import select

            assert select.select([handle], [], [], 10)[0], "the maker outlives its driver"
        finally:
            os.close(handle)
    assert not list(tmp_path.glob("models/*/config.json"))


@pytest.mark.embedded
def test_a_checkpoint_is_made_for_its_own_parent_only(tmp_path):
    command = [sys.executable, "-m", "spark_ray.worker.checkpoint", str(tmp_path), "{}", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has ended" in done.stderr
    assert not list(tmp_path.iterdir())
