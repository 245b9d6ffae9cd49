"""Everything derived from a run's records: parquet tables, summary.json and report.html.

    python -m analysis.report RUN

The report is one file that needs no network. The same records give the same report. Nothing here changes a record.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from spark_ray.errors import SparkRayError
from spark_ray.store import Store, write_durably
from spark_ray.units import MIB, format_bytes

from . import figures, matmul, steps, verdict
from .attribution import TERMS
from .frames import BASIC, configuration, words
from .reading import at, text
from .run import Analysis, analyse
from .summary import summarise

_TEMPLATES = Path(__file__).parent / "templates"
_HASH_SHOWN = Markup('<span title="{}">{}…</span>')
_HASH = re.compile(r"(?<![0-9a-f])[0-9a-f]{40,64}(?![0-9a-f])")


# ---- report.html ------------------------------------------------------------------------------------------


def _draw(found: Analysis) -> list[figures.Figure]:
    style = figures.Style(found.arms)
    # memory over time is this host's, which a simulated engine has no part in
    block = None if found.is_simulated else figures.representative(found.pairs, found.against)
    executed = [each for each in found.comparisons if each.arm in found.arms]
    drawn = figures.drawn(
        lambda: figures.capacity(found.trials, style),
        lambda: figures.contrast(found.pairs, executed, style),
        lambda: steps.waterfall(found.main),
        lambda: steps.staircase(found.ladder, style),
        lambda: figures.prediction(found.pairs, style),
        lambda: figures.phases(found.phases, block, style) if block else None,
        lambda: figures.timeline(found.samples, found.phases, block, style) if block else None,
    )
    return _marked(found, drawn)


def _marked(found: Analysis, drawn: list[figures.Figure]) -> list[figures.Figure]:
    return [figures.stamped(each, found.mark) for each in drawn] if found.mark else drawn


def _map(found: Analysis) -> dict[str, Any] | None:
    """What the section of the map is made of; None: the run has none, and nobody asked for one."""
    if found.map is None:
        return None
    from . import map_figures, map_table, map_words

    if isinstance(found.map, map_table.NoMap):
        return {"missing": found.map.reason, "figures": []}
    return {
        "missing": None,
        "headline": map_words.headline(found.map),
        "sentences": map_words.sentences(found.map),
        "best": map_words.best_rows(found.map),
        "quantity": found.map.quantity.words,
        "figures": _marked(found, map_figures.figures(found.map, figures.Style(found.arms))),
    }


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
                "configuration": dict.fromkeys(BASIC) | configuration(block.iloc[0]),
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


def _bytes(value: Any) -> str:
    """A residue in whole bytes: what is left of a sum of doubles is none."""
    return f"{round(float(value))} B" if _present(value) else "–"


def _range(value: Any) -> str:
    """An interval in MiB; empty where there is none."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{_mib(value.low)} … {_mib(value.high)}"


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
        "range": _range,
        "bytes": _bytes,
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
    drawn, mapped = _draw(found), _map(found)
    charts = [*(mapped["figures"] if mapped else []), *drawn]
    unhappy = found.trials[
        (found.trials["outcome"] != "ok").fillna(True) | (found.trials["standing"] != "counts")
    ]
    parts = {
        name: words for name, words in TERMS.items() if any(_moves(each, name) for each in found.comparisons)
    }
    return templates().get_template("report.html").render(
        products=matmul.rows(found.valid, found.arms, found.baseline), summary=summary, found=found, figures=drawn, map=mapped, charts=_script_json(_charts(charts)),
        plotly=Markup(get_plotlyjs()), blocks=_block_rows(found), terms=parts, ladder=found.ladder,  # noqa: S704  the library itself
        unhappy=[row for _, row in unhappy.iterrows()], verdicts=[found.sentence(each) for each in found.comparisons if each.arm in found.arms],
        differing=[row for row in found.properties if row.differs and not row.expected],
        expected=[row for row in found.properties if row.differs and row.expected], same=[row for row in found.properties if not row.differs],
        host={key: words(value) for key, value in (at(found.plan, "host") or {}).items()}, repeat=_repeat(found, folder),
        seed=at(found.plan, "experiment", "seed") or 0, bundle=text(at(found.plan, "bundle_sha256")), margin=verdict.MARGIN,
        executor=text(at(found.plan, "executor")), alarming=any(each.severity == "grave" for each in found.findings),
    )  # fmt: skip


def _moves(found: verdict.Comparison, term: str) -> bool:
    """Whether a term is anything but 0 in every block; `rest` is always shown, for what it does not hide."""
    each = found.attribution.terms.get(term)
    return each is not None and (term == "rest" or bool(each.mean) or bool(each.sd))


def write(folder: Path, *, with_map: bool = False) -> dict[str, Any]:
    """Derive everything from the records of the run in `folder`, a map too if asked for; returns the summary."""
    store = Store.read(folder)
    found = analyse(store, with_map=with_map)
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
