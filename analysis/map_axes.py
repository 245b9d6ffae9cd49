"""Capacity and contrast along each axis of a map, through the middle of the space; and how axes are drawn.

As they are searched: logarithmic ones evenly by doublings, lists by rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spark_ray.divergence import contrast
from spark_ray.predict import Z_95
from spark_ray.search.cube import Floats
from spark_ray.search.surrogate import Observation
from spark_ray.units import GIB

from .figures import NEUTRAL, Figure, Style, finish, safe
from .map_table import Map, Mask, at_middle, levels, runnable
from .map_words import EVEN_CHANCE, configuration

_VIOLET = "#7b3294"
_LINE = 61
_TICKS = 5


# ---- axes -------------------------------------------------------------------------------------------------


def last_steps(name: str) -> str:
    """A knob's place, as short as it can be understood."""
    return ".".join(name.split(".")[-2:])


def ticks(found: Map, place: int) -> dict[str, Any]:
    """Where along an axis, 0 to 1, which values are written."""
    axis = found.cube.axes[place]
    if axis.levels:
        values = list(axis.levels)
    elif axis.log:
        first, last = math.ceil(math.log2(axis.low)), math.floor(math.log2(axis.high))
        step = max(1, math.ceil((last - first) / _TICKS))
        doublings = [2.0**power for power in range(first, last + 1, step)]
        values = doublings if len(doublings) > 1 else [axis.low, axis.high]  # a short axis crosses none
    else:
        values = _round_values(axis.low, axis.high, least=1.0 if axis.integer else 0.0)
    places = [float(at) for at in axis.unit(np.array(values, dtype=np.float64))]
    words = [safe(found.written(place, value)) for value in values]
    return {"tickmode": "array", "tickvals": places, "ticktext": words}


def _round_values(low: float, high: float, least: float) -> list[float]:
    """`least` apart, at least."""
    if high <= low:
        return [low]
    rough = max((high - low) / _TICKS, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [round(index * step, 12) for index in count]


# ---- along them --------------------------------------------------------------------------------------


def contrast_percent(block: Observation) -> float | None:
    """Of the capacities that it measured; None where there is none to compare with."""
    baseline, against = block.kv
    return None if baseline is None or against is None or baseline <= 0 else 100 * contrast(baseline, against)


@dataclass(frozen=True)
class _Line:
    """What is known along one axis; a mean is missing where its arm is not expected to work."""

    place: int
    """Of the axis."""
    x: Floats
    kv: tuple[tuple[Floats, Floats], tuple[Floats, Floats]]
    """Mean and standard deviation of each arm, in the unit that is drawn."""
    contrast: tuple[Floats, Floats]
    """Mean and standard deviation, percent."""
    undecided: Mask


def _line(found: Map, place: int, per: float) -> _Line:
    axis = found.cube.axes[place]
    raw = at_middle(found.cube, {place: levels(axis, _LINE)})
    raw = raw[runnable(found.cube, raw)]
    said = found.surrogate.predict(raw)
    a, b = said.feasible_a > EVEN_CHANCE, said.feasible_b > EVEN_CHANCE
    return _Line(
        place,
        axis.unit(raw[:, place]),
        (
            (np.where(a, said.kv_a_mean, np.nan) / per, said.kv_a_sd / per),
            (np.where(b, said.kv_b_mean, np.nan) / per, said.kv_b_sd / per),
        ),
        (np.where(a & b, 100 * said.contrast_mean, np.nan), 100 * said.contrast_sd),
        found.undecided(said),
    )


def _spans(line: _Line) -> list[tuple[float, float]]:
    """The stretches of an axis, 0 to 1, in which it is open whether arms diverge."""
    edges = np.concatenate(
        [[0.0], (line.x[1:] + line.x[:-1]) / 2, [1.0]]
    )  # each place as far as half way to the next
    changes = np.flatnonzero(np.diff(np.concatenate([[False], line.undecided, [False]])))
    return [(float(edges[first]), float(edges[last])) for first, last in changes.reshape(-1, 2)]


def _shade(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"


def _with_band(
    line: _Line, known: tuple[Floats, Floats], name: str, colour: str, *, listed: bool
) -> list[go.Scatter]:
    """A line and its 95 % band, as far as there is a mean."""
    there = ~np.isnan(known[0])
    x, mean, sd = line.x[there], known[0][there], known[1][there]
    around = np.concatenate([mean + Z_95 * sd, (mean - Z_95 * sd)[::-1]])
    shape = {"fill": "toself", "fillcolor": _shade(colour), "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        go.Scatter(x=np.concatenate([x, x[::-1]]), y=around, mode="lines", showlegend=False, **shape),
        go.Scatter(x=x, y=mean, mode="lines+markers" if listed else "lines", showlegend=False, line={"color": colour, "width": 2},
                   hovertemplate=f"{name} %{{y:.4g}}<extra></extra>"),
    ]  # fmt: skip


def _ends(bands: list[tuple[Floats, Floats]], values: list[float]) -> tuple[float, float]:
    """The least and the most that is drawn, with some room."""
    every = [*values, *(v for mean, sd in bands for v in (*(mean - Z_95 * sd), *(mean + Z_95 * sd)) if not np.isnan(v))]  # fmt: skip
    low, high = min(every, default=0.0), max(every, default=1.0)
    room = 0.06 * (high - low or 1.0)
    return low - room, high + room


def along_axes(found: Map, style: Style) -> Figure:
    """Above, both arms along each axis through the middle of the space; below, their contrast."""
    per, unit = (GIB, "GiB") if found.quantity.unit == "bytes" else (1, "tokens/s")
    lines = [_line(found, place, per) for place in found.cube.varying]
    figure = make_subplots(rows=2, cols=len(lines), shared_yaxes="rows", shared_xaxes=True, vertical_spacing=0.06,
                           horizontal_spacing=0.03, row_heights=[0.6, 0.4])  # fmt: skip
    for column, line in enumerate(lines, start=1):
        listed = bool(found.cube.axes[line.place].levels)
        for arm, known in zip(found.arms, line.kv, strict=True):
            figure.add_traces(
                _with_band(line, known, safe(arm), style.colour(arm), listed=listed), rows=1, cols=column
            )
        figure.add_traces(
            _with_band(line, line.contrast, "contrast", _VIOLET, listed=listed), rows=2, cols=column
        )
        for start, end in _spans(line):
            figure.add_vrect(
                x0=start, x1=end, fillcolor=NEUTRAL, opacity=0.2, line_width=0, row=2, col=column
            )
        figure.add_hline(y=100 * found.target.margin, line={"color": NEUTRAL, "dash": "dash", "width": 1}, row=2, col=column)  # fmt: skip
        figure.update_xaxes(
            title=safe(found.cube.axes[line.place].name), **ticks(found, line.place), row=2, col=column
        )
    measured = _blocks_on_the_line(figure, found, style, per) if len(lines) == 1 else ([], [])
    for arm in found.arms:
        figure.add_scatter(x=[None], y=[None], name=safe(arm), mode="lines", line={"color": style.colour(arm), "width": 3}, row=1, col=1)  # fmt: skip
    _, most = _ends([known for line in lines for known in line.kv], measured[0])
    contrasts = _ends([line.contrast for line in lines], [*measured[1], 0.0, 100 * found.target.margin])
    figure.update_xaxes(range=[-0.02, 1.02], zeroline=False).update_yaxes(zeroline=False, showgrid=True)
    figure.update_yaxes(range=[0.0, most], row=1).update_yaxes(range=contrasts, ticksuffix=" %", row=2)
    figure.update_yaxes(title_text=f"{found.quantity.words} ({unit})", row=1, col=1)
    figure.update_yaxes(title_text="contrast", row=2, col=1)
    title = f"{found.quantity.words[0].upper()}{found.quantity.words[1:]} along each axis"
    return Figure("map_axes", title, _axes_caption(found), finish(figure, 560))


def _axes_caption(found: Map) -> str:
    cube, through = found.cube, ""
    if cube.dimensions > 1:
        first = cube.varying[0]
        middle = at_middle(cube, {first: cube.axes[first].value(np.array([0.5]))})
        through = (
            f" through the middle of the space ({configuration(found, found.configurations(middle)[0])})"
        )
    return (
        f"Along each axis{through}: what each arm is expected to have, with its 95 % band, and the contrast below; dashed: the margin; shaded: undecided. "
        "A line ends where its arm is not expected to work. Bands are about what the engine would have without the noise of one trial."
    )


def _blocks_on_the_line(
    figure: go.Figure, found: Map, style: Style, per: float
) -> tuple[list[float], list[float]]:
    """In a space of one axis every block lies on the line; returns the capacities and contrasts that were drawn."""
    x = found.cube.unit(found.cube.raw([each.configuration for each in found.observations]))[:, 0]
    every: list[float] = []
    for number, arm in enumerate(found.arms):
        seen = [(float(at), each.kv[number]) for at, each in zip(x, found.observations, strict=True)]
        own = [(at, value / per) for at, value in seen if value is not None]
        every += [value for _, value in own]
        figure.add_scatter(
            x=[at for at, _ in own], y=[value for _, value in own], mode="markers", showlegend=False, row=1, col=1,
            marker={"color": style.colour(arm), "symbol": style.symbol(arm), "size": 7}, hovertemplate="measured %{y:.4g}<extra></extra>",
        )  # fmt: skip
    contrasts = [(float(at), percents) for at, percents in zip(x, map(contrast_percent, found.observations), strict=True) if percents is not None]  # fmt: skip
    figure.add_scatter(
        x=[at for at, _ in contrasts], y=[value for _, value in contrasts], mode="markers", showlegend=False, row=2, col=1,
        marker={"color": _VIOLET, "size": 7}, hovertemplate="measured %{y:.3g} %<extra></extra>",
    )  # fmt: skip
    return every, [value for _, value in contrasts]
