"""The map of a run: what its blocks say of capacity over the whole searched space, and how surely, on a grid.

Who chose the blocks does not matter to the map, only to how much it knows. Nothing here reads a record: that is
`spark_ray.mapping`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spark_ray import mapping, power
from spark_ray.predict import CAPACITY, Quantity, quantity_of
from spark_ray.search.cube import Axis, Cube, Floats
from spark_ray.search.divergence_sampler import Axes
from spark_ray.search.stopping import PLACES, Decision
from spark_ray.search.surrogate import Observation, Prediction, Surrogate
from spark_ray.search.target import UNDECIDED, Target
from spark_ray.search_spec import Configuration
from spark_ray.spec import Scalar
from spark_ray.store import Store
from spark_ray.units import format_bytes

Mask = NDArray[np.bool_]

FILE = "map.parquet"
FINE, COARSE, ROUGH = 24, 12, 4
"""Places along the first two axes that vary, the third, and each further one."""
FINE_1D, FINE_2D = 201, 60
MOST_PLACES = 50_000


@dataclass(frozen=True)
class Share:
    """A share of the searched space: expected, and the ends of its 95 % interval if all places erred together."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, chance: Floats) -> Share:
        """Of places that stand for equal volumes, each with the chance that it belongs to the share."""
        mean, (possible, sure) = float(chance.mean()), UNDECIDED
        low, high = float((chance > sure).mean()), float((chance > possible).mean())
        return cls(mean, min(low, mean), max(high, mean))


@dataclass(frozen=True)
class NoMap:
    """Why there is none."""

    reason: str


@dataclass(frozen=True)
class Map:
    """A surrogate with what was asked of it; `arms` are the baseline and the other."""

    surrogate: Surrogate
    target: Target
    decision: Decision
    observations: tuple[Observation, ...]
    axes: Axes
    arms: tuple[str, str]
    sampler: str
    """Who chose the blocks."""
    quantity: Quantity = CAPACITY
    units: Mapping[str, str] = field(default_factory=dict)
    """Of the knobs that are sizes (B) or durations (s)."""
    by_noise: bool = False
    """Whether the margin in force is the noise floor of a pilot, above the one asked for."""

    @property
    def cube(self) -> Cube:
        return self.surrogate.cube

    @cached_property
    def filling(self) -> tuple[Floats, Prediction]:
        """Places that stand for equal volumes of the space, raw, and what is known there."""
        raw = self.cube.filling(PLACES, self.surrogate.seed)
        return raw, self.surrogate.predict(raw)

    @property
    def open(self) -> tuple[float, float]:
        """The shares of the space that are expected to be called wrongly, and that are undecided at 95 %.

        The stopping rule's own where it ruled. It also counts what no model can foresee, by the blocks that fill the space
        as it would have them: to blocks that another sampler chose that does not apply.
        """
        if self.sampler == "map":
            return self.decision.expected_misclassified, self.decision.undecided_volume
        said = self.filling[1]
        wrong = self.target.misclassified(said, self.decision.widening)
        return float(wrong.mean()), float(self.undecided(said).mean())

    def chance(self, said: Prediction) -> Floats:
        """How probably arms diverge, with bands as wide as the stopping rule has them."""
        return self.target.divergent(said, self.decision.widening)

    def undecided(self, said: Prediction) -> Mask:
        return self.target.undecided(said, self.decision.widening) > 0

    @property
    def divergent(self) -> Share:
        return Share.of(self.chance(self.filling[1]))

    @property
    def only_one_works(self) -> tuple[Share, Share]:
        """The space in which the baseline alone, and the other arm alone, has any capacity."""
        said = self.filling[1]
        return (
            Share.of(said.feasible_a - said.feasible_both),
            Share.of(said.feasible_b - said.feasible_both),
        )

    def configurations(self, raw: Floats) -> list[Configuration]:
        """Rows of a raw matrix as they are written and read; a choice that is no number is itself again."""
        return [self.axes.params(each) for each in self.cube.configurations(raw)]

    def written(self, place: int, value: float) -> str:
        """A value of one axis in words."""
        found = self.configurations(at_middle(self.cube, {place: np.array([value])}))[0]
        name = self.cube.axes[place].name
        return self.short(name, found[name])

    def short(self, name: str, value: Scalar) -> str:
        """A value of a configuration in words."""
        if self.units.get(name) == "B" and isinstance(value, int | float):
            return format_bytes(value)
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        return f"{shown} s" if self.units.get(name) == "s" else shown

    def measured_at(self, block: Observation) -> Configuration:
        return self.axes.params(block.configuration)


def of_run(store: Store) -> Map | NoMap:
    """The map that the complete blocks of a run amount to."""
    experiment, noise = power.experiment_of(store.plan), power.of_plan(store.plan)
    surrogate = mapping.surrogate(store, experiment)
    observations = mapping.observations(store, experiment)
    if surrogate is None:
        return NoMap(mapping.lacks(observations))
    compared = experiment.compared
    return Map(
        surrogate,
        mapping.target(experiment),
        mapping.decision(store, experiment),
        observations,
        mapping.axes(experiment),
        (compared.baseline, compared.against),
        experiment.search.sampler,
        quantity_of(experiment),
        units=experiment.search.space.units,
        by_noise=noise is not None and noise.floor >= experiment.search.target.margin,
    )


# ---- the grid ---------------------------------------------------------------------------------------------


def levels(axis: Axis, count: int) -> Floats:
    """At most `count` values of an axis, ascending and evenly spread as it is searched; of a list, all of them."""
    if axis.levels:
        return np.asarray(axis.levels, dtype=np.float64)
    return np.unique(axis.value(np.linspace(0.0, 1.0, count)))


def grid(cube: Cube) -> Floats:
    """Places over the axes that vary, raw; the others at their one value. Those that no engine accepts are left out."""
    varying = [cube.axes[place] for place in cube.varying]
    counts = {1: [FINE_1D], 2: [FINE_2D] * 2}.get(len(varying), [FINE, FINE, COARSE])
    counts += [ROUGH] * (len(varying) - len(counts))
    while True:
        values = [levels(axis, count) for axis, count in zip(varying, counts, strict=True)]
        if np.prod([len(each) for each in values], dtype=float) <= MOST_PLACES or max(counts) <= 2:
            break
        counts = [max(2, count - 1) for count in counts]
    while (
        len(max(values, key=len)) > 2 and np.prod([len(each) for each in values], dtype=float) > MOST_PLACES
    ):
        longest = max(range(len(values)), key=lambda place: len(values[place]))  # several long lists
        every = np.linspace(0, len(values[longest]) - 1, max(2, len(values[longest]) // 2))
        values[longest] = values[longest][np.rint(every).astype(int)]
    raw = at_middle(cube, dict(zip(cube.varying, np.array(list(product(*values))).T, strict=True)))
    return raw[runnable(cube, raw)]


def at_middle(cube: Cube, columns: Mapping[int, Floats]) -> Floats:
    """Raw rows with these columns, by place of the axis; every other axis is at the middle of what is searched."""
    count = max(len(each) for each in columns.values())
    middle = [np.full(count, 0.5) for _ in cube.axes]
    return np.column_stack(
        [columns.get(place, axis.value(middle[place])) for place, axis in enumerate(cube.axes)]
    )


def runnable(cube: Cube, raw: Floats) -> Mask:
    """Which of the places a search could ask for: in a range, tokens are raised to the batch, as an engine wants them."""
    return np.asarray(np.isclose(cube.snap(cube.unit(raw)), raw).all(axis=1))


def table(found: Map, *, simulated: bool, double: bool) -> pd.DataFrame:
    """One row per place of the grid; see `analysis.columns.MAP`."""
    raw = grid(found.cube)
    said = found.surrogate.predict(raw)
    rows = pd.DataFrame(found.configurations(raw))
    of_arms = (
        (found.arms[0], said.kv_a_mean, said.kv_a_sd, said.feasible_a),
        (found.arms[1], said.kv_b_mean, said.kv_b_sd, said.feasible_b),
    )
    column, unit = found.quantity.column, found.quantity.unit
    for arm, mean, sd, feasible in of_arms:
        # below nothing a law's line goes on, where it says how far an arm is from working
        rows[f"{column}_{arm}_mean_{unit}"], rows[f"{column}_{arm}_sd_{unit}"] = np.maximum(mean, 0.0), sd
        rows[f"feasible_{arm}"] = feasible
    rows["feasible_both"] = said.feasible_both
    rows["contrast_mean"], rows["contrast_sd"] = said.contrast_mean, said.contrast_sd
    rows["divergence_probability"] = found.chance(said)
    rows["undecided"] = found.undecided(said)
    return rows.assign(simulated=simulated, engine_is_double=double)
