"""The machines an experiment runs on: nodes, and how many engines each may hold at a time."""

from __future__ import annotations

from dataclasses import dataclass


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
