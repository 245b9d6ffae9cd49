"""What crosses the boundary: names, versions, and how a file is written so that a reader sees all of it or none."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

PROTOCOL_VERSION = 1
PACKAGE = "spark_ray_worker"
CONTROL = "@spark_ray"

PHASES = (
    "before_launch",
    "after_import",
    "after_load",
    "sizing",
    "after_kv",
    "after_warmup",
    "peak",
    "end",
    "after_exit",
)
"""In order. before_launch and after_exit are read by the host alone; `sizing` is the moment the engine reads free memory."""

REQUEST_FIELDS = frozenset(
    {
        "protocol_version",
        "trial_id",
        "attempt",
        "arm",
        "engine",
        "configuration",
        "workload",
        "model_path",
        "bundle_sha256",
        "seed",
    }
)


class ProtocolError(Exception):
    """A file that does not say what this version expects. Never guessed around."""


def check_fields(what: str, data: Any, fields: frozenset[str]) -> dict[str, Any]:
    """`data` itself, if it is an object with exactly `fields` and this protocol version; else ProtocolError."""
    if not isinstance(data, dict):
        raise ProtocolError(f"{what} is not an object")
    version = data.get("protocol_version")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"{what} has protocol version {version!r}; this is {PROTOCOL_VERSION}")
    if set(data) != fields:
        odd = sorted(set(data) ^ fields)
        raise ProtocolError(f"{what} has missing or unknown fields: {', '.join(map(str, odd))}")
    return data


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """By rename: a reader sees a whole file or none. NaN and infinity are refused, since JSON has neither."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)  # noqa: PTH105  one call, the guest's floor is 3.10 and this is the primitive meant


def package_sha256(folder: Path) -> str:
    """Hash of the Python files of a folder: names and contents, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
