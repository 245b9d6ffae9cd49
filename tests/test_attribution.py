"""A difference divided into terms: whatever moves, and whatever was not read, they add up; each cause lands in its own term."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_frames import KV_BLOCK_BYTES, ONE_BLOCK, compose, record, table, two_gib_of_cache

from analysis import attribution, audit, contrasts, findings, fingerprint, report, sizing, steps, verdict
from spark_ray.units import GIB, MIB

FRACTION = ONE_BLOCK.configuration["memory_fraction"]
HOST = (
    "cache_fill", "cache_model", "cache_other", "per_cpu_free", "shared_memory", "ballast", "orchestrator",
    "other_processes", "kernel", "huge_pages", "driver", "weights", "own_other",
)  # fmt: skip


def state(arm="full", *, block=ONE_BLOCK, unread=(), **mib):
    """A record of a host on which each holder has some memory more, in MiB; `unread`: readings that are missing."""
    more = {name: mib.get(name, 0) * MIB for name in (*HOST, "memory_total", "nowhere", "activations")}
    found, fraction = record(block, arm), block.configuration["memory_fraction"]
    sized = found["result"]["measurements"]["sizing"]
    info = sized["meminfo"]
    cache = more["cache_fill"] + more["cache_model"] + more["cache_other"]
    own = more["weights"] + more["own_other"]
    info["Cached"] += cache + more["shared_memory"]
    info["Shmem"] += more["shared_memory"]
    info["AnonPages"] += own + more["ballast"] + more["orchestrator"] + more["other_processes"]
    info["Slab"] += more["kernel"]
    info["Hugetlb"] = more["huge_pages"]
    info["MemTotal"] += more["memory_total"]
    info["MemFree"] += more["memory_total"] - sum(more[name] for name in (*HOST, "nowhere"))
    transient = 20 * MIB + more["activations"]
    available = max(0, int((info["MemFree"] - transient) * fraction))
    sized |= {
        "total_bytes": info["MemTotal"],
        "free_bytes": info["MemFree"],
        "transient_bytes": transient,
        "available_bytes": available,
    }
    sized["per_cpu_free_bytes"] = 64 * MIB + more["per_cpu_free"]
    found["result"]["measurements"]["model"]["weight_bytes"] += more["weights"]
    blocks = available // KV_BLOCK_BYTES
    found["result"]["measurements"]["kv_cache"] |= {"bytes": blocks * KV_BLOCK_BYTES, "blocks": blocks}
    seen = found["inside"][1]
    seen["tree"]["pss_anon_bytes"] += own
    seen["model_files"] = {"resident_bytes": 100 * MIB + more["cache_model"]}
    found["treatment"] |= {"page_cache": {"fill_bytes": 2 * GIB}, "ballast": {"size_bytes": 2 * GIB}}
    footprint = {
        "ray": {"processes": 3, "pss_bytes": 900 * MIB, "pss_anon_bytes": 300 * MIB + more["orchestrator"]}
    }
    found["host"] |= {
        "at_sizing": {"fill_resident_bytes": more["cache_fill"], "ballast_resident_bytes": more["ballast"]},
        "orchestrator": {"before": footprint, "after": footprint},
        "ledger": [{"phase": "sizing", "driver_bytes": 3 * GIB + more["driver"]}],
    }  # fmt: skip
    for path in unread:
        place = found
        for key in path[:-1]:
            place = place[key]
        place.pop(path[-1], None)
    return found


READINGS = [
    ("result", "measurements", "sizing", "meminfo", name)
    for name in ("AnonPages", "Cached", "Slab", "Hugetlb", "Shmem", "MemTotal")
] + [
    ("result", "measurements", "sizing", "per_cpu_free_bytes"),
    ("result", "measurements", "sizing", "transient_bytes"),
    ("result", "measurements", "sizing", "law"),
    ("result", "measurements", "model"),
    ("host", "at_sizing"),
    ("host", "orchestrator"),
    ("host", "ledger"),
    ("inside",),
    ("treatment",),
]


def terms_of(base, arm):
    row = contrasts.pairs(table(base, arm), ("empty", "full"), "empty").iloc[0]
    found = {name: row[attribution.column(name)] for name in attribution.TERMS}
    return row, {name: size for name, size in found.items() if not pd.isna(size)}


amounts = st.dictionaries(
    st.sampled_from([*HOST, "memory_total", "nowhere", "activations"]), st.integers(0, 900), max_size=8
)


@settings(max_examples=25)
@given(
    amounts,
    amounts,
    st.lists(st.sampled_from(READINGS), max_size=3),
    st.lists(st.sampled_from(READINGS), max_size=3),
)
def test_terms_add_up_whatever_moves_and_whatever_was_not_read(before, after, unread_before, unread_after):
    row, terms = terms_of(state("empty", unread=unread_before, **before), state(unread=unread_after, **after))
    assert sum(terms.values()) == pytest.approx(row["delta_kv_cache_bytes"], abs=1e-3)


@pytest.mark.parametrize("cause", [*HOST, "memory_total", "activations"])
def test_a_cause_lands_in_its_own_term(cause):
    row, terms = terms_of(state("empty"), state(**{cause: 800}))
    sign = 1 if cause == "memory_total" else -1
    assert terms[cause] == pytest.approx(sign * FRACTION * 800 * MIB)
    assert terms[cause] / row["delta_kv_cache_bytes"] >= 0.95
    assert abs(terms["rest"]) < 1


def test_what_no_counter_holds_is_the_rest():
    row, terms = terms_of(state("empty"), state(nowhere=800))
    assert terms["rest"] == pytest.approx(-FRACTION * 800 * MIB)
    assert terms["rest"] / row["delta_kv_cache_bytes"] >= 0.95


@settings(max_examples=20)
@given(
    st.sampled_from(HOST),
    st.integers(400, 900),
    st.dictionaries(st.sampled_from(HOST), st.integers(0, 60), max_size=6),
)
def test_other_small_changes_take_nothing_from_a_cause(cause, size, others):
    _, terms = terms_of(state("empty"), state(**(others | {cause: size})))
    assert terms[cause] == pytest.approx(-FRACTION * size * MIB)


@pytest.mark.parametrize(
    ("cause", "unread", "taken"),
    [
        ("cache_fill", ("host", "at_sizing"), "cache_other"),  # asked for and not read: page cache of no name
        ("cache_model", ("inside",), "cache_other"),
        ("ballast", ("host", "at_sizing"), "other_processes"),
        ("orchestrator", ("host", "orchestrator"), "other_processes"),
        ("driver", ("host", "ledger"), "rest"),
        ("kernel", ("result", "measurements", "sizing", "meminfo", "Slab"), "rest"),
        ("own_other", ("inside",), "rest"),
        ("per_cpu_free", ("result", "measurements", "sizing", "per_cpu_free_bytes"), "rest"),
    ],
)  # fmt: skip
def test_a_reading_that_one_arm_lacks_is_never_zero(cause, unread, taken):
    base, arm = state("empty"), state(unread=[unread], **{cause: 800})
    if (
        cause == "per_cpu_free"
    ):  # the observation of the phase stands in for it, so it has to be missing as well
        del arm["inside"][1]["per_cpu_free_bytes"]
    _, terms = terms_of(base, arm)
    assert cause not in terms
    assert terms[taken] == pytest.approx(-FRACTION * 800 * MIB, rel=0.6)


def test_a_ballast_or_fill_that_was_not_asked_for_is_known_to_be_none():
    found = record(ONE_BLOCK, "empty")
    assert sizing.of_record(found)["sizing_fill_bytes"] == 0
    assert sizing.of_record(found)["sizing_ballast_bytes"] == 0
    assert sizing.of_record(found | {"treatment": None})["sizing_ballast_bytes"] is None


# ---- views ------------------------------------------------------------------------------------------------


def with_view(found, view, free, **more):
    sized = found["result"]["measurements"]["sizing"]
    available = max(0, int((free - sized["transient_bytes"]) * FRACTION))
    blocks = available // KV_BLOCK_BYTES
    sized |= {"view": view, "free_bytes": free, "available_bytes": available} | more
    found["result"]["measurements"]["kv_cache"] |= {"bytes": blocks * KV_BLOCK_BYTES, "blocks": blocks}
    return found


def test_where_available_memory_counts_page_cache_takes_nothing():
    base, arm = state("empty"), state(cache_other=2000)
    for each in (base, arm):
        with_view(each, "memavailable", 20 * GIB)
    row, terms = terms_of(base, arm)
    assert row["delta_kv_cache_bytes"] == 0
    assert terms["cache_other"] == pytest.approx(-terms["view"])
    assert sum(terms.values()) == pytest.approx(0)


def test_a_limit_that_rules_one_arm_has_the_whole_effect():
    base, arm = (
        with_view(state("empty"), "cgroup", state()["result"]["measurements"]["sizing"]["free_bytes"]),
        state(ballast=900),
    )
    with_view(arm, "cgroup", 3 * GIB, cgroup_limit_bytes=4 * GIB, cgroup_charged_bytes=GIB)
    row, terms = terms_of(base, arm)
    assert terms["view"] / row["delta_kv_cache_bytes"] >= 0.95
    assert terms["ballast"] == 0  # the host has far more than the limit: it does not matter


def test_two_limits_are_divided_into_limit_and_charge():
    base = with_view(state("empty"), "cgroup", 3 * GIB, cgroup_limit_bytes=4 * GIB, cgroup_charged_bytes=GIB)
    arm = with_view(
        state(weights=300), "cgroup", 4 * GIB, cgroup_limit_bytes=6 * GIB, cgroup_charged_bytes=2 * GIB
    )
    _, terms = terms_of(base, arm)
    assert terms["view"] == FRACTION * 2 * GIB
    assert terms["weights"] == -FRACTION * 300 * MIB
    assert terms["own_other"] == -FRACTION * (GIB - 300 * MIB)
    assert terms["rest"] == 0


def on_device(own, others, driver, free=70 * GIB, total=80 * GIB):
    found = with_view(state("full" if own else "empty"), "cuda", free, total_bytes=total)
    del found["result"]["measurements"]["sizing"]["meminfo"]
    held = 5 * GIB + own * MIB
    processes = [{"pid": 7, "used_bytes": held}, {"pid": 8, "used_bytes": others * MIB}]
    used = held + (others + driver) * MIB
    found["host"]["outside"] = {"worker_pid": 7}
    found["host"]["observations"].append(
        {"phase": "sizing", "gpus": [{"device": 0, "memory_used_bytes": used, "processes": processes}]}
    )
    return found


def test_a_device_of_its_own_is_divided_by_what_nvml_says():
    base, arm = on_device(0, 100, 50), on_device(400, 300, 60, free=70 * GIB - 610 * MIB)
    _, terms = terms_of(base, arm)
    assert terms["own_other"] == pytest.approx(-FRACTION * 400 * MIB)
    assert terms["other_processes"] == pytest.approx(-FRACTION * 200 * MIB)
    assert terms["driver"] == pytest.approx(-FRACTION * 10 * MIB)
    assert abs(terms["rest"]) < 1
    assert terms["cache_other"] == 0


def test_on_unified_memory_the_driver_holds_the_weights():
    base, arm = state("empty"), state(driver=900)
    for each in (base, arm):
        sized = each["result"]["measurements"]["sizing"]
        sized["view"] = "cuda"
        each["result"]["measurements"]["model"]["weight_bytes"] += 700 * MIB if each is arm else 0
    _, terms = terms_of(base, arm)
    assert terms["weights"] == pytest.approx(-FRACTION * 700 * MIB)
    assert terms["driver"] == pytest.approx(-FRACTION * 200 * MIB)
    assert abs(terms["rest"]) < 1


def test_another_law_explains_nothing_and_says_so():
    base, arm = state("empty"), state(ballast=900)
    for each in (base, arm):
        each["result"]["measurements"]["sizing"]["law"] = "the library's own"
    row, terms = terms_of(base, arm)
    assert terms == {"rest": row["delta_kv_cache_bytes"]}
    pairs = contrasts.pairs(table(base, arm), ("empty", "full"), "empty")
    assert "No term that was read explains it" in verdict.sentence(verdict.comparison(pairs, "full", "empty"))


# ---- TensorRT-LLM's law: a dry run with a cache of its own, a second reading, printed terms ---------------

STEP = 10_737_419  # 0.01 GiB, rounded up: how the engine prints


def as_printed(size):
    return round(round(size / GIB, 2) * GIB)


def tensorrt_llm(arm="full", *, unread=(), temporary=512, final=None, cap=None, **mib):
    """The record of `state` as TensorRT-LLM leaves it on unified memory: sizes from its log, meminfo from the worker.

    `temporary`: the dry run's cache, in MiB; `final`: MiB less than the first reading when the pool was built; `cap`: MiB.
    """
    found = state(arm, **mib)
    sized = found["result"]["measurements"]["sizing"]
    found["inside"][1]["meminfo"] = info = sized.pop("meminfo")
    for name in ("MemTotal", "MemFree"):
        info[name] += 3 * MIB  # a total that is no whole number of printed steps
    total, transient = info["MemTotal"], sized["transient_bytes"]
    free = info["MemFree"] - temporary * MIB  # the dry run holds its cache
    info["MemFree"] = free
    found["host"]["ledger"][0]["driver_bytes"] += temporary * MIB
    available = (free - transient + temporary * MIB) * FRACTION
    allowed = [available]
    terms = {"estimated_bytes": as_printed(available)}
    if cap is not None:
        allowed.append(cap * MIB)
        terms["estimated_bytes"] = as_printed(min(allowed))
    if final is not None:
        sized["final_available_bytes"] = int(available - final * MIB)
        allowed.append(sized["final_available_bytes"])
    blocks = int(min(allowed)) // KV_BLOCK_BYTES
    sized |= {
        "law": attribution.LAW_TRT_LLM, "view": "cuda", "resolution_bytes": STEP, "read_from": "log", "terms": terms,
        "total_bytes": as_printed(total), "free_bytes": as_printed(free), "transient_bytes": as_printed(transient),
        "temporary_kv_bytes": as_printed(temporary * MIB), "peak_bytes": as_printed(total - free + transient),
        "available_bytes": as_printed(available),
    }  # fmt: skip
    found["result"]["measurements"]["kv_cache"] |= {"bytes": blocks * KV_BLOCK_BYTES, "blocks": blocks}
    for path in unread:
        place = found
        for key in path[:-1]:
            place = place.get(key, {})
        place.pop(path[-1], None)
    return found


PRINTED = [("result", "measurements", "sizing", name) for name in (
    "temporary_kv_bytes", "final_available_bytes", "available_bytes", "terms", "resolution_bytes", "free_bytes", "law",
)] + [("inside",), ("host", "ledger"), ("result", "measurements", "model")]  # fmt: skip
engines = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.integers(0, 900) for name in (*HOST, "nowhere", "activations")},
        "temporary": st.integers(0, 900),
        "final": st.integers(-300, 300),
        "cap": st.integers(1000, 9000),
        "unread": st.lists(st.sampled_from(PRINTED), max_size=3),
    },
)


@settings(max_examples=25)
@given(engines, engines)
def test_printed_terms_add_up_whatever_moves_and_whatever_was_not_read(before, after):
    row, terms = terms_of(tensorrt_llm("empty", **before), tensorrt_llm(**after))
    assert sum(terms.values()) == pytest.approx(row["delta_kv_cache_bytes"], abs=1e-3)


@settings(max_examples=10)
@given(engines, amounts)
def test_terms_of_two_laws_add_up(before, after):
    row, terms = terms_of(tensorrt_llm("empty", **before), state(**after))
    assert sum(terms.values()) == pytest.approx(row["delta_kv_cache_bytes"], abs=1e-3)


@pytest.mark.parametrize("cause", [cause for cause in HOST if cause not in {"weights", "own_other"}])
def test_on_unified_memory_a_cause_lands_in_its_own_term_though_the_total_was_printed(cause):
    row, terms = terms_of(tensorrt_llm("empty"), tensorrt_llm(**{cause: 800}))
    assert terms[cause] == pytest.approx(-FRACTION * 800 * MIB)
    assert terms[cause] / row["delta_kv_cache_bytes"] >= 0.95
    assert abs(terms["rest"]) < 1
    assert abs(terms["view"]) <= STEP
    assert abs(terms["engine"]) <= KV_BLOCK_BYTES + 3 * STEP


def test_the_dry_runs_cache_takes_nothing_since_it_is_given_back():
    row, terms = terms_of(tensorrt_llm("empty", temporary=100), tensorrt_llm(temporary=900))
    assert terms["temporary_kv"] == pytest.approx(FRACTION * 800 * MIB, abs=STEP)
    assert terms["driver"] == pytest.approx(-FRACTION * 800 * MIB)  # it was in use when free memory was read
    assert abs(row["delta_kv_cache_bytes"]) <= KV_BLOCK_BYTES + 3 * STEP


def test_what_the_second_reading_took_is_its_own_term():
    row, terms = terms_of(tensorrt_llm("empty", final=-100), tensorrt_llm(final=700))
    assert terms["final_reading"] == pytest.approx(-700 * MIB, abs=STEP)
    assert terms["final_reading"] / row["delta_kv_cache_bytes"] >= 0.95
    assert abs(terms["engine"]) <= KV_BLOCK_BYTES + 3 * STEP


def test_a_cap_is_the_engines_and_the_second_reading_took_nothing_from_it():
    row, terms = terms_of(tensorrt_llm("empty", final=100), tensorrt_llm(final=100, cap=2000))
    assert terms["final_reading"] == pytest.approx(100 * MIB, abs=STEP)
    assert terms["engine"] == pytest.approx(row["delta_kv_cache_bytes"] - 100 * MIB, abs=3 * STEP)


def test_an_unread_second_reading_is_in_the_engines_term_and_not_zero():
    _, terms = terms_of(tensorrt_llm("empty", final=-100), tensorrt_llm(final=700, unread=[PRINTED[1]]))
    assert "final_reading" not in terms
    assert terms["engine"] == pytest.approx(-700 * MIB, abs=KV_BLOCK_BYTES + 3 * STEP)


def test_a_device_whose_total_is_not_all_memory_is_a_device():
    base, arm = tensorrt_llm("empty"), tensorrt_llm(cache_other=900)
    for each in (base, arm):
        each["result"]["measurements"]["sizing"]["total_bytes"] += 3 * STEP
    _, terms = terms_of(base, arm)
    assert terms["cache_other"] == 0
    assert sizing.reading(base) is None


# ---- the audit of the law ---------------------------------------------------------------------------------


def test_an_engine_in_a_process_below_the_worker_is_no_other_process():
    """`worker: mpi`: the worker has nothing on the device, or its context only."""
    plain, marked = (on_device(400, 300, 60) for _ in range(2))
    for each, pid in ((plain, 7), (marked, 5)):
        each["host"]["outside"] = {"worker_pid": pid}
    (device,) = marked["host"]["observations"][-1]["gpus"]
    device["processes"][0]["own"] = True
    names = ("own", "others", "driver")
    of = [
        [sizing.of_record(each)[f"sizing_device_{name}_bytes"] for name in names] for each in (plain, marked)
    ]
    assert of[0] == of[1] == [5 * GIB + 400 * MIB, 300 * MIB, 60 * MIB]
    device["processes"].append({"pid": 5, "used_bytes": 10 * MIB})  # the worker's context
    device["memory_used_bytes"] += 10 * MIB
    assert sizing.of_record(marked)["sizing_device_own_bytes"] == of[0][0] + 10 * MIB


def audit_of(second_source=True, moment="hook"):
    """What the audit says of two records that tell their capacity and their sizing moment so."""
    records = [tensorrt_llm(arm) for arm in ("empty", "full")]
    for each in records:
        each["engine"] = {"kind": "tensorrt_llm"}
        measured = each["result"]["measurements"]
        measured["engine"] = {"name": "TensorRT-LLM", "version": "1.2.1", "sizing_moment": moment}
        if second_source:
            measured["kv_cache"]["second_source"] = {"bytes": measured["kv_cache"]["bytes"], "source": "log"}
    trials = table(*records)
    trials["standing"] = "counts"
    seen = findings.Evidence({}, trials, contrasts.pairs(trials, ("empty", "full"), "empty"), {}, ("empty", "full"), "empty", "full", 0)  # fmt: skip
    return [(each.severity, each.sentence) for each in audit.findings(seen)]


def test_a_capacity_that_one_source_told_and_a_sizing_that_nobody_saw_are_said():
    alone, unseen = "KV capacity rests on one source alone", "the engine sized its pool unseen"

    def said(found):
        return [(severity, words) for severity, text in found for words in (alone, unseen) if words in text]

    assert said(audit_of()) == said(audit_of(moment="log line")) == []
    assert said(audit_of(second_source=False)) == [("doubt", alone)]
    assert said(audit_of(moment="before start")) == [("doubt", unseen)]


def law_findings(**changes):
    """What the audit says of the law when both records have these values in their sizing (numbers: so much more)."""
    records = [tensorrt_llm(arm) for arm in ("empty", "full")]
    for each in records:
        sized = each["result"]["measurements"]["sizing"]
        each["engine"] = {"kind": "tensorrt_llm"}
        for name, value in changes.items():
            sized[name] = sized[name] + value if isinstance(value, int) else value
    trials = table(*records)
    pairs = contrasts.pairs(trials, ("empty", "full"), "empty")
    seen = findings.Evidence({}, trials, pairs, {}, ("empty", "full"), "empty", "full", 0)
    said = [each.sentence for each in audit.findings(seen)]
    return [each for each in said if "sizing" in each or "printed" in each]


def test_printed_terms_that_agree_are_no_finding():
    assert law_findings() == []


@pytest.mark.parametrize("name", ["peak_bytes", "total_bytes", "temporary_kv_bytes", "available_bytes"])
def test_a_printed_term_off_the_law_is_a_finding(name):
    found = " ".join(law_findings(**{name: 5 * STEP}))
    assert "The sizing terms that the engine printed do not reproduce its pool size in 2 trials" in found


def test_a_pool_off_what_was_printed_for_it_is_a_finding():
    (found,) = law_findings(terms={"estimated_bytes": GIB})
    assert "more than one block off what the engine printed for it in 2 trials" in found


def test_a_law_that_cannot_be_checked_is_said():
    (found,) = law_findings(total_bytes=None, free_bytes=None)
    assert "could not be checked in 2 trials" in found


def test_an_engine_that_printed_no_law_at_all_is_said():
    (found,) = law_findings(law=None)
    assert "could not be checked in 2 trials" in found


# ---- over blocks ------------------------------------------------------------------------------------------


def frame(rows):
    """Pairs with these terms (None: not read), one row per block."""
    columns = {
        attribution.column(name): pd.array([row.get(name, 0.0) for row in rows], "Float64")
        for name in attribution.TERMS
    }
    total = [sum(size or 0.0 for size in row.values()) for row in rows]
    return pd.DataFrame(columns | {"delta_kv_cache_bytes": total})


def test_means_add_up_also_where_a_term_was_read_in_some_blocks_only():
    rows = [
        {"ballast": -10.0, "rest": 1.0},
        {"ballast": -12.0, "rest": 0.0},
        {"ballast": None, "rest": -11.0},
    ]
    found = attribution.attribute(frame(rows))
    assert found.unread == ("ballast",)
    assert "ballast" not in found.terms
    assert found.mean("rest") == pytest.approx(found.total.mean)
    assert found.explained == pytest.approx(0.0)


def test_the_share_explained_is_what_the_rest_leaves():
    found = attribution.attribute(frame([{"ballast": -95.0, "rest": -5.0}, {"ballast": -97.0, "rest": -3.0}]))
    assert found.explained == pytest.approx(0.96)
    assert found.terms["ballast"].low < -96 < found.terms["ballast"].high
    assert attribution.attribute(frame([{"ballast": 0.0, "rest": 0.0}])).explained is None


def test_the_summary_has_the_terms_with_their_intervals(tmp_path):
    summary = report.write(compose(tmp_path / "run", two_gib_of_cache, blocks=8))
    (found,) = summary["contrasts"]
    terms = found["attribution"]["terms"]
    assert sum(each["mean_bytes"] for each in terms.values()) == pytest.approx(
        found["mean_delta_kv_cache_bytes"]
    )
    cache = terms["cache_other"]  # the composed records have no reading of the fill: page cache of no name
    assert cache["low_bytes"] < cache["mean_bytes"] < cache["high_bytes"]
    assert cache["mean_bytes"] / found["mean_delta_kv_cache_bytes"] >= 0.95
    assert found["attribution"]["explained_share"] >= 0.99


@pytest.mark.parametrize("size", [100.0, 3e4, 5e9])
def test_the_waterfall_meets_itself_at_any_size(size):
    names = list(attribution.TERMS)[:9]
    rows = [
        {name: size * (0.5 + place + block / 10) * (-1) ** place for place, name in enumerate(names)}
        for block in range(3)
    ]
    pairs = frame(rows).assign(
        arm="full", outcome="ok", baseline_outcome="ok", contrast=0.1, baseline_kv_cache_bytes=80e9,
        predicted_delta_bytes=None, unpredicted_bytes=pd.array([None] * 3, "Float64"),
    )  # fmt: skip
    found = steps.waterfall(verdict.comparison(pairs, "full", "empty"))
    (bar,) = [trace for trace in found.figure.data if trace.type == "bar"]
    ends = [base + length for base, length in zip(bar.base, bar.x, strict=True)]
    assert len(bar.y) == len(names) + 2
    assert list(bar.base[1:-1]) == pytest.approx(ends[:-2])  # each begins where the one before ended
    assert ends[-2] == pytest.approx(ends[-1])  # and the last one at the arm's capacity


# ---- the fingerprint, which comes first -------------------------------------------------------------------


def evidenced(arm, kind="native", **evidence):
    found = record(ONE_BLOCK, arm)
    found["environment"] = {"kind": kind}
    found["result"]["evidence"] |= evidence
    return found


def rivals_of(base, arm):
    rows = fingerprint.compare([base, arm], ("empty", "full"))
    return [row.name for row in fingerprint.rivals(rows, ("empty", "full"), "empty", "full")]


def varying(arm, *versions):
    return [evidenced(arm, python=each) for each in versions]


@pytest.mark.parametrize(
    ("base", "arm", "differ"),
    [
        ("aaaa", "bbbb", True),
        ("aaaa", "aaaa", False),
        ("abcde", "abcdf", False),  # both vary, and share values: that is noise
        ("abc", "def", True),
        ("abcd", "abce", False),
        ("abcx", "abcy", False),
        ("a", "ab", True),
        ("bcd", "bcde", False),
        ("bcd", "efgh", True),
    ],
)
def test_arms_that_both_vary_differ_where_they_have_no_value_in_common(base, arm, differ):
    records = [*varying("empty", *base), *varying("full", *arm)]
    rows = fingerprint.compare(records, ("empty", "full"))
    rivals = fingerprint.rivals(rows, ("empty", "full"), "empty", "full")
    assert [row.name for row in rivals] == (["python"] if differ else [])


def test_of_many_values_those_come_first_that_the_other_arm_has_not():
    rows = fingerprint.compare([*varying("empty", *"abcd"), *varying("full", *"abcde")], ("empty", "full"))
    (row,) = (row for row in rows if row.name == "python")
    assert row.values == ("varies: a, b, c, …", "varies: e, a, b, …")


def test_amounts_in_an_engines_warnings_are_those_of_one_attempt():
    base, arm = evidenced("empty"), evidenced("full")
    for found, amount in ((base, 5), (arm, 77)):
        found["result"]["measurements"]["engine"] = {"log_warnings": f"lines disagree ({amount})"}
    assert rivals_of(base, arm) == []


def test_a_bound_driver_library_is_the_same_file():
    base = evidenced("empty", libraries=["/usr/lib/libcuda.so.580", "/lib/libc.so.6"])
    arm = evidenced("full", "docker", libraries=["/spark_ray/driver/libcuda.so.1", "/lib/libc.so.6"])
    assert rivals_of(base, arm) == ["libraries"]
    arm["content"] = {"mounts": [["/usr/lib/libcuda.so.580", "/spark_ray/driver/libcuda.so.1", True]]}
    assert rivals_of(base, arm) == []
    arm["content"] = {"mounts": [["/usr/lib", "/spark_ray/driver", True]]}
    assert rivals_of(base, arm) == ["libraries"]  # another file of that folder


def test_folders_of_the_run_have_the_same_name_everywhere():
    base = evidenced(
        "empty",
        environment={
            "SPARK_RAY_RUN": "/r",
            "XDG_CACHE_HOME": "/r/scratch/local-0/compile-cache/empty/cold/xdg",
            "PYTHONPATH": "/r/bundle",
        },
    )
    inside = {
        "SPARK_RAY_RUN": "/r",
        "XDG_CACHE_HOME": "/spark_ray/cache/xdg",
        "PYTHONPATH": "/spark_ray/bundle",
    }
    assert rivals_of(base, evidenced("full", "docker", environment=inside)) == []
    inside["XDG_CACHE_HOME"] = "/root/.cache"
    assert rivals_of(base, evidenced("full", "docker", environment=inside)) == ["variable.XDG_CACHE_HOME"]


def test_limits_and_mounts_are_rivals_where_the_environment_is_the_same():
    def mounted(options):
        return [{"source": "tmpfs", "target": "/dev/shm", "type": "tmpfs", "options": options}]

    base, limits = evidenced("empty", mounts=mounted("rw")), {"memlock": [65536, 65536]}
    assert rivals_of(base, evidenced("full", mounts=mounted("rw"), limits=limits)) == [
        "limits.memlock",
        "limits.nofile",
    ]
    assert rivals_of(base, evidenced("full", mounts=mounted("rw,size=64m"))) == ["mounts"]
    assert rivals_of(base, evidenced("full", "docker", mounts=mounted("rw,size=64m"))) == []


def test_what_differs_comes_before_what_was_measured(tmp_path):
    folder = compose(tmp_path / "run", two_gib_of_cache, blocks=2)
    report.write(folder)
    page = (folder / "report.html").read_text()
    order = [
        page.index(f"<h2>{heading}")
        for heading in ("What differs", "KV capacity by arm", "Figures", "Where the")
    ]
    assert order == sorted(order)
    assert page.index('id="verdict"') < order[0]


# ---- what the host says against it ------------------------------------------------------------------------


@pytest.mark.parametrize("generated", [True, False])
def test_what_a_capacity_was_not_held_against_is_said(tmp_path, generated):
    lacking = {"throughput": "the memory bandwidth is not known", "weights_above": "states may count"}

    def records(block, arm):
        found = record(block, arm, engine="tensorrt_llm")
        found["host"]["plausibility"] = {
            "held": [],
            "violated": {},
            "not_applied": lacking if arm == "full" else {},
        }
        measured = found["result"]["measurements"]
        measured.pop("throughput", None)
        if generated:
            measured["throughput"] = {"output_throughput_tokens_per_s": 9.0}
        if block.index:
            measured["kv_cache"]["second_source"] = {"bytes": measured["kv_cache"]["bytes"], "source": "log"}
        return [found]

    summary = report.write(compose(tmp_path / "run", records, engine="tensorrt_llm"))
    said = {each["sentence"]: each["severity"] for each in summary["findings"]}
    (alone,) = (words for words in said if "rests on one source alone in 2 trials" in words)
    (bounds,) = (words for words in said if "Not every bound" in words)
    assert (said[alone], said[bounds]) == ("doubt", "note")
    assert "in 4 trials" in bounds
    assert "weights above: states may count" in bounds
    assert ("throughput: the memory bandwidth is not known" in bounds) == generated


def test_every_doubt_of_gate_guard_watchdog_and_ledger_is_raised(tmp_path):
    def records(block, arm):
        found = record(block, arm)
        footprint = {
            "ray": {"processes": 2, "pss_bytes": (300 + 50 * block.index) * MIB},
            "podman": {"processes": 0},
        }
        found["host"] |= {
            "gate": {"reached": False, "temperature": {"reached": False}, "sm_clock": {"reached": True}},
            "guard": {"swapped_bytes": 5 * MIB, "stalled_share": 0.2, "throttled_share": 0.5, "foreign_gpu_processes": [{"pid": 3}]},
            "back": {"reached": False, "waited_s": 60.0, "wanted_bytes": 9 * GIB, "found_bytes": 8 * GIB},
            "watchdog": {"protections": {"mlock": True, "oom_score": "Permission denied"}},
            "ledger": [{"phase": "sizing", "quantities": [{"name": "free", "agree": False}, {"name": "total", "agree": True}]}],
            "orchestrator": {"before": footprint, "after": footprint},
        }  # fmt: skip
        return [found | {"started_at": f"2026-11-21T00:0{block.index}:00+00:00"}]

    summary = report.write(compose(tmp_path / "run", records))
    said = " ".join(each["sentence"] for each in summary["findings"])
    for words in (
        "The gate waited in vain before 8 trials", ": temperature.", "swapped up to 5.00 MiB", "up to 20.0% of the time",
        "in up to 50.0% of the samples", "Somebody else computed on a GPU while 8 trials", "had not come back when the wait ended, up to 1.00 GiB",
        "protect itself fully (oom_score: Permission denied)", "about free at sizing, in 8 trials", "grew by 150.00 MiB",
    ):  # fmt: skip
        assert words in said
    assert "total at sizing" not in said
