"""The user's side of a worker process: what the real package does over MPI and zmq, over two pipes.

As there: the worker gets only the variables that are given to it explicitly (TLLM*, TRTLLM*; what a program needs to
start at all is added), an error of its start is logged and raised as "Executor worker returned error" with the worker's
own as the cause, and `shutdown` returns before the worker has ended.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ..logger import logger
from .worker import Sink

_LAUNCHER = Path(__file__).with_name("mpi_launcher.py")  # not as a module: it is no part of the package
_STARTING = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "PYTHONDONTWRITEBYTECODE")
_GIVEN = ("TLLM", "TRTLLM")


class GenerationExecutorProxy:
    def __init__(self, args: dict[str, Any], world_size: int) -> None:
        print("rank 0 using MpiPoolSession to spawn MPI processes", flush=True)
        ours, theirs = os.pipe()
        start = {"args": args, "world_size": world_size, "answers": theirs}
        self._process = subprocess.Popen(
            [sys.executable, str(_LAUNCHER), json.dumps(start)],
            stdin=subprocess.PIPE,
            pass_fds=(theirs,),
            env=_environment(),
            text=True,
        )
        os.close(theirs)
        self._answers = os.fdopen(ours, encoding="utf-8")
        self._sinks: dict[int, Sink] = {}
        self._replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._shut = False
        self._lock = threading.Lock()
        try:
            self._wait_until_ready()
        except BaseException:
            self._let_go()
            raise
        threading.Thread(target=self._listen, daemon=True).start()

    def _wait_until_ready(self) -> None:
        line = self._answers.readline()
        if not line:
            logger.error("Executor worker died during initialization.")
            raise RuntimeError("Executor worker died during initialization")
        answer = json.loads(line)
        if answer["kind"] != "ready":
            logger.error(f"Executor worker initialization error: {answer['trace']}")
            cause = (
                RuntimeError(answer["message"])
                if answer["type"] == "RuntimeError"
                else Exception(answer["message"])
            )
            raise RuntimeError("Executor worker returned error") from cause

    def _listen(self) -> None:
        for line in self._answers:
            answer = json.loads(line)
            if answer["kind"] == "tokens":
                sink = self._sinks.pop(answer["id"]) if answer["done"] else self._sinks[answer["id"]]
                sink._feed(answer["tokens"], answer["done"])
            else:
                self._replies.put(answer)
        for sink in self._sinks.values():
            sink._fail(RuntimeError("the executor worker died"))
        self._replies.put({"kind": "gone", "value": None})
        self._answers.close()

    def _send(self, **asked: Any) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()

    def _ask(self, kind: str, timeout: float | None = 10) -> Any:
        self._send(kind=kind)
        return self._replies.get(timeout=timeout)["value"]

    def submit(self, request: dict[str, Any], sink: Sink) -> None:
        self._sinks[request["id"]] = sink
        self._send(kind="generate", **request)

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        return list(self._ask("stats", timeout))

    def get_kv_cache_capacity(self) -> dict[str, int]:
        return dict(self._ask("capacity"))

    def is_shutdown(self) -> bool:
        return self._shut

    def shutdown(self) -> None:
        """Returns when the worker has said that it will end, not when it has ended."""
        if self._shut:
            return
        self._shut = True
        try:
            self._send(kind="shutdown")
            self._replies.get(timeout=10)
        except (OSError, queue.Empty):
            logger.error("the worker did not answer")
        self._let_go()

    def _let_go(self) -> None:
        """Nobody waits for the process but a thread that collects it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        threading.Thread(target=self._process.wait, daemon=True).start()


def _environment() -> dict[str, str]:
    given = {
        name: value for name, value in os.environ.items() if name.startswith(_GIVEN) or name in _STARTING
    }
    return given | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
