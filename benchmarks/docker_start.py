"""What the tool adds to Docker: start to worker-ready, and to the container's removal, beside a bare `docker run`.

    python benchmarks/docker_start.py [--quick] [--save]

Both start the same command in the same image with the same mounts, limits and request, in a fresh attempt folder,
in random order; the worker is the true one with the fake engine. The tool asks the daemon's API as in a run
(`environments.docker.start`, `guest.ContainerGuest`); bare is `docker run --rm -i`, and both answer the worker at once.
Aims are reported, never asserted.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from overhead import aim, machine, options, percentile, save, scratch
from rich.console import Console
from rich.table import Table

from spark_ray import content, image, store, worker
from spark_ray.environment_spec import DockerEnvironment
from spark_ray.environments import Content, Site, Start, docker
from spark_ray.errors import UnavailableError
from spark_ray.guest import ContainerGuest
from spark_ray.worker import protocol

AIM_RATIO = 1.2
TOOL, BARE = "the tool", "docker run --rm -i"
# How the calls of the daemon's API are shown, in the order of a trial; `ready` and `worker` are the worker's own.
CALLS = ("create_container", "attach_socket", "start", "wait", "inspect_container", "remove_container")
STEPS = (*CALLS[:3], "ready", "worker", *CALLS[3:])
READY = f"{protocol.CONTROL} ready".encode()


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds since the call that starts the worker."""

    ready_s: float
    removed_s: float
    steps_s: dict[str, float] = dataclasses.field(default_factory=dict)


class Stage:
    """Makes attempts: a folder with its request, and how its worker is started."""

    def __init__(self, folder: Path, made: Content) -> None:
        self._folder, self._content = folder, made
        self._bundle = folder / "bundle"
        store.copy_bundle(Path(worker.__file__).parent, self._bundle / protocol.PACKAGE)
        self._sha256 = protocol.package_sha256(self._bundle / protocol.PACKAGE)
        self._spec = DockerEnvironment(kind="docker")
        self._count = 0

    def attempt(self) -> Start:
        self._count += 1
        folder = self._folder / f"attempt-{self._count}"
        folder.mkdir()
        request = {
            "protocol_version": protocol.PROTOCOL_VERSION, "trial_id": folder.name, "attempt": 1, "arm": "docker",
            "engine": {"kind": "fake", "behaviour": "ok", "hold": 0.0, "kv_cache": 1 << 30},
            "configuration": {"memory_fraction": 0.5}, "workload": {}, "model_path": None,
            "bundle_sha256": self._sha256, "seed": 0,
        }  # fmt: skip
        protocol.write_json(folder / "request.json", request)
        site = Site(
            attempt=folder, bundle=self._bundle, model=None, content=self._content, label=folder.name,
            run_label=str(self._folder), uid=os.getuid(), gid=os.getgid(),
        )  # fmt: skip
        return docker.start(self._spec, site)

    def check(self) -> None:
        """The last attempt came to its end: what was timed was a whole trial."""
        folder = self._folder / f"attempt-{self._count}"
        if not (folder / "result.json").is_file():
            raise RuntimeError(f"no result: {(folder / 'worker.log').read_text()}")


def command_line(start: Start) -> list[str]:
    """The flags of `docker run` that ask for what the tool asks the API for."""
    made = start.container
    assert made is not None
    config = made["host_config"]
    flags = [
        f"--user={made['user']}",
        f"--workdir={made['working_dir']}",
        f"--network={config['network_mode']}",
    ]
    flags += [f"--volume={bind}" for bind in config["binds"]]
    flags += [f"--tmpfs={target}:{how}" for target, how in config["tmpfs"].items()]
    flags += [f"--env={name}={value}" for name, value in made["environment"].items()]
    flags += [f"--label={name}={value}" for name, value in made["labels"].items()]
    flags += [f"--cap-drop={name}" for name in config.get("cap_drop", ())]
    flags += [f"--security-opt={each}" for each in config.get("security_opt", ())]
    flags += ["--read-only"] if config["read_only"] else []
    return ["docker", "run", "--rm", "-i", *flags, made["image"], *made["command"]]


def bare(stage: Stage) -> Times:
    argv, ready_s = command_line(stage.attempt()), 0.0
    began = time.monotonic()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in iter(process.stdout.readline, b""):
            if line.startswith(READY):
                ready_s = time.monotonic() - began
            process.stdin.write(b"go\n")
        process.wait()
    return Times(ready_s, time.monotonic() - began)


def tool(stage: Stage, client: Any, log: Path) -> Times:
    start, calls, ready_s, ended_s = stage.attempt(), Calls(client.api), 0.0, 0.0
    began = time.monotonic()
    with calls:
        guest = ContainerGuest(start, log, client)
        started_s = time.monotonic() - began
        while piece := guest.read():
            ready_s = ready_s or (time.monotonic() - began if READY in piece else 0.0)
            if protocol.CONTROL.encode() in piece:
                guest.answer()
        ended_s = time.monotonic() - began
        guest.end()
    steps = {**calls.seconds, "ready": ready_s - started_s, "worker": ended_s - ready_s}
    return Times(ready_s, time.monotonic() - began, steps)


class Calls:
    """Times the calls of the daemon's API while it is entered."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.seconds: dict[str, float] = dict.fromkeys(CALLS, 0.0)

    def __enter__(self) -> None:
        for name in CALLS:
            setattr(self._api, name, self._timed(name, getattr(self._api, name)))

    def __exit__(self, *_: object) -> None:
        for name in CALLS:
            delattr(self._api, name)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.monotonic() - began

        return timed


def race(stage: Stage, client: Any, log: Path, rounds: int, seed: int) -> dict[str, list[Times]]:
    """Pairs in random order; the first of each is a warm-up."""
    generator, found = random.Random(seed), {TOOL: list[Times](), BARE: list[Times]()}
    acts: dict[str, Callable[[], Times]] = {TOOL: lambda: tool(stage, client, log), BARE: lambda: bare(stage)}
    for number in range(rounds + 1):
        for name in generator.sample(list(acts), k=2):
            times = acts[name]()
            stage.check()
            if number:
                found[name].append(times)
    return found


def table_of(found: dict[str, list[Times]]) -> Table:
    table = Table(
        title="seconds, the same worker in the same container", title_justify="left", box=None, pad_edge=False
    )
    for heading in ("how", "n", "ready median", "ready p95", "removed median", "removed p95"):
        table.add_column(heading, justify="left" if heading == "how" else "right")
    for name, times in found.items():
        cells = []
        for values in ([each.ready_s for each in times], [each.removed_s for each in times]):
            cells += [f"{statistics.median(values):.4f}", f"{percentile(values, 0.95):.4f}"]
        table.add_row(name, str(len(times)), *cells)
    return table


def ratios(found: dict[str, list[Times]], what: str) -> list[float]:
    """Tool over bare, pair by pair."""
    return [getattr(a, what) / getattr(b, what) for a, b in zip(found[TOOL], found[BARE], strict=True)]


def main() -> None:
    chosen = options(__doc__, rounds=30, trials=1).parse_args()
    rounds = 2 if chosen.quick else chosen.rounds
    try:
        client = image.connect()
    except UnavailableError as error:
        sys.exit(f"left out: {error}")
    if shutil.which("docker") is None:
        sys.exit("left out: there is no docker command to race against")
    began = machine()
    with ExitStack() as stack:
        stack.callback(client.close)
        folder = stack.enter_context(scratch(chosen.folder))
        stage = Stage(folder, content.prepare(DockerEnvironment(kind="docker"), client))
        found = race(stage, client, folder / "worker.log", rounds, chosen.seed)
    steps = {step: statistics.median(each.steps_s[step] for each in found[TOOL]) for step in STEPS}
    ready, removed = ratios(found, "ready_s"), ratios(found, "removed_s")
    lines = [
        aim("start to ready, tool over bare, median of pairs", statistics.median(ready), AIM_RATIO, at_most=True, unit="x"),
        f"the same up to removal: {statistics.median(removed):.3g}x",
    ]  # fmt: skip
    console = Console(width=120)
    console.print(table_of(found))
    console.print(
        "the tool's steps, ms:",
        ", ".join(f"{name} {1000 * s:.1f}" for name, s in steps.items()),
        highlight=False,
    )
    console.print(*lines, sep="\n", highlight=False)
    if chosen.save:
        raw = {name: [dataclasses.asdict(each) for each in times] for name, times in found.items()}
        save("docker_start", {"machine": began, "engine": docker_version(), "times": raw, "steps_median_s": steps,
                              "aims": lines})  # fmt: skip


def docker_version() -> str:
    client = image.connect()
    try:
        return str(client.version()["Version"])
    finally:
        client.close()


if __name__ == "__main__":
    main()
