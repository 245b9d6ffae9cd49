"""result.json from a stranger: no changed file becomes a wrong record, and none a traceback."""

import copy
import functools
import json
import random
from pathlib import Path

import pytest
from helpers import experiment
from test_launch import Bench
from test_record import RESULT

from analysis import frames
from spark_ray import receive
from spark_ray.outcome import Facts, derive
from spark_ray.record import Record
from spark_ray.result import Asked
from spark_ray.worker import sizing

ROOT = Path(__file__).parent.parent


ENGINE = {"kind": "embedded", "tokens_per_block": 64, "max_seq_len": 1024}
FRACTION = 0.05
BYTES_PER_TOKEN = 32768
CAPACITY = ("bytes", "blocks", "tokens", "tokens_per_block", "bytes_per_token", "sequences")
ASKED = Asked(
    "b0000.a", 1, ENGINE, {"max_batch_size": 2, "max_num_tokens": 512, "memory_fraction": FRACTION},
    {"requests": 4, "input_tokens": 16, "output_tokens": 8}, memory_bytes=1 << 50,
)  # fmt: skip

MATMUL = {
    "size": 10,
    "library": "numpy 2",
    "device": "cpu",
    "dtype": "float32",
    "durations_s": [1.0],
    "median_flop_per_s": 2000.0,
}


@functools.cache
def believable():
    """What the embedded engine writes, with the sizing terms of this machine now."""
    pool = sizing.size_pool(sizing.read_view("memfree"), 100 << 20, FRACTION)
    pool["meminfo"] = {
        name: pool["meminfo"][name] for name in ("MemTotal", "MemFree", "MemAvailable", "Cached")
    }
    blocks = pool["available_bytes"] // (64 * BYTES_PER_TOKEN)
    assert blocks >= 16, "this machine has no memory left for the test"
    size = blocks * 64 * BYTES_PER_TOKEN
    kv = {
        "bytes": size, "blocks": blocks, "tokens": blocks * 64, "tokens_per_block": 64, "bytes_per_token": BYTES_PER_TOKEN,
        "sequences": blocks * 64 // 1024, "source": "transformers PagedAttentionCache.num_blocks",
        "tensor_bytes": size + 2 * 64 * BYTES_PER_TOKEN, "second_source": {"bytes": size, "source": "num_sectors x bytes_per_sector"},
    }  # fmt: skip
    measurements = {
        "engine": {"name": "transformers continuous batching", "version": "5.23.0", "torch": "2.13.0", "threads": 2, "device": "cpu"},
        "model": {"weight_bytes": 79709184, "parameters": 39854592}, "sizing": pool, "kv_cache": kv,
        "throughput": {"requests": 4, "input_tokens": 64, "output_tokens": 32, "duration_s": 0.5, "output_throughput_tokens_per_s": 64.0},
    }  # fmt: skip
    return copy.deepcopy(RESULT) | {"engine": "embedded", "measurements": measurements}


def places(data, path=()):
    """Every path in a JSON value."""
    yield path
    for key, value in (
        data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    ):
        yield from places(value, (*path, key))


def replaced(data, path, text):
    """The JSON text of `data` with the raw `text` in place of one value."""
    mark = "@@here@@"
    data = copy.deepcopy(data)
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = mark
    return json.dumps(data).replace(f'"{mark}"', text)


def without(data, path, key=None):
    """`data` with one field left out, or under another key."""
    data = copy.deepcopy(data)
    place = data
    for step in path[:-1]:
        place = place[step]
    value = place.pop(path[-1])
    if key is not None and isinstance(place, dict):
        place[key] = value
    return json.dumps(data)


RAW = [
    "null", "true", "false", "0", "1", "-1", "0.5", "-0.0", '""', '"x"', "[]", "{}", "[1]", '{"a": 1}', "NaN", "Infinity",
    "-Infinity", "1e999", "1e15", str(1 << 60), str(1 << 64), "9" * 400, '"\\ud800"', '"\\u0000"', '"\\u2028"', '"1"', "[[[]]]",
]  # fmt: skip


def structured(data):
    """Every value replaced by each of RAW and by near misses of itself; every field lost, renamed, repeated."""
    for path in places(data):
        if not path:
            continue
        value = functools.reduce(lambda place, step: place[step], path, data)
        near = []
        if isinstance(value, int) and not isinstance(value, bool):
            near = [
                value + 1,
                value - 1,
                value * 2,
                -value,
                float(value),
                str(value),
                value + 64,
                value + (1 << 21),
            ]
        elif isinstance(value, float):
            near = [value * 1.5, -value, str(value), int(value)]
        elif isinstance(value, str):
            near = [value + " ", value[::-1], value.upper(), value * 2]
        for text in [*RAW, *map(json.dumps, near)]:
            yield replaced(data, path, text).encode()
        yield without(data, path).encode()
        yield without(data, path, f"{path[-1]}_").encode()
        if isinstance(path[-1], str):
            whole, key = json.dumps(value), json.dumps(path[-1])
            yield replaced(data, path, f"{whole}, {key}: {whole}").encode()
            yield replaced(data, path, f"0, {key}: {whole}").encode()


def bytewise(data, count, seed):
    """Bytes flipped, lost, doubled, inserted, cut off; pieces of the text moved elsewhere."""
    source, whole = random.Random(seed), data  # noqa: S311  no secret
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(source.choice([1, 1, 1, 2, 5])):
            at, length = source.randrange(max(1, len(data))), source.choice([1, 1, 2, 8, 64])
            data = data or bytearray(b"{")
            match source.randrange(7):
                case 0:
                    data[at] ^= 1 << source.randrange(8)
                case 1:
                    data[at] = source.choice(b'0123456789.,:"{}[]-eE \\\x00\xff')
                case 2:
                    del data[at : at + length]
                case 3:
                    data[at:at] = data[at : at + length]
                case 4:
                    data[at:at] = source.randbytes(length)
                case 5:
                    del data[at + 1 :]
                case 6:
                    other = source.randrange(len(data))
                    data[at : at + length] = data[other : other + length]
        yield bytes(data)


@functools.cache
def some_record():
    """A record as the host writes it, but for the result: of a real attempt of the fake engine."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        one = Bench(Path(folder) / "run", experiment())
        record = one.run()
        one.close()
    return record


def judged(folder, data):
    """The record that this result.json leads to."""
    (folder / "result.json").write_bytes(data)
    result, why = receive.read_result(folder, ASKED)
    outcome = derive(Facts(result, why, exit_code=0))
    record = some_record() | {"result": result, "outcome": outcome.as_dict()}
    if result is not None:
        Record.model_validate(record)
        json.dumps(record, allow_nan=False)
    kv = ((result or {}).get("measurements") or {}).get("kv_cache")
    if outcome.kind == "ok":
        good = believable()["measurements"]["kv_cache"]
        assert {name: kv[name] for name in CAPACITY} == {name: good[name] for name in CAPACITY}, data
        assert all(type(kv[name]) is int for name in CAPACITY), data
    else:
        assert outcome.kind in {"engine_error", "crashed"}, outcome
        assert outcome.message
        assert kv is None, "a capacity that was not believed is in no record"
    return record


@pytest.mark.process
def test_no_changed_result_json_becomes_a_wrong_record(tmp_path):
    good = believable()
    text = json.dumps(good).encode()
    assert judged(tmp_path, text)["outcome"]["kind"] == "ok"
    mutants = dict.fromkeys([*structured(good), *bytewise(text, 3000, 7)])
    mutants.pop(text, None)
    assert len(mutants) >= 200
    records = [judged(tmp_path, data) for data in mutants]
    kinds = {record["outcome"]["kind"] for record in records}
    assert kinds == {"ok", "crashed", "engine_error"}, "the mutations reach every branch"
    table = frames.trials([record | {"standing": "counts", "superseded": False} for record in records], {})
    ok = table["outcome"] == "ok"
    assert set(table.loc[ok, "kv_cache_bytes"]) == {good["measurements"]["kv_cache"]["bytes"]}
    assert table.loc[~ok, "kv_cache_bytes"].isna().all()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("throughput",), None, "throughput: is missing"),
        (("throughput", "output_tokens"), 31, "output_tokens: is 31, less than asked"),
        (("matmul",), MATMUL, "matmul: is there, and was not asked for"),
    ],
)
def test_half_a_workload_is_none_unless_a_failure_says_why(tmp_path, path, value, words):
    data = copy.deepcopy(believable())
    functools.reduce(lambda place, step: place[step], path[:-1], data["measurements"])[path[-1]] = value
    work = data["measurements"]["throughput"]
    if work is not None:
        work["output_throughput_tokens_per_s"] = work["output_tokens"] / work["duration_s"]
    (tmp_path / "result.json").write_text(json.dumps(data))
    result, why = receive.read_result(tmp_path, ASKED)
    assert result is None
    assert words in why
    failed = {"kind": "engine_error", "reason": "RuntimeError", "message": "", "traceback": None}
    (tmp_path / "result.json").write_text(json.dumps(data | {"failure": failed}))
    why = receive.read_result(tmp_path, ASKED)[1]
    assert (why is None) == (path != ("matmul",)), "a product that nobody asked for is never believed"


def test_each_number_of_a_capacity_is_held_by_the_others(tmp_path):
    """One number changed to anything else is never believed, whatever it is."""
    for name in CAPACITY:
        for value in (0, 1, 63, 65, 128, 1023, 1 << 20, 1 << 50):
            data = copy.deepcopy(believable())
            if data["measurements"]["kv_cache"][name] != value:
                data["measurements"]["kv_cache"][name] = value
                (tmp_path / "result.json").write_text(json.dumps(data))
                assert receive.read_result(tmp_path, ASKED)[1], (name, value)
