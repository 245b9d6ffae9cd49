"""The selftest: what it concludes from readings and records, that it keeps what is the user's, and all of it once, here."""

import getpass
import pwd
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import experiment_data

from spark_ray import image, reap, redact, selftest, spark_check
from spark_ray.cli import command
from spark_ray.errors import UnavailableError
from spark_ray.experiment import Experiment
from spark_ray.selftest import Free, Options
from spark_ray.units import GIB, MIB

# ---- page cache -------------------------------------------------------------------------------------------


def free(mem_free, cuda=None):
    return Free(mem_free, 100 * GIB, 10 * GIB, cuda)


@pytest.mark.parametrize(
    ("before", "filled", "words"),
    [
        (
            free(50 * GIB, 50 * GIB),
            free(49 * GIB, 49 * GIB),
            "is MemFree, and fell by 1.00 GiB: as reported of GB10",
        ),
        (free(50 * GIB, 80 * GIB), free(49 * GIB, 80 * GIB), "page cache is not in this GPU's memory"),
        (free(50 * GIB, 60 * GIB), free(49 * GIB, 59 * GIB), "neither; please report it"),
        (free(50 * GIB, 50 * GIB), free(49 * GIB, 49 * GIB + 512 * MIB), "neither; please report it"),
        (free(50 * GIB), free(49 * GIB), "not tested, CUDA does not answer here"),
    ],
)
def test_the_claim_is_held_against_the_readings(before, filled, words):
    kernel, cuda = selftest.verdict(before, filled, GIB)
    assert "MemFree fell by 1.00 GiB" in kernel
    assert words in cuda


@pytest.mark.parametrize(("filled", "held"), [(free(50 * GIB + MIB), GIB), (free(49 * GIB), 0)])
def test_a_host_that_was_not_quiet_decides_nothing(filled, held):
    (said,) = selftest.verdict(free(50 * GIB), filled, held)
    assert said.startswith("undecided")


def test_the_fill_is_gone_afterwards(tmp_path):
    mirror = (
        "import json, sys\nfrom spark_ray.worker import observe\nfor _ in sys.stdin:\n    info = observe.meminfo()\n"
        "    print(json.dumps(dict(free_bytes=info['MemFree'], total_bytes=info['MemTotal'], mem_free_bytes=info['MemFree'],"
        " mem_total_bytes=info['MemTotal'], cuda_version=13000)), flush=True)"
    )
    said = list(selftest.page_cache_part(tmp_path, 256 * MIB, (sys.executable, "-c", mirror)))
    assert [line.split()[0] for line in said[:3]] == ["before", "filled", "given"]
    assert all("CUDA free" in line for line in said[:3])
    assert said[3].startswith(("page cache counts", "undecided"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_or_disk_is_no_test(tmp_path):
    (said,) = selftest.page_cache_part(tmp_path, 1 << 60)
    assert said.startswith("not done")


# ---- records ----------------------------------------------------------------------------------------------


def record(arm, block, size, kind="ok", **engine):
    measured = {
        "engine": {"name": "probe", "version": "1", **engine},
        "sizing": {"law": "x", "free_bytes": 2 * GIB, "available_bytes": GIB},
    }
    if kind == "ok":
        measured["kv_cache"] = {"bytes": size}
    outcome = {"kind": kind, "reason": "memory", "message": "did not come back"}
    return {"arm": arm, "block_id": block, "outcome": outcome, "result": {"measurements": measured}}


def test_an_arm_is_a_line_with_its_contrast_by_block():
    records = [
        record("again", "b0", 990), record("native", "b0", 1000), record("native", "b1", 2000), record("again", "b1", 2020),
        record("docker", "b0", 0, "disturbed"),
    ]  # fmt: skip
    said = list(selftest.describe(records))
    assert said[0] == "native  2 of 2 ok  KV median 1.46 KiB"
    assert said[1] == "again   2 of 2 ok  KV median 1.47 KiB  contrast +0.000% [-1.000% .. +1.000%]"
    assert said[2:4] == ["docker  0 of 1 ok", "  b0 disturbed memory: did not come back"]
    assert said[4].endswith("probe 1; free 2.00 GiB, available 1.00 GiB")


def test_how_the_gpu_was_given_is_said():
    said = list(
        selftest.describe([record("docker", "b0", 1) | {"content": {"gpu": {"exposure": "devices"}}}])
    )
    assert "GPU by devices" in said[-1]


def test_a_double_says_so():
    said = list(selftest.describe([record("chroot", "b0", 1, engine_is_double=True)]))
    assert "DOUBLE, no engine" in said[-1]


@pytest.mark.parametrize("view", ["memfree", "cuda"])
def test_its_own_experiments_are_valid(view):
    assert Experiment.model_validate(selftest.probe_experiment(3, view)).search.blocks == 3


def test_an_engine_has_the_time_that_its_memory_takes_to_come_back():
    made = Experiment.model_validate(selftest.engine_experiment(Options(model="models/x")))
    assert made.limits.memory_wait >= 180
    starts = 2 * made.limits.trial_timeout + 2 * made.limits.memory_wait
    assert starts <= selftest.ENGINE_LIMIT_S


@pytest.mark.process
def test_a_run_that_is_too_slow_is_ended_and_its_records_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "connect", no_engine)
    data = experiment_data(blocks=50, hold="2s") | {"name": "slow"}
    said = list(selftest.run_part(data, tmp_path, limit_s=12))
    assert said[0] == "not done within 12 s; until then:"
    assert any(" ok" in line for line in said), said
    assert reap.leftovers(tmp_path / "slow", None) == []


@pytest.mark.process
def test_a_trial_that_failed_shows_how_its_log_ends(tmp_path):
    data = experiment_data(blocks=1, behaviour="raise") | {"name": "bad"}
    said = "\n".join(selftest.run_part(data, tmp_path))
    assert "worker.log" in said


@pytest.mark.parametrize("double", [None, "tests/double"])
def test_the_engines_experiment_is_valid(double):
    made = Experiment.model_validate(selftest.engine_experiment(Options(model="models/x", double=double)))
    assert list(made.arms) == (["native", "again"] if double else ["chroot", "docker"])


def test_what_keeps_a_part_from_running_is_a_line_of_it(tmp_path):
    options = Options(model=str(tmp_path / "no-model"))
    said = list(selftest.run_part(selftest.engine_experiment(options), tmp_path))
    assert said[0] == "not done, exit 3:"
    assert any("no-model does not exist" in line for line in said)


def no_engine(timeout_s=60):  # noqa: ARG001
    raise UnavailableError("no Docker engine answers", mend="start it")


# ---- the block --------------------------------------------------------------------------------------------


def test_what_is_the_users_own_is_replaced():
    known = [("/home/al/spark", "."), ("/home/al", "~"), ("al", "USER"), ("box", "HOST")]
    said = "/home/al/spark/rootfs, /home/al/.cache, /home/alma, al@box, all, al-1, a box"
    assert redact.clean(said, known) == "./rootfs, ~/.cache, /home/alma, USER@HOST, all, al-1, a HOST"


def test_names_and_places_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "spark-1")
    monkeypatch.delenv("SUDO_USER", raising=False)
    known = redact.private(tmp_path / "work", tmp_path)
    assert known[0] == (str(tmp_path / "work"), "WORK")
    assert {"alice", "spark-1", str(Path.home()), str(tmp_path)} <= {text for text, _ in known}


def test_who_called_sudo_is_known_and_a_model_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    monkeypatch.setenv("SUDO_USER", "alice")
    monkeypatch.setattr(pwd, "getpwnam", lambda name: SimpleNamespace(pw_dir=f"/home/{name}"))
    known = redact.private(tmp_path / "work", tmp_path, "/home/alice/secret/m")
    said = redact.clean("/home/alice/secret/m does not exist, /home/alice/x, alice", known)
    assert said == "MODEL does not exist, ~/x, USER"
    inside = redact.private(tmp_path / "work", tmp_path, str(tmp_path / "models/m"))
    assert redact.clean(f"{tmp_path}/models/m", inside) == "./models/m"


def test_a_reading_of_cuda_that_fails_later_costs_its_part_only(tmp_path):
    once = (
        "import json, sys\nsys.stdin.readline()\nprint(json.dumps(dict(free_bytes=1, total_bytes=1, mem_free_bytes=1,"
        " mem_total_bytes=1, cuda_version=13000)), flush=True)"
    )
    part = selftest.page_cache_part(tmp_path, 64 * MIB, (sys.executable, "-c", once))
    assert list(selftest._all(part)) == ["not done: the process that asked CUDA ended without a word"]


@pytest.mark.process
def test_all_of_it_here_without_docker(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")  # for the processes that it starts
    monkeypatch.setattr(image, "connect", no_engine)
    said = []
    text = selftest.run(Options(blocks=1, fill_bytes=64 * MIB), tmp_path, said.append)
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    for heading in ("versions", "doctor --spark", "probe, MemFree", "probe, cudaMemGetInfo"):
        assert heading in lines
    assert "1 of 1 ok" in text, "two native arms exist everywhere"
    assert "again" in text
    assert "docker  not done: no Docker engine answers" in text
    assert "page cache of 64.00 MiB ..." in said
    for own in (str(tmp_path), str(Path.home()) + "/", f" {socket.gethostname()} "):
        assert own not in text
    assert not list(tmp_path.glob("spark_ray-selftest-*")), "no run is left"


def test_the_engine_needs_a_model():
    with pytest.raises(Exception, match="go together"):
        command.main(["selftest", "--engine", "tensorrt_llm"], standalone_mode=False)


def test_every_finding_is_a_line(monkeypatch):
    monkeypatch.setattr(image, "connect", no_engine)
    seen = spark_check.look(Path.cwd(), cuda_command=(sys.executable, "-S", "-c", ""))
    said = list(selftest.checks_part(seen))
    assert len(said) == len(list(spark_check.checks(seen)))
    assert all(line.split()[0] in {"ok", "warn", "missing"} for line in said)
