"""TensorRT-LLM's LLM API (PyTorch backend), every knob pinned that moves the pool.

The engine sizes its own pool, inside LLM(...): after a dry run it reads free memory and takes a fraction of it. So this
module has the host settle and observe as near to that reading as it can come, and afterwards reads what the engine
says of it: its terms from the log, its capacity from two places where two answer, which must then agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from . import (
    bench_tensorrt_llm,
    identity,
    tensorrt_llm_api,
    tensorrt_llm_law,
    tensorrt_llm_log,
    tensorrt_llm_oom,
    tensorrt_llm_pool,
    workload,
)
from .session import Infeasible, OutOfMemory, Session

NAME = "TensorRT-LLM"
_FIRST_LINE = b"Memory used after loading model weights"  # logged as free memory is read, before the dry run
_LISTEN_S = 0.02
_LATE_S = 5.0  # lines of another process go through MPI's forwarding and may come after LLM() has returned
_NO_MEMORY = re.compile(
    r"insufficient GPU memory|OutOfMemoryError|cudaErrorMemoryAllocation|CUDA (?:runtime )?error[^\n]*out of memory",
    re.IGNORECASE,
)
_NO_SEQUENCE = re.compile(r"max_blocks_per_seq > 0|fit any sequence in kvCache", re.IGNORECASE)


class EngineStartError(Exception):
    """LLM() raised; the message has every link of its chain, since the outermost says little."""


# ---- the log ----------------------------------------------------------------------------------------------


class _Log:
    """worker.log from now on: this process and all that it starts write there."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "worker.log"
        self._start = self._path.stat().st_size

    def text(self) -> str:
        sys.stdout.flush()
        sys.stderr.flush()
        with self._path.open("rb") as stream:
            stream.seek(self._start)
            return stream.read().decode(errors="replace")

    def wait_for(self, words: bytes, over: threading.Event) -> bool:
        """Whether `words` were written before `over` was set."""
        seen = b""
        with self._path.open("rb") as stream:
            stream.seek(self._start)
            while not over.wait(_LISTEN_S):
                seen = seen[-len(words) :] + stream.read()
                if words in seen:
                    return True
        return False


def _say(words: str) -> None:
    sys.stderr.write(f"spark_ray: {words}\n")


# ---- the sizing moment ------------------------------------------------------------------------------------


class _Sizing:
    """Observes phase `sizing` while LLM() runs, as near to the reading that decides as worker and version allow.

    hook: right before that reading, after the dry run, the host settled. log line: before the dry run, as the engine logs
    its first reading, the host settled before the start. before start: the host settled then, nothing was observed.
    """

    def __init__(self, talk: Session, log: _Log) -> None:
        self.how = "before start"
        self.seen: dict[str, Any] | None = None
        self._talk, self._log = talk, log
        self._over = threading.Event()
        self._listener: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> None:
        self._talk.settle()  # whatever comes of a hook: a version may never reach it
        here = self._talk.engine["worker"] == "single_process"
        if here and tensorrt_llm_api.hook_sizing(self._at_reading):
            return
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._listener is not None:
            self._listener.join()
        if self._error is not None:
            raise self._error

    def _at_reading(self) -> None:
        self.seen, self.how = self._talk.phase("sizing"), "hook"  # the last one stays: it decides

    def _listen(self) -> None:
        try:
            if self._log.wait_for(_FIRST_LINE, self._over):
                self.seen, self.how = self._talk.phase("sizing", settle=False), "log line"
        except BaseException as error:  # noqa: BLE001  of the host being gone as well: raised where the worker waits
            self._error = error


# ---- start ------------------------------------------------------------------------------------------------


def _pinned_tokens(settings: dict[str, Any], known: dict[str, Any]) -> int | None:
    """What engine.kv_cache is in tokens: by tokens alone the pool can be held to a size in every version."""
    if settings["kv_cache"] is None:
        return None
    if known["bytes_per_token"] is None:
        raise tensorrt_llm_api.UnsupportedError(
            "engine.kv_cache cannot be turned into tokens, since the KV bytes of a token are not known: "
            f"{known['absent']['bytes_per_token']}; leave engine.kv_cache out"
        )
    return int(settings["kv_cache"]) // int(known["bytes_per_token"])


def _check_asked(work: dict[str, Any], settings: dict[str, Any], configuration: dict[str, Any]) -> None:
    """What the engine would refuse after minutes of starting."""
    if configuration["memory_fraction"] >= 1 and settings["kv_cache_manager"] == "v1":
        raise tensorrt_llm_api.UnsupportedError(
            "memory_fraction 1.0: the V1 manager takes less than all only; search below 1.0"
        )
    if not work["requests"]:
        return
    prompt, longest = work["input_tokens"], work["input_tokens"] + work["output_tokens"]
    if prompt > configuration["max_num_tokens"]:
        raise Infeasible(
            "prompt_above_max_num_tokens",
            f"a prompt of {prompt} tokens does not fit a step of max_num_tokens {configuration['max_num_tokens']}",
        )
    if longest > settings["max_seq_len"]:
        raise tensorrt_llm_api.UnsupportedError(
            f"a request of {longest} tokens is longer than engine.max_seq_len {settings['max_seq_len']}: "
            "raise that, or shorten workload.input_tokens or output_tokens"
        )


def _chain(error: BaseException) -> str:
    found: list[str] = []
    link: BaseException | None = error
    while link is not None and len(found) < 10:
        found.append(f"{type(link).__name__}: {link}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\nbecause of ".join(found)


def _no_memory(words: str) -> OutOfMemory | None:
    """What an exception's words mean where they say that memory ran out."""
    report = tensorrt_llm_oom.report(f"{words}\n")
    if report is not None:
        return OutOfMemory(tensorrt_llm_oom.account(report))
    return OutOfMemory(words) if _NO_MEMORY.search(words) else None


def _told_apart(error: Exception, log: _Log) -> Exception:
    """What an exception of LLM() means: no memory, no room for one sequence, or a failure.

    The log has accounts of other processes, and what the engine got over: without a component one is believed only
    where the exception gives no reason of its own.
    """
    words, text = _chain(error), log.text()
    told = _no_memory(words)
    if told is not None:
        return told
    report, bare = tensorrt_llm_oom.report(text), error.__cause__ is None and error.__context__ is None
    if report is not None and (report.component is not None or bare):
        return OutOfMemory(tensorrt_llm_oom.account(report))
    if _NO_SEQUENCE.search(f"{text}\n{words}"):
        return Infeasible("pool_below_one_sequence", words)
    return EngineStartError(words)


@contextlib.contextmanager
def _serving() -> Iterator[None]:
    """A request that failed is answered with the text of the exception alone: it says whether memory ran out."""
    try:
        yield
    except Exception as error:
        told = _no_memory(_chain(error))
        if told is not None:
            raise told from error
        raise


def _engine_info(library: ModuleType, settings: dict[str, Any]) -> dict[str, Any]:
    version = str(library.__version__)
    known = tensorrt_llm_api.version_known(version)
    if not known:
        _say(f"tensorrt_llm {version} is a release that is not known here; used by what it offers")
    torch = sys.modules.get("torch")
    return {
        "name": NAME, "version": version, "version_known": known, "python": platform.python_version(),
        **({"torch": str(torch.__version__)} if torch is not None else {}),
        **({"engine_is_double": True} if settings["double"] is not None else {}),
    }  # fmt: skip


def _cuda_observation() -> dict[str, Any]:
    """This process's view of its GPU, where the engine has set that up: asking first would take memory itself."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    return {"cuda": {"free_bytes": free, "total_bytes": total, "torch_allocated_bytes": allocated}}


# ---- one engine -------------------------------------------------------------------------------------------


class _Engine:
    """One engine from its start to its end."""

    def __init__(self, talk: Session, library: ModuleType) -> None:
        self._talk, self._library, self._settings = talk, library, talk.engine
        self._model = Path(talk.request["model_path"])
        self._known = identity.of(
            self._model, self._settings["kv_dtype"], self._settings["tensor_parallel_size"]
        )
        self._max_tokens = _pinned_tokens(self._settings, self._known)
        self._log = _Log(talk.folder)
        self._llm: Any = None
        self._children: set[tensorrt_llm_api.Child] = set()

    def start(self) -> dict[str, Any]:
        """Raises what the engine's refusal means. Returns how it runs, for measurements["engine"]."""
        arguments = tensorrt_llm_api.llm_arguments(
            self._library, self._settings, self._talk.configuration, str(self._model), self._max_tokens
        )
        self._moment = _Sizing(self._talk, self._log)
        with self._moment:
            try:
                self._llm = self._library.LLM(**arguments)
            except Exception as error:
                raise _told_apart(error, self._log) from error
        self._children = set(tensorrt_llm_api.children())
        ran, asked = tensorrt_llm_api.ran_as(self._llm, self._children), self._settings["worker"]
        if ran != asked:
            raise tensorrt_llm_api.UnsupportedError(f"engine.worker is {asked}, but the engine runs as {ran}")
        return {
            "worker": ran, "executor": type(self._llm._executor).__name__,
            "worker_processes": len(self._children), "sizing_moment": self._moment.how,
        }  # fmt: skip

    def measure_pool(self, measurements: dict[str, Any]) -> None:
        """Terms and capacity into `measurements`; raises when it is not the pool that was asked for."""
        settings, info = self._settings, measurements["engine"]
        seen = self._complete_log()
        if seen.warnings:
            info["log_warnings"] = "; ".join(seen.warnings)
        weights = tensorrt_llm_pool.weights(self._llm, seen)
        measurements["model"] = self._known | (weights or {})
        fraction = self._talk.configuration["memory_fraction"]
        tensorrt_llm_pool.check_fraction(seen, fraction)
        terms = tensorrt_llm_law.sizing(seen, fraction)
        if terms is not None:
            at_sizing = self._moment.seen or {}
            counters = {
                name: at_sizing[name] for name in ("meminfo", "per_cpu_free_bytes") if name in at_sizing
            }
            measurements["sizing"] = terms | counters
        found = tensorrt_llm_pool.readings(self._llm, seen, settings["tokens_per_block"], self._one_request)
        by_config = self._known["bytes_per_token"]
        per_token = tensorrt_llm_pool.bytes_per_token(found, seen, by_config, settings["kv_dtype"])
        if by_config not in {None, per_token}:
            _say(f"the engine counts {per_token} KV bytes a token, by config.json they are {by_config}")
            info["bytes_per_token_by_config"] = by_config
        pool = tensorrt_llm_pool.capacity(found, per_token, settings["max_seq_len"])
        measurements["kv_cache"] = pool
        if found[0].allocated_bytes is not None and "tensor_bytes" not in pool:
            info["pool_allocated_bytes"] = found[0].allocated_bytes
        tensorrt_llm_pool.check_as_asked(pool, found[0], seen, settings["max_seq_len"], self._max_tokens)

    def _complete_log(self) -> tensorrt_llm_log.Log:
        """The log once it tells the pool, or as far as it has come."""
        deadline = time.monotonic() + _LATE_S
        while True:
            seen = tensorrt_llm_log.parse(self._log.text())
            if seen.allocated_tokens is not None or time.monotonic() > deadline:
                return seen
            time.sleep(_LISTEN_S)

    def _one_request(self) -> None:
        sampling = tensorrt_llm_api.sampling(self._library, 1)
        with _serving():
            self._llm.generate([[1]], sampling_params=sampling, use_tqdm=False)

    @_serving()
    def generate(self) -> dict[str, Any]:
        """Fixed-length greedy requests, all at once; output tokens are counted, not assumed."""
        work = self._talk.request["workload"]
        prompts = workload.prompts(work, identity.vocabulary(self._model))
        sampling = tensorrt_llm_api.sampling(self._library, work["output_tokens"])
        latency = None
        started = time.monotonic()
        if work["streaming"]:
            sent, came = asyncio.run(_stream(self._llm, prompts, sampling))
            duration, produced = time.monotonic() - started, sum(map(len, came))
            latency = workload.latency(sent, came)
        else:
            outputs = self._llm.generate(prompts, sampling_params=sampling, use_tqdm=False)
            duration = time.monotonic() - started
            produced = sum(len(each.outputs[0].token_ids) for each in outputs)
        return {
            "requests": len(prompts),
            "input_tokens": sum(map(len, prompts)),
            "output_tokens": produced,
            "duration_s": duration,
            "output_throughput_tokens_per_s": produced / duration,
            **({"latency": latency} if latency else {}),
        }

    def end(self) -> dict[str, Any]:
        """Wait until its processes are gone. Returns how long that took, for measurements["engine"]."""
        seconds, killed = tensorrt_llm_api.shut_down(self._llm, self._children)
        found: dict[str, Any] = {"shutdown_s": seconds}
        if killed:
            found["killed_at_shutdown"] = ", ".join(each.name for each in killed)
        return found


async def _stream(llm: Any, prompts: list[list[int]], sampling: Any) -> tuple[list[float], list[list[float]]]:
    """When each request was sent, and when each of its tokens came; tokens that come together have one time."""
    sent: list[float] = []
    outputs = []
    for prompt in prompts:
        sent.append(time.monotonic())
        outputs.append(llm.generate_async(prompt, sampling_params=sampling, streaming=True))
    return sent, list(await asyncio.gather(*map(_arrivals, outputs)))


async def _arrivals(outputs: Any) -> list[float]:
    came: list[float] = []
    async for output in outputs:
        came += [time.monotonic()] * (len(output.outputs[0].token_ids) - len(came))
    if not came:
        raise RuntimeError("a request was served without a single token")
    return came


def run(talk: Session, measurements: dict[str, Any]) -> None:
    """Start the engine once, read its pool, serve the requests, and wait until its processes are gone."""
    settings, work = talk.engine, talk.request["workload"]
    tensorrt_llm_api.prepare_environment(settings["worker"])
    if work["tool"] == "trtllm_bench":
        bench_tensorrt_llm.run(talk, measurements)
        return
    library = tensorrt_llm_api.load(double=settings["double"] is not None)
    measurements["engine"] = info = _engine_info(library, settings)
    talk.phase("after_import")
    _check_asked(work, settings, talk.configuration)
    if settings["worker"] == "single_process":
        talk.sources.append(_cuda_observation)
    engine = _Engine(talk, library)
    info |= engine.start()
    engine.measure_pool(measurements)
    talk.phase("after_kv")
    if work["requests"]:
        measurements["throughput"] = workload.check_whole(engine.generate(), work)
    info |= engine.end()
    talk.phase("end")
