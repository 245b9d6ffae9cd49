"""transformers' continuous batching with its real paged KV cache, the pool sized by our stated law.

transformers itself sizes a CPU pool from total memory less its own size, so neither page cache, nor other processes,
nor a cgroup limit would show. The view `engine` keeps that; every other view sizes the pool by `sizing` and hands
the library `num_blocks`. The capacity reported is read back from the library's cache object.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from pathlib import Path
from typing import Any

from . import identity, sizing, workload
from .session import Infeasible, OutOfMemory, Session

_MINIMUM_PAGE_TOKENS = 4


def _quiet_environment() -> None:
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
    )


def _give_back() -> None:
    """Return freed heap to the kernel, as emptying an allocator's cache does on a GPU."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class _CpuMemory:
    """Peak of the profiling pass from the kernel's own high-water mark of this process."""

    device = "cpu"

    def settle(self) -> None:
        _give_back()

    def start_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
        self._before = _status_bytes("VmRSS")

    def transient_bytes(self) -> int:
        """What the pass needed beyond what it left behind, once freed memory has gone back."""
        peak = _status_bytes("VmHWM")
        _give_back()
        return max(0, peak - _status_bytes("VmRSS"))

    def read_view(self, view: str) -> dict[str, Any]:
        return sizing.read_view(view)

    def observation(self) -> dict[str, Any]:
        return {}


class _CudaMemory:
    """The same from torch's allocator and cudaMemGetInfo, as TensorRT-LLM does it."""

    device = "cuda"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without CUDA
            raise RuntimeError(f"engine.device is cuda, but CUDA does not start here: {error}") from error

    def settle(self) -> None:
        gc.collect()
        self._torch.cuda.synchronize()
        self._torch.cuda.empty_cache()

    def start_peak(self) -> None:
        self.settle()
        self._torch.cuda.reset_peak_memory_stats()

    def transient_bytes(self) -> int:
        self._torch.cuda.synchronize()
        peak = int(self._torch.cuda.memory_stats()["allocated_bytes.all.peak"])
        self.settle()
        return max(0, peak - int(self._torch.cuda.memory_stats()["allocated_bytes.all.current"]))

    def read_view(self, view: str) -> dict[str, Any]:  # noqa: ARG002  there is one view of a GPU
        reading = sizing.read_view("memfree")
        free, total = self._torch.cuda.mem_get_info()
        return reading | {"view": "cuda", "total_bytes": total, "free_bytes": free}

    def observation(self) -> dict[str, Any]:
        free, total = self._torch.cuda.mem_get_info()
        return {
            "cuda": {
                "free_bytes": free,
                "total_bytes": total,
                "torch_allocated_bytes": self._torch.cuda.memory_allocated(),
            }
        }


def _load(talk: Session) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    path = talk.request["model_path"]
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, talk.engine["dtype"]),
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,  # never a pickle
    )
    return model.to(talk.engine["device"]).eval()


def _profile(model: Any, talk: Session, memory: _CpuMemory | _CudaMemory) -> int:
    """Run the largest batch once, without a cache: max_num_tokens tokens, in sequences of at most max_seq_len."""
    import torch

    tokens = talk.configuration["max_num_tokens"]
    length = min(tokens, talk.engine["max_seq_len"])
    rows = -(-tokens // length)
    generator = torch.Generator().manual_seed(talk.request["seed"])
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator).to(model.device)
    with torch.inference_mode():
        model(ids[:1, :8], use_cache=False)  # one-time buffers are not the batch's need
        memory.settle()
        memory.start_peak()
        logits = model(ids, use_cache=False).logits
        picked = logits[:, -1].float().softmax(-1).argmax(-1)
        del logits, picked
    return memory.transient_bytes()


def _bytes_per_token(config: Any, dtype_bytes: int) -> int:
    """Keys and values of one token in every layer."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * int(head_dim) * dtype_bytes


def _manager(model: Any, talk: Session, num_blocks: int | None) -> Any:
    """The library's continuous-batching manager with its pool allocated."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    configuration = talk.configuration
    settings = ContinuousBatchingConfig(
        page_size=talk.engine["tokens_per_block"],
        num_blocks=num_blocks,
        max_batch_tokens=configuration["max_num_tokens"],
        max_requests_per_batch=configuration["max_batch_size"],
        max_memory_percent=configuration["memory_fraction"] if num_blocks is None else 0.95,
        allow_block_sharing=False,  # a shared prefix would make the requests cheaper than they say they are
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        seed=talk.request["seed"],
    )
    generation = GenerationConfig(
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        max_new_tokens=talk.request["workload"]["output_tokens"],
    )
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=settings
    )
    manager.warmup()
    return manager


def _allocate(model: Any, talk: Session, num_blocks: int | None) -> Any:
    """`_manager`, with the library's ways of saying "no memory" told apart from its other errors."""
    try:
        return _manager(model, talk, num_blocks)
    except MemoryError as error:
        raise OutOfMemory(f"transformers refused {num_blocks} blocks: {error}") from error
    except RuntimeError as error:
        if "memory" in str(error).lower():  # torch's allocators raise RuntimeError and torch.OutOfMemoryError
            raise OutOfMemory(str(error)) from error
        raise


def _capacity(manager: Any, talk: Session, bytes_per_token: int) -> dict[str, Any]:
    """Capacity read back from the cache object, cross-checked with the bytes of its tensor."""
    cache = manager.batch_processor.cache
    page = talk.engine["tokens_per_block"]
    blocks = int(cache.num_blocks)
    usable = int(cache.num_sectors) * int(cache.bytes_per_sector)
    return {
        "bytes": blocks * page * bytes_per_token,
        "blocks": blocks,
        "tokens": blocks * page,
        "tokens_per_block": page,
        "bytes_per_token": bytes_per_token,
        "sequences": blocks * page // talk.engine["max_seq_len"],
        "source": "transformers PagedAttentionCache.num_blocks",
        "tensor_bytes": int(cache.cache_tensor.numel() * cache.cache_tensor.element_size()),
        "second_source": {"bytes": usable, "source": "num_sectors x bytes_per_sector"},
    }


def _generate(manager: Any, talk: Session, vocabulary: int) -> dict[str, Any]:
    """Fixed-length greedy requests; output tokens are counted, not assumed."""
    asked = talk.request["workload"]
    streaming = bool(asked.get("streaming"))
    prompts = workload.prompts(asked, vocabulary)
    arrived_s: dict[str, list[float]] = {}  # of each request: when its outputs came
    produced = finished = 0
    started = time.monotonic()
    manager.start()
    try:
        manager.add_requests(prompts, max_new_tokens=asked["output_tokens"], streaming=streaming)
        while finished < len(prompts):
            output = manager.get_result(timeout=1.0)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread ended before the requests were served")
                continue
            if output.error:
                raise RuntimeError(f"a request failed: {output.error}")
            arrived_s.setdefault(output.request_id, []).append(time.monotonic())
            if output.is_finished():
                finished += 1
                produced += len(output.generated_tokens)
        duration = time.monotonic() - started
    finally:
        manager.stop(block=False)  # waiting for the idle thread takes 0.7 s, and this process ends soon
    measured: dict[str, Any] = {
        "requests": len(prompts),
        "input_tokens": sum(map(len, prompts)),
        "output_tokens": produced,
        "duration_s": duration,
        "output_throughput_tokens_per_s": produced / duration,
    }
    if streaming:
        if sum(map(len, arrived_s.values())) != produced:  # one output a token, or its times mean nothing
            raise RuntimeError(f"{produced} tokens came in {sum(map(len, arrived_s.values()))} pieces")
        measured["latency"] = workload.latency([started] * len(arrived_s), list(arrived_s.values()))
    return measured


def run(talk: Session, measurements: dict[str, Any]) -> None:
    """Load, profile, size, allocate, read back, generate: one engine, once."""
    _quiet_environment()
    gc.disable()  # importing makes no garbage but 3000 modules to look through: a quarter of the start-up time
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    settings = talk.engine
    if settings.get("threads"):
        torch.set_num_threads(settings["threads"])
    torch.manual_seed(talk.request["seed"])
    memory = _CudaMemory() if settings["device"] == "cuda" else _CpuMemory()
    talk.sources.append(memory.observation)
    measurements["engine"] = {
        "name": "transformers continuous batching", "version": transformers.__version__, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "device": settings["device"],
    }  # fmt: skip
    talk.phase("after_import")
    model = _load(talk)
    gc.enable()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    per_token = _bytes_per_token(model.config, torch.empty(0, dtype=model.dtype).element_size())
    measurements["model"] = {
        "weight_bytes": weights,
        "parameters": sum(p.numel() for p in model.parameters()),
        **identity.of(Path(talk.request["model_path"]), dtype=settings["dtype"]),
    }
    talk.phase("after_load")
    transient = _profile(model, talk, memory)
    talk.phase("sizing")
    pool = sizing.size_pool(
        memory.read_view("memfree" if settings["memory_view"] == "engine" else settings["memory_view"]),
        transient,
        talk.configuration["memory_fraction"],
    )
    blocks = pool["available_bytes"] // (per_token * settings["tokens_per_block"])
    if settings["memory_view"] == "engine":
        pool["law"], blocks = "transformers: (total - own size) x fraction", None
    measurements["sizing"] = pool
    _check_fits_one(blocks, settings, per_token)
    manager = _allocate(model, talk, blocks)
    measurements["kv_cache"] = _capacity(manager, talk, per_token)
    talk.phase("after_kv")
    if talk.request["workload"]["requests"]:
        served = _generate(manager, talk, model.config.vocab_size)
        measurements["throughput"] = workload.check_whole(served, talk.request["workload"])
    talk.phase("end")


def _check_fits_one(blocks: int | None, settings: dict[str, Any], per_token: int) -> None:
    if blocks is not None and blocks * settings["tokens_per_block"] < settings["max_seq_len"]:
        need = settings["max_seq_len"] * per_token
        raise Infeasible(
            "pool_below_one_sequence",
            f"the pool would hold {blocks * settings['tokens_per_block']} tokens, one request of max_seq_len "
            f"{settings['max_seq_len']} needs {need} bytes",
        )
