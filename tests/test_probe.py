"""The probe engine: the law over a real view of memory, and a pool really taken, wherever it runs."""

import json
import math

import pytest
from helpers import QUIET, run_without_report, write_yaml
from pydantic import ValidationError

from spark_ray.engines import ProbeEngine
from spark_ray.record import Record
from spark_ray.worker import engine_probe, observe, session, sizing

MIB = 1 << 20


class Talk:
    """A worker's side of the conversation, with nobody at the other end."""

    def __init__(self, fraction=0.25, tokens=512, **engine):
        self.engine = ProbeEngine(kind="probe", **engine).model_dump(mode="json")
        self.configuration = {"memory_fraction": fraction, "max_num_tokens": tokens, "max_batch_size": 1}
        self.sources = []
        self.seen = {}

    def phase(self, name):
        self.seen[name] = observe.observe(name)


def reading(free, total=64 << 30):
    return lambda view: {"view": view, "total_bytes": total, "free_bytes": free, "meminfo": {}}


def measured(talk):
    found = {}
    engine_probe.run(talk, found)
    return found


def anonymous(talk, phase):
    return talk.seen[phase]["tree"]["pss_anon_bytes"]


@pytest.mark.parametrize("pool", ["mapped", "none"])
def test_the_pool_is_what_the_law_gives_in_whole_blocks(monkeypatch, pool):
    monkeypatch.setattr(sizing, "read_view", reading(free=1000 * MIB))
    found = measured(Talk(pool=pool, transient_per_token="8KiB", tokens_per_block=32, bytes_per_token=1000))
    assert found["sizing"]["transient_bytes"] == 512 * 8192
    kv = found["kv_cache"]
    assert (
        kv["bytes"] == kv["blocks"] * 32 * 1000 == math.floor((1000 * MIB - 4 * MIB) * 0.25 / 32000) * 32000
    )
    assert kv["sequences"] == kv["tokens"] // 1024
    assert (kv.get("tensor_bytes"), pool in kv["source"]) == (
        (kv["bytes"], True) if pool == "mapped" else (None, False)
    )
    assert found["engine"]["name"] == "probe (sizing law only)"
    assert found["engine"]["probe"] is True


def test_what_it_touches_is_really_in_memory_and_the_transient_is_given_back():
    settled = observe.tree(observe.os.getpid())["pss_anon_bytes"]
    fraction = 200 * MIB / observe.meminfo()["MemFree"]
    talk = Talk(fraction, weights="64MiB", transient_per_token="256KiB", graphs_per_sequence="24MiB")
    kv = measured(talk)["kv_cache"]
    slack = 8 * MIB  # what this process itself allocates meanwhile
    assert anonymous(talk, "after_load") - settled == pytest.approx(64 * MIB, abs=slack)
    held = (64 + 24) * MIB  # the transient, 128 MiB, is not among it
    assert anonymous(talk, "sizing") - settled == pytest.approx(held, abs=slack)
    assert anonymous(talk, "after_kv") - anonymous(talk, "sizing") == pytest.approx(kv["bytes"], abs=slack)
    assert kv["bytes"] > 32 * MIB
    assert observe.tree(observe.os.getpid())["pss_anon_bytes"] - settled < slack, "all of it is given back"


def test_a_pool_below_one_sequence_is_an_answer(monkeypatch):
    monkeypatch.setattr(sizing, "read_view", reading(free=100 * MIB))
    with pytest.raises(session.Infeasible, match="one request of max_seq_len 1024 needs 33554432 bytes"):
        measured(Talk(pool="none"))


def test_a_pool_that_the_kernel_refuses_is_out_of_memory(monkeypatch):
    monkeypatch.setattr(sizing, "read_view", reading(free=1 << 58, total=1 << 59))
    with pytest.raises(session.OutOfMemory, match=r"the pool of .* bytes was refused"):
        measured(Talk(pool="mapped"))


def test_without_cuda_its_view_says_why(monkeypatch):
    from spark_ray.worker import cuda

    def unavailable(*_):
        raise cuda.Unavailable("no libcuda.so.1")

    monkeypatch.setattr(cuda, "memory", unavailable)
    with pytest.raises(RuntimeError, match=r"memory_view is cuda, but .*no libcuda\.so\.1"):
        measured(Talk(memory_view="cuda"))


def test_with_cuda_the_pool_is_sized_by_it_and_nothing_is_taken(monkeypatch):
    from spark_ray.worker import cuda

    monkeypatch.setattr(cuda, "memory", lambda *_: (40 << 30, 80 << 30))
    talk = Talk(0.5, memory_view="cuda", transient_per_token="0B")
    found = measured(talk)
    assert found["sizing"]["view"] == "cuda"
    assert found["kv_cache"]["bytes"] == 20 << 30
    assert "no pool taken" in found["kv_cache"]["source"]
    assert talk.sources[0]() == {"cuda": {"free_bytes": 40 << 30, "total_bytes": 80 << 30}}


def test_a_pool_of_main_memory_does_not_go_with_the_cuda_view():
    with pytest.raises(ValidationError, match="with memory_view cuda it is none"):
        ProbeEngine(kind="probe", memory_view="cuda", pool="touched")


def sweep(folder, arms, *options, blocks=1):
    data = {
        "name": "probe",
        "engine": {"kind": "probe", "pool": "mapped"},
        "workload": {"requests": 0},
        "search": {
            "sampler": "grid", "blocks": blocks, "repetitions": blocks,
            "space": {"max_batch_size": 1, "max_num_tokens": 512, "memory_fraction": 0.2},
        },
        "arms": {name: {"treatment": QUIET} | arm for name, arm in arms.items()},
        "contrast": dict(zip(("baseline", "against"), arms, strict=False)),
        "limits": {"trial_timeout": "60s"},
    }  # fmt: skip
    done = run_without_report(write_yaml(folder, data), "--out", folder / "run", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROBE: the sizing law over real memory; no inference engine runs" in done.stdout
    paths = sorted((folder / "run" / "trials").glob("*/*/record.json"))
    return {(r := json.loads(path.read_text()))["arm"]: r for path in paths}


def law_held(record):
    Record.model_validate_json(json.dumps(record))
    found = record["result"]["measurements"]
    free, kv = found["sizing"]["free_bytes"], found["kv_cache"]
    block = kv["tokens_per_block"] * kv["bytes_per_token"]
    return kv["bytes"] == int((free - 512 * 16384) * 0.2) // block * block


@pytest.mark.process
def test_a_native_trial_reads_the_hosts_memory(tmp_path):
    views = {"memfree": "MemFree", "memavailable": "MemAvailable"}
    arms = {view: {"environment": "native", "engine": {"memory_view": view}} for view in views}
    for view, record in sweep(tmp_path, arms).items():
        sized = record["result"]["measurements"]["sizing"]
        assert record["outcome"]["kind"] == "ok"
        assert sized["free_bytes"] == sized["meminfo"][views[view]]
        assert law_held(record)


@pytest.mark.process
@pytest.mark.root
@pytest.mark.docker
def test_it_runs_in_chroot_and_docker_and_sees_a_limit_there(tmp_path):
    limited = {"environment": {"kind": "docker", "memory": "512MiB"}, "engine": {"memory_view": "cgroup"}}
    records = sweep(
        tmp_path,
        {"chroot": {"environment": "chroot"}, "docker": {"environment": "docker"}, "limited": limited},
    )
    assert {record["outcome"]["kind"] for record in records.values()} == {"ok"}
    assert all(map(law_held, records.values()))
    sized = records["limited"]["result"]["measurements"]["sizing"]
    assert sized["total_bytes"] == sized["cgroup_limit_bytes"] == 512 * MIB
    assert (
        sized["free_bytes"] < 512 * MIB < records["docker"]["result"]["measurements"]["sizing"]["free_bytes"]
    )
