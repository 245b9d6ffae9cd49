"""`spark-ray selftest`: what this host says to what the tool takes for granted, as a block to paste into an issue.

Minutes, on a Spark and elsewhere. Three parts: the findings of `doctor --spark`; whether page cache takes away what CUDA
calls free (1 GiB of it is filled and given back); the probe engine twice natively, in a chroot and in Docker, over main
memory and, where there is a GPU, over cudaMemGetInfo. A fourth on request: TensorRT-LLM once in each.
What cannot be done here is said. No path of the user's and no name of the machine is in the block. The runs and what they
filled are gone afterwards; the tree made from this interpreter and its image stay, as after any run.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cuda_view, digest, image, page_cache, reap, redact, spark_check
from .doctor import environment_summary
from .errors import SparkRayError, UnavailableError
from .store import Store
from .units import GIB, MIB, format_bytes, format_duration
from .worker import observe

FILL_BYTES = 1 * GIB
MOVED_SHARE = 0.9  # of the fill: what counts as "fell by it"
STILL_BYTES = 128 * MIB  # what a quiet machine's MemFree moves by itself
RUN_LIMIT_S, ENGINE_LIMIT_S = 540, 1200
STOP_S = 60  # a run that is asked to end writes its records and removes what it started

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    blocks: int = 4
    model: str | None = None
    double: str | None = None
    fill_bytes: int = FILL_BYTES


# ---- page cache -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Free:
    """What is called free at one moment, and by whom."""

    mem_free_bytes: int
    mem_available_bytes: int
    cache_bytes: int
    cuda_bytes: int | None


def page_cache_part(
    folder: Path, size_bytes: int, cuda_command: Sequence[str] = cuda_view.READER
) -> Iterator[str]:
    """Fill the page cache, and see whose free memory falls."""
    info, disk = observe.meminfo(), shutil.disk_usage(folder).free
    if disk < 2 * size_bytes or info["MemFree"] < 2 * size_bytes:
        yield f"not done: it takes {format_bytes(2 * size_bytes)} of free memory and of free disk"
        return
    with cuda_view.CudaView(cuda_command) as view:
        try:
            view.read()
            cuda, why = view, ""
        except cuda_view.Unavailable as error:
            cuda, why = None, str(error)
        before = _free(cuda)
        file = page_cache.fill(folder, size_bytes)
        held = observe.resident_bytes(file)
        filled = _free(cuda)
        page_cache.advise_away([file])
        file.unlink()
        after = _free(cuda)
    if why:
        yield f"CUDA: {why}"
    for name, moment in (("before", before), ("filled", filled), ("given back", after)):
        yield f"{name:11}{_words(moment)}"
    yield from verdict(before, filled, held)


def _free(cuda: cuda_view.CudaView | None) -> Free:
    if cuda is None:
        info, called_free = observe.meminfo(), None
        mem_free = info["MemFree"]
    else:
        reading, info = cuda.read(), observe.meminfo()
        mem_free, called_free = reading.mem_free_bytes, reading.free_bytes
    return Free(mem_free, info["MemAvailable"], page_cache.of_files_bytes(info), called_free)


def _words(moment: Free) -> str:
    said = {
        "MemFree": moment.mem_free_bytes,
        "MemAvailable": moment.mem_available_bytes,
        "page cache": moment.cache_bytes,
    }
    if moment.cuda_bytes is not None:
        said["CUDA free"] = moment.cuda_bytes
    return "  ".join(f"{name} {format_bytes(value)}" for name, value in said.items())


def verdict(before: Free, filled: Free, held_bytes: int) -> Iterator[str]:
    """What the readings say, in a sentence for the kernel and one for CUDA."""
    fell = before.mem_free_bytes - filled.mem_free_bytes
    if held_bytes < STILL_BYTES or fell < MOVED_SHARE * held_bytes:
        yield f"undecided: {format_bytes(held_bytes)} of file pages, and MemFree fell by {_signed(fell)}: the host was not quiet"
        return
    yield f"page cache counts as used by MemFree: {format_bytes(held_bytes)} of it, MemFree fell by {_signed(fell)}"
    if before.cuda_bytes is None or filled.cuda_bytes is None:
        yield "cudaMemGetInfo's free: not tested, CUDA does not answer here"
        return
    cuda = before.cuda_bytes - filled.cuda_bytes
    apart = abs(filled.cuda_bytes - filled.mem_free_bytes)
    if abs(cuda - fell) <= STILL_BYTES and apart <= STILL_BYTES:
        yield f"cudaMemGetInfo's free is MemFree, and fell by {_signed(cuda)}: as reported of GB10"
    elif abs(cuda) <= STILL_BYTES:
        yield f"cudaMemGetInfo's free moved by {_signed(cuda)}: page cache is not in this GPU's memory"
    else:
        yield f"cudaMemGetInfo's free fell by {_signed(cuda)}, and is {format_bytes(apart)} from MemFree: neither; please report it"


def _signed(value: float) -> str:
    return ("-" if value < 0 else "") + format_bytes(abs(value))


# ---- runs -------------------------------------------------------------------------------------------------


def probe_experiment(blocks: int, view: str) -> dict[str, Any]:
    """The probe engine at TensorRT-LLM's own fraction: it takes no pool, so this costs no memory."""
    gpus = {"gpus": "all"} if view == "cuda" else {}
    pool = {} if view == "cuda" else {"pool": "mapped"}
    return {
        "name": f"selftest-{view}",
        "engine": {"kind": "probe", "memory_view": view, **pool},
        "workload": {"requests": 0},
        "search": _search(blocks, 16, 1024, 0.9),
        "arms": {
            "native": {"environment": "native"},
            "again": {"environment": "native"},
            "chroot": {"environment": {"kind": "chroot", **gpus}, "required": False},
            "docker": {"environment": {"kind": "docker", **gpus}, "required": False},
        },
        "contrast": {"baseline": "native", "against": "again"},
        "limits": _limits("2min", "30s"),
    }


def engine_experiment(options: Options) -> dict[str, Any]:
    """TensorRT-LLM once in a chroot and once in Docker; of a double, twice in this interpreter."""
    engine = {"kind": "tensorrt_llm", "max_seq_len": 1024}
    docker = {
        "kind": "docker", "image": spark_check.IMAGE, "gpus": "all", "ipc": "host", "network": "host",
        "cap_drop": [], "no_new_privileges": False, "read_only": False,
    }  # fmt: skip
    arms: dict[str, Any] = {
        "chroot": {"environment": {"kind": "chroot", "rootfs": spark_check.ROOTFS, "gpus": "all"}},
        "docker": {"environment": docker},
    }
    if options.double is not None:
        engine["double"] = options.double
        arms = {name: {"environment": "native"} for name in ("native", "again")}
    return {
        "name": "selftest-tensorrt_llm",
        "engine": engine,
        "model": {"path": options.model},
        "workload": {"requests": 8, "input_tokens": 64, "output_tokens": 32},
        "search": _search(1, 8, 2048, 0.5),
        "arms": arms,
        "limits": _limits("4min", "3min"),
    }


def _search(blocks: int, batch: int, tokens: int, fraction: float) -> dict[str, Any]:
    space = {"max_batch_size": batch, "max_num_tokens": tokens, "memory_fraction": fraction}
    return {"sampler": "grid", "blocks": blocks, "repetitions": blocks, "space": space}


def _limits(timeout: str, memory_wait: str) -> dict[str, Any]:
    """`memory_wait`: an engine's memory was seen to take a minute and more to come back, a probe takes none."""
    return {
        "trial_timeout": timeout, "memory_wait": memory_wait, "memory_tolerance": "2GiB", "cache_tolerance": "8GiB",
        "gate": {"longest": "30s", "temperature_celsius": None}, "watchdog": "2GiB",
    }  # fmt: skip


def run_part(experiment: Mapping[str, Any], folder: Path, limit_s: float = RUN_LIMIT_S) -> Iterator[str]:
    """Execute an experiment by a process of its own, and say what its records say, also of one that had to be ended."""
    file, run = folder / f"{experiment['name']}.yaml", folder / str(experiment["name"])
    file.write_text(json.dumps(experiment))  # JSON is YAML
    roots = [word for path in _named(experiment) for word in ("--allow-root", path)]
    command = [
        sys.executable,
        "-m",
        "spark_ray.sweep",
        str(file),
        "--local",
        "--no-report",
        "--out",
        str(run),
        *roots,
    ]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        said, in_time = _ended(process, limit_s)
    if not in_time:
        yield f"not done within {format_duration(limit_s)}; until then:"
        _remove_leftovers(run)
    if not (run / "plan.json").is_file():
        yield from (f"not done, exit {process.returncode}:", *said.strip().splitlines()[-12:])
        return
    store = Store.read(run)
    records = [record for record in store.records() if record["standing"] != "superseded"]
    yield from describe(records)
    for record in records:
        yield from _log_of(record, store)
    for arm, problems in store.plan.get("left_out", {}).items():
        yield f"{arm:8}not done: {'; '.join(problems)}"
    if process.returncode:
        yield from (f"exit {process.returncode}:", *said.strip().splitlines()[-6:])


def _ended(process: subprocess.Popen[str], limit_s: float) -> tuple[str, bool]:
    """(what it said on standard error, whether it ended by itself). One that did not is asked to, then killed."""
    try:
        return process.communicate(timeout=limit_s)[1], True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    except KeyboardInterrupt:  # the terminal has told it as well
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        raise
    try:
        return process.communicate(timeout=STOP_S)[1], False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[1], False


def _remove_leftovers(run: Path) -> None:
    """What a run that was killed leaves: a container, a fill."""
    try:
        client = image.connect(timeout_s=10)
    except UnavailableError:
        client = None
    try:
        for one in reap.leftovers(run, client):
            reap.remove(one, client)
    finally:
        if client is not None:
            client.close()


def _log_of(record: Mapping[str, Any], store: Store) -> Iterator[str]:
    """How the log of a trial without an answer ends: the folder that holds it is about to go."""
    folder = store.attempt_folder(record["trial_id"], record["attempt"])
    for line in digest.lines(record, folder):
        if line.startswith("worker.log "):
            yield f"  {record['block_id']} {record['arm']} {line}"


def _named(experiment: Mapping[str, Any]) -> list[str]:
    """Folders that our own experiment names: they are the user's word."""
    arms = experiment["arms"].values()
    named = [experiment.get("model", {}).get("path"), experiment["engine"].get("double")]
    named += [arm["environment"].get("rootfs") for arm in arms if isinstance(arm["environment"], dict)]
    return [str(Path(name).absolute()) for name in dict.fromkeys(filter(None, named))]


def describe(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line an arm: capacity, its spread, and the contrast with the first arm, block by block; what was not ok."""
    by_arm: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], {})[record["block_id"]] = record
    sizes = {arm: _capacities(blocks) for arm, blocks in by_arm.items()}
    baseline = next((arm for arm in ("native", "chroot") if arm in sizes), None)
    order = sorted(by_arm, key=lambda name: (name != baseline, name))
    for arm in order:
        found = sizes[arm]
        line = f"{arm:8}{len(found)} of {len(by_arm[arm])} ok"
        if found:
            line += f"  KV median {format_bytes(statistics.median(found.values()))}"
        if arm != baseline and baseline is not None:
            line += _contrast(sizes[baseline], found)
        yield line
        for block, record in by_arm[arm].items():
            if record["outcome"]["kind"] != "ok":
                outcome = record["outcome"]
                yield f"  {block} {outcome['kind']} {outcome['reason']}: {outcome['message'][:300]}"
    yield from _terms(sorted(records, key=lambda record: order.index(record["arm"])))


def _capacities(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {
        block: record["result"]["measurements"]["kv_cache"]["bytes"]
        for block, record in blocks.items()
        if record["outcome"]["kind"] == "ok"
    }


def _contrast(baseline: Mapping[str, int], against: Mapping[str, int]) -> str:
    """1 - KV(arm) / KV(baseline), in the blocks that have both."""
    both = [1 - against[block] / baseline[block] for block in baseline if block in against]
    if not both:
        return ""
    return f"  contrast {statistics.median(both):+.3%} [{min(both):+.3%} .. {max(both):+.3%}]"


def _terms(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The sizing terms of each arm's first trial, and which engine it was."""
    seen = set()
    for record in records:
        measured = (record["result"] or {}).get("measurements", {})
        if record["arm"] in seen or not measured.get("sizing"):
            continue
        seen.add(record["arm"])
        engine, sizing = measured.get("engine") or {}, measured["sizing"]
        mark = "DOUBLE, no engine: " if engine.get("engine_is_double") else ""
        named = f"{mark}{engine.get('name', '?')} {engine.get('version', '?')}"
        sizes = {
            key.removesuffix("_bytes"): value
            for key, value in sizing.items()
            if key.endswith("_bytes") and value
        }
        gpu = (record.get("content") or {}).get("gpu") or {}
        given = f"GPU by {gpu['exposure']}; " if gpu else ""
        yield f"{record['arm']:8}{named}; {given}" + ", ".join(
            f"{key} {format_bytes(value)}" for key, value in sizes.items()
        )


# ---- the block --------------------------------------------------------------------------------------------


def checks_part(seen: spark_check.Readings) -> Iterator[str]:
    for check in spark_check.checks(seen):
        yield f"{check.status:8}{check.name}: {check.found}"


def parts(options: Options, folder: Path, seen: spark_check.Readings) -> Iterator[tuple[str, Iterator[str]]]:
    """(heading, lines) of each part; the lines are made when they are asked for."""
    versions = (f"{name} {version}" for name, version in environment_summary().items())
    yield "versions", iter([", ".join(versions)])
    yield "doctor --spark", checks_part(seen)
    yield f"page cache of {format_bytes(options.fill_bytes)}", page_cache_part(folder, options.fill_bytes)
    yield "probe, MemFree", run_part(probe_experiment(options.blocks, "memfree"), folder)
    if isinstance(seen.cuda, str):
        yield "probe, cudaMemGetInfo", iter([f"not done: {seen.cuda}"])
    else:
        yield "probe, cudaMemGetInfo", run_part(probe_experiment(options.blocks, "cuda"), folder)
    if options.model is not None:
        yield "TensorRT-LLM", run_part(engine_experiment(options), folder, ENGINE_LIMIT_S)


def run(options: Options, base: Path, say: Say = lambda text: None) -> str:  # noqa: ARG005
    """All parts, as one text. `base`: where a working folder is made, and removed; on a disk, not in memory."""
    started = time.monotonic()
    lines = ["```text", "spark_ray selftest"]
    with tempfile.TemporaryDirectory(
        prefix="spark_ray-selftest-", dir=base, ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        say("looking at this host ...")
        seen = spark_check.look(base)
        for heading, found in parts(options, folder, seen):
            say(f"{heading} ...")
            lines += ["", heading, *(f"  {line}" for line in _all(found))]
        lines += ["", f"took {format_duration(time.monotonic() - started)}", "```"]
        return redact.clean("\n".join(lines), redact.private(folder, base, options.model))


def _all(found: Iterator[str]) -> Iterator[str]:
    """What a part says; what keeps it from going on is a line of it."""
    try:
        yield from found
    except SparkRayError as error:
        yield f"not done: {error.message}"
