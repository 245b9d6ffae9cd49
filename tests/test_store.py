import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ray.errors import RunError
from spark_ray.plan import make_block
from spark_ray.store import RECORD, RECORD_VERSION, Store, read_record, write_durably

ARMS = ("a", "b")


def record(block, arm, attempt, kind="ok"):
    return {
        "record_version": RECORD_VERSION, "block_id": block.block_id, "trial_id": block.trial_id(arm), "arm": arm, "attempt": attempt,
        "outcome": {"kind": kind, "reason": "test", "message": ""},
        "result": {"measurements": {"kv_cache": {"bytes": 100 if arm == "a" else 50}}},
    }  # fmt: skip


def put(store, block, arm, attempt, kind="ok"):
    folder = store.new_attempt_folder(block.trial_id(arm), attempt)
    write_durably(folder / RECORD, record(block, arm, attempt, kind))


@pytest.fixture
def store(tmp_path):
    made = Store.create(tmp_path / "run", {"experiment.yaml": "x"}, {"experiment": {}})
    yield made
    made.close()


def new_block(store, index=0):
    block = make_block(index, index, {"memory_fraction": 0.5}, 0, ARMS, 0)
    store.save_block(block)
    return block


def test_blocks_come_back_as_they_were_saved(store):
    blocks = [new_block(store, index) for index in range(3)]
    assert Store.read(store.folder).blocks() == blocks


def test_a_block_is_complete_with_a_record_of_every_arm(store):
    block = new_block(store)
    assert not store.state(block).complete
    put(store, block, "a", 1)
    assert not store.state(block).complete
    put(store, block, "b", 1)
    state = store.state(block)
    assert state.valid == 1
    assert store.capacities(state, ARMS) == {"a": 100, "b": 50}


def test_arms_of_two_executions_do_not_make_a_block(store):
    block = new_block(store)
    put(store, block, "a", 1)
    put(store, block, "b", 2)
    assert not store.state(block).complete
    assert store.state(block).attempts == 2


def test_a_disturbed_arm_voids_the_execution_and_the_next_one_counts(store):
    block = new_block(store)
    put(store, block, "a", 1)
    put(store, block, "b", 1, "disturbed")
    put(store, block, "a", 2)
    put(store, block, "b", 2, "out_of_memory")
    state = store.state(block)
    assert state.valid == 2
    assert store.capacities(state, ARMS) == {"a": 100, "b": None}
    counted = [(r["trial_id"], r["attempt"]) for r in store.records() if r["standing"] == "counts"]
    assert counted == [(block.trial_id(arm), 2) for arm in block.order]
    assert sum(r["standing"] == "superseded" for r in store.records()) == 2


def test_records_of_an_incomplete_block_are_open_and_those_before_them_superseded(store):
    block = new_block(store)
    put(store, block, "a", 1)
    assert [r["standing"] for r in store.records()] == ["open"]
    put(store, block, "b", 1, "disturbed")
    assert [r["standing"] for r in store.records()] == ["open", "open"], (
        "given up, perhaps: nothing counts yet"
    )
    put(store, block, "a", 2)
    assert sorted(r["standing"] for r in store.records()) == ["open", "superseded", "superseded"]


@settings(max_examples=60)
@given(cut=st.integers(0, 2000), tail=st.binary(max_size=8))
def test_a_torn_record_is_no_record(tmp_path_factory, cut, tail):
    path = tmp_path_factory.mktemp("torn") / RECORD
    whole = record(make_block(0, 0, {}, 0, ARMS, 0), "a", 1)
    write_durably(path, whole)
    content = path.read_bytes()
    path.write_bytes(content[:cut] + (tail if cut < len(content) else b""))
    assert read_record(path) in (None, whole)


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 4),
            st.sampled_from(ARMS),
            st.sampled_from(["ok", "disturbed", "crashed", "host_wedged"]),
        ),
        max_size=8,
    )
)
def test_every_block_counts_at_most_once_whatever_was_recorded(tmp_path_factory, puts):
    store = Store.create(tmp_path_factory.mktemp("s") / "run", {}, {})
    block = new_block(store)
    for attempt, arm, kind in puts:
        if not store.attempt_folder(block.trial_id(arm), attempt).exists():
            put(store, block, arm, attempt, kind)
    counted = [r for r in store.records() if r["standing"] == "counts"]
    assert len(counted) in (0, len(ARMS))
    assert len({r["attempt"] for r in counted}) <= 1
    assert not any(r["outcome"]["kind"] in {"disturbed", "host_wedged"} for r in counted)
    store.close()


def test_a_second_driver_is_refused_and_told_who_has_it(store):
    with pytest.raises(RunError, match=rf"driven by process {os.getpid()}"):
        Store.resume(store.folder)
    store.close()
    Store.resume(store.folder).close()


def test_a_folder_with_something_in_it_is_not_taken(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        Store.create(tmp_path, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no plan\.json"):
        Store.read(tmp_path)


def test_a_record_of_another_version_is_refused_not_guessed(tmp_path):
    block = make_block(0, 0, {}, 0, ARMS, 0)
    path = tmp_path / RECORD
    path.write_text(json.dumps(record(block, "a", 1) | {"record_version": 99}))
    with pytest.raises(RunError, match="version 99"):
        read_record(path)


@pytest.mark.root
def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    """A real full file system: a 1 MiB tmpfs in a mount namespace of its own."""
    import subprocess
    import sys

    script = f"""
import os, sys
from pathlib import Path
from spark_ray.store import Store, write_durably
from spark_ray.errors import RunError
from spark_ray.plan import make_block
top = Path({str(tmp_path)!r})
store = Store.create(top / 'run', {{}}, {{}})
block = make_block(0, 0, {{}}, 0, ('a', 'b'), 0)
store.save_block(block)
(top / 'filler').write_bytes(b'x' * 10)
with open(top / 'filler', 'wb', buffering=0) as f:
    try:
        while True: f.write(b'x' * 4096)
    except OSError: pass
try:
    write_durably(store.folder / 'blocks' / 'b0001.json', {{'x': 'y' * 50000}})
except RunError as error:
    print('SAID', error)
print('BLOCKS', [b.block_id for b in store.blocks()], sorted(p.name for p in (store.folder / 'blocks').iterdir()))
"""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$SCRIPT"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount],
        env={**os.environ, "SCRIPT": script},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "SAID cannot write" in done.stdout, done.stderr
    assert "No space left" in done.stdout
    assert "mend: free space" in done.stdout
    assert "BLOCKS ['b0000'] ['b0000.json']" in done.stdout
    assert not list(Path(tmp_path).iterdir())


DIES_AT_THE_PLAN = """
import os, signal, sys
from pathlib import Path
from spark_ray import store
store.write_durably = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.Store.create(Path(sys.argv[1]), {"experiment.yaml": "of the dead"}, {}, worker=Path(sys.argv[2]))
"""


@pytest.mark.process
def test_a_folder_whose_maker_died_is_made_again_and_nothing_else_is_cleared(tmp_path):
    folder, worker = tmp_path / "run", tmp_path / "worker"
    worker.mkdir()
    (worker / "x.py").write_text("")
    command = [sys.executable, "-c", DIES_AT_THE_PLAN, str(folder), str(worker)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (folder / "bundle").is_dir()
    assert Store.was_torn(folder)
    Store.create(folder, {"experiment.yaml": "y"}, {"experiment": {}}, worker=worker).close()
    assert not Store.was_torn(folder)
    assert (folder / "experiment.yaml").read_text() == "y"
    with pytest.raises(RunError, match="not empty"):
        Store.create(folder, {}, {})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine").write_text("z")
    with pytest.raises(RunError, match="not empty"):
        Store.create(foreign, {}, {})
    assert [path.name for path in foreign.iterdir()] == ["mine"]
