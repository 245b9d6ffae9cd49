"""Stands for OpenMPI's daemon: a process between the user's and the workers, which starts the ranks and waits for them.

python mpi_launcher.py JSON      {"args": ..., "world_size": n, "answers": descriptor}
"""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> int:
    start = json.loads(sys.argv[1])
    ranks = [_start(start, rank) for rank in range(start["world_size"])]
    status = ranks[0].wait()
    for rank in ranks[1:]:
        assert rank.stdin is not None
        rank.stdin.close()
        rank.wait()
    return status


def _start(start: dict[str, object], rank: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tensorrt_llm.executor.worker_main", json.dumps(start), str(rank)]
    if rank == 0:  # it alone talks: standard input is the user's
        return subprocess.Popen(command, pass_fds=(int(str(start["answers"])),))
    return subprocess.Popen(command, stdin=subprocess.PIPE)


if __name__ == "__main__":
    sys.exit(main())
