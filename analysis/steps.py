"""Figures of differences that add up: the waterfall of one contrast, the staircase of a ladder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import plotly.graph_objects as go

from spark_ray.units import GIB, MIB, format_bytes

from . import statistics
from .attribution import TERMS
from .figures import NEUTRAL, Figure, Style, finish, safe
from .findings import plural
from .ladder import Ladder, Path
from .verdict import Comparison

_LESS, _MORE = "#D55E00", "#009E73"
_SMALL = 0.01  # of the largest term: smaller ones share a bar
_FINE_BYTES = GIB / 4  # a span below this is drawn in MiB


@dataclass(frozen=True)
class _Bar:
    words: str
    size: float  # bytes
    low: float | None  # of the interval
    high: float | None


def _unit(span_bytes: float) -> tuple[int, str]:
    return (MIB, "MiB") if span_bytes < _FINE_BYTES else (GIB, "GiB")


def _signed(size: float) -> str:
    return f"{'−' if size < 0 else '+' if size > 0 else ''}{format_bytes(abs(size))}"


def _bars(terms: dict[str, statistics.Paired]) -> list[_Bar]:
    """The terms worth a bar of their own, in the order of the law, then the small ones together."""
    sizes = {name: abs(each.mean or 0.0) for name, each in terms.items()}
    least = _SMALL * max(sizes.values(), default=0.0)
    large = [name for name in TERMS if sizes.get(name, 0.0) > max(least, 1.0)]
    bars = [
        _Bar(TERMS[name].split(" (")[0], terms[name].mean or 0.0, terms[name].low, terms[name].high)
        for name in large
    ]
    small = [
        name for name, size in sizes.items() if size >= 1 and name not in large
    ]  # less is a sum of doubles
    if small:
        bars.append(
            _Bar(
                f"{plural(len(small), 'smaller term')}",
                sum(terms[name].mean or 0.0 for name in small),
                None,
                None,
            )
        )
    return bars


def waterfall(found: Comparison) -> Figure | None:
    """From the baseline's mean KV capacity to the arm's, along the terms of the law."""
    start, change = found.baseline_bytes, found.delta_bytes
    if start is None or change is None or not found.attribution.terms:
        return None
    bars = _bars(dict(found.attribution.terms))
    ends = [start]
    for bar in bars:
        ends.append(ends[-1] + bar.size)
    reach = ends + [
        ends[n] + (edge or bar.size) for n, bar in enumerate(bars) for edge in (bar.low, bar.high)
    ]
    span = max(max(reach) - min(reach), MIB)
    unit, name = _unit(span)
    names = [f"KV of {safe(found.baseline)}", *(bar.words for bar in bars), f"KV of {safe(found.arm)}"]
    labels = [format_bytes(start), *(_signed(bar.size) for bar in bars)]
    labels.append(f"{format_bytes(start + change)} ({_signed(change)})")
    low, high = min(reach) - 0.12 * span, max(reach) + 0.45 * span  # labels stand right of everything
    figure = go.Figure()
    tops = [start, *ends[1:], start + change]
    bases = [low, *ends[:-1], low]
    colours = [NEUTRAL, *(_LESS if bar.size < 0 else _MORE for bar in bars), NEUTRAL]
    figure.add_bar(
        orientation="h", y=names, base=[base / unit for base in bases], x=[(top - base) / unit for top, base in zip(tops, bases, strict=True)],
        marker={"color": colours}, hoverinfo="skip", width=0.62,
    )  # fmt: skip
    for place, level in enumerate([*ends, start + change][:-1]):  # the level that one bar hands to the next
        figure.add_shape(
            type="line",
            x0=level / unit,
            x1=level / unit,
            y0=place - 0.31,
            y1=place + 1.31,
            line={"color": NEUTRAL, "width": 1},
        )
    known = [(n, bar) for n, bar in enumerate(bars) if bar.low is not None and bar.high is not None]
    figure.add_scatter(
        x=[(ends[n] + bar.size) / unit for n, bar in known], y=[bar.words for _, bar in known], mode="markers", marker={"size": 1, "color": NEUTRAL},
        error_x={"type": "data", "symmetric": False, "array": [((bar.high or 0.0) - bar.size) / unit for _, bar in known],
                 "arrayminus": [(bar.size - (bar.low or 0.0)) / unit for _, bar in known], "thickness": 2, "width": 6},
        hovertemplate="%{y}: 95 % interval<extra></extra>",
    )  # fmt: skip
    rightmost = max(reach) + 0.03 * span
    for text, row in zip(labels, names, strict=True):
        figure.add_annotation(x=rightmost / unit, y=row, text=text, showarrow=False, xanchor="left")
    figure.update_yaxes(
        autorange="reversed", showgrid=False, type="category", categoryorder="array", categoryarray=names
    )
    figure.update_xaxes(
        title=f"KV capacity ({name}), mean over blocks; the axis does not begin at 0",
        range=[low / unit, high / unit],
        zeroline=False,
    )
    caption = (
        f"From {found.baseline} to {found.arm} along the engine's sizing law: orange takes capacity away, green gives it, and the bars meet "
        "because the terms add up exactly. Thin bars are 95 % intervals of the means over blocks."
    )
    height = 130 + 40 * len(names)
    return Figure("waterfall", "From one arm to the other, term by term", caption,
                  finish(figure, height, showlegend=False, margin={"l": 10, "r": 15, "t": 20, "b": 50}))  # fmt: skip


def _levels(ladder: Ladder) -> dict[str, float]:
    """Mean difference of each arm from the root of its path, over the blocks complete on the path that has most of them.

    An arm that is on no path with such a block has none.
    """
    levels: dict[str, float] = {}
    for path in sorted(ladder.paths, key=lambda path: -path.blocks):
        if not path.blocks:
            break
        levels.setdefault(path.arms[0], 0.0)
        for (neighbour, arm), step in zip(itertools.pairwise(path.arms), path.steps_bytes, strict=True):
            levels.setdefault(arm, levels[neighbour] + step)
    return levels


def _rows(ladder: Ladder) -> list[str]:
    """Arms top to bottom: each under the one it builds on, as far as it goes, then the branches."""
    rows: list[str] = []

    def under(paths: tuple[Path, ...]) -> None:
        for path in paths:
            rows.extend(arm for arm in path.arms if arm not in rows)

    under(tuple(sorted(ladder.paths, key=lambda path: -len(path.arms))))
    return rows


def staircase(ladder: Ladder | None, style: Style) -> Figure | None:
    """Every rung at its mean distance from the root; the bar is the interval of the step from its neighbour."""
    if ladder is None or not any(path.blocks for path in ladder.paths):
        return None
    levels = _levels(ladder)
    rows = [arm for arm in _rows(ladder) if arm in levels]
    below = {rung.arm: rung for rung in ladder.rungs if rung.arm in levels}
    every = [*levels.values(), *(levels[arm] - (rung.step.attribution.total.mean or 0.0) + edge for arm, rung in below.items()
             for edge in (rung.step.attribution.total.low, rung.step.attribution.total.high) if edge is not None)]  # fmt: skip
    unit, name = _unit(max(every) - min(every))
    figure = go.Figure()
    for arm, rung in below.items():  # the step: down from the neighbour, then across
        figure.add_scatter(
            x=[levels[rung.neighbour] / unit, levels[rung.neighbour] / unit, levels[arm] / unit],
            y=[safe(rung.neighbour), safe(arm), safe(arm)], mode="lines", line={"color": NEUTRAL, "width": 1, "dash": "dot"}, hoverinfo="skip",
        )  # fmt: skip
    for arm in rows:
        total = below[arm].step.attribution.total if arm in below else statistics.Paired(0)
        bars = {}
        if total.mean is not None and total.low is not None and total.high is not None:
            bars = {"error_x": {"type": "data", "symmetric": False, "array": [(total.high - total.mean) / unit],
                                "arrayminus": [(total.mean - total.low) / unit], "color": style.colour(arm)}}  # fmt: skip
        step = "" if total.mean is None else f"<br>step {_signed(total.mean)}"
        figure.add_scatter(
            x=[levels[arm] / unit], y=[safe(arm)], mode="markers", marker={"color": style.colour(arm), "symbol": style.symbol(arm), "size": 10},
            hovertemplate=f"%{{y}}: %{{x:.3f}} {name}{step}<extra></extra>", **bars,
        )  # fmt: skip
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1})
    figure.update_yaxes(
        autorange="reversed",
        type="category",
        categoryorder="array",
        categoryarray=[safe(arm) for arm in rows],
    )
    figure.update_xaxes(
        title=f"KV capacity beyond that of {safe(ladder.paths[0].arms[0])} ({name}), mean over blocks",
        zeroline=False,
    )
    caption = (
        "Each rung adds one mechanism to the one the dotted line comes from; its bar is the 95 % interval of that single step. "
        "One that reaches its neighbour's line shows no step."
    )
    return Figure("ladder", "The ladder, rung by rung", caption,
                  finish(figure, 150 + 34 * len(rows), showlegend=False, margin={"l": 10, "r": 15, "t": 20, "b": 50}))  # fmt: skip
