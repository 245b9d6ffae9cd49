"""What the sampler costs: its share of a core, and whether throughput is the same with and without it.

    python benchmarks/sampling.py [--quick] [--save] [--device cuda]

One generation that does not end (on cpu with all cores), and the product's own sampler beside it, on in one of two neighbouring
windows and off in the other, in random order: whole trials differ by far more than 2 %. A value is the logarithm of the
ratio of tokens in the two windows of a pair. Equivalence within 2 % is asked by two
one-sided signed-rank tests over pairs: a virtual machine may stand still for half a window, in either of the two. The
sampler's CPU time is its own count (CLOCK_THREAD_CPUTIME_ID), as on every record. Aims are reported, never asserted.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from overhead import aim, machine, options, save, scratch
from rich.console import Console
from steady_generation import BATCH

from analysis import statistics
from spark_ray import content, nvml
from spark_ray.experiment import Experiment
from spark_ray.sampler import Sampler

GENERATION = Path(__file__).with_name("steady_generation.py")
AIM_SHARE = 0.01
AIM_RATE_HZ = 20.0
MARGIN = 0.02
ALPHA = 0.05
WINDOW_S = 1.0
SETTLE_S = 0.1  # after a switch, in no window
EXPERIMENT = {
    "name": "sampling",
    "engine": {"kind": "embedded"},
    "model": {"random_llama": {}},
    "search": {"space": {"max_batch_size": BATCH, "max_num_tokens": 256, "memory_fraction": 0.1}},
    "arms": {"a": {"environment": "native"}, "b": {"environment": "native"}},
}


@dataclass(frozen=True)
class Window:
    """A stretch of the generation; `cpu_s` and `rows` are the sampler's, 0 where there was none."""

    sampled: bool
    start_s: float
    end_s: float
    cpu_s: float = 0.0
    rows: int = 0

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def window(sampled: bool, pid: int, gpus: nvml.Reader, length_s: float) -> Window:
    """With the sampler its whole life is counted, so that starting it is in its cost."""
    sampler = Sampler(gpus) if sampled else None
    if sampler:
        sampler.start()
        sampler.attach(pid)
    time.sleep(SETTLE_S)
    start = time.monotonic()
    time.sleep(length_s)
    end = time.monotonic()
    if sampler:
        sampler.stop()
        return Window(True, start, end, sampler.cpu_s, len(sampler.rows))
    return Window(False, start, end)


def measured(model: Path, device: str, folder: Path, pairs: int, seed: int, length_s: float) -> tuple[list[tuple[Window, Window]], list[float]]:  # fmt: skip
    """Pairs of windows as (with, without), and when each step of the generation was done."""
    stamps, generator = folder / "stamps", random.Random(seed)
    found = []
    with subprocess.Popen(
        [sys.executable, str(GENERATION), str(model), str(stamps), device],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ) as child, nvml.Reader() as gpus:  # fmt: skip
        assert child.stdout
        if child.stdout.readline() != "ready\n":
            raise SystemExit("the generation did not start: see its message above")
        for number in range(1, pairs + 1):
            order = generator.sample([True, False], 2)
            made = {sampled: window(sampled, child.pid, gpus, length_s) for sampled in order}
            found.append((made[True], made[False]))
            if number % 100 == 0:
                print(f"pair {number} of {pairs}", file=sys.stderr)
        child.communicate()  # closes its standard input: it ends after the present round
    return found, [float(line) for line in stamps.read_text().split()]


def steps_until(steps: Sequence[float], moment_s: float) -> float:
    """How many steps were done, the one under way in proportion: a step is a good part of a window on a slow machine."""
    done = bisect_left(steps, moment_s)
    if not 0 < done < len(steps):
        return float(done)
    return done + (moment_s - steps[done - 1]) / (steps[done] - steps[done - 1])


def tokens_per_s(steps: Sequence[float], seen: Window) -> float:
    return BATCH * (steps_until(steps, seen.end_s) - steps_until(steps, seen.start_s)) / seen.duration_s


def lines_of(sampled: Sequence[Window], ratios: Sequence[float]) -> list[str]:
    found, p = statistics.paired(ratios), statistics.rank_equivalence_p(ratios, MARGIN)
    lived_s = [each.duration_s + SETTLE_S for each in sampled]
    share = 100 * sum(each.cpu_s for each in sampled) / sum(lived_s)
    rate = median(each.rows / lived for each, lived in zip(sampled, lived_s, strict=True))
    lines = [
        aim("sampler's share of a core, all windows", share, 100 * AIM_SHARE, at_most=True, unit=" %"),
        aim("samples a second, median", rate, AIM_RATE_HZ, at_most=False),
    ]
    said = f"throughput with the sampler against without, n {found.n} pairs of windows: {100 * (found.hodges_lehmann or 0):+.2f} %"
    if found.low is None or found.high is None or p is None:
        return [*lines, f"{said}; nothing can be said from one pair"]
    bounds = f"(mean {100 * (found.mean or 0):+.2f}, 95 %: {100 * found.low:+.2f} to {100 * found.high:+.2f})"
    verdict = "met" if p < ALPHA else "NOT met"
    return [
        *lines,
        f"{said} {bounds}, equivalent within {100 * MARGIN:.0f} %: signed-rank TOST p {p:.3g}: {verdict}",
    ]


def main() -> None:
    parser = options(__doc__, rounds=400, trials=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    length_s = WINDOW_S
    if chosen.quick:
        chosen.rounds, length_s = 3, 0.5
    model = content.prepare_model(Experiment.model_validate(EXPERIMENT))
    assert model
    began = machine()
    with scratch(chosen.folder) as folder:
        pairs, steps = measured(model, chosen.device, Path(folder), chosen.rounds, chosen.seed, length_s)
    values = [[tokens_per_s(steps, each) for each in pair] for pair in pairs]
    if not all(map(all, values)):
        raise SystemExit(
            "a window without a single token: the machine is too slow for windows of this length"
        )
    ratios = [math.log(on / off) for on, off in values]
    lines = lines_of([on for on, _ in pairs], ratios)
    Console(width=140).print(*lines, sep="\n", highlight=False)
    if chosen.save:
        save(f"sampling-{chosen.device}", {"machine": began, "load_average_at_end": os.getloadavg(), "window_s": length_s,
                          "tokens_per_s_with_and_without": values, "log_ratios": ratios, "margin": MARGIN,
                          "sampler": [{"cpu_s": on.cpu_s, "rows": on.rows, "duration_s": on.duration_s + SETTLE_S} for on, _ in pairs],
                          "aims": lines})  # fmt: skip


if __name__ == "__main__":
    main()
