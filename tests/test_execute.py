"""The drive: blocks on slots, void blocks again as a whole, exactly the budget, whatever the slots do."""

import contextlib
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from helpers import experiment
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ray.drive import Drive, failed_share
from spark_ray.errors import WatchdogStop
from spark_ray.execute import SlotLost
from spark_ray.search import Abandoned, Search
from spark_ray.store import RECORD, RECORD_VERSION, Store, write_durably
from spark_ray.told import told_of


class Silent:
    def trial_started(self, *_): ...
    def trial_ended(self, *_): ...
    def block_ended(self, *_): ...


class ScriptedSlot:
    """Writes a record of the next outcome in its script; "lost" is an actor that died, "ok" when the script is over."""

    def __init__(self, store, name="slot", script=()):
        self.name, self.store, self.script, self.calls = name, store, list(script), []
        self.stopped = threading.Event()

    def run(self, block, arm, attempt):
        self.calls.append((block.block_id, arm, attempt))
        folder = self.store.new_attempt_folder(block.trial_id(arm), attempt)
        kind = self.script.pop(0) if self.script else "ok"
        if kind == "lost":
            raise SlotLost("scripted")
        outcome = {"kind": kind, "reason": "script", "message": ""}
        kv = {"bytes": 1000 if arm == "a" else 900}
        record = {
            "record_version": RECORD_VERSION, "trial_id": block.trial_id(arm), "arm": arm, "attempt": attempt, "outcome": outcome,
            "result": {"measurements": {"kv_cache": kv}},
        }  # fmt: skip
        self.measured(block, arm, record)
        write_durably(folder / RECORD, record)  # once, as a host does: others may read it at once
        return record["outcome"]

    def measured(self, block, arm, record): ...

    def stop(self):
        self.stopped.set()

    def close(self): ...


def drive(folder, made, scripts):
    store = Store.resume(folder) if (folder / "plan.json").exists() else Store.create(folder, {}, {})
    try:
        search = Search(made.search, seed=1, journal=store.journal, name=made.name)
        finished = {}
        for state in map(store.state, store.blocks()):
            if state.complete:
                finished[state.block.study_trial] = told_of(state, store, made) or Abandoned("failed")
        interrupted = len(search.recover(finished))
        slots = [ScriptedSlot(store, f"slot-{i}", script) for i, script in enumerate(scripts)]
        drive = Drive(store, made, ["a", "b"], search, Silent(), interrupted)
        with contextlib.suppress(WatchdogStop):
            drive.run(slots)
        return slots, drive
    finally:
        store.close()


def complete_blocks(folder):
    store = Store.read(folder)
    return [state for state in map(store.state, store.blocks()) if state.complete]


def test_every_block_runs_every_arm_once_in_its_order(tmp_path):
    slots, _ = drive(tmp_path, experiment(blocks=4), [[]])
    store = Store.read(tmp_path)
    assert slots[0].calls == [(b.block_id, arm, 1) for b in store.blocks() for arm in b.order]
    assert len(complete_blocks(tmp_path)) == 4
    assert failed_share(store) == (0, 8)


def test_a_disturbed_block_runs_again_as_a_whole_in_the_same_order(tmp_path):
    slots, _ = drive(tmp_path, experiment(blocks=1), [["ok", "disturbed"]])
    order = Store.read(tmp_path).blocks()[0].order
    assert [(arm, attempt) for _, arm, attempt in slots[0].calls] == [
        (order[0], 1),
        (order[1], 1),
        (order[0], 2),
        (order[1], 2),
    ]
    assert [state.valid for state in complete_blocks(tmp_path)] == [2]


def test_a_lost_actor_voids_only_its_block(tmp_path):
    _slots, _ = drive(tmp_path, experiment(blocks=2), [["ok", "lost"]])
    assert [state.valid for state in complete_blocks(tmp_path)] == [2, 1]


def test_a_block_disturbed_too_often_is_given_up_and_the_run_goes_on(tmp_path):
    _, done = drive(
        tmp_path, experiment(blocks=2, limits={"block_attempts": 2}), [["disturbed", "disturbed"]]
    )
    assert done.given_up == ["b0000"]
    assert [state.block.block_id for state in complete_blocks(tmp_path)] == ["b0001"]


def test_answers_are_not_failures_and_failures_are_rows(tmp_path):
    drive(
        tmp_path,
        experiment(blocks=3),
        [["infeasible", "ok", "crashed", "ok", "out_of_memory", "out_of_memory"]],
    )
    store = Store.read(tmp_path)
    assert failed_share(store) == (1, 6)
    assert len(complete_blocks(tmp_path)) == 3


def test_the_watchdog_stops_every_slot_and_resume_finishes(tmp_path):
    made = experiment(blocks=3)
    drive(tmp_path, made, [["ok", "ok", "ok", "host_wedged"]])
    assert len(complete_blocks(tmp_path)) == 1
    drive(tmp_path, made, [[]])
    assert len(complete_blocks(tmp_path)) == 3


def test_parallel_slots_share_the_budget_and_no_block(tmp_path):
    slots, _ = drive(tmp_path, experiment(blocks=9), [[], [], []])
    assert len(complete_blocks(tmp_path)) == 9
    owners = Counter(call[0] for slot in slots for call in {(c[0], slot.name) for c in slot.calls})
    assert set(owners.values()) == {1}, "both arms of a pair run on the same slot"


class TwoAtOnce(ScriptedSlot):
    """The first slot measures its first block alone; from their second blocks on, both must be at work to go on."""

    first_is_told = threading.Event()
    together = threading.Barrier(2)

    def run(self, block, arm, attempt):
        if arm == block.order[0]:
            if any(call[0] != block.block_id for call in self.calls):
                self.together.wait(timeout=20)
            elif self.name == "slot-1":
                assert self.first_is_told.wait(timeout=20)
        return super().run(block, arm, attempt)


def test_a_slot_waits_where_an_open_block_may_say_that_the_map_is_not_known_after_all(tmp_path):
    made = experiment(blocks=4)
    store = Store.create(tmp_path / "run", {}, {})
    known = []

    def look():
        known.append(SimpleNamespace(stop=len(known) == 0, expected_misclassified=0.0, undecided_volume=0.0))
        return known[-1]

    class Tells(Silent):
        def block_ended(self, *_):
            TwoAtOnce.first_is_told.set()

    search = Search(made.search, seed=1, journal=store.journal, name=made.name)
    Drive(store, made, ["a", "b"], search, Tells(), look=look).run(
        [TwoAtOnce(store, f"slot-{number}") for number in range(2)]
    )
    store.close()
    assert len(complete_blocks(tmp_path / "run")) == 4


@settings(max_examples=25)
@given(
    sessions=st.lists(
        st.lists(
            st.sampled_from(["ok", "ok", "infeasible", "crashed", "disturbed", "lost", "host_wedged"]),
            max_size=8,
        ),
        max_size=4,
    ),
    blocks=st.integers(1, 4),
)
def test_after_any_history_resume_completes_each_block_exactly_once(tmp_path_factory, sessions, blocks):
    folder = tmp_path_factory.mktemp("run") / "r"
    made = experiment(blocks=blocks, limits={"block_attempts": 20})
    for script in sessions:
        drive(folder, made, [script])
    drive(folder, made, [[]])
    store = Store.read(folder)
    states = complete_blocks(folder)
    assert len(states) == blocks == len(store.blocks())
    counted = Counter(r["trial_id"] for r in store.records() if r["standing"] == "counts")
    assert set(counted.values()) == {1}
    assert len(counted) == 2 * blocks


@pytest.mark.parametrize(
    ("kinds", "expected"), [(("ok", "ok"), 0.1), (("ok", "infeasible"), None), (("crashed", "ok"), "failed")]
)
def test_what_the_search_is_told(tmp_path, kinds, expected):
    made = experiment(blocks=1)
    store = Store.create(tmp_path / "r", {}, {})
    from spark_ray.plan import make_block

    block = make_block(0, 0, {}, 0, ["a", "b"], 0)
    store.save_block(block)
    for arm, kind in zip("ab", kinds, strict=True):
        ScriptedSlot(store, script=[kind]).run(block, arm, 1)
    told = told_of(store.state(block), store, made)
    store.close()
    if expected == "failed":
        assert told is None
    else:
        assert told.contrast == (pytest.approx(expected) if expected is not None else None)
        assert (max(told.constraints.values()) > 0) == (expected is None)
        assert told.attributes["kv_baseline_bytes"] == 1000, "known, also where the other arm has none"
        assert told.attributes["kv_against_bytes"] == (900 if kinds[1] == "ok" else None)
