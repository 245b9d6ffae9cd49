"""What a person sees: the plan as a table, live progress, the summary. Plain lines when it is not a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import power
from .drive import Known
from .errors import EXIT_UNAVAILABLE
from .knobs import axis_words, scalar_words
from .plan import Block
from .preview import Preview
from .spec import Scalar
from .store import BlockState
from .units import format_bytes, format_duration

_COLOURS = {"ok": "green", "infeasible": "yellow", "out_of_memory": "yellow"}


def show_plan(console: Console, plan: Preview, folder: str, overrides: Sequence[str] = ()) -> None:
    """Everything that will happen, before it does; `overrides`: what was said beside the file."""
    experiment = plan.experiment
    console.print(
        Text.assemble(("plan ", "bold"), experiment.name, "  ", (experiment.question, "italic")),
        soft_wrap=True,
    )
    if experiment.engine.kind == "fake":
        console.print("[yellow]engine fake: no engine runs; its numbers mean nothing[/yellow]")
    elif experiment.engine.kind == "probe":
        console.print("[yellow]PROBE: the sizing law over real memory; no inference engine runs[/yellow]")
    elif experiment.engine.kind == "simulated":
        console.print("[yellow]SIMULATED: no engine runs; capacities come from a formula[/yellow]")
    if plan.is_double:
        console.print("[yellow]DOUBLE: a stand-in for TensorRT-LLM; its numbers are no measurements[/yellow]")
    table = Table(box=None, pad_edge=False)
    for heading in ("arm", "what", "here"):
        table.add_column(heading, overflow="fold")
    for arm in plan.arms:
        here: Any = Text("yes", style="green")
        if not arm.available:
            left = "missing" if arm.required else "left out"
            here = Text(
                "\n".join(f"{left}: {problem}" for problem in arm.problems),
                style="red" if arm.required else "yellow",
            )
        table.add_row(arm.name, arm.what, here)
    console.print(table)
    pair, search = experiment.compared, experiment.search
    lines = [
        f"contrast    1 - KV({pair.against}) / KV({pair.baseline})",
        f"search      {search.sampler}, {'at most ' if search.sampler == 'map' else ''}{search.blocks} blocks x {len(plan.counted)} arms, {search.repetitions} repetition(s), seed {experiment.seed}",
        *(f"knob        {path}: {axis_words(axis)}" for path, axis in search.space.further.items()),
        *power.said(plan.noise, search, mark=plan.mark),
        f"slots       {plan.slots} on {', '.join(node.name for node in plan.cluster.nodes)}",
        *_time(plan),
        f"folder      {folder}",
    ]
    lines += _orchestrated(plan)
    lines += [f"set         {override}" for override in overrides]
    lines += [f"first do    {step}" for step in plan.preparations]
    lines += (
        [f"order       {'  |  '.join(' > '.join(order) for order in plan.first_orders(3))} ..."]
        if len(plan.executed) > 1
        else []
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for arm in plan.arms:
        for warning in arm.warnings:
            console.print(f"warning     {arm.name}: {warning}", style="yellow", soft_wrap=True, markup=False)
    for problem in plan.problems:
        console.print(f"missing     {problem}", style="red", soft_wrap=True, markup=False)


def show_lacking(console: Console, plan: Preview) -> None:
    """After a plan alone: what would keep the sweep from being begun here, with each mend."""
    if (lacking := plan.lacking()) is not None:
        text = f"\n{lacking}\nthe sweep itself would end here with exit {EXIT_UNAVAILABLE}, before any effect"
        console.print(text, style="red", soft_wrap=True, markup=False, highlight=False)


def _time(plan: Preview) -> list[str]:
    """How long all of it may take, and of what that is made."""
    limit = f"a trial is ended after {format_duration(plan.experiment.limits.trial_timeout)}"
    trial = plan.trial
    if trial is None or not plan.expected_s:
        return [f"time        unknown until the first block ({limit})"]
    of = [
        f"{name} {format_duration(value)}"
        for name, value in (("requests", trial.requests_s), ("cooldown", trial.cooldown_s))
        if value
    ]
    parts = f": start {format_duration(trial.start_s)}, {', '.join(of)}" if of else ""
    return [
        f"time        about {format_duration(plan.expected_s)} ({limit})",
        f"            {plan.trials} trials of {format_duration(trial.total_s)}{parts} (estimate: {trial.basis})",
    ]


def _orchestrated(plan: Preview) -> list[str]:
    """Which arms are executed through a Ray of their own, where arms say so."""
    arms = plan.experiment.arms
    if not any(arms[arm].orchestrator for arm in plan.executed):
        return []
    ray = ", ".join(arm for arm in plan.executed if arms[arm].orchestrator == "ray")
    others = ", ".join(arm for arm in plan.executed if arms[arm].orchestrator != "ray")
    return [
        f"executor    {ray or 'none'}: through a Ray that is started for each attempt and stopped after it",
        f"            {others or 'none'}: in this process, while no Ray of this run lives",
    ]


class Terminal:
    """Listens to the drive and shows it: a live panel on a terminal, else one line per ended trial and block."""

    def __init__(
        self, console: Console, blocks: int, done: int, arms: int, *, quiet: bool, mark: str = ""
    ) -> None:
        """`mark`: said with every number, where what is measured is no engine."""
        self._console = console
        self._mark = f"{mark} " if mark else ""
        self._quiet = quiet
        self._lock = threading.Lock()
        self._running: dict[str, str] = {}
        self._best: tuple[float, str] | None = None
        self._known: Known | None = None
        self._counts: dict[str, int] = {}
        self._trials = 0
        self._total = (blocks - done) * arms
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("blocks"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._progress.add_task("blocks", total=blocks, completed=done, left="")
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _render(self) -> Group:
        with self._lock:
            running = "   ".join(f"{slot}: {what}" for slot, what in self._running.items()) or "starting"
            counts = (
                "  ".join(f"{kind} {count}" for kind, count in sorted(self._counts.items())) or "none yet"
            )
            best = (
                "none yet" if self._best is None else f"{self._mark}{self._best[0]:+.1%} at {self._best[1]}"
            )
            known = self._known
        lines = Text.assemble(
            ("now      ", "dim"),
            running,
            "\n",
            ("trials   ", "dim"),
            counts,
            "\n",
            ("largest divergence  ", "dim"),
            best,
            *_map_lines(known, self._mark),
        )
        return Group(self._progress, lines)

    def _say(self, line: str) -> None:
        if self._live is None and not self._quiet:
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def trial_started(self, slot: str, block: Block, arm: str, attempt: int) -> None:
        again = f" (attempt {attempt})" if attempt > 1 else ""
        with self._lock:
            self._running[slot] = f"{block.block_id} {arm}{again}  {configuration_words(block.configuration)}"

    def trial_ended(self, slot: str, block: Block, arm: str, outcome: Mapping[str, str]) -> None:
        with self._lock:
            self._running.pop(slot, None)
            self._counts[outcome["kind"]] = self._counts.get(outcome["kind"], 0) + 1
            self._trials += 1
            each = (time.monotonic() - self._started) / self._trials
            left = max(0, self._total - self._trials)
        self._progress.update(self._task, left=f"about {format_duration(each * left)} left" if left else "")
        detail = "" if outcome["kind"] == "ok" else f"  {outcome['reason']}: {outcome['message']}"
        self._say(f"{block.block_id} {self._mark}{arm}: {outcome['kind']}{detail}")
        if self._live is not None and outcome["kind"] not in _COLOURS:
            failed = Text.assemble((f"{block.block_id} {arm}: {outcome['kind']}", "red"), detail)
            self._console.print(failed, soft_wrap=True)

    def block_ended(self, state: BlockState, divergence: float | None, known: Known | None = None) -> None:
        words = configuration_words(state.block.configuration)
        with self._lock:
            self._known = known or self._known
            if divergence is not None and (self._best is None or abs(divergence) > abs(self._best[0])):
                self._best = (divergence, words)
        self._progress.advance(self._task)
        self._say(f"{state.block.block_id} {self._mark}{_block_end(state, divergence)}  ({words})")
        if known:
            self._say(f"{state.block.block_id} {self._mark}map: {_known_words(known)}")


def _map_lines(known: Known | None, mark: str) -> list[Any]:
    return [] if known is None else ["\n", ("map      ", "dim"), f"{mark}{_known_words(known)}"]


def _known_words(known: Known) -> str:
    if known.expected_misclassified == 1:
        return "nothing is known yet"
    return (
        f"{known.expected_misclassified:.1%} of the space expected to be called wrongly, "
        f"{known.undecided_volume:.1%} undecided"
    )


def _block_end(state: BlockState, divergence: float | None) -> str:
    if divergence is not None:
        return f"done: divergence {divergence:+.1%}"
    bad = ", ".join(f"{arm} {end['kind']}" for arm, end in state.outcomes.items() if end["kind"] != "ok")
    return f"{'done' if state.complete else 'given up'}: no contrast, {bad}"


def configuration_words(configuration: Mapping[str, Scalar]) -> str:
    short = {"max_batch_size": "batch", "max_num_tokens": "tokens", "memory_fraction": "fraction"}
    return " ".join(f"{short.get(key, key)} {scalar_words(value)}" for key, value in configuration.items())


def show_summary(console: Console, summary: Mapping[str, Any], report: str | None) -> None:
    """The table at the end: capacity by arm, the contrast with the baseline, what was not ok."""
    baseline = summary["baseline"]
    contrasts = {each["arm"]: each["contrast"]["mean"] for each in summary["contrasts"]}
    mark = "DOUBLE " if summary.get("engine_is_double") else "SIMULATED " if summary.get("simulated") else ""
    table = Table(
        title=f"{mark}{summary['name']}: KV cache by arm", title_justify="left", box=None, pad_edge=False
    )
    for heading in ("arm", "ok", "no capacity", "failed", "median KV", "peak memory", "contrast"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in summary["arms"]:
        kv, peak, mean = (
            arm["median_kv_cache_bytes"],
            arm["median_peak_memory_bytes"],
            contrasts.get(arm["arm"]),
        )
        contrast = "-" if mean is None else f"{mean:+.1%}"
        table.add_row(
            arm["arm"], str(arm["ok"]), str(arm["no_capacity"]), str(arm["failed"]),
            format_bytes(kv) if kv is not None else "-", format_bytes(peak) if peak is not None else "-",
            "baseline" if arm["arm"] == baseline else contrast,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"contrast: 1 - KV(arm) / KV({baseline}), mean over blocks; + is less KV cache than {baseline}",
        style="dim", soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
    lines = (
        not console.is_terminal
    )  # sentences: wrapped between words for a person, whole lines for a program
    console.print(summary["verdict"], style="bold", soft_wrap=lines, highlight=False, markup=False)
    if report:
        console.print(f"report  {report}", soft_wrap=True, highlight=False, markup=False)


def show_standing(console: Console, found: Mapping[str, Mapping[str, Any]], *, whole: bool) -> None:
    """Where runs stand, one line each; `whole`: the one run in full."""
    for name, run in found.items():
        outcomes = ", ".join(f"{count} {kind}" for kind, count in run["outcomes"].items()) or "no trial yet"
        mark = "SIMULATED " if run["simulated"] else ""
        lines = [f"{mark}{run['complete']} of {run['blocks']} blocks complete; {outcomes}"]
        lines[0] += (
            f"; {run['superseded_attempts']} superseded attempts" if run["superseded_attempts"] else ""
        )
        lines[0] += "; being driven now" if run["driven"] else ""
        lines[0] += f"; map: {run['map']['why']}" if run["map"] else ""
        if whole:
            lines += [
                f"  open: {block['block_id']} ({configuration_words(block['configuration'])}), "
                f"execution {block['execution']}, {block['arms_done']} of {block['arms']} arms done"
                for block in run["open"]
            ]
        else:
            lines[0] = f"{name}: {lines[0]}"
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def show_overview(console: Console, rows: Sequence[Mapping[str, Any]], page: str) -> None:
    """Each run of a folder with its verdict."""
    for row in rows:
        done = f"{row['blocks']['complete']} of {row['blocks']['wanted']} blocks"
        failed = f", {row['failed']} trials failed" if row["failed"] else ""
        console.print(
            Text.assemble("\n", (row["run"], "bold"), f"  {done}{failed}\n{row['verdict']}"),
            soft_wrap=not console.is_terminal,
        )
    console.print(f"\nreports  {page}", soft_wrap=True, highlight=False, markup=False)


def show_checks(console: Console, checks: list[dict[str, str]]) -> None:
    """The doctor's findings, worst visible at a glance, and what they come to."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    name_width = min(30, max((len(check["name"]) for check in checks), default=0))
    table.add_column(overflow="fold", width=name_width)
    table.add_column(overflow="fold", ratio=1)
    colours = {"ok": "green", "warn": "yellow", "missing": "red"}
    for check in checks:
        mend = f"\nmend: {check['mend']}" if check["mend"] and check["status"] != "ok" else ""
        table.add_row(
            Text(check["status"], style=colours[check["status"]]),
            Text(check["name"]),
            Text(check["found"] + mend),
        )
    console.print(table)
    by_status = {
        status: [c["name"] for c in checks if c["status"] == status] for status in ("missing", "warn")
    }
    missing = ", ".join(by_status["missing"])
    said = f"required and missing: {missing}" if missing else "nothing that is required is missing"
    warnings = len(by_status["warn"])
    said += f"; {warnings} warning{'' if warnings == 1 else 's'}"
    console.print(f"\n{said}", style="bold", markup=False, soft_wrap=True)
