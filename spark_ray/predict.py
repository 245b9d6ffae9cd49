"""What a run says of a configuration that it did not measure: `spark-ray predict RUN --set max_batch_size=16 …`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import mapping, power
from .errors import InputError, RunError, typed
from .experiment import Experiment
from .knobs import scalar_words
from .search_spec import Axis, Configuration, Span
from .spec import Scalar, held
from .store import Store
from .units import format_bytes

Z_95 = 1.959964
"""Standard deviations to either side that hold 95 % of a normal variable."""


@dataclass(frozen=True)
class Interval:
    """A predicted value with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, sd: float, least: float = -np.inf, most: float = np.inf) -> Interval:
        """Within what there can be: a law's line goes on below nothing."""
        ends = np.clip([mean, mean - Z_95 * sd, mean + Z_95 * sd], least, most)
        return cls(*map(float, ends))


@dataclass(frozen=True)
class Quantity:
    """What a map is of: KV capacity, or what the engine made of it."""

    words: str
    column: str
    unit: str
    """Ends the names of columns and fields."""

    def text(self, value: float) -> str:
        return format_bytes(value) if self.unit == "bytes" else f"{value:.4g} tokens/s"


CAPACITY = Quantity("KV capacity", "kv", "bytes")
THROUGHPUT = Quantity("throughput", "throughput", "tokens_per_s")


@dataclass(frozen=True)
class OfArm:
    """What is expected of one arm, if it works, and how probably it does."""

    arm: str
    value: Interval
    works: float


@dataclass(frozen=True)
class Predicted:
    """What is expected at one configuration, without the noise of a single trial. Contrasts and probabilities are 0 to 1."""

    configuration: Configuration
    units: Mapping[str, str]
    """Of sizes (B) and durations (s) in it."""
    quantity: Quantity
    baseline: OfArm
    against: OfArm
    contrast: Interval
    """1 - against / baseline: positive is less in `against`."""
    divergent: float
    """How probably the contrast exceeds the margin, or one arm alone works."""
    margin: float
    blocks: int
    """That this is drawn from."""
    notes: tuple[str, ...]
    mark: str
    """DOUBLE, SIMULATED, PROBE or FAKE where what made the numbers is no engine."""

    def as_dict(self) -> dict[str, Any]:
        """For --json. Ends of intervals are `low` and `high`; units are in the names."""
        of_arms = {
            each.arm: {
                f"{self.quantity.column}_{self.quantity.unit}": asdict(each.value),
                "works": each.works,
            }
            for each in (self.baseline, self.against)
        }
        return {
            "configuration": self.configuration,
            "arms": of_arms,
            "contrast": asdict(self.contrast),
            "divergence_probability": self.divergent,
            "margin": self.margin,
            "blocks": self.blocks,
            "notes": list(self.notes),
            "simulated": self.mark == "SIMULATED",
            "engine_is_double": self.mark == "DOUBLE",
            "probe": self.mark == "PROBE",
        }


def words(found: Predicted) -> str:
    """For people, a line each; the mark first."""
    text, share = found.quantity.text, "{:.1%}".format
    head = f"{found.mark}: no engine made these numbers\n" if found.mark else ""
    at = ", ".join(
        f"{name} {in_words(value, found.units.get(name, ''))}" for name, value in found.configuration.items()
    )
    lines = [f"{head}{found.quantity.words} expected at {at}"]
    width = max(len(each.arm) for each in (found.baseline, found.against))
    for each in (found.baseline, found.against):
        value = each.value
        lines.append(
            f"  {each.arm:{width}}  {text(value.mean)}  (95 %: {text(value.low)} to {text(value.high)})"
            f"  works with probability {share(each.works)}"
        )
    contrast, arms = found.contrast, f"1 - {found.against.arm} / {found.baseline.arm}"
    lines.append(f"contrast {arms}: {share(contrast.mean)}  (95 %: {share(contrast.low)} to {share(contrast.high)})")  # fmt: skip
    lines.append(
        f"it is above the margin of {share(found.margin)}, or one arm alone works, with probability {share(found.divergent)}"
    )
    lines += [f"note: {each}" for each in found.notes]
    return "\n".join(
        [*lines, f"from {found.blocks} blocks; a single trial varies around this by its own noise"]
    )


def quantity_of(experiment: Experiment) -> Quantity:
    return THROUGHPUT if experiment.search.target.objective == "throughput" else CAPACITY


def predict(store: Store, settings: Sequence[str]) -> Predicted:
    """What the complete blocks of a run say of one configuration.

    Args:
        store: The run, which may be driven meanwhile.
        settings: `AXIS=VALUE`, for every axis that was searched; sizes and durations with their unit.

    Raises:
        InputError: a value is missing, or outside of what was searched.
        RunError: the run has no map.
    """
    experiment = power.experiment_of(store.plan)
    configuration, notes = _asked(experiment, settings)
    pair = experiment.compared
    missing = [arm for arm in (pair.baseline, pair.against) if arm not in store.plan["arms"]]
    if missing:
        raise RunError(f"{store.folder} has no map: {' and '.join(missing)} was left out of it", mend="start a new run with both arms")  # fmt: skip
    known = mapping.observations(store, experiment)
    surrogate = mapping.surrogate(store, experiment)
    if surrogate is None:
        raise RunError(
            f"{store.folder} has no map yet: {mapping.lacks(known)}",
            mend=f"go on with it: {typed(f'resume {store.folder}')}"
            if len(known) < experiment.search.blocks
            else "all its blocks are spent: search where both arms work and memory sets their capacity (not engine.kv_cache "
            "or engine.max_tokens), or give sweep --resume a larger search.blocks",
        )
    said = surrogate.predict([mapping.axes(experiment).numbers(configuration)])
    target, widening = mapping.target(experiment), mapping.decision(store, experiment).widening
    return Predicted(
        configuration,
        experiment.search.space.units,
        quantity_of(experiment),
        OfArm(pair.baseline, Interval.of(said.kv_a_mean[0], said.kv_a_sd[0], 0.0), float(said.feasible_a[0])),
        OfArm(pair.against, Interval.of(said.kv_b_mean[0], said.kv_b_sd[0], 0.0), float(said.feasible_b[0])),
        Interval.of(said.contrast_mean[0], said.contrast_sd[0], most=1.0),
        float(target.divergent(said, widening)[0]),
        target.margin,
        len(known),
        notes,
        _mark(experiment),
    )


def _mark(experiment: Experiment) -> str:
    if getattr(experiment.engine, "double", None) is not None:
        return "DOUBLE"
    return {"simulated": "SIMULATED", "probe": "PROBE", "fake": "FAKE"}.get(experiment.engine.kind, "")


# ---- what is asked ----------------------------------------------------------------------------------------


def _asked(experiment: Experiment, settings: Sequence[str]) -> tuple[Configuration, tuple[str, ...]]:
    """The configuration that the settings name, and what should be known of it; all their mistakes at once."""
    axes, units = experiment.search.space.axes, experiment.search.space.units
    wrong, notes = [], []
    given: Configuration = {}
    for setting in settings:
        name, equals, written = setting.partition("=")
        name = name.strip()
        if not equals:
            wrong.append(f"--set {setting}: write it as AXIS=VALUE, such as max_batch_size=16")
        elif name not in axes:
            near = difflib.get_close_matches(name, axes, n=1)
            wrong.append(f"{name} was not searched{f': did you mean {near[0]}?' if near else ''}")
        else:
            given[name] = _value(written.strip(), axes[name])
            problem, note = _misfit(name, given[name], axes[name], units.get(name, ""))
            wrong += [problem] if problem else []
            notes += [note] if note else []
    for name, axis in axes.items():
        if name not in given and isinstance(axis, tuple) and len(axis) == 1:
            given[name] = axis[0]
    wrong += [f"{name} is missing" for name in axes if name not in given]
    batch, tokens, range_ = given.get("max_batch_size"), given.get("max_num_tokens"), axes["max_num_tokens"]
    if isinstance(batch, int) and isinstance(tokens, int) and isinstance(range_, Span) and tokens < min(batch, range_.high):  # fmt: skip
        wrong.append(f"max_num_tokens {tokens} is below max_batch_size {batch}: an engine refuses that")
    if wrong:
        searched = "; ".join(f"{name} {_words(axis, units.get(name, ''))}" for name, axis in axes.items())
        raise InputError("\n".join(wrong), mend=f"say --set AXIS=VALUE for each axis that was searched: {searched}")  # fmt: skip
    return {name: given[name] for name in axes}, tuple(notes)


_JSON = {"True": "true", "False": "false", "None": "null"}


def _value(written: str, axis: Axis) -> Scalar:
    """As JSON or Python would have it; a size in bytes, a duration in seconds; a word that looks like a number as the axis has it."""
    if isinstance(axis, tuple) and written in axis:
        return written
    try:
        value = json.loads(_JSON.get(written, written))
    except ValueError:
        return held(written)
    return value if isinstance(value, bool | int | float | str | None) else written


def _number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _misfit(name: str, value: Scalar, axis: Axis, unit: str) -> tuple[str | None, str | None]:
    """What is wrong with a value, and what should be known of it."""
    outside = f"{name} {in_words(value, unit)} is outside of what was searched ({_words(axis, unit)}), and a map does not reach further"
    if isinstance(axis, tuple) and not all(map(_number, axis)):
        return (None if value in axis else outside), None
    if not _number(value):
        return f"{name} must be a number: got {value}", None
    low, high = (axis.low, axis.high) if isinstance(axis, Span) else (min(axis), max(axis))  # type: ignore[type-var]
    if not low <= value <= high:  # type: ignore[operator]
        return outside, None
    whole = isinstance(low, int) if isinstance(axis, Span) else all(isinstance(each, int) for each in axis)
    if whole and isinstance(value, float):
        return f"{name} must be a whole number: got {value}", None
    between = isinstance(axis, tuple) and value not in axis
    return (
        None,
        f"{name} {in_words(value, unit)} lies between values that were searched ({_words(axis, unit)})"
        if between
        else None,
    )


def _words(axis: Axis, unit: str) -> str:
    if isinstance(axis, Span):
        return f"{in_words(axis.low, unit)} to {in_words(axis.high, unit)}"
    return ", ".join(in_words(value, unit) for value in axis)


def in_words(value: Scalar, unit: str) -> str:
    """A value of a knob; `unit`: B of a size, s of a duration."""
    if unit == "B" and isinstance(value, int | float):
        return format_bytes(value)
    if isinstance(value, bool) or value is None:
        return scalar_words(value)  # as it is typed again
    return f"{value} s" if unit == "s" else str(value)
