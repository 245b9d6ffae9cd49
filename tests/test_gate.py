"""What an attempt waits for, and what is counted while it runs: with GPUs that answer as told."""

import itertools
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_launch import Bench

from spark_ray import conditions, environments, gate, guard, host, nvml
from spark_ray.conditions import Gate
from spark_ray.experiment import Experiment

COOL = {"device": 0, "temperature_celsius": 40, "sm_clock_mhz": 300, "max_sm_clock_mhz": 3000, "throttle_reasons": ["idle"], "processes": []}  # fmt: skip
RUN = "/runs/one"


class Gpus:
    """Stands in for nvml.Reader: a list of readings a look, the last one for ever; or no driver."""

    def __init__(self, *looks, why_not=None):
        self._looks = itertools.chain(looks, itertools.repeat(looks[-1] if looks else []))
        self.why_not, self.asked, self.count = why_not, 0, len(looks[-1]) if looks else 0

    def read(self, questions=()):
        assert set(questions) <= set(nvml.QUESTIONS)
        self.asked += 1
        return next(self._looks)

    def close(self):
        pass

    def processes(self):
        return [
            {"device": each["device"], **p} for each in next(self._looks) for p in each.get("processes", ())
        ]


@pytest.fixture
def kin():
    return host.Kin(environments.RUN_VARIABLE, RUN)


@pytest.fixture
def stranger():
    """A real process that is no descendant of this one."""
    spawn = "import subprocess, sys; print(subprocess.Popen(['sleep', '60'], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    done = subprocess.run(
        [sys.executable, "-c", spawn], capture_output=True, text=True, check=True, timeout=600
    )
    pid = int(done.stdout)
    yield pid
    os.kill(pid, 9)


def wait(gpus, kin, **wanted):
    return gate.wait(Gate.model_validate({"longest": "100ms", **wanted}), gpus, kin, lambda: False)


# ---- the gate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "why"),
    [
        (Gpus(why_not="no NVIDIA driver answers: x"), "no NVIDIA driver answers: x"),
        (Gpus(), "this host has no GPU"),
    ],
)
def test_without_a_gpu_nothing_is_reached_and_the_reason_is_there(gpus, why, kin):
    found = wait(gpus, kin)
    assert found["reached"] is None
    assert found["absent"] == dict.fromkeys(gate.CONDITIONS, why)
    assert not set(gate.CONDITIONS) & set(found)
    assert gate.not_reached(found) is None


def test_what_a_device_refuses_is_absent_in_its_words(kin):
    gpus = Gpus([{"device": 0, "processes": [], "absent": {"temperature_celsius": "Not Supported"}}])
    found = wait(gpus, kin)
    assert found["absent"] == {"temperature": "Not Supported", "sm_clock": "not asked for"}
    assert found["foreign_gpu_processes"]["reached"] is True
    assert found["reached"] is True


def test_a_warm_gpu_is_waited_for_and_each_condition_says_how_long(kin, monkeypatch):
    monkeypatch.setattr(gate, "_LOOK_EVERY_S", 0.001)
    warm = COOL | {"temperature_celsius": 90}
    found = wait(Gpus([warm], [warm], [COOL]), kin, longest="10s")
    assert found["reached"] is True
    assert found["temperature"] == {
        "reached": True, "waited_s": found["temperature"]["waited_s"], "wanted_celsius": 75, "found_celsius": [40],
    }  # fmt: skip
    assert found["temperature"]["waited_s"] > found["foreign_gpu_processes"]["waited_s"]
    assert found["waited_s"] >= found["temperature"]["waited_s"]


def test_what_was_not_reached_in_time_is_said_with_what_was_found(kin):
    found = wait(Gpus([COOL | {"temperature_celsius": 90}]), kin)
    assert found["reached"] is False
    assert gate.not_reached(found) == "gate: GPU 0 is at 90 °C; at most 75 is wanted; waited 0 s"
    assert wait(Gpus([COOL | {"temperature_celsius": 90}]), kin, temperature_celsius=None)["reached"] is True


@pytest.mark.parametrize(
    ("reading", "reached", "words"),
    [
        ({}, True, None),  # idle: low, and nothing holds it there
        (
            {"throttle_reasons": ["sw_power_cap"]},
            False,
            "GPU 0 is held back by sw_power_cap; 2000 MHz are wanted",
        ),
        ({"throttle_reasons": ["sw_power_cap"], "sm_clock_mhz": 2100}, True, None),
        ({"max_sm_clock_mhz": 1500}, False, "GPU 0 can never reach it; 2000 MHz are wanted"),
    ],
)
def test_a_capped_clock_is_not_an_idle_one(reading, reached, words, kin):
    found = wait(Gpus([COOL | reading]), kin, sm_clock_mhz=2000)
    assert found["sm_clock"]["reached"] is reached
    assert found.get("unmet") == words


def test_what_no_wait_can_mend_is_not_waited_for(kin):
    gpus = Gpus([COOL | {"max_sm_clock_mhz": 1500}])
    assert wait(gpus, kin, sm_clock_mhz=2000, longest="1h")["reached"] is False
    assert gpus.asked == 1


def test_a_foreign_process_on_a_gpu_is_waited_for_or_accepted(kin, stranger):
    gpus = [COOL | {"processes": [{"pid": stranger, "used_bytes": 5}]}]
    found = wait(Gpus(gpus), kin)
    assert found["foreign_gpu_processes"]["found"] == [
        {"device": 0, "pid": stranger, "used_bytes": 5, "name": "sleep"}
    ]
    assert gate.not_reached(found).startswith(f"gate: sleep (process {stranger}) on GPU 0 computes as well")
    accepted = wait(Gpus(gpus), kin, foreign_gpu_processes="accept")
    assert accepted["reached"] is True
    assert len(accepted["foreign_gpu_processes"]["found"]) == 1


def test_a_stop_ends_the_wait(kin):
    hot = Gpus([COOL | {"temperature_celsius": 90}])
    assert gate.wait(Gate.model_validate({"longest": "1h"}), hot, kin, lambda: True)["reached"] is False


# ---- who is ours ------------------------------------------------------------------------------------------


def test_ours_are_descendants_the_guest_and_whoever_bears_the_runs_name(kin, stranger):
    """A child, a guest that a daemon started, and another slot's guest are ours; the ended and the unseen are nobody's."""
    variables = {environments.RUN_VARIABLE: RUN}
    spawn = "import subprocess; print(subprocess.Popen(['sleep', '60'], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    done = subprocess.run([sys.executable, "-c", spawn], capture_output=True, text=True, check=True, env=variables, timeout=600)  # fmt: skip
    other_slot = int(done.stdout)
    with subprocess.Popen(["sleep", "60"]) as child:
        asked = [{"pid": pid} for pid in (child.pid, stranger, other_slot, 1 << 30)]
        assert [each["pid"] for each in kin.foreign(asked)] == [stranger]
        kin.guest = stranger
        assert kin.foreign(asked) == []
        assert host.Kin(environments.RUN_VARIABLE, "/runs/other").foreign(asked)[-1]["pid"] == other_slot
        child.kill()
    os.kill(other_slot, 9)


def test_the_first_process_of_a_guest_is_found_from_its_worker():
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as shell:
        assert host.first_of(shell.pid) == shell.pid, "not this process"
        from helpers import wait_until

        from spark_ray.worker.observe import descendants

        assert wait_until(lambda: len(descendants(shell.pid)) == 2)
        sleeper = descendants(shell.pid)[1]
        assert host.first_of(sleeper) == shell.pid
        os.kill(sleeper, 9)
    with pytest.raises(ProcessLookupError):
        host.parent_of(1 << 30)


# ---- the guard --------------------------------------------------------------------------------------------


def gpu_row(device=0, clock=2000, reasons=0, busy=90):
    named = {
        "device": device,
        "sm_clock_mhz": clock,
        "throttle_reasons": reasons,
        "utilization_percent": busy,
    }
    return tuple(named.get(name, 1.0) for name in nvml.SAMPLE_FIELDS)


def test_all_is_counted_on_this_host_and_without_a_gpu_the_rest_is_absent(kin):
    one = guard.Guard(Gpus(why_not="no NVIDIA driver answers: x"), kin)
    one.look()
    found = one.end([])
    assert found.get("swapped_bytes", 0) >= 0
    assert ("swapped_bytes" in found) != ("swapped_bytes" in found["absent"])
    assert 0 <= found["stalled_share"] <= 1 or "stalled_share" in found["absent"]
    unseen = {"foreign_gpu_processes", "throttled_share", "busy_sm_clock_mhz"}
    assert unseen <= set(found["absent"])
    assert not unseen & set(found)
    strict = conditions.Guard(throttled=0.001, sm_clock_mhz=5000)
    assert guard.not_quiet(found, strict) is None, "what is absent is no breach"


@pytest.mark.parametrize(
    ("counted", "bound", "words"),
    [
        ({"swapped_bytes": 2 << 20}, {"swapped": "1MiB"}, "2.00 MiB were swapped, at most 1.00 MiB"),
        ({"stalled_share": 0.2}, {"stalled": 0.1}, "waited for memory in 20.0% of the time, at most 10.0%"),
        ({"throttled_share": 0.5, "throttle_reasons": {"hw_slowdown": 0.5}}, {"throttled": 0.4}, "slowed in 50.0% of its samples (hw_slowdown)"),
        ({"busy_sm_clock_mhz": 900.0}, {"sm_clock_mhz": 1000}, "a busy GPU was 900 MHz, at least 1000"),
    ],
)  # fmt: skip
def test_a_breach_says_what_and_how_much_and_without_a_bound_there_is_none(counted, bound, words):
    assert words in guard.not_quiet(counted, conditions.Guard.model_validate(bound))
    assert guard.not_quiet(counted, conditions.Guard()) is None


@given(
    st.lists(
        st.builds(
            gpu_row,
            st.integers(0, 2),
            st.none() | st.integers(0, 5000),
            st.none() | st.integers(0, 1 << 12),
            st.none() | st.integers(0, 100),
        )
    )
)
def test_shares_are_shares_whatever_the_devices_say(rows):
    share, reasons = guard._throttled(rows)
    assert share is None or 0 <= share <= 1
    assert all(0 < each <= (share or 0) for each in reasons.values())
    clock = guard._busy_clock(rows)
    assert clock is None or any(row[guard._BUSY] for row in rows)


# ---- in an attempt ----------------------------------------------------------------------------------------


def fake_experiment(limits, **engine):
    from helpers import experiment_data

    return Experiment.model_validate(experiment_data(limits=limits, **engine))


@pytest.mark.process
def test_an_attempt_that_the_gate_refuses_is_not_executed(tmp_path):
    one = Bench(tmp_path / "run", fake_experiment({"gate": {"longest": "50ms"}}))
    one.runner._launcher._gpus = Gpus([COOL | {"temperature_celsius": 90}])
    record = one.run()
    one.close()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("disturbed", "not_reached")
    assert "GPU 0 is at 90 °C" in record["outcome"]["message"]
    assert record["host"]["gate"]["temperature"]["found_celsius"] == [90]
    assert record["result"] is None
    assert record["host"]["watchdog"] is None


@pytest.mark.process
def test_a_host_that_stalls_for_memory_disturbs_an_attempt(tmp_path, monkeypatch):
    stalled = itertools.count(0, 10_000_000)  # ten seconds more at each look
    monkeypatch.setattr(guard, "_stalled_us", lambda: float(next(stalled)))
    one = Bench(tmp_path / "run", fake_experiment({"guard": {"stalled": 0.5}}))
    record = one.run()
    one.close()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("disturbed", "not_quiet")
    assert (
        record["outcome"]["message"]
        == "tasks waited for memory in 100.0% of the time, at most 50.0% is allowed"
    )
    assert record["result"] is not None, "what was measured is kept"


@pytest.mark.process
def test_how_late_memory_comes_back_is_measured_and_not_waited_for_twice(tmp_path, monkeypatch):
    one = Bench(tmp_path / "run", fake_experiment({"memory_wait": "300ms"}))
    present = host.releasable_bytes()
    gone = []

    def releasable():
        return present - (1 << 40 if gone else 0)

    monkeypatch.setattr(host, "releasable_bytes", releasable)
    launcher = one.runner._launcher
    execute = launcher._execute
    monkeypatch.setattr(launcher, "_execute", lambda *given: (execute(*given), gone.append(1)))
    record = one.run()
    back = record["host"]["back"]
    assert record["outcome"]["kind"] == "ok", "it was measured before"
    assert back["reached"] is False
    assert back["waited_s"] >= 0.3
    assert back["wanted_bytes"] - back["found_bytes"] > 1 << 39
    started = time.monotonic()
    second = one.run(attempt=2)
    assert second["outcome"]["reason"] == "not_reached"
    assert (
        second["host"]["wait"]["waited_s"] <= time.monotonic() - started - second["host"]["back"]["waited_s"]
    )
    assert second["host"]["gate"]["absent"]["temperature"].startswith("not looked at")
    assert second["host"]["back"]["reached"] is False, "it may be late: it is waited for as long again"
    third = one.run(attempt=3)
    one.close()
    assert third["outcome"]["kind"] == "ok", "what came to stay disturbs once"
    assert third["host"]["wait"]["waited_s"] < 0.3
    assert third["host"]["back"]["reached"] is True, "the level is the present one from then on"
