"""The map as a table, figures and sentences: over spaces of one to five axes, with laws, cliffs, choices and nothing at all."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import figures, map_axes, map_figures, map_table, map_words
from spark_ray import cli, power, predict
from spark_ray.search import space as searched
from spark_ray.search.stopping import decide
from spark_ray.search.surrogate import Observation, Surrogate
from spark_ray.search.target import Target
from spark_ray.search_spec import Space
from spark_ray.store import Store

GIB = float(1 << 30)
BATCH = {"low": 1, "high": 256, "log": True}
TOKENS = {"low": 256, "high": 32768, "log": True}
FRACTION = {"low": 0.3, "high": 0.95}
WHOLE = {"max_batch_size": BATCH, "max_num_tokens": TOKENS, "memory_fraction": FRACTION}
AT = ("max_batch_size=16", "max_num_tokens=4096", "memory_fraction=0.9")
ARMS = ("native", "container")


def held_gib(at):
    return 0.6 + 7 * at["max_num_tokens"] / 32768


def never(at):  # noqa: ARG001
    return False


def native_gib(at, more=0.0):
    return at["memory_fraction"] * (
        49.7 - 12 * at["max_num_tokens"] / 32768 - 6 * min(at["max_batch_size"], 128) / 128 - more
    )


def mapped(space=WHOLE, blocks=24, held=held_gib, fails=(never, never), sampler="map", law=True, seed=1):
    """A map of a machine that is not there: what native has less of, and where each arm fails, by functions."""
    of_space = searched.axes(Space.model_validate(space))
    random, known = np.random.default_rng(seed), []
    for place in of_space.cube.configurations(of_space.cube.filling(blocks, seed)):
        at = of_space.params(place)
        kv = native_gib(at), native_gib(at, held(at))
        a, b = (
            None if fail(at) else gib * GIB + random.normal(0, 0.2 * GIB)
            for gib, fail in zip(kv, fails, strict=True)
        )
        known.append(Observation(place, (a, b)))
    surrogate, target = Surrogate.fit(of_space.cube, known, law=law, seed=seed), Target()
    decision = decide(surrogate, target, known, blocks=blocks)
    return map_table.Map(surrogate, target, decision, tuple(known), of_space, ARMS, sampler)


@pytest.fixture(scope="module")
def steep():
    return mapped()


@pytest.fixture(scope="module")
def cliff():
    def ends(at):
        return at["max_num_tokens"] * at["max_batch_size"] > 2**18

    return mapped(blocks=48, fails=(never, ends))


@pytest.fixture(scope="module")
def choices():
    further = {"engine.kv_dtype": ["fp8", "auto"]}
    return mapped(
        WHOLE | {"further": further},
        blocks=32,
        held=lambda at: 5.0 if at["engine.kv_dtype"] == "fp8" else 0.3,
    )


# ---- the grid ---------------------------------------------------------------------------------------------

AXES = {
    "max_batch_size": st.sampled_from([BATCH, [1, 8, 64], 16]),
    "max_num_tokens": st.sampled_from([TOKENS, {"low": 64, "high": 512}, 4096]),
    "memory_fraction": st.sampled_from([FRACTION, [0.5, 0.9], 0.9]),
}
FURTHER = st.dictionaries(
    st.sampled_from(["engine.a", "engine.b"]),
    st.sampled_from([["fp8", "auto"], [True, False], {"low": "1GiB", "high": "4GiB"}]),
)


@settings(max_examples=25)
@given(st.fixed_dictionaries(AXES), FURTHER)
def test_the_grid_covers_what_can_be_asked_for_and_nothing_else(space, further):
    of_space = searched.axes(Space.model_validate(space | {"further": further}))
    cube = of_space.cube
    raw = map_table.grid(cube)
    assert 0 < len(raw) <= map_table.MOST_PLACES
    assert len(np.unique(raw, axis=0)) == len(raw)
    assert map_table.runnable(cube, raw).all()
    for column, axis in zip(raw.T, cube.axes, strict=True):
        assert axis.low <= column.min()
        assert column.max() <= axis.high
        assert {column.min(), column.max()} >= ({axis.high} if axis.varies else set())
    assert [of_space.numbers(of_space.params(each)) for each in cube.configurations(raw[:50])] == (
        cube.configurations(raw[:50])
    )


def test_long_lists_are_thinned_where_the_grid_would_be_too_large():
    lists = [list(range(1, 61)), list(range(100, 161)), [each / 100 for each in range(10, 60)]]
    raw = map_table.grid(searched.axes(Space(**dict(zip(WHOLE, lists, strict=True)))).cube)
    assert 10_000 < len(raw) <= map_table.MOST_PLACES
    assert [(column.min(), column.max()) for column in raw.T] == [(1, 60), (100, 160), (0.1, 0.59)]


def test_a_step_with_fewer_tokens_than_sequences_is_no_place_of_the_grid():
    cube = searched.axes(Space.model_validate(WHOLE | {"max_num_tokens": TOKENS | {"low": 16}})).cube
    raw = map_table.grid(cube)
    assert (raw[:, 1] >= raw[:, 0]).all()
    assert (raw[:, 1] < 256).any()


def test_the_table_says_what_the_surrogate_says(steep):
    rows = map_table.table(steep, simulated=True, double=False)
    at = rows.iloc[1234]
    said = steep.surrogate.predict([{name: at[name] for name in WHOLE}])
    assert at["kv_native_mean_bytes"] == pytest.approx(said.kv_a_mean[0])
    assert at["kv_container_sd_bytes"] == pytest.approx(said.kv_b_sd[0])
    assert at["contrast_mean"] == pytest.approx(said.contrast_mean[0])
    chance = rows["divergence_probability"]
    assert chance.between(0, 1).all()
    assert (rows["undecided"] == (chance.gt(0.025) & chance.lt(0.975))).all()
    assert rows["simulated"].all()
    assert not rows["engine_is_double"].any()
    assert rows.notna().all(axis=None)
    wider = dataclasses.replace(steep, decision=dataclasses.replace(steep.decision, widening=4.0))
    assert wider.undecided(wider.filling[1]).mean() > 1.5 * chance[rows["undecided"]].count() / len(rows)


def test_choices_are_written_as_words(choices):
    rows = map_table.table(choices, simulated=True, double=False)
    assert set(rows["engine.kv_dtype"]) == {"fp8", "auto"}
    by_choice = rows.groupby("engine.kv_dtype")["contrast_mean"].median()
    assert by_choice["fp8"] > 0.08
    assert by_choice["auto"] < 0.03


# ---- numbers and sentences --------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_share_lies_in_its_interval(chances):
    share = map_table.Share.of(np.array(chances))
    assert 0 <= share.low <= share.mean <= share.high <= 1


def test_the_share_that_diverges_is_the_true_one(steep):
    raw, _ = steep.filling
    places = steep.configurations(raw)
    truth = np.mean([native_gib(at, held_gib(at)) < 0.95 * native_gib(at) for at in places])
    share = steep.divergent
    assert share.low <= truth <= share.high
    assert 0.02 < share.high - share.low < 0.25
    assert "container has over 5.0 % less KV capacity than native" in map_words.headline(steep)


def test_where_one_arm_alone_works_is_said(cliff, steep):
    native, container = cliff.only_one_works
    truth = np.mean([at["max_num_tokens"] * at["max_batch_size"] > 2**18 for at in cliff.configurations(cliff.filling[0])])  # fmt: skip
    assert native.low <= truth <= native.high
    assert container.mean < 0.01
    assert any(each.startswith("native alone works in ") for each in map_words.sentences(cliff))
    assert any("so has the other" in each for each in map_words.sentences(steep))


def test_the_best_of_each_arm_is_in_its_corner_and_the_largest_contrast_at_most_tokens(steep):
    native, container = map_words.best(steep)
    for found in (native, container):
        assert found.predicted_at["memory_fraction"] > 0.9
        assert found.predicted.low <= found.predicted.mean <= found.predicted.high
        assert found.measured == max(each.kv[ARMS.index(found.arm)] for each in steep.observations)
    assert map_words.largest(steep).configuration["max_num_tokens"] > 25_000
    assert native.predicted.low <= native_gib({"max_batch_size": 1, "max_num_tokens": 256, "memory_fraction": 0.95}) * GIB <= native.predicted.high * 1.01  # fmt: skip


def test_that_no_law_fits_is_said_plainly(steep):
    plain = mapped(law=False)
    assert any("No sizing law fits: the map is a plain Gaussian process" in each for each in map_words.sentences(plain))  # fmt: skip
    assert map_words.summary(plain)["law"] is None
    assert any("TensorRT-LLM's" in each for each in map_words.sentences(steep))


def test_who_chose_the_blocks_is_said(steep):
    other = dataclasses.replace(steep, sampler="qmc")
    assert any("the sampler qmc chose" in each for each in map_words.sentences(other))
    assert not any("stopped" in each for each in map_words.sentences(other))
    found = map_words.summary(other)
    assert (found["stopped"], found["why"]) == (None, None)
    assert found["expected_misclassified"] < 0.1, "of the model alone"
    assert map_words.summary(steep)["why"] == steep.decision.why


def test_a_margin_that_is_the_noise_floor_is_said_to_be_it(steep):
    raised = dataclasses.replace(steep, target=Target(margin=0.08), by_noise=True)
    assert any("noise floor of the pilot, 8.0 %" in each for each in map_words.sentences(raised))
    assert raised.divergent.mean < steep.divergent.mean
    assert not any("pilot" in each for each in map_words.sentences(steep))


def test_the_summary_is_json(cliff, choices):
    for found in (cliff, choices):
        assert json.loads(json.dumps(map_words.summary(found), allow_nan=False))["blocks"] == len(
            found.observations
        )


def test_an_arm_that_never_works_has_no_best():
    found = mapped(blocks=16)
    nothing = dataclasses.replace(
        found, observations=tuple(dataclasses.replace(each, kv=(each.kv[0], None)) for each in found.observations)
    )  # fmt: skip
    assert map_words.best_rows(nothing)[1]["measured"] == "–"


# ---- figures ----------------------------------------------------------------------------------------------


def drawn(found):
    made = map_figures.figures(found, figures.Style(ARMS))
    return {each.key: (each, json.loads(each.figure.to_json())) for each in made}


def kinds(plotted, kind):
    return [trace for trace in plotted["data"] if trace["type"] == kind]


def test_a_space_of_three_axes_has_three_panels_and_every_block_in_one(steep):
    shown = drawn(steep)
    assert list(shown) == ["map", "map_axes"]
    figure, plotted = shown["map"]
    assert [each["text"].partition(" ")[0] for each in plotted["layout"]["annotations"]] == ["memory_fraction"] * 3  # fmt: skip
    assert len(kinds(plotted, "heatmap")) == 3
    circles = [t for t in kinds(plotted, "scatter") if t.get("marker", {}).get("symbol") == "circle"]
    assert sum(len(t["text"]) for t in circles) == len(steep.observations)
    assert "purple where container has less" in figure.caption


def test_undecided_places_are_hatched(steep):
    made = map_figures.contrast_heatmaps(steep, figures.Style(ARMS)).figure
    dots = [trace for trace in made.data if trace.type == "scatter" and trace.marker.symbol == "line-ne-open"]
    strokes = [trace for trace in dots if trace.name is None]  # the others are the legend's
    assert len(strokes) == 3
    margin = steep.cube.axes[1].unit(np.array([7000.0]))[0]  # where the truth crosses it, at a middling batch
    for trace in strokes:
        assert np.abs(np.median(trace.y) - margin) < 0.15
        assert len(trace.y) < 0.4 * 32 * 32


def test_boundaries_have_their_arms_colour_and_blocks_without_capacity_are_crosses(cliff):
    _, plotted = drawn(cliff)["map"]
    colour = figures.Style(ARMS).colour("container")
    assert {t["line"]["color"] for t in kinds(plotted, "contour")} >= {colour}
    crosses = [
        t for t in kinds(plotted, "scatter") if t.get("marker", {}).get("symbol") == "x" and "text" in t
    ]
    assert sum(len(t["text"]) for t in crosses) == sum(None in each.kv for each in cliff.observations)
    assert {t.get("name") for t in plotted["data"]} >= {"none in container", "container works up to here, 95 % dotted"}  # fmt: skip


def test_two_axes_are_one_panel_and_one_axis_is_a_line():
    two = drawn(mapped(WHOLE | {"memory_fraction": 0.8}, blocks=12))
    assert len(kinds(two["map"][1], "heatmap")) == 1
    one = drawn(mapped(WHOLE | {"memory_fraction": 0.8, "max_batch_size": 8}, blocks=8))
    assert list(one) == ["map_axes"]
    points = [t for t in kinds(one["map_axes"][1], "scatter") if t["mode"] == "markers"]
    assert len(points) == 3, "both arms and the contrast"
    shaded = [shape for shape in one["map_axes"][1]["layout"]["shapes"] if shape["type"] == "rect"]
    assert shaded, "what is undecided"
    assert all(0 <= shape["x0"] < shape["x1"] <= 1 for shape in shaded)


def test_of_a_choice_the_blocks_of_the_panel_alone_are_shown(choices):
    figure, plotted = drawn(choices)["map"]
    assert "engine.kv_dtype fp8" in figure.caption
    circles = [t for t in kinds(plotted, "scatter") if t.get("marker", {}).get("symbol") == "circle"]
    same = [each for each in choices.observations if choices.measured_at(each)["engine.kv_dtype"] == "fp8"]
    assert sum(len(t["text"]) for t in circles) == len(same) < len(choices.observations)
    _, lines = drawn(choices)["map_axes"]
    assert ["fp8", "auto"] in [axis.get("ticktext") for axis in lines["layout"].values() if isinstance(axis, dict)]  # fmt: skip


def test_a_short_list_is_sliced_and_not_drawn():
    space = WHOLE | {"max_batch_size": [8, 64], "memory_fraction": 0.8}
    found = mapped(space | {"further": {"engine.weights": {"low": "1GiB", "high": "4GiB"}}}, blocks=16)
    _, plotted = drawn(found)["map"]
    titles = [each["text"] for each in plotted["layout"]["annotations"]]
    assert titles == ["max_batch_size 8", "max_batch_size 64"]
    assert plotted["layout"]["xaxis"]["title"]["text"] == "max_num_tokens"
    circles = [t for t in kinds(plotted, "scatter") if t.get("marker", {}).get("symbol") == "circle"]
    by_batch = [sum(found.measured_at(each)["max_batch_size"] == n for each in found.observations) for n in (8, 64)]  # fmt: skip
    assert [len(t["text"]) for t in circles] == by_batch


def test_colours_have_two_sides_only_where_the_other_arm_has_more():
    def less(at):
        return 3 - 6 * at["memory_fraction"]

    _, plotted = drawn(mapped(held=less, blocks=16))["map"]
    assert plotted["layout"]["coloraxis"]["cmin"] < 0
    _, plotted = drawn(mapped(blocks=12))["map"]
    assert plotted["layout"]["coloraxis"]["cmin"] == 0


def test_an_axis_that_crosses_no_doubling_has_its_ends_written():
    found = mapped(WHOLE | {"max_num_tokens": {"low": 5000, "high": 7000, "log": True}}, blocks=12)
    assert map_axes.ticks(found, 1) == {"tickmode": "array", "tickvals": [0, 1], "ticktext": ["5000", "7000"]}


def test_whole_values_are_written_once_and_one_alone_is_no_axis():
    assert map_axes._round_values(1, 3, least=1.0) == [1, 2, 3]
    assert map_axes._round_values(16, 16, least=1.0) == [16]
    assert map_axes._round_values(0.3, 0.5, least=0.0) == [0.3, 0.35, 0.4, 0.45, 0.5]


def test_sizes_among_knobs_are_written_with_their_unit(steep):
    sized = dataclasses.replace(steep, units={"max_num_tokens": "B", "max_batch_size": "s"})
    at = {"max_batch_size": 4, "max_num_tokens": 2048, "memory_fraction": 0.5}
    assert map_words.configuration(sized, at) == "batch 4 s, tokens 2.00 KiB, fraction 0.5"
    assert map_words.configuration(steep, at) == "batch 4, tokens 2048, fraction 0.5"


# ---- the report of a run ----------------------------------------------------------------------------------


@pytest.mark.process
def test_the_report_has_the_map_marked(map_run):
    page = (map_run / "report.html").read_text()
    assert '<h2 id="map">' in page
    assert "<strong>SIMULATED</strong>: container has over 5.0 % less KV capacity" in page
    assert "SIMULATED: Contrast over the searched space" in page
    assert "SIMULATED: KV capacity along each axis" in page
    assert 'id="chart-map"' in page
    assert 'id="chart-map_axes"' in page
    summary = json.loads((map_run / "summary.json").read_text())
    assert summary["simulated"]
    assert summary["map"]["sampler"] == "map"
    assert summary["map"]["law"] == "memfree"
    rows = pd.read_parquet(map_run / map_table.FILE)
    assert rows["simulated"].all()
    assert len(rows) > 5000


@pytest.mark.process
def test_the_verdict_begins_with_the_map(map_run):
    summary = json.loads((map_run / "summary.json").read_text())
    assert summary["verdict"].startswith(
        "SIMULATED: no engine ran, capacities come from a formula. container has over 5.0 % less "
    )
    assert "Of the blocks alone, which lie where the search looked: " in summary["verdict"]


def test_the_margin_of_the_map_is_the_one_in_force(map_run, tmp_path):
    folder = shutil.copytree(map_run, tmp_path / "run")
    plan = json.loads((folder / "plan.json").read_text())
    noise = power.Noise(**{field.name: 0 for field in dataclasses.fields(power.Noise)} | {"floor": 0.09})
    (folder / "plan.json").write_text(json.dumps(plan | {"noise": dataclasses.asdict(noise)}))
    found = map_table.of_run(Store.read(folder))
    assert found.by_noise
    assert found.target.margin == predict.predict(Store.read(folder), AT).margin == 0.09


@pytest.mark.process
def test_a_run_with_too_few_blocks_says_that_it_has_no_map_yet(few_blocks):
    assert cli.main(["report", str(few_blocks)]) == 0
    assert "There is no map: 2 of its 2 complete blocks" in (few_blocks / "report.html").read_text()
    assert json.loads((few_blocks / "summary.json").read_text())["map"] == {
        "missing": "2 of its 2 complete blocks have a number of both arms that nothing capped, and a map needs 3"
    }
    assert not (few_blocks / map_table.FILE).exists()
    findings = json.loads((few_blocks / "summary.json").read_text())["findings"]
    assert {"severity": "doubt", "sentence": "Only 2 of 10 blocks are complete."} in findings


@pytest.mark.browser
def test_a_browser_draws_every_figure_in_silence(map_run, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--enable-logging=stderr",
            "--virtual-time-budget=20000", "--dump-dom", (map_run / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    charts = re.findall(r'id="chart-(\w+)"', done.stdout)
    assert charts[:2] == ["map", "map_axes"]
    assert f'data-drawn="{len(charts)}"' in done.stdout
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
