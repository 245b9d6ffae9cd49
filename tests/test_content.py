"""Content made ready on a node: what a killed driver leaves of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import wait_until

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
