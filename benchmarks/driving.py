"""A run that a benchmark drives block by block through the product's own parts: store, search, slots, records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spark_ray import config, opening
from spark_ray.cluster import one_local_node
from spark_ray.drive import Drive, Known
from spark_ray.execute import LocalSlots
from spark_ray.plan import Block
from spark_ray.preview import preview, probe
from spark_ray.search import Search
from spark_ray.store import BlockState


class Quiet:
    """Listens to a drive and does nothing; a benchmark overrides what it wants to do at that moment."""

    def trial_started(self, slot: str, block: Block, arm: str, attempt: int) -> None: ...
    def trial_ended(self, slot: str, block: Block, arm: str, outcome: Mapping[str, str]) -> None: ...
    def block_ended(
        self, state: BlockState, divergence: float | None, known: Known | None = None
    ) -> None: ...


class Run:
    """One experiment whose blocks are executed when asked for."""

    def __init__(self, folder: Path, data: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True)
        file = folder / "experiment.yaml"
        file.write_text(yaml.safe_dump(dict(data), sort_keys=False))
        loaded = config.load_experiment(file)
        self._experiment = loaded.experiment
        plan = preview(loaded.experiment, one_local_node(), probe(loaded.experiment))
        self._arms = plan.executed
        self.store = opening.begin(folder / "run", loaded, plan, cluster=None, executor="local")
        self._search = Search(
            loaded.experiment.search,
            seed=loaded.experiment.seed,
            journal=self.store.journal,
            name=loaded.experiment.name,
        )
        self._slots = LocalSlots(self.store.folder, loaded.experiment, plan.executed)

    def drive(self, blocks: int, listener: Any = None) -> None:
        Drive(
            self.store, self._experiment, self._arms, self._search, listener or Quiet(), enough=lambda begun: begun >= blocks
        ).run(self._slots.slots)  # fmt: skip

    def blocks(self) -> list[dict[str, dict[str, Any]]]:
        """Records that count, by arm, of each complete block in order."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for record in self.store.records():
            if record["standing"] == "counts":
                found.setdefault(record["block_id"], {})[record["arm"]] = record
        return [found[name] for name in sorted(found)]

    def close(self) -> None:
        self._slots.close()
        self.store.close()
