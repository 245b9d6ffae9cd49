"""Everything derived from a run's records: parquet tables, summary.json and report.html.

    python -m analysis.report RUN

The report is one file that needs no network. The same records give the same report. Nothing here changes a record.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from spark_ray.errors import SparkRayError
from spark_ray.outcome import ANSWERS
from spark_ray.store import Store, write_durably
from spark_ray.units import MIB, format_bytes

from . import audit, contrasts, figures, fingerprint, frames, statistics, verdict
from .frames import words
from .reading import at, text

_TEMPLATES = Path(__file__).parent / "templates"
_NO_CAPACITY = ANSWERS - {"ok"}
_HASH_SHOWN = Markup('<span title="{}">{}…</span>')
_HASH = re.compile(r"(?<![0-9a-f])[0-9a-f]{40,64}(?![0-9a-f])")


@dataclass(frozen=True)
class Analysis:
    """A run, read and analysed."""

    plan: Mapping[str, Any]
    trials: pd.DataFrame
    phases: pd.DataFrame
    samples: Mapping[str, pd.DataFrame]
    pairs: pd.DataFrame
    comparisons: tuple[verdict.Comparison, ...]
    properties: tuple[fingerprint.Row, ...]
    findings: tuple[audit.Finding, ...]
    arms: tuple[str, ...]
    baseline: str
    against: str
    noise_floor: float | None

    @property
    def main(self) -> verdict.Comparison:
        return next(each for each in self.comparisons if each.arm == self.against)

    @property
    def valid(self) -> pd.DataFrame:
        """The attempts that count."""
        return self.trials[self.trials["standing"] == "counts"]


# ---- analysis ---------------------------------------------------------------------------------------------


def _arms(plan: Mapping[str, Any]) -> tuple[tuple[str, ...], str, str]:
    """Arms that were executed, baseline, against; a compared arm that was left out keeps its name."""
    executed = [arm for each in at(plan, "arms") or () if (arm := text(each))]
    declared = list(at(plan, "experiment", "arms") or {}) or executed
    named = at(plan, "experiment", "contrast")
    pair = [*declared, "?", "?"][:2]
    baseline, against = text(at(named, "baseline")) or pair[0], text(at(named, "against")) or pair[1]
    return tuple(executed), baseline, against


def _noise_floor(pairs: pd.DataFrame, trials: pd.DataFrame, baseline: str) -> float | None:
    """Outer end of the interval of an arm that equals the baseline in everything; None where the run has none."""
    setups = trials.dropna(subset=["setup"]).groupby("arm")["setup"].first()
    twins = [
        arm
        for arm in setups.index
        if baseline in setups and arm != baseline and setups[arm] == setups[baseline]
    ]
    ends = []
    for arm in twins:
        found = statistics.paired([float(v) for v in pairs[pairs["arm"] == arm]["contrast"].dropna()])
        ends += [abs(end) for end in (found.low, found.high) if end is not None]
    return max(ends, default=None)


def analyse(store: Store) -> Analysis:
    """Read all records and derive everything the report says; writes nothing but the parquet tables."""
    plan, records = store.plan, list(store.records())
    arms, baseline, against = _arms(plan)
    trials, phases = frames.trials(records, frames.block_indices(store)), frames.phases(records)
    samples = frames.write_tables(store, trials, phases)
    pairs = contrasts.pairs(trials, arms, baseline)
    others = [arm for arm in arms if arm != baseline]
    comparisons = tuple(verdict.comparison(pairs, arm, baseline) for arm in dict.fromkeys([against, *others]))
    properties = fingerprint.compare(records, arms)
    rivals = fingerprint.rivals(properties, arms, baseline, against)
    seen = audit.Evidence(plan, trials, pairs, samples, arms, baseline, against, len(rivals))
    return Analysis(
        plan, trials, phases, samples, pairs, comparisons, tuple(properties), tuple(audit.findings(seen)),
        arms, baseline, against, _noise_floor(pairs, trials, baseline),
    )  # fmt: skip


def verdict_of(found: Analysis) -> str:
    """The verdict, with what must be known first in front."""
    first = ""
    if found.trials["fake"].fillna(False).any() or at(found.plan, "experiment", "engine", "kind") == "fake":
        first = "NOT A MEASUREMENT: the engine is fake and its numbers mean nothing. "
    elif found.trials["simulated"].fillna(False).any():
        first = "SIMULATED: no engine ran, capacities come from a formula. "
    if found.trials.empty:
        return f"{first}No attempt has ended: there is nothing to say yet."
    missing = [arm for arm in (found.baseline, found.against) if arm not in found.arms]
    if missing:
        return f"{first}No contrast: {' and '.join(missing)} was left out of this run."
    twin = found.noise_floor if not _is_twin(found) else None
    same = (
        f"{found.baseline} and {found.against} are the same (A/A): what follows is noise. "
        if _is_twin(found)
        else ""
    )
    return first + same + verdict.sentence(found.main, twin)


def _is_twin(found: Analysis) -> bool:
    setups = found.trials.dropna(subset=["setup"]).groupby("arm")["setup"].first()
    return (
        found.baseline in setups
        and found.against in setups
        and setups[found.baseline] == setups[found.against]
    )


# ---- summary.json -----------------------------------------------------------------------------------------


def _median_bytes(values: pd.Series) -> int | None:
    known = values.dropna()
    return round(float(known.median())) if len(known) else None


def _arm_summary(found: Analysis, arm: str) -> dict[str, Any]:
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


def _comparison_summary(found: verdict.Comparison) -> dict[str, Any]:
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
        "mean_term_bytes": found.terms,
        "complete_blocks": found.complete_blocks,
        "blocks_without_capacity": found.without_capacity,
    }


def summarise(found: Analysis) -> dict[str, Any]:
    return {
        "name": text(at(found.plan, "experiment", "name")) or "?",
        "question": text(at(found.plan, "experiment", "question")) or "",
        "spark_ray_version": text(at(found.plan, "spark_ray_version")),
        "created_at": text(at(found.plan, "created_at")),
        "verdict": verdict_of(found),
        "baseline": found.baseline,
        "against": found.against,
        "noise_floor": found.noise_floor,
        "blocks": {"wanted": at(found.plan, "experiment", "search", "blocks"), "complete": int(found.valid["block_id"].nunique())},
        "arms": [_arm_summary(found, arm) for arm in found.arms],
        "contrasts": [_comparison_summary(each) for each in found.comparisons],
        "findings": [{"severity": each.severity, "sentence": each.sentence} for each in found.findings],
    }  # fmt: skip


# ---- report.html ------------------------------------------------------------------------------------------


def _draw(found: Analysis) -> list[figures.Figure]:
    style = figures.Style(found.arms)
    block = figures.representative(found.pairs, found.against)
    executed = [each for each in found.comparisons if each.arm in found.arms]
    return figures.drawn(
        lambda: figures.capacity(found.trials, style),
        lambda: figures.contrast(found.pairs, executed, style),
        lambda: figures.decomposition(found.main),
        lambda: figures.prediction(found.pairs, style),
        lambda: figures.phases(found.phases, block, style) if block else None,
        lambda: figures.timeline(found.samples, found.phases, block, style) if block else None,
    )


def _block_rows(found: Analysis) -> list[dict[str, Any]]:
    """One row per complete block: configuration, order, KV by arm, and the compared pair."""
    rows = []
    for block_id, block in found.valid.groupby("block_id", sort=False):
        kv = {
            str(row["arm"]): row["kv_cache_bytes"] if row["outcome"] == "ok" else row["outcome"]
            for _, row in block.iterrows()
        }
        pair = found.pairs[(found.pairs["block_id"] == block_id) & (found.pairs["arm"] == found.against)]
        numbers: Any = pair.iloc[0] if len(pair) else {}
        rows.append(
            {
                "block_id": block_id,
                "configuration": {name: block[name].iloc[0] for name in contrasts.CONFIGURATION},
                "order": [str(arm) for arm in block.sort_values("position")["arm"]],
                "kv": [kv.get(arm) for arm in found.arms],
                "contrast": numbers.get("contrast"),
                "delta": numbers.get("delta_kv_cache_bytes"),
                "predicted": numbers.get("predicted_delta_bytes"),
                "unpredicted": numbers.get("unpredicted_bytes"),
            }
        )
    return rows


def _script_json(value: Any) -> Markup:
    """JSON for a script element: no record can end the element or begin a comment."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026"))  # noqa: S704


def _charts(drawn: list[figures.Figure]) -> dict[str, Any]:
    return {each.key: json.loads(each.figure.to_json()) for each in drawn}


def _repeat(found: Analysis, folder: Path) -> str:
    overrides = at(found.plan, "overrides")
    changes = [f"--set {words(each)}" for each in overrides] if isinstance(overrides, list) else []
    local = ["--local"] if at(found.plan, "executor") == "local" else []
    return " ".join(["python -m spark_ray.sweep", f"{folder.name}/experiment.yaml", *changes, *local])


def _present(value: Any) -> bool:
    return value is not None and not pd.isna(value)


def _mib(value: Any) -> str:
    shown = f"{float(value) / MIB:+.1f}" if _present(value) else "–"
    return "0.0" if shown in {"+0.0", "-0.0"} else shown.replace("-", "−")


def _size(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("_", " ")
    return format_bytes(float(value)).replace("-", "−") if _present(value) else "–"


def _percent(value: Any) -> str:
    return verdict.percent(float(value)) if _present(value) else "–"


def _p_value(value: Any) -> str:
    return f"{value:.2g}" if _present(value) else "–"


def _plain(value: Any) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)) if _present(value) else "–"


def _short_hashes(value: str) -> Markup:
    """Escaped text in which a long hash shows its first 12 digits, and is whole in the title."""
    pieces, last = [], 0
    for found in _HASH.finditer(value):
        digits = found[0]
        pieces += [escape(value[last : found.start()]), _HASH_SHOWN.format(digits, digits[:12])]
        last = found.end()
    return Markup("").join([*pieces, escape(value[last:])])


def templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": _size,
        "mib": _mib,
        "percent": _percent,
        "plain": _plain,
        "p_value": _p_value,
        "short_hashes": _short_hashes,
    }
    return environment


def write_page(path: Path, page: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8", errors="replace")
    part.replace(path)


def render(found: Analysis, summary: Mapping[str, Any], folder: Path) -> str:
    drawn = _draw(found)
    unhappy = found.trials[
        (found.trials["outcome"] != "ok").fillna(True) | (found.trials["standing"] != "counts")
    ]
    return templates().get_template("report.html").render(
        summary=summary, found=found, figures=drawn, charts=_script_json(_charts(drawn)),
        plotly=Markup(get_plotlyjs()), blocks=_block_rows(found), terms=contrasts.TERMS,  # noqa: S704  the library itself
        unhappy=[row for _, row in unhappy.iterrows()], verdicts=[verdict.sentence(each) for each in found.comparisons if each.arm in found.arms],
        rivals=[row for row in found.properties if row.differs and not row.expected],
        expected=[row for row in found.properties if row.differs and row.expected], same=[row for row in found.properties if not row.differs],
        host={key: words(value) for key, value in (at(found.plan, "host") or {}).items()}, repeat=_repeat(found, folder),
        seed=at(found.plan, "experiment", "seed") or 0, bundle=text(at(found.plan, "bundle_sha256")), margin=verdict.MARGIN,
        executor=text(at(found.plan, "executor")), alarming=any(each.severity == "grave" for each in found.findings),
    )  # fmt: skip


def write(folder: Path) -> dict[str, Any]:
    """Derive everything from the records of the run in `folder`; returns the summary."""
    store = Store.read(folder)
    found = analyse(store)
    summary = summarise(found)
    page = render(found, summary, folder.resolve())
    write_durably(folder / "summary.json", summary)
    write_page(folder / "report.html", page)
    return summary


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m analysis.report RUN\n")
        return 2
    try:
        summary = write(Path(arguments[0]))
    except SparkRayError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{summary['verdict']}\nreport  {Path(arguments[0]) / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
