"""The simulated engine: laws that hold to the byte, and disturbances that can be repeated. Its runs: `test_simulated_run.py`."""

import functools
import json
import math
import statistics
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from analysis import attribution, frames
from spark_ray import landscape, measurements
from spark_ray.engines import SimulatedEngine
from spark_ray.measurements import Measurements
from spark_ray.units import GIB, MIB, parse_size_bytes
from spark_ray.worker import engine_simulated, session
from spark_ray.worker import simulated_law as law

POINT = {"max_batch_size": 16, "max_num_tokens": 4096, "memory_fraction": 0.8}
BLOCK = 32 * 73728
SILENT = {"sd": "0B"}
MOMENTS = [law.Moment(block, position, 2) for block in range(2000) for position in (0, 1)]


def engine(**settings):
    return SimulatedEngine(kind="simulated", **{"noise": SILENT} | settings).model_dump(mode="json")


def effect(**settings):
    return engine(effect=settings)["effect"]


def capacity(settings, taken=None, **at):
    return law.capacity_bytes(settings, taken or {}, POINT | at, Random(0))  # noqa: S311


# ---- laws -------------------------------------------------------------------------------------------------


def test_each_law_is_the_engines_own():
    free = round((119.7 - 6.5 - 63.5) * GIB) - 16 * parse_size_bytes("51.2MiB")
    peak = parse_size_bytes("119.7GiB") - free + 4096 * 384 * 1024
    assert law.size(engine(), {}, POINT).available_bytes == pytest.approx(
        0.8 * (parse_size_bytes("119.7GiB") - peak), abs=2
    )
    found = law.size(engine(memory_view="memavailable"), {}, POINT)
    assert found.available_bytes == pytest.approx(0.8 * parse_size_bytes("119.7GiB") - peak, abs=2)
    assert capacity(engine()) == law.size(engine(), {}, POINT).available_bytes // BLOCK * BLOCK


def test_page_cache_is_in_the_peak_of_one_family_only():
    for view, lost in (("memfree", 0.8 * 10), ("memavailable", 0)):
        settings = engine(memory_view=view)
        for cached in (
            law.size(settings, effect(page_cache="10GiB"), POINT),
            law.size(settings, {}, POINT, law.Disturbance(page_cache_bytes=10 * GIB)),
        ):
            assert cached.page_cache_bytes == 10 * GIB
            plain = law.size(settings, {}, POINT).available_bytes
            assert plain - cached.available_bytes == pytest.approx(lost * GIB, abs=2)


def test_graphs_grow_with_the_batch_up_to_a_knee():
    sizes = [law.size(engine(graphs_up_to=64), {}, POINT | {"max_batch_size": n}) for n in (1, 64, 65, 256)]
    graphs = [sized.graphs_bytes / parse_size_bytes("51.2MiB") for sized in sizes]
    assert graphs == [1, 64, 64, 64]


def test_an_effect_is_memory_that_the_environment_takes():
    taken = effect(held="1GiB", per_token="128KiB", per_batch_doubling="100MiB", interaction="10MiB")
    wanted = GIB + 4096 * 128 * 1024 + 4 * 100 * MIB + 4 * 4 * 10 * MIB
    assert law.effect_bytes(taken, POINT) == wanted
    lost = law.size(engine(), {}, POINT).available_bytes - law.size(engine(), taken, POINT).available_bytes
    assert lost == pytest.approx(0.8 * wanted, abs=2)


@pytest.mark.parametrize("view", ["memfree", "memavailable"])
def test_a_share_is_one_of_the_kv_cache_in_both_families(view):
    settings = engine(memory_view=view)
    whole = law.size(settings, {}, POINT).available_bytes
    less = law.size(settings, effect(share=0.05), POINT).available_bytes
    assert less == pytest.approx(0.95 * whole, rel=1e-9)


def test_a_bump_is_smooth_and_only_on_the_axes_that_it_names():
    bump = {"takes": "5GiB", "around": {"max_batch_size": 16, "memory_fraction": 0.6}, "width_fraction": 0.1}
    taken = effect(bumps=[bump])
    at = {"max_batch_size": 16, "max_num_tokens": 300, "memory_fraction": 0.6}
    assert law.effect_bytes(taken, at) == 5 * GIB
    beside = law.effect_bytes(taken, at | {"memory_fraction": 0.7})
    assert beside == pytest.approx(5 * GIB * math.exp(-1 / 2))
    assert law.effect_bytes(taken, at | {"max_batch_size": 16 * 2**1.5}) == pytest.approx(beside)


def test_a_cap_a_cliff_and_too_little_memory():
    assert capacity(engine(max_tokens=32_000)) == 32_000 * 73728
    cliff = {"axis": "max_num_tokens", "above": 4096, "takes": "10GiB"}
    assert capacity(engine(cliffs=[cliff])) == capacity(engine())
    step = capacity(engine(), max_num_tokens=4097) - capacity(engine(cliffs=[cliff]), max_num_tokens=4097)
    assert step == pytest.approx(8 * GIB, abs=BLOCK)
    end = cliff | {"takes": "100GiB"}
    assert capacity(engine(cliffs=[end]), max_num_tokens=4097) is None
    assert capacity(engine(), effect(held="60GiB")) is None, "the weights do not fit"
    assert capacity(engine(max_seq_len=10**6)) is None, "not one sequence"
    with pytest.raises(ValidationError, match="more than memory_total"):
        SimulatedEngine(kind="simulated", weights="119GiB")


sizes = st.integers(0, 30).map(lambda n: f"{n}GiB")
points = st.builds(
    lambda batch, tokens, fraction: {"max_batch_size": batch, "max_num_tokens": tokens, "memory_fraction": fraction},
    st.integers(1, 1024), st.integers(1, 65536), st.floats(0.01, 0.99),
)  # fmt: skip
settings_ = st.builds(
    lambda view, cap, total, weights: engine(memory_view=view, max_tokens=cap, memory_total=total, weights=weights),
    st.sampled_from(["memfree", "memavailable"]), st.none() | st.integers(1, 10**6),
    st.sampled_from(["80GiB", "119.7GiB", "121.69GiB"]), sizes,
)  # fmt: skip
effects = st.builds(
    lambda held, cache, share, token: effect(held=held, page_cache=cache, share=share, per_token=f"{token}KiB"),
    sizes, sizes, st.floats(0, 0.9), st.integers(0, 512),
)  # fmt: skip
disturbances = st.builds(
    law.Disturbance, st.floats(-20 * GIB, 20 * GIB), st.floats(-0.5, 0.5), st.floats(0, 90 * GIB)
)


def measured(settings, taken, point, disturbed):
    """What the guest says of one trial, as the host reads it; None where it has no capacity."""
    talk = Talk(settings | {"effect": taken}, point)
    found = {}
    try:
        engine_simulated.measure(talk, found, disturbed)
    except (session.Infeasible, session.OutOfMemory):
        return None
    return Measurements.model_validate_json(json.dumps(found)).model_dump()


class Talk:
    """A worker's side of the conversation, with nobody at the other end."""

    def __init__(self, settings, configuration=None, arm="a", seed=0, **moment):
        self.engine = settings | {"moment": moment}
        self.configuration = configuration or POINT
        self.request = {"arm": arm, "seed": seed}
        self.phases = []

    def phase(self, name, **how):
        self.phases.append((name, how))


@given(settings_, effects, points, disturbances)
def test_whatever_happens_the_terms_reproduce_the_pool(settings, taken, point, disturbed):
    found = measured(settings, taken, point, disturbed)  # the models check the law to the byte
    if found is not None:
        sized = found["sizing"]
        info = sized["meminfo"]
        assert info["MemTotal"] == info["MemFree"] + info["Cached"] + info["AnonPages"]
        assert found["kv_cache"]["bytes"] <= sized["available_bytes"]
        assert sized["terms"]["own_bytes"] <= info["AnonPages"]


@given(settings_, effects, effects, points, disturbances, disturbances)
def test_a_difference_between_arms_telescopes_exactly(settings, one, other, point, here, there):
    pair = [measured(settings, one, point, here), measured(settings, other, point, there)]
    if None in pair:
        return
    base, arm = (frames.trials([as_record(found, point)], {}).iloc[0] for found in pair)
    terms = attribution.decompose(base, arm)
    change = arm["kv_cache_bytes"] - base["kv_cache_bytes"]
    assert sum(value for value in terms.values() if value is not None) == pytest.approx(change, abs=1)
    assert terms["rest"] == pytest.approx(0, abs=1)
    worth = 1 if settings["memory_view"] == "memavailable" else point["memory_fraction"]
    held = arm["sizing_other_anon_bytes"] - base["sizing_other_anon_bytes"]
    assert terms["other_processes"] == pytest.approx(-worth * held, abs=1)


def as_record(found, point):
    return {
        "arm": "a", "configuration": point, "engine": {"kind": "simulated"},
        "outcome": {"kind": "ok", "reason": "measured", "message": ""}, "result": {"measurements": found},
    }  # fmt: skip


def test_memory_of_the_machine_itself_is_worth_its_fraction_in_both_families():
    for view in ("memfree", "memavailable"):
        settings = [engine(memory_view=view, memory_total=total) for total in ("110GiB", "120GiB")]
        pair = [as_record(measured(each, {}, POINT, law.NOTHING), POINT) for each in settings]
        base, arm = (frames.trials([each], {}).iloc[0] for each in pair)
        terms = attribution.decompose(base, arm)
        assert terms["memory_total"] == pytest.approx(8 * GIB)
        assert terms["rest"] == pytest.approx(0, abs=1)


def test_two_families_cannot_be_divided_along_one_law():
    pair = [
        measured(engine(memory_view=view), {}, POINT, law.NOTHING) for view in ("memfree", "memavailable")
    ]
    base, arm = (frames.trials([as_record(each, POINT)], {}).iloc[0] for each in pair)
    terms = attribution.decompose(base, arm)
    assert {name for name, value in terms.items() if value is not None} == {"rest"}


# ---- disturbances -----------------------------------------------------------------------------------------


@functools.cache
def disturbing(**noise):
    return engine(noise=SILENT | noise)


def found(arm="a", seed=1, moment=law.Moment(), **noise):  # noqa: B008
    return law.found(disturbing(**noise), arm, seed, moment).taken_bytes


def test_a_trial_finds_the_same_again_and_another_one_something_else():
    noise = {"sd": "1GiB"}
    one = found(**noise)
    assert one == found(**noise)
    others = {found("b", **noise), found(seed=2, **noise), found(moment=law.Moment(1, 0, 2), **noise)}
    assert len(others | {one}) == 4
    assert found("b", **noise) == found("b", moment=law.Moment(0, 1, 2), **noise), (
        "of an arm, not of its place"
    )


def test_noise_has_the_spread_that_was_asked_for():
    own = [found(moment=moment, sd="1GiB") / GIB for moment in MOMENTS[::2]]
    assert (statistics.fmean(own), statistics.stdev(own)) == pytest.approx((0, 1), abs=0.08)
    bursts = [found(moment=moment, burst="4GiB", burst_share=0.1) / GIB for moment in MOMENTS[::2]]
    hit = [each for each in bursts if each]
    assert len(hit) / len(bursts) == pytest.approx(0.1, abs=0.03)
    assert min(hit) >= 4
    assert max(hit) <= 8
    relative = engine(noise={"relative_sd": 0.02})["noise"]
    shares = [law.own_disturbance(relative, Random(n)).taken_share for n in range(2000)]  # noqa: S311
    assert statistics.stdev(shares) == pytest.approx(0.02, rel=0.08)


def test_one_noise_does_not_move_another():
    noise = {"sd": "1GiB", "burst": "4GiB"}
    assert found(**noise) == found(**noise, relative_sd=0.1)
    often = found(moment=law.Moment(5), **noise, burst_share=0.999)
    assert (
        found(moment=law.Moment(5), **noise) + 4 * GIB
        <= often
        <= found(moment=law.Moment(5), **noise) + 8 * GIB
    )


def test_the_arms_of_a_block_share_what_they_share():
    by_arm = [[found(arm, moment=moment, shared_sd="1GiB") for moment in MOMENTS[:20:2]] for arm in "ab"]
    assert by_arm[0] == by_arm[1]
    assert len(set(by_arm[0])) == 10


def test_what_changes_with_time():
    at = {position: law.Moment(3, position, 2) for position in (0, 1)}
    assert found(moment=at[1], drift="1MiB") == 7 * MIB
    assert (found(moment=at[0], carry_over="1GiB"), found(moment=at[1], carry_over="1GiB")) == (0, GIB)
    assert found(moment=law.Moment(), start_up="2GiB") == 2 * GIB
    assert found(moment=law.Moment(2, 0, 2), start_up="2GiB", start_up_trials=4.0) == GIB
    cache = engine(page_cache={"start": "1GiB", "growth": "1GiB", "most": "5GiB"})
    grown = [law.found(cache, "a", 0, law.Moment(n)).page_cache_bytes / GIB for n in (0, 1, 4, 9)]
    assert grown == [1, 2, 5, 5]


def test_the_wander_is_an_ar1_process_that_any_trial_knows():
    settings = {"wander_sd": "1GiB", "wander_correlation": 0.8}
    walk = [found(moment=moment, **settings) / GIB for moment in MOMENTS[:1500]]
    assert statistics.stdev(walk) == pytest.approx(1, abs=0.15)
    assert statistics.correlation(walk[:-1], walk[1:]) == pytest.approx(0.8, abs=0.06)
    assert statistics.correlation(walk[:-2], walk[2:]) == pytest.approx(0.64, abs=0.1)
    assert found("b", moment=MOMENTS[700], **settings) / GIB == walk[700], "the host's, not the arm's"


# ---- what the guest says ----------------------------------------------------------------------------------


def test_a_trial_asks_nothing_of_the_host_and_says_what_it_is():
    talk, said = Talk(engine(), block=0, position=0, arms=2), {}
    engine_simulated.run(talk, said)
    assert talk.phases == [("sizing", {"settle": False}), ("end", {})]
    assert said["engine"]["simulated"] is True
    assert said["engine"]["name"] == "simulated (TensorRT-LLM's law)"
    assert said["sizing"]["law"] == "simulated: (total - peak) x fraction"
    assert said["sizing"]["view"] == "simulated: memfree"
    assert said["kv_cache"]["source"] == "simulated"


def test_the_worker_and_the_host_know_the_same_laws():
    assert set(law.LAWS.values()) == {measurements.LAW, measurements.LAW_VLLM}
    assert law.MARK == measurements.SIMULATED
    assert f"{engine_simulated.LANDSCAPE}.py" == landscape.MODULE


@pytest.mark.parametrize(
    ("settings", "raised", "words"),
    [
        ({"max_seq_len": 10**6}, session.Infeasible, "one request of max_seq_len 1000000 needs"),
        ({"effect": {"held": "60GiB"}}, session.OutOfMemory, "the simulated machine has"),
    ],
)
def test_no_capacity_is_an_answer(settings, raised, words):
    with pytest.raises(raised, match=words):
        engine_simulated.run(Talk(engine(**settings)), {})


def test_an_error_of_the_users_function_is_one_of_the_engine(monkeypatch):
    import sys
    import types

    module = types.ModuleType(engine_simulated.LANDSCAPE)
    module.kv_cache_bytes = lambda *_: 1 / 0
    monkeypatch.setitem(sys.modules, engine_simulated.LANDSCAPE, module)
    with pytest.raises(ZeroDivisionError):
        engine_simulated.run(Talk(engine(landscape={"file": "x.py"})), {})
    module.kv_cache_bytes = lambda *_: math.nan
    with pytest.raises(ValueError, match="gives nan"):
        engine_simulated.run(Talk(engine(landscape={"file": "x.py"})), {})
