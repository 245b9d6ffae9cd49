"""A folder of runs on one page: index.html, each run with its verdict and a link to its report.

Derived from the summaries; a run without one is reported first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import report
from .findings import SEVERITIES
from .reading import at

PAGE = "index.html"


def _row(run: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    arms = summary["arms"]
    severities = [finding["severity"] for finding in summary["findings"]]
    return {
        "run": run.name,
        "name": summary["name"],
        "question": summary["question"],
        "verdict": summary["verdict"],
        "blocks": dict(summary["blocks"]),
        **{kind: sum(arm[kind] for arm in arms) for kind in ("ok", "no_capacity", "failed")},
        "findings": {severity: severities.count(severity) for severity in SEVERITIES},
    }


def write(folder: Path, runs: Sequence[Path], *, again: bool = False) -> list[dict[str, Any]]:
    """Write FOLDER/index.html over `runs`; returns its rows. `again`: each report is written again as well."""
    rows = []
    for run in runs:
        known = None if again else _summary(run)
        rows.append(_row(run, report.write(run) if known is None else known))
    page = report.templates().get_template(PAGE).render(folder=folder.resolve().name, rows=rows)
    report.write_page(folder / PAGE, page)
    return rows


def _summary(run: Path) -> dict[str, Any] | None:
    """The summary beside a report, when both are there and whole."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = (run / "report.html").is_file() and at(summary, "verdict") is not None
    return dict(summary) if whole else None
