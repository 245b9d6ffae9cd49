"""Both of the real package's voices: the Python logger, silent below its level, and the C++ one, which is not.

Python lines: `[MM/DD/YYYY-HH:MM:SS] [TRT-LLM] [I] text` on standard output, at level `error` unless TLLM_LOG_LEVEL says
otherwise; with several ranks `[RANK n]` stands in them. C++ lines: `[TensorRT-LLM][INFO] text`, shown by default.
"""

from __future__ import annotations

import datetime
import os
import sys

LEVELS = ("trace", "debug", "verbose", "info", "warning", "error", "internal_error")
_LETTERS = {"debug": "D", "verbose": "V", "info": "I", "warning": "W", "error": "E"}


class Logger:
    DEFAULT_LEVEL = "error"

    def __init__(self) -> None:
        self._wanted = os.environ.get("TLLM_LOG_LEVEL", "").lower()
        if self._wanted and self._wanted not in LEVELS:
            raise ValueError(f"TLLM_LOG_LEVEL is {self._wanted!r}, not one of {', '.join(LEVELS)}")
        self._level = self._wanted or self.DEFAULT_LEVEL
        self.rank: int | None = None  # set where there are several

    @property
    def level(self) -> str:
        return self._level

    def set_level(self, level: str) -> None:
        """Ignored when the environment has decided, as in the real one."""
        if not self._wanted:
            self._level = level

    def _say(self, level: str, text: str) -> None:
        if LEVELS.index(level) < LEVELS.index(self._level):
            return
        now = datetime.datetime.now().strftime("%m/%d/%Y-%H:%M:%S")  # noqa: DTZ005  the real one's is local time
        rank = "" if self.rank is None else f"[RANK {self.rank}] "
        print(f"[{now}] [TRT-LLM] {rank}[{_LETTERS[level]}] {text}", flush=True)

    def debug(self, text: str) -> None:
        self._say("debug", text)

    def info(self, text: str) -> None:
        self._say("info", text)

    def warning(self, text: str) -> None:
        self._say("warning", text)

    def error(self, text: str) -> None:
        self._say("error", text)

    def cpp(self, text: str) -> None:
        """A line of the C++ runtime, level INFO."""
        if LEVELS.index(self._wanted or "info") <= LEVELS.index("info"):
            sys.stdout.write(f"[TensorRT-LLM][INFO] {text}\n")
            sys.stdout.flush()


logger = Logger()
