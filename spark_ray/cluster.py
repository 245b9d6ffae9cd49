"""The machines an experiment runs on: nodes, and how many engines each may hold at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .units import parse_rate_bytes_per_s

CLUSTER_KEYS = {
    "cluster_name": "name of the cluster",
    "provider.type": "must be local: machines that are there",
    "provider.head_ip": "address of the machine that Ray starts on",
    "provider.worker_ips": "addresses of the others; [] for none",
    "provider.memory_bandwidth": "of each machine, of the memory that weights live in, such as 273GB/s; may be left out: then "
    "that of a GB10 is known, and elsewhere no throughput is held against it",
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
    memory_bandwidth_bytes_per_s: float | None = None  # of each node, nominal; None: not stated


def memory_bandwidth(said: object, complain: Callable[[str], None]) -> float | None:
    """What the file says of its machines, which are alike; None where it says nothing."""
    try:
        speed = None if said is None else parse_rate_bytes_per_s(said)
        if speed == 0:
            raise ValueError("must be above 0")
    except ValueError as error:
        complain(str(error))
        return None
    return speed


def one_local_node() -> Cluster:
    """This machine alone, one engine at a time: what runs when no cluster file is named."""
    return Cluster("local", (Node("local", "127.0.0.1", 1),))
