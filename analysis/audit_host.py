"""Reasons not to believe a result that lie with the host: was it quiet, did memory come back, what did the guards see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pandas as pd

from spark_ray.units import MIB, format_bytes

from . import matmul
from .findings import Evidence, Finding, Severity, names, plural

_SAMPLING_SHARE = 0.01  # of one core: what looking may cost
_QUIET_BYTES = 256 * MIB  # MemFree of a quiet host moves by 130 to 210 MiB a minute
_STALLED_SHARE = 0.01  # of an attempt in which some task waited for memory
_GROWTH_BYTES = 64 * MIB  # of the orchestrator between the first and the last attempt

_OTHER_WAYS: tuple[tuple[str, Severity, str], ...] = (
    (
        "devices",
        "doubt",
        "as driver files and nodes, as nobody starts one: the daemon granted no --gpus, no CDI",
    ),
    ("cdi", "note", "by CDI, since the daemon refused --gpus"),
)


def _where(trials: pd.DataFrame, column: str, above: float = 0.0) -> pd.DataFrame:
    return trials.loc[trials[column].fillna(0) > above, ["trial_id", column]]


def _memory(seen: Evidence) -> Iterator[Finding]:
    trials = seen.trials
    unreached = trials.loc[~trials["wait_reached"].fillna(True), "trial_id"]
    if len(unreached):
        yield Finding(
            "doubt",
            f"Memory had not come back before {plural(len(unreached), 'attempt')} ({names(unreached)}).",
        )
    late = trials.loc[~trials["back_reached"].fillna(True), ["trial_id", "back_missing_bytes"]]
    if len(late):
        most = late["back_missing_bytes"].max()
        missing = f", up to {format_bytes(int(most))}" if not pd.isna(most) else ""
        yield Finding(
            "note",
            f"After {plural(len(late), 'attempt')} ({names(late['trial_id'])}) memory had not come back when the wait ended{missing}: "
            "what follows such an attempt would find less, and waits for it.",
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
    killed = _where(trials, "oom_kills")
    if len(killed):
        during = ", ".join(killed["trial_id"].astype(str).head(5))
        yield Finding(
            "note",
            f"The kernel killed a process of this host for memory during {plural(len(killed), 'attempt')} ({during}). It does not say "
            "whose: where the attempt failed as well, it is taken for the trial's own (out_of_memory).",
        )


def _instrument(seen: Evidence) -> Iterator[Finding]:
    """What was looked with: its rights, its cost, and where it contradicts itself."""
    trials = seen.trials
    unread = trials.loc[~trials["outside_readable"].fillna(True), "trial_id"]
    if len(unread):
        yield Finding(
            "doubt",
            f"From outside, the root of {plural(len(unread), 'worker')} could not be read: where it ran rests on its own word.",
        )
    cost = max((trials["sampling_cpu_s"] / trials["duration_s"]).dropna(), default=0.0)
    if cost > _SAMPLING_SHARE:
        yield Finding("note", f"Sampling cost up to {cost:.1%} of one core.")
    bare = trials.loc[trials["watchdog_unprotected"].fillna("") != "", "watchdog_unprotected"]
    if len(bare):
        yield Finding(
            "note",
            f"The watchdog could not protect itself fully ({bare.iloc[0]}): short of memory, it might have been too slow.",
        )
    told = Counter(
        word for each in seen.counted["ledger_disagreements"].dropna() for word in each.split(", ") if word
    )
    for what, times in sorted(told.items()):
        yield Finding(
            "doubt",
            f"Two sources disagree beyond the ledger's error bar about {what}, in {plural(times, 'trial')}: one of them is wrong there.",
        )


def _quiet(seen: Evidence) -> Iterator[Finding]:
    """Whether anyone else was moving memory."""
    counted = seen.counted
    own = counted["sizing_ballast_bytes"].fillna(0) + counted["sizing_orchestrator_bytes"].fillna(0)
    others = (counted["sizing_other_anon_bytes"] - own).dropna()
    if len(others) and others.max() - others.min() > _QUIET_BYTES:
        low, high = format_bytes(int(others.min())), format_bytes(int(others.max()))
        yield Finding(
            "doubt",
            f"The host was not quiet: other processes held between {low} and {high} at the moments of sizing.",
        )
    fallen = []
    for trial_id, attempt in zip(counted["trial_id"], counted["attempt"], strict=True):
        sampled = seen.samples.get(f"{trial_id}-{attempt}", pd.DataFrame())
        if "cached_bytes" in sampled:
            files = sampled["cached_bytes"] - sampled.get("shmem_bytes", pd.Series(0, sampled.index)).fillna(
                0
            )
            if (files.cummax() - files).max() > _QUIET_BYTES:
                fallen.append(trial_id)
    if fallen:
        yield Finding(
            "doubt",
            f"Page cache fell by more than {format_bytes(_QUIET_BYTES)} while {plural(len(fallen), 'attempt')} ran ({names(pd.Series(fallen))}): it was dropped, or reclaimed for this engine or somebody else.",
        )


def _guard(seen: Evidence) -> Iterator[Finding]:
    """What the gate waited for in vain, and what was counted while workers ran."""
    counted = seen.counted
    shut = counted.loc[counted["gate_unreached"].fillna("") != "", ["trial_id", "gate_unreached"]]
    if len(shut):
        what = ", ".join(sorted({word for each in shut["gate_unreached"] for word in each.split(", ")}))
        yield Finding(
            "doubt",
            f"The gate waited in vain before {plural(len(shut), 'trial')} ({names(shut['trial_id'])}): {what}.",
        )
    swapped = _where(counted, "guard_swapped_bytes")
    if len(swapped):
        yield Finding(
            "doubt",
            f"The host swapped up to {format_bytes(int(swapped['guard_swapped_bytes'].max()))} while {plural(len(swapped), 'trial')} ran ({names(swapped['trial_id'])}).",
        )
    stalled = _where(counted, "guard_stalled_share", _STALLED_SHARE)
    if len(stalled):
        yield Finding(
            "doubt",
            f"Tasks waited for memory in up to {stalled['guard_stalled_share'].max():.1%} of the time while {plural(len(stalled), 'trial')} ran ({names(stalled['trial_id'])}).",
        )
    slowed = _where(counted, "guard_throttled_share")
    if len(slowed):
        yield Finding(
            "note",
            f"A GPU was slowed for heat or power in up to {slowed['guard_throttled_share'].max():.1%} of the samples of {plural(len(slowed), 'trial')}: throughput is touched, capacity is not.",
        )
    foreign = _where(counted, "guard_foreign_gpu_processes")
    if len(foreign):
        yield Finding(
            "doubt",
            f"Somebody else computed on a GPU while {plural(len(foreign), 'trial')} ran ({names(foreign['trial_id'])}).",
        )


def _held(seen: Evidence) -> Iterator[Finding]:
    """Attempts that were void because the host state asked for was not reached or did not hold."""
    kept = ["reason", "trial_id", "message"]
    void = seen.trials.loc[seen.trials["reason"].isin(["not_reached", "not_quiet"]), kept]
    for reason, rows in void.groupby("reason"):
        said = str(rows["message"].fillna("").iloc[0])
        yield Finding(
            "note",
            f"{plural(len(rows), 'attempt')} void as {str(reason).replace('_', ' ')} ({names(rows['trial_id'])}){': ' + said if said else ''}.",
        )


def _orchestrator(seen: Evidence) -> Iterator[Finding]:
    """Whether the orchestrator grew: later blocks would then find less memory than earlier ones."""
    kept = ["executor", "started_at", "orchestrator_before_bytes"]
    rows = seen.trials[kept].dropna(subset=kept[1:]).sort_values("started_at")
    for executor, mine in rows.groupby(rows["executor"].fillna("?")):
        held = mine["orchestrator_before_bytes"]
        growth = int(held.iloc[-1] - held.iloc[0])
        if abs(growth) > _GROWTH_BYTES:
            by = f" of executor {executor}" if rows["executor"].nunique() > 1 else ""
            yield Finding(
                "doubt",
                f"The orchestrator{by} (Ray, this program, container daemons) {'grew' if growth > 0 else 'shrank'} by {format_bytes(abs(growth))} "
                f"during the run, from {format_bytes(int(held.iloc[0]))}: blocks are comparable inside, less so with each other.",
            )


def _gpu(seen: Evidence) -> Iterator[Finding]:
    """Clocks that were held back, and anybody else on the device."""
    counted = seen.counted
    foreign = _where(counted, "gpu_processes_before")
    if len(foreign):
        yield Finding(
            "doubt",
            f"Before {plural(len(foreign), 'trial')} ({names(foreign['trial_id'])}) another process was already on the GPU.",
        )
    held = counted.loc[counted["gpu_throttle_reasons"].fillna("") != "", ["gpu_throttle_reasons"]]
    if len(held):
        why = ", ".join(sorted({word for each in held["gpu_throttle_reasons"] for word in each.split(", ")}))
        yield Finding(
            "note",
            f"The GPU's clocks were held back in {plural(len(held), 'trial')} ({why}): throughput is touched, capacity is not.",
        )


def _exposure(seen: Evidence) -> Iterator[Finding]:
    """A container that has the GPU in another way than its users' containers have."""
    in_docker = seen.counted[seen.counted["environment"] == "docker"]
    for way, severity, words in _OTHER_WAYS:
        arms = sorted(in_docker.loc[in_docker["gpu_exposure"].fillna("") == way, "arm"].unique())
        if arms:
            named = ", ".join(map(str, arms))
            yield Finding(severity, f"The containers of {named} were given the GPU {words}.")


CHECKS = (_memory, _quiet, _guard, _held, _instrument, _orchestrator, _gpu, _exposure, matmul.doubts)
