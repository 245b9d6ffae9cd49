"""What a map says, in numbers for the summary and in sentences for the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spark_ray.predict import Interval
from spark_ray.search.cube import Floats
from spark_ray.search_spec import Configuration

from .map_table import Map, Share
from .verdict import percent

LAWS = {
    "memfree": "fraction × (total − peak), TensorRT-LLM's",
    "memavailable": "fraction × total − peak, vLLM's and SGLang's",
}
FITS = 2.0
"""Leave-one-out errors beyond this many of the standard deviations that were predicted are said to be a bad fit."""
EVEN_CHANCE = 0.5
_FEW = 0.005  # of the space


@dataclass(frozen=True)
class Best:
    """The largest feasible value of an arm: where it is predicted, and where it was measured; None: nowhere."""

    arm: str
    predicted_at: Configuration | None
    predicted: Interval | None
    feasible: float | None
    measured_at: Configuration | None
    measured: float | None


@dataclass(frozen=True)
class Largest:
    """Where the contrast is furthest from 0, among places where both arms probably work."""

    configuration: Configuration
    contrast: Interval


def largest(found: Map) -> Largest | None:
    raw, said = found.filling
    both = said.feasible_both > EVEN_CHANCE
    if not both.any():
        return None
    at = int(np.where(both, np.abs(said.contrast_mean), -1.0).argmax())
    return Largest(found.configurations(raw)[at], Interval.of(said.contrast_mean[at], said.contrast_sd[at]))


def best(found: Map) -> tuple[Best, Best]:
    """Of both arms. Corners are looked at as well: a law is largest in one."""
    raw = np.vstack([found.filling[0], found.cube.corners()])
    said = found.surrogate.predict(raw)
    of_arms = (
        (said.kv_a_mean, said.kv_a_sd, said.feasible_a),
        (said.kv_b_mean, said.kv_b_sd, said.feasible_b),
    )
    baseline, against = (_best(found, arm, raw, *of_arms[arm]) for arm in (0, 1))
    return baseline, against


def _best(found: Map, arm: int, raw: Floats, mean: Floats, sd: Floats, feasible: Floats) -> Best:
    works = feasible > EVEN_CHANCE
    at = int(np.where(works, mean, -np.inf).argmax()) if works.any() else None
    measured = [(each.kv[arm], each) for each in found.observations if each.kv[arm] is not None]
    most = max(measured, key=lambda pair: pair[0] or 0.0, default=None)
    return Best(
        found.arms[arm],
        None if at is None else found.configurations(raw)[at],
        None if at is None else Interval.of(mean[at], sd[at], least=0.0),
        None if at is None else float(feasible[at]),
        None if most is None else found.measured_at(most[1]),
        None if most is None else most[0],
    )


def best_rows(found: Map) -> list[dict[str, str]]:
    """The same in words, a row per arm; – where there is none."""
    rows = []
    for each in best(found):
        row = {"arm": each.arm, "measured": "–", "measured_at": "–", "predicted": "–", "predicted_at": "–"}
        if each.measured is not None and each.measured_at is not None:
            row |= {
                "measured": found.quantity.text(each.measured),
                "measured_at": configuration(found, each.measured_at),
            }
        if each.predicted is not None and each.predicted_at is not None:
            ends = found.quantity.text(each.predicted.low), found.quantity.text(each.predicted.high)
            row |= {"predicted": f"{found.quantity.text(each.predicted.mean)} (95 %: {ends[0]} to {ends[1]})"}
            row |= {"predicted_at": configuration(found, each.predicted_at)}
        rows.append(row)
    return rows


def fit_errors(found: Map) -> tuple[float, float]:
    """How wrong each complete block's prediction from the others was, of what the arms share and of their difference.

    Root mean square, in the standard deviations that were predicted: 1 is as expected.
    """
    errors = found.surrogate.leave_one_out()
    common, difference = np.sqrt((np.asarray(errors) ** 2).mean(axis=0)) if len(errors) else (0.0, 0.0)
    return float(common), float(difference)


def summary(found: Map) -> dict[str, Any]:
    """The `map` of summary.json. Sizes are bytes (tokens per second where throughput was mapped), contrasts and shares 0 to 1."""
    (wrong, undecided), (first, second) = found.open, found.only_one_works
    where = largest(found)
    return {
        "sampler": found.sampler,
        "blocks": len(found.observations),
        "target": found.target.kind,
        "quantity": found.quantity.words,
        "margin": found.target.margin,
        "law": found.surrogate.family,
        "fit_errors_sd": fit_errors(found),
        f"noise_sd_{found.quantity.unit}": found.surrogate.noise_sd_bytes,
        "divergent": asdict(found.divergent),
        "only_baseline_works": asdict(first),
        "only_against_works": asdict(second),
        "undecided": undecided,
        "expected_misclassified": wrong,
        "stopped": found.decision.stop if found.sampler == "map" else None,
        "why": found.decision.why if found.sampler == "map" else None,
        "largest_contrast": None if where is None else asdict(where),
        "best": [asdict(each) for each in best(found)],
    }


# ---- sentences --------------------------------------------------------------------------------------------


def configuration(found: Map, at: Configuration) -> str:
    """In words, short: batch 16, tokens 4096, fraction 0.9."""
    names = {"max_batch_size": "batch", "max_num_tokens": "tokens", "memory_fraction": "fraction"}
    return ", ".join(f"{names.get(key, key)} {found.short(key, value)}" for key, value in at.items())


def _share(found: Share) -> str:
    return (
        f"{percent(found.mean)} of the searched space (95 %: {percent(found.low)} to {percent(found.high)})"
    )


def headline(found: Map) -> str:
    """The answer in a sentence."""
    baseline, against = found.arms
    words, share = found.quantity.words, found.divergent
    if found.target.kind == "boundary":
        return f"One of {baseline} and {against} alone has any {words} in {_share(share)}."
    return (
        f"{against} has over {percent(found.target.margin)} less {words} than {baseline}, or only one of them has any, "
        f"in {_share(share)}."
    )


def sentences(found: Map) -> list[str]:
    """What else is known, and how well: each a sentence of its own."""
    said, where = [_known(found)], largest(found)
    if where is not None:
        low, high = percent(where.contrast.low), percent(where.contrast.high)
        said.append(
            f"The contrast is furthest from 0 at {configuration(found, where.configuration)}: {percent(where.contrast.mean)} "
            f"(95 %: {low} to {high})."
        )
    said += _boundaries(found)
    if found.by_noise:
        said.append(f"The margin is the noise floor of the pilot, {percent(found.target.margin)}: below it nothing is called divergence.")  # fmt: skip
    return [*said, _model(found), _chosen(found)]


def _known(found: Map) -> str:
    """How far the map can be trusted, and why no more was measured."""
    if found.sampler == "map":
        begin = "Why it stopped" if found.decision.stop else "Not known well enough yet"
        return f"{begin}: {found.decision.why}."
    wrong, undecided = found.open
    return f"Expected to be called wrongly: {percent(wrong)} of the space; undecided at 95 %: {percent(undecided)}."


def _boundaries(found: Map) -> list[str]:
    """Where one arm alone works."""
    known = list(zip(found.arms, found.only_one_works, strict=True))
    shares = [
        f"{arm} alone works in {_share(share)}" for arm, share in known if share.low > 0 or share.mean > _FEW
    ]
    if shares:
        return [f"{'; '.join(shares)}."]
    otherwise = sum(share.mean for _, share in known)
    return [f"Where one arm has any capacity, so has the other: that it is otherwise is expected of {percent(otherwise)} of the space."]  # fmt: skip


def _model(found: Map) -> str:
    family = found.surrogate.family
    common, difference = fit_errors(found)
    if family is None:
        law = "No sizing law fits: the map is a plain Gaussian process"
    else:
        law = f"The sizing law that fits best is {LAWS.get(family, family)}, with a residual for what it does not foresee"
    bad = max(common, difference) > FITS
    return (
        f"{law}. Each block was predicted from the others with an error of {common:.2g} (what the arms share) and {difference:.2g} "
        f"(their difference) of the standard deviations expected{': a bad fit, and bands were widened for it' if bad else ''}. "
        f"Noise of one arm in a block: {found.quantity.text(found.surrogate.noise_sd_bytes)} standard deviation, in the middle of the space."
    )


def _chosen(found: Map) -> str:
    count = len(found.observations)
    if found.sampler == "map":
        return f"From {count} blocks, chosen by this map as it grew."
    return f"From {count} blocks that the sampler {found.sampler} chose, not this map: more of them may lie where nothing was to be learned."
