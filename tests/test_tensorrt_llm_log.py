"""The log parser: every generation of every line, and whatever else a log may hold: it never raises and never invents."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ray.worker.tensorrt_llm_log import Limit, Log, Window, parse
from spark_ray.worker.tensorrt_llm_oom import OutOfMemoryReport, Stage

GIB = 1 << 30
GOLDEN = {path.stem.removeprefix("trtllm-"): path.read_text() for path in (Path(__file__).parent / "golden").glob("trtllm-*.log")}  # fmt: skip
STEP = 10_737_419  # 0.01 GiB, rounded up


def gib(size):
    return round(size * GIB)


def said(log):
    """The fields of a Log that were said."""
    return {name: value for name, value in vars(log).items() if value not in (None, ())}


# ---- one golden log a generation --------------------------------------------------------------------------

_DISCRETE = {
    "weights_bytes": gib(15.02), "outside_after_load_bytes": gib(1.50), "activation_bytes": gib(2.25), "outside_bytes": gib(1.61),
    "peak_bytes": gib(18.88), "available_bytes": gib(55.10), "bytes_per_token": 131072, "resolution_bytes": STEP,
    "estimated_tokens": 451362, "tokens_per_block": 32,
    "allocated_bytes": gib(55.10), "allocated_tokens": 451392, "announced_weights_bytes": gib(14.96),
}  # fmt: skip
_SPARK = {
    "weights_bytes": gib(16.05), "activation_bytes": gib(1.12), "fraction": 0.9, "bytes_per_token": 131072, "total_bytes": gib(119.64),
    "temporary_kv_bytes": gib(1.0), "resolution_bytes": STEP, "final_total_bytes": gib(119.640625), "tokens_per_block": 32,
}  # fmt: skip
EXPECTED = {
    "0.20": _DISCRETE | {
        "prefetched_bytes": gib(14.96), "fraction": 0.9,
    },
    "1.0": _DISCRETE | {
        "fraction": 0.8999999761581421, "total_bytes": gib(79.10), "temporary_kv_bytes": gib(1.0),
        "torch_limit_bytes": gib(21.47565),
    },
    "1.1": {
        "announced_weights_bytes": gib(63.32), "weights_bytes": gib(63.52), "outside_after_load_bytes": gib(49.78),
        "activation_bytes": gib(0.85), "outside_bytes": gib(49.28), "peak_bytes": gib(113.65), "available_bytes": gib(5.95),
        "fraction": 0.8999999761581421, "bytes_per_token": 73728, "total_bytes": gib(119.70), "temporary_kv_bytes": gib(0.56),
        "resolution_bytes": STEP, "estimated_bytes": gib(5.95), "tokens_per_block": 32,
        "reduced": (
            "Attention window size 131072 exceeds upper bound 86720 for available blocks. Reducing to 86720.",
            "Adjusted max_attention_window_vec to [86720]", "Adjusted window size 131072 to 86720 in blocks_per_window",
            "Adjusted max_seq_len to 86720",
        ),
        "allocated_bytes": gib(5.95), "allocated_tokens": 86720,
        "torch_limit_bytes": gib(71.62367630004883),
    },
    "1.2": _SPARK | {
        "prefetched_bytes": gib(14.96), "outside_after_load_bytes": gib(20.31), "outside_bytes": gib(20.45),
        "peak_bytes": gib(37.62), "available_bytes": gib(74.72), "estimated_bytes": gib(74.72),
        "final_free_bytes": gib(83.41796875), "windows": (Window(2049, 19128, 0),), "primary_blocks": 19128,
        "allocated_bytes": gib(74.72), "allocated_tokens": 612096, "torch_limit_bytes": gib(25.48345),
    },
    "1.3": _SPARK | {
        "outside_after_load_bytes": gib(22.79), "outside_bytes": gib(22.93), "peak_bytes": gib(40.10),
        "available_bytes": gib(72.49), "estimated_bytes": gib(72.49), "final_free_bytes": gib(70.25),
        "windows": (Window(2049, 16185, 0),), "primary_blocks": 16185, "allocated_bytes": gib(63.22), "allocated_tokens": 517920,
        "torch_limit_bytes": gib(24.2870),
    },
    "1.4": _SPARK | {
        "outside_after_load_bytes": gib(21.69), "outside_bytes": gib(21.83), "peak_bytes": gib(39.00),
        "available_bytes": gib(73.48), "limits": (Limit("max_tokens", 100000, gib(12.21)),), "estimated_bytes": gib(12.21),
        "final_free_bytes": gib(81.5), "windows": (Window(2049, 3125, 0),), "primary_blocks": 3125,
        "allocated_bytes": gib(12.21), "allocated_tokens": 100000, "torch_limit_bytes": gib(74.1768),
    },
    "v2": {
        "weights_bytes": gib(16.05), "outside_after_load_bytes": gib(22.79), "activation_bytes": gib(1.12),
        "outside_bytes": gib(22.93), "peak_bytes": gib(40.10), "available_bytes": gib(72.54), "fraction": 0.9, "bytes_per_token": 131072,
        "fixed_cost_bytes": 4194304, "total_bytes": gib(119.64), "temporary_kv_bytes": gib(1.06), "resolution_bytes": STEP,
        "estimated_bytes": gib(72.54), "device_quota_bytes": gib(72.53999999910593), "host_quota_bytes": gib(0.06),
        "disk_quota_bytes": gib(8.0), "torch_limit_bytes": gib(23.928),
    },
    "reduced": {
        "peak_bytes": gib(119.64), "available_bytes": gib(0.45), "fraction": 0.9, "bytes_per_token": 131072,
        "total_bytes": gib(119.64), "temporary_kv_bytes": gib(0.5), "resolution_bytes": STEP, "estimated_bytes": gib(0.45),
        "final_free_bytes": gib(0.5625), "final_total_bytes": gib(119.640625), "tokens_per_block": 32,
        "windows": (Window(3712, 116, 0),), "primary_blocks": 116,
        "reduced": (
            "Attention window size 4096 exceeds upper bound 3712 for available blocks. Reducing to 3712.",
            "Adjusted max_attention_window_vec to [3712]", "Adjusted window size 4096 to 3712 in blocks_per_window",
            "Adjusted max_seq_len to 3712",
        ),
        "allocated_bytes": gib(0.45), "allocated_tokens": 3712,
    },
    "mixed": {  # two streams without a newline between them, and two lines torn by others: those say nothing
        "weights_bytes": gib(16.05), "activation_bytes": gib(1.12), "outside_bytes": gib(20.45),
        "peak_bytes": gib(37.62), "available_bytes": gib(74.72), "fraction": 0.9, "bytes_per_token": 131072, "total_bytes": gib(119.64),
        "temporary_kv_bytes": gib(1.0), "resolution_bytes": STEP, "tokens_per_block": 32,
        "allocated_bytes": gib(74.72), "allocated_tokens": 612096,
    },
    "unitless": {
        "peak_bytes": gib(37.62), "available_bytes": gib(74.72), "fraction": 0.9, "bytes_per_token": 131072,
        "total_bytes": gib(119.64), "temporary_kv_bytes": gib(1.0), "resolution_bytes": STEP, "estimated_bytes": gib(74.72),
        "tokens_per_block": 32, "allocated_bytes": gib(74.72),
        "allocated_tokens": 612128,
        "warnings": ("free memory was printed without a unit (a version divides by 1 << 32): not believed",),
    },
    "mpi": {
        "weights_bytes": gib(8.10), "peak_bytes": gib(30.30), "available_bytes": gib(80.86), "fraction": 0.9,
        "bytes_per_token": 65536, "total_bytes": gib(119.64), "temporary_kv_bytes": gib(0.5), "resolution_bytes": STEP,
        "tokens_per_block": 32, "allocated_bytes": gib(80.86), "allocated_tokens": 1324800,
        "warnings": (
            f"peak_bytes: lines disagree, the last one counts ({gib(30.10)}, then {gib(30.30)})",
            f"available_bytes: lines disagree, the last one counts ({gib(81.04)}, then {gib(80.86)})",
        ),
    },
    "oom": {

        "out_of_memory": OutOfMemoryReport(
            "Executor creation failed due to insufficient GPU memory.",
            "Additional executor resources (temporary for KV cache size estimation)", gib(119.64), gib(0.35), None,
            (
                Stage("model", gib(110.12), gib(46.50)), Stage("sampler", gib(46.50), gib(45.90)),
                Stage("_no_capture_init_kv_cache", gib(45.90), gib(0.35)),
            ),
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_golden_log_says_exactly_this(name):
    assert said(parse(GOLDEN[name])) == EXPECTED[name]


def test_every_field_is_in_a_golden_log():
    covered = {name for expected in EXPECTED.values() for name in expected}
    rare = {"reserved_encoder_bytes", "reserved_workspace_bytes"}  # below
    assert covered | rare == {each.name for each in dataclasses.fields(Log)}


# ---- lines by themselves ----------------------------------------------------------------------------------

_PEAK = "Peak memory during memory usage profiling (torch + non-torch): 40.10 GiB, available KV cache memory when calculating max tokens: 72.49 GiB"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Memory used outside torch in memory usage profiling: 1.61 GiB", {"outside_bytes": gib(1.61)}),
        ("Reserving 1.25 GiB for multimodal encoder memory not materialized by the profiling run.", {"reserved_encoder_bytes": gib(1.25)}),
        ("Reserving 1.25 GiB for the multimodal encoder cache while estimating KV cache capacity.", {"reserved_encoder_bytes": gib(1.25)}),
        ("Reserving 0.50 GiB for the context-MLA attention workspace (fp8): KV cache budget 5.00 -> 4.50 GiB.", {"reserved_workspace_bytes": gib(0.5)}),
        ("max_tokens=4096 is provided, max_memory is set to 0.50 GiB", {"limits": (Limit("max_tokens", 4096, gib(0.5)),)}),
        ("max_gpu_total_bytes=8.00 GiB is provided. New max memory is 8.00 GiB", {"limits": (Limit("max_gpu_total_bytes", 8 * GIB, 8 * GIB),)}),
        ("max_gpu_total_bytes=8.00 GiB is provided, max_memory is set to 7.50 GiB", {"limits": (Limit("max_gpu_total_bytes", 8 * GIB, gib(7.5)),)}),
        ("KV cache manager v2 device quota set to 9.313225746154785e-10GiB", {"device_quota_bytes": 1}),
        (_PEAK, {"peak_bytes": gib(40.1), "available_bytes": gib(72.49), "resolution_bytes": STEP}),
        (_PEAK + ", fraction is set 0.85, kv size is 35136.0. device total memory 139.81 GiB",
         {"peak_bytes": gib(40.1), "available_bytes": gib(72.49), "resolution_bytes": STEP, "fraction": 0.85, "bytes_per_token": 35136, "total_bytes": gib(139.81)}),
        (_PEAK.replace("72.49", "-3.20"), {"peak_bytes": gib(40.1), "available_bytes": -gib(3.2), "resolution_bytes": STEP}),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 48.00 MiB. GPU 0 has a total capacity of 8.00 GiB of which 512.00 KiB is free.",
         {"out_of_memory": OutOfMemoryReport(
             "CUDA out of memory. Tried to allocate 48.00 MiB. GPU 0 has a total capacity of 8.00 GiB of which 512.00 KiB is free", None, 8 * GIB, 512 << 10, 48 << 20)}),
        ("torch.AcceleratorError: CUDA error: out of memory", {"out_of_memory": OutOfMemoryReport("CUDA error: out of memory")}),
    ],
)  # fmt: skip
def test_a_line_of_its_own(line, expected):
    assert said(parse(f"noise\n{line}\nnoise\n")) == expected


@pytest.mark.parametrize(
    "line",
    [
        _PEAK.replace("40.10 GiB", "40.10 MiB"),
        _PEAK.replace("40.10", "1e30"),
        "Estimated max memory in KV cache : 99999999999.00 GiB",  # no memory has that
        "Estimated max tokens in KV cache : 12345678901234567890123",
        "Estimated max tokens in KV cache : 451[TensorRT-LLM][INFO] torn",
        "[MemUsageChange] Allocated 5.95 GiB for max tokens in paged KV cache (867",
        "[MemUsageChange] Allocated 928.77 MiB for execution context memory.",
        "Memory used outside torch (e.g., NCCL and CUDA graphs) in memory usage profiling: nan GiB",
        "KV cache manager v2 device quota set to infGiB",
        "Attention window size 131072 exceeds upper bound",
        "Adjusted max_seq_len to 86[TensorRT-LLM] torn",
    ],
)
def test_a_line_that_is_not_whole_or_not_possible_says_nothing(line):
    assert parse(line + "\n") == Log()


def test_an_impossible_fraction_leaves_the_rest_of_the_peak_line():
    log = parse(_PEAK + ", fraction is set 9.5, kv size is 100. device total memory 1.00 GiB\n")
    assert (log.fraction, log.bytes_per_token, log.peak_bytes) == (None, 100, gib(40.1))


def test_with_hidden_python_lines_the_first_of_two_allocations_is_the_dry_run():
    lines = [line for line in GOLDEN["1.2"].splitlines() if line.startswith("[TensorRT-LLM][INFO]")]
    log = parse("\n".join(lines) + "\n")
    assert (log.allocated_tokens, log.primary_blocks) == (612096, 19128)
    one = parse("\n".join(lines[:3]) + "\n")  # an engine that makes no dry run
    assert one.allocated_tokens == 8224


@pytest.mark.parametrize("name", ["1.1", "1.2", "1.3", "1.4"])
def test_an_engine_that_died_in_its_dry_run_has_no_final_cache(name):
    before, _, _ = GOLDEN[name].partition("Estimated max memory")
    log = parse(before)
    assert (log.allocated_bytes, log.allocated_tokens) == (None, None)
    assert log.reduced == log.windows == ()


def test_sliding_windows_are_counted_together():
    lines = "".join(
        f"[TensorRT-LLM][INFO] Max KV cache blocks per sequence: 9 [window size={size}], tokens per block=32, primary blocks={blocks}, "
        "secondary blocks=0, max sequence length=2049\n"
        for size, blocks in ((128, 40), (2049, 60), (128, 40))
    )
    log = parse(lines)
    assert log.windows == (Window(128, 40, 0), Window(2049, 60, 0))
    assert (log.primary_blocks, log.tokens_per_block) == (100, 32)


def test_torchs_message_is_no_failure_when_the_engine_was_built_after_all():
    words = "CUDA out of memory. Tried to allocate 20.00 MiB."
    log = parse(f"{words} (handled, retrying)\nSetting PyTorch memory fraction to 0.5 (4.0 GiB)\n")
    assert (log.out_of_memory, log.warnings) == (None, (f"the engine got over this: {words}",))


def test_the_report_that_names_a_component_is_the_one():
    again = "RuntimeError: Executor creation failed due to insufficient GPU memory.\n"
    log = parse(GOLDEN["oom"] + "Traceback (most recent call last):\n" + again)
    assert log.out_of_memory == EXPECTED["oom"]["out_of_memory"]
    assert parse(again).out_of_memory == OutOfMemoryReport(
        "Executor creation failed due to insufficient GPU memory."
    )


def test_stages_are_read_behind_mpis_prefix():
    _, _, report = GOLDEN["oom"].partition("RuntimeError: ")
    tagged = "".join(f"[1,0]<stderr>:{line}\n" for line in report.splitlines())
    assert parse(tagged).out_of_memory == EXPECTED["oom"]["out_of_memory"]


# ---- it never raises and never invents --------------------------------------------------------------------

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def printed(text):
    """Every size and count that the numbers of a text can mean."""
    units = (1, 1 << 10, 1 << 20, GIB)
    found = {
        sign * round(float(number) * unit)
        for number in _NUMBER.findall(text)
        for unit in units
        for sign in (1, -1)
        if float(number) < 1e18
    }
    return found | {int(number) for number in re.findall(r"\d+", text)} | {0.9, 0.8999999761581421}


def numbers(value):
    """All numbers in a Log, but those that are derived: the printing step and the sum over windows."""
    if isinstance(value, bool | str) or value is None:
        return []
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, tuple):
        return [number for each in value for number in numbers(each)]
    derived = {"resolution_bytes", "primary_blocks"}
    return [number for name, each in vars(value).items() if name not in derived for number in numbers(each)]


LINES = sorted({line for text in GOLDEN.values() for line in text.splitlines() if line})
noise = st.text(st.characters(codec="utf-8"), max_size=40).map(lambda text: re.sub(r"\s", " ", text))


@settings(max_examples=150)
@given(st.text(max_size=300))
def test_any_text_is_read_without_an_error(text):
    assert parse(text) == Log()


@settings(max_examples=80)
@given(st.lists(st.one_of(st.sampled_from(LINES), noise, st.integers(0, 10**30).map(str)), max_size=25), st.sampled_from(["\n", "", "\r\n", " "]))  # fmt: skip
def test_lines_in_any_order_with_any_noise_say_only_what_was_printed(lines, separator):
    text = separator.join(lines)
    assert set(numbers(parse(text))) <= printed(text)


@settings(max_examples=120)
@given(st.sampled_from(sorted(GOLDEN)), st.floats(0, 1), st.floats(0, 1))
def test_a_log_that_was_cut_says_nothing_that_the_whole_does_not(name, start, end):
    text = GOLDEN[name]
    part = text[int(start * len(text)) : int(end * len(text))]
    assert set(numbers(parse(part))) <= printed(text)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_number_that_was_cut_or_torn_in_any_place_is_right_or_missing(name):
    text = GOLDEN[name]
    whole = printed(text)
    other = "[TensorRT-LLM][INFO] KV cache block reuse is disabled\n"
    for match in re.finditer(r"(?<=[\d.])(?=[\d.])", text):
        cut = match.start()
        for part in (text[:cut], text[cut:], text[:cut] + other + text[cut:]):
            assert set(numbers(parse(part))) <= whole, part[max(0, cut - 60) : cut + 60]


def test_a_peak_line_that_was_torn_takes_nothing_from_the_one_before():
    _, _, line = GOLDEN["1.2"].partition("Peak memory")
    whole = "Peak memory" + line.partition("\n")[0]
    log = parse(f"{whole}\n{_PEAK}, fraction is set 0.[TensorRT-LLM][INFO] torn\n")
    assert (log.peak_bytes, log.fraction, log.total_bytes, log.bytes_per_token) == (
        gib(40.1),
        None,
        None,
        None,
    )


@settings(max_examples=60)
@given(st.data())
def test_noise_between_the_lines_changes_nothing(data):
    name = data.draw(st.sampled_from(sorted(set(EXPECTED) - {"oom"})))
    lines = []
    for line in GOLDEN[name].splitlines():
        lines += [*data.draw(st.lists(noise, max_size=2)), line]
    assert parse("\n".join(lines) + "\n") == parse(GOLDEN[name])


# ---- a Log that is printed is read back -------------------------------------------------------------------

sizes = st.integers(1, 20000).map(lambda hundredths: hundredths / 100)
counts = st.integers(1, 1 << 40)


@st.composite
def engines(draw):
    """Sizes as an engine prints them, in hundredths of a GiB."""
    names = ("weights", "outside_after_load", "activation", "outside", "peak", "available", "total", "temporary_kv", "estimated", "pool", "first_pool")  # fmt: skip
    return {name: draw(sizes) for name in names} | {
        "generation": draw(st.integers(1, 4)),
        "fraction": draw(st.floats(0.01, 1).filter(lambda value: "e" not in str(value))),
        "bytes_per_token": draw(counts),
        "final_free": draw(st.floats(0.001, 500)),
        **{name: draw(counts) for name in ("tokens", "first_tokens", "final_tokens", "tokens_per_block")},
    }


def render(engine):
    """The lines of one generation, as documented."""
    size, total, temporary = (
        engine["bytes_per_token"],
        f"{engine['total']:.2f} GiB",
        f"{engine['temporary_kv']:.2f} GiB",
    )
    fraction = f", fraction is set {engine['fraction']}"
    tail = {
        1: "",
        2: f"{fraction}, kv size is {size}",
        3: f"{fraction}, kv size is {size}. device total memory {total}, , tmp kv_mem {temporary}",
        4: f"{fraction}, kv size per token is {size} bytes/token. device total memory {total}, temporary kv cache memory during profiling {temporary}",
    }[engine["generation"]]
    profiled = "in memory usage profiling:"
    return f"""\
[MemUsageChange] Allocated {engine['first_pool']:.2f} GiB for max tokens in paged KV cache ({engine['first_tokens']}).
Memory used after loading model weights (inside torch) {profiled} {engine['weights']:.2f} GiB
Memory used after loading model weights (outside torch) {profiled} {engine['outside_after_load']:.2f} GiB
Memory dynamically allocated during inference (inside torch) {profiled} {engine['activation']:.2f} GiB
Memory used outside torch (e.g., NCCL and CUDA graphs) {profiled} {engine['outside']:.2f} GiB
Peak memory during memory usage profiling (torch + non-torch): {engine['peak']:.2f} GiB, available KV cache memory when calculating max tokens: {engine['available']:.2f} GiB{tail}
Estimated max memory in KV cache : {engine['estimated']:.2f} GiB
Both free_gpu_memory_fraction and max_tokens are set (to {engine['fraction']} and {engine['final_tokens']} with free memory {engine['final_free']}GiB of total memory 119.7GiB, respectively). The smaller value will be used.
Number of tokens per block: {engine['tokens_per_block']}.
[MemUsageChange] Allocated {engine['pool']:.2f} GiB for max tokens in paged KV cache ({engine['tokens']}).
"""  # fmt: skip


@settings(max_examples=60)
@given(engines())
def test_a_log_that_is_printed_is_read_back(engine):
    generation = engine["generation"]
    expected = {
        f"{name}_bytes": gib(engine[name])
        for name in ("weights", "outside_after_load", "activation", "outside", "peak", "available", "estimated", "final_free")
    } | {
        "final_total_bytes": gib(119.7), "resolution_bytes": STEP,
        "tokens_per_block": engine["tokens_per_block"], "allocated_bytes": gib(engine["pool"]), "allocated_tokens": engine["tokens"],
    }  # fmt: skip
    if generation > 1:
        expected |= {"fraction": engine["fraction"], "bytes_per_token": engine["bytes_per_token"]}
    if generation > 2:
        expected |= {"total_bytes": gib(engine["total"]), "temporary_kv_bytes": gib(engine["temporary_kv"])}
    assert said(parse(render(engine))) == expected
