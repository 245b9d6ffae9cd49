"""What a request gives back: waited for as a whole, or taken response by response."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CompletionOutput:
    index: int = 0
    text: str = ""  # nothing is ever detokenized here
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | None = None
    logprobs: list[Any] = field(default_factory=list)
    _before: int = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        """Tokens of the last response."""
        return self.token_ids[self._before :]


class RequestOutput:
    """Streaming: a response each step; else one. `result()`, iteration, and the same with `await`."""

    def __init__(self, request_id: int, prompt_token_ids: list[int], *, streaming: bool) -> None:
        self.request_id, self.prompt, self.prompt_token_ids = request_id, None, prompt_token_ids
        self.outputs = [CompletionOutput()]
        self.finished = False
        self._streaming = streaming
        self._held: list[int] = []
        self._responses: queue.SimpleQueue[tuple[list[int], bool] | Exception] = queue.SimpleQueue()

    def _feed(self, tokens: list[int], done: bool) -> None:
        self._held += tokens
        if self._streaming or done:
            self._responses.put((self._held, done))
            self._held = []

    def _fail(self, error: Exception) -> None:
        self._responses.put(error)

    def _take(self, timeout_s: float | None) -> None:
        try:
            response = self._responses.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no response to request {self.request_id}") from None
        if isinstance(response, Exception):
            raise response
        output = self.outputs[0]
        output._before = len(output.token_ids)
        output.token_ids.extend(response[0])
        if response[1]:
            self.finished = True
            output.finish_reason = "length"

    def result(self, timeout: float | None = None) -> RequestOutput:
        until = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            self._take(None if until is None else max(0.0, until - time.monotonic()))
        return self

    def __iter__(self) -> Iterator[RequestOutput]:
        return self

    def __next__(self) -> RequestOutput:
        if self.finished:
            raise StopIteration
        self._take(None)
        return self

    async def aresult(self) -> RequestOutput:
        return await asyncio.get_running_loop().run_in_executor(None, self.result)

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        await asyncio.get_running_loop().run_in_executor(None, self._take, None)
        return self
