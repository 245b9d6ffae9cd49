"""The meters that `memory_truth.py` puts beside ours, each used as its documentation says.

Executed by an interpreter that has them, so that they need not be in ours:

    python memory_rivals.py psutil PID                 the tree of a live process
    python memory_rivals.py tracker FOLDER SIZES S     optimum-benchmark's MemoryTracker around the truth child
    python memory_rivals.py runexec FOLDER SIZES S     BenchExec's runexec around the truth child

One line of JSON: {"reading name": bytes, ...}, or {"failed": the rival's own message}.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("truth_child.py")


def hold_command(folder: str, sizes: str, seconds: str) -> list[str]:
    return [sys.executable, str(CHILD), "hold", folder, sizes, seconds]


def psutil_tree(pid: str) -> dict[str, Any]:
    import psutil

    top = psutil.Process(int(pid))
    members = [top, *top.children(recursive=True)]
    return {
        "psutil RSS, the process": top.memory_info().rss,
        "psutil RSS, its tree": sum(each.memory_info().rss for each in members),
        "psutil USS, its tree": sum(each.memory_full_info().uss for each in members),
    }


def tracker(folder: str, sizes: str, seconds: str) -> dict[str, Any]:
    from optimum_benchmark.trackers.memory import MemoryTracker

    meter = MemoryTracker(device="cpu", backend="x")
    with meter.track():
        subprocess.run(hold_command(folder, sizes, seconds), check=True, stdout=subprocess.DEVNULL)
    ram_mb: float = meter.get_max_memory().max_ram
    return {"optimum-benchmark MemoryTracker": int(ram_mb * 1e6)}


def runexec(folder: str, sizes: str, seconds: str) -> dict[str, Any]:
    program = Path(sys.executable).with_name("runexec")
    if not program.exists():
        return {"failed": "there is no runexec beside this interpreter"}
    done = subprocess.run(
        [
            str(program),
            *("--no-container", "--output", str(Path(folder) / "runexec.log"), "--"),
            *hold_command(folder, sizes, seconds),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"^memory=(\d+)B", done.stdout, re.MULTILINE)
    if found is None:
        return {"failed": (done.stderr.strip() or done.stdout.strip() or "no line memory=").splitlines()[-1]}
    return {"BenchExec runexec, memory": int(found[1])}


def main(arguments: list[str]) -> None:
    acts = {"psutil": psutil_tree, "tracker": tracker, "runexec": runexec}
    try:
        said = acts[arguments[0]](*arguments[1:])
    except Exception as error:  # noqa: BLE001  whatever a rival says is the answer
        said = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:])
