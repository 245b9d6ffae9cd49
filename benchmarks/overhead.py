"""Wall seconds per isolated no-op trial: ours beside its peers, interleaved in one run, and what our parent burns.

    python benchmarks/overhead.py [--quick] [--save] [--without-ray]

A trial is isolated when it has a fresh process that nothing of the last trial can reach. Ours is the true path
(guest process, observations from both sides, evidence, a durable record, a real search) with the engine left out.
Each round runs one batch of every contender in random order, so that drift of the machine is shared; ratios are
taken round by round. Every contender runs beside the same idle Ray. Aims are reported, never asserted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rivals import fresh_actor, optuna_and_process, optuna_study, plain_process, ray_tune, timed

from spark_ray import config, host, opening
from spark_ray.cluster import one_local_node
from spark_ray.drive import Drive, Known
from spark_ray.execute import LocalSlots
from spark_ray.plan import Block
from spark_ray.preview import preview, probe
from spark_ray.search import Search
from spark_ray.store import RECORD, BlockState, Store

AIM_TRIAL_S = 0.10
AIM_TUNE_RATIO = 5.0
AIM_PARENT_CPU = 0.01
OURS = "ours, local"
OURS_RAY = "ours, Ray slot"
TUNE = "Ray Tune + OptunaSearch"
RESULTS = Path(__file__).parent / "results"

EXPERIMENT = """
name: {name}
engine: {{kind: fake}}
search:
  sampler: tpe            # what Ray Tune's OptunaSearch uses
  blocks: 1
  space:
    max_batch_size: {{low: 1, high: 256}}
    max_num_tokens: {{low: 256, high: 16384}}
    memory_fraction: {{low: 0.3, high: 0.95}}
arms:
  a: {{environment: native, treatment: {{page_cache: keep, per_cpu_pages: as_is}}, engine: {{hold: {hold_a}s}}}}
  b: {{environment: native, treatment: {{page_cache: keep, per_cpu_pages: as_is}}, engine: {{hold: {hold_b}s}}}}
"""


# ---- ours -------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Listens to a drive: seconds per trial of each block, and CPU and wall seconds of each trial."""

    per_trial_s: list[float] = field(default_factory=list)
    durable_at: dict[str, float] = field(default_factory=dict)
    usage: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by arm: CPU, wall
    block_started: float = field(default_factory=time.monotonic)
    trial: tuple[float, float] = (0.0, 0.0)

    def trial_started(self, slot: str, block: Block, arm: str, attempt: int) -> None:  # noqa: ARG002
        self.trial = (own_cpu_s(), time.monotonic())

    def trial_ended(self, slot: str, block: Block, arm: str, outcome: Mapping[str, str]) -> None:  # noqa: ARG002
        self.durable_at[block.trial_id(arm)] = time.time()
        cpu_s, started = self.trial
        self.usage.setdefault(arm, []).append((own_cpu_s() - cpu_s, time.monotonic() - started))
        if outcome["kind"] != "ok":
            raise RuntimeError(f"{block.trial_id(arm)}: {dict(outcome)}")

    def block_ended(self, state: BlockState, divergence: float | None, known: Known | None = None) -> None:  # noqa: ARG002
        now = time.monotonic()
        self.per_trial_s.append((now - self.block_started) / len(state.block.order))
        self.block_started = now


def own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Ours:
    """A run that grows batch by batch; store, search and slots are the tool's own."""

    def __init__(
        self, folder: Path, make_slots: Callable[..., Any], hold_a_s: float = 0, hold_b_s: float = 0
    ) -> None:
        folder.mkdir()
        file = folder / "experiment.yaml"
        file.write_text(EXPERIMENT.format(name=folder.name, hold_a=hold_a_s, hold_b=hold_b_s))
        loaded = config.load_experiment(file)
        self._experiment = loaded.experiment
        plan = preview(loaded.experiment, one_local_node(), probe(loaded.experiment))
        self._arms = plan.executed
        self.store: Store = opening.begin(folder / "run", loaded, plan, cluster=None, executor="local")
        self._search = Search(
            loaded.experiment.search, seed=0, journal=self.store.journal, name=loaded.experiment.name
        )
        self._slots = make_slots(self.store.folder, loaded.experiment, plan.executed)
        self.from_start_s: list[float] = []

    def drive(self, blocks: int) -> Clock:
        more = len(self.store.blocks()) + blocks
        searched = self._experiment.search.model_copy(update={"blocks": more})
        experiment = self._experiment.model_copy(update={"search": searched})
        drive = Drive(self.store, experiment, self._arms, self._search, clock := Clock())
        clock.block_started = time.monotonic()
        drive.run(self._slots.slots)
        return clock

    def batch(self, trials: int) -> list[float]:
        """Seconds per trial, one value a block (its two trials, and the search's part, halved)."""
        clock = self.drive(max(1, trials // 2))
        for trial_id, durable_at in clock.durable_at.items():
            record = json.loads((self.store.attempt_folder(trial_id, 1) / RECORD).read_text())
            started = datetime.fromisoformat(record["started_at"]).timestamp()
            self.from_start_s.append(durable_at - started)
        return clock.per_trial_s

    def close(self) -> None:
        self._slots.close()
        self.store.close()


def ray_slots(folder: Path, experiment: Any, arms: Sequence[str]) -> Any:
    from spark_ray.actors import RaySlots

    return RaySlots(folder, experiment, arms, None)


# ---- the race ---------------------------------------------------------------------------------------------


@dataclass
class Contender:
    name: str
    isolates: bool
    batch: Callable[[int], list[float]]
    rounds: list[list[float]] = field(default_factory=list)

    def all_s(self) -> list[float]:
        return [value for batch in self.rounds for value in batch]

    def medians(self) -> list[float]:
        return [statistics.median(batch) for batch in self.rounds]


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: always a value that was measured."""
    return sorted(values)[max(0, -(-int(share * 1000) * len(values) // 1000) - 1)]


def contenders(folder: Path, with_ray: bool, stack: ExitStack) -> tuple[list[Contender], list[Ours]]:
    local = Ours(folder / "local", LocalSlots)
    stack.callback(local.close)
    study = optuna_study(folder)
    ours = [local]
    found = [
        Contender(OURS, True, local.batch),
        Contender("subprocess `python -c pass`", True, lambda n: timed(plain_process, n)),
        Contender(
            "Optuna ask/tell + subprocess", True, lambda n: timed(lambda: optuna_and_process(study), n)
        ),
    ]
    if not with_ray:
        return found, ours
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }  # both in Tune's favour
    on_ray = Ours(folder / "ray", ray_slots)
    stack.callback(on_ray.close)
    ours.append(on_ray)
    found += [
        Contender(OURS_RAY, True, on_ray.batch),
        Contender("fresh Ray actor by hand", True, lambda n: timed(fresh_actor, n)),
    ]
    try:
        importlib.import_module("ray.tune.search.optuna")
    except ImportError as error:
        print(f"Ray Tune is left out ({error}): pip install 'ray[tune]'", file=sys.stderr)
        return found, ours
    return [
        *found,
        Contender(TUNE, True, lambda n: ray_tune(folder, n, reuse_actors=False)),
        Contender(f"{TUNE}, reuse_actors", False, lambda n: ray_tune(folder, n, reuse_actors=True)),
    ], ours


def race(found: Sequence[Contender], rounds: int, trials: int, seed: int) -> None:
    """Rounds in random order; a round before them warms everything up and is thrown away."""
    order, generator = list(found), random.Random(seed)
    for number in range(rounds + 1):
        generator.shuffle(order)
        for contender in order:
            values = contender.batch(trials if number else 2)
            if number:
                contender.rounds.append(values)
        print(f"round {number} of {rounds}", file=sys.stderr)


def parent_cpu(folder: Path, hold_s: float, blocks: int) -> dict[str, Any]:
    """CPU seconds of this process (driver, launcher, sampler) per wall second that a trial takes longer.

    Each block is a pair, a guest that ends at once and one that holds; the difference leaves start and end out.
    """
    ours = Ours(folder / "hold", LocalSlots, hold_b_s=hold_s)
    try:
        used = ours.drive(blocks).usage
    finally:
        ours.close()
    shares = [
        (long[0] - short[0]) / (long[1] - short[1]) for short, long in zip(used["a"], used["b"], strict=True)
    ]
    return {
        "hold_s": hold_s,
        "blocks": blocks,
        "share_of_a_core": statistics.median(shares),
        "shares": shares,
        "cpu_s_of_a_no_op_trial": statistics.median(cpu for cpu, _ in used["a"]),
    }


# ---- what it says -----------------------------------------------------------------------------------------


def ratio_to(found: Contender, ours: Contender) -> list[float]:
    return [theirs / own for theirs, own in zip(found.medians(), ours.medians(), strict=True)]


def table_of(found: Sequence[Contender]) -> Table:
    ours = found[0]
    table = Table(title="wall seconds per no-op trial", title_justify="left", box=None, pad_edge=False)
    for heading in ("contender", "isolates", "n", "median s", "p95 s", "mean s", "x ours (rounds)"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for each in found:
        values, ratios = each.all_s(), ratio_to(each, ours)
        table.add_row(
            each.name, "yes" if each.isolates else "NO", str(len(values)), f"{statistics.median(values):.4f}",
            f"{percentile(values, 0.95):.4f}", f"{statistics.fmean(values):.4f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        )  # fmt: skip
    return table


def aim(what: str, found: float, wanted: float, *, at_most: bool, unit: str = "") -> str:
    met = found <= wanted if at_most else found >= wanted
    return f"{what}: {found:.3g}{unit}, aim {'<=' if at_most else '>='} {wanted:g}{unit}: {'met' if met else 'NOT met'}"


def aims_of(found: Sequence[Contender], parent: Mapping[str, Any]) -> list[str]:
    by_name = {each.name: each for each in found}
    lines = [
        aim("isolated native trial, local, median", statistics.median(found[0].all_s()), AIM_TRIAL_S, at_most=True, unit=" s"),
    ]  # fmt: skip
    if TUNE in by_name:
        for ours in (OURS, OURS_RAY):
            ratio = statistics.median(ratio_to(by_name[TUNE], by_name[ours]))
            lines.append(aim(f"{TUNE} over {ours}", ratio, AIM_TUNE_RATIO, at_most=False, unit="x"))
    share = 100 * parent["share_of_a_core"]
    lines.append(
        aim("parent while a guest runs", share, 100 * AIM_PARENT_CPU, at_most=True, unit=" % of a core")
    )
    return lines


def machine() -> dict[str, Any]:
    """Where a figure comes from, without names or paths of the machine."""
    wanted = ("kernel", "machine", "cpu_count", "cpu_model", "memory_total_bytes")
    described = host.describe()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: described[name] for name in wanted},
        "python": platform.python_version(),
        **{name: version(name) for name in ("spark_ray", "ray", "optuna", "docker")},
        "load_average": os.getloadavg(),
    }


def save(name: str, data: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"saved {name}.json", file=sys.stderr)


@contextmanager
def scratch(within: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="spark_ray-benchmark-", dir=within) as folder:
        yield Path(folder)


def options(description: str | None, rounds: int, trials: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--trials", type=int, default=trials, help="of each contender in a round")
    parser.add_argument("--seed", type=int, default=0, help="of the order of contenders")
    parser.add_argument("--quick", action="store_true", help="for CI: shows that it works, not how fast")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    parser.add_argument("--folder", type=Path, help="where runs are made; must be a disk, not memory")
    return parser


def main() -> None:
    parser = options(__doc__, rounds=8, trials=10)
    parser.add_argument("--without-ray", action="store_true", help="nothing of Ray runs at all")
    parser.add_argument("--hold", type=float, default=5.0, help="seconds that the guest holds for parent CPU")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.trials, chosen.hold = 2, 2, 1.0
    began = machine()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch(chosen.folder))
        parent = parent_cpu(folder, chosen.hold, blocks=2 if chosen.quick else 6)
        found, ours = contenders(folder, not chosen.without_ray, stack)
        race(found, chosen.rounds, chosen.trials, chosen.seed)
    from_start = {name: each.from_start_s for name, each in zip((OURS, OURS_RAY), ours, strict=False)}
    console = Console(width=120)
    console.print(table_of(found))
    for name, values in from_start.items():
        console.print(
            f"{name}: record's start to durable: median {statistics.median(values):.4f} s, "
            f"p95 {percentile(values, 0.95):.4f} s, n {len(values)}",
            highlight=False,
        )
    console.print(f"parent CPU of a no-op trial: {parent['cpu_s_of_a_no_op_trial']:.4f} s", highlight=False)
    lines = aims_of(found, parent)
    console.print(*lines, sep="\n", highlight=False)
    if chosen.save:
        rounds = {each.name: {"isolates": each.isolates, "rounds_s": each.rounds} for each in found}
        save("overhead", {"machine": began, "load_average_at_end": os.getloadavg(), "contenders": rounds,
                          "record_start_to_durable_s": from_start, "parent_cpu": parent, "aims": lines})  # fmt: skip


if __name__ == "__main__":
    main()
