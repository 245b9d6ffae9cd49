"""The kinds of fault, each striking a live sweep once at an instant drawn from the seed.

A strike returns what it did and what outlived its bound, or None when the sweep ended before it could strike.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from chaos_places import fill, wait_until
from chaos_sweep import SETTLE_BOUND_S, Driver, GuestProcess, Run, command_of, guests

START_S = 2.5  # about what a driver takes to its first trial
TRIAL_S = 1.5  # about what a few trials of the fake engine take
ISOLATED = ("native", "chroot")


@dataclass
class Struck:
    kind: str
    after_s: float  # since that driver began
    detail: str
    gone_s: float  # until nothing of it was left
    left: list[str]  # what the bound found


@dataclass(frozen=True)
class Kind:
    name: str
    setting: str  # the kind of run it strikes: fake, disk, ray, embedded
    share: int  # in the full form
    strike: Callable[[Run, random.Random], tuple[str, float, list[str]] | None]
    kills: bool = True
    needs: str | None = None  # root, docker, or nothing


def driver_of(run: Run) -> Driver:
    return run.driver or run.start()


def end_driver(run: Run, number: int) -> tuple[float, list[str]]:
    """End the driver by a signal; seconds until nothing of it was left, and what was left at the bound."""
    driver = driver_of(run)
    driver.look()
    with contextlib.suppress(ProcessLookupError):
        os.kill(driver.process.pid, number)
    began = time.monotonic()
    driver.process.wait(timeout=60)
    _, left = run.settle(lambda: run.left(driver))
    run.ended(driver)
    return time.monotonic() - began, left


def at_work(run: Run, rng: random.Random, spread_s: float = TRIAL_S) -> bool:
    """Wait until this driver has begun an attempt of its own, and a random time more. False: it ended before."""
    driver = driver_of(run)
    if not run.wait_for_attempt(driver, driver.known):
        return False
    time.sleep(rng.uniform(0, spread_s))
    return driver.process.poll() is None


# ---- the driver, and what it had written last -------------------------------------------------------------


def driver_killed(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    """Mostly while trials are executed; one time in four at any instant from its first one on."""
    driver = driver_of(run)
    if rng.random() < 0.25:
        with contextlib.suppress(Exception):
            driver.process.wait(rng.uniform(0, START_S))
    elif not at_work(run, rng):
        return None
    if driver.process.poll() is not None:
        return None
    return "SIGKILL", *end_driver(run, signal.SIGKILL)


def torn_record(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    if not _first_record(run) or not at_work(run, rng):
        return None
    gone_s, left = end_driver(run, signal.SIGKILL)
    last = max(run.folder.glob("trials/*/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
    size = last.stat().st_size
    kept = rng.randrange(size)
    os.truncate(last, kept)
    return f"{last.parent.parent.name} cut to {kept} of {size} bytes", gone_s, left


def torn_journal(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    """Inside its last line: each line was synced before the next was written, so nothing else can be torn."""
    if not at_work(run, rng):
        return None
    gone_s, left = end_driver(run, signal.SIGKILL)
    journal = run.folder / "study.journal"
    content = journal.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    kept = rng.randrange(start, len(content))
    os.truncate(journal, kept)
    return f"cut by {len(content) - kept} bytes of a line of {len(content) - start}", gone_s, left


def _first_record(run: Run) -> bool:
    driver = driver_of(run)
    return bool(wait_until(
        lambda: any(run.folder.glob("trials/*/*/record.json")) or driver.process.poll() is not None, 60
    )) and driver.process.poll() is None  # fmt: skip


# ---- guests -----------------------------------------------------------------------------------------------


def _pick(
    run: Run, rng: random.Random, roles: tuple[str, ...], kinds: tuple[str, ...], spread_s: float = 0.3
) -> GuestProcess | None:
    """A live guest process of these roles and environments, a random while after one was first seen."""
    driver = driver_of(run)

    def look() -> list[GuestProcess]:
        return [each for each in guests(run.folder) if each.role in roles and each.kind in kinds]

    while driver.process.poll() is None:
        if not wait_until(lambda: look() or driver.process.poll() is not None, 60):
            return None
        time.sleep(rng.uniform(0, spread_s))
        if found := look():
            return rng.choice(found)
    return None


def of_attempt(run: Run, label: str) -> list[str]:
    alive = (each for each in guests(run.folder) if each.label == label)
    return [f"process {each.pid} {each.role} {each.label} {command_of(each.pid)[:60]}" for each in alive]


def worker_killed(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    return _guest_killed(run, rng, "worker", (*ISOLATED, "docker"))


def supervisor_killed(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    return _guest_killed(run, rng, "supervisor", ISOLATED)


def _guest_killed(
    run: Run, rng: random.Random, role: str, kinds: tuple[str, ...]
) -> tuple[str, float, list[str]] | None:
    while (victim := _pick(run, rng, (role,), kinds)) is not None:
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        return f"{role} of {victim.label}", *run.settle(lambda label=victim.label: of_attempt(run, label))  # type: ignore[misc]
    return None


def guest_stopped(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    """SIGSTOP: ended by the trial's deadline, by an interrupt, or with the killed driver.

    Where the driver dies and a container's own first process is stopped, nobody is left inside to end it: the next
    driver removes it before it begins a trial. That is checked there.
    """
    victim = _pick(run, rng, ("supervisor", "worker"), (*ISOLATED, "docker"), spread_s=0.15)
    if victim is None:
        return None
    try:
        os.kill(victim.pid, signal.SIGSTOP)
    except ProcessLookupError:
        return None
    ender = rng.choice(["deadline", "interrupt", "driver killed"])
    what = f"{victim.role} of {victim.label}, {ender}"
    if ender == "deadline":
        bound_s = float(str(run.data["limits"]["trial_timeout"]).removesuffix("s")) + SETTLE_BOUND_S
        began = time.monotonic()
        wait_until(lambda: not of_attempt(run, victim.label), bound_s)
        return what, time.monotonic() - began, of_attempt(run, victim.label)
    if ender == "interrupt":
        return what, *end_driver(run, signal.SIGINT)
    dead = driver_of(run)
    gone_s, left = end_driver(run, signal.SIGKILL)
    if victim.kind == "docker" and left:
        driver = run.start()
        if run.wait_for_attempt(driver, driver.known):
            left = [*of_attempt(run, victim.label), *dead.orphans().values()]
            what += ", removed by the next driver"
    return what, gone_s, left


# ---- the container, its daemon, the disk, the actor -------------------------------------------------------


def container_killed(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    import docker

    assert run.engine is not None
    driver = driver_of(run)
    while driver.process.poll() is None:
        found = wait_until(lambda: run.engine.running(run.folder), 60)  # type: ignore[union-attr]
        time.sleep(rng.uniform(0, 0.3))
        with contextlib.suppress(docker.errors.APIError, IndexError):
            run.engine.client.api.kill(found[0])
            return f"container {found[0][:12]}", *run.settle(lambda: _still(run, found))  # noqa: B023
    return None


def _still(run: Run, ids: list[str]) -> list[str]:
    assert run.engine is not None
    return [f"running container {each[:12]}" for each in run.engine.running(run.folder) if each in ids]


def daemon_killed(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    return _daemon_restarted(run, rng, signal.SIGKILL)


def daemon_ended(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    return _daemon_restarted(run, rng, signal.SIGTERM)


def _daemon_restarted(run: Run, rng: random.Random, number: int) -> tuple[str, float, list[str]] | None:
    assert run.engine is not None
    if not at_work(run, rng):
        return None
    running, down_s = run.engine.running(run.folder), rng.uniform(0, 3)
    run.engine.stop(number)
    time.sleep(down_s)
    run.engine.start()
    what = f"{signal.Signals(number).name}, down {down_s:.1f} s, {len(running)} container(s) running"
    return what, *run.settle(lambda: _still(run, running))


def disk_full(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    """Fill the run's own small file system to the last page; the driver stops; free it again."""
    if not at_work(run, rng):
        return None
    driver = driver_of(run)
    driver.look()
    filler = fill(run.folder.parent)
    try:
        code = driver.process.wait(timeout=60)
        gone_s, left = run.settle(lambda: run.left(driver))
    finally:
        filler.unlink()
    run.ended(driver)
    said = "No space left" in run.log.read_text(errors="replace")
    if code != 2 or not said:
        left.append(f"exit status {code} instead of 2" if code != 2 else "the full disk was not named")
    return f"exit {code}", gone_s, left


def actor_killed(run: Run, rng: random.Random) -> tuple[str, float, list[str]] | None:
    if not at_work(run, rng):
        return None
    driver = driver_of(run)
    driver.look()
    actors = [pid for pid in driver.tree if command_of(pid).startswith(("ray::b0", "ray::SlotActor"))]
    labels = {each.label for each in guests(run.folder)}
    if not actors:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(actors[0], signal.SIGKILL)
    return "SIGKILL", *run.settle(lambda: [line for label in labels for line in of_attempt(run, label)])


KINDS = [
    Kind("driver", "fake", 14, driver_killed),
    Kind("guest's worker", "fake", 6, worker_killed),
    Kind("guest's supervisor", "fake", 4, supervisor_killed),
    Kind("container", "fake", 6, container_killed, needs="docker"),
    Kind("Docker daemon, SIGKILL", "fake", 3, daemon_killed, needs="docker"),
    Kind("Docker daemon, SIGTERM", "fake", 2, daemon_ended, needs="docker"),
    Kind("driver, last record torn", "fake", 4, torn_record),
    Kind("driver, journal torn", "fake", 4, torn_journal),
    Kind("guest stopped (SIGSTOP)", "fake", 6, guest_stopped, kills=False),
    Kind("disk full", "disk", 3, disk_full, kills=False, needs="root"),
    Kind("slot actor (Ray)", "ray", 3, actor_killed),
    Kind("driver (Ray)", "ray", 3, driver_killed),
    Kind("driver, embedded engine", "embedded", 3, driver_killed),
    Kind("guest's worker, embedded engine", "embedded", 2, worker_killed),
    Kind("container, embedded engine", "embedded", 1, container_killed, needs="docker"),
]
