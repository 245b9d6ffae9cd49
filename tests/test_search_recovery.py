"""A kill -9 at any instant, and what the next process finds."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ray import search_spec
from spark_ray.errors import RunError
from spark_ray.search import Abandoned, Proposal, Search, Told, design
from spark_ray.search.journal import drop_torn_tail

SPACE = {
    "max_batch_size": {"low": 1, "high": 256, "log": True, "levels": 4},
    "max_num_tokens": {"low": 64, "high": 8192, "levels": 3},
    "memory_fraction": {"low": 0.2, "high": 0.9, "levels": 3},
}
SMALL = {"max_batch_size": [1, 2, 4], "max_num_tokens": 256, "memory_fraction": [0.3, 0.5, 0.7, 0.9]}
OK = {"native": -1.0, "docker": -1.0}
FULL = {"native": -1.0, "docker": 1.0}


def plan(sampler="random", space=SPACE, **more):
    return search_spec.Search.model_validate({"sampler": sampler, "space": space, **more})


def open_search(folder: Path, search=None, seed=7):
    return Search(search or plan(), seed=seed, journal=Path(folder) / "study.journal", name="test")


def states(folder):
    journal = optuna.storages.journal.JournalFileBackend(str(Path(folder) / "study.journal"))
    study = optuna.load_study(study_name="test", storage=optuna.storages.JournalStorage(journal))
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def point(configuration):
    return tuple(configuration.items())


# ---- recovery ----------------------------------------------------------------------------------------------


def test_recover_keeps_the_identity_of_blocks(tmp_path):
    search = plan("tpe", repetitions=2)
    study = open_search(tmp_path, search)
    asked = [study.ask() for _ in range(5)]
    study.tell(0, contrast=0.25, constraints=OK)
    ended = {0: Told(0.25, OK), 2: Told(None, FULL), 3: Abandoned("disturbed")}
    for _ in range(3):  # killed again and again before anything is asked
        study = open_search(tmp_path, search)
        assert study.recover(ended) == [1, 4]
        assert "RUNNING" not in states(tmp_path)
    assert [study.ask(), study.ask()] == [asked[1], asked[4]]
    fresh = study.ask()
    assert (fresh.repetition, fresh.configuration) == (1, asked[4].configuration)
    study.tell(1, contrast=0.5, constraints=OK)
    study = open_search(tmp_path, search)
    ended[1] = Told(0.5, OK)
    assert study.recover(ended) == [4, fresh.study_trial]
    study.tell(4, contrast=0.5, constraints=OK)  # finishing an interrupted block without asking is fine
    assert study.recover(ended | {4: Told(0.5, OK)}) == [fresh.study_trial]


@pytest.mark.parametrize("contrast", [0.5, None])
def test_a_block_whose_record_was_lost_after_it_was_told_is_asked_again(tmp_path, contrast):
    """A truncated record.json: the study knows the block as finished, the disk does not, and the disk is the truth."""
    study = open_search(tmp_path)
    first, lost = study.ask(), study.ask()
    study.tell(first.study_trial, contrast=0.25, constraints=OK)
    study.tell(lost.study_trial, contrast=contrast, constraints=OK)
    for _ in range(2):
        study = open_search(tmp_path)
        assert study.recover({first.study_trial: Told(0.25, OK)}) == [lost.study_trial]
    assert study.ask() == lost
    study.tell(lost.study_trial, contrast=0.5, constraints=OK)
    assert study.recover({first.study_trial: Told(0.25, OK), lost.study_trial: Told(0.5, OK)}) == []


def test_a_block_that_was_given_up_is_open_again_unless_its_end_is_on_disk(tmp_path):
    study = open_search(tmp_path)
    asked = [study.ask() for _ in range(3)]
    for proposal in asked:
        study.abandon(proposal.study_trial, "disturbed 3 times")
    ended = {1: Abandoned("a compared arm failed")}
    for _ in range(3):  # whoever resumes, and is killed, and resumes
        study = open_search(tmp_path)
        assert study.recover(ended) == [0, 2]
    assert [study.ask(), study.ask()] == [asked[0], asked[2]]
    assert study.ask().study_trial not in {0, 1, 2}


@pytest.mark.parametrize("sampler", ["grid", "random", "qmc", "tpe"])
@pytest.mark.parametrize("repetitions", [1, 2])
def test_a_study_is_made_again_from_its_blocks(tmp_path, sampler, repetitions):
    """The same blocks under the same numbers, the same ends, and the same proposals afterwards."""
    search = plan(sampler, SMALL, repetitions=repetitions)
    study = open_search(tmp_path, search)
    asked = [study.ask() for _ in range(3)]
    study = open_search(tmp_path, search)
    assert study.recover({0: Told(0.5, OK)}) == [1, 2]  # so that numbers are left out between blocks
    assert [study.ask(), study.ask()] == asked[1:]
    asked.append(study.ask())
    assert asked[3].study_trial == 5
    ends = {0: Told(0.5, OK), 1: Told(None, FULL), 2: Told(-0.1, OK), 5: Told(0.2, OK)}
    study.recover(ends)
    blocks = [(each.study_trial, each.configuration, each.repetition) for each in asked]
    assert study.rebuild(blocks) == 0, "a study that has its trials is left alone"
    following = [study.ask() for _ in range(2)]

    (tmp_path / "study.journal").unlink()
    again = open_search(tmp_path, search)
    assert again.rebuild(json.loads(json.dumps(blocks))) == 4
    assert again.recover(ends) == []
    if sampler == "tpe":  # sees interrupted blocks' numbers no more; what it is told is the same
        assert again.ask().study_trial == 6
    else:
        assert [again.ask() for _ in range(2)] == following
    assert [again._blocks()[number].state.name for number in ends] == [
        "COMPLETE",
        "PRUNED",
        "COMPLETE",
        "COMPLETE",
    ]


def test_recover_completes_a_tell_cut_in_the_middle(tmp_path):
    study = open_search(tmp_path)
    number = study.ask().study_trial
    before = (tmp_path / "study.journal").read_bytes()
    study.tell(number, contrast=0.5, constraints=OK)
    after = (tmp_path / "study.journal").read_bytes()
    ends = [i for i in range(len(before), len(after)) if i == len(before) or after[i - 1 : i] == b"\n"]
    for end in ends:
        (tmp_path / "study.journal").write_bytes(after[:end])
        study = open_search(tmp_path)
        assert study.recover({number: Told(0.5, OK)}) == []
        trial = study._study.trials[number]
        assert (trial.value, trial.constraints) == (0.5, {**OK, "no_capacity": -1.0})


def test_recover_clears_a_foreign_trial_without_parameters(tmp_path):
    study = open_search(tmp_path)
    study._study.ask()
    assert study.recover({}) == []
    assert states(tmp_path) == ["FAIL"]
    assert study.ask() == Proposal(1, next(design(plan(), 7)), 0)


def crash_between(journal: Path, before: int, cut: float) -> None:
    """What a kill inside the last call leaves: any number of the bytes it appended."""
    size = journal.stat().st_size
    os.truncate(journal, before + round((size - before) * cut))


@settings(max_examples=60)
@given(
    sampler=st.sampled_from(["grid", "random", "qmc", "tpe"]),
    repetitions=st.integers(1, 2),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["ask", "tell", "none", "abandon"]),
            st.integers(0, 99),
            st.none() | st.floats(0, 1),
        ),
        max_size=14,
    ),
)
def test_no_kill_loses_or_doubles_a_block(sampler, repetitions, steps):
    search = plan(sampler, SMALL, repetitions=repetitions)
    proposed, finished = {}, {}  # what the caller has on disk
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "study.journal"
        study = open_search(folder, search)

        def ask():
            if (proposal := study.ask()) is not None and proposed.setdefault(
                proposal.study_trial, proposal
            ) != proposal:
                raise AssertionError(f"{proposal} was {proposed[proposal.study_trial]}")
            return proposal

        for action, choice, cut in steps:
            before = journal.stat().st_size
            still_open = sorted(set(proposed) - set(finished))
            if action == "ask" or not still_open:
                known = dict(proposed)
                ask()
                if cut is not None:  # the call did not return
                    proposed = known
            else:
                block = still_open[choice % len(still_open)]
                if action == "abandon":
                    finished[block] = Abandoned("tired")
                    study.abandon(block, "tired")
                else:
                    finished[block] = Told(None, FULL) if action == "none" else Told(-0.5, OK)
                    study.tell(
                        block, contrast=finished[block].contrast, constraints=finished[block].constraints
                    )
            if cut is not None:
                crash_between(journal, before, cut)
                study = open_search(folder, search)
                pending = study.recover(finished)
                assert "RUNNING" not in states(folder)
                assert set(proposed) - set(finished) <= set(pending)
                assert [ask().study_trial for _ in pending] == pending
        study.recover(finished)
        trials = {n: t for n, t in study._blocks().items() if n in finished}
        for block, outcome in finished.items():
            expected = (
                "FAIL"
                if isinstance(outcome, Abandoned)
                else "PRUNED"
                if outcome.contrast is None
                else "COMPLETE"
            )
            assert trials[block].state.name == expected
        if sampler == "grid":
            while ask() is not None:
                pass
            cells = [(point(p.configuration), p.repetition) for p in proposed.values()]
            points = [point(p) for p in design(search, 7)]
            assert sorted(cells) == sorted(itertools.product(points, range(repetitions)))


LINE = {
    "max_batch_size": 8,
    "max_num_tokens": {"low": 256, "high": 32768, "log": True},
    "memory_fraction": 0.8,
}


def told_of_a_line(proposal):
    """A law without noise; further out, the other arm has nothing."""
    tokens = proposal.configuration["max_num_tokens"]
    sizes = 40 * 2**30 - tokens * 2**19, 39 * 2**30 - tokens * 2**20
    told = {
        "kv_baseline_bytes": sizes[0],
        "kv_against_bytes": sizes[1] if tokens < 20_000 else None,
        "block_s": 30.0,
    }
    return Told(1 - sizes[1] / sizes[0], OK, told) if tokens < 20_000 else Told(None, FULL, told)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    study, found = open_search(tmp_path_factory.mktemp("map"), plan("map", LINE)), []
    for _ in range(11):
        found.append(study.ask())
        told = told_of_a_line(found[-1])
        study.tell(found[-1].study_trial, **vars(told))
    return [each.configuration for each in found]


@settings(max_examples=4)
@given(
    kills=st.dictionaries(
        st.tuples(st.integers(3, 10), st.sampled_from(["ask", "tell"])), st.floats(0, 1), min_size=1
    )
)
def test_a_map_that_is_killed_asks_what_it_would_have_asked(uninterrupted, kills):
    finished, asked = {}, []
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "study.journal"
        study = open_search(folder, plan("map", LINE))

        def killed(index, inside, before):
            if (index, inside) not in kills:
                return study
            crash_between(journal, before, kills[index, inside])
            again = open_search(folder, plan("map", LINE))
            again.recover(finished)
            return again

        for index in range(len(uninterrupted)):
            before = journal.stat().st_size
            proposal = study.ask()
            if (again := killed(index, "ask", before)) is not study:
                study, proposal = again, again.ask()
            before = journal.stat().st_size
            finished[proposal.study_trial] = told_of_a_line(proposal)
            study.tell(proposal.study_trial, **vars(finished[proposal.study_trial]))
            study = killed(index, "tell", before)
            asked.append(proposal.configuration)
    assert asked == uninterrupted


GUEST = """
import sys
from pathlib import Path
from spark_ray import search_spec
from spark_ray.search import Search, Told
folder, asked = Path(sys.argv[1]), Path(sys.argv[1]) / "asked"
search = search_spec.Search.model_validate_json(sys.argv[2])
study = Search(search, seed=7, journal=folder / "study.journal", name="test")
done = [int(line) for line in (asked.read_text().splitlines() if asked.exists() else [])]
study.recover({number: Told(0.5, {}) for number in done})
print("ready", flush=True)
while proposal := study.ask():
    with asked.open("a") as disk:
        disk.write(f"{proposal.study_trial}\\n")
    study.tell(proposal.study_trial, contrast=0.5, constraints={})
"""


@pytest.mark.process
def test_kill_9_in_a_loop(tmp_path):
    space = SPACE | {"max_num_tokens": {"low": 64, "high": 8192, "levels": 9}}
    search = plan("grid", space)
    for kill_after_s in itertools.chain([0.003, 0.02, 0.001, 0.04, 0.011], itertools.repeat(60.0)):
        command = [sys.executable, "-c", GUEST, str(tmp_path), search.model_dump_json()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guest:
            assert guest.stdout.readline() == "ready\n"
            try:
                guest.wait(kill_after_s)
            except subprocess.TimeoutExpired:
                guest.send_signal(signal.SIGKILL)
        if guest.returncode == 0:
            break
        assert guest.returncode == -signal.SIGKILL
    done = [int(line) for line in (tmp_path / "asked").read_text().splitlines()]
    study = open_search(tmp_path, search)
    assert study.recover({number: Told(0.5, {}) for number in done}) == []
    assert study.ask() is None
    assert len(done) == len(set(done)) == 4 * 9 * 3
    covered = [point(t.params) for t in study._study.trials if t.state.name == "COMPLETE"]
    assert sorted(covered) == sorted(point(p) for p in design(search, 7))


# ---- the journal -------------------------------------------------------------------------------------------


def test_a_journal_cut_anywhere_in_its_last_records_opens(tmp_path):
    study = open_search(tmp_path)
    first = study.ask()
    content = (tmp_path / "study.journal").read_bytes()
    for end in range(len(content) + 1):
        (tmp_path / "study.journal").write_bytes(content[:end])
        study = open_search(tmp_path)
        pending = study.recover({})
        assert pending == ([0] if end == len(content) else [])
        assert study.ask() == first


@pytest.mark.parametrize(
    "tail", [b"\0" * 512, b"garbage", b"garbage\n", b"{}\n[]\n\xff\n", b'{"op_code":8,"wor', b"\n"]
)
def test_a_garbage_tail_is_cut_and_kept(tail, tmp_path):
    study = open_search(tmp_path)
    first = study.ask()
    journal = tmp_path / "study.journal"
    sound = journal.read_bytes()
    journal.write_bytes(sound + tail)
    assert drop_torn_tail(journal)
    assert not drop_torn_tail(journal)
    assert journal.read_bytes() == sound
    assert (tmp_path / "study.journal.torn").read_bytes() == tail + b"\n"
    study = open_search(tmp_path)
    assert study.recover({}) == [0]
    assert study.ask() == first


def test_damage_in_the_middle_is_an_error(tmp_path):
    study = open_search(tmp_path)
    study.ask()
    study.tell(0, contrast=1.0, constraints=OK)
    lines = (tmp_path / "study.journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "study.journal").write_bytes(b"".join([*lines[:2], b"x\n", *lines[2:]]))
    with pytest.raises(RunError, match="line 3"):
        open_search(tmp_path)


def test_a_lock_left_by_a_kill_does_not_delay_the_next_start(tmp_path):
    holder = f"""
import os
from pathlib import Path
from spark_ray.search.journal import _Lock
_Lock(Path({str(tmp_path / "study.journal")!r})).acquire()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", holder], check=False).returncode == -signal.SIGKILL
    begin = time.monotonic()
    open_search(tmp_path).ask()
    assert time.monotonic() - begin < 10
    assert [path.name for path in tmp_path.iterdir()] == ["study.journal"]
    assert all(json.loads(line) for line in (tmp_path / "study.journal").read_text().splitlines())
