"""Every reason not to believe the result, as sentences, the gravest first.

`grave`: the numbers do not mean what they seem to. `doubt`: a rival explanation that this run does not exclude.
`note`: what a careful reader wants to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from spark_ray.measurements import LAW, LAW_TRT_LLM
from spark_ray.outcome import ANSWERS, VOID
from spark_ray.units import MIB, format_bytes

from . import audit_host, statistics
from .attribution import OWN, column
from .findings import SEVERITIES, Evidence, Finding, Severity, names, plural
from .frames import words
from .reading import at, text

_SIGNIFICANT = 0.05
_UNPREDICTED_BYTES = 32 * MIB  # beyond this, something other than page cache speaks
_WHOLE_BYTES = 2  # products of doubles, cut to whole bytes


def _points(change: float) -> str:
    return f"{abs(100 * change):.2g} percentage points {'larger' if change > 0 else 'smaller'}"


def _engine(seen: Evidence) -> Iterator[Finding]:
    if seen.trials["fake"].fillna(False).any() or at(seen.plan, "experiment", "engine", "kind") == "fake":
        yield Finding("grave", "The engine is fake: no engine ran, and its numbers mean nothing.")
    if seen.trials["engine_is_double"].fillna(False).any():
        yield Finding(
            "grave",
            "The engine is a test double: a stand-in for TensorRT-LLM made the numbers, and they are no measurements.",
        )
    if seen.trials["simulated"].fillna(False).any():
        yield Finding("grave", "The engine is simulated: capacities come from a formula, not from memory.")
    if seen.trials["probe"].fillna(False).any():
        yield Finding(
            "doubt",
            "The engine is a probe: the sizing law over real memory. What an inference engine adds (libraries, kernels, graphs) is not in it.",
        )
    versions = seen.trials["engine_version"].dropna().unique()
    if len(versions) > 1:
        yield Finding("grave", f"Engine versions differ between trials: {', '.join(sorted(versions))}.")
    mixed = seen.trials["spark_ray_version"].dropna().value_counts().sort_index()
    if len(mixed) > 1:
        each = ", ".join(f"{version} ({plural(int(count), 'attempt')})" for version, count in mixed.items())
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
    done = seen.counted["block_id"].nunique()
    if isinstance(wanted, int) and done < wanted and not seen.ended:
        yield Finding("doubt", f"Only {done} of {plural(wanted, 'block')} are complete.")
    both = seen.pairs[(seen.pairs["arm"] == seen.against) & seen.pairs["contrast"].notna()]
    if len(both) < 2:
        text_ = f"The compared arms both have a capacity in {plural(len(both), 'block')}: no interval can be given."
        yield Finding("grave", text_)
    elif len(both) < 6:
        yield Finding(
            "doubt", f"{len(both)} blocks are few: the interval rests on the t distribution being right."
        )
    places = len(both[["max_batch_size", "max_num_tokens", "memory_fraction", "knobs"]].drop_duplicates())
    if 1 < places < len(both) and at(seen.plan, "experiment", "search", "sampler") != "map":
        text_ = f"{len(both)} blocks repeat {places} configurations: the interval is of these alone, over others it would be wider."
        yield Finding("doubt", text_)
    left_out = at(seen.plan, "left_out")
    for arm, why in left_out.items() if isinstance(left_out, Mapping) else ():
        severity: Severity = "grave" if arm in {seen.baseline, seen.against} else "note"
        yield Finding(severity, f"Arm {arm} was left out: {words(why)}.")


def _attempts(seen: Evidence) -> Iterator[Finding]:
    void = seen.trials[seen.trials["outcome"].isin(list(VOID))]
    again, waiting = void[void["standing"] == "superseded"], void[void["standing"] == "open"]
    if len(again):
        text_ = f"{plural(len(again), 'attempt')} disturbed ({names(again['trial_id'])}); each such block ran again as a whole."
        yield Finding("note", text_)
    if len(waiting):
        text_ = f"{plural(len(waiting), 'attempt')} disturbed ({names(waiting['trial_id'])}) in blocks that are open: resume runs them again."
        yield Finding("note", text_)
    spare = int((seen.trials["standing"] == "superseded").sum())
    if spare:
        yield Finding("note", f"{plural(spare, 'attempt')} superseded: on record below, in no number above.")
    unfinished = seen.trials[seen.trials["standing"] == "open"]
    if len(unfinished):
        yield Finding(
            "note",
            f"{plural(len(unfinished), 'attempt')} of blocks that are not complete yet ({names(unfinished['trial_id'])}): in no number above.",
        )
    counted = seen.counted
    failed = counted[~counted["outcome"].isin(list(ANSWERS))]
    compared = failed["arm"].isin([seen.baseline, seen.against])
    for rows, what in ((failed[compared], "the contrast"), (failed[~compared], "the contrast of their arm")):
        if len(rows):
            yield Finding(
                "doubt",
                f"{plural(len(rows), 'trial')} failed ({names(rows['trial_id'])}): their blocks are missing from {what}, and not at random.",
            )
    for _, row in seen.trials[seen.trials["outcome"] == "host_wedged"].iterrows():
        yield Finding("grave", f"The watchdog ended {row['trial_id']}: the host ran out of memory.")
    mine = seen.pairs[(seen.pairs["arm"] == seen.against) & seen.pairs["contrast"].isna()]
    one_sided = mine[mine["outcome"].isin(list(ANSWERS)) & mine["baseline_outcome"].isin(list(ANSWERS))]
    if len(one_sided):
        yield Finding(
            "doubt",
            f"In {plural(len(one_sided), 'complete block')} at least one compared arm has no capacity: the mean is over the others only.",
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
    if not seen.twins and len(seen.trials):
        yield Finding(
            "note",
            f"No arm is the same as {seen.baseline} (A/A): the noise floor of this host was not measured in this run.",
        )


def _printed_law(seen: Evidence) -> Iterator[Finding]:
    """TensorRT-LLM's law, whose terms were printed in steps: what is off by more than the steps can explain."""
    ok = seen.trials[(seen.trials["outcome"] == "ok") & (seen.trials["sizing_law"] == LAW_TRT_LLM)]
    fraction, step = ok["sizing_fraction"], ok["sizing_resolution_bytes"].fillna(0)
    available = ok["sizing_available_bytes"]
    law = fraction * (ok["sizing_total_bytes"] - ok["sizing_peak_bytes"] + ok["sizing_temporary_kv_bytes"])
    off = (law.clip(lower=0) - available).abs() > (1 + 3 * fraction) / 2 * step + _WHOLE_BYTES
    if off.any():
        yield Finding(
            "doubt",
            f"The sizing terms that the engine printed do not reproduce its pool size in {plural(int(off.sum()), 'trial')} ({names(ok['trial_id'][off])}): its law is not the one assumed.",
        )
    allowed = ok[["sizing_available_bytes", "sizing_estimated_bytes", "sizing_final_available_bytes"]].min(
        axis=1
    )
    block_bytes = ok["kv_block_tokens"] * ok["kv_bytes_per_token"]
    off = (ok["kv_cache_bytes"] - allowed).abs() > block_bytes + step
    if off.any():
        yield Finding(
            "doubt",
            f"KV capacity is more than one block off what the engine printed for it in {plural(int(off.sum()), 'trial')} ({names(ok['trial_id'][off])}).",
        )
    silent = seen.trials[
        (seen.trials["outcome"] == "ok")
        & (seen.trials["engine"] == "tensorrt_llm")
        & seen.trials["sizing_law"].isna()
    ]
    unchecked = pd.concat([ok[law.isna() | available.isna()], silent])
    if len(unchecked):
        yield Finding(
            "note",
            f"The sizing law could not be checked in {plural(len(unchecked), 'trial')} ({names(unchecked['trial_id'])}): the engine did not print every term.",
        )


def _unseen_sizing(seen: Evidence) -> Iterator[Finding]:
    """TensorRT-LLM's pool sized at a moment at which nobody looked."""
    ok = seen.counted[(seen.counted["outcome"] == "ok") & (seen.counted["engine"] == "tensorrt_llm")]
    unseen = ok.loc[ok["sizing_moment"] == "before start", "trial_id"]
    if len(unseen):
        yield Finding(
            "doubt",
            f"In {plural(len(unseen), 'trial')} ({names(unseen)}) the engine sized its pool unseen: whether the treatment held then, and what held memory, is not known.",
        )


def _law(seen: Evidence) -> Iterator[Finding]:
    ok = seen.trials[(seen.trials["outcome"] == "ok") & (seen.trials["sizing_law"] == LAW)]
    block_bytes = ok["kv_block_tokens"] * ok["kv_bytes_per_token"]
    off = (ok["kv_cache_bytes"] - ok["sizing_available_bytes"]).abs() > block_bytes
    if off.any():
        yield Finding(
            "doubt",
            f"KV capacity is more than one block off its sizing law in {plural(int(off.sum()), 'trial')} ({names(ok['trial_id'][off])}).",
        )
    law = ok["sizing_fraction"] * (ok["sizing_free_bytes"] - ok["sizing_transient_bytes"])
    if ((law.clip(lower=0) - ok["sizing_available_bytes"]).abs() > 2).any():
        yield Finding("doubt", "The recorded sizing terms do not reproduce the recorded pool size.")
    rows = seen.pairs[seen.pairs["arm"] == seen.against]
    wide = rows[rows["unpredicted_bytes"].abs() > _UNPREDICTED_BYTES]
    if len(wide):
        left = wide[[column(name) for name in ("rest", *OWN)]].sum(axis=1).abs().max()
        yield Finding(
            "doubt",
            f"In {len(wide)} of {plural(len(rows), 'block')} page cache alone misses the difference by more than "
            f"{format_bytes(_UNPREDICTED_BYTES)} ({names(wide['block_id'])}): other memory moved as well. "
            f"With every counter read at that moment, at most {format_bytes(left)} is left.",
        )  # fmt: skip


def _checks(seen: Evidence) -> Iterator[Finding]:
    """What a measurement was not held against: a second source of its capacity, the bounds of what can be."""
    ok = seen.trials[seen.trials["outcome"] == "ok"]
    alone = ok[(ok["engine"] == "tensorrt_llm") & ok["kv_second_source"].isna()]
    if len(alone):
        yield Finding(
            "doubt",
            f"KV capacity rests on one source alone in {plural(len(alone), 'trial')} ({names(alone['trial_id'])}): no second one confirms it.",
        )
    lacking = ok[ok["bounds_not_applied"].fillna("") != ""]
    for why, rows in lacking.groupby("bounds_not_applied"):
        yield Finding(
            "note",
            f"Not every bound on what can be was applied in {plural(len(rows), 'trial')} ({names(rows['trial_id'])}): {why}.",
        )


def _fingerprint(seen: Evidence) -> Iterator[Finding]:
    if seen.rivals:
        yield Finding(
            "doubt",
            f"The compared arms differ in {plural(seen.rivals, 'recorded property').replace('propertys', 'properties')} beside what makes them arms; each is a rival explanation (what differs between the arms, above).",
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


def findings(seen: Evidence) -> list[Finding]:
    """All reasons, the gravest first, in a fixed order."""
    checks = (
        _engine,
        _completeness,
        _attempts,
        *audit_host.CHECKS,
        _warnings,
        _design,
        _printed_law,
        _unseen_sizing,
        _law,
        _checks,
        _fingerprint,
    )
    found = [finding for check in checks for finding in check(seen)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
