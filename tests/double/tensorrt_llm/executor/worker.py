"""The engine in this process: with TLLM_WORKER_USE_SINGLE_PROCESS=1, and inside the worker process."""

from __future__ import annotations

import os
import queue
import threading
import traceback
from typing import Any, Protocol

from .._torch.pyexecutor.py_executor_creator import create_py_executor


class Sink(Protocol):
    """Where the tokens of one request go."""

    def _feed(self, tokens: list[int], done: bool) -> None: ...
    def _fail(self, error: Exception) -> None: ...


class GenerationExecutorWorker:
    def __init__(self, args: Any) -> None:
        self.engine = create_py_executor(args)
        self._waiting: queue.SimpleQueue[tuple[dict[str, Any], Sink] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, request: dict[str, Any], sink: Sink) -> None:
        self._waiting.put((request, sink))

    def _serve(self) -> None:
        """Whatever waits when a batch begins is in it."""
        going = True
        while going:
            taken = [self._waiting.get()]
            while not self._waiting.empty():
                taken.append(self._waiting.get())
            going = None not in taken
            batch = [each for each in taken if each is not None]
            sinks = {request["id"]: sink for request, sink in batch}
            try:
                self.engine.generate(
                    [request for request, _ in batch],
                    lambda number, tokens, done, to=sinks: to[number]._feed(tokens, done),
                )
            except Exception:  # noqa: BLE001  an engine that broke is a process that died
                traceback.print_exc()
                os._exit(1)

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:  # noqa: ARG002  at once
        return self.engine.get_latest_iteration_stats()

    def get_kv_cache_capacity(self) -> dict[str, int]:
        return dict(self.engine.get_kv_cache_capacity())

    def is_shutdown(self) -> bool:
        return self._thread is None

    def shutdown(self) -> None:
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
            self.engine.shutdown()
