"""A run, read and analysed: everything that the report and the summary say comes from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from spark_ray import power
from spark_ray.store import Store

from . import audit, contrasts, fingerprint, frames, ladder, noise, predictions, verdict
from .findings import Evidence, Finding
from .reading import at, text

if TYPE_CHECKING:
    from .map_table import Map, NoMap


@dataclass(frozen=True)
class Analysis:
    plan: Mapping[str, Any]
    trials: pd.DataFrame
    phases: pd.DataFrame
    samples: Mapping[str, pd.DataFrame]
    pairs: pd.DataFrame
    comparisons: tuple[verdict.Comparison, ...]
    properties: tuple[fingerprint.Row, ...]
    rivals: tuple[fingerprint.Row, ...]  # unexpected differences between the compared arms
    findings: tuple[Finding, ...]
    ladder: ladder.Ladder | None
    predictions: tuple[predictions.Judged, ...]
    twins: tuple[noise.Twin, ...]
    arms: tuple[str, ...]
    baseline: str
    against: str
    map: Map | NoMap | None = None
    """None: nobody asked for one."""

    @property
    def main(self) -> verdict.Comparison:
        return next(each for each in self.comparisons if each.arm == self.against)

    @property
    def valid(self) -> pd.DataFrame:
        """The attempts that count."""
        return self.trials[self.trials["standing"] == "counts"]

    @property
    def is_double(self) -> bool:
        """Whether a test double stood in for the engine's library, in any attempt or by plan."""
        planned = at(self.plan, "experiment", "engine", "double") is not None
        return planned or bool(self.trials["engine_is_double"].fillna(False).any())

    @property
    def is_simulated(self) -> bool:
        """Whether a formula made the numbers, in any attempt or by plan."""
        planned = at(self.plan, "experiment", "engine", "kind") == "simulated"
        return planned or bool(self.trials["simulated"].fillna(False).any())

    @property
    def mark(self) -> str:
        """Said with every number and figure, where what made them is no engine."""
        return "DOUBLE" if self.is_double else "SIMULATED" if self.is_simulated else ""

    @property
    def map_ended(self) -> bool:
        """Whether the search of a map is done: it is as well known as asked for, or its blocks are spent."""
        if self.map is None or at(self.plan, "experiment", "search", "sampler") != "map":
            return False
        from . import map_table  # whoever has no map need not wait for its libraries

        return isinstance(self.map, map_table.Map) and self.map.decision.stop

    @property
    def noise_floor(self) -> float | None:
        """Outer end of the interval of an arm that equals the baseline in everything; None where the run has none."""
        return noise.floor(list(self.twins))

    @property
    def is_twin(self) -> bool:
        """Whether the compared arms are the same (A/A)."""
        return any(twin.arm == self.against for twin in self.twins)

    def sentence(self, found: verdict.Comparison) -> str:
        """The verdict on one arm, which is called divergent only above the noise of this run and of the pilot it was planned with."""
        if any(twin.arm == found.arm for twin in self.twins):
            return f"{found.baseline} and {found.arm} are the same (A/A): what follows is noise. {verdict.sentence(found)}"
        pilot = power.of_plan(self.plan)
        floors = [(self.noise_floor, "this run"), (pilot.floor if pilot else None, "the pilot")]
        known = [(floor, of) for floor, of in floors if floor is not None]
        return verdict.sentence(found, *max(known)) if known else verdict.sentence(found)


def _arms(plan: Mapping[str, Any]) -> tuple[tuple[str, ...], str, str]:
    """Arms that were executed, baseline, against; a compared arm that was left out keeps its name."""
    executed = [arm for each in at(plan, "arms") or () if (arm := text(each))]
    declared = list(at(plan, "experiment", "arms") or {}) or executed
    named = at(plan, "experiment", "contrast")
    pair = [*declared, "?", "?"][:2]
    baseline, against = text(at(named, "baseline")) or pair[0], text(at(named, "against")) or pair[1]
    return tuple(executed), baseline, against


def analyse(store: Store, *, with_map: bool = False) -> Analysis:
    """Read all records and derive everything the report says; writes nothing but the parquet tables.

    A run that the sampler `map` searched has a map; `with_map`: any other too.
    """
    plan, records = store.plan, list(store.records())
    arms, baseline, against = _arms(plan)
    trials, phases = frames.trials(records, frames.block_indices(store)), frames.phases(records)
    samples = frames.write_tables(store, trials, phases)
    pairs = contrasts.pairs(trials, arms, baseline)
    others = [arm for arm in arms if arm != baseline]
    comparisons = tuple(verdict.comparison(pairs, arm, baseline) for arm in dict.fromkeys([against, *others]))
    properties = fingerprint.compare(records, arms)
    rivals = fingerprint.rivals(properties, arms, baseline, against)
    twins = tuple(noise.twins(trials, pairs, baseline))
    climbed = ladder.climb(plan, trials, arms)
    found = Analysis(
        plan, trials, phases, samples, pairs, comparisons, tuple(properties), tuple(rivals), (),
        climbed, predictions.judge_all(plan, trials, baseline), twins, arms, baseline, against,
    )  # fmt: skip
    if climbed is not None:
        marked = climbed.pairs.assign(simulated=found.is_simulated, engine_is_double=found.is_double)
        marked.to_parquet(store.folder / "ladder.parquet", index=False)
    if with_map or at(plan, "experiment", "search", "sampler") == "map":
        found = replace(found, map=_map(store, found))
    seen = Evidence(
        plan, trials, pairs, samples, arms, baseline, against, len(rivals), bool(twins), found.map_ended
    )
    return replace(found, findings=tuple(audit.findings(seen)))


def _map(store: Store, found: Analysis) -> Map | NoMap:
    """The map of a run, written as a table."""
    from . import map_table  # whoever has no map need not wait for its libraries

    missing = [arm for arm in (found.baseline, found.against) if arm not in found.arms]
    if missing:
        return map_table.NoMap(f"{' and '.join(missing)} was left out of this run")
    made = map_table.of_run(store)
    if isinstance(made, map_table.Map):
        rows = map_table.table(made, simulated=found.is_simulated, double=found.is_double)
        rows.to_parquet(store.folder / map_table.FILE, index=False)
    return made


def verdict_of(found: Analysis) -> str:
    """The verdict, with what must be known first in front."""
    first = ""
    if found.trials["fake"].fillna(False).any() or at(found.plan, "experiment", "engine", "kind") == "fake":
        first = "NOT A MEASUREMENT: the engine is fake and its numbers mean nothing. "
    elif found.is_double:
        first = "DOUBLE: a stand-in for TensorRT-LLM, no engine ran; its numbers are no measurements. "
    elif found.is_simulated:
        first = "SIMULATED: no engine ran, capacities come from a formula. "
    elif (
        found.trials["probe"].fillna(False).any() or at(found.plan, "experiment", "engine", "kind") == "probe"
    ):
        first = "PROBE: the sizing law over real memory, no inference engine ran. "
    if found.trials.empty:
        return f"{first}No attempt has ended: there is nothing to say yet."
    missing = [arm for arm in (found.baseline, found.against) if arm not in found.arms]
    if missing:
        return f"{first}No contrast: {' and '.join(missing)} was left out of this run."
    said = first + _of_map(found) + found.sentence(found.main)
    widest = sorted(found.twins, key=lambda twin: twin.floor or 0.0)[-1:]
    return " ".join([said, *map(verdict.noise_sentence, widest), *_judged(found)])


def _of_map(found: Analysis) -> str:
    """The map's answer, before that of the blocks, which lie where the search looked and so are no sample of the space."""
    if at(found.plan, "experiment", "search", "sampler") != "map":
        return ""
    from . import map_table, map_words

    if not isinstance(found.map, map_table.Map):
        return ""
    return f"{map_words.headline(found.map)} Of the blocks alone, which lie where the search looked: "


def _judged(found: Analysis) -> list[str]:
    words = [each.word for each in found.predictions]
    counts = ", ".join(
        f"{words.count(word)} {word}" for word in ("held", "not held", "undecided") if word in words
    )
    return [f"Predictions: {counts}."] if words else []
