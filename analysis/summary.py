"""summary.json: what the report says, as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from spark_ray.outcome import ANSWERS

from . import ladder, matmul, predictions, statistics, verdict
from .reading import at, text
from .run import Analysis, verdict_of

if TYPE_CHECKING:
    from .map_table import Map, NoMap

_NO_CAPACITY = ANSWERS - {"ok"}


def _median_bytes(values: pd.Series) -> int | None:
    known = values.dropna()
    return round(float(known.median())) if len(known) else None


def _arm(found: Analysis, arm: str) -> dict[str, Any]:
    mine = found.valid[found.valid["arm"] == arm]
    ok = mine[mine["outcome"] == "ok"]
    every = found.trials[found.trials["arm"] == arm]
    return {
        "arm": arm,
        "environment": text(every["environment"].dropna().iloc[0]) if every["environment"].notna().any() else None,
        "treatment": text(every["treatment"].dropna().iloc[0]) if every["treatment"].notna().any() else None,
        "ok": len(ok),
        "no_capacity": int(mine["outcome"].isin(list(_NO_CAPACITY)).sum()),
        "failed": int((~mine["outcome"].isin(list(ANSWERS))).sum()),
        "superseded": int((every["standing"] == "superseded").sum()),
        "open": int((every["standing"] == "open").sum()),
        "median_kv_cache_bytes": _median_bytes(ok["kv_cache_bytes"]),
        "median_kv_cache_tokens": _median_bytes(ok["kv_cache_tokens"]),
        "median_peak_memory_bytes": _median_bytes(ok["peak_memory_bytes"]),
        "median_page_cache_bytes_at_sizing": _median_bytes(ok["sizing_page_cache_bytes"]),
        "median_output_throughput_tokens_per_s": statistics.median([float(v) for v in ok["output_throughput_tokens_per_s"].dropna()]),
        "median_duration_s": statistics.median([float(v) for v in ok["duration_s"].dropna()]),
    }  # fmt: skip


def _contrast(found: verdict.Comparison) -> dict[str, Any]:
    parts = found.attribution
    return {
        "arm": found.arm,
        "baseline": found.baseline,
        "contrast": found.contrast.as_dict(),
        "equivalence": {"margin": verdict.MARGIN, "p": found.equivalence_p},
        "detectable_contrast": statistics.detectable(found.contrast.sd, found.contrast.n),
        "mean_delta_kv_cache_bytes": found.delta_bytes,
        "mean_predicted_delta_bytes": found.predicted_bytes,
        "mean_unpredicted_bytes": found.unpredicted_bytes,
        "worst_unpredicted_bytes": found.worst_unpredicted_bytes,
        "mean_term_bytes": {name: each.mean for name, each in parts.terms.items()},
        "attribution": {
            "terms": {name: _interval(each) for name, each in parts.terms.items()},
            "explained_share": parts.explained,
            "read_in_some_blocks_only": list(parts.unread),
        },
        "complete_blocks": found.complete_blocks,
        "blocks_without_capacity": found.without_capacity,
    }


def _interval(paired: statistics.Paired) -> dict[str, float | None]:
    return {"mean_bytes": paired.mean, "low_bytes": paired.low, "high_bytes": paired.high}


def _map(found: Map | NoMap | None) -> dict[str, Any] | None:
    if found is None:
        return None
    from . import map_table, map_words

    return map_words.summary(found) if isinstance(found, map_table.Map) else {"missing": found.reason}


def summarise(found: Analysis) -> dict[str, Any]:
    return {
        "name": text(at(found.plan, "experiment", "name")) or "?",
        "question": text(at(found.plan, "experiment", "question")) or "",
        "spark_ray_version": text(at(found.plan, "spark_ray_version")),
        "created_at": text(at(found.plan, "created_at")),
        "verdict": verdict_of(found),
        "engine_is_double": found.is_double,
        "simulated": found.is_simulated,
        "baseline": found.baseline,
        "against": found.against,
        "noise_floor": found.noise_floor,
        "noise": [twin.as_dict() for twin in found.twins],
        "blocks": {"wanted": at(found.plan, "experiment", "search", "blocks"), "complete": int(found.valid["block_id"].nunique())},
        "arms": [_arm(found, arm) for arm in found.arms],
        "contrasts": [_contrast(each) for each in found.comparisons],
        "matmul": [each.as_dict() for each in matmul.rows(found.valid, found.arms, found.baseline)],
        "ladder": ladder.summary(found.ladder),
        "map": _map(found.map),
        "predictions": [predictions.summary(each) for each in found.predictions],
        "rivals": [row.name for row in found.rivals],
        "findings": [{"severity": each.severity, "sentence": each.sentence} for each in found.findings],
    }  # fmt: skip
