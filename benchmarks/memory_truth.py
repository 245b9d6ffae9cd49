"""What meters of memory say about a program whose memory is known: ours part by part, and four others beside it.

    python benchmarks/memory_truth.py [--quick] [--save] [--rivals VENV/bin/python]

`truth_child.py` holds parts of random sizes in a child and a grandchild, on an idle machine and beside a neighbour that
takes, frees, writes and reads all the time. Every source of our instrument is asked for every part it claims to know:
the process tree (PSS), a cgroup of its own, residency of files, and the whole system's balance with its error bar.
A part is told when a source is within 2 % or 8 MiB of the truth; the system's balance, which knows no owner, must
cover the truth by its bar. Aims are reported, never asserted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from overhead import machine, options, save, scratch
from rich.console import Console
from rich.table import Table
from truth_child import MIB, PAGE, PARTS

from spark_ray import ledger
from spark_ray.worker import observe

SHARE, LEAST_BYTES = 0.02, 8 * MIB
MOST_BYTES = 8 << 30
READING_EVERY_S = 0.15  # so that a few of them see more than one turn of the neighbour
HERE = Path(__file__).parent
CHILD, RIVALS = HERE / "truth_child.py", HERE / "memory_rivals.py"
Sizes = dict[str, int]
Readings = dict[tuple[str, str], int]  # (component, source): bytes

COMPONENTS: dict[str, tuple[str, ...]] = {
    "anonymous": ("anonymous", "grandchild", "inherited", "copied"),
    "grandchild's own": ("grandchild", "copied"),
    "shared": ("shared",),
    "mapped file": ("mapped",),
    "page cache": ("page_cache",),
    "file pages": ("mapped", "page_cache"),
    "everything": tuple(PARTS),
}
TREE, GROUP, FILES, SYSTEM = "process tree", "own cgroup", "residency", "system balance"


def truth_of(sizes: Mapping[str, int]) -> dict[str, int]:
    return {name: sum(sizes[part] for part in parts) for name, parts in COMPONENTS.items()}


def draw(generator: random.Random, low_mib: int, high_mib: int) -> Sizes:
    """Random sizes of whole pages, together at most MOST_BYTES; the copied part is a part of the inherited."""
    while True:
        sizes = {name: generator.randint(low_mib * MIB, high_mib * MIB) // PAGE * PAGE for name in PARTS}
        sizes["copied"] = generator.randint(sizes["inherited"] // 10, sizes["inherited"]) // PAGE * PAGE
        if sum(sizes.values()) <= MOST_BYTES:
            return sizes


# ---- one execution ----------------------------------------------------------------------------------------


@contextmanager
def own_group(pid: int) -> Iterator[str | None]:
    """Put a process into a memory cgroup of its own; yields why that cannot be, or None."""
    version, path = observe.cgroup_path("self")
    top = observe.CGROUP / "memory" if version == 1 else observe.CGROUP / path.lstrip("/")
    folder = top / f"spark_ray-truth-{pid}"
    try:
        folder.mkdir()
    except OSError as error:
        yield f"no group of its own: {error.strerror}"
        return
    try:
        if not (folder / ("memory.usage_in_bytes" if version == 1 else "memory.current")).exists():
            yield "no group of its own: memory is not accounted there"
            return
        (folder / "cgroup.procs").write_text(str(pid))
        yield None
    finally:
        for _ in range(100):  # until its last process is gone
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)


class Held:
    """The truth child from its start to its end, and our instrument's readings before and after it took its parts."""

    def __init__(self, folder: Path, sizes: Sizes, readings: int) -> None:
        self._sizes, self._readings = sizes, readings
        self.child = subprocess.Popen(
            [sys.executable, str(CHILD), "hold", str(folder), json.dumps(sizes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._hear("ready")
        self.absent: str | None = None
        self.bar_bytes: dict[str, int] = {}

    def _hear(self, what: str) -> str:
        assert self.child.stdout
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit(f"the truth child died before it said {what!r}: see its message above")
        return line

    def measure(self) -> Readings:
        assert self.child.stdin
        before, systems_before = self._own(), self._systems()
        self.child.stdin.write("hold\n")
        self.child.stdin.flush()
        said = json.loads(self._hear("held"))
        after, systems_after = self._own(), self._systems()
        found = {key: after[key] - before[key] for key in after}
        found["grandchild's own", TREE] = observe.smaps(said["grandchild"])["Private_Dirty"]
        files = {name: observe.resident_bytes(Path(path)) for name, path in said["files"].items()}
        found["mapped file", FILES], found["page cache", FILES] = files["mapped"], files["page_cache"]
        found["file pages", FILES] = sum(files.values())
        for component in systems_after[0][0]:
            found[component, SYSTEM] = self._system(component, systems_before, systems_after)
        return found

    def _own(self) -> Readings:
        """What belongs to the child and its children."""
        tree = observe.tree(self.child.pid)
        found = {
            ("anonymous", TREE): tree["pss_anon_bytes"],
            ("shared", TREE): tree["pss_shmem_bytes"],
            ("mapped file", TREE): tree["pss_file_bytes"],
        }
        if self.absent is None:
            group = observe.cgroup(self.child.pid)
            total = "total_" if group["version"] == 1 else ""
            shared = group["stat"][f"{total}shmem"]
            mapped = group["stat"]["total_mapped_file" if total else "file_mapped"]
            found |= {
                ("anonymous", GROUP): group["anon_bytes"],
                ("shared", GROUP): shared,
                ("mapped file", GROUP): mapped - shared,  # both versions count mapped shared memory as mapped
                ("page cache", GROUP): group["file_bytes"] - mapped,
                ("file pages", GROUP): group["file_bytes"] - shared,
                ("everything", GROUP): group["usage_bytes"],
            }
        return found

    def _systems(self) -> list[tuple[dict[str, int], int]]:
        """Several readings of the whole system: (bytes by component, error bar of the reading)."""
        found = []
        for number in range(self._readings):
            if number:
                time.sleep(READING_EVERY_S)
            found.append(system_now())
        return found

    def _system(
        self,
        component: str,
        before: Sequence[tuple[dict[str, int], int]],
        after: Sequence[tuple[dict[str, int], int]],
    ) -> int:
        """The system's difference. Its bar: both readings' own, and what others moved while nothing of ours did."""
        bar = max(each[1] for each in before) + max(each[1] for each in after)
        for readings in (before, after):
            values = [each[0][component] for each in readings]
            bar += max(values) - min(values)
        self.bar_bytes[component] = bar
        return after[0][0][component] - before[-1][0][component]

    def end(self) -> int:
        """ru_maxrss of the child and what it reaped, in bytes: what getrusage(RUSAGE_CHILDREN) adds for it."""
        assert self.child.stdin
        assert self.child.stdout
        self.child.stdin.close()
        self.child.stdout.close()
        _, status, usage = os.wait4(self.child.pid, 0)
        self.child.returncode = os.waitstatus_to_exitcode(status)
        if self.child.returncode:
            raise SystemExit(f"the truth child ended with status {self.child.returncode}")
        return usage.ru_maxrss * 1024

    def kill(self) -> None:
        if self.child.returncode is None:
            self.child.kill()
            self.child.communicate()


def system_now() -> tuple[dict[str, int], int]:
    found = ledger.balance(observe.observe("truth", with_tree=False))
    parts = found["parts"]
    taken = found["total_bytes"] - parts["free"] - parts["per_cpu_free"]
    return {
        "anonymous": parts["anonymous"],
        "shared": parts["shared_memory"],
        "file pages": parts["page_cache"],
        "everything": taken,
    }, found["error_bytes"]


def rival(python: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([python, str(RIVALS), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def execute(folder: Path, sizes: Sizes, readings: int, rivals: str | None) -> dict[str, Any]:
    """One draw, by every meter."""
    with ExitStack() as stack:
        held = Held(folder, sizes, readings)
        stack.callback(held.kill)
        held.absent = stack.enter_context(own_group(held.child.pid))
        stack.callback(held.kill)  # a group goes after its last process, whatever went wrong
        found = held.measure()
        others = {}
        if rivals:
            others["psutil"] = rival(rivals, "psutil", str(held.child.pid))
        others["getrusage"] = {"ru_maxrss": held.end()}
    if rivals:
        for name in ("tracker", "runexec"):
            others[name] = rival(rivals, name, str(folder), json.dumps(sizes), "1.0")
    return {
        "sizes": sizes,
        "truth": truth_of(sizes),
        "readings": [[*key, value] for key, value in found.items()],
        "bar_bytes": held.bar_bytes,
        "absent": held.absent,
        "rivals": others,
    }


@contextmanager
def neighbour(folder: Path) -> Iterator[None]:
    other = subprocess.Popen([sys.executable, str(CHILD), "neighbour", str(folder)])
    try:
        time.sleep(0.5)
        yield
    finally:
        other.terminate()
        other.wait()
        (folder / f"noise-{other.pid}").unlink(missing_ok=True)


# ---- what it says -----------------------------------------------------------------------------------------


def judged(draws: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each component, source and condition: how often it told the part or its bar covered it."""
    groups: dict[tuple[str, str, str], list[tuple[int, int, int]]] = defaultdict(list)
    for each in draws:
        for component, source, value in each["readings"]:
            truth = each["truth"][component]
            allowed = max(SHARE * truth, LEAST_BYTES)
            bar = each["bar_bytes"].get(component, 0) if source == SYSTEM else 0
            groups[component, source, each["beside"]].append((value - truth, allowed, bar))
    return [
        {
            "component": component, "source": source, "beside": beside, "n": len(values),
            "largest_error_bytes": max(abs(error) for error, _, _ in values),
            "told": sum(abs(error) <= allowed for error, allowed, _ in values),
            "covered": sum(abs(error) <= max(allowed, bar) for error, allowed, bar in values),
            "median_bar_bytes": sorted(bar for _, _, bar in values)[len(values) // 2],
        }
        for (component, source, beside), values in groups.items()
    ]  # fmt: skip


def rivals_judged(draws: Sequence[Mapping[str, Any]], empty: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each meter's reading less its reading of the same program holding nothing, beside the truth."""
    nothing = {name: value for answer in empty["rivals"].values() for name, value in answer.items()}
    groups: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    failed = {}
    for each in draws:
        everything = each["truth"]["everything"]
        of_processes = everything - each["truth"]["page cache"]
        ours = {(component, source): value for component, source, value in each["readings"]}
        tree = sum(ours[name, TREE] for name in ("anonymous", "shared", "mapped file"))
        groups["ours, process tree (PSS)"].append((tree, of_processes, everything))
        groups["ours, tree and residency of its files"].append(
            (tree + ours["page cache", FILES], of_processes, everything)
        )
        if ("everything", GROUP) in ours:
            groups["ours, own cgroup"].append((ours["everything", GROUP], of_processes, everything))
        for meter, answer in each["rivals"].items():
            if "failed" in answer:
                failed[meter] = answer["failed"]
                continue
            for name, value in answer.items():
                groups[name].append((value - nothing.get(name, 0), of_processes, everything))
    rows = [
        {
            "meter": name, "n": len(values), "readings_bytes": values,
            "mean_error_of_processes": sum(v / p - 1 for v, p, _ in values) / len(values),
            "mean_error_of_everything": sum(v / e - 1 for v, _, e in values) / len(values),
            "largest_error_of_processes": max((v / p - 1 for v, p, _ in values), key=abs),
            "largest_error_of_everything": max((v / e - 1 for v, _, e in values), key=abs),
        }
        for name, values in groups.items()
    ]  # fmt: skip
    return rows + [{"meter": name, "n": 0, "failed": message} for name, message in failed.items()]


def mib(value: float) -> str:
    return f"{value / MIB:,.1f}"


def table_of(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number > 1 else "left")
    for row in rows:
        table.add_row(*row)
    return table


def show(console: Console, rows: Sequence[Mapping[str, Any]], meters: Sequence[Mapping[str, Any]]) -> None:
    console.print(table_of(
        "ours, part by part: within 2 % or 8 MiB (told); the system's balance: covered by its bar",
        ("component", "source", "beside", "n", "told", "covered", "largest error MiB", "median bar MiB"),
        [(row["component"], row["source"], row["beside"], str(row["n"]), str(row["told"]), str(row["covered"]),
          mib(row["largest_error_bytes"]), mib(row["median_bar_bytes"]) if row["source"] == SYSTEM else "-") for row in rows],
    ))  # fmt: skip
    console.print(table_of(
        "memory used, as one number: mean (largest) error against the truth",
        ("meter", "n", "held by processes", "with page cache"),
        [(row["meter"], str(row["n"]), row["failed"], "") if "failed" in row else
         (row["meter"], str(row["n"]),
          f"{row['mean_error_of_processes']:+.1%} ({row['largest_error_of_processes']:+.1%})",
          f"{row['mean_error_of_everything']:+.1%} ({row['largest_error_of_everything']:+.1%})") for row in meters],
    ))  # fmt: skip


def aims_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for component in COMPONENTS:
        mine = [row for row in rows if row["component"] == component]
        telling = [row["source"] for row in mine if row["source"] != SYSTEM]
        told = [
            source for source in dict.fromkeys(telling)
            if all(row["told"] == row["n"] for row in mine if row["source"] == source)
        ]  # fmt: skip
        lines.append(f"{component}: told in every draw by {', '.join(told) or 'no source: NOT met'}")
    system = [row for row in rows if row["source"] == SYSTEM]
    covered, asked = sum(row["covered"] for row in system), sum(row["n"] for row in system)
    met = "met" if covered == asked else "NOT met"
    return [*lines, f"system balance: the bar covers the truth in {covered} of {asked} readings: {met}"]


def main() -> None:
    parser = options(__doc__, rounds=10, trials=1)
    parser.add_argument("--rivals", help="an interpreter that has psutil, optimum-benchmark and BenchExec")
    chosen = parser.parse_args()
    low_mib, high_mib, readings = (20, 60, 6) if chosen.quick else (100, 2000, 10)
    rounds = 2 if chosen.quick else chosen.rounds
    generator, began, draws = random.Random(chosen.seed), machine(), []
    with scratch(chosen.folder) as folder:
        empty = execute(folder, dict.fromkeys(PARTS, PAGE), 1, chosen.rivals)
        for number in range(rounds):
            sizes = draw(generator, low_mib, high_mib)
            conditions = ["idle", "neighbour"]
            generator.shuffle(conditions)
            for beside in conditions:
                with neighbour(folder) if beside == "neighbour" else contextlib.nullcontext():
                    draws.append(execute(folder, sizes, readings, chosen.rivals) | {"beside": beside})
            print(f"draw {number + 1} of {rounds}", file=sys.stderr)
    console = Console(width=140)
    rows, meters = judged(draws), rivals_judged(draws, empty)
    show(console, rows, meters)
    for reason in {each["absent"] for each in draws if each["absent"]}:
        console.print(f"own cgroup: {reason}", highlight=False)
    lines = aims_of(rows)
    console.print(*lines, sep="\n", highlight=False)
    if chosen.save:
        save("memory_truth", {"machine": began, "load_average_at_end": os.getloadavg(), "tolerance": {"share": SHARE, "bytes": LEAST_BYTES},
                              "components": rows, "meters": meters, "draws": draws, "holding_nothing": empty, "aims": lines})  # fmt: skip


if __name__ == "__main__":
    main()
