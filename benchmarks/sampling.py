"""What the sampler costs: its share of a core, and whether the engine's throughput is the same with and without it.

    python benchmarks/sampling.py [--quick] [--save]

Two runs of the same experiment, two equal native arms each; they differ in `limits.sampling` only. Blocks of the two
are executed in random order within each round, so that drift of the machine is shared; a value is the logarithm of the
ratio of throughputs, round by round. Equivalence within 2 % is asked by two one-sided t tests. The sampler's CPU time
is the sampler's own count (CLOCK_THREAD_CPUTIME_ID), as on every record. Aims are reported, never asserted.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from driving import Run
from overhead import aim, machine, options, save, scratch
from rich.console import Console

from analysis import statistics

AIM_SHARE = 0.01
MARGIN = 0.02
ALPHA = 0.05
AIM_RATE_HZ = 20.0
CONDITIONS = {"with": True, "without": False}


def experiment(name: str, sampling: bool, blocks: int, output_tokens: int) -> dict[str, Any]:
    plain = {"environment": "native", "treatment": {"page_cache": "keep", "per_cpu_pages": "as_is"}}
    return {
        "name": f"sampling-{name}",
        "engine": {"kind": "embedded"},
        "model": {"random_llama": {}},
        "workload": {"requests": 8, "input_tokens": 16, "output_tokens": output_tokens},
        "search": {
            "sampler": "grid", "blocks": blocks, "repetitions": blocks,
            "space": {"max_batch_size": 8, "max_num_tokens": 256, "memory_fraction": 0.05},
        },
        "arms": {"a": plain, "b": plain},
        "limits": {"sampling": sampling, "trial_timeout": "5min"},
    }  # fmt: skip


def throughput(block: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean of the block's two equal trials, tokens per second."""
    values = []
    for record in block.values():
        if record["outcome"]["kind"] != "ok":
            raise SystemExit(
                f"{record['trial_id']}: {record['outcome']['kind']}: {record['outcome']['message']}"
            )
        values.append(record["result"]["measurements"]["throughput"]["output_throughput_tokens_per_s"])
    return fmean(values)


def cost(record: Mapping[str, Any]) -> dict[str, float]:
    """Of one trial: the sampler's CPU seconds as a share of the trial's duration, and its rows a second."""
    samples, duration = record["host"]["samples"], record["host"]["duration_s"]
    return {
        "cpu_s": samples["cpu_s"], "duration_s": duration, "rows": samples["count"],
        "share_of_a_core": samples["cpu_s"] / duration, "interval_s": samples.get("interval_s") or duration / samples["count"],
    }  # fmt: skip


def race(runs: Mapping[str, Run], rounds: int, warm_up: int, seed: int) -> None:
    """Blocks of both runs in random order within each round; rounds before them warm up and are thrown away."""
    generator, order = random.Random(seed), list(runs)
    for number in range(1 - warm_up, rounds + 1):
        generator.shuffle(order)
        for name in order:
            runs[name].drive(1)
        print(f"round {number} of {rounds}", file=sys.stderr)


def lines_of(costs: Sequence[Mapping[str, float]], ratios: Sequence[float]) -> list[str]:
    found, p = statistics.paired(ratios), statistics.equivalence_p(ratios, MARGIN)
    share = 100 * median(each["share_of_a_core"] for each in costs)
    rate = 1 / median(each["interval_s"] for each in costs)
    lines = [
        aim("sampler's share of a core, median", share, 100 * AIM_SHARE, at_most=True, unit=" %"),
        aim("samples a second, median", rate, AIM_RATE_HZ, at_most=False),
    ]
    said = f"throughput with the sampler against without, n {found.n} rounds of 2 trials each: {100 * (found.mean or 0):+.2f} %"
    if found.low is None or found.high is None or p is None:
        return [*lines, f"{said}; nothing can be said from one round"]
    bounds = f"(95 %: {100 * found.low:+.2f} to {100 * found.high:+.2f})"
    verdict = "met" if p < ALPHA else "NOT met"
    return [*lines, f"{said} {bounds}, equivalent within {100 * MARGIN:.0f} %: TOST p {p:.3g}: {verdict}"]


def main() -> None:
    parser = options(__doc__, rounds=24, trials=1)
    parser.add_argument(
        "--output-tokens", type=int, default=256, help="of each request: how long a trial generates"
    )
    chosen = parser.parse_args()
    warm_up = 1
    if chosen.quick:
        chosen.rounds, chosen.output_tokens, warm_up = 1, 16, 0
    began = machine()
    with scratch(chosen.folder) as folder:
        runs: dict[str, Run] = {}
        try:
            for name, sampling in CONDITIONS.items():
                data = experiment(name, sampling, chosen.rounds + warm_up, chosen.output_tokens)
                runs[name] = Run(Path(folder) / name, data)
            race(runs, chosen.rounds, warm_up, chosen.seed)
            blocks = {name: run.blocks()[warm_up:] for name, run in runs.items()}
        finally:
            for run in runs.values():
                run.close()
    values = {name: [throughput(block) for block in each] for name, each in blocks.items()}
    ratios = [math.log(on / off) for on, off in zip(values["with"], values["without"], strict=True)]
    costs = [cost(record) for block in blocks["with"] for record in block.values()]
    lines = lines_of(costs, ratios)
    Console(width=140).print(*lines, sep="\n", highlight=False)
    if chosen.save:
        save("sampling", {"machine": began, "load_average_at_end": os.getloadavg(), "output_throughput_tokens_per_s": values,
                          "log_ratios": ratios, "sampler": costs, "margin": MARGIN, "aims": lines})  # fmt: skip


if __name__ == "__main__":
    main()
