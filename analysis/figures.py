"""The figures, as plotly objects. Sizes are GiB; an arm keeps its colour and symbol in every figure."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spark_ray.outcome import ANSWERS
from spark_ray.units import GIB, MIB

from .frames import configuration
from .verdict import Comparison

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito
_SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "star",
)  # as many as are coprime to the colours
NEUTRAL = "#888888"
_PARTS = {
    "tree_pss_anon_bytes": ("the worker, anonymous", "#0072B2"),
    "other_anon_bytes": ("other processes, anonymous", "#56B4E9"),
    "page_cache_bytes": ("page cache", "#E69F00"),
    "shmem_bytes": ("shared memory", "#CC79A7"),
    "kernel_bytes": ("kernel", "#009E73"),
    "per_cpu_free_bytes": ("free, in per-CPU lists", "#999999"),
}


@dataclass(frozen=True)
class Style:
    """Colour and symbol by arm; fixed by the plan, not by what happens to be drawn."""

    arms: tuple[str, ...]

    def colour(self, arm: str) -> str:
        return PALETTE[self.arms.index(arm) % len(PALETTE)]

    def symbol(self, arm: str) -> str:
        return _SYMBOLS[self.arms.index(arm) % len(_SYMBOLS)]


@dataclass(frozen=True)
class Figure:
    """One figure, its heading, and the sentence that says what to look for."""

    key: str
    title: str
    caption: str
    figure: go.Figure


def safe(value: object) -> str:
    """Text for plotly, which reads some HTML in labels."""
    return html.escape(str(value), quote=False)


def _gib(values: pd.Series) -> list[float | None]:
    return [None if pd.isna(value) else float(value) / GIB for value in values]


def finish(figure: go.Figure, height: int, above: int = 0, **layout: Any) -> go.Figure:
    """Common looks. `above`: pixels between the panels and the legend, for panel titles."""
    legend = {
        "orientation": "h",
        "yanchor": "bottom",
        "y": 1 + above / (height - 160),
        "xanchor": "left",
        "x": 0,
    }
    common = {
        "margin": {"l": 60, "r": 15, "t": 60, "b": 50},
        "legend": legend,
        "font": {"size": 12},
        "hovermode": "closest",
    }
    clear = "rgba(0,0,0,0)"
    return (
        figure.update_layout(
            template="none", height=height, paper_bgcolor=clear, plot_bgcolor=clear, **(common | layout)
        )
        .update_xaxes(automargin=True, showgrid=False)
        .update_yaxes(automargin=True)
    )


def _configuration(row: Any) -> str:
    short = {"max_batch_size": "batch", "max_num_tokens": "tokens", "memory_fraction": "fraction"}
    return ", ".join(
        f"{short.get(name, name)} {value:.3g}"
        if isinstance(value, float)
        else f"{short.get(name, name)} {value}"
        for name, value in configuration(row).items()
    )


def capacity(trials: pd.DataFrame, style: Style) -> Figure | None:
    """KV capacity of every arm in every block; a missing capacity is a cross, not a hole."""
    valid = trials[trials["standing"] == "counts"].sort_values(
        ["memory_fraction", "max_num_tokens", "block_id"]
    )
    if valid.empty:
        return None
    figure = go.Figure()
    sized = valid[(valid["outcome"] == "ok") & valid["kv_cache_bytes"].notna()]
    for _, block in sized.groupby("block_id", sort=False):
        figure.add_scatter(
            x=[safe(b) for b in block["block_id"]], y=_gib(block["kv_cache_bytes"]), mode="lines",
            line={"color": NEUTRAL, "width": 1}, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    for arm in style.arms:
        mine, missing = (
            sized[sized["arm"] == arm],
            valid[(valid["arm"] == arm) & ~valid.index.isin(sized.index)],
        )
        marker = {"color": style.colour(arm), "symbol": style.symbol(arm), "size": 9}
        figure.add_scatter(
            x=[safe(b) for b in mine["block_id"]], y=_gib(mine["kv_cache_bytes"]), mode="markers", name=safe(arm), marker=marker,
            text=[safe(_configuration(row)) for _, row in mine.iterrows()], hovertemplate="%{text}<br>%{y:.3f} GiB",
        )  # fmt: skip
        failed = ~missing["outcome"].isin(list(ANSWERS))
        for rows, word, symbol in (
            (missing[~failed], "no capacity", "x"),
            (missing[failed], "failed", "x-open"),
        ):
            if len(rows):
                figure.add_scatter(
                    x=[safe(b) for b in rows["block_id"]], y=[0.0] * len(rows), mode="markers", name=f"{safe(arm)}: {word}",
                    marker=marker | {"symbol": symbol, "size": 11},
                    text=[safe(f"{row['outcome']}: {row['reason']}") for _, row in rows.iterrows()], hovertemplate="%{text}",
                )  # fmt: skip
    labels = valid.drop_duplicates("block_id")
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=[safe(b) for b in labels["block_id"]], tickmode="array",
        tickvals=[safe(b) for b in labels["block_id"]], title="block, by memory fraction",
        ticktext=[f"{safe(row['block_id'])}<br>{row['memory_fraction']:.3g}" if not pd.isna(row["memory_fraction"]) else safe(row["block_id"]) for _, row in labels.iterrows()],
    )  # fmt: skip
    figure.update_yaxes(title="KV capacity (GiB)", rangemode="tozero")
    caption = "Each vertical line is one block: the same configuration in every arm, adjacent in time. A cross at zero is a block in which the arm had no capacity, an open one a block in which it failed; point at it for the reason."
    return Figure("capacity", "KV capacity by block and arm", caption, finish(figure, 460))


def contrast(pairs: pd.DataFrame, comparisons: Sequence[Comparison], style: Style) -> Figure | None:
    """Contrast of each arm: every block a dot, the mean with its interval above them. One axis per arm."""
    shown = [each for each in comparisons if each.contrast.n]
    if not shown:
        return None
    figure = make_subplots(rows=len(shown), cols=1, vertical_spacing=min(0.25, 0.5 / len(shown)),
                           subplot_titles=[f"{safe(each.arm)} against {safe(each.baseline)}" for each in shown])  # fmt: skip
    for row, each in enumerate(shown, start=1):
        colour, paired = style.colour(each.arm), each.contrast
        dots = pairs[(pairs["arm"] == each.arm) & pairs["contrast"].notna()]
        figure.add_scatter(
            x=[100 * float(v) for v in dots["contrast"]], y=["blocks"] * len(dots), mode="markers", showlegend=False,
            marker={"color": colour, "symbol": style.symbol(each.arm), "size": 8, "opacity": 0.6},
            text=[safe(b) for b in dots["block_id"]], hovertemplate="%{text}: %{x:.2f} %<extra></extra>", row=row, col=1,
        )  # fmt: skip
        arms = [0.0] if paired.low is None else [100 * ((paired.high or 0.0) - (paired.mean or 0.0))]
        figure.add_scatter(
            x=[100 * (paired.mean or 0.0)], y=["mean"], mode="markers", showlegend=False, row=row, col=1,
            marker={"color": colour, "symbol": "line-ns-open", "size": 16, "line": {"width": 3}},
            error_x={"type": "data", "array": arms, "thickness": 3, "width": 7, "color": colour}, hovertemplate="mean %{x:.2f} %<extra></extra>",
        )  # fmt: skip
        figure.add_vline(x=0, line={"color": NEUTRAL, "dash": "dot"}, row=row, col=1)
    figure.update_xaxes(zeroline=False, ticksuffix=" %").update_yaxes(range=[-0.6, 1.6])
    figure.update_xaxes(title_text="KV capacity lacking against the baseline", row=len(shown), col=1)
    caption = "Right of the dotted zero: less capacity than the baseline. The bar is the 95 % t interval of the mean; one that covers zero shows no divergence. Each arm has its own scale."
    return Figure(
        "contrast",
        "Paired contrast by arm",
        caption,
        finish(figure, 90 + 130 * len(shown), margin={"l": 60, "r": 15, "t": 30, "b": 50}),
    )


def prediction(pairs: pd.DataFrame, style: Style) -> Figure | None:
    """Measured difference in KV against what page cache alone predicts."""
    rows = pairs.dropna(subset=["predicted_delta_bytes", "delta_kv_cache_bytes"])
    if rows.empty:
        return None
    figure = go.Figure()
    every = _gib(rows["predicted_delta_bytes"]) + _gib(rows["delta_kv_cache_bytes"])
    known = [value for value in every if value is not None]
    pad = 0.05 * (max(known) - min(known)) + 0.05
    ends, band = [min(known) - pad, max(known) + pad], 32 * MIB / GIB
    for shift, dash, name in (
        (0.0, "solid", "measured = predicted"),
        (band, "dot", "± 32 MiB"),
        (-band, "dot", ""),
    ):
        figure.add_scatter(x=ends, y=[end + shift for end in ends], mode="lines", name=name, showlegend=bool(name),
                           line={"color": NEUTRAL, "dash": dash, "width": 1}, hoverinfo="skip")  # fmt: skip
    for arm in style.arms:
        mine = rows[rows["arm"] == arm]
        if len(mine):
            figure.add_scatter(
                x=_gib(mine["predicted_delta_bytes"]), y=_gib(mine["delta_kv_cache_bytes"]), mode="markers", name=safe(arm),
                marker={"color": style.colour(arm), "symbol": style.symbol(arm), "size": 9}, text=[safe(b) for b in mine["block_id"]],
                hovertemplate="%{text}<br>predicted %{x:.3f} GiB<br>measured %{y:.3f} GiB",
            )  # fmt: skip
    figure.update_xaxes(title="predicted by page cache: −fraction × Δcache (GiB)", zeroline=False)
    figure.update_yaxes(title="measured ΔKV (GiB)", zeroline=False)
    caption = "On the line, page cache at the sizing moment explains the whole difference. Off it, other memory moved too; the attribution says which."
    return Figure("prediction", "Predicted and measured difference", caption, finish(figure, 460))


def phases(table: pd.DataFrame, block_id: str, style: Style) -> Figure | None:
    """What is not free at each phase, stacked, one panel per arm."""
    rows = table[
        (table["block_id"] == block_id) & (table["side"] == "outside") & (table["standing"] == "counts")
    ]
    arms = [arm for arm in style.arms if (rows["arm"] == arm).any()]
    if not arms:
        return None
    columns = 2 if len(arms) > 1 else 1
    lines = -(-len(arms) // columns)
    figure = make_subplots(rows=lines, cols=columns, shared_yaxes="all", subplot_titles=[safe(arm) for arm in arms],
                           vertical_spacing=0.3 / lines, horizontal_spacing=0.05)  # fmt: skip
    for index, arm in enumerate(arms):
        mine = rows[rows["arm"] == arm]
        own = mine["tree_pss_anon_bytes"].fillna(0)  # before and after the worker lives there is no tree
        mine = mine.assign(tree_pss_anon_bytes=own, other_anon_bytes=(mine["anon_bytes"] - own).clip(lower=0))
        for column, (name, colour) in _PARTS.items():
            figure.add_bar(
                x=[safe(phase).replace("_", " ") for phase in mine["phase"]], y=_gib(mine[column]), name=name, legendgroup=name, showlegend=index == 0,
                marker={"color": colour}, hovertemplate=f"{name}: %{{y:.2f}} GiB<extra></extra>", row=index // columns + 1, col=index % columns + 1,
            )  # fmt: skip
    figure.update_layout(barmode="stack").update_xaxes(tickangle=-40)
    figure.update_yaxes(title_text="GiB not free", col=1)
    caption = f"Block {block_id}, read by the host at each phase of the worker. What is missing to MemTotal is free, or in no counter."
    return Figure(
        "phases",
        "Memory at each phase",
        caption,
        finish(figure, 140 + 280 * lines, above=35, margin={"l": 60, "r": 15, "t": 100, "b": 60}),
    )


def timeline(
    samples: Mapping[str, pd.DataFrame], table: pd.DataFrame, block_id: str, style: Style
) -> Figure | None:
    """MemFree and page cache over the attempts of one block, with the moment of sizing."""
    rows = table[
        (table["block_id"] == block_id) & (table["side"] == "outside") & (table["standing"] == "counts")
    ]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for arm in style.arms:
        mine = rows[rows["arm"] == arm]
        series = samples.get(f"{mine['trial_id'].iloc[0]}-{mine['attempt'].iloc[0]}") if len(mine) else None
        if (
            series is None
            or not {"monotonic_s", "mem_free_bytes", "cached_bytes"} <= set(series)
            or series["monotonic_s"].dropna().empty
        ):
            continue
        start, colour = float(series["monotonic_s"].dropna().iloc[0]), style.colour(arm)
        seconds = [None if pd.isna(v) else float(v) - start for v in series["monotonic_s"]]
        for row, column in ((1, "mem_free_bytes"), (2, "cached_bytes")):
            figure.add_scatter(x=seconds, y=_gib(series[column]), mode="lines", name=safe(arm), legendgroup=arm, showlegend=row == 1,
                               line={"color": colour, "width": 2}, hovertemplate="%{x:.1f} s: %{y:.2f} GiB", row=row, col=1)  # fmt: skip
        sizing = mine[(mine["phase"] == "sizing") & mine["monotonic_s"].notna()]
        if len(sizing):
            figure.add_scatter(
                x=[float(sizing["monotonic_s"].iloc[-1]) - start], y=_gib(sizing["mem_free_bytes"].iloc[-1:]), mode="markers", legendgroup=arm,
                showlegend=False, marker={"color": colour, "symbol": style.symbol(arm), "size": 11, "line": {"color": NEUTRAL, "width": 1}},
                hovertemplate="sizing: %{y:.2f} GiB free", row=1, col=1,
            )  # fmt: skip
    if not figure.data:
        return None
    figure.update_yaxes(title_text="MemFree (GiB)", row=1, col=1).update_yaxes(
        title_text="Cached (GiB)", row=2, col=1
    )
    figure.update_xaxes(title_text="seconds since the worker was started", row=2, col=1)
    caption = f"Block {block_id}: what the host saw while each arm ran. The marker is the moment at which the engine read free memory and sized its pool."
    return Figure("timeline", "Host memory over time", caption, finish(figure, 520))


def representative(pairs: pd.DataFrame, against: str) -> str | None:
    """The block whose contrast is nearest the median: typical, not the best one."""
    rows = pairs[(pairs["arm"] == against) & pairs["contrast"].notna()]
    if rows.empty:
        return str(pairs["block_id"].iloc[0]) if len(pairs) else None
    distance = (rows["contrast"] - rows["contrast"].median()).abs()
    return str(rows["block_id"].iloc[int(distance.to_numpy(dtype=float).argmin())])


def stamped(drawn: Figure, mark: str) -> Figure:
    """With a mark that goes where a picture of it goes."""
    drawn.figure.add_annotation(
        text=mark,
        xref="paper",
        yref="paper",
        x=0.5,
        y=0.5,
        showarrow=False,
        opacity=0.5,
        font={"size": 40, "color": NEUTRAL},  # on a heatmap in a dark page too
    )
    return replace(drawn, title=f"{mark}: {drawn.title}")


def drawn(*makers: Callable[[], Figure | None]) -> list[Figure]:
    return [figure for make in makers if (figure := make()) is not None]
