"""TensorRT-LLM's sizing law: the worked example, what rounding of printed terms allows, and a published study re-read."""

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ray import measurements
from spark_ray.measurements import KvCache, Measurements, Sizing
from spark_ray.worker import tensorrt_llm_law as law
from spark_ray.worker.tensorrt_llm_log import Log, parse

GIB = 1 << 30
GOLDEN = Path(__file__).parent / "golden"
STEP = 10_737_419  # 0.01 GiB, rounded up


def gib(size):
    return round(size * GIB)


def golden(name):
    return parse((GOLDEN / f"trtllm-{name}.log").read_text())


# ---- what printed terms allow -----------------------------------------------------------------------------


class Interval(NamedTuple):
    """What the pool may be, both ends included."""

    low_bytes: int
    high_bytes: int
    low_tokens: int
    high_tokens: int


def tokens_of(available, bytes_per_token, block, rounding):
    """Tokens of the pool: whole tokens of the bytes, then whole blocks of the tokens.

    Rounded up in code up to 1.1 (and in a log of 1.1.0rc3), down in code of 1.3 and 1.4; it changed while 1.2 was made.
    """
    whole = max(0, available) // bytes_per_token
    return (-(-whole // block) if rounding == "ceil" else whole // block) * block


def interval(log, rounding=None):
    """What the law gives for every set of terms that prints like this one; None where a term was not said.

    Without `rounding` blocks are rounded either way.
    """
    terms = log.total_bytes, log.peak_bytes, log.temporary_kv_bytes, log.fraction
    if None in (*terms, log.bytes_per_token):
        return None
    total, peak, temporary, fraction = terms
    step = log.resolution_bytes
    spread = 3 * step // 2 + 1  # three terms, each half a step off at most
    low, high = (law.available_bytes(total + off, peak, temporary, fraction) for off in (-spread, spread))
    if log.limits and log.estimated_bytes is not None:  # a cap of the user, printed rounded
        low, high = min(low, max(0, log.estimated_bytes - step)), min(high, log.estimated_bytes + step)
    if log.final_free_bytes is not None:
        final = law.final_bytes(log.final_free_bytes, fraction)
        low, high = min(low, final), min(high, final)
    fixed, size, block = log.fixed_cost_bytes or 0, log.bytes_per_token, log.tokens_per_block or 1
    least = tokens_of(low - fixed, size, block, rounding or "floor")
    return Interval(low, high, least, tokens_of(high - fixed, size, block, rounding or "ceil"))


def test_host_and_guest_mean_the_same_law():
    assert law.LAW == measurements.LAW_TRT_LLM


# ---- the worked example -----------------------------------------------------------------------------------


def test_the_worked_example():
    available = law.available_bytes(gib(119.70), gib(113.65), gib(0.56), 0.9)
    assert available / GIB == pytest.approx(5.949, abs=1e-6)
    assert f"{available / GIB:.2f}" == "5.95"


def test_the_log_of_the_worked_example_allows_the_tokens_that_it_printed():
    log = golden("1.1")
    low_bytes, high_bytes, low, high = interval(log, "ceil")
    assert log.allocated_tokens == 86_720
    assert low <= log.allocated_tokens <= high
    assert high - low <= 400  # three terms, each 5 MiB off at most, of 72 KiB a token
    asked = 86_711 * log.bytes_per_token  # of the final cache, as that log says
    assert low_bytes <= asked <= high_bytes
    assert tokens_of(asked, log.bytes_per_token, 32, "ceil") == 86_720


ROUNDING = {"1.0": "ceil", "1.1": "ceil", "unitless": "ceil", "1.3": "floor", "1.4": "floor", "reduced": "floor", "mpi": "floor"}  # fmt: skip


@pytest.mark.parametrize("name", ["1.0", "1.1", "1.2", "1.3", "1.4", "mixed", "unitless", "reduced", "mpi"])
def test_every_golden_pool_is_within_what_its_log_allows(name):
    log = golden(name)
    allowed = interval(log, ROUNDING.get(name))
    assert allowed.low_tokens <= log.allocated_tokens <= allowed.high_tokens


def test_nothing_is_allowed_or_refused_where_a_term_was_not_said():
    assert interval(golden("0.20")) is None
    assert interval(golden("oom")) is None
    assert interval(Log()) is None


# ---- rounding and the second reading ----------------------------------------------------------------------


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20), st.integers(1, 256))
def test_rounding_is_within_a_block(available, bytes_per_token, block):
    down, up = (tokens_of(available, bytes_per_token, block, how) for how in ("floor", "ceil"))
    whole = available // bytes_per_token
    assert down % block == up % block == 0
    assert down <= whole <= up
    assert up - down == (block if whole % block else 0)


def test_no_pool_is_less_than_none():
    assert law.available_bytes(gib(100), gib(101), 0, 0.9) == 0


def test_the_smaller_of_two_readings_rules():
    log = golden("1.3")  # page cache came between them
    assert law.final_bytes(log.final_free_bytes, 0.9) < log.available_bytes
    assert interval(log, "floor").high_tokens == log.allocated_tokens == 517_920


# ---- what goes into the record ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0.20", "1.0", "1.1", "1.2", "1.3", "1.4", "v2", "mixed", "unitless", "reduced", "mpi"])  # fmt: skip
def test_the_terms_of_a_golden_log_are_a_sizing_of_the_record(name):
    log = golden(name)
    found = Sizing.model_validate(law.sizing(log, 0.9))
    assert (found.law, found.view, found.read_from) == (measurements.LAW_TRT_LLM, "cuda", "log")
    assert found.peak_bytes == log.peak_bytes
    if name != "0.20":
        assert abs(found.law_residual_bytes) <= 2 * found.resolution_bytes


def test_the_terms_of_the_worked_example():
    found = law.sizing(golden("1.1"), 0.9)
    assert found["free_bytes"] == pytest.approx(gib(119.70 - 63.52 - 49.28), abs=2)
    assert found["transient_bytes"] == gib(0.85)
    assert found["temporary_kv_bytes"] == gib(0.56)
    assert found["law_residual_bytes"] == gib(5.95) - law.available_bytes(
        gib(119.70), gib(113.65), gib(0.56), 0.9
    )
    assert found["terms"]["outside_bytes"] == gib(49.28)
    assert "final_available_bytes" not in found  # this version does not print it
    kv = {
        "bytes": 86720 * 73728, "blocks": 2710, "tokens": 86720, "tokens_per_block": 32, "bytes_per_token": 73728, "sequences": 1, "source": "log",
    }  # fmt: skip
    measured = Measurements.model_validate({"sizing": found, "kv_cache": kv})
    assert measured.kv_cache == KvCache.model_validate(kv)


def test_before_1_0_no_total_is_printed():
    found = law.sizing(golden("0.20"), 0.9)
    assert found.keys().isdisjoint({"total_bytes", "free_bytes", "law_residual_bytes"})


def test_before_1_1_the_estimate_is_printed_in_tokens():
    assert law.sizing(golden("1.0"), 0.9)["terms"]["estimated_bytes"] == 451_362 * 131_072


def test_without_a_peak_there_is_no_sizing():
    assert law.sizing(golden("oom"), 0.9) is None
    assert law.sizing(Log(), 0.9) is None


def test_terms_that_are_not_of_one_engine_are_left_out():
    log = parse((GOLDEN / "trtllm-1.2.log").read_text().replace("16.05 GiB", "26.05 GiB"))
    found = law.sizing(log, 0.9)
    assert Sizing.model_validate(found).free_bytes is None
    assert "transient_bytes" not in found


def test_a_dry_run_that_was_switched_off_needs_nothing_for_a_moment():
    lines = [line for line in (GOLDEN / "trtllm-1.3.log").read_text().splitlines() if "dynamically" not in line and "e.g." not in line]  # fmt: skip
    text = (
        "\n".join(lines).replace("40.10 GiB", "38.84 GiB").replace("profiling 1.00 GiB", "profiling 0.00 GiB")
        + "\n"
    )
    found = Sizing.model_validate(law.sizing(parse(text), 0.9))
    assert (found.transient_bytes, found.temporary_kv_bytes) == (0, 0)
    assert found.free_bytes == pytest.approx(gib(119.64 - 16.05 - 22.79), abs=2)


# ---- terms are printed rounded ----------------------------------------------------------------------------


@st.composite
def engines(draw):
    """Exact terms in bytes, as an engine has them before it prints."""
    weights, outside, activation = (draw(st.integers(0, 40 * GIB)) for _ in range(3))
    temporary = draw(st.integers(0, 2 * GIB))
    total = weights + outside + activation + draw(st.integers(0, 100 * GIB))
    return {"weights": weights, "outside": outside, "activation": activation, "temporary": temporary, "total": total} | {
        "fraction": draw(st.floats(0.01, 0.99)), "bytes_per_token": draw(st.integers(1000, 1 << 20)),
        "block": draw(st.sampled_from([16, 32, 64])), "rounding": draw(st.sampled_from(["ceil", "floor"])),
    }  # fmt: skip


def printed(engine):
    """What it prints of them, and the tokens of its pool."""
    peak = engine["weights"] + engine["activation"] + engine["outside"]
    available = law.available_bytes(engine["total"], peak, engine["temporary"], engine["fraction"])
    tokens = tokens_of(available, engine["bytes_per_token"], engine["block"], engine["rounding"])

    def size(value):
        return f"{value / GIB:.2f} GiB"

    profiled = "in memory usage profiling:"
    return tokens, f"""\
Memory used after loading model weights (inside torch) {profiled} {size(engine['weights'])}
Memory dynamically allocated during inference (inside torch) {profiled} {size(engine['activation'])}
Memory used outside torch (e.g., NCCL and CUDA graphs) {profiled} {size(engine['outside'])}
Peak memory during memory usage profiling (torch + non-torch): {size(peak)}, available KV cache memory when calculating max tokens: {size(available)}, fraction is set {engine['fraction']}, kv size per token is {engine['bytes_per_token']} bytes/token. device total memory {size(engine['total'])}, temporary kv cache memory during profiling {size(engine['temporary'])}
Number of tokens per block: {engine['block']}.
[MemUsageChange] Allocated {size(tokens * engine['bytes_per_token'])} for max tokens in paged KV cache ({tokens}).
"""  # fmt: skip


@settings(max_examples=60)
@given(engines())
def test_whatever_is_rounded_away_the_pool_is_within_the_interval_and_the_terms_agree(engine):
    tokens, text = printed(engine)
    log = parse(text)
    allowed = interval(log, engine["rounding"])
    assert allowed.low_tokens <= tokens <= allowed.high_tokens
    found = Sizing.model_validate(law.sizing(log, engine["fraction"]))
    assert abs(found.law_residual_bytes) <= (1 + 3 * engine["fraction"]) / 2 * STEP + 2


# ---- the published study of container against native, re-read ---------------------------------------------

TOTAL, FRACTION = 119.70, 0.9
SUMMARY = {"container": (104.9, 13.3), "native": (78.3, 37.3)}  # GiB: peak memory and KV cache, as published


def test_the_studys_kv_is_its_peak_written_in_another_way():
    for peak, kv in SUMMARY.values():
        allowed = law.available_bytes(gib(TOTAL), gib(peak), 0, FRACTION) / GIB
        assert allowed == pytest.approx(kv, abs=0.05 + FRACTION * 0.05)  # both are printed to 0.1 GiB


def test_the_studys_kv_difference_is_the_fraction_of_its_peak_difference():
    (peak, kv), (native_peak, native_kv) = SUMMARY["container"], SUMMARY["native"]
    assert kv - native_kv == pytest.approx(-FRACTION * (peak - native_peak), abs=0.1)
