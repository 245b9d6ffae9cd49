"""result.json and record.json as described, and files that a guest can write to."""

import errno
import json
import os
from typing import get_args, get_origin

import pytest
from helpers import experiment_data
from pydantic import BaseModel, ValidationError
from test_launch import ENVIRONMENTS, Bench

from spark_ray import guestfiles, host, receive
from spark_ray.experiment import Experiment
from spark_ray.measurements import LAW, KvCache, Measurements, Sizing
from spark_ray.outcome import Facts, derive
from spark_ray.record import Observation, Record
from spark_ray.result import Asked, Result
from spark_ray.store import RECORD, read_record, write_durably
from spark_ray.worker import sizing

KV = {
    "bytes": 20 * 64 * 8192, "blocks": 20, "tokens": 20 * 64, "tokens_per_block": 64, "bytes_per_token": 8192,
    "sequences": 1, "source": "fake",
}  # fmt: skip
BLOCK = 64 * 8192
ASKED = Asked(
    "b0000.a", 1, {"kind": "fake"}, {"memory_fraction": 0.25}, {"requests": 4, "input_tokens": 16, "output_tokens": 8}
)  # fmt: skip
RESULT = {
    "protocol_version": 1, "trial_id": "b0000.a", "attempt": 1, "engine": "fake",
    "evidence": {
        "pid": 7, "uid": 0, "namespaces": {"mnt": "mnt:[1]"}, "root": "1:0:2", "root_mount": {"filesystem": "ext4", "options": "rw"},
        "cgroup": ["0::/"], "python": "3.11.7", "executable": "/p", "prefix": "/", "kernel": "6.1", "machine": "x86_64",
        "libc": None, "limits": {"nofile": [1024, -1]}, "status": {"CapEff": "0"}, "environment": {"HOME": "/tmp"},
        "transparent_hugepages": None, "overcommit_memory": "0", "shm_bytes": None, "docker_sockets": [],
        "bundle_sha256": "0" * 64, "libraries": ["/libc.so.6"],
    },
    "measurements": {
        "engine": {"name": "fake", "version": "1", "fake": True}, "kv_cache": KV,
        "sizing": {"law": "fake", "free_bytes": 1 << 30, "fraction": 0.25},
    },
    "failure": None, "observer": {"clock": "CLOCK_MONOTONIC"},
}  # fmt: skip


def changed(path, value, data=RESULT):
    """A deep copy with one value replaced, or left out (value is ...)."""
    data = json.loads(json.dumps(data))
    *steps, last = path.split(".")
    place = data
    for step in steps:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


def received(folder, data, asked=ASKED):
    (folder / "result.json").write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return receive.read_result(folder, asked)


# ---- result.json ------------------------------------------------------------------------------------------


def test_a_good_result_is_taken_as_it_is(tmp_path):
    assert received(tmp_path, RESULT) == (RESULT, None)
    assert receive.read_result(tmp_path / "nowhere", ASKED) == (None, None)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("attempt", True, "attempt: must be a valid integer: got true"),
        ("attempt", 1.0, "attempt: must be a valid integer: got 1.0"),
        ("attempt", 2, "attempt: is 2, this attempt's is 1"),
        ("trial_id", "b0001.a", "trial_id: is 'b0001.a', this attempt's is 'b0000.a'"),
        ("engine", "embedded", "engine: is 'embedded', this attempt's is 'fake'"),
        ("protocol_version", 2, "protocol_version: must be less than or equal to 1: got 2"),
        ("protocol_version", True, "protocol_version: must be a valid integer"),
        ("observer", ..., "observer: this field is missing"),
        ("surprise", 1, "surprise: unknown field"),
        ("evidence.surprise", 1, "evidence.surprise: unknown field"),
        ("evidence.pid", -1, "evidence.pid: must be greater than or equal to 0: got -1"),
        ("evidence.bundle_sha256", "x", "evidence.bundle_sha256: String should match"),
        ("measurements", [], "measurements: must be a valid dictionary"),
        ("measurements.sizing.fraction", 0.3, "measurements.sizing.fraction: is 0.3, asked was 0.25"),
        ("measurements.sizing.free_bytes", 1 << 60, "measurements.sizing.free_bytes: must be less than"),
        ("measurements.engine.name", "", "measurements.engine.name: String should have at least 1"),
        ("measurements.engine.name", "a\nb", "measurements.engine.name: String should match"),
        ("measurements.engine.extra", {"a": 1}, "measurements.engine.extra"),
        ("failure", {"kind": "fine", "reason": "x", "message": ""}, "failure.kind: must be 'infeasible'"),
        ("failure", {"kind": "engine_error", "reason": "x"}, "failure.message: this field is missing"),
    ],
)  # fmt: skip
def test_what_is_refused_says_which_field_and_why(tmp_path, path, value, words):
    result, why = received(tmp_path, changed(path, value))
    assert result is None
    assert why.startswith("result.json cannot be believed: ")
    assert words in why
    outcome = derive(Facts(result, why, exit_code=0))
    assert (outcome.kind, outcome.reason, outcome.message) == ("crashed", "no_result", why)
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bytes", 20 * BLOCK + 1, "bytes is not tokens x bytes_per_token"),
        ("blocks", 21, "tokens is not blocks x tokens_per_block"),
        ("tokens", 1, "tokens is not"),
        ("tokens", 1280.0, "measurements.kv_cache.tokens: must be a valid integer: got 1280.0"),
        ("bytes_per_token", 0, "measurements.kv_cache.bytes_per_token: must be greater than or equal to 1"),
        ("blocks", -20, "measurements.kv_cache.blocks: must be greater than or equal to 0: got -20"),
        ("blocks", True, "measurements.kv_cache.blocks: must be a valid integer: got true"),
        ("bytes", "many", "measurements.kv_cache.bytes: must be a valid integer: got 'many'"),
        ("sequences", 2, "measurements.kv_cache.sequences: is 2; 1280 tokens hold 1 of 1024"),
        ("sequences", 1 << 40, "sequences is more than tokens"),
        ("source", "", "measurements.kv_cache.source"),
        ("source", ..., "measurements.kv_cache.source: this field is missing"),
        ("tensor_bytes", 20 * BLOCK - 1, "tensor_bytes"),
        ("tensor_bytes", 25 * BLOCK, "tensor_bytes"),
        ("second_source", {"bytes": 22 * BLOCK, "source": "x"}, "second_source has"),
        ("second_source", {"bytes": 20 * BLOCK}, "second_source.source: this field is missing"),
        ("second_source", 5, "second_source"),
        ("more", 5, "measurements.kv_cache.more: unknown field"),
    ],
)  # fmt: skip
def test_a_capacity_that_is_not_believed_is_left_out_and_the_rest_kept(tmp_path, name, value, words):
    result, why = received(tmp_path, changed(f"measurements.kv_cache.{name}", value))
    assert words in why
    assert result == changed("measurements.kv_cache", ...)
    outcome = derive(Facts(result, why, exit_code=0))
    assert (outcome.kind, outcome.reason, outcome.message) == ("engine_error", "no_capacity", why)


def test_a_pool_larger_than_all_memory_is_not_believed(tmp_path):
    asked = Asked(**{**vars(ASKED), "memory_bytes": 20 * BLOCK})
    assert received(tmp_path, RESULT, asked)[1] is None
    asked = Asked(**{**vars(ASKED), "memory_bytes": 20 * BLOCK - 1})
    assert "this host has" in received(tmp_path, RESULT, asked)[1]


def test_sequences_may_share_blocks_or_not(tmp_path):
    """Requests of 100 tokens in blocks of 64: 20 blocks hold 12 by tokens, 10 if no two share a block."""
    asked = Asked(**{**vars(ASKED), "engine": {"kind": "fake", "max_seq_len": 100}})
    for sequences, believed in ((12, True), (10, True), (11, False), (13, False)):
        why = received(tmp_path, changed("measurements.kv_cache.sequences", sequences), asked)[1]
        assert (why is None) == believed


def test_throughput_belongs_to_the_workload(tmp_path):
    good = {
        "requests": 4, "input_tokens": 64, "output_tokens": 32, "duration_s": 0.5, "output_throughput_tokens_per_s": 64.0,
    }  # fmt: skip
    data = changed("measurements.throughput", good)
    assert received(tmp_path, data) == (data, None)
    for name, value in [
        ("requests", 5),
        ("input_tokens", 65),
        ("output_tokens", 33),
        ("duration_s", 1.0),
        ("duration_s", 0),
    ]:
        assert received(tmp_path, changed(f"measurements.throughput.{name}", value, data))[0] is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 1}', "the field 'a' is there twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is no number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[]", "must be a valid dictionary"),
        (b"null", "must be a valid dictionary"),
        (b" " * (receive.MOST_BYTES + 1), "larger than 16 MiB"),
    ],
)  # fmt: skip
def test_what_is_no_json_of_ours_is_refused(tmp_path, data, words):
    result, why = received(tmp_path, data)
    assert result is None
    assert words in why
    assert why.isprintable()


def test_a_repeated_field_is_found_at_any_depth(tmp_path):
    text = json.dumps(RESULT).replace('"blocks": 20', '"blocks": 20, "blocks": 20')
    assert "'blocks' is there twice" in received(tmp_path, text.encode())[1]


def test_the_words_of_a_failure_cannot_steer_a_terminal(tmp_path):
    failure = {"kind": "engine_error", "reason": "Odd", "message": "a\n\x1b]0;title\x07\ud800b"}
    result, why = received(tmp_path, changed("failure", failure))
    assert why is None
    assert derive(Facts(result, exit_code=0)).message == "a\n\\x1b]0;title\\x07\\ud800b"
    result, why = received(tmp_path, changed("failure", failure | {"message": "x" * 1_000_000}))
    assert why is None
    assert len(derive(Facts(result, exit_code=0)).message) < 5000


# ---- the law ----------------------------------------------------------------------------------------------


def test_the_terms_of_a_real_sizing_agree_and_a_changed_one_does_not():
    pool = sizing.size_pool(sizing.read_view("memfree"), 1 << 20, 0.3)
    assert pool["law"] == LAW
    Sizing.model_validate(pool)
    for name in ("total_bytes", "free_bytes", "transient_bytes", "peak_bytes", "available_bytes"):
        with pytest.raises(ValidationError):
            Sizing.model_validate(pool | {name: pool[name] + 4096})
    with pytest.raises(ValidationError, match="its terms give"):
        Sizing.model_validate(pool | {"fraction": 0.4})
    for view in ("memavailable", "cgroup"):
        Sizing.model_validate(sizing.size_pool(sizing.read_view(view), 1 << 20, 0.3))
    with pytest.raises(ValidationError, match="the law allows"):
        Measurements.model_validate(
            {
                "sizing": pool
                | {
                    "available_bytes": 0,
                    "transient_bytes": pool["free_bytes"],
                    "peak_bytes": pool["total_bytes"],
                },
                "kv_cache": KV,
            }
        )


# ---- models and real records ------------------------------------------------------------------------------


def parts(model, seen):
    """A model and every model in its fields."""
    if isinstance(model, type) and issubclass(model, BaseModel) and model not in seen:
        seen.add(model)
        for field in model.model_fields.values():
            parts(field.annotation, seen)
    elif get_origin(model) is not None:
        for argument in get_args(model):
            parts(argument, seen)
    return seen


def test_every_field_says_what_it_means():
    models = parts(Record, set())
    assert {Result, KvCache, Observation} <= models
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            assert not name.endswith("_mb"), name


@pytest.mark.process
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_real_records_are_as_described(tmp_path, environment):
    for behaviour in ("ok", "raise", "infeasible", "garbage", "segfault"):
        data = experiment_data(arms=(environment, "native"), behaviour=behaviour)
        one = Bench(tmp_path / behaviour, Experiment.model_validate(data))
        record = one.run()
        one.close()
        Record.model_validate(record)
        assert len(record["inside"]) >= 1
        folder = one.store.attempt_folder(record["trial_id"], 1)
        assert json.loads((folder / "host.json").read_text()) == record["host"]
        if behaviour == "garbage":
            assert "kv_cache" not in record["result"]["measurements"]
            assert '"many"' in (folder / "result.json").read_text(), "what was refused is kept"


@pytest.mark.process
def test_records_of_attempts_that_never_started_are_as_described(tmp_path):
    one = Bench(tmp_path / "run", Experiment.model_validate(experiment_data(limits={"memory_wait": "100ms"})))
    one.runner._launcher._level = level = host.Level(1 << 30)
    level.wanted_bytes = 1 << 60
    record = one.run()
    one.close()
    Record.model_validate(record)
    assert record["result"] is None


@pytest.mark.embedded
def test_a_record_of_the_real_engine_is_as_described(tmp_path):
    data = experiment_data() | {
        "engine": {"kind": "embedded", "threads": 1},
        "model": {"random_llama": {"layers": 2}},
    }
    one = Bench(tmp_path / "run", Experiment.model_validate(data))
    one.block.configuration["memory_fraction"] = 0.02
    record = one.run()
    one.close()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    Record.model_validate(record)
    kv = record["result"]["measurements"]["kv_cache"]
    assert kv["second_source"]["bytes"] == kv["bytes"] < kv["tensor_bytes"]


def test_a_record_with_fields_of_another_day_is_read_all_the_same(tmp_path):
    old = {"record_version": 1, "trial_id": "b0000.a", "outcome": {"kind": "ok"}, "surprise": 1}
    write_durably(tmp_path / RECORD, old)
    assert read_record(tmp_path / RECORD) == old


def test_a_record_that_is_a_pipe_or_a_link_is_no_record(tmp_path):
    write_durably(tmp_path / "true.json", {"record_version": 1, "trial_id": "x", "outcome": {"kind": "ok"}})
    (tmp_path / RECORD).symlink_to(tmp_path / "true.json")
    assert read_record(tmp_path / RECORD) is None
    (tmp_path / RECORD).unlink()
    os.mkfifo(tmp_path / RECORD)
    assert read_record(tmp_path / RECORD) is None
    (tmp_path / RECORD).unlink()
    (tmp_path / RECORD).write_bytes(b"[" * 100_000)
    assert read_record(tmp_path / RECORD) is None


# ---- observations -----------------------------------------------------------------------------------------

SEEN = {"phase": "end", "monotonic_s": 1.0, "cost_s": 0.1, "meminfo": {"MemFree": 1}, "cgroup": {}}


def test_observations_are_kept_up_to_the_torn_one_and_nonsense_is_left_out(tmp_path):
    good = json.dumps(SEEN)
    lines = [good, "", "null", "[" * 100_000, '{"phase": "end"}', good.replace("1}", "NaN}"), good.replace("1}", "-1e999}"),
             good[:-1] + ', "phase": "end"}', json.dumps(SEEN | {"engine": {"free": 1}}), good[:40]]  # fmt: skip
    path = tmp_path / "observations.jsonl"
    path.write_text("\n".join(lines))
    assert receive.read_observations(path) == [SEEN, SEEN | {"engine": {"free": 1}}]
    path.write_bytes(b"\xff\n" + good.encode() + b"\n")
    assert receive.read_observations(path) == [SEEN]
    deep = json.dumps(SEEN | {"deep": json.loads("[" * 400 + "]" * 400)})
    path.write_text(deep)
    assert receive.read_observations(path) == [], "a record could not be written with it"
    path.unlink()
    assert receive.read_observations(path) == []
    os.mkfifo(path)
    assert receive.read_observations(path) == []


# ---- files that a guest can write to ----------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("secret")
    return path


def plant(path, kind, secret):
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "inside").touch()
    else:
        assert kind == "socket"
        os.mknod(path, 0o140644)


PLANTS = ["link", "pipe", "folder", "socket"]


@pytest.mark.parametrize("kind", PLANTS)
def test_only_regular_files_are_read(tmp_path, secret, kind):
    plant(tmp_path / "x", kind, secret)
    with pytest.raises(OSError, match="it is ") as caught:
        guestfiles.read(tmp_path / "x", 100)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        guestfiles.read(tmp_path / "nothing", 100)
    assert guestfiles.read(secret, 6) == b"secret"
    with pytest.raises(OSError, match="larger than"):
        guestfiles.read(secret, 5)


@pytest.mark.parametrize("kind", PLANTS)
def test_nothing_is_appended_to_what_is_no_file(tmp_path, secret, kind):
    plant(tmp_path / "log", kind, secret)
    guestfiles.append(tmp_path / "log", b"noise")
    assert secret.read_text() == "secret"
    guestfiles.append(tmp_path / "new", b"a")
    guestfiles.append(tmp_path / "new", b"b")
    assert (tmp_path / "new").read_text() == "ab"


@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_target_is_replaced_and_never_written_through(tmp_path, secret, kind):
    plant(tmp_path / "record.json", kind, secret)
    write_durably(tmp_path / "record.json", {"a": 1})
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": 1}
    assert not (tmp_path / "record.json").is_symlink()
    assert secret.read_text() == "secret"
    assert not list(tmp_path.glob(".*.part"))


def test_a_folder_that_was_closed_is_opened_again(tmp_path):
    (tmp_path / "attempt").mkdir(mode=0o100)
    guestfiles.reopen(tmp_path / "attempt")
    assert (tmp_path / "attempt").stat().st_mode & 0o777 == 0o700


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        guestfiles.write(tmp_path / "x", "\ud800")
    assert list(tmp_path.iterdir()) == []
