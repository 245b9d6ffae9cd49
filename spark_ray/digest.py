"""One attempt in a few lines, for the log: what was prepared, how it was started, how far it came and how it ended."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .outcome import ANSWERS
from .units import format_bytes

TAIL_LINES = 12
_TAIL_BYTES = 1 << 14


def lines(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """What `record` says (what it lacks is left out); of a trial that did not answer, also the end of its worker.log."""
    host = record.get("host") or {}
    if wait := host.get("wait"):
        reached = "" if wait["reached"] else ", in vain"
        yield f"memory     {format_bytes(wait['found_bytes'])} available after {wait['waited_s']:.1f} s{reached}"
    if treated := host.get("treatment"):
        asked = ", ".join(f"{key}: {json.dumps(value)}" for key, value in record["treatment"].items())
        yield (
            f"treatment  {asked}; then {format_bytes(treated['mem_free_bytes'])} free,"
            f" {format_bytes(treated['cached_bytes'])} cached"
        )
    if command := record.get("command"):
        yield f"command    {shlex.join(command)}"
    if seen := host.get("observations"):
        begun = seen[0]["monotonic_s"]
        phases = (f"{each['phase']} {each['monotonic_s'] - begun:.2f} s" for each in seen[1:])
        yield f"phases     {', '.join(phases)}"
    if "duration_s" in host:
        yield f"end        exit {host['exit_code']} after {host['duration_s']:.2f} s"
    if record["outcome"]["kind"] not in ANSWERS:
        yield f"folder     {folder}"
        yield from (f"worker.log {line}" for line in _tail(folder / "worker.log"))


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    shown = ["".join(c if c.isprintable() else "?" for c in line) for line in text.splitlines()[-TAIL_LINES:]]
    return shown or ["is empty"]
