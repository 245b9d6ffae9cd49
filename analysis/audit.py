"""Every reason not to believe the result, as sentences, the gravest first.

`grave`: the numbers do not mean what they seem to. `doubt`: a rival explanation that this run does not exclude.
`note`: what a careful reader wants to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from spark_ray.outcome import ANSWERS, VOID
from spark_ray.units import MIB, format_bytes

from . import contrasts, statistics
from .frames import words
from .reading import at, text

Severity = Literal["grave", "doubt", "note"]
SEVERITIES: tuple[Severity, ...] = ("grave", "doubt", "note")
_SIGNIFICANT = 0.05
_UNPREDICTED_BYTES = 32 * MIB  # beyond this, something other than page cache speaks
_SAMPLING_SHARE = 0.01  # of one core: what looking may cost
_QUIET_BYTES = 256 * MIB  # MemFree of a quiet host moves by 130 to 210 MiB a minute


@dataclass(frozen=True)
class Finding:
    severity: Severity
    sentence: str


@dataclass(frozen=True)
class Evidence:
    """Everything an audit looks at."""

    plan: Mapping[str, Any]
    trials: pd.DataFrame
    pairs: pd.DataFrame
    samples: Mapping[str, pd.DataFrame]  # by `<trial>-<attempt>`
    arms: tuple[str, ...]
    baseline: str
    against: str
    rivals: int  # unexpected differences between the compared arms' fingerprints


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _points(change: float) -> str:
    return f"{abs(100 * change):.2g} percentage points {'larger' if change > 0 else 'smaller'}"


def _names(values: pd.Series) -> str:
    found = [str(value) for value in values]
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _valid(trials: pd.DataFrame) -> pd.DataFrame:
    return trials[trials["standing"] == "counts"]


def _engine(seen: Evidence) -> Iterator[Finding]:
    if seen.trials["fake"].fillna(False).any() or at(seen.plan, "experiment", "engine", "kind") == "fake":
        yield Finding("grave", "The engine is fake: no engine ran, and its numbers mean nothing.")
    if seen.trials["simulated"].fillna(False).any():
        yield Finding("grave", "The engine is simulated: capacities come from a formula, not from memory.")
    versions = seen.trials["engine_version"].dropna().unique()
    if len(versions) > 1:
        yield Finding("grave", f"Engine versions differ between trials: {', '.join(sorted(versions))}.")
    mixed = seen.trials["spark_ray_version"].dropna().value_counts().sort_index()
    if len(mixed) > 1:
        each = ", ".join(f"{version} ({_plural(int(count), 'attempt')})" for version, count in mixed.items())
        yield Finding(
            "doubt",
            f"Versions of spark_ray are mixed in this run: {each}. The worker is the run's own throughout, the host side is not.",
        )
    for what, values in (("laws", "sizing_law"), ("memory views", "sizing_view")):
        chosen = seen.trials[seen.trials["arm"].isin([seen.baseline, seen.against])]
        found = sorted(chosen[values].dropna().unique())
        if len(found) > 1:
            yield Finding(
                "doubt", f"The compared arms size their pools by different {what}: {', '.join(found)}."
            )


def _completeness(seen: Evidence) -> Iterator[Finding]:
    wanted = at(seen.plan, "experiment", "search", "blocks")
    done = _valid(seen.trials)["block_id"].nunique()
    if isinstance(wanted, int) and done < wanted:
        yield Finding("doubt", f"Only {done} of {_plural(wanted, 'block')} are complete.")
    both = seen.pairs[(seen.pairs["arm"] == seen.against) & seen.pairs["contrast"].notna()]
    if len(both) < 2:
        text_ = f"The compared arms both have a capacity in {_plural(len(both), 'block')}: no interval can be given."
        yield Finding("grave", text_)
    elif len(both) < 6:
        yield Finding(
            "doubt", f"{len(both)} blocks are few: the interval rests on the t distribution being right."
        )
    left_out = at(seen.plan, "left_out")
    for arm, why in left_out.items() if isinstance(left_out, Mapping) else ():
        severity: Severity = "grave" if arm in {seen.baseline, seen.against} else "note"
        yield Finding(severity, f"Arm {arm} was left out: {words(why)}.")


def _attempts(seen: Evidence) -> Iterator[Finding]:
    void = seen.trials[seen.trials["outcome"].isin(list(VOID))]
    if len(void):
        yield Finding(
            "note",
            f"{_plural(len(void), 'attempt')} disturbed ({_names(void['trial_id'])}); each such block ran again as a whole.",
        )
    spare = int((seen.trials["standing"] == "superseded").sum())
    if spare:
        yield Finding("note", f"{_plural(spare, 'attempt')} superseded: on record below, in no number above.")
    unfinished = seen.trials[seen.trials["standing"] == "open"]
    if len(unfinished):
        yield Finding(
            "note",
            f"{_plural(len(unfinished), 'attempt')} of blocks that are not complete yet ({_names(unfinished['trial_id'])}): in no number above.",
        )
    valid = _valid(seen.trials)
    failed = valid[~valid["outcome"].isin(list(ANSWERS))]
    if len(failed):
        yield Finding(
            "doubt",
            f"{_plural(len(failed), 'trial')} failed ({_names(failed['trial_id'])}): their blocks are missing from the contrast, and not at random.",
        )
    for _, row in seen.trials[seen.trials["outcome"] == "host_wedged"].iterrows():
        yield Finding("grave", f"The watchdog ended {row['trial_id']}: the host ran out of memory.")
    mine = seen.pairs[(seen.pairs["arm"] == seen.against) & seen.pairs["contrast"].isna()]
    one_sided = mine[mine["outcome"].isin(list(ANSWERS)) & mine["baseline_outcome"].isin(list(ANSWERS))]
    if len(one_sided):
        yield Finding(
            "doubt",
            f"In {_plural(len(one_sided), 'complete block')} at least one compared arm has no capacity: the mean is over the others only.",
        )


def _host(seen: Evidence) -> Iterator[Finding]:
    trials = seen.trials
    unreached = trials[~trials["wait_reached"].fillna(True)]
    if len(unreached):
        yield Finding(
            "doubt",
            f"Memory had not come back before {_plural(len(unreached), 'attempt')} ({_names(unreached['trial_id'])}).",
        )
    if (trials["swap_used_bytes"].fillna(0) > 0).any():
        yield Finding(
            "doubt",
            f"Swap was in use, up to {format_bytes(int(trials['swap_used_bytes'].max()))}: memory can hide there.",
        )
    totals = trials["sizing_mem_total_bytes"].dropna()
    if (trials["mem_total_change_bytes"].fillna(0) > 0).any() or totals.nunique() > 1:
        yield Finding(
            "doubt", "MemTotal changed during the run: the law's total is not the same in all trials."
        )
    killed = int((trials["oom_kills"].fillna(0) > 0).sum())
    if killed:
        during = ", ".join(trials.loc[trials["oom_kills"].fillna(0) > 0, "trial_id"].astype(str).head(5))
        yield Finding(
            "note",
            f"The kernel killed a process of this host for memory during {_plural(killed, 'attempt')} ({during}); "
            "only where the outcome is out_of_memory was it the trial's own.",
        )
    unread = trials[~trials["outside_readable"].fillna(True)]
    if len(unread):
        yield Finding(
            "doubt",
            f"From outside, the root of {_plural(len(unread), 'worker')} could not be read: where it ran rests on its own word.",
        )
    cost = max((trials["sampling_cpu_s"] / trials["duration_s"]).dropna(), default=0.0)
    if cost > _SAMPLING_SHARE:
        yield Finding("note", f"Sampling cost up to {cost:.1%} of one core.")


def _quiet(seen: Evidence) -> Iterator[Finding]:
    """Whether anyone else was moving memory."""
    valid = _valid(seen.trials)
    others = valid["sizing_other_anon_bytes"].dropna()
    if len(others) and others.max() - others.min() > _QUIET_BYTES:
        low, high = format_bytes(int(others.min())), format_bytes(int(others.max()))
        yield Finding(
            "doubt",
            f"The host was not quiet: other processes held between {low} and {high} at the moments of sizing.",
        )
    fallen = []
    for trial_id, attempt in zip(valid["trial_id"], valid["attempt"], strict=True):
        cached = seen.samples.get(f"{trial_id}-{attempt}", pd.DataFrame()).get("cached_bytes")
        if cached is not None and (cached.cummax() - cached).max() > _QUIET_BYTES:
            fallen.append(trial_id)
    if fallen:
        yield Finding(
            "doubt",
            f"Page cache fell by more than {format_bytes(_QUIET_BYTES)} while {_plural(len(fallen), 'attempt')} ran ({_names(pd.Series(fallen))}): someone else dropped or reclaimed it.",
        )


def _warnings(seen: Evidence) -> Iterator[Finding]:
    warnings = at(seen.plan, "warnings")
    for arm, said in warnings.items() if isinstance(warnings, Mapping) else ():
        for each in said if isinstance(said, list) else [said]:
            yield Finding("doubt", f"Arm {arm}: {words(each)}.")


def _design(seen: Evidence) -> Iterator[Finding]:
    rows = seen.pairs[(seen.pairs["arm"] == seen.against) & seen.pairs["contrast"].notna()]
    rows = rows.dropna(subset=["before_baseline", "block_index"]).sort_values("block_index")
    values, first = [float(v) for v in rows["contrast"]], [bool(v) for v in rows["before_baseline"]]
    ahead = sum(first)
    if len(first) > 1 and abs(2 * ahead - len(first)) > 1:
        yield Finding(
            "doubt",
            f"The order is not balanced: {seen.against} ran before {seen.baseline} in {ahead} of {len(first)} blocks.",
        )
    order = statistics.order_effect(values, first)
    if order is not None and order.p < _SIGNIFICANT:
        yield Finding(
            "doubt",
            f"The order matters: where {seen.against} ran first the contrast is {_points(order.size)} (p = {order.p:.2g}).",
        )
    drift = statistics.trend(values, [float(v) for v in rows["block_index"]])
    if drift is not None and drift.p < _SIGNIFICANT:
        yield Finding(
            "doubt",
            f"The contrast drifts, each block {_points(drift.size)} than the one before (p = {drift.p:.2g}); in a search this may be the configurations.",
        )
    lag = statistics.autocorrelation(values)
    if lag is not None and lag > 0:
        worth = statistics.effective_n(len(values), lag)
        if worth < len(values) / 2:
            yield Finding(
                "doubt",
                f"Neighbouring blocks resemble each other (lag-1 autocorrelation {lag:.2f}): {len(values)} blocks are worth about {worth:.1f}.",
            )
    twins = seen.trials.groupby("arm")["setup"].first()
    if twins.duplicated().sum() == 0 and len(seen.trials):
        yield Finding(
            "note",
            "No two arms are the same (A/A): the noise floor of this host was not measured in this run.",
        )


def _law(seen: Evidence) -> Iterator[Finding]:
    ok = seen.trials[(seen.trials["outcome"] == "ok") & (seen.trials["sizing_law"] == contrasts.LAW)]
    block_bytes = ok["kv_block_tokens"] * ok["kv_bytes_per_token"]
    off = (ok["kv_cache_bytes"] - ok["sizing_available_bytes"]).abs() > block_bytes
    if off.any():
        yield Finding(
            "doubt",
            f"KV capacity is more than one block off its sizing law in {_plural(int(off.sum()), 'trial')} ({_names(ok['trial_id'][off])}).",
        )
    law = ok["sizing_fraction"] * (ok["sizing_free_bytes"] - ok["sizing_transient_bytes"])
    if ((law.clip(lower=0) - ok["sizing_available_bytes"]).abs() > 2).any():
        yield Finding("doubt", "The recorded sizing terms do not reproduce the recorded pool size.")
    rows = seen.pairs[seen.pairs["arm"] == seen.against]
    wide = rows[rows["unpredicted_bytes"].abs() > _UNPREDICTED_BYTES]
    if len(wide):
        left = wide[["term_rest_bytes", "term_transient_bytes", "term_engine_bytes"]].sum(axis=1).abs().max()
        yield Finding(
            "doubt",
            f"In {len(wide)} of {_plural(len(rows), 'block')} page cache alone misses the difference by more than "
            f"{format_bytes(_UNPREDICTED_BYTES)} ({_names(wide['block_id'])}): other memory moved as well. "
            f"With every counter read at that moment, at most {format_bytes(left)} is left.",
        )  # fmt: skip


def _fingerprint(seen: Evidence) -> Iterator[Finding]:
    if seen.rivals:
        yield Finding(
            "doubt",
            f"The compared arms differ in {_plural(seen.rivals, 'recorded property').replace('propertys', 'properties')} beside what makes them arms; each is a rival explanation (fingerprint below).",
        )
    overrides = at(seen.plan, "overrides")
    if isinstance(overrides, list) and overrides:
        yield Finding(
            "note",
            f"The experiment was changed on the command line: {', '.join(text(o) or '?' for o in overrides)}.",
        )
    if len(seen.arms) > 2:
        yield Finding(
            "note",
            f"{len(seen.arms) - 1} arms are compared with one baseline; only {seen.against} was named beforehand, and the intervals are not adjusted for the others.",
        )


def _gpu(seen: Evidence) -> Iterator[Finding]:
    """Clocks that were held back, and anybody else on the device."""
    valid = _valid(seen.trials)
    foreign = valid[valid["gpu_processes_before"].fillna(0) > 0]
    if len(foreign):
        yield Finding(
            "doubt",
            f"Before {_plural(len(foreign), 'trial')} ({_names(foreign['trial_id'])}) another process was already on the GPU.",
        )
    held = valid[valid["gpu_throttle_reasons"].fillna("") != ""]
    if len(held):
        why = ", ".join(sorted({word for each in held["gpu_throttle_reasons"] for word in each.split(", ")}))
        yield Finding(
            "note",
            f"The GPU's clocks were held back in {_plural(len(held), 'trial')} ({why}): throughput is touched, capacity is not.",
        )


def findings(seen: Evidence) -> list[Finding]:
    """All reasons, the gravest first, in a fixed order."""
    checks = (_engine, _completeness, _attempts, _host, _quiet, _gpu, _warnings, _design, _law, _fingerprint)
    found = [finding for check in checks for finding in check(seen)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
