"""cluster.yaml is Ray's file; we read nodes and slots from it."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import yaml

from spark_ray.cluster import Cluster, Node, one_local_node
from spark_ray.config import load_cluster
from spark_ray.errors import InputError

CLUSTER = Path(__file__).parent.parent / "cluster.yaml"

GOOD = """\
cluster_name: sparks
provider:
  type: local
  head_ip: 192.0.2.1
  worker_ips: [192.0.2.2, 192.0.2.3]
anything_of_rays: {deep: [1, 2]}
head_start_ray_commands:
  - ray stop
  - >-
    ulimit -n 65536; ray start --head --resources='{"slot": 0}'
worker_start_ray_commands:
  - >-
    ray start --address=$RAY_HEAD_IP:6379 --resources '{"slot": 2, "other": 1}' --num-gpus=1
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return load_cluster(path)

    return load


def test_the_file_of_the_repository_is_two_sparks_with_a_slot_each():
    cluster = load_cluster(CLUSTER)
    nodes = (Node("head", "192.0.2.10", 1), Node("worker-1", "192.0.2.11", 1))
    assert cluster == Cluster("sparks", nodes, memory_bandwidth_bytes_per_s=273e9)


def test_ray_accepts_the_file_of_the_repository():
    ray = pytest.importorskip("ray.autoscaler._private.util")
    plain = yaml.safe_load(CLUSTER.read_text())
    prepared = ray.prepare_config(plain)
    ray.validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 1


def test_only_what_is_installed_is_copied_and_nothing_that_a_run_or_an_image_leaves():
    root = CLUSTER.parent
    mounts = yaml.safe_load(CLUSTER.read_text())["file_mounts"]
    named = {target: (root / source).resolve() for target, source in mounts.items()}
    assert all(path.exists() and target == f"~/spark_ray/{path.name}" for target, path in named.items())
    ignored = [line.strip("/") for line in (root / ".gitignore").read_text().splitlines() if line[0] in "/."]
    for left in (*ignored, ".git"):
        assert not [path for path in named.values() if (root / left).is_relative_to(path)], left
    project = tomllib.loads((root / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = [
        *packages,
        "pyproject.toml",
        "constraints.txt",
        project["project"]["readme"],
        *project["project"]["license-files"],
    ]
    assert {path.name for path in named.values()} == set(needed)


def test_every_start_command_caps_the_object_store_and_turns_the_memory_monitor_off():
    plain = yaml.safe_load(CLUSTER.read_text())
    commands = plain["head_start_ray_commands"] + plain["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert command.startswith("RAY_memory_monitor_refresh_ms=0 ")
        assert "--object-store-memory=1073741824" in command


def test_nodes_and_slots_are_read(load):
    assert load(GOOD).nodes == (
        Node("head", "192.0.2.1", 0),
        Node("worker-1", "192.0.2.2", 2),
        Node("worker-2", "192.0.2.3", 2),
    )


def test_a_head_alone_needs_no_worker_command(load):
    text = GOOD.replace("[192.0.2.2, 192.0.2.3]", "[]").replace('"slot": 0', '"slot": 1')
    assert load(text.partition("worker_start")[0]).nodes == (Node("head", "192.0.2.1", 1),)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cluster_name: sparks", "x: 1", ":1: cluster_name: must be a name: got nothing"),
        (
            "type: local",
            "type: aws",
            ":3: provider.type: must be local, for machines that are there: got 'aws'",
        ),
        ("head_ip: 192.0.2.1", "x: 1", ":2: provider.head_ip: must be the address of a machine: got nothing"),
        ("[192.0.2.2, 192.0.2.3]", "192.0.2.2", ":5: provider.worker_ips: must be a list"),
        ("192.0.2.3", "192.0.2.1", ":5: provider.worker_ips.1: this machine is here twice: got '192.0.2.1'"),
        ("192.0.2.3", "3", ":5: provider.worker_ips.1: must be the address of a machine: got 3"),
        ("ray start --head", "rey start", ":7: head_start_ray_commands: has no `ray start` command"),
        ("'{\"slot\": 0}'", "'{slot: 0}'", ":9: head_start_ray_commands.1: cannot be read:"),
        ('{"slot": 0}\'', "{}", ":9: head_start_ray_commands.1: cannot be read: No closing quotation"),
        ("'{\"slot\": 0}'", "3", ":9: head_start_ray_commands.1: cannot be read:"),
        ('"slot": 2', '"slot": 1.5', ":12: worker_start_ray_commands.0: slot in --resources must be"),
        ('"slot": 2', '"slots": 2', "no node offers a slot"),
        ("provider:", "provider: 3\nx:", ":2: provider.type: must be local"),
    ],
)
def test_refused(load, old, new, said):
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        load(GOOD.replace(old, new))
    assert said in str(caught.value)


def test_all_problems_at_once(load):
    with pytest.raises(InputError) as caught:
        load("x: 1\n")
    assert len(str(caught.value).splitlines()) == 5


def test_one_local_node():
    cluster = one_local_node()
    assert [node.slots for node in cluster.nodes] == [1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        cluster.name = "other"
