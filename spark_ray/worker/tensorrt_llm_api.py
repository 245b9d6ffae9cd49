"""What the installed TensorRT-LLM offers: its arguments by feature, the place where it sizes its pool, its processes.

What a version takes is read from its own classes, so a release that is not known here works as long as it has the knobs
that are asked for; one that lacks such a knob is refused by the knob's name, and nothing asked is silently dropped.
Names and defaults of each release: docs/reference/tensorrt-llm-names.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from . import observe

KNOWN_RELEASES = frozenset({(1, 0), (1, 1), (1, 2), (1, 3), (1, 4)})
"""Releases (major, minor) whose names were looked up. Any other one is used as far as it goes, and the record says so."""

SHUTDOWN_S = 120.0
"""How long the engine's processes may take to end. Their device memory comes back only when they are gone."""

_SIZING_HOOKS = ("configure_kv_cache_capacity", "estimate_max_tokens")  # since about 1.2; before
_REQUIRED = object()


class UnsupportedError(Exception):
    """The installed version cannot do what the experiment asks for."""


# ---- environment and import -------------------------------------------------------------------------------


def prepare_environment(worker: str) -> None:
    """Before the library is imported: most of these are read once, at import. TLLM* and TRTLLM* reach its workers as well."""
    os.environ.update(
        TLLM_LOG_LEVEL="INFO",  # the default, error, hides every line that says what memory was used
        TRTLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        TLLM_WORKER_USE_SINGLE_PROCESS="1" if worker == "single_process" else "0",
    )
    os.environ.pop("TLLM_LOG_LEVEL_BY_MODULE", None)
    if os.getuid() == 0:
        os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


def load(*, double: bool) -> ModuleType:
    """The library; refused when what is found is a double and none was asked for, or the other way round."""
    library = importlib.import_module("tensorrt_llm")
    found = bool(getattr(library, "ENGINE_IS_DOUBLE", False))
    if found != double:
        what = "is a double, engine.double is not set" if found else "is no double, engine.double is set"
        raise UnsupportedError(f"the tensorrt_llm that was found ({library.__file__}) {what}")
    return library


def version_known(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) in KNOWN_RELEASES


# ---- arguments --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """One argument. `absent`: what a version without it does anyway; where that is `value`, the version may lack it."""

    name: str
    value: Any
    asked_by: str
    absent: Any = _REQUIRED


def kv_cache_knobs(
    settings: Mapping[str, Any], configuration: Mapping[str, Any], max_tokens: int | None
) -> list[Knob]:
    """Of KvCacheConfig. Bytes are pinned by max_tokens: max_gpu_total_bytes does not bind the plain manager's pool."""
    pinned = [] if max_tokens is None else [Knob("max_tokens", max_tokens, "engine.kv_cache")]
    fraction = float(configuration["memory_fraction"])
    return [
        *pinned,
        Knob("free_gpu_memory_fraction", fraction, "memory_fraction"),
        Knob("tokens_per_block", settings["tokens_per_block"], "engine.tokens_per_block", absent=32),
        Knob("dtype", settings["kv_dtype"], "engine.kv_dtype", absent="auto"),
        Knob("enable_block_reuse", False, "requests that share no prefix"),
        Knob("host_cache_size", 0, "no second tier, which is the same memory on a Spark", absent=0),
        Knob(
            "use_kv_cache_manager_v2",
            settings["kv_cache_manager"] == "v2",
            "engine.kv_cache_manager",
            absent=False,
        ),
    ]  # fmt: skip


def cuda_graph_knobs(configuration: Mapping[str, Any]) -> list[Knob]:
    """Of CudaGraphConfig: captured for every batch size up to the engine's, rounded up to the next captured one."""
    return [
        Knob("max_batch_size", configuration["max_batch_size"], "engine.cuda_graphs"),
        Knob("enable_padding", True, "engine.cuda_graphs"),
    ]


def llm_knobs(
    settings: Mapping[str, Any],
    configuration: Mapping[str, Any],
    model: str,
    kv_cache_config: Any,
    cuda_graph_config: Any,
) -> list[Knob]:
    """Of LLM. Everything that moves the pool is set, since defaults differ between versions."""
    return [
        Knob("model", model, "model"),
        Knob("tensor_parallel_size", settings["tensor_parallel_size"], "engine.tensor_parallel_size"),
        Knob("max_batch_size", configuration["max_batch_size"], "max_batch_size"),
        Knob("max_num_tokens", configuration["max_num_tokens"], "max_num_tokens"),
        Knob("max_seq_len", settings["max_seq_len"], "engine.max_seq_len"),
        Knob("kv_cache_config", kv_cache_config, "memory_fraction"),
        Knob("cuda_graph_config", cuda_graph_config, "engine.cuda_graphs"),
        Knob("load_format", settings["load_format"], "engine.load_format", absent="auto"),
        Knob("skip_tokenizer_init", True, "requests of token ids"),
        Knob("trust_remote_code", False, "executing no code of a checkpoint", absent=False),
        Knob("enable_chunked_prefill", False, "a prompt in one step", absent=False),
        Knob("enable_iter_perf_stats", True, "statistics that tell the capacity", absent=True),
    ]


def sampling_knobs(output_tokens: int) -> list[Knob]:
    """Of SamplingParams: exactly so many tokens. Without a tokenizer the end id has to be given; -1 is none."""
    return [
        Knob("max_tokens", output_tokens, "workload.output_tokens"),
        Knob("ignore_eos", True, "workload.output_tokens"),
        Knob("end_id", -1, "requests of token ids"),
        Knob("pad_id", -1, "requests of token ids"),
        Knob("detokenize", False, "requests of token ids"),
    ]


def offered(*classes: Any) -> frozenset[str]:
    """Names that classes take: fields of a pydantic model or a dataclass, else parameters of the constructor."""
    names: set[str] = set()
    for each in classes:
        fields = getattr(each, "model_fields", None) or getattr(each, "__dataclass_fields__", None)
        if isinstance(fields, Mapping):
            names |= set(fields)
        else:
            wild = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            found = inspect.signature(each).parameters
            names |= {name for name, parameter in found.items() if parameter.kind not in wild}
    return frozenset(names)


def arguments(where: str, version: str, names: frozenset[str], knobs: list[Knob]) -> dict[str, Any]:
    """Keyword arguments for one class. Raises UnsupportedError for a knob that is asked for and not offered."""
    for knob in knobs:
        if knob.name not in names and (knob.absent is _REQUIRED or knob.absent != knob.value):
            raise UnsupportedError(
                f"tensorrt_llm {version} has no {where}({knob.name}=...), needed for {knob.asked_by}: {knob.value!r}"
            )
    return {knob.name: knob.value for knob in knobs if knob.name in names}


def llm_arguments(
    library: ModuleType,
    settings: Mapping[str, Any],
    configuration: Mapping[str, Any],
    model: str,
    max_tokens: int | None,
) -> dict[str, Any]:
    """Everything that LLM is called with, in the words of the installed version."""
    version = library.__version__
    api = importlib.import_module("tensorrt_llm.llmapi")
    knobs = kv_cache_knobs(settings, configuration, max_tokens)
    kv = api.KvCacheConfig(**arguments("KvCacheConfig", version, offered(api.KvCacheConfig), knobs))
    graphs = None
    if settings["cuda_graphs"]:
        names = offered(api.CudaGraphConfig)
        graphs = api.CudaGraphConfig(
            **arguments("CudaGraphConfig", version, names, cuda_graph_knobs(configuration))
        )
    names = offered(library.LLM, api.TorchLlmArgs)
    return arguments("LLM", version, names, llm_knobs(settings, configuration, model, kv, graphs))


def sampling(library: ModuleType, output_tokens: int) -> Any:
    names = offered(library.SamplingParams)
    knobs = sampling_knobs(output_tokens)
    return library.SamplingParams(**arguments("SamplingParams", library.__version__, names, knobs))


# ---- the sizing moment ------------------------------------------------------------------------------------


def hook_sizing(before: Callable[[], object]) -> bool:
    """Have `before` called right before each reading of free memory in the first sizing of an engine in this process.

    There are two: the first is logged only, the second, after the dry run, decides. Without a dry run there is one.
    False: this version has no such place.
    """
    try:
        place = importlib.import_module("tensorrt_llm._torch.pyexecutor._util")
        creator, cuda = place.KvCacheCreator, place.torch.cuda
    except (ImportError, AttributeError):
        return False
    for name in _SIZING_HOOKS:
        if hasattr(creator, name):
            _hook(creator, name, cuda, before)
            return True
    return False


def _hook(creator: Any, name: str, cuda: Any, before: Callable[[], object]) -> None:
    original = getattr(creator, name)

    @functools.wraps(original)
    def sizing(*positional: Any, **named: Any) -> Any:
        setattr(creator, name, original)  # a later call sizes anew; the first has the state that was set
        with _before_each_reading(cuda, before):
            return original(*positional, **named)

    setattr(creator, name, sizing)


@contextlib.contextmanager
def _before_each_reading(cuda: Any, before: Callable[[], object]) -> Iterator[None]:
    """`before` ahead of this thread's readings, but for its own: threads of the dry run read for their statistics."""
    read, thread, looking = cuda.mem_get_info, threading.get_ident(), False

    def reading(*positional: Any, **named: Any) -> Any:
        nonlocal looking
        if not looking and threading.get_ident() == thread:
            looking = True
            try:
                before()
            finally:
                looking = False
        return read(*positional, **named)

    cuda.mem_get_info = reading
    try:
        yield
    finally:
        cuda.mem_get_info = read


# ---- processes --------------------------------------------------------------------------------------------

# Helpers that end with this process, not with the engine, and hold no device memory.
_STAYING_PROGRAMS = frozenset({"orted", "prte", "prted", "prterun", "mpirun", "mpiexec", "hydra_pmi_proxy"})
_STAYING_MODULES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "compile_worker")


@dataclass(frozen=True)
class Child:
    pid: int
    started: str  # ticks since boot: with the pid it names a process for good
    name: str = field(compare=False)  # another one before its exec

    @property
    def gone(self) -> bool:
        return _state(self.pid) != self.started


def _state(pid: int) -> str | None:
    """When a living process was started; None when there is none, or only what is left of one (a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def children() -> Iterator[Child]:
    """The engine's processes below this one."""
    for pid in observe.descendants(os.getpid())[1:]:
        started = _state(pid)
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        name = words[0].rsplit("/", 1)[-1]
        stays = name in _STAYING_PROGRAMS or any(part in " ".join(words) for part in _STAYING_MODULES)
        if started is not None and not stays:
            yield Child(pid, started, name)


def ran_as(llm: Any, found: Collection[Child]) -> str:
    """How the engine really runs, from the kind of its executor and the processes there are."""
    name = type(getattr(llm, "_executor", None)).__name__
    if name.endswith("Worker"):
        return "single_process"
    return "mpi" if name.endswith("Proxy") or found else "single_process"


def shut_down(llm: Any, found: set[Child]) -> tuple[float, list[Child]]:
    """End the engine and wait until its processes are gone. Returns the seconds, and those that had to be killed."""
    started = time.monotonic()
    found |= set(children())
    llm.shutdown()  # returns when they were told to end; their device memory is still held
    killed = outlast(found)
    return time.monotonic() - started, killed


def outlast(found: Collection[Child]) -> list[Child]:
    """Wait until these processes are gone. Returns those that had to be killed."""
    deadline = time.monotonic() + SHUTDOWN_S
    while left := sorted((each for each in found if not each.gone), key=lambda each: each.pid):
        if time.monotonic() > deadline:
            for each in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGKILL)
            return left
        time.sleep(0.02)
    return []
