"""The figures of a map: the contrast over the space, with what is open about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.special import ndtr

from spark_ray.predict import Z_95
from spark_ray.search.cube import Axis, Floats
from spark_ray.search.surrogate import Observation, Prediction
from spark_ray.search.target import UNDECIDED

from .figures import NEUTRAL, Figure, Style, finish, safe
from .map_axes import along_axes, contrast_percent, last_steps, ticks
from .map_table import Map, Mask, at_middle, levels, runnable
from .map_words import EVEN_CHANCE, configuration
from .verdict import percent

_INK = "#1d2125"  # on the colours of a heatmap, which are light in both themes
_LESS, _BOTH = "Purples", "PRGn_r"  # purple: less capacity; green: more; told apart by colour-blind people
_CELLS = 32
_SLICES = (1 / 6, 1 / 2, 5 / 6)  # each stands for a third of the axis
_MOST_LEVELS_AS_SLICES = 4


def figures(found: Map, style: Style) -> list[Figure]:
    heat = contrast_heatmaps(found, style) if found.cube.dimensions > 1 else None
    return [each for each in (heat, along_axes(found, style)) if each is not None]


# ---- heatmaps ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """One slice: values of the two drawn axes, and what is known where they cross, (y, x)."""

    title: str
    x: Floats
    y: Floats
    raw: Floats
    said: Prediction
    runs: list[int]
    """Which blocks are nearest to this slice."""

    def shaped(self, values: Floats | Mask) -> Floats:
        return np.asarray(values, dtype=np.float64).reshape(len(self.y), len(self.x))


def _slices(axis: Axis) -> Floats:
    if axis.levels and len(axis.levels) <= _MOST_LEVELS_AS_SLICES:
        return np.asarray(axis.levels, dtype=np.float64)
    return np.unique(axis.value(np.array(_SLICES)))


def _shown(found: Map) -> list[int]:
    """The axes that vary: across, up, the one of the slices, others. A short list is better sliced than drawn."""
    axes = found.cube.axes
    return sorted(found.cube.varying, key=lambda place: 0 < len(axes[place].levels) <= _MOST_LEVELS_AS_SLICES)


def _along(found: Map, place: int, blocks: Sequence[Observation]) -> Floats:
    """Where blocks lie along an axis, 0 to 1."""
    return found.cube.axes[place].unit(found.cube.raw([block.configuration for block in blocks])[:, place])


def _fixed(found: Map) -> dict[int, float]:
    """The listed axes that no panel shows, with the one value that all panels have: other blocks are of another map."""
    return {
        place: float(axis.value(np.array([0.5]))[0])
        for place in _shown(found)[3:]
        if (axis := found.cube.axes[place]).levels
    }


def _panels(found: Map) -> list[_Panel]:
    cube = found.cube
    across, up, *others = _shown(found)
    xs, ys = (levels(cube.axes[place], _CELLS) for place in (across, up))
    crossed = {across: np.tile(xs, len(ys)), up: np.repeat(ys, len(xs))}
    cuts = _slices(cube.axes[others[0]]) if others else np.array([np.nan])
    raw = cube.raw([each.configuration for each in found.observations])
    alike = np.all(
        [raw[:, place] == value for place, value in _fixed(found).items()] or [[True] * len(raw)], axis=0
    )
    panels = []
    for number, cut in enumerate(cuts):
        columns, title = dict(crossed), ""
        runs = [int(row) for row in np.flatnonzero(alike)]
        if others:
            axis = cube.axes[others[0]]
            columns[others[0]] = np.full(len(xs) * len(ys), cut)
            title = f"{safe(last_steps(axis.name))} {safe(found.written(others[0], cut))}"
            near = np.abs(_along(found, others[0], found.observations)[:, None] - axis.unit(cuts)).argmin(
                axis=1
            )
            runs = [int(row) for row in np.flatnonzero(alike & (near == number))]
        raw = at_middle(cube, columns)
        x, y = (cube.axes[place].unit(values) for place, values in ((across, xs), (up, ys)))
        panels.append(_Panel(title, x, y, raw, found.surrogate.predict(raw), runs))
    return panels


def _lines(panel: _Panel, values: Floats, level: float, width: float, colour: str, dash: str) -> go.Contour:
    """Where values cross a level."""
    return go.Contour(
        x=panel.x, y=panel.y, z=panel.shaped(values), hoverinfo="skip", showscale=False, showlegend=False,
        contours={"start": level, "end": level, "size": 1, "coloring": "none"}, line={"color": colour, "width": width, "dash": dash},
    )  # fmt: skip


def _band(panel: _Panel, chance: Floats, width: float, colour: str) -> list[go.Contour]:
    """Where a chance is even, and the two ends of its 95 % band."""
    low, high = UNDECIDED
    return [
        _lines(panel, chance, EVEN_CHANCE, width, colour, "solid"),
        _lines(panel, chance, low, 0.5 * width, colour, "dot"),
        _lines(panel, chance, high, 0.5 * width, colour, "dot"),
    ]


def _surface(found: Map, panel: _Panel, works: Mask) -> go.Heatmap:
    """The mean contrast where both arms probably work."""
    text = [
        f"{safe(configuration(found, row))}<br>contrast {percent(mean)} ± {percent(Z_95 * sd)}"
        for row, mean, sd in zip(found.configurations(panel.raw), panel.said.contrast_mean, panel.said.contrast_sd, strict=True)
    ]  # fmt: skip
    return go.Heatmap(
        x=panel.x, y=panel.y, z=panel.shaped(np.where(works, 100 * panel.said.contrast_mean, np.nan)), coloraxis="coloraxis",
        text=np.array(text).reshape(len(panel.y), len(panel.x)), hovertemplate="%{text}<extra></extra>", hoverongaps=False,
    )  # fmt: skip


def _alone(found: Map, panel: _Panel, style: Style) -> list[go.Heatmap]:
    """Where one arm alone probably works, in its colour."""
    said = panel.said
    drawn = []
    for arm, own in zip(found.arms, (said.feasible_a, said.feasible_b), strict=True):
        alone = own - said.feasible_both > EVEN_CHANCE
        if alone.any():
            colour = style.colour(arm)
            drawn.append(go.Heatmap(
                x=panel.x, y=panel.y, z=panel.shaped(np.where(alone, 1.0, np.nan)), colorscale=[[0, colour], [1, colour]],
                showscale=False, opacity=0.3, hoverongaps=False, hovertemplate=f"{safe(arm)} alone works<extra></extra>",
            ))  # fmt: skip
    return drawn


def _hatch(found: Map, panel: _Panel) -> go.Scatter:
    """Strokes over places of which it is open whether arms diverge."""
    open_at = panel.shaped(found.undecided(panel.said) & runnable(found.cube, panel.raw)) > 0
    rows, columns = np.nonzero(open_at)
    return go.Scatter(
        x=panel.x[columns], y=panel.y[rows], mode="markers", hoverinfo="skip", showlegend=False,
        marker={"symbol": "line-ne-open", "size": 6, "color": _INK, "opacity": 0.55, "line": {"width": 1}},
    )  # fmt: skip


def _lacking(found: Map, block: Observation) -> str | None:
    """Which arms had no capacity in a block, in words; None: both had some."""
    none = [arm for arm, value in zip(found.arms, block.kv, strict=True) if value is None]
    return None if not none else f"none in {none[0]}" if len(none) == 1 else "none in either arm"


def _marks(found: Map, style: Style) -> dict[str | None, dict[str, Any]]:
    """How a block is drawn, by what was lacking in it."""
    of_arms: dict[str, str] = {f"none in {arm}": style.colour(arm) for arm in found.arms} | {
        "none in either arm": _INK
    }
    crosses: dict[str | None, dict[str, Any]] = {
        words: {"symbol": "x", "size": 9, "color": colour, "line": {"color": "#fff", "width": 1}}
        for words, colour in of_arms.items()
    }
    return {None: {"symbol": "circle", "size": 9, "line": {"color": _INK, "width": 1.5}}, **crosses}


def _measured(found: Map, panel: _Panel, style: Style) -> list[go.Scatter]:
    """The blocks near this slice, filled with the contrast that they measured; a cross where an arm had no capacity."""
    drawn = []
    for lacking, marker in _marks(found, style).items():
        seen = [block for row in panel.runs if _lacking(found, block := found.observations[row]) == lacking]
        if not seen:
            continue
        filled = {"color": [contrast_percent(block) for block in seen], "coloraxis": "coloraxis"}
        across, up, *_ = _shown(found)
        drawn.append(go.Scatter(
            x=_along(found, across, seen), y=_along(found, up, seen), mode="markers", showlegend=False, marker=marker | ({} if lacking else filled),
            text=[_told(found, block) for block in seen], hovertemplate="%{text}<extra></extra>",
        ))  # fmt: skip
    return drawn


def _told(found: Map, block: Observation) -> str:
    of_arms = [
        f"{safe(arm)} {'none' if value is None else found.quantity.text(value)}"
        for arm, value in zip(found.arms, block.kv, strict=True)
    ]
    return "<br>".join([safe(configuration(found, found.measured_at(block))), *of_arms])


def _key(found: Map, style: Style, boundaries: list[str]) -> list[go.Scatter]:
    """The legend: lines and marks of which nothing else would tell."""
    entries = [
        (f"contrast {percent(found.target.margin)}, 95 % dotted", {"mode": "lines", "line": {"color": NEUTRAL, "width": 3}}),
        ("undecided", {"mode": "markers", "marker": {"symbol": "line-ne-open", "size": 9, "color": NEUTRAL, "line": {"width": 1.5}}}),
        ("measured", {"mode": "markers", "marker": {"symbol": "circle-open", "size": 9, "color": NEUTRAL, "line": {"width": 2}}}),
        *[(f"{safe(arm)} works up to here, 95 % dotted", {"mode": "lines", "line": {"color": style.colour(arm), "width": 4}}) for arm in boundaries],
    ]  # fmt: skip
    seen = {_lacking(found, block) for block in found.observations} - {None}
    entries += [(safe(words), {"mode": "markers", "marker": marker}) for words, marker in _marks(found, style).items() if words in seen]  # fmt: skip
    return [go.Scatter(x=[None], y=[None], name=name, **looks) for name, looks in entries]


def contrast_heatmaps(found: Map, style: Style) -> Figure:
    """Contrast over two axes, at slices of a third one; any further axis is at its middle."""
    panels = _panels(found)
    across, up, *others = _shown(found)
    figure = make_subplots(rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.03,
                           subplot_titles=[panel.title for panel in panels])  # fmt: skip
    boundaries: list[str] = []
    shown: list[Floats] = []
    for column, panel in enumerate(panels, start=1):
        said = panel.said
        works = (said.feasible_both > EVEN_CHANCE) & runnable(found.cube, panel.raw)
        shown.append(said.contrast_mean[works])
        sd = np.maximum(found.decision.widening * said.contrast_sd, 1e-9)
        above = ndtr((said.contrast_mean - found.target.margin) / sd)
        traces = [_surface(found, panel, works), *_alone(found, panel, style), _hatch(found, panel)]
        traces += _band(panel, np.where(works, above, np.nan), 3, _INK)
        for arm, feasible in zip(found.arms, (said.feasible_a, said.feasible_b), strict=True):
            if feasible.min() < EVEN_CHANCE < feasible.max():
                traces += _band(panel, feasible, 4, style.colour(arm))
                boundaries += [arm] if arm not in boundaries else []
        for trace in [*traces, *_measured(found, panel, style)]:
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(
            title=safe(found.cube.axes[across].name), **ticks(found, across), row=1, col=column
        )
    for entry in _key(found, style, boundaries):
        figure.add_trace(entry, row=1, col=1)
    figure.update_yaxes(**ticks(found, up)).update_yaxes(title={"text": safe(found.cube.axes[up].name), "standoff": 14}, col=1)  # fmt: skip
    figure.update_xaxes(range=[-0.02, 1.02], zeroline=False).update_yaxes(range=[-0.02, 1.02], zeroline=False)
    colours = _colours(np.concatenate(shown), found.target.margin)
    drawn = finish(figure, 560, above=30, coloraxis=colours, margin={"l": 60, "r": 15, "t": 110, "b": 50})
    return Figure("map", "Contrast over the searched space", _caption(found, others), drawn)


def _colours(shown: Floats, margin: float) -> dict[str, Any]:
    """A scale for nearly all of the contrasts that are shown; with two sides where some lie as far below 0."""
    low, high = np.percentile(shown, (5, 95)) if len(shown) else (0.0, 0.0)
    both = low < -margin
    reach = math.ceil(100 * max(high, -low if both else 0.0, 2 * margin))
    return {
        "colorscale": _BOTH if both else _LESS, "cmin": -reach if both else 0, "cmax": reach,
        "colorbar": {"title": {"text": "contrast"}, "ticksuffix": " %", "thickness": 14},
    }  # fmt: skip


def _caption(found: Map, others: list[int]) -> str:
    baseline, against = found.arms
    third = " Each panel is a slice, with the blocks that lie nearest to it." if others else ""
    middle = [(place, float(found.cube.axes[place].value(np.array([0.5]))[0])) for place in others[1:]]
    words = [f"{found.cube.axes[place].name} {found.written(place, value)}" for place, value in middle]
    rest = f" All panels: {', '.join(words)}; blocks with another choice are left out." if words else ""
    return (
        f"Colour: expected contrast, purple where {against} has less {found.quantity.words} than {baseline}, green where it has more. Thick line: the "
        "margin; between the dotted ones, and wherever strokes are drawn, the blocks do not decide yet. A circle is a block, filled with the contrast it "
        "measured: where it does not stand out, the map agrees with it; a cross is one in which an arm had none. In the light colour of an arm: it alone "
        f"is expected to work; left blank: neither is.{third}{rest}"
    )
