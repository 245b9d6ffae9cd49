"""What is asked of an engine after its pool is sized, and the control that asks no engine anything.

Requests are token ids of a fixed length, the same in every arm. No two share a first block, so that no engine can
serve one from the cache of another. `python -m spark_ray_worker.workload SIZE RUNS DEVICE` is the matrix product: a process of
its own, so that its arrays, its libraries and its CUDA context are gone before an engine looks at memory.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_STRIDE = 7919  # a prime: different prompts without a random generator
_STEP = 31


# ---- requests ---------------------------------------------------------------------------------------------


def prompts(workload: dict[str, Any], vocabulary: int) -> list[list[int]]:
    """The requests as token ids: first tokens all differ; with more requests than tokens, the first two together do."""
    requests, length = int(workload["requests"]), int(workload["input_tokens"])
    if requests > (vocabulary if length == 1 else vocabulary**2):
        raise ValueError(
            f"{requests} different prompts of {length} tokens need a vocabulary larger than {vocabulary}"
        )
    stride = next(
        number for number in range(_STRIDE, _STRIDE + vocabulary + 1) if math.gcd(number, vocabulary) == 1
    )
    made = []
    for request in range(requests):
        lap = request // vocabulary
        made.append(
            [(request * stride + position * (_STEP + lap) + 1) % vocabulary for position in range(length)]
        )
    return made


def check_whole(measured: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of the requests. Raises where they were not served to the last token: half the work is another workload."""
    wanted = int(asked["requests"]) * int(asked["output_tokens"])
    if (measured["requests"], measured["output_tokens"]) != (asked["requests"], wanted):
        raise RuntimeError(
            f"{measured['requests']} requests made {measured['output_tokens']} tokens, asked were {asked['requests']} and {wanted}"
        )
    return dict(measured)


# ---- latency ----------------------------------------------------------------------------------------------


def spread(values_s: Sequence[float]) -> dict[str, Any]:
    """Mean and percentiles of at least one value. A percentile is a measured value: the smallest that so many are not above."""
    ordered = sorted(values_s)

    def percentile(percent: int) -> float:
        return ordered[-(-len(ordered) * percent // 100) - 1]

    return {
        "n": len(ordered), "mean_s": math.fsum(ordered) / len(ordered),
        "p50_s": percentile(50), "p90_s": percentile(90), "p99_s": percentile(99),
    }  # fmt: skip


def latency(sent_s: Sequence[float], arrived_s: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of each request: when it was sent, and when each of its tokens came."""
    gaps = [after - before for times in arrived_s for before, after in itertools.pairwise(times)]
    return {
        "first_token": spread([times[0] - sent for sent, times in zip(sent_s, arrived_s, strict=True)]),
        "inter_token": spread(gaps) if gaps else None,
    }


# ---- the matrix product -----------------------------------------------------------------------------------


def matmul(settings: dict[str, Any]) -> dict[str, Any]:
    """Time a square matrix product in a process of its own: `settings` has size, runs and device."""
    import subprocess  # 5 ms, and only this control needs it

    words = [str(settings["size"]), str(settings["runs"]), settings.get("device", "any")]
    command = [sys.executable, "-m", __name__, *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise RuntimeError(f"workload.matmul: its process ended with {how}; what it said is in worker.log")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "lacks" in found:
        raise RuntimeError(found["lacks"])
    return found


def multiply(size: int, runs: int, wanted: str = "any") -> dict[str, Any]:
    """The product with torch where it can be imported (on the GPU where torch sees one), else with numpy; `wanted`: cuda or any."""
    libraries = {"torch": _start_torch, "numpy": _start_numpy}
    library = next((name for name in libraries if importlib.util.find_spec(name) is not None), None)
    if library is None:
        return {
            "lacks": "workload.matmul needs torch or numpy in the worker's environment, and finds neither"
        }
    version, device, product = libraries[library](size)
    if wanted == "cuda" and device == "cpu":
        return {"lacks": f"workload.matmul.device is cuda, and {library} {version} sees no GPU here"}
    product()  # not counted: it starts threads, picks kernels and touches the memory of the result
    durations = []
    for _ in range(runs):
        started = time.perf_counter()
        product()
        durations.append(time.perf_counter() - started)
    return {
        "size": size, "library": f"{library} {version}", "device": device, "dtype": "float32", "durations_s": durations,
        "median_flop_per_s": 2 * size**3 / _median(durations),
    }  # fmt: skip


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _start_torch(size: int) -> tuple[str, str, Callable[[], None]]:
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.rand(size, size, dtype=torch.float32, device=device, generator=generator) for _ in range(2)
    )
    result = torch.empty(size, size, dtype=torch.float32, device=device)

    def product() -> None:
        torch.matmul(left, right, out=result)
        if on_gpu:
            torch.cuda.synchronize()

    return torch.__version__, torch.cuda.get_device_name() if on_gpu else "cpu", product


def _start_numpy(size: int) -> tuple[str, str, Callable[[], None]]:
    import numpy as np

    generator = np.random.default_rng(0)
    left, right = (generator.random((size, size), dtype=np.float32) for _ in range(2))
    result = np.empty((size, size), dtype=np.float32)

    def product() -> None:
        np.matmul(left, right, out=result)

    return np.__version__, "cpu", product


if __name__ == "__main__":
    sys.stdout.write(json.dumps(multiply(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])) + "\n")
