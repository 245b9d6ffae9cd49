"""The noise floor: how far apart two arms are that are the same, and what as many blocks would have shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from . import statistics


@dataclass(frozen=True)
class Twin:
    """An arm that equals the baseline in everything."""

    arm: str
    baseline: str
    contrast: statistics.Paired

    @property
    def floor(self) -> float | None:
        """The largest mean contrast that this pair does not exclude."""
        ends = [abs(end) for end in (self.contrast.low, self.contrast.high) if end is not None]
        return max(ends, default=None)

    @property
    def detectable(self) -> float | None:
        """The contrast that as many blocks would show with 80 % power; None where no spread was seen."""
        return statistics.detectable(self.contrast.sd, self.contrast.n)

    def as_dict(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "baseline": self.baseline,
            "blocks": self.contrast.n,
            "floor": self.floor,
            "sd_per_block": self.contrast.sd,
            "detectable_contrast": self.detectable,
            "divergence": self.contrast.excludes_zero,
        }


def twins(trials: pd.DataFrame, pairs: pd.DataFrame, baseline: str) -> list[Twin]:
    """The arms that equal the baseline (environment, treatment, engine, executor) in every block, with their contrast.

    Knobs make an arm another one from block to block.
    """
    made = trials.dropna(subset=["setup"]).groupby(["block_id", "arm"])["setup"].first().unstack("arm")
    if baseline not in made:
        return []
    shared = {str(arm): made[[arm, baseline]].dropna() for arm in made if arm != baseline}
    return [
        Twin(arm, baseline, statistics.paired([float(v) for v in pairs[pairs["arm"] == arm]["contrast"].dropna()]))
        for arm, both in shared.items()
        if len(both) and (both[arm] == both[baseline]).all()
    ]  # fmt: skip


def floor(found: list[Twin]) -> float | None:
    return max((each.floor for each in found if each.floor is not None), default=None)
