"""What the log says of one attempt."""

import pytest
from test_analysis_frames import ONE_BLOCK, record

from spark_ray import digest

WAITED = {"reached": True, "waited_s": 1.25, "wanted_bytes": 1, "found_bytes": 8 << 30}
TREATED = {"asked": {}, "mem_free_bytes": 4 << 30, "cached_bytes": 1 << 30}


def ended(kind="ok", *, reached=True, treated=TREATED):
    made = record(ONE_BLOCK, "full", kind=kind, message="what happened")
    host = made["host"] | {"wait": WAITED | {"reached": reached}, "treatment": treated}
    return made | {"host": host, "command": ["python", "-m", "spark_ray_worker", "/a folder"]}


def test_an_attempt_that_answered_is_five_lines(tmp_path):
    lines = list(digest.lines(ended(), tmp_path))
    assert [line.split()[0] for line in lines] == ["memory", "treatment", "command", "phases", "end"]
    assert lines[0].endswith("8.00 GiB available after 1.2 s")
    assert "page_cache: {" in lines[1]
    assert lines[1].endswith("then 4.00 GiB free, 1.00 GiB cached")
    assert lines[2].endswith("python -m spark_ray_worker '/a folder'"), "it can be pasted"
    assert "sizing" in lines[3]
    assert lines[4].endswith("exit 0 after 9.00 s")


def test_memory_that_did_not_come_back_is_said_and_nothing_was_treated(tmp_path):
    lines = list(digest.lines(ended("disturbed", reached=False, treated={}), tmp_path))
    assert lines[0].endswith("in vain")
    assert not [line for line in lines if line.startswith("treatment")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (None, ["worker.log cannot be read: No such file or directory"]),
        ("", ["worker.log is empty"]),
        ("one\ntwo \x1b[31mred\n", ["worker.log one", "worker.log two ?[31mred"]),
        ("".join(f"{n}\n" for n in range(99_999)), [f"worker.log {n}" for n in range(99_987, 99_999)]),
    ],
)
def test_of_a_failure_the_end_of_the_workers_log_is_shown_in_plain_text(tmp_path, text, shown):
    if text is not None:
        (tmp_path / "worker.log").write_text(text)
    lines = list(digest.lines(ended("crashed"), tmp_path))
    assert lines[5] == f"folder     {tmp_path}"
    assert lines[6:] == shown
