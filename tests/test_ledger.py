"""The ledger: exact by construction, nothing missing becomes 0, two sources are held against each other."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_launch import Bench, experiment
from test_observe import seen_in

from spark_ray import ledger
from spark_ray.observation import Ledger, Observation
from spark_ray.worker import observe

GIB = 1 << 30
COUNTERS = [
    "MemTotal", "MemFree", "Buffers", "Cached", "SwapCached", "Shmem", "AnonPages", "Slab", "SReclaimable", "KReclaimable",
    "KernelStack", "VmallocUsed", "PageTables", "SecPageTables", "Percpu", "Zswap", "Hugetlb", "Active", "Inactive",
    "Unevictable", "Balloon", "Novel",
]  # fmt: skip
counters = st.integers(-(1 << 63), (1 << 64) - 1)
meminfos = st.dictionaries(st.sampled_from(COUNTERS), counters)
sizes = st.integers(0, (1 << 60) - 1)
maybe_size = st.none() | sizes


def optional(**fields):
    """Objects in which each field may be missing."""
    return st.fixed_dictionaries({}, optional=fields)


groups = optional(path=st.sampled_from(["/", "/a", "/b"]), anon_bytes=maybe_size, file_bytes=maybe_size)
trees = st.fixed_dictionaries(
    {"processes": sizes}, optional={"pss_anon_bytes": maybe_size, "pss_file_bytes": maybe_size}
)
processes = st.lists(st.fixed_dictionaries({"pid": sizes}, optional={"used_bytes": maybe_size}), max_size=2)
gpus = st.lists(
    st.fixed_dictionaries(
        {"device": sizes},
        optional={
            "memory_total_bytes": maybe_size, "memory_used_bytes": maybe_size, "processes": st.none() | processes,
            "absent": st.none() | st.just({"memory_total_bytes": "Not Supported"}),
        },
    ),
    max_size=2,
)  # fmt: skip
observations = st.fixed_dictionaries(
    {
        "phase": st.sampled_from(["before_launch", "sizing", "end"]), "monotonic_s": st.just(1.0), "cost_s": st.just(0.0),
        "meminfo": meminfos, "cgroup": groups,
    },
    optional={
        "per_cpu_free_bytes": maybe_size,
        "steadiness": st.none() | st.fixed_dictionaries({"tries": sizes, "spread_bytes": sizes, "agreed": st.booleans()}),
        "batches": st.none() | st.fixed_dictionaries({"free_bytes": sizes, "counter_bytes": sizes}),
        "tree": st.none() | trees,
        "model_files": st.none() | st.fixed_dictionaries({"files": sizes}, optional={"resident_bytes": maybe_size}),
        "cuda": st.none() | st.fixed_dictionaries({"free_bytes": sizes, "total_bytes": sizes}),
        "gpus": st.none() | gpus,
        "absent": st.none() | st.just({"per_cpu_free_bytes": "no such file"}),
    },
)  # fmt: skip


@given(inside=st.lists(observations, max_size=3), outside=st.lists(observations, max_size=3))
def test_any_observations_give_one_exact_ledger_each(inside, outside):
    for each in [*inside, *outside]:
        Observation.model_validate(each)
    before = copy.deepcopy((inside, outside))
    made = ledger.ledgers(inside, outside)
    assert (inside, outside) == before
    assert [each["phase"] for each in made] == [each["phase"] for each in outside]
    for each, seen in zip(made, outside, strict=True):
        Ledger.model_validate(json.loads(json.dumps(each)))
        assert ("total_bytes" in each) == ("MemTotal" in seen["meminfo"])
        if "total_bytes" in each:
            assert sum(each["parts"].values()) + each["residual_bytes"] == seen["meminfo"]["MemTotal"]
        assert each.get("driver_bytes", each.get("residual_bytes")) == each.get("residual_bytes")
        assert each["error_bytes"] == sum(each["error_terms"].values())


@given(seen=observations)
def test_what_is_missing_is_listed_and_never_0(seen):
    """Each part is there or absent with a reason; so is each field that a part is made of."""
    made = ledger.balance(seen)
    absent = made.get("absent", {})
    assert set(made["parts"]) | {name for name in absent if name in ledger.PARTS} == set(ledger.PARTS)
    assert not set(made["parts"]) & set(absent)
    assert all(absent.values())
    for part, (main, added, taken) in ledger._PARTS.items():
        assert (part in made["parts"]) == (main in seen["meminfo"])
        if part in made["parts"]:
            missing = {each for each in (*added, *taken) if each not in seen["meminfo"]}
            assert missing <= absent.keys()


@given(
    amount=st.integers(1, 64 * GIB),
    field=st.sampled_from(["MemFree", "AnonPages", "Cached", "Slab", "Hugetlb"]),
)
def test_what_goes_into_a_counter_leaves_the_residual(amount, field):
    seen = seen_in("gb10")
    more = copy.deepcopy(seen)
    more["meminfo"][field] += amount
    before, after = ledger.balance(seen), ledger.balance(more)
    assert before["residual_bytes"] - after["residual_bytes"] == amount


# ---- parts --------------------------------------------------------------------------------------------------


def test_shared_memory_is_counted_once():
    made = ledger.balance(seen_in("gb10"))
    assert made["parts"]["page_cache"] == (42 * GIB + (256 << 20)) - GIB // 2
    assert made["parts"]["shared_memory"] == GIB // 2


def test_kernel_stacks_are_in_vmalloc_unless_that_is_not_counted():
    seen = seen_in("gb10")
    with_vmalloc = ledger.balance(seen)["parts"]["kernel"]
    seen["meminfo"]["KernelStack"] += 1 << 20  # still less than VmallocUsed
    assert ledger.balance(seen)["parts"]["kernel"] == with_vmalloc
    seen["meminfo"]["VmallocUsed"] = 0  # before Linux 5.3
    assert ledger.balance(seen)["parts"]["kernel"] == with_vmalloc - (64 << 20) + (21 << 20)


def test_an_old_kernel_has_a_ledger_that_says_what_it_cannot_know():
    made = ledger.balance(seen_in("bare"))
    assert {"huge_pages", "per_cpu_free", "Percpu", "SecPageTables", "KReclaimable"} <= made["absent"].keys()
    assert any("lag behind is not known" in note for note in made["notes"])
    assert made["error_terms"] == {"spread": 0}


def test_the_error_bar_is_the_spread_and_what_the_counters_may_hide():
    seen = seen_in("gb10")
    seen["steadiness"] = {"tries": 3, "spread_bytes": 5 << 20, "agreed": False}
    seen["meminfo"]["SwapCached"] = 3 << 20
    made = ledger.balance(seen)
    # 46 + 3 GiB and a bit on the lists, 42 + 7 and a bit by kind, the swap cache among them
    assert made["error_terms"] == {
        "spread": 5 << 20, "batches": (20 * 210 + 7 * 20 * 110) * 4096, "swap_cache": 3 << 20, "in_flight": 3 << 20
    }  # fmt: skip
    assert "did not hold still" in made["notes"][0]
    assert ledger.balance(seen, error=7)["error_bytes"] == 7


# ---- whose the residual is ----------------------------------------------------------------------------------

NO_MEMORY = {"device": 0, "processes": [], "absent": {"memory_total_bytes": "Not Supported"}}


def test_on_unified_memory_the_residual_is_the_drivers():
    seen = seen_in("gb10")
    assert "driver_bytes" not in ledger.balance(seen)
    seen["gpus"] = [NO_MEMORY]
    made = ledger.balance(seen)
    assert made["driver_bytes"] == made["residual_bytes"] > 59 * GIB
    assert "driver_bytes" not in ledger.balance(seen, drivers=False)


def test_cuda_that_numbers_all_of_memory_says_unified_for_the_whole_attempt():
    inside = seen_in("gb10") | {"cuda": {"free_bytes": 12 * GIB, "total_bytes": 130663006208}}
    made = ledger.ledgers([inside], [seen_in("gb10", "before_launch"), seen_in("gb10")])
    assert all("driver_bytes" in each for each in made)


def test_a_discrete_gpu_leaves_the_residual_nobodys():
    seen = seen_in("gb10") | {
        "gpus": [{"device": 0, "memory_total_bytes": 80 * GIB, "memory_used_bytes": 5 * GIB}]
    }
    inside = seen_in("gb10") | {"cuda": {"free_bytes": 74 * GIB, "total_bytes": 79 * GIB}}
    made = ledger.ledgers([inside], [seen])[0]
    assert "driver_bytes" not in made
    used = by_name(made)["device_used"]
    assert used["values"] == {"CUDA total - free": 5 * GIB, "NVML used": 5 * GIB}
    assert used["agree"]


# ---- two sources --------------------------------------------------------------------------------------------


def by_name(made):
    return {each["name"]: each for each in made["quantities"]}


def gb10_attempt(nvml_bytes=59 * GIB, cuda_free=12 * GIB):
    """An engine on unified memory, seen from both sides: (inside, outside)."""
    before = seen_in("gb10", "before_launch") | {"gpus": [NO_MEMORY]}
    before["cgroup"] = {"path": "/user.slice"}
    before["meminfo"] = before["meminfo"] | {
        "MemFree": 71 * GIB
    }  # the driver holds half a GiB or so for itself
    outside = seen_in("gb10") | {"gpus": [NO_MEMORY | {"processes": [{"pid": 7, "used_bytes": nvml_bytes}]}]}
    inside = seen_in("gb10") | {
        "cuda": {"free_bytes": cuda_free, "total_bytes": 130663006208},
        "model_files": {"files": 2, "resident_bytes": 30 * GIB},
    }
    return [inside], [before, outside]


def test_every_second_source_on_unified_memory_agrees():
    made = ledger.ledgers(*gb10_attempt())[1]
    found = by_name(made)
    assert set(found) == {
        "total", "free", "guest_anonymous", "guest_file_pages", "model_files", "driver", "user_memory"
    }  # fmt: skip
    assert found["total"]["values"]["CUDA total"] == found["total"]["values"]["MemTotal outside"]
    assert found["free"]["used"] == "MemFree inside"
    assert [name for name in ("total", "free", "guest_anonymous", "driver") if not found[name]["agree"]] == []
    assert "agree" not in found["guest_file_pages"]  # they count different things on purpose
    assert found["model_files"]["values"] == {"resident": 30 * GIB, "cgroup": 33 * GIB}


def test_disagreement_beyond_the_bar_is_flagged():
    found = by_name(ledger.ledgers(*gb10_attempt(nvml_bytes=40 * GIB, cuda_free=30 * GIB))[1])
    assert [found[name]["agree"] for name in ("driver", "free", "total")] == [False, False, True]
    assert found["driver"]["difference_bytes"] > 19 * GIB > found["driver"]["bar_bytes"]


def test_an_empty_process_list_is_no_second_source():
    inside, outside = gb10_attempt()
    outside[1]["gpus"] = [NO_MEMORY]
    assert "driver" not in by_name(ledger.ledgers(inside, outside)[1])


def test_a_group_that_is_the_drivers_too_says_nothing_of_the_guest():
    before, after = seen_in("v1", "before_launch"), seen_in("v1")
    assert "cgroup" not in str(ledger.ledgers([], [before, after])[1]["quantities"])
    before["cgroup"] = {"path": "/elsewhere"}
    found = by_name(ledger.ledgers([], [before, after])[1])["guest_anonymous"]
    assert found["values"] == {"process tree outside": 70 << 20, "cgroup": 70 << 20}


def test_a_container_that_is_shown_another_meminfo_is_found_out():
    inside, outside = [seen_in("bare")], [seen_in("v2")]
    total = by_name(ledger.ledgers(inside, outside)[0])["total"]
    assert not total["agree"]
    assert total["used"] == "MemTotal outside"


def test_each_reading_of_the_worker_is_used_once():
    inside = [seen_in("v1", "sizing"), seen_in("v2", "sizing")]
    made = ledger.ledgers(inside, [seen_in("v1", "sizing")] * 3)
    trees = [by_name(each).get("guest_anonymous", {"values": {}})["values"] for each in made]
    assert [each.get("process tree inside") for each in trees] == [
        inside[0]["tree"]["pss_anon_bytes"], inside[1]["tree"]["pss_anon_bytes"], None
    ]  # fmt: skip


# ---- this machine -------------------------------------------------------------------------------------------


@pytest.mark.root
def test_on_this_machine_the_parts_are_the_whole():
    """Nothing of this size is missing, or there twice, once the lists are counted; which needs no quiet machine."""
    made = ledger.balance(observe.observe("now"))
    share = abs(made["residual_bytes"]) / made["total_bytes"]
    print(
        f"residual {made['residual_bytes'] / GIB:.3f} GiB ({share:.2%}), error bar {made['error_bytes'] / GIB:.3f} GiB"
    )
    assert share < 0.02  # below 0: something counted twice
    assert by_name(made)["user_memory"]["difference_bytes"] < made["total_bytes"] * 0.01


@pytest.mark.process
@pytest.mark.parametrize("environment", ["native", pytest.param("docker", marks=pytest.mark.docker)])
def test_a_real_attempt_has_a_ledger_of_each_observation(tmp_path, environment):
    bench = Bench(tmp_path / "run", experiment(arms=(environment, "native"), allocate="64MiB"))
    try:
        record = bench.run()
    finally:
        bench.close()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    host = record["host"]
    assert [each["phase"] for each in host["ledger"]] == [each["phase"] for each in host["observations"]]
    sizing = next(each for each in host["ledger"] if each["phase"] == "sizing")
    total, guest = (by_name(sizing)[name] for name in ("total", "guest_anonymous"))
    assert total["agree"]
    assert set(total["values"]) == {"MemTotal outside", "MemTotal inside"}
    assert guest["agree"], guest
    assert ("cgroup" in guest["values"]) == (environment == "docker")
