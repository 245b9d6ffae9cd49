"""The map's model, on machines that are not there: laws, noise, outliers, caps, failures, and where to look next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ray.search import acquire, law
from spark_ray.search.blocks import Data
from spark_ray.search.cube import Axis, Cube
from spark_ray.search.kernel import Regressor
from spark_ray.search.mixture import Mixture, Moments
from spark_ray.search.pair import DOUBTED, EVEN, OTHER_KNEE, OTHERWISE, _Fit
from spark_ray.search.process import Hyperparameters, Inputs, Prior, Process
from spark_ray.search.scale import Scale
from spark_ray.search.surrogate import Observation, Surrogate, TooFewBlocks
from spark_ray.search.target import Target
from spark_ray.search_spec import Space

GIB = float(1 << 30)
SPACE = Space.model_validate(
    {
        "max_batch_size": {"low": 1, "high": 256, "log": True},
        "max_num_tokens": {"low": 256, "high": 32768, "log": True},
        "memory_fraction": {"low": 0.3, "high": 0.95},
    }
)
CUBE = Cube.of(SPACE)
LINE = Space.model_validate(
    {"max_batch_size": 8, "max_num_tokens": {"low": 256, "high": 32768, "log": True}, "memory_fraction": 0.9}
)


def peak_gib(raw):
    return 70 + 12 * raw[:, 1] / 32768 + 6 * np.minimum(raw[:, 0], 128) / 128


def more_gib(raw):
    return 0.6 + 0.8 * np.log2(raw[:, 0]) / 8 + 7 * raw[:, 1] / 32768


def memfree(raw):
    free = 119.7 - peak_gib(raw)
    return np.stack([raw[:, 2] * free, raw[:, 2] * (free - more_gib(raw))], axis=1)


def memavailable(raw):
    a = raw[:, 2] * 119.7 - peak_gib(raw) / 4
    return np.stack([a, a - more_gib(raw)], axis=1)


def no_law(raw):
    u = CUBE.unit(raw)
    a = 20 * np.exp(np.sin(5 * u[:, 0]) * np.cos(4 * u[:, 1]) + 0.4 * np.sin(6 * u[:, 2]))
    return np.stack([a, a * (0.85 - 0.1 * np.sin(6 * u[:, 1]))], axis=1)


def measure(machine, raw, *, seed=0, noise_gib=0.3, cap_gib=np.inf, least_gib=0.0, spoiled=()):
    random = np.random.default_rng(seed)
    kv = machine(raw) + raw[:, 2:] * noise_gib * (
        random.standard_normal((len(raw), 2)) + random.standard_normal((len(raw), 1))
    )
    for row, arm, gib in spoiled:
        kv[row, arm] += gib
    return [
        Observation(
            configuration,
            tuple(min(x, cap_gib) * GIB if x >= least_gib else None for x in of_arms),
            tuple(bool(x > cap_gib) for x in of_arms),
        )
        for configuration, of_arms in zip(CUBE.configurations(raw), kv, strict=True)
    ]


def fit(machine=memfree, blocks=20, *, law=True, **how):
    return Surrogate.fit(SPACE, measure(machine, CUBE.filling(blocks, 3), **how), law=law, seed=3)


ELSEWHERE = CUBE.filling(256, 99)


def errors(surrogate, machine):
    """Relative error of the baseline's capacity, and absolute error of the contrast."""
    said, true = surrogate.predict(ELSEWHERE), machine(ELSEWHERE)
    return (
        np.abs(said.kv_a_mean / GIB / true[:, 0] - 1),
        np.abs(said.contrast_mean - (1 - true[:, 1] / true[:, 0])),
    )


# ---- the space as numbers -----------------------------------------------------------------------------------------


@given(unit=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_what_can_be_run_is_near_and_stays_what_it_is(unit):
    raw = CUBE.snap(np.array([unit]))
    again = CUBE.snap(CUBE.unit(raw))
    np.testing.assert_allclose(again, raw, rtol=1e-12)
    (configuration,) = CUBE.configurations(raw)
    assert isinstance(configuration["max_batch_size"], int)
    assert 1 <= configuration["max_batch_size"] <= 256
    assert 0.3 <= configuration["memory_fraction"] <= 0.95
    np.testing.assert_array_equal(CUBE.raw([configuration]), raw)


def test_only_axes_that_vary_are_in_the_unit_cube():
    cube = Cube.of(LINE)
    assert cube.dimensions == 1
    assert len(cube.corners()) == 2
    assert set(cube.filling(8, 0)[:, 0]) == {8}
    fixed = Cube.of(
        Space.model_validate({"max_batch_size": 8, "max_num_tokens": 512, "memory_fraction": 0.5})
    )
    assert fixed.configurations(fixed.filling(2, 0))[1] == {
        "max_batch_size": 8, "max_num_tokens": 512, "memory_fraction": 0.5,
    }  # fmt: skip


def test_listed_values_are_spread_by_rank_and_tokens_hold_the_batch():
    axis = Axis("max_batch_size", 1, 512, integer=True, levels=(1, 8, 512))
    np.testing.assert_allclose(axis.unit(np.array([1.0, 8, 512])), [0, 0.5, 1])
    np.testing.assert_allclose(axis.value(np.array([0.1, 0.6, 0.9])), [1, 8, 512])
    space = {"max_batch_size": {"low": 1, "high": 512}, "max_num_tokens": {"low": 64, "high": 1024}}
    tied = Cube.of(Space.model_validate({**space, "memory_fraction": 0.5}))
    raw = np.vstack([tied.filling(64, 0), tied.corners()])
    assert (raw[:, 1] >= raw[:, 0]).all()


def test_a_longer_filling_begins_with_a_shorter_one():
    np.testing.assert_array_equal(CUBE.filling(50, 5)[:7], CUBE.filling(7, 5))
    assert not np.array_equal(CUBE.filling(7, 5), CUBE.filling(7, 6))


# ---- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "machine"), [("memfree", memfree), ("memavailable", memavailable)])
def test_capacity_is_linear_in_the_columns_of_its_law(family, machine):
    columns = law.basis(family, ELSEWHERE)
    capacity = machine(ELSEWHERE)[:, 0]
    _, (residual,), rank, _ = np.linalg.lstsq(columns, capacity, rcond=None)
    assert rank == columns.shape[1]
    assert residual < 1e-18 * (capacity**2).sum()


@pytest.mark.parametrize(
    ("machine", "family"), [(memfree, "memfree"), (memavailable, "memavailable"), (no_law, None)]
)
def test_the_family_is_told_by_the_blocks(machine, family):
    assert fit(machine, 40).family == family


def test_with_a_law_few_blocks_are_enough():
    capacity, contrast = errors(fit(blocks=12), memfree)
    assert np.median(capacity) < 0.01
    assert np.median(contrast) < 0.01
    without = errors(fit(blocks=12, law=False), memfree)
    assert np.median(without[0]) > np.median(capacity)


def test_a_step_that_no_law_foresees_is_found_on_a_line():
    line = Cube.of(LINE)
    raw = line.filling(16, 3)
    kv = memfree(raw)
    kv[:, 1] -= 3 * raw[:, 2] * (raw[:, 1] > 3000)
    blocks = [
        Observation(each, tuple(GIB * of_arms))
        for each, of_arms in zip(line.configurations(raw), kv, strict=True)
    ]
    places = line.filling(200, 9)
    said = Surrogate.fit(LINE, blocks, seed=3).predict(places)
    beyond = places[:, 1] > 3000
    clear = np.abs(np.log2(places[:, 1] / 3000)) > 0.5
    step = said.kv_a_mean - said.kv_b_mean - GIB * 0.9 * more_gib(places)
    assert ((step > 1.35 * GIB) == beyond)[clear].all()


def test_a_machine_without_a_law_is_learned_by_the_residual():
    capacity, _ = errors(fit(no_law, 96), no_law)
    assert np.median(capacity) < 0.05


# ---- a process ----------------------------------------------------------------------------------------------------


def line_process(values, multipliers, drift=0.02):
    at = np.linspace(0, 1, len(values))[:, None]
    inputs = Inputs(at, np.ones_like(at), at)
    prior = Prior(doubtful=0.5, residual=1.0, noise=0.1, drift=drift)
    return Process(Hyperparameters.learn(prior, inputs, values, multipliers), inputs, values, multipliers)


def test_leave_one_out_is_what_leaving_one_out_gives():
    random = np.random.default_rng(0)
    multipliers = random.uniform(1, 4, 12)
    process = line_process(np.sin(np.arange(12.0)) + 5, multipliers, drift=1e-6)
    mean, variance = process.leave_one_out()
    for left in range(12):
        rest = np.arange(12) != left
        fewer = Process(process.hyper, process.inputs[rest], process.values[rest], multipliers[rest])
        alone, function = fewer.predict(process.inputs[~rest])
        np.testing.assert_allclose(alone, mean[left], rtol=1e-6)
        noise = multipliers[left] * process.noise_variance
        np.testing.assert_allclose(function + noise, variance[left], rtol=1e-4)


def test_as_if_measured_keeps_the_mean_and_takes_the_variance_that_was_foreseen():
    process = line_process(np.cos(np.arange(9.0)), np.ones(9))
    there, places = process.inputs[[2]], Inputs(*[np.linspace(0, 1.3, 30)[:, None]] * 3)
    mean, variance = process.predict(places)
    mean_then, variance_then = process.with_(there).predict(places)
    np.testing.assert_allclose(mean_then, mean, atol=1e-6)
    _, own = process.predict(there)
    taken = process.covariance(there, places)[0] ** 2 / (own + process.block_variance)
    np.testing.assert_allclose(variance_then, variance - taken, rtol=1e-3, atol=1e-9)


def test_a_value_with_much_noise_says_little():
    values = np.array([1.0, 1.1, 9.0, 1.2, 1.1, 1.0, 0.9])
    multipliers = np.where(values > 5, 1e5, 1.0)
    mean, _ = line_process(values, multipliers).predict(Inputs(*[np.array([[2 / 6]])] * 3))
    assert abs(mean[0] - 1.1) < 0.3


def test_what_neighbours_in_time_have_in_common_is_not_the_function():
    random = np.random.default_rng(1)
    drift = np.repeat([1.0, -1.0, 1.0, -1.0], 12)
    at = random.random((48, 1))
    inputs = Inputs(at, np.ones_like(at), at)
    values = 3 * at[:, 0] + drift + 0.1 * random.standard_normal(48)
    prior = Prior(doubtful=0.5, residual=0.1, noise=0.3, drift=0.1)
    even = np.ones(48)
    process = Process(Hyperparameters.learn(prior, inputs, values, even), inputs, values, even)
    assert process.noise_variance < 0.1 < process.block_variance
    places = np.linspace(0, 1, 20)[:, None]
    mean, variance = process.predict(Inputs(places, np.ones_like(places), places))
    assert (np.abs(mean - 3 * places[:, 0]) < 3 * np.sqrt(variance)).all()


def test_where_neighbours_tell_the_same_fewer_blocks_tell_of_a_constant():
    """As many as the variance of a constant's estimate says."""
    at = np.linspace(0, 1, 40)[:, None]
    inputs = Inputs(at, np.ones_like(at), at)

    def independent(drift, noise):
        kernel, _ = Prior(doubtful=0.5, residual=1.0, noise=noise, drift=drift).kernel(inputs)
        return Process(Hyperparameters(kernel, 0.0, 1.0), inputs, at[:, 0], np.ones(40)).independent_values

    assert independent(drift=1e-6, noise=0.5) == pytest.approx(40, rel=1e-3)
    assert independent(drift=0.8, noise=0.4) < 10
    assert (
        independent(drift=0.1, noise=0.4)
        > independent(drift=0.2, noise=0.4)
        > independent(drift=0.8, noise=0.4)
    )


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_likelihood_that_is_worked_out_at_once_is_scikit_learns(gaussian):
    random = np.random.default_rng(2)
    inputs = Inputs(random.random((15, 2)), np.ones((15, 1)), random.random((15, 3)))
    kernel, spread = Prior(doubtful=0.3, residual=0.5, noise=0.3, gaussian=gaussian).kernel(inputs)
    rows = inputs.matrix(random.uniform(1, 3, 15), np.arange(15.0))
    regressor = Regressor(kernel, spread=spread).fit(rows, random.standard_normal(15))
    theta = kernel.theta + 0.3 * random.standard_normal(kernel.n_dims)
    found, gradient = regressor.log_marginal_likelihood(theta, eval_gradient=True)
    assert found == pytest.approx(regressor.log_marginal_likelihood(theta))
    for place, slope in enumerate(gradient):
        step = np.eye(kernel.n_dims)[place] * 1e-5
        ends = [regressor.log_marginal_likelihood(theta + sign * step) for sign in (1, -1)]
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-3)


def test_where_processes_disagree_a_mixture_knows_less_and_learns_more():
    at, places = np.linspace(0, 1, 9)[:, None], Inputs(*[np.linspace(0, 1.5, 20)[:, None]] * 3)
    inputs, values, even = Inputs(at, np.ones_like(at), at), np.sin(9 * at[:, 0]), np.ones(9)
    alone = [
        Process(Hyperparameters.learn(Prior(0.5, 1.0, 0.1, length=length), inputs, values, even), inputs, values, even)
        for length in (0.1, 2.0)
    ]  # fmt: skip
    both = Mixture((0.5, 0.5), tuple(alone))
    (mean, variance), _, covariance = both.joint(places, places)
    np.testing.assert_allclose(np.diag(covariance), variance, rtol=1e-4, atol=1e-7)
    (first, own), (second, other) = (each.predict(places) for each in alone)
    np.testing.assert_allclose(mean, (first + second) / 2)
    np.testing.assert_allclose(variance, (own + other) / 2 + (first - second) ** 2 / 4)


# ---- simple laws among which the blocks choose ------------------------------------------------------------------


def weight(mixture, prior):
    """Of the processes in a mixture that are sure of the same columns as a prior."""
    process = mixture.processes[0]
    wanted = prior.kernel(process.inputs)[0].certain
    pairs = zip(mixture.weights, mixture.processes, strict=True)
    return sum(own for own, each in pairs if each.hyper.kernel.certain == wanted)


@pytest.mark.parametrize("place", range(len(law.OTHER_KNEES)))
def test_which_knee_an_engine_has_is_learned(place):
    def machine(raw):
        graphs = np.minimum(raw[:, 0], law.OTHER_KNEES[place]) / law.OTHER_KNEES[place]
        peak = 70 + 12 * raw[:, 1] / 32768 + 6 * graphs
        free = 119.7 - peak
        return raw[:, 2:] * np.stack([free, free - more_gib(raw)], axis=1)

    surrogate = fit(machine, 32)
    assert weight(surrogate.pair.common, OTHER_KNEE[place]) > 0.6
    assert np.median(errors(surrogate, machine)[0]) < 0.004


def test_knees_that_the_blocks_cannot_tell_apart_are_not_weighed():
    def others(batches):
        raw = CUBE.filling(len(batches), 3)
        raw[:, 0] = batches
        kv = GIB * memfree(raw)
        return _Fit(Scale(CUBE, "memfree"), Data(raw, kv, np.zeros((len(raw), 2), dtype=bool)))._other_knees()

    assert others([1, 20, 40, 100, 256]) == list(OTHER_KNEE)
    assert others([1, 20, 40, 100, 120]) == list(OTHER_KNEE[:2])  # beyond the batches 256 is as 128
    assert others([1, 2, 4, 8, 16]) == []
    assert others([64, 80, 100, 200, 256]) == [OTHER_KNEE[2]]  # of 32 and 64 all batches are beyond
    assert others([8, 8, 8, 8, 8]) == []


def test_arms_that_differ_by_as_much_everywhere_are_found_so_and_known_better():
    def even(raw):
        a = raw[:, 2] * (119.7 - peak_gib(raw))
        return np.stack([a, a - raw[:, 2] * 1.5], axis=1)

    found, steep = ([fit(machine, 40, seed=seed) for seed in range(5)] for machine in (even, memfree))
    assert np.mean([weight(each.pair.difference, EVEN) for each in found]) > 0.3
    assert all(weight(each.pair.difference, EVEN) == 0 for each in steep)
    of_even, of_steep = (
        [np.median(each.predict(ELSEWHERE).contrast_sd) for each in several] for several in (found, steep)
    )
    assert np.median(of_even) < 0.9 * np.median(of_steep)


# ---- what is not a plain number -----------------------------------------------------------------------------------


def test_a_block_that_all_others_contradict_counts_less_until_it_is_confirmed():
    surrogate = fit(blocks=24, spoiled=[(5, 1, -6.0)])
    assert np.median(errors(surrogate, memfree)[1]) < 0.01
    np.testing.assert_array_equal(surrogate.pair.raw[surrogate.contradicted()], CUBE.filling(24, 3)[[5]])
    twice = np.vstack([CUBE.filling(24, 3), CUBE.filling(24, 3)[[5]]])
    again = Surrogate.fit(SPACE, measure(memfree, twice, spoiled=[(5, 1, -6.0)]), seed=3)
    assert not again.contradicted().any()


def test_several_bursts_among_few_blocks_mislead_nobody():
    spoiled = [(2, 1, -6.0), (7, 0, -6.0), (9, 1, -6.0)]
    surrogate = fit(blocks=14, spoiled=spoiled)
    assert np.flatnonzero(surrogate.contradicted()).tolist() == [2, 7, 9]
    assert np.median(errors(surrogate, memfree)[1]) < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_bursts_of_one_arm_in_a_fifth_of_the_blocks_are_not_believed(seed):
    """They agree with each other, and a fit that lets a little of each in lets in all."""
    rows = [2, 6, 10, 12]
    surrogate = fit(blocks=20, seed=seed, noise_gib=0.7, spoiled=[(row, 1, -6.5) for row in rows])
    assert np.flatnonzero(surrogate.pair.doubt > DOUBTED).tolist() == rows
    assert np.median(errors(surrogate, memfree)[1]) < 0.012


def test_a_law_that_holds_is_learned_as_well_as_if_nothing_else_were_thought_of():
    ours, least_squares = [], []
    for seed in range(6):
        raw = CUBE.filling(14, 3)
        observed = measure(memavailable, raw, seed=seed, noise_gib=0.7)
        kv = np.array([each.kv for each in observed]) / GIB
        terms = law.difference_terms(raw)
        coefficients = np.linalg.lstsq(terms, kv[:, 0] - kv[:, 1], rcond=None)[0]
        off = np.abs(law.difference_terms(ELSEWHERE) @ coefficients - more_gib(ELSEWHERE))
        least_squares.append(np.median(off / memavailable(ELSEWHERE)[:, 0]))
        surrogate = Surrogate.fit(SPACE, observed, seed=3)
        ours.append(np.median(errors(surrogate, memavailable)[1]))
    assert np.mean(ours) < 1.5 * np.mean(least_squares)


def test_a_cap_says_at_least_and_bounds_what_is_predicted():
    surrogate = fit(blocks=40, cap_gib=26.0)
    said, true = surrogate.predict(ELSEWHERE), memfree(ELSEWHERE)
    assert said.kv_a_mean.max() <= 26 * GIB * 1.0001
    capped = true[:, 0] > 27
    assert capped.any()
    assert (said.kv_a_mean[capped] > 25.5 * GIB).all()
    error = np.abs(said.contrast_mean - (1 - np.minimum(true[:, 1], 26) / np.minimum(true[:, 0], 26)))
    assert np.median(error) < 0.01


def test_who_foresees_caps_is_believed_more():
    """They are no numbers that blocks could predict from each other, and yet tell laws apart."""
    capped = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [0, 0]], dtype=bool)
    kv = GIB * np.array([[30, 28], [26, 25], [27, 27], [np.nan, np.nan], [20, 19]])
    fitted = _Fit(Scale(CUBE, None), Data(CUBE.filling(5, 3), kv, capped))

    def chance(*of_both):
        even = np.full(5, 1e-4)
        common = Moments(np.log(GIB * np.array([*of_both, 20])), even, 1e-4)
        return np.exp(fitted.log_chance_of_caps(common, Moments(0 * even, even, 1e-4)))

    assert chance(40, 40, 40, 22) == pytest.approx(1, abs=1e-3)
    for off in ((20, 40, 40, 22), (40, 20, 40, 22), (40, 40, 20, 22)):  # both of one block: once
        assert chance(*off) == pytest.approx(OTHERWISE, rel=1e-3)
    assert chance(40, 40, 40, 99) == chance(40, 40, 40, 22)  # what failed has its own causes


@pytest.mark.parametrize(("axis", "edge"), [(1, 2048), (0, 16)])
def test_failures_behind_a_cliff_do_not_overturn_the_law(axis, edge):
    """Over half of the space both arms fail for a cause of their own, which a vague law would find less surprising."""
    raw = CUBE.filling(24, 3)
    beyond = raw[:, axis] > edge
    told = [
        Observation(each.configuration, (None, None)) if fails else each
        for each, fails in zip(measure(memfree, raw), beyond, strict=True)
    ]
    surrogate = Surrogate.fit(SPACE, told, seed=3)
    assert beyond.mean() > 0.4
    assert surrogate.family == "memfree"
    assert np.median(errors(surrogate, memfree)[0][ELSEWHERE[:, axis] <= edge]) < 0.01


def test_without_blocks_of_both_arms_there_is_nothing_to_compare():
    blocks = measure(memfree, CUBE.filling(2, 0))
    with pytest.raises(TooFewBlocks):
        Surrogate.fit(SPACE, blocks, seed=0)
    with pytest.raises(TooFewBlocks):
        Surrogate.fit(
            SPACE, [Observation(each.configuration, (each.kv[0], None)) for each in blocks * 3], seed=0
        )


def test_an_arm_that_failed_leaves_the_other_one_telling():
    blocks = measure(memfree, CUBE.filling(24, 3))
    alone = [
        Observation(b.configuration, (b.kv[0], None)) if place % 3 == 0 else b
        for place, b in enumerate(blocks)
    ]
    surrogate = Surrogate.fit(SPACE, alone, seed=3)
    assert np.median(errors(surrogate, memfree)[0]) < 0.01


# ---- bands --------------------------------------------------------------------------------------------------------


def test_bands_hold_what_they_promise_and_are_never_narrowed():
    inside = []
    for seed in range(6):
        surrogate = fit(blocks=20, seed=seed)
        assert min(surrogate.widening) >= 1
        said, true = surrogate.predict(ELSEWHERE), memfree(ELSEWHERE)
        off = np.abs(said.contrast_mean - (1 - true[:, 1] / true[:, 0]))
        inside.append((off <= 1.96 * said.contrast_sd).mean())
    assert np.mean(inside) > 0.85


def test_on_a_host_that_drifts_bands_hold_too():
    """Twenty blocks of which neighbours tell the same tell of the constant as few independent ones do."""
    held = []
    for seed in range(7, 12):
        random = np.random.default_rng(seed)
        raw, drift = CUBE.filling(20, seed), [1.5 * random.standard_normal()]
        for _ in range(19):
            drift.append(0.8 * drift[-1] + 1.5 * 0.6 * random.standard_normal())
        taken = [(row, arm, raw[row, 2] * gib) for row, gib in enumerate(drift) for arm in (0, 1)]
        observed = measure(memfree, raw, seed=seed, spoiled=taken)
        said = Surrogate.fit(SPACE, observed, seed=seed).predict(ELSEWHERE)
        off = np.abs(said.kv_a_mean / GIB - memfree(ELSEWHERE)[:, 0])
        held.append((off < 1.96 * said.kv_a_sd / GIB).mean())
    assert min(held) > 0.8, held


def test_noise_is_told_in_bytes_of_one_arm():
    surrogate = fit(blocks=64, noise_gib=0.5)
    fraction_in_the_middle = 0.625
    assert surrogate.noise_sd_bytes / GIB == pytest.approx(0.5 * fraction_in_the_middle, rel=0.35)


def test_bands_are_wider_where_blocks_are_few():
    few, many = (fit(blocks=count) for count in (8, 64))
    assert min(few.widening) >= 1.4, "Student's t with 4 degrees of freedom, over the normal"
    assert max(many.widening) < 1.2


def test_the_same_blocks_say_the_same_however_often_one_asked():
    blocks = measure(memfree, CUBE.filling(20, 3))
    for count in range(5, 20):
        Surrogate.fit(SPACE, blocks[:count], seed=3)
    one = Surrogate.fit(SPACE, blocks, seed=3).predict(ELSEWHERE)
    from spark_ray.search import surrogate as module

    module._learn.cache_clear()
    module._fit.cache_clear()
    other = Surrogate.fit(SPACE, blocks, seed=3).predict(ELSEWHERE)
    np.testing.assert_array_equal(one.contrast_mean, other.contrast_mean)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    blocks=st.integers(4, 14),
    fails=st.sets(st.tuples(st.integers(0, 13), st.integers(0, 1))),
    capped=st.sets(st.tuples(st.integers(0, 13), st.integers(0, 1))),
)
def test_whatever_blocks_say_predictions_are_finite(seed, blocks, fails, capped):
    told = []
    for place, each in enumerate(measure(memfree, CUBE.filling(blocks, seed), seed=seed)):
        kv = tuple(None if (place, arm) in fails else each.kv[arm] for arm in (0, 1))
        told.append(Observation(each.configuration, kv, tuple((place, arm) in capped for arm in (0, 1))))
    try:
        surrogate = Surrogate.fit(SPACE, told, seed=seed)
    except TooFewBlocks:
        return
    said = surrogate.predict(ELSEWHERE[:32])
    for name in ("kv_a_mean", "kv_b_mean", "contrast_mean"):
        assert np.isfinite(getattr(said, name)).all()
    assert (said.contrast_sd >= 0).all()
    a, b, both = said.feasible_a, said.feasible_b, said.feasible_both
    for chance in (a, b, both):
        assert ((chance >= 0) & (chance <= 1)).all()
    assert ((both >= a + b - 1 - 1e-9) & (both <= np.minimum(a, b) + 1e-9)).all()
    (chosen,) = acquire.next_points(surrogate, SPACE, Target(), 1, [], seed)
    assert set(chosen) == {"max_batch_size", "max_num_tokens", "memory_fraction"}


def test_a_contrast_is_the_same_whatever_else_is_asked():
    """Small capacities beside large ones: equal arms do not differ."""
    small = fit(memavailable, 20)
    raw = np.array([[256.0, 32768.0, 0.3], [1.0, 256.0, 0.95], [16.0, 1024.0, 0.5]])
    together = small.predict(raw)
    for row, alone in enumerate(raw):
        one = small.predict(alone[None])
        assert one.contrast_mean[0] == pytest.approx(together.contrast_mean[row], abs=1e-8)
    a = np.array([0.004, 1.0]) * small.measured_bytes[1]
    np.testing.assert_array_equal(small.contrast(a, a), 0.0)


def test_rates_below_one_are_compared_as_any_other():
    observed = [
        Observation(each.configuration, tuple(kv / GIB / 1e3 for kv in each.kv))
        for each in measure(memfree, CUBE.filling(20, 3))
    ]
    said = Surrogate.fit(SPACE, observed, law=False, seed=3).predict(ELSEWHERE)
    true = 1 - memfree(ELSEWHERE)[:, 1] / memfree(ELSEWHERE)[:, 0]
    assert np.median(np.abs(said.contrast_mean - true)) < 0.02


def test_what_makes_a_block_fail_may_be_drift():
    """Noise of a block is what it meets: the host's drift too."""
    raw, drift = CUBE.filling(24, 3), np.repeat([3.0, -3.0, 3.0, -3.0], 6)
    taken = [(row, arm, raw[row, 2] * gib) for row, gib in enumerate(drift) for arm in (0, 1)]
    surrogate = Surrogate.fit(SPACE, measure(memfree, raw, spoiled=taken), seed=3)
    of_block, of_function = (
        surrogate.moments(raw, surrogate.latent(raw), noise=noise)[1][0] for noise in (True, False)
    )
    drift_bytes = raw[:, 2] * np.sqrt(
        surrogate.pair.common.block_variance - surrogate.pair.common.noise_variance
    )
    assert (np.hypot(of_function, drift_bytes) <= of_block * 1.001).all()
    assert np.median(drift_bytes / GIB / raw[:, 2]) > 1.0


# ---- what no law foresees


def test_a_narrow_ridge_along_the_product_of_batch_and_tokens_is_found_as_one():
    def machine(raw):
        kv = memfree(raw)
        ridge = 4 * np.exp(-(((np.log2(raw[:, 0] * raw[:, 1]) - 16) / 1.5) ** 2))
        return np.stack([kv[:, 0], kv[:, 0] - raw[:, 2] * ridge], axis=1)

    surrogate = Surrogate.fit(SPACE, measure(machine, CUBE.filling(80, 3)), seed=3)
    weights = {
        process.hyper.kernel.turned: weight
        for weight, process in zip(
            surrogate.pair.difference.weights, surrogate.pair.difference.processes, strict=True
        )
    }
    assert weights[CUBE.product] > 0.9
    assert np.median(errors(surrogate, machine)[1]) < 0.01


def test_what_is_as_smooth_as_a_bell_is_learned_as_one():
    def machine(raw):
        kv, away = memfree(raw), np.square(CUBE.unit(raw) - 0.4).sum(axis=1)
        return np.stack([kv[:, 0], kv[:, 0] - raw[:, 2] * 8 * np.exp(-away / (2 * 0.2**2))], axis=1)

    surrogate = Surrogate.fit(SPACE, measure(machine, CUBE.filling(64, 3)), seed=3)
    of_difference = surrogate.pair.difference
    smooth = [process.hyper.kernel.gaussian for process in of_difference.processes]
    assert np.array(of_difference.weights)[smooth].sum() > 0.5
    assert np.quantile(errors(surrogate, machine)[1], 0.9) < 0.02


def test_the_product_is_an_axis_only_where_both_are_searched_by_their_logarithm():
    first, second, angle = CUBE.product
    assert (first, second) == (0, 1)
    assert np.tan(angle) == pytest.approx(7 / 8)  # 7 doublings of tokens, 8 of the batch
    assert Cube.of(LINE).product is None
    linear = SPACE.model_copy(
        update={"max_num_tokens": SPACE.max_num_tokens.model_copy(update={"log": False})}
    )
    assert Cube.of(linear).product is None


def test_a_step_on_a_line_is_one_and_not_noise():
    def machine(raw):
        kv = memfree(raw)
        return np.stack([kv[:, 0], kv[:, 0] - raw[:, 2] * 3.0 * (raw[:, 1] > 3000)], axis=1)

    surrogate = Surrogate.fit(LINE, measure(machine, Cube.of(LINE).filling(24, 3)), seed=3)
    lengths = [process.hyper.kernel.lengths[0] for process in surrogate.pair.difference.processes]
    assert min(lengths) < 0.13, "among those with a say"
