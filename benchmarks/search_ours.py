"""What `search.py` executes: samplers with their maps. Ours is the public sampler in a plain Optuna study, as anybody would use it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import optuna
from landscapes import Block, Landscape, Machine, Points
from numpy.typing import NDArray
from search_metrics import Prediction
from search_rivals import Boundary, Sampler, qmc

from spark_ray.search.divergence_sampler import DivergenceSampler
from spark_ray.search.space import configuration, distributions
from spark_ray.search.stopping import decide
from spark_ray.search.surrogate import Observation, Surrogate, TooFewBlocks
from spark_ray.search.target import Target
from spark_ray.search_spec import Configuration


class Chart(Protocol):
    """Makes a map of blocks; None while they are too few."""

    def predict(self, blocks: Sequence[Block], points: Points) -> Prediction | None: ...


class Contender(Protocol):
    """A sampler with its map. None asked: it is done."""

    def ask(self) -> Configuration | None: ...
    def tell(self, block: Block) -> None: ...
    def predict(self, blocks: Sequence[Block], points: Points) -> Prediction | None: ...
    def diverges(self, points: Points) -> NDArray[np.bool_] | None: ...
    def declared(self) -> dict[str, Any]: ...


class Mapped:
    """A sampler that knows nothing of maps, and the map made of its points. It never stops by itself."""

    def __init__(self, sampler: Sampler, chart: Chart) -> None:
        self._sampler, self._chart = sampler, chart
        self.ask, self.tell, self.predict = sampler.ask, sampler.tell, chart.predict

    def diverges(self, points: Points) -> NDArray[np.bool_] | None:
        return self._sampler.diverges(points) if isinstance(self._sampler, Boundary) else None

    def declared(self) -> dict[str, Any]:
        return {}


class LawMap:
    """Our surrogate over points that something else chose."""

    def __init__(self, landscape: Landscape) -> None:
        self._space = landscape.space

    def predict(self, blocks: Sequence[Block], points: Points) -> Prediction | None:
        observed = [Observation(block.configuration, block.kv_bytes, block.capped) for block in blocks]
        try:
            return Surrogate.fit(self._space, observed, seed=0).predict(points)
        except TooFewBlocks:
            return None


class Ours:
    """The divergence sampler in an Optuna study, its own map, and its own word on when it would stop."""

    def __init__(self, landscape: Landscape, seed: int, *, law: bool = True) -> None:
        # also what does not vary: by the names of all three it knows that an engine is meant
        self._known = distributions(landscape.space)
        self._target = Target(margin=landscape.margin)
        self._sampler = DivergenceSampler(self._known, margin=landscape.margin, law=law, seed=seed)
        self._study = optuna.create_study(sampler=self._sampler)
        self._pending: list[optuna.Trial] = []
        self._surrogate: Surrogate | None = None
        self._blocks: list[Block] = []

    def ask(self) -> Configuration:
        trial = self._study.ask(self._known)
        self._pending.append(trial)
        return configuration(trial.params)

    def tell(self, block: Block) -> None:
        trial = self._pending.pop(0)
        self._blocks.append(block)
        for name, value in attributes(block).items():
            trial.set_user_attr(name, value)
        if block.contrast is None:
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, abs(block.contrast))

    def learn(self, blocks: Sequence[Block]) -> None:
        """Blocks that somebody else asked for."""
        self._blocks += blocks
        for block in blocks:
            self._study.add_trial(
                optuna.trial.create_trial(
                    value=abs(block.contrast or 0.0),
                    params=dict(block.configuration),
                    distributions=self._known,
                    user_attrs=attributes(block),
                )
            )

    def predict(self, blocks: Sequence[Block], points: Points) -> Prediction | None:
        """Of all that it was told, which is `blocks`."""
        assert len(blocks) == len(self._blocks)
        self._surrogate = self._sampler.surrogate(self._study)
        return self._surrogate and self._surrogate.predict(points)

    def diverges(self, points: Points) -> None:  # noqa: ARG002
        return None

    def declared(self) -> dict[str, Any]:
        """Of the map made last."""
        observed = [Observation(block.configuration, block.kv_bytes, block.capped) for block in self._blocks]
        found = decide(self._surrogate, self._target, observed)
        family = self._surrogate.family if self._surrogate else None
        return {"stop": found.stop, "declared": found.expected_misclassified, "family": family}


def attributes(block: Block) -> dict[str, Any]:
    names = ("kv_baseline_bytes", "kv_against_bytes", "kv_baseline_capped", "kv_against_capped")
    return dict(zip(names, (*block.kv_bytes, *block.capped), strict=True))


def with_law(landscape: Landscape, seed: int) -> Contender:
    return Ours(landscape, seed)


def without_law(landscape: Landscape, seed: int) -> Contender:
    return Ours(landscape, seed, law=False)


def ask_tell_s(landscape: Landscape, seed: int, blocks: int, more: int) -> list[float]:
    """Seconds of each of some further asks and tells, after so many blocks at points that fill the space."""
    machine, contender, filling = Machine(landscape, seed), Ours(landscape, seed), qmc(landscape, seed)
    first: list[Block] = []
    for _ in range(blocks):
        asked = filling.ask()
        assert asked
        first.append(machine.execute(asked))
        filling.tell(first[-1])
    contender.learn(first)
    contender.tell(machine.execute(contender.ask()))
    spent_s = []
    for _ in range(more):
        began = time.monotonic()
        asked = contender.ask()
        asked_s = time.monotonic() - began
        block = machine.execute(asked)
        began = time.monotonic()
        contender.tell(block)
        spent_s.append(asked_s + time.monotonic() - began)
    return spent_s
