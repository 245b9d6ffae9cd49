"""Host state set on purpose before an attempt, and verified at the moment that counts: the engine's sizing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import page_cache
from .ballast import Ballast, refuse_if_too_large, size_of
from .compile_cache import CompileCaches, content
from .conditions import Fill, Limits, Share, Treatment
from .errors import UnavailableError
from .rootact import RootActs
from .units import format_bytes
from .worker import observe

_HELD_SHARE = 0.98  # of a fill that must still be resident at the sizing moment
_BALLAST_SHARE = 0.995  # of a ballast: nothing reclaims it here, but swapping would
_WAITING_SHARE = (
    0.005  # of all memory that may wait in per-CPU lists that were drained: a drain leaves about 0.1 %
)


# ---- what is asked for ------------------------------------------------------------------------------------


def effective(
    treatment: Treatment, root_acts: bool, *, settles: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """What this user can have of a treatment: (treatment with every key set, warnings).

    `settles`: the engine waits for the host right before it reads free memory, so that the lists can be drained then.
    """
    warnings = []
    cache: object = treatment.page_cache
    if cache is None:
        cache = "drop" if root_acts else "advise"
        if not root_acts:
            warnings.append(
                "page_cache: drop needs root; known files are advised away instead, others stay cached"
            )
    pages = treatment.per_cpu_pages
    if pages is None:
        pages = "drained" if root_acts and settles else "as_is"
        if not settles:
            warnings.append(
                "the engine reads free memory in a process that does not wait for the host: per-CPU lists are not "
                "drained, and what waits in them is a term of the record (engine.worker single_process waits)"
            )
        elif not root_acts:
            warnings.append(
                "per_cpu_pages: drained needs root; freed memory may hide in per-CPU lists for a minute"
            )
    ballast = treatment.ballast
    return {
        "page_cache": {"fill_bytes": cache.fill} if isinstance(cache, Fill) else cache,
        "per_cpu_pages": pages,
        "compile_cache": treatment.compile_cache,
        "swap": treatment.swap,
        "ballast": {"share": ballast.share} if isinstance(ballast, Share)
        else None if ballast is None else {"size_bytes": ballast},
    }, warnings  # fmt: skip


def words(treatment: Mapping[str, Any]) -> str:
    """An effective treatment for people; what is as in every experiment is left out."""
    cache, ballast = treatment["page_cache"], treatment["ballast"]
    said = f"fill {format_bytes(cache['fill_bytes'])}" if isinstance(cache, dict) else cache
    parts = [f"page cache: {said}", f"per-CPU pages: {treatment['per_cpu_pages']}"]
    if treatment["compile_cache"] == "warm":
        parts.append("compile cache: warm")
    if treatment["swap"] == "require_off":
        parts.append("swap: must be off")
    if ballast:
        size = (
            format_bytes(ballast["size_bytes"])
            if "size_bytes" in ballast
            else f"{ballast['share']:.3g} of what is free"
        )
        parts.append(f"ballast: {size}")
    return "; ".join(parts)


def missing(treatment: Treatment, root_acts: bool) -> str | None:
    """Why a treatment that is asked for by name cannot be had here."""
    if root_acts:
        return None
    asked = [f"page_cache: {treatment.page_cache}"] if treatment.page_cache == "drop" else []
    if treatment.per_cpu_pages == "drained":
        asked.append("per_cpu_pages: drained")
    return f"{' and '.join(asked)} needs root" if asked else None


def impossible(treatment: Treatment, limits: Limits, info: Mapping[str, int]) -> list[tuple[str, str]]:
    """What this host's memory (/proc/meminfo) forbids: (what, the mend) each."""
    found = []
    if treatment.swap == "require_off" and (swap := info.get("SwapTotal", 0)):
        found.append(
            (
                f"swap: require_off, and this host has {format_bytes(swap)} of swap space",
                "swapoff -a, or leave treatment.swap out",
            )
        )
    ballast, total = treatment.ballast, info["MemTotal"]
    size = ballast.share * total if isinstance(ballast, Share) else ballast or 0
    if size and size + limits.watchdog > total:
        found.append(
            (
                f"a ballast of {format_bytes(size)} and limits.watchdog are more than this host's memory",
                "lower treatment.ballast",
            )
        )
    return found


# ---- on the host ------------------------------------------------------------------------------------------


class Treatments:
    """Applies treatments on one slot: `apply`, `settle`, `at_sizing`, `undo` for each execution, in this order.

    `scratch` holds the fill file and compiled kernels, and must be on a disk, not in memory. `run` names the run
    folder to processes that are started, so that what outlives a run can be told whose it was.
    """

    def __init__(
        self, root_acts: RootActs, scratch: Path, known_files: list[Path], *, run: str | None = None
    ) -> None:
        self._root = root_acts
        self._can = root_acts.available()[0]
        self._scratch = scratch
        self._known = known_files
        self._run = run if run is not None else str(scratch.parent.parent)
        self._caches = CompileCaches(scratch / "compile-cache")
        self._forget()

    def _forget(self) -> None:
        """No execution is under way."""
        self._asked: dict[str, Any] = {}
        self._left: dict[str, Any] = {}  # what `apply` returned
        self._settled: dict[str, Any] = {}
        self._fill: Path | None = None
        self._ballast: Ballast | None = None
        self._cache: tuple[Path, bool] | None = (
            None  # of compiled kernels: the folder, and whether it was warm
        )

    def apply(
        self,
        treatment: dict[str, Any],
        *,
        arm: str = "",
        configuration: Mapping[str, Any] | None = None,
        spare_bytes: int = 0,
    ) -> dict[str, Any]:
        """Bring the host into the state, as `effective` gave it; returns what was done and read.

        `spare_bytes`: what a ballast must leave of the available memory (limits.watchdog).
        """
        self._asked = treatment
        try:
            self._left = self._apply(treatment, arm, configuration or {}, spare_bytes)
        except BaseException:
            self.undo()
            raise
        return dict(self._left)

    def _apply(
        self, treatment: dict[str, Any], arm: str, configuration: Mapping[str, Any], spare_bytes: int
    ) -> dict[str, Any]:
        done: dict[str, Any] = {"asked": treatment}
        cache = treatment["page_cache"]
        if arm:
            done |= self._prepare_cache(treatment.get("compile_cache", "cold"), arm, configuration)
        if cache != "keep":
            if cache != "advise" and self._can:
                self._root.run("drop-caches")
                done["dropped"] = True
            else:
                page_cache.advise_away(self._known)
                done["advised_files"] = len(self._known)
        if isinstance(cache, dict):
            self._fill = page_cache.fill(self._scratch, cache["fill_bytes"])
            done["filled_bytes"] = observe.resident_bytes(self._fill)
        if asked := treatment.get("ballast"):
            done |= self._load_ballast(asked, spare_bytes)
        if treatment["per_cpu_pages"] == "drained":  # last: the acts before it free memory as well
            done["drained"] = json.loads(self._root.run("drain-per-cpu"))
        info = observe.meminfo()
        return done | {
            "mem_free_bytes": info["MemFree"],
            "cached_bytes": info["Cached"] + info["Buffers"],
            "page_cache_bytes": page_cache.of_files_bytes(info),
            "model_resident_bytes": self._model_resident(),
            "swap_total_bytes": info.get("SwapTotal", 0),
        }

    def _load_ballast(self, asked: dict[str, Any], spare_bytes: int) -> dict[str, Any]:
        info = observe.meminfo()
        waiting = _per_cpu_free_bytes() or 0
        size = size_of(asked, info["MemFree"] + waiting)
        refuse_if_too_large(size, info["MemAvailable"] + waiting, spare_bytes)
        self._ballast = Ballast(size, self._run)
        return {
            "ballast_bytes": size,
            "ballast_pid": self._ballast.pid,
            "ballast_locked": self._ballast.locked,
            "ballast_root_cgroup": self._ballast.root_cgroup,
        }

    def _prepare_cache(self, state: str, arm: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
        warm = state == "warm" and self._caches.is_warm(arm, configuration)
        folder = self._caches.prepare(state, arm, configuration)
        self._cache = folder, warm
        files, size = content(folder)
        return {"compile_cache_warm": warm, "compile_cache_files": files, "compile_cache_bytes": size}

    def _model_resident(self) -> int | None:
        sums = observe.resident(self._known)
        resident: int | None = sums.get("resident_bytes", None if sums.get("absent") else 0)
        return resident

    # -- compiled kernels -----------------------------------------------------------------------------------

    def compile_cache(self, treatment: Mapping[str, Any], arm: str, configuration: Mapping[str, Any]) -> Path:
        """The folder for `environments.Site`; `apply` makes it."""
        return self._caches.folder_of(treatment.get("compile_cache", "cold"), arm, configuration)

    def needs_warming(self, treatment: Mapping[str, Any], arm: str, configuration: Mapping[str, Any]) -> bool:
        """Whether an execution that is not measured must come first: with `apply` and `undo` around it, then `warmed`."""
        return treatment.get("compile_cache") == "warm" and not self._caches.is_warm(arm, configuration)

    def warmed(self, arm: str, configuration: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        """Such an execution has ended by itself, whatever its answer: not by a disturbance. `note` says how."""
        self._caches.warmed(arm, configuration, note)

    # -- while the worker runs, and after it ----------------------------------------------------------------

    def children(self) -> list[int]:
        """Processes that belong to the treatment."""
        return [self._ballast.pid] if self._ballast else []

    def settle(self) -> dict[str, Any]:
        """Right before the engine reads free memory: what does not last is done again. Never raises."""
        settled: dict[str, Any] = {}
        if self._fill:
            with contextlib.suppress(OSError):  # somebody removed it: seen at the sizing moment
                settled["refilled_bytes"] = page_cache.bring_back(self._fill)
        if self._asked.get("per_cpu_pages") == "drained":
            try:
                settled["drained"] = json.loads(self._root.run("drain-per-cpu"))
            except UnavailableError as error:  # the attempt is disturbed by it, the run is not
                settled["drain_error"] = error.message
        self._settled = settled
        return dict(self._settled)

    def at_sizing(
        self, model_resident_bytes: int | None = None, mapped_file_bytes: int | None = None
    ) -> dict[str, Any]:
        """What of the state is there at the sizing moment.

        `model_resident_bytes`: model files in the page cache, asked here if the caller does not know.
        `mapped_file_bytes`: files that the worker's tree has mapped.
        """
        if not self._settled:
            self.settle()  # a worker of an older program says no `settle`
        info = observe.meminfo()
        seen = dict(self._settled)
        seen["per_cpu_free_bytes"] = _per_cpu_free_bytes()
        seen["per_cpu_allowed_bytes"] = int(_WAITING_SHARE * info["MemTotal"])
        seen["page_cache_bytes"] = page_cache.of_files_bytes(info)
        seen["swap_total_bytes"] = info.get("SwapTotal", 0)
        if self._fill:
            seen["fill_resident_bytes"] = _resident_bytes(self._fill)
        if self._ballast:
            seen["ballast_bytes"] = self._ballast.size_bytes
            seen["ballast_resident_bytes"] = self._ballast.resident_bytes()
        if self._cache:
            files, size = content(self._cache[0])
            seen |= {
                "compile_cache_warm": self._cache[1], "compile_cache_files": files, "compile_cache_bytes": size,
            }  # fmt: skip
        if model_resident_bytes is None:
            model_resident_bytes = self._model_resident()
        seen["model_resident_bytes"] = model_resident_bytes
        seen["mapped_file_bytes"] = mapped_file_bytes
        if (unexplained := _unexplained_bytes(self._left, seen)) is not None:
            seen["unexplained_cache_bytes"] = unexplained
        return {name: value for name, value in seen.items() if value is not None}

    def undo(self) -> None:
        """After the attempt: the fill leaves the cache, and the ballast is gone when this returns."""
        if self._fill:
            page_cache.advise_away([self._fill])
        if self._ballast:
            self._ballast.release()
        self._forget()

    def close(self) -> None:
        """Remove what treatments left."""
        self.undo()
        page_cache.remove_fills(self._scratch)
        self._caches.remove()


def _per_cpu_free_bytes() -> int | None:
    try:
        return observe.per_cpu_free_bytes()
    except OSError:
        return None


def _resident_bytes(path: Path) -> int:
    try:
        return observe.resident_bytes(path)
    except OSError:  # somebody removed it, and its pages went with it
        return 0


def _unexplained_bytes(left: Mapping[str, Any], seen: Mapping[str, Any]) -> int | None:
    """Page cache that came since `apply` and is neither fill, nor the model's, nor mapped by the worker.

    None when the model's part cannot be known. A model that is mapped is taken off twice: this is a bound from below.
    """
    model_before, model_now = left.get("model_resident_bytes"), seen["model_resident_bytes"]
    if model_before is None or model_now is None:
        return None
    before: int = left["page_cache_bytes"] - left.get("filled_bytes", 0) - model_before
    now: int = seen["page_cache_bytes"] - seen.get("fill_resident_bytes", 0) - model_now
    return max(0, now - (seen["mapped_file_bytes"] or 0) - before)


# ---- whether it held --------------------------------------------------------------------------------------


def not_held(
    treatment: Mapping[str, Any], seen: Mapping[str, Any] | None, limits: Limits | None = None
) -> str | None:
    """Why the state did not hold until the sizing moment; None when it did or the worker never got there."""
    if seen is None:
        return None
    return "; ".join(_broken(treatment, seen, limits or Limits())) or None


def _broken(treatment: Mapping[str, Any], seen: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    cache = treatment["page_cache"]
    if isinstance(cache, dict):
        resident = seen.get("fill_resident_bytes", 0)
        if resident < _HELD_SHARE * cache["fill_bytes"]:
            yield f"page cache fill: {resident} of {cache['fill_bytes']} bytes were still resident at the sizing moment"
    others = seen.get("unexplained_cache_bytes", 0)
    if cache != "keep" and others > limits.cache_tolerance:
        yield (
            f"page cache: {format_bytes(others)} came from elsewhere before the sizing moment,"
            f" limits.cache_tolerance is {format_bytes(limits.cache_tolerance)}"
        )
    if treatment["per_cpu_pages"] == "drained":
        if "drain_error" in seen:
            yield f"per-CPU lists could not be drained at the sizing moment: {seen['drain_error']}"
        elif (waiting := seen.get("per_cpu_free_bytes", 0)) > seen["per_cpu_allowed_bytes"]:
            yield f"per-CPU lists: {format_bytes(waiting)} waited there at the sizing moment, though drained"
    if treatment.get("compile_cache") == "warm" and not seen.get("compile_cache_warm"):
        yield "compile cache: no execution that is not measured had warmed it"
    if treatment.get("swap") == "require_off" and seen.get("swap_total_bytes"):
        yield f"swap: {format_bytes(seen['swap_total_bytes'])} of swap space at the sizing moment"
    if treatment.get("ballast"):
        held, wanted = seen.get("ballast_resident_bytes", 0), seen.get("ballast_bytes", 0)
        if not wanted or held < _BALLAST_SHARE * wanted:
            yield f"ballast: {held} of {wanted} bytes were resident at the sizing moment"
