"""A sweep on a Ray cluster of two nodes (both on this machine), each offering one slot."""

import itertools
import subprocess
import sys
from collections import defaultdict

import pytest
from helpers import experiment_data, guests_of, write_yaml
from test_mapping import simulated

from spark_ray.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.process]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"slot": 1}, "object_store_memory": 100 << 20, "include_dashboard": False})
cluster.add_node(num_cpus=1, resources={"slot": 1}, object_store_memory=100 << 20)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def address():
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield cluster.stdout.readline().strip()
    cluster.stdin.close()
    cluster.wait(timeout=600)
    cluster.stdout.close()


def sweep(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "spark_ray.sweep", *map(str, arguments)],
        capture_output=True, text=True, timeout=180, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_two_nodes_share_the_blocks_and_a_pair_stays_on_its_slot(tmp_path, address):
    folder = tmp_path / "run"
    path = write_yaml(tmp_path, experiment_data(blocks=6, hold="300ms"))
    done = sweep(path, "--out", folder, "--address", address, "--no-report")
    assert done.returncode == 0, done.stdout + done.stderr
    slots = defaultdict(set)
    for record in Store.read(folder).records():
        assert record["outcome"]["kind"] == "ok"
        slots[record["block_id"]].add(record["slot"])
    assert len(slots) == 6
    assert all(len(used) == 1 for used in slots.values()), "both arms of a pair run on the same slot"
    assert len(set.union(*slots.values())) == 2, "both nodes worked"
    assert guests_of(folder) == []


def test_a_map_is_drawn_by_two_nodes_and_asks_for_nothing_that_is_under_way(tmp_path, address):
    folder = tmp_path / "run"
    done = sweep(simulated(tmp_path), "--out", folder, "--address", address, "--no-report")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "asked for: 6.0%" in done.stdout
    store = Store.read(folder)
    times = defaultdict(list)
    for record in store.records():
        times[record["block_id"]] += [record["started_at"], record["ended_at"]]
    blocks = store.blocks()
    assert 8 <= len(blocks) < 30
    for one, other in itertools.pairwise(blocks):
        if min(times[other.block_id]) < max(times[one.block_id]):
            assert one.configuration != other.configuration
    assert len({record["slot"] for record in store.records()}) == 2, "both nodes worked"


def test_a_cluster_that_is_not_there_is_said(tmp_path):
    done = sweep(
        write_yaml(tmp_path, experiment_data()), "--out", tmp_path / "run", "--address", "127.0.0.1:1"
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Ray at 127.0.0.1:1 cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
