"""How long one trial will take, in its parts: an estimate for the plan, replaced by what is measured once trials end.

For TensorRT-LLM nothing was measured by us. The figures are published ones:

- An owner's whole log of a start on a DGX Spark (TensorRT-LLM 1.1.0rc3, gpt-oss-120b, 2025-12-20): worker process up 15 s
  after the first one, 63.3 GB of weights in 46 s, first executor with its profiling pass 41 s, second one 6 s.
- A comment in TensorRT-LLM's mpi_session.py: 50 to 65 s until a worker is up on an idle host. Here the page cache is
  dropped before each attempt, so the first import reads its libraries from disk.
- Owners report that memory comes back a minute after a container ended, and 231 to 234 GB/s read by a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .engines import TensorRTLLMEngine
from .experiment import Experiment, Workload
from .search_spec import Axis
from .units import GIB

IMPORT_S, WORKER_S, BUILD_S = 60.0, 15.0, 47.0
LOAD_BYTES_PER_S = 63.3e9 / 46
READ_BYTES_PER_S = 232e9
COOLDOWN_S = 60.0
ASSUMED_WEIGHT_BYTES = round(15.2e9)
"""Where the model's folder is not there to be looked at: seven billion parameters in bf16."""

_EMBEDDED_START_S, _PROBE_START_S, _DOUBLE_S, _SIMULATED_S = 8.0, 0.8, 4.0, 0.1
_TOUCHED_BYTES_PER_S = 2 * GIB


@dataclass(frozen=True)
class TrialTime:
    """Seconds of one trial. `basis` says where they come from, in words."""

    start_s: float
    requests_s: float = 0.0
    cooldown_s: float = 0.0
    basis: str = ""

    @property
    def total_s(self) -> float:
        return self.start_s + self.requests_s + self.cooldown_s


def of_trial(experiment: Experiment, mem_free_bytes: int) -> TrialTime | None:
    """What is known beforehand; None for an engine of which nothing is."""
    engine, fraction = experiment.engine, _middle(experiment.search.space.axes["memory_fraction"])
    if experiment.limits.expected_trial is not None:
        return TrialTime(experiment.limits.expected_trial, basis="limits.expected_trial")
    if isinstance(engine, TensorRTLLMEngine):
        return _tensorrt_llm(experiment, engine)
    if engine.kind == "simulated":
        return TrialTime(_SIMULATED_S, basis="simulated, no engine")
    start_s = {"embedded": _EMBEDDED_START_S, "probe": _PROBE_START_S}.get(engine.kind)
    if start_s is None:
        return None
    if getattr(engine, "pool", None) not in {"mapped", "none"}:
        start_s += fraction * mem_free_bytes / _TOUCHED_BYTES_PER_S
    return TrialTime(start_s, basis="a rule of thumb")


def _tensorrt_llm(experiment: Experiment, engine: TensorRTLLMEngine) -> TrialTime:
    if engine.double is not None:
        return TrialTime(_DOUBLE_S, basis="a stand-in, no engine")
    known = weight_bytes(Path(experiment.model.path)) if experiment.model and experiment.model.path else None
    weights = ASSUMED_WEIGHT_BYTES if known is None else known
    load_s = 0.0 if engine.load_format == "dummy" else weights / LOAD_BYTES_PER_S
    worker_s = WORKER_S if engine.worker == "mpi" else 0.0
    basis = "published figures of a DGX Spark"
    if known is None:
        basis += f"; the model is not here: {ASSUMED_WEIGHT_BYTES / 1e9:.1f} GB of weights are assumed"
    return TrialTime(
        start_s=IMPORT_S + worker_s + load_s + BUILD_S,
        requests_s=requests_s(
            experiment.workload, weights, _middle(experiment.search.space.axes["max_batch_size"])
        ),
        cooldown_s=COOLDOWN_S,
        basis=basis,
    )


def requests_s(workload: Workload, weights: int, batch: float) -> float:
    """Each step reads all weights once for a whole batch: bandwidth is the bound. Prompts are not counted.

    Too long for a mixture of experts, which reads a part. 50 requests of 128 tokens in batches of 8 with 15.2 GB:
    59 s; the published study had 53 s.
    """
    rounds = math.ceil(workload.requests / max(1.0, batch))
    return rounds * workload.output_tokens * weights / READ_BYTES_PER_S


def weight_bytes(folder: Path) -> int | None:
    """Size of a checkpoint's weight files; None where there are none."""
    files = [path for path in folder.glob("*.safetensors") if path.is_file()] if folder.is_dir() else []
    return sum(path.stat().st_size for path in files) or None


def _middle(axis: Axis) -> float:
    if isinstance(axis, tuple):
        numbers = [value for value in axis if isinstance(value, int | float)]
        return sum(numbers) / len(numbers)
    return math.sqrt(axis.low * axis.high) if axis.log else (axis.low + axis.high) / 2
