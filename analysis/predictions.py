"""What was said beforehand against what was measured, with the values read at the sizing moment.

Expected in a block: times x memory_fraction x (the quantity in the arm - in the baseline). Held: the difference between
measured and expected lies surely within the margin (two one-sided t tests; with a single block, within it at all). Not
held: its interval lies wholly outside. Else undecided. Margins differ between blocks, so differences are weighed as shares
of their margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from pydantic import ValidationError

from spark_ray.experiment import Prediction

from . import contrasts, statistics
from .attribution import delta, known
from .reading import at

Word = Literal["held", "not held", "undecided"]
_COLUMNS = {
    "page_cache": "sizing_page_cache_bytes",
    "fill": "sizing_fill_bytes",
    "ballast": "sizing_ballast_bytes",
    "orchestrator": "orchestrator_before_bytes",
    "view_free": "sizing_free_bytes",
}


@dataclass(frozen=True)
class Block:
    block_id: str
    expected_bytes: float
    measured_bytes: float
    margin_bytes: float

    @property
    def off_bytes(self) -> float:
        return self.measured_bytes - self.expected_bytes

    @property
    def held(self) -> bool:
        return abs(self.off_bytes) <= self.margin_bytes


@dataclass(frozen=True)
class Judged:
    """One prediction over the blocks in which both arms have a capacity and the quantity was read."""

    said: Prediction
    baseline: str
    blocks: tuple[Block, ...]
    unread: int  # blocks with capacities in which the quantity was not read
    views: tuple[str, ...]  # what the two arms called free

    @property
    def expected(self) -> statistics.Paired:
        return statistics.paired([each.expected_bytes for each in self.blocks])

    @property
    def measured(self) -> statistics.Paired:
        return statistics.paired([each.measured_bytes for each in self.blocks])

    @property
    def off(self) -> statistics.Paired:
        return statistics.paired([each.off_bytes for each in self.blocks])

    @property
    def margins_bytes(self) -> tuple[float, float] | None:
        margins = [each.margin_bytes for each in self.blocks]
        return (min(margins), max(margins)) if margins else None

    @property
    def p(self) -> float | None:
        """Of the test that the difference lies within the margin."""
        return statistics.equivalence_p(self._shares, 1.0) if self._shares else None

    @property
    def _shares(self) -> list[float]:
        return [each.off_bytes / each.margin_bytes for each in self.blocks]

    @property
    def word(self) -> Word:
        if not self.blocks:
            return "undecided"
        if len(self.blocks) == 1:
            return "held" if self.blocks[0].held else "not held"
        over = statistics.paired(self._shares)
        if self.p is not None and self.p < 1 - statistics.CONFIDENCE:
            return "held"
        outside = over.low is not None and over.high is not None and (over.low > 1 or over.high < -1)
        return "not held" if outside else "undecided"

    @property
    def detected(self) -> bool | None:
        """Whether the effect shows by itself; None where none is expected, or nothing was measured."""
        if self.said.quantity == "none" or self.said.times == 0 or len(self.blocks) < 2:
            return None
        found = self.measured
        return found.excludes_zero or (found.sd == 0 and found.mean != 0)

    @property
    def sentence(self) -> str:
        """The prediction in words."""
        said = self.said
        if said.quantity == "none" or said.times == 0:
            return f"{said.arm} has the KV capacity of {self.baseline}"
        what = {
            "page_cache": "page cache",
            "fill": "the fill",
            "ballast": "the ballast",
            "orchestrator": "what the orchestrator holds",
            "view_free": "what the view calls free",
        }[said.quantity]
        factor = "" if abs(said.times) == 1 else f"{abs(said.times):g} × "
        sign = "−" if said.times < 0 else ""
        return f"{said.arm} − {self.baseline} = {sign}{factor}fraction × Δ {what}"


def stated(plan: Mapping[str, Any]) -> list[Prediction]:
    """The experiment's predictions; one that cannot be meant is left out (sweep refuses it before any effect)."""
    listed, found = at(plan, "experiment", "predictions"), []
    for each in listed if isinstance(listed, list | tuple) else ():
        try:
            found.append(Prediction.model_validate(each))
        except ValidationError:
            continue
    return found


def _expected(said: Prediction, base: Any, arm: Any) -> float | None:
    fraction = known(base["memory_fraction"])
    change = 0.0 if said.quantity == "none" else delta(base, arm, _COLUMNS[said.quantity])
    return None if fraction is None or change is None else said.times * fraction * change


def judge(said: Prediction, baseline: str, trials: pd.DataFrame) -> Judged:
    valid = trials[trials["standing"] == "counts"]
    blocks, unread, views = list[Block](), 0, set[str]()
    for block_id, block in valid.groupby("block_id", sort=False):
        by_arm = {str(row["arm"]): row for _, row in block.iterrows() if contrasts.has_capacity(row)}
        if baseline not in by_arm or said.arm not in by_arm:
            continue
        base, arm = by_arm[baseline], by_arm[said.arm]
        expected, measured = _expected(said, base, arm), delta(base, arm, "kv_cache_bytes")
        views |= {str(row["sizing_view"]) for row in (base, arm) if not pd.isna(row["sizing_view"])}
        if expected is None or measured is None:
            unread += 1
            continue
        margin = max(said.share * abs(expected), float(said.within), 1.0)
        blocks.append(Block(str(block_id), expected, measured, margin))
    return Judged(said, baseline, tuple(blocks), unread, tuple(sorted(views)))


def judge_all(plan: Mapping[str, Any], trials: pd.DataFrame, baseline: str) -> tuple[Judged, ...]:
    return tuple(judge(said, said.baseline or baseline, trials) for said in stated(plan))


def summary(judged: Judged) -> dict[str, Any]:
    """For summary.json."""
    return {
        "arm": judged.said.arm,
        "baseline": judged.baseline,
        "quantity": judged.said.quantity,
        "times": judged.said.times,
        "because": judged.said.because,
        "verdict": judged.word,
        "p": judged.p,
        "detected": judged.detected,
        "blocks": len(judged.blocks),
        "blocks_held": sum(each.held for each in judged.blocks),
        "blocks_unread": judged.unread,
        "margin_bytes": None if judged.margins_bytes is None else list(judged.margins_bytes),
        "expected_bytes": judged.expected.as_dict(),
        "measured_bytes": judged.measured.as_dict(),
        "difference_bytes": judged.off.as_dict(),
        "by_block": [
            {
                "block_id": each.block_id,
                "expected_bytes": each.expected_bytes,
                "measured_bytes": each.measured_bytes,
                "margin_bytes": each.margin_bytes,
                "held": each.held,
            }
            for each in judged.blocks
        ],
    }
