"""The double's own settings, which the real package does not have.

Each is read from the environment variable TLLM_DOUBLE_<NAME> or, where that is not set, from `double.json` beside this
file (`{"VERSION": "1.4.0rc1"}`): the worker of a run gets no variables of its user, but a copy of this whole folder.

VERSION              which version of TensorRT-LLM it stands for; default 1.2.1
TOTAL_BYTES          what cudaMemGetInfo calls total and free before anything is loaded; default: MemTotal and MemFree
FREE_BYTES           of /proc/meminfo, which is what it answers on a GB10
WAITING              file that stands for the per-CPU lists: what the dry run gave back waits there (bytes, as text) and is
                     not free until somebody empties them by removing the file; default: it is free at once
LATE_S               how long the worker keeps its memory after shutdown() has returned; default 0.3
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path


@functools.lru_cache(maxsize=1)
def _file() -> dict[str, str]:
    path = Path(__file__).with_name("double.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def setting(name: str, default: str = "") -> str:
    return str(os.environ.get(f"TLLM_DOUBLE_{name}") or _file().get(name) or default)
