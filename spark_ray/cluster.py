"""The machines an experiment runs on: nodes, and how many engines each may hold at a time."""

from __future__ import annotations

from dataclasses import dataclass

CLUSTER_KEYS = {
    "cluster_name": "name of the cluster",
    "provider.type": "must be local: machines that are there",
    "provider.head_ip": "address of the machine that Ray starts on",
    "provider.worker_ips": "addresses of the others; [] for none",
    "head_start_ray_commands": "the slots of the head: from its `ray start --resources='{\"slot\": N}'`",
    "worker_start_ray_commands": "the slots of each other machine, likewise",
}
"""What is read of a file of Ray's cluster launcher; all else in it is for Ray alone."""


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    slots: int


@dataclass(frozen=True)
class Cluster:
    name: str
    nodes: tuple[Node, ...]


def one_local_node() -> Cluster:
    """This machine alone, one engine at a time: what runs when no cluster file is named."""
    return Cluster("local", (Node("local", "127.0.0.1", 1),))
