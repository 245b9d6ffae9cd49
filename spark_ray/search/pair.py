"""Two arms as two processes that know nothing of each other: what they have in common, and their difference.

A block measures both arms under the same conditions, so what disturbs both is in their mean and not in their difference.
With the same noise in both arms the noise of mean and difference is uncorrelated. In the scale of a family of laws
(`scale`), z of KV, they are

    common = (z_a + z_b) / 2      difference = z_a - z_b

Not every arm of a block has a number. One at a cap has *at least* the cap and one that failed *less than* what ever worked:
one-sided information, which enters as the Gaussian of the same effect (expectation propagation with a probit site, Minka 2001).
An arm without any is filled in from the other and what is known of the difference. A block that all the others contradict
counts less, by a multiple of its noise.

Each of both is learned under several priors (`Prior`), among which the blocks choose: hardly more than a law, with one knee or another,
growing or even; a law and a smooth residual; a rough one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import ndtr

from . import law
from .blocks import Data, Known, Mask, of_arms
from .kernel import Floats
from .mixture import UNKNOWN, Mixture, Moments, one_sided
from .process import Hyperparameters, Prior, Process
from .robust import outlying
from .scale import Scale

SMOOTH = (
    Prior(doubtful=0.1, residual=0.05, noise=0.1, drift=0.1),
    Prior(doubtful=0.3, residual=0.3, noise=0.7),
)
"""Under a law, of common and difference; then of what no law foresees within a small part of the space: a step, a bump."""
STRICT = (
    Prior(doubtful=0.01, residual=0.01, noise=0.1, drift=0.1, spread=0.5),
    Prior(doubtful=0.03, residual=0.03, noise=0.7, spread=0.5),
)
"""Hardly more than the law's own terms: with more to learn, few blocks' noise is taken for it."""
ROUGH = (
    Prior(doubtful=0.1, residual=0.3, noise=0.1, drift=0.1, length=0.2),
    Prior(doubtful=0.3, residual=1.0, noise=0.5, length=0.2),
)
PLAIN = (Prior(doubtful=0.5, residual=1.0, noise=0.1), Prior(doubtful=0.5, residual=1.0, noise=0.4))
PLAIN_ROUGH = tuple(replace(prior, length=0.2) for prior in PLAIN)
STEP_LENGTH = 0.08
"""On a line there are soon enough blocks to see a step."""
OTHER_KNEE = tuple(
    replace(STRICT[0], doubted=(law.KNEE_COLUMN,), trusted=(place,)) for place in range(len(law.OTHER_KNEES))
)
"""As strict, with another knee than the usual one."""
EVEN = replace(STRICT[1], doubted=(1, 2))
"""As strict: arms differ by as much memory everywhere, as they do by what one of them holds already."""
STRICT_FAVOUR = 3.0
SMOOTH_FAVOUR = 2.0
"""Natural logs of the odds for hardly any residual, and for a smooth one, against a rough one, before the first block."""
USUAL_SHARE = 0.6
"""Of the odds for hardly any residual, that of the usual knee, and of a difference that may grow; the others share the rest."""
PASSES = 3
NEGLIGIBLE = 0.05
"""The weight below which a process is left out of a mixture."""
ROUNDS = 2
HOPELESS = 8.0
"""Natural log of the odds below which a scale is given up after the first round."""
LAW_FAVOUR = 2.0
"""Natural log of the odds for any law against none, before the first block."""
FEWEST_FOR_OUTLIERS = 8
DOUBTED = 4.0
"""The multiple of its noise with which a block counts, above which it is an outlier, and is measured again."""
OUTLIER_ODDS = 3.0
"""Natural log of the odds that a block is none, before it was measured."""
SUSPECTED = 1e3
"""The multiple of its noise with which a block counts that a robust fit cannot explain, until it is judged."""
OUTLYING = 3.0
"""Robust standard deviations from what the others predict, beyond which a block counts less."""
MOST_NOISE = 1e6
OTHERWISE = 0.02
"""The chance that an arm seems to be capped, whatever capacity is predicted."""
CLIFF = -3.0
"""Standard deviations beyond which a failure contradicts the predicted capacity: it has another cause."""


def log_evidence(process: Process | Mixture, complete: Mask) -> float:
    """Log density of each complete block's value given all others, summed; a constant for each is left out."""
    mean, variance = process.leave_one_out()
    return -float((np.log(variance) + (process.values - mean) ** 2 / variance)[complete].sum()) / 2


# ---- fitting ------------------------------------------------------------------------------------------------------


Weighted = tuple[tuple[float, Hyperparameters], ...]


def _weighted(hypers: list[Hyperparameters], evidence: Floats) -> Weighted:
    """Weights by evidence; those with hardly any are left out."""
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    weights[weights < NEGLIGIBLE] = 0.0
    weights /= weights.sum()
    return tuple((float(weight), hyper) for weight, hyper in zip(weights, hypers, strict=True) if weight > 0)


@dataclass(frozen=True)
class Learned:
    """What is kept between refits."""

    common: Weighted
    difference: Weighted
    suspecting: bool
    """Blocks were best explained beginning with those in doubt that a robust fit cannot explain."""


class Pair:
    """Both processes, conditioned on all blocks."""

    def __init__(
        self, scale: Scale, raw: Floats, processes: tuple[Mixture, Mixture], complete: Mask, doubt: Floats
    ) -> None:
        self.scale, self.raw, (self.common, self.difference) = scale, raw, processes
        self.complete = complete
        """The blocks with a number of both arms."""
        self.doubt = doubt
        """The multiple of its noise with which a block counts."""

    @classmethod
    def condition(cls, scale: Scale, data: Data, learned: Learned) -> Pair:
        fit = _Fit(scale, data, learned, suspecting=learned.suspecting)
        fit.settle()
        return fit.pair()

    @cached_property
    def standardised(self) -> Floats:
        """Leave-one-out errors of common and difference, (complete blocks, 2), in standard deviations."""
        errors = []
        for process in (self.common, self.difference):
            mean, variance = process.leave_one_out()
            errors.append(((process.values - mean) / np.sqrt(variance))[self.complete])
        return np.column_stack(errors)

    def evidence(self, data: Data) -> float:
        """Log density of each complete block given all others, summed: of bytes, so that families can be compared."""
        found = self.scale.log_density(data.kv_bytes[self.complete], data.raw[self.complete]).sum()
        return float(found) + sum(
            log_evidence(each, self.complete) for each in (self.common, self.difference)
        )

    def with_(self, raw: Floats) -> Pair:
        """As if these were measured, each arm at its mean."""
        of_common, of_difference = self.scale.inputs(raw)
        return Pair(
            self.scale,
            np.vstack([self.raw, raw]),
            (self.common.with_(of_common), self.difference.with_(of_difference)),
            np.concatenate([self.complete, np.zeros(len(raw), dtype=bool)]),
            np.concatenate([self.doubt, np.ones(len(raw))]),
        )


def learn(scales: Sequence[Scale], data: Data) -> tuple[Learned, Pair]:
    """Each scale in turn; kept is the one under which the blocks predict each other, and caps, best.

    Hyperparameters are learned twice: the first ones tell which blocks are outliers, the second ones disregard those. Where
    several blocks are off, the first ones were misled by them; so what a robust fit of the law suspects is tried as well.
    """
    fits = [_Fit(scale, data) for scale in scales]
    fits += [fit for scale in scales if (fit := _Fit(scale, data, suspecting=True)).suspected.any()]
    for _ in range(ROUNDS):
        for fit in fits:
            fit.learn()
            fit.settle()
        found = [fit.evidence() for fit in fits]
        fits = [fit for fit, evidence in zip(fits, found, strict=True) if evidence > max(found) - HOPELESS]
    best = max(fits, key=_Fit.evidence)
    assert best.learned  # noqa: S101
    return best.learned, best.pair()


class _Fit:
    """The loop: condition both processes, see what each block says of the others, weigh and fill in, again."""

    def __init__(
        self, scale: Scale, data: Data, learned: Learned | None = None, *, suspecting: bool = False
    ) -> None:
        self.scale, self.data, self.learned = scale, data, learned
        self.inputs = scale.inputs(data.raw)
        z = scale.of_bytes(data.kv_bytes, data.raw)
        self.bound = np.where(
            data.capped, z, scale.of_bytes(np.broadcast_to(data.floor_bytes, z.shape), data.raw)
        )
        self.complete: Mask = np.asarray(data.measured.all(axis=1))
        self.known = Known(np.where(data.measured, z, 0.0), np.where(data.measured, 0.0, UNKNOWN))
        start = np.where(self.complete[:, None], z, 0.0)[self.complete]
        self.suspecting = suspecting
        self.suspected = self._suspects() if suspecting else np.zeros(len(z), dtype=bool)
        self.doubt = np.where(self.suspected, SUSPECTED, 1.0)
        centre = np.median(start, axis=0)
        self.expected = [np.full(len(z), centre.mean()), np.full(len(z), centre[0] - centre[1])]
        self.unknown = Moments(self.expected[1], np.full(len(z), UNKNOWN), 1.0)
        self.processes: tuple[Mixture, Mixture] | None = None

    def _suspects(self) -> Mask:
        """Complete blocks that the law cannot explain beside the others, in what arms have in common or in what they differ by."""
        found = np.zeros(len(self.data.raw), dtype=bool)
        if self.scale.family is None or self.complete.sum() < FEWEST_FOR_OUTLIERS:
            return found
        values = (self.known.mean.mean(axis=1), self.known.mean[:, 0] - self.known.mean[:, 1])
        for inputs, each in zip(self.inputs, values, strict=True):
            found[self.complete] |= outlying(inputs.certain[self.complete], each[self.complete])
        return found

    def evidence(self) -> float:
        """With what speaks for a law, and against each outlier, before the first block."""
        outliers = int((self.doubt[self.complete] > DOUBTED).sum())
        by_law = LAW_FAVOUR * (self.scale.family is not None)
        assert self.processes  # noqa: S101
        of_caps = self.log_chance_of_caps(*map(Moments.of, self.processes))
        return self.pair().evidence(self.data) + of_caps + by_law - OUTLIER_ODDS * outliers

    def pair(self) -> Pair:
        assert self.processes  # noqa: S101
        return Pair(self.scale, self.data.raw, self.processes, self.complete, self.doubt)

    def learn(self) -> None:
        """A process under each prior; weights by how well blocks predict each other."""
        noises = [process.noise_variance for process in self.processes] if self.processes else [1.0, 1.0]
        found = []
        for place, (inputs, (values, multipliers)) in enumerate(
            zip(self.inputs, self._targets(noises), strict=True)
        ):
            hypers, evidence = [], []
            for prior, favour, start in self._priors(place):
                hyper = Hyperparameters.learn(prior, inputs, values, multipliers, start=start)
                process = Process(hyper, inputs, values, multipliers)
                hypers.append(hyper)
                evidence.append(
                    favour + log_evidence(process, self.complete) + self._foresees_caps(process, place)
                )
            found.append(_weighted(hypers, np.array(evidence)))
        common, difference = found
        self.learned = Learned(common, difference, self.suspecting)

    def _priors(self, place: int) -> Iterator[tuple[Prior, float, Hyperparameters | None]]:
        """A rough one is tried only when outliers are known: it would explain each of them.

        What arms differ by may be as smooth as a bell, though narrow; or go with the product of batch and tokens, as much
        memory does: a ridge across both axes.
        """
        start = (self.learned.common, self.learned.difference)[place][0][1] if self.learned else None
        smooth, rough = (SMOOTH, ROUGH) if self.scale.family else (PLAIN, PLAIN_ROUGH)
        yield smooth[place], SMOOTH_FAVOUR, start
        if self.scale.family:
            others = self._simple_differences() if place else self._other_knees()
            yield STRICT[place], STRICT_FAVOUR + np.log(USUAL_SHARE if others else 1.0), None
            for prior in others:
                yield prior, STRICT_FAVOUR + np.log((1 - USUAL_SHARE) / len(others)), None
        if self.learned:
            yield rough[place], 0.0, None
            if self.inputs[place].cube.shape[1] == 1:
                yield replace(rough[place], length=STEP_LENGTH), 0.0, None
            if place:
                yield replace(rough[place], gaussian=True), 0.0, None
            if place and self.scale.cube.product:
                yield replace(rough[place], turned=self.scale.cube.product), 0.0, None

    def _other_knees(self) -> list[Prior]:
        """Those that the blocks can tell from the usual one, and from each other."""
        batch = self.scale.engine(self.data.raw[self.complete])[:, 0]
        seen, found = {np.minimum(batch, law.KNEE).tobytes()}, []
        for prior, knee in zip(OTHER_KNEE, law.OTHER_KNEES, strict=True):
            column = np.minimum(batch, knee).tobytes()
            if column not in seen and np.ptp(np.minimum(batch, knee)):
                found.append(prior)
            seen.add(column)
        return found

    def _simple_differences(self) -> list[Prior]:
        return [EVEN] if self.inputs[1].certain[:, EVEN.doubted].any() else []

    def settle(self) -> None:
        self._condition()
        if (self.complete.sum() < len(self.complete)) or len(self.complete) >= FEWEST_FOR_OUTLIERS:
            for _ in range(PASSES):
                self._weigh_and_fill_in()
                self._condition()

    def _targets(self, noises: list[float]) -> list[tuple[Floats, Floats]]:
        """Values and multipliers of their noise, for common and difference; what is not known is as expected."""
        difference = Moments.of(self.processes[1]) if self.processes else self.unknown
        found = []
        for (values, variance), expected, noise in zip(
            (self.known.common(difference), self.known.difference()), self.expected, noises, strict=True
        ):
            multipliers = np.minimum(self.doubt + variance / noise, MOST_NOISE)
            found.append((np.where(multipliers < MOST_NOISE, values, expected), multipliers))
        return found

    def _condition(self) -> None:
        assert self.learned  # noqa: S101
        learned = (self.learned.common, self.learned.difference)
        targets = self._targets([sum(w * hyper.noise_variance for w, hyper in each) for each in learned])
        known = {id(each.hyper): each for mixture in self.processes or () for each in mixture.processes}
        common, difference = (
            Mixture(
                tuple(weight for weight, _ in weighted),
                tuple(
                    Process(hyper, inputs, values, multipliers, alike=known.get(id(hyper)))
                    for _, hyper in weighted
                ),
            )
            for weighted, inputs, (values, multipliers) in zip(learned, self.inputs, targets, strict=True)
        )
        self.processes = common, difference

    def _weigh_and_fill_in(self) -> None:
        assert self.processes  # noqa: S101
        common, difference = (Moments.of(process) for process in self.processes)
        self.expected = [common.mean, difference.mean]
        self._weigh([m.errors(p.values) for m, p in zip((common, difference), self.processes, strict=True)])
        mean, variance = self.known.mean.copy(), self.known.variance.copy()
        for arm, predicted, function, noise in of_arms(common, difference):
            bound, failed = self.bound[:, arm], self.data.failed[:, arm]
            explained = (
                failed & ((bound - predicted) / np.sqrt(function + noise) > CLIFF) & np.isfinite(bound)
            )
            mean[failed, arm], variance[failed, arm] = 0.0, UNKNOWN
            for rows, side in ((self.data.capped[:, arm], 1.0), (explained, -1.0)):
                mean[rows, arm], variance[rows, arm] = one_sided(
                    bound[rows], side, predicted[rows], function[rows], noise
                )
        self.known = Known(mean, variance)

    def _foresees_caps(self, process: Process, place: int) -> float:
        """As `log_chance_of_caps`, with what is known of the other process."""
        if not self.processes:
            return 0.0
        own, other = Moments.of(process), Moments.of(self.processes[1 - place])
        return self.log_chance_of_caps(*((other, own) if place else (own, other)))

    def log_chance_of_caps(self, common: Moments, difference: Moments) -> float:
        """That capped arms have at least their caps: no numbers that other blocks could predict, and yet they tell laws apart.

        Failures do not count: they may have another cause, and a vague law would explain more of them.
        """
        capped, found = self.data.capped, 0.0
        counts = np.where(capped.all(axis=1), 0.5, 1.0)  # what is common to both arms is told once
        for arm, predicted, function, noise in of_arms(common, difference):
            rows = capped[:, arm]
            above = ((predicted - self.bound[:, arm]) / np.sqrt(function + noise))[rows]
            found += float(counts[rows] @ np.log(OTHERWISE + (1 - OTHERWISE) * ndtr(above)))
        return found

    def _weigh(self, errors: list[Floats]) -> None:
        """Outliers by the spread of most blocks, as one that is inflated by outliers hides them."""
        doubt = np.ones(len(self.doubt))
        usual = self.complete & ~self.suspected
        if self.complete.sum() >= FEWEST_FOR_OUTLIERS:
            for each in errors:
                spread = max(1.4826 * float(np.median(np.abs(each[usual]))), 0.5)
                off = np.where(self.complete, np.abs(each) / spread / OUTLYING, 0.0)
                # Half let in, suspects would draw the fit towards them until they are none.
                own = np.where(self.suspected & (off > 1), (OUTLYING * off) ** 2, 1.0)
                doubt = np.maximum(doubt, np.minimum(np.maximum(off**4, own), MOST_NOISE / 10))
        self.doubt = doubt
