"""One rank: builds the engine, serves what comes on standard input, and keeps its memory for a while after the end.

Rank 0 answers on a descriptor of its own, a line of JSON each; the others hold their share until standard input closes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from typing import Any

from ..llmapi.llm_args import TorchLlmArgs
from ..logger import logger
from ..settings import setting
from .worker import GenerationExecutorWorker


class _Answers:
    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()

    def send(self, **answer: Any) -> None:
        with self._lock:
            data = (json.dumps(answer) + "\n").encode()
            while data:
                data = data[os.write(self._descriptor, data) :]


class _Sender:
    def __init__(self, answers: _Answers, number: int) -> None:
        self._answers, self._number = answers, number

    def _feed(self, tokens: list[int], done: bool) -> None:
        self._answers.send(kind="tokens", id=self._number, tokens=tokens, done=done)

    def _fail(self, error: Exception) -> None:
        raise NotImplementedError from error


def main() -> None:
    start, rank = json.loads(sys.argv[1]), int(sys.argv[2])
    logger.rank = rank if start["world_size"] > 1 else None
    logger.cpp("Refreshed the MPI local session")
    if rank:
        worker = GenerationExecutorWorker(TorchLlmArgs(**start["args"]))
        sys.stdin.read()
    else:
        answers = _Answers(start["answers"])
        try:
            worker = GenerationExecutorWorker(TorchLlmArgs(**start["args"]))
        except Exception as error:  # noqa: BLE001  it goes to the user's process, as the real worker's does
            answers.send(
                kind="error", type=type(error).__name__, message=str(error), trace=traceback.format_exc()
            )
            return
        answers.send(kind="ready")
        _serve(worker, answers)
    time.sleep(
        float(setting("LATE_S", "0.3"))
    )  # memory is freed when the process ends, not when shutdown returns


def _serve(worker: GenerationExecutorWorker, answers: _Answers) -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["kind"] == "generate":
            worker.submit(asked, _Sender(answers, asked["id"]))
        elif asked["kind"] == "stats":
            answers.send(kind="answer", value=worker.get_stats())
        elif asked["kind"] == "capacity":
            answers.send(kind="answer", value=worker.get_kv_cache_capacity())
        else:
            answers.send(kind="bye")
            return


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
