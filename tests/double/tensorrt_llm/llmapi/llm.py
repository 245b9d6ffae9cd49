"""LLM: the constructor that knows its arguments, requests, statistics, and the end."""

from __future__ import annotations

import atexit
import itertools
import os
import uuid
from collections.abc import Sequence
from typing import Any

from ..executor.proxy import GenerationExecutorProxy
from ..executor.result import RequestOutput
from ..executor.worker import GenerationExecutorWorker
from ..logger import logger
from ..sampling_params import SamplingParams
from ..version import GENERATION, LATE_1_3, V1_3
from .llm_args import TorchLlmArgs


class LLM:
    """The PyTorch backend's. Prompts are token ids: the double has no tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._executor: Any = None
        level = logger.level
        logger.set_level("info")  # while arguments are read, and no longer
        try:
            logger.info("Using LLM with PyTorch backend")
            valid = {*TorchLlmArgs.model_fields, "_mpi_session", "backend"}
            for key in kwargs:
                if key not in valid:
                    raise ValueError(f"{type(self).__name__} got invalid argument: {key}")
            self.args = TorchLlmArgs(
                model=str(model),
                tokenizer=tokenizer,
                tokenizer_mode=tokenizer_mode,
                skip_tokenizer_init=skip_tokenizer_init,
                trust_remote_code=trust_remote_code,
                tensor_parallel_size=tensor_parallel_size,
                dtype=dtype,
                revision=revision,
                tokenizer_revision=tokenizer_revision,
                **kwargs,
            )
        except Exception as error:
            logger.error(f"Failed to parse the arguments for the LLM constructor: {error}")
            raise
        finally:
            logger.set_level(level)
        self.llm_id = uuid.uuid4().hex
        self.tokenizer = None
        self._numbers = itertools.count(1)
        _telemetry()
        self._executor = self._start()
        atexit.register(self.shutdown)

    def _start(self) -> GenerationExecutorProxy | GenerationExecutorWorker:
        world_size = self.args.tensor_parallel_size
        if world_size == 1 and os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS", "0") == "1":
            logger.warning(
                "Using single process worker for TP1, this may hurt streaming generation performance."
            )
            return GenerationExecutorWorker(self.args)
        values = self.args.model_dump() | {"load_format": self.args.load_format.name.lower()}
        plain = {
            name: value
            for name, value in values.items()
            if name in self.args.model_fields_set | {"load_format"}
        }
        return GenerationExecutorProxy(plain, world_size)

    # -- requests ---------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,  # noqa: ARG002
    ) -> RequestOutput | list[RequestOutput]:
        """One prompt (a list of token ids) or several."""
        single = isinstance(inputs, str | dict) or (bool(inputs) and isinstance(inputs[0], int))
        prompts = [inputs] if single else list(inputs)
        each = (
            sampling_params if isinstance(sampling_params, list | tuple) else [sampling_params] * len(prompts)
        )
        results = [self.generate_async(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        done = [result.result() for result in results]
        return done[0] if single else done

    def generate_async(
        self, inputs: Any, sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestOutput:
        if self._executor is None or self._executor.is_shutdown():
            raise RuntimeError("LLM is shutting down")
        chosen = self._sampling(sampling_params)
        prompt = inputs.get("prompt_token_ids") if isinstance(inputs, dict) else inputs
        if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        if not self.args.enable_chunked_prefill and len(prompt) > self.args.max_num_tokens:
            raise ValueError(
                f"The sum of prompt length ({float(len(prompt))}), query length (0) should not exceed "
                f"max_num_tokens ({self.args.max_num_tokens})"
            )
        result = RequestOutput(next(self._numbers), prompt, streaming=streaming)
        stops = chosen.end_id is not None and chosen.end_id >= 0 and not chosen.ignore_eos
        request = {
            "id": result.request_id,
            "prompt": prompt,
            "max_tokens": chosen.max_tokens,
            "stops": stops,
            "streaming": streaming,
        }
        self._executor.submit(request, result)
        return result

    def _sampling(self, given: SamplingParams | None) -> SamplingParams:
        chosen = SamplingParams() if given is None else given
        if not isinstance(chosen, SamplingParams):
            raise TypeError(f"The sampling_params must be type SamplingParams or None, but got {type(given)}")
        if chosen.end_id is None:
            raise ValueError(
                "tokenizer is required to reset end_id if it is None, or you can explicitly specify the end_id for "
                "sampling_params"
            )
        return chosen

    # -- what can be asked ------------------------------------------------------------------------------------

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """Of each iteration since the last call, where enable_iter_perf_stats is set; nothing before a request."""
        return list(self._executor.get_stats(timeout=timeout))

    def get_kv_cache_capacity(self) -> dict[str, int]:
        return dict(self._executor.get_kv_cache_capacity())

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
            atexit.unregister(self.shutdown)

    def __enter__(self) -> LLM:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __getstate__(self) -> None:
        raise RuntimeError("LLM object can not be pickled.")


if GENERATION < LATE_1_3:
    del LLM.get_kv_cache_capacity


def _telemetry() -> None:
    """From 1.3 on the real package reports its use unless it is told not to."""
    off = {"TRTLLM_NO_USAGE_STATS": ("1",), "TELEMETRY_DISABLED": ("1", "true"), "DO_NOT_TRACK": ("1",)}
    if GENERATION >= V1_3 and not any(os.environ.get(name) in values for name, values in off.items()):
        print("[double] usage telemetry would be sent now: TRTLLM_NO_USAGE_STATS is not 1", flush=True)
