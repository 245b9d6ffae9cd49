import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_ray.outcome import ANSWERS, VOID, Facts, capacity_problem, derive

KV = {
    "bytes": 64 * 8192,
    "blocks": 1,
    "tokens": 64,
    "tokens_per_block": 64,
    "bytes_per_token": 8192,
    "sequences": 0,
    "source": "fake",
}


def result(failure=None, **measurements):
    return {"failure": failure, "measurements": measurements or {"kv_cache": KV}}


FAILED = result({"kind": "engine_error", "reason": "x", "message": "a worker process died"})


@pytest.mark.parametrize(
    ("facts", "kind", "reason"),
    [
        (Facts(result(), exit_code=0), "ok", "measured"),
        (
            Facts(result({"kind": "infeasible", "reason": "pool", "message": ""}), exit_code=0),
            "infeasible",
            "pool",
        ),
        (Facts(result(throughput={}), exit_code=0), "engine_error", "no_capacity"),
        (Facts(None, exit_code=139), "crashed", "SIGSEGV"),
        (Facts(None, exit_code=3), "crashed", "exit_3"),
        (Facts(None, exit_code=0), "crashed", "no_result"),
        (Facts(None, exit_code=137), "disturbed", "killed_from_outside"),
        (Facts(result(), exit_code=137), "disturbed", "killed_from_outside"),
        (Facts(result(), exit_code=137, killed_by_host=True), "ok", "measured"),
        (Facts(result(), exit_code=137, killed_by_host=True, oom_kills=1), "ok", "measured"),
        (Facts(None, exit_code=137, killed_by_host=True), "crashed", "did_not_end"),
        (Facts(result(), exit_code=None, killed_by_host=True), "disturbed", "no_exit_status"),
        (Facts(None, exit_code=137, oom_kills=1), "out_of_memory", "kernel_oom_kill"),
        # The kernel killed a process of the engine: its parent fails, is brought down, or waits for ever.
        (Facts(FAILED, exit_code=0, oom_kills=1), "out_of_memory", "kernel_oom_kill"),
        (Facts(None, exit_code=1, oom_kills=1), "out_of_memory", "kernel_oom_kill"),
        (Facts(None, exit_code=137, oom_kills=1, stopped_by="deadline"), "out_of_memory", "kernel_oom_kill"),
        (Facts(FAILED, exit_code=0, oom_kills=1, not_quiet="swap"), "disturbed", "not_quiet"),
        (
            Facts(FAILED, exit_code=0, oom_kills=1, not_quiet="swap", own_oom_kill=True),
            "out_of_memory",
            "kernel_oom_kill",
        ),
        (
            Facts(FAILED, exit_code=0, oom_kills=1, not_reached="gate", own_oom_kill=True),
            "disturbed",
            "not_reached",
        ),
        (
            Facts(FAILED, exit_code=0, oom_kills=1, implausible=("implausible_model", "…")),
            "engine_error",
            "x",
        ),
        (Facts(result(), exit_code=0, oom_kills=1, own_oom_kill=True), "ok", "measured"),
        (Facts(None, exit_code=129, oom_kills=1), "disturbed", "host_side_gone"),
        (Facts(None, exit_code=None, oom_kills=1), "disturbed", "no_exit_status"),
        (Facts(FAILED, exit_code=0), "engine_error", "x"),
        (Facts(None, exit_code=137, stopped_by="deadline"), "timeout", "trial_timeout"),
        (Facts(None, exit_code=137, stopped_by="watchdog"), "host_wedged", "watchdog"),
        (Facts(None, exit_code=137, stopped_by="interrupt"), "disturbed", "interrupted"),
        (Facts(None, exit_code=129), "disturbed", "host_side_gone"),
        (Facts(None, exit_code=None), "disturbed", "no_exit_status"),
        (Facts(None, start_error="no such flag"), "crashed", "start_refused"),
        (Facts(None, lost="connection refused"), "disturbed", "environment_gone"),
        (
            Facts(result(), exit_code=0, contradictions=("root is the host's",)),
            "wrong_environment",
            "evidence",
        ),
        (Facts(result(), exit_code=0, not_reached="memory"), "disturbed", "not_reached"),
        (Facts(result(), exit_code=0, not_quiet="swap"), "disturbed", "not_quiet"),
        (Facts(None, stopped_by="deadline", not_quiet="swap"), "disturbed", "not_quiet"),
        (
            Facts(result(), exit_code=0, not_quiet="swap", contradictions=("x",)),
            "wrong_environment",
            "evidence",
        ),
        (Facts(result(), exit_code=139), "crashed", "SIGSEGV"),
    ],
)
def test_each_fact_has_its_outcome(facts, kind, reason):
    outcome = derive(facts)
    assert (outcome.kind, outcome.reason) == (kind, reason)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: (
            st.lists(x, max_size=3) | st.dictionaries(st.sampled_from([*KV, "kv_cache"]), x, max_size=8)
        ),
    )
)
def test_no_capacity_is_ever_ok_by_accident(measurements):
    if capacity_problem(measurements) is None:
        kv = measurements["kv_cache"]
        assert kv["bytes"] == kv["blocks"] * kv["tokens_per_block"] * kv["bytes_per_token"]
        assert kv["source"]


@given(
    st.builds(
        Facts,
        st.sampled_from([None, result(), result({"kind": "out_of_memory", "reason": "x", "message": ""})]),
        exit_code=st.sampled_from([None, 0, 1, 128, 129, 137, 139, 200, 255]),
        oom_kills=st.integers(0, 2),
        own_oom_kill=st.booleans(),
        stopped_by=st.sampled_from([None, "deadline", "watchdog", "interrupt"]),
        not_reached=st.sampled_from([None, "x"]),
        not_quiet=st.sampled_from([None, "x"]),
        contradictions=st.sampled_from([(), ("x",)]),
        start_error=st.sampled_from([None, "x"]),
    )
)
def test_derive_is_total_and_ok_needs_a_clean_end(facts):
    outcome = derive(facts)
    assert outcome.reason
    if outcome.kind == "ok":
        assert facts.exit_code == 0
        assert not (facts.stopped_by)
        assert not (facts.not_reached)
        assert not (facts.not_quiet)
        assert not (facts.contradictions)
        assert not (facts.start_error)
    assert not ANSWERS & VOID
