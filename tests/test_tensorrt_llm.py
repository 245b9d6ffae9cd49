"""The TensorRT-LLM adapter: arguments by feature, sources of the capacity, the sizing moment, processes, failures.

Against small fakes here; against the strict double, as a process, in the second half.
"""

import dataclasses
import enum
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel

from spark_ray import native_tensorrt_llm
from spark_ray.engines import TensorRTLLMEngine
from spark_ray.experiment import Workload
from spark_ray.measurements import KvCache
from spark_ray.result import Asked, Result, misfits
from spark_ray.worker import engine_tensorrt_llm as engine
from spark_ray.worker import protocol, session
from spark_ray.worker import tensorrt_llm_api as api
from spark_ray.worker import tensorrt_llm_pool as pool
from spark_ray.worker.tensorrt_llm_log import Log, parse

CONFIGURATION = {"max_batch_size": 8, "max_num_tokens": 512, "memory_fraction": 0.5}


def settings(**own):
    return TensorRTLLMEngine(kind="tensorrt_llm", **own).model_dump(mode="json")


# ---- arguments --------------------------------------------------------------------------------------------


def library(*, lacking=(), version="1.2.1"):
    """A library that takes the named arguments, but for those it lacks, and keeps what it was given."""

    def takes(*names):
        fields = {name: None for name in names if name not in lacking}
        return type("Config", (SimpleNamespace,), {"model_fields": fields})

    kv = takes(
        "free_gpu_memory_fraction", "max_tokens", "tokens_per_block", "dtype", "enable_block_reuse", "host_cache_size",
        "use_kv_cache_manager_v2",
    )  # fmt: skip
    llm_args = takes(
        "max_batch_size", "max_num_tokens", "max_seq_len", "cuda_graph_config", "kv_cache_config", "load_format",
        "enable_chunked_prefill", "enable_iter_perf_stats",
    )  # fmt: skip

    class LLM:
        def __init__(
            self, model, tensor_parallel_size=1, skip_tokenizer_init=False, trust_remote_code=False, **more
        ):
            pass

    graphs = takes("max_batch_size", "enable_padding")
    llmapi = SimpleNamespace(KvCacheConfig=kv, CudaGraphConfig=graphs, TorchLlmArgs=llm_args)
    return SimpleNamespace(__version__=version, LLM=LLM, llmapi=llmapi)


@pytest.fixture
def arguments(monkeypatch):
    def make(max_tokens=None, lacking=(), **own):
        made = library(lacking=lacking)
        monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", made.llmapi)
        return api.llm_arguments(made, settings(**own), CONFIGURATION, "/model", max_tokens)

    return make


def test_everything_that_moves_the_pool_is_said(arguments):
    made = arguments(
        max_tokens=4096, kv_dtype="fp8", tokens_per_block=64, load_format="dummy", max_seq_len=1000
    )
    assert vars(made.pop("kv_cache_config")) == {
        "max_tokens": 4096, "free_gpu_memory_fraction": 0.5, "tokens_per_block": 64, "dtype": "fp8",
        "enable_block_reuse": False, "host_cache_size": 0, "use_kv_cache_manager_v2": False,
    }  # fmt: skip
    assert vars(made.pop("cuda_graph_config")) == {"max_batch_size": 8, "enable_padding": True}
    assert made == {
        "model": "/model", "tensor_parallel_size": 1, "max_batch_size": 8, "max_num_tokens": 512, "max_seq_len": 1000,
        "load_format": "dummy", "skip_tokenizer_init": True, "trust_remote_code": False,
        "enable_chunked_prefill": False, "enable_iter_perf_stats": True,
    }  # fmt: skip


def test_graphs_are_off_by_none_and_not_by_leaving_them_out(arguments):
    assert arguments(cuda_graphs=False)["cuda_graph_config"] is None


@pytest.mark.parametrize(
    ("lacks", "own", "named"),
    [
        ("tokens_per_block", {"tokens_per_block": 64}, "engine.tokens_per_block"),
        ("use_kv_cache_manager_v2", {"kv_cache_manager": "v2"}, "engine.kv_cache_manager"),
        ("dtype", {"kv_dtype": "nvfp4"}, "engine.kv_dtype"),
        ("load_format", {"load_format": "dummy"}, "engine.load_format"),
        ("max_seq_len", {}, "engine.max_seq_len"),
        ("enable_padding", {}, "engine.cuda_graphs"),
        ("enable_block_reuse", {}, "share no prefix"),
    ],
)
def test_a_knob_that_is_asked_for_and_lacking_is_refused_by_name(arguments, lacks, own, named):
    with pytest.raises(api.UnsupportedError, match=rf"tensorrt_llm 1\.2\.1 has no \w+\({lacks}=.*{named}"):
        arguments(lacking=(lacks,), **own)


def test_a_knob_that_nobody_turned_may_be_lacking(arguments):
    lacking = (
        "tokens_per_block",
        "use_kv_cache_manager_v2",
        "dtype",
        "load_format",
        "enable_iter_perf_stats",
    )
    made = arguments(lacking=lacking)
    assert not set(lacking) & (set(made) | set(vars(made["kv_cache_config"])))


def test_names_are_read_from_models_dataclasses_and_constructors():
    class Model(BaseModel):
        first: int = 0

    @dataclasses.dataclass
    class Data:
        second: int = 0

    class Plain:
        def __init__(self, third, *rest, **more):
            pass

    assert api.offered(Model, Data, Plain) == {"first", "second", "third"}


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("1.0.0", True),
        ("1.3.0rc21", True),
        ("1.4.0rc1", True),
        ("0.21.0", False),
        ("1.5.0", False),
        ("dev", False),
    ],
)
def test_known_releases(version, known):
    assert api.version_known(version) is known


@pytest.mark.parametrize(("is_double", "wanted"), [(True, False), (False, True)])
def test_a_double_is_never_taken_for_the_real_one_nor_the_real_one_for_a_double(
    monkeypatch, is_double, wanted
):
    found = SimpleNamespace(ENGINE_IS_DOUBLE=is_double, __file__="/somewhere/tensorrt_llm/__init__.py")
    monkeypatch.setitem(sys.modules, "tensorrt_llm", found)
    with pytest.raises(api.UnsupportedError, match=r"/somewhere/tensorrt_llm.*engine\.double"):
        api.load(double=wanted)
    assert api.load(double=is_double) is found


def test_the_environment_is_set_before_the_library_reads_it(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ, TLLM_WORKER_USE_SINGLE_PROCESS="1"))
    api.prepare_environment("mpi")
    wanted = {"TLLM_LOG_LEVEL": "INFO", "TRTLLM_NO_USAGE_STATS": "1", "TLLM_WORKER_USE_SINGLE_PROCESS": "0"}
    assert wanted.items() <= os.environ.items()
    api.prepare_environment("single_process")
    assert os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"


# ---- capacity ---------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    KV_CACHE_MANAGER = "KV_CACHE_MANAGER"
    SEQ_SLOT_MANAGER = "SEQ_SLOT_MANAGER"


def manager(blocks=100, page=32, allocated=100 * 32 * 512, **own):
    stats = SimpleNamespace(max_num_blocks=blocks, tokens_per_block=page, allocated_bytes=allocated)
    return SimpleNamespace(
        get_kv_cache_stats=lambda: stats,
        get_cache_bytes_per_token=lambda: 512,
        **{"max_seq_len": 2049, **own},
    )


def in_process(found, key=Kind.KV_CACHE_MANAGER):
    managers = {Kind.SEQ_SLOT_MANAGER: None, key: found}
    executor = SimpleNamespace(
        engine=SimpleNamespace(resource_manager=SimpleNamespace(resource_managers=managers))
    )
    return SimpleNamespace(_executor=executor)


ELSEWHERE = SimpleNamespace(_executor=SimpleNamespace())


@pytest.mark.parametrize("key", [Kind.KV_CACHE_MANAGER, "kv_cache_manager"])
def test_capacity_from_the_manager_of_this_process(key):
    found = pool.from_manager(in_process(manager(), key))
    assert found == pool.Reading("KV cache manager", 100, 32, 512, 100 * 32 * 512, 2049)
    assert pool.from_manager(ELSEWHERE) is None


def test_a_manager_whose_statistics_are_silent_has_attributes():
    silent = manager(blocks=0, page=0, allocated=0, blocks_in_primary_pool=7, tokens_per_block=64)
    found = pool.from_manager(in_process(silent))
    assert (found.blocks, found.tokens_per_block, found.allocated_bytes) == (7, 64, None)


def test_capacity_from_the_api_and_from_statistics(monkeypatch):
    monkeypatch.setattr(pool, "_STATS_S", 0.1)
    said = {"maxNumBlocks": 9, "tokensPerBlock": 32, "maxNumTokens": 288}
    assert pool.from_api(SimpleNamespace(get_kv_cache_capacity=lambda: said)).tokens == 288
    assert (
        pool.from_api(SimpleNamespace(get_kv_cache_capacity=dict)) is None
    )  # without a manager it answers {}
    assert pool.from_api(SimpleNamespace()) is None
    iterations = [{"iter": 0, "kvCacheStats": None}, json.dumps({"iter": 1, "kvCacheStats": said})]
    assert pool.from_stats(SimpleNamespace(get_stats=lambda **_: iterations)).tokens == 288
    assert pool.from_stats(SimpleNamespace(get_stats=lambda **_: [])) is None
    late = iter([[], iterations])  # they come after the answer to their request
    assert pool.from_stats(SimpleNamespace(get_stats=lambda **_: next(late))).tokens == 288


def test_statistics_cost_a_request_and_speak_only_when_they_must():
    def asked():
        requests.append(1)

    requests = []
    llm = SimpleNamespace(
        _executor=SimpleNamespace(),
        get_stats=lambda **_: [{"kvCacheStats": {"maxNumBlocks": 3, "tokensPerBlock": 32}}],
    )
    log = Log(allocated_tokens=96, tokens_per_block=32)
    assert [each.source for each in pool.readings(llm, log, 32, asked)] == ["LLM.get_stats", "log"]
    assert requests
    requests.clear()
    llm.get_kv_cache_capacity = lambda: {"maxNumBlocks": 3, "tokensPerBlock": 32}
    assert [each.source for each in pool.readings(llm, log, 32, asked)] == [
        "LLM.get_kv_cache_capacity",
        "log",
    ]
    assert not requests


def test_the_host_believes_the_capacity():
    found = [pool.from_manager(in_process(manager())), pool.Reading("log", 100, 32)]
    made = KvCache.model_validate(pool.capacity(found, 512, 2048))
    assert (made.tokens, made.sequences, made.bytes, made.tensor_bytes) == (3200, 1, 3200 * 512, 3200 * 512)
    assert made.second_source.source == "log"
    other = pool.capacity([pool.Reading("a", 100, 32, 512, 10**9), pool.Reading("b", 90, 32)], 512, 2048)
    assert "tensor_bytes" not in other  # an allocation that is no pool of this size is not said to be one
    with pytest.raises(ValueError, match="second_source"):
        KvCache.model_validate(other)


class Parameter(SimpleNamespace):
    def numel(self):
        return self.values

    def element_size(self):
        return 2


@pytest.mark.parametrize(
    ("listed", "log", "expected"),
    [
        (100, Log(weights_bytes=250, resolution_bytes=10), {"weight_bytes": 200, "parameters": 100}),
        (100, Log(), {"weight_bytes": 200, "parameters": 100}),
        # Fused experts are laid out anew and kept as plain attributes: the model's own list lacks them.
        (100, Log(weights_bytes=900, resolution_bytes=10), {"weight_bytes": 900, "resolution_bytes": 10}),
        (None, Log(weights_bytes=900, resolution_bytes=10), {"weight_bytes": 900, "resolution_bytes": 10}),
        (None, Log(), None),
    ],
)
def test_weights_are_counted_where_the_model_lists_them_all(listed, log, expected):
    model = SimpleNamespace(parameters=lambda: [Parameter(values=listed)])
    engine_here = SimpleNamespace(model_engine=SimpleNamespace(model=model if listed else None))
    assert pool.weights(SimpleNamespace(_executor=SimpleNamespace(engine=engine_here)), log) == expected


@pytest.mark.parametrize(
    ("said", "asked", "held"),
    [
        (None, 0.9, True),
        (0.9, 0.9, True),
        (0.8999999761581421, 0.9, True),
        (0.8, 0.9, False),
        (0.9, 0.89, False),
    ],
)
def test_the_engines_own_fraction_is_the_one_that_was_asked_for(said, asked, held):
    if held:
        pool.check_fraction(Log(fraction=said), asked)
        return
    with pytest.raises(
        api.UnsupportedError, match=f"memory_fraction {asked} did not take effect: the engine says {said}"
    ):
        pool.check_fraction(Log(fraction=said), asked)


def test_no_source_no_capacity():
    with pytest.raises(api.UnsupportedError, match="KV capacity"):
        pool.capacity([], 512, 2048)
    with pytest.raises(api.UnsupportedError, match="how many bytes a token"):
        pool.bytes_per_token([pool.Reading("log", 1, 32)], Log(), None, "auto")


@pytest.mark.parametrize(
    ("reading", "log", "by_config", "found"),
    [(512, 256, 128, 512), (None, 256, 128, 256), (None, None, 128, 128), (512, None, None, 512)],
)
def test_bytes_of_a_token_are_the_engines_own(reading, log, by_config, found):
    readings = [pool.Reading("a", 1, 32, reading)]
    assert pool.bytes_per_token(readings, Log(bytes_per_token=log), by_config, "auto") == found


def test_a_kv_dtype_that_did_not_take_effect_is_refused():
    with pytest.raises(api.UnsupportedError, match=r"kv_dtype nvfp4 did not take effect"):
        pool.bytes_per_token([pool.Reading("a", 1, 32, 512)], Log(), 144, "nvfp4")


@pytest.mark.parametrize(
    ("tokens", "seen", "longest_of_manager", "max_tokens", "reason"),
    [
        (1024, Log(), None, None, "pool_below_one_sequence"),
        (4096, Log(reduced=("Adjusted max_seq_len to 100",)), None, None, "max_seq_len_reduced"),
        (4096, Log(), 2000, None, "max_seq_len_reduced"),
        (4096, Log(), 2049, 8192, "pool_below_pinned"),
        (4096, Log(), 2049, 4127, None),  # whole blocks of it
        (4096, Log(), None, None, None),
    ],
)
def test_a_pool_that_is_not_what_was_asked_is_infeasible(
    tokens, seen, longest_of_manager, max_tokens, reason
):
    first = pool.Reading("a", tokens // 32, 32, 512, max_seq_len=longest_of_manager)
    made = pool.capacity([first], 512, 2048)
    if reason is None:
        pool.check_as_asked(made, first, seen, 2048, max_tokens)
        return
    with pytest.raises(session.Infeasible) as error:
        pool.check_as_asked(made, first, seen, 2048, max_tokens)
    assert error.value.reason == reason


# ---- one conversation at a time, and the sizing moment -----------------------------------------------------


@pytest.fixture
def talk(tmp_path):
    """A session whose host answers at once; `talk.said` is what the host heard."""
    (tmp_path / "worker.log").write_text("before\n")
    heard, control = os.pipe()
    answers, answer = os.pipe()
    request = {"engine": settings(), "configuration": CONFIGURATION, "model_path": None}
    made = session.Session(tmp_path, request, control, answers)
    made.said = []

    def host():
        with os.fdopen(heard) as lines:
            for line in lines:
                made.said.append(line.split()[1:])
                time.sleep(0.002)  # long enough for another thread to come between
                os.write(answer, b"go\n")

    thread = threading.Thread(target=host)
    thread.start()
    yield made
    os.close(control)
    thread.join()
    for each in (answers, answer, made._observations):
        os.close(each)


def test_two_threads_never_speak_at_once(talk):
    names = ["after_load", "sizing"] * 5
    threads = [threading.Thread(target=talk.phase, args=(name,)) for name in names]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    spoken = [tuple(words) for words in talk.said]
    assert len(spoken) == 15
    settled = [place for place, words in enumerate(spoken) if words == ("settle",)]
    assert all(spoken[place + 1] == ("phase", "sizing") for place in settled)
    seen = [
        json.loads(line)["phase"] for line in (talk.folder / "observations.jsonl").read_text().splitlines()
    ]
    assert seen == [words[1] for words in spoken if words[0] == "phase"]


def append(talk, words):
    with (talk.folder / "worker.log").open("a") as log:
        log.write(words)


def start(talk, llm):
    """`_Engine.start`'s way of starting, with a stand-in for LLM()."""
    log = engine._Log(talk.folder)
    moment = engine._Sizing(talk, log)
    with moment:
        llm()
    return moment, log


def test_the_sizing_moment_is_the_log_line_where_the_engine_is_another_process(talk):
    def llm():
        append(talk, "noise Memory used after load")
        time.sleep(0.05)
        append(talk, "ing model weights (inside torch) in memory usage profiling: 1.00 GiB\n")
        deadline = time.monotonic() + 10
        while ["phase", "sizing"] not in talk.said and time.monotonic() < deadline:
            time.sleep(0.005)

    moment, log = start(talk, llm)
    assert (moment.how, moment.seen["phase"]) == ("log line", "sizing")
    assert talk.said == [["settle"], ["phase", "sizing"]]
    assert parse(log.text()).weights_bytes == 1 << 30
    assert "before" not in log.text()


def test_an_engine_that_says_nothing_is_settled_before_and_not_observed(talk):
    moment, _ = start(talk, lambda: append(talk, "nothing of interest\n"))
    assert (moment.how, moment.seen, talk.said) == ("before start", None, [["settle"]])


def install(monkeypatch, talk, **methods):
    """An engine in this process: a KvCacheCreator with these methods, and the torch.cuda that they read."""
    cuda = SimpleNamespace(mem_get_info=lambda: (1, 2))
    creator = type("KvCacheCreator", (), methods)
    place = SimpleNamespace(KvCacheCreator=creator, torch=SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "tensorrt_llm._torch.pyexecutor._util", place)
    talk.request["engine"]["worker"] = "single_process"
    return creator, cuda


@pytest.mark.parametrize("name", ["configure_kv_cache_capacity", "estimate_max_tokens"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_the_sizing_moment_is_the_last_reading_where_the_engine_is_here(talk, monkeypatch, name, dry_run):
    def read():
        cuda.mem_get_info()
        order.append(len(talk.said))

    def size(_, executor):
        order.append(executor)
        read()
        if dry_run:
            statistics = threading.Thread(target=cuda.mem_get_info)  # of the dry run, in a thread of its own
            statistics.start()
            statistics.join()
            order.append("dry run")
            read()
        return "sized"

    order = []
    creator, cuda = install(monkeypatch, talk, **{name: size})
    plain = cuda.mem_get_info
    talk.sources.append(lambda: {"cuda": cuda.mem_get_info()})  # the worker's own look reads as well
    sized = []
    moment, _ = start(talk, lambda: sized.extend(getattr(creator(), name)("executor") for _ in range(2)))
    assert (moment.how, moment.seen["phase"], sized) == ("hook", "sizing", ["sized", "sized"])
    look = [["settle"], ["phase", "sizing"]]
    assert talk.said == [["settle"], *look, *(look if dry_run else [])]
    once = ["executor", 3, "dry run", 5] if dry_run else ["executor", 3]
    # A later sizing is not observed again.
    assert order == once + [max(each, len(talk.said)) if isinstance(each, int) else each for each in once]
    seen = [json.loads(line) for line in (talk.folder / "observations.jsonl").read_text().splitlines()]
    assert moment.seen["monotonic_s"] == max(each["monotonic_s"] for each in seen)
    assert cuda.mem_get_info is plain


def test_a_hook_that_is_never_called_is_settled_before_and_not_observed(talk, monkeypatch):
    install(monkeypatch, talk, configure_kv_cache_capacity=lambda _: None)
    moment, _ = start(talk, lambda: None)
    assert (moment.how, moment.seen, talk.said) == ("before start", None, [["settle"]])


def test_a_host_that_goes_while_the_engine_starts_ends_the_worker(talk, monkeypatch):
    def gone(*_, **__):
        raise session.HostGone

    def llm():
        append(talk, "Memory used after loading model weights\n")
        time.sleep(0.2)

    talk.settle()
    monkeypatch.setattr(talk, "settle", lambda: None)
    monkeypatch.setattr(talk, "phase", gone)
    with pytest.raises(session.HostGone):
        start(talk, llm)


# ---- what a failure means -----------------------------------------------------------------------------------


def told(talk, error, log=""):
    append(talk, log)
    return engine._told_apart(error, SimpleNamespace(text=(talk.folder / "worker.log").read_text))


REPORT = """\
RuntimeError: Executor creation failed due to insufficient GPU memory.

The following component could not be created: KV cache
Total GPU memory (GiB): 119.70
Free GPU memory before component creation attempt (GiB): 1.20

Previously created components and free GPU memory before/after creation (GiB):
Model: 110.00 / 1.20

"""


def outermost(cause):
    try:
        raise RuntimeError("Executor worker returned error") from cause
    except RuntimeError as error:
        return error


def test_the_engines_account_of_memory_is_kept(talk):
    error = told(talk, outermost(RuntimeError("see the log")), REPORT)
    assert isinstance(error, session.OutOfMemory)
    assert "could not create: KV cache" in str(error)
    assert "Model took" in str(error)


TRIED = "[TRT-LLM] [W] [Autotuner] Failed when profiling runner=a, tactic=1. Error: CUDA out of memory. Tried to allocate 2.00 GiB.\n"  # fmt: skip


@pytest.mark.parametrize(
    ("error", "log"),
    [
        (outermost(ValueError("ptxas fatal")), "CUDA out of memory. Tried to allocate 2.00 GiB.\n"),
        (outermost(ValueError("ptxas fatal")), TRIED),
        (ValueError("ptxas fatal"), TRIED),
    ],
)
def test_memory_that_the_engine_got_over_is_not_why_it_failed(talk, error, log):
    found = told(talk, error, log)
    assert isinstance(found, engine.EngineStartError)
    assert "ptxas fatal" in str(found)


def test_an_exception_without_a_reason_is_explained_by_the_log(talk):
    found = told(talk, RuntimeError("a rank died"), "CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    assert isinstance(found, session.OutOfMemory)


def test_memory_that_ran_out_while_serving_is_an_answer():
    class RequestError(Exception):
        pass

    def serve(words):
        def generate(*_, **__):
            raise RequestError(words)

        made = object.__new__(engine._Engine)
        made._llm, made._library, made._log = SimpleNamespace(generate=generate), None, None
        return made

    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "sampling", lambda *_: None)
        with pytest.raises(session.OutOfMemory, match="Tried to allocate 2"):
            serve(words)._one_request()
        with pytest.raises(RequestError, match="no such adapter"):
            serve("no such adapter")._one_request()
        patch.setattr(engine.workload, "prompts", lambda *_: [[1]])
        patch.setattr(engine.identity, "vocabulary", lambda _: 2)
        made = serve(words)
        work = {"workload": {"output_tokens": 1, "streaming": False}}
        made._talk, made._model = SimpleNamespace(request=work), None
        with pytest.raises(session.OutOfMemory, match="Tried to allocate 2"):
            made.generate()


@pytest.mark.parametrize(
    "words",
    ["CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA error: out of memory", "[TensorRT-LLM] CUDA runtime error in cudaMalloc: out of memory"],
)  # fmt: skip
def test_memory_that_ran_out_below_is_told_by_the_whole_chain(talk, words):
    assert isinstance(told(talk, outermost(RuntimeError(words))), session.OutOfMemory)


def test_a_pool_without_room_for_one_sequence_is_an_answer(talk):
    error = told(talk, outermost(AssertionError("max_blocks_per_seq > 0")))
    assert (type(error), error.reason) == (session.Infeasible, "pool_below_one_sequence")


def test_any_other_failure_says_every_link_of_its_chain(talk):
    error = told(talk, outermost(ValueError("no such attention")))
    assert isinstance(error, engine.EngineStartError)
    assert "Executor worker returned error" in str(error)
    assert "ValueError: no such attention" in str(error)


def test_what_the_engine_would_refuse_is_told_before_the_start():
    work = {"requests": 1, "input_tokens": 600, "output_tokens": 8}
    with pytest.raises(session.Infeasible, match="max_num_tokens 512"):
        engine._check_asked(work, settings(), CONFIGURATION)
    with pytest.raises(api.UnsupportedError, match="max_seq_len 100"):
        engine._check_asked({**work, "input_tokens": 99}, settings(max_seq_len=100), CONFIGURATION)
    engine._check_asked({**work, "requests": 0}, settings(), CONFIGURATION)
    with pytest.raises(api.UnsupportedError, match="below 1"):
        engine._check_asked(work, settings(), {**CONFIGURATION, "memory_fraction": 1.0})


def test_bytes_are_pinned_by_tokens():
    known = {"bytes_per_token": 1000, "absent": {}}
    assert engine._pinned_tokens(settings(kv_cache="1MiB"), known) == 1048
    assert engine._pinned_tokens(settings(), known) is None
    unknown = {"bytes_per_token": None, "absent": {"bytes_per_token": "a hybrid"}}
    with pytest.raises(api.UnsupportedError, match="a hybrid"):
        engine._pinned_tokens(settings(kv_cache="1MiB"), unknown)


# ---- processes --------------------------------------------------------------------------------------------


def child(code, program=sys.executable):
    return subprocess.Popen([program, "-c", code], executable=sys.executable, stdin=subprocess.PIPE)


@pytest.mark.process
def test_the_end_is_when_the_processes_are_gone():
    late = "import sys, time; sys.stdin.read(); time.sleep(0.3)"
    with child(late) as worker, child("import sys; sys.stdin.read()", "orted") as daemon:
        before = set(api.children())
        assert {each.pid for each in before} >= {worker.pid}
        assert daemon.pid not in {each.pid for each in before}  # MPI's own ends with this process
        llm = SimpleNamespace(shutdown=worker.stdin.close)
        mine = {each for each in before if each.pid == worker.pid}
        seconds, killed = api.shut_down(llm, set(mine))
        assert all(each.gone for each in mine)
        assert (seconds > 0, killed) == (True, [])
        assert daemon.poll() is None
        daemon.stdin.close()


def test_a_process_that_is_seen_before_and_after_its_exec_is_one():
    assert len({api.Child(7, "1234", "python"), api.Child(7, "1234", "trtllm-worker")}) == 1
    assert len({api.Child(7, "1234", "python"), api.Child(7, "1235", "python")}) == 2


@pytest.mark.process
def test_a_process_that_does_not_end_is_ended_and_named(monkeypatch):
    monkeypatch.setattr(api, "SHUTDOWN_S", 0.1)
    with child("import time; time.sleep(600)") as worker:
        mine = {each for each in api.children() if each.pid == worker.pid}
        _, killed = api.shut_down(SimpleNamespace(shutdown=lambda: None), mine)
        assert [each.pid for each in killed] == [worker.pid]
        assert worker.wait(10) < 0


@pytest.mark.parametrize(
    ("executor", "children", "ran"),
    [
        ("GenerationExecutorProxy", 1, "mpi"),
        ("GenerationExecutorRpcProxy", 1, "mpi"),
        ("GenerationExecutorWorker", 0, "single_process"),
        ("GenerationExecutorWorker", 2, "single_process"),
        ("Unheard", 1, "mpi"),
    ],
)
def test_how_the_engine_really_runs(executor, children, ran):
    llm = SimpleNamespace(_executor=type(executor, (), {})())
    assert api.ran_as(llm, [api.Child(1, "1", "python")] * children) == ran


# ---- what this interpreter lacks ----------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts modules of these names where this interpreter looks first; nothing of MPI is there otherwise."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(native_tensorrt_llm.ctypes.util, "find_library", lambda _: None)
    monkeypatch.setattr(native_tensorrt_llm.shutil, "which", lambda _: None)

    def make(*files):
        for each in files:
            path = tmp_path / each
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise SystemExit('imported')\n")
        importlib.invalidate_caches()
        return [each.what for each in native_tensorrt_llm.problems()]

    return make


def test_no_library_at_all_is_one_problem(installed):
    (what,) = installed()
    assert "no tensorrt_llm in this interpreter" in what


def test_a_stub_is_known_by_its_name_without_a_module(installed):
    metadata = Path(sys.path[0], "tensorrt_llm-1.2.0.dist-info/METADATA")
    metadata.parent.mkdir()
    metadata.write_text("Name: tensorrt-llm\nVersion: 1.2.0\n")
    (what,) = installed()
    assert "tensorrt-llm 1.2.0 is installed here as a stub" in what


def test_sources_are_not_the_library_and_mpi_is_asked_for(installed):
    whole, mpi = installed("tensorrt_llm/__init__.py")
    assert "no compiled library" in whole
    assert "mpi4py" in mpi
    (mpi,) = installed("tensorrt_llm/libs/libtensorrt_llm.so")
    assert "mpi4py" in mpi
    (mpi,) = installed("mpi4py/__init__.py")
    assert "libmpi" in mpi


def test_nothing_is_lacking_where_all_of_it_is(installed, monkeypatch):
    monkeypatch.setattr(native_tensorrt_llm.shutil, "which", lambda _: "/usr/bin/mpirun")
    assert installed("tensorrt_llm/__init__.py", "tensorrt_llm/bindings.so", "mpi4py/__init__.py") == []


# ---- the worker with the double ------------------------------------------------------------------------------

DOUBLE = Path(__file__).parent / "double"
GIB = 1 << 30
KEEP_ANSWERS = """
import os, subprocess, sys
from spark_ray.worker.__main__ import _keep_answers
answers = _keep_answers()
child = "import os, sys; print(repr(sys.stdin.read())); os.fstat(%d)" % answers
done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
print(done.stdout.strip(), "Bad file descriptor" in done.stderr, os.read(answers, 9))
"""


@pytest.mark.process
def test_what_the_engine_starts_cannot_read_the_hosts_answers():
    done = subprocess.run(
        [sys.executable, "-c", KEEP_ANSWERS], input="go\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["''", "True", "b'go\\n'"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of 2 layers with 2 key-value heads of 16 in bfloat16: 256 KV bytes a token."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 256,
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2,
        "intermediate_size": 128, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [256, 64], "data_offsets": [0, 32768]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32768))
    return folder


@pytest.fixture
def attempt(tmp_path, model):
    """Runs one worker as a host does: answers every line, and holds its result against what was asked."""

    def run(
        version="1.2.1", workload=None, configuration=CONFIGURATION, variables=None, drain=lambda: None, **own
    ):
        folder = tmp_path / f"attempt-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        work = Workload.model_validate({"requests": 2, **(workload or {})}).model_dump(mode="json")
        request = {
            "protocol_version": protocol.PROTOCOL_VERSION, "trial_id": "t", "attempt": 1, "arm": "a", "seed": 0,
            "engine": settings(double=str(DOUBLE), max_seq_len=128, **own), "configuration": configuration,
            "workload": work, "model_path": str(model), "bundle_sha256": "0" * 64,
        }  # fmt: skip
        protocol.write_json(folder / "request.json", request)
        environment = os.environ | {
            "PYTHONPATH": str(DOUBLE), "TLLM_DOUBLE_VERSION": version, "TLLM_DOUBLE_TOTAL_BYTES": str(8 * GIB),
            "TLLM_DOUBLE_FREE_BYTES": str(6 * GIB), **(variables or {}),
        }  # fmt: skip
        heard = converse([sys.executable, "-m", "spark_ray.worker", str(folder)], environment, drain)
        asked = Asked("t", 1, request["engine"], configuration, work)
        result = Result.model_validate(json.loads((folder / "result.json").read_text()))
        assert not list(misfits(result, asked)), (folder / "worker.log").read_text()
        return SimpleNamespace(
            folder=folder,
            heard=heard,
            result=result,
            engine=result.measurements.engine,
            kv=result.measurements.kv_cache,
        )

    return run


def converse(command, environment, drain):
    heard = []
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        late = threading.Timer(60, worker.kill)  # an engine that hangs fails its test
        late.start()
        for line in worker.stdout:
            heard.append(" ".join(line.split()[1:2] + line.split()[2:3] * (line.split()[1] == "phase")))
            if heard[-1] == "settle":
                drain()
            worker.stdin.write("go\n")
            worker.stdin.flush()
        late.cancel()
        assert worker.wait(30) == 0  # only then may standard input close: before, that ends the worker
    return heard


@pytest.mark.process
@pytest.mark.parametrize(
    ("version", "worker", "source", "second"),
    [
        ("1.0.0", "mpi", "LLM.get_stats", "log"),
        ("1.1.0", "single_process", "KV cache manager", "log"),
        ("1.2.1", "mpi", "LLM.get_stats", "log"),
        ("1.4.0rc1", "single_process", "KV cache manager", "LLM.get_kv_cache_capacity"),
        ("1.4.0rc1", "mpi", "LLM.get_kv_cache_capacity", "log"),
    ],
)
def test_each_version_and_worker_is_measured(attempt, version, worker, source, second):
    made = attempt(version, worker=worker)
    assert made.result.failure is None, made.result.failure
    assert (made.kv.source, made.kv.second_source.source) == (source, second)
    assert (made.kv.bytes_per_token, made.kv.tokens_per_block) == (256, 32)
    info = made.engine.model_dump()
    assert (info["version"], info["worker"], info["engine_is_double"]) == (version, worker, True)
    here = worker == "single_process"
    assert (info["sizing_moment"], info["worker_processes"] > 0) == ("hook" if here else "log line", not here)
    looks = ["settle", "phase sizing"] * 2 if here else ["phase sizing"]  # at each of the two readings
    assert made.heard == ["ready", "phase after_import", "settle", *looks, "phase after_kv", "phase end"]
    measured = made.result.measurements
    seen = [json.loads(line) for line in (made.folder / "observations.jsonl").read_text().splitlines()]
    last = [each for each in seen if each["phase"] == "sizing"][-1]
    assert measured.sizing.meminfo == last["meminfo"]
    assert measured.sizing.view == "cuda"
    assert measured.sizing.meminfo["MemTotal"] > 0
    assert abs(measured.sizing.law_residual_bytes) <= 2 * measured.sizing.resolution_bytes
    assert (measured.throughput.output_tokens, measured.throughput.requests) == (16, 2)
    assert measured.model.bytes_per_token == 256


@pytest.mark.process
@pytest.mark.parametrize("version", ["1.0.0", "1.4.0rc1"])
def test_what_the_dry_run_gave_back_is_free_again_at_the_reading_that_decides(attempt, tmp_path, version):
    """As on a GB10: freed memory waits in per-CPU lists, which the host drains when it is asked to settle."""
    lists = tmp_path / "lists"
    waiting = {"TLLM_DOUBLE_WAITING": str(lists)}
    more = {"version": version, "workload": {"requests": 0}}

    def drain():
        lists.unlink(missing_ok=True)

    plain = attempt(worker="single_process", **more)
    drained = attempt(worker="single_process", variables=waiting, drain=drain, **more)
    assert (drained.kv.bytes, drained.engine.sizing_moment) == (plain.kv.bytes, "hook")
    lists.unlink(missing_ok=True)
    left = attempt(worker="mpi", variables=waiting, drain=drain, **more)
    size = int(lists.read_text())
    assert size == 512 * 64 * 64, "the dry run's activations"
    lost = plain.kv.bytes - left.kv.bytes
    assert abs(lost - size // 2) <= 32 * 256, "half of it, by memory_fraction, in whole blocks"


@pytest.mark.process
def test_a_stream_has_its_latencies(attempt):
    latency = attempt(
        workload={"streaming": True, "requests": 3, "output_tokens": 5}
    ).result.measurements.throughput.latency
    assert (latency.first_token.n, latency.inter_token.n) == (3, 12)


@pytest.mark.process
def test_a_pinned_pool_is_of_the_asked_size(attempt):
    made = attempt(kv_cache="16MiB", workload={"requests": 0})
    assert made.result.failure is None, made.result.failure
    assert 0 <= made.kv.bytes - (16 << 20) < 32 * 256 or made.kv.bytes == 16 << 20
    assert made.result.measurements.throughput is None


@pytest.mark.process
@pytest.mark.parametrize(
    ("own", "variables", "kind", "reason"),
    [
        ({"version": "1.0.0", "tokens_per_block": 64}, {}, "engine_error", "UnsupportedError"),
        ({}, {"TLLM_DOUBLE_FREE_BYTES": "1000"}, "out_of_memory", "engine_report"),
        ({"kv_cache": "4KiB"}, {}, "infeasible", None),
        (
            {"workload": {"requests": 1, "input_tokens": 1000}},
            {},
            "infeasible",
            "prompt_above_max_num_tokens",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(attempt, own, variables, kind, reason):
    made = attempt(variables=variables, **own)
    failure = made.result.failure
    assert (failure.kind, failure.reason) == (kind, reason or failure.reason), failure
    assert failure.message


@pytest.mark.process
def test_the_real_library_is_not_taken_for_a_double(attempt):
    made = attempt(variables={"PYTHONPATH": ""})
    assert (made.result.failure.kind, made.result.failure.reason) == ("engine_error", "import_failed")
