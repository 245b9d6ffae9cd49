"""Rungs: who is whose neighbour, that steps add up to the ends, and that no spread is no NaN."""

import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_frames import compose, record

from analysis import figures, frames, ladder, report, steps
from spark_ray.units import MIB

ARMS = ("native", "chroot", "cgroup", "limit", "docker")
BELOW = {"chroot": "native", "cgroup": "chroot", "limit": "cgroup", "docker": "cgroup"}


def plan(arms=ARMS, below=BELOW):
    return {
        "experiment": {"arms": {arm: {"environment": "native", "builds_on": below.get(arm)} for arm in arms}},
        "arms": list(arms),
    }


def trials(blocks):
    """One table row per block and arm: `blocks` are capacities by arm; None: no capacity."""
    rows = []
    for index, block in enumerate(blocks):
        for arm, size in block.items():
            kind = "ok" if size is not None else "out_of_memory"
            kv = None if size is None else {"kv_cache": {"bytes": size}}
            rows.append(
                {
                    "block_id": f"b{index}",
                    "arm": arm,
                    "standing": "counts",
                    "outcome": {"kind": kind},
                    "result": {"measurements": kv},
                }
            )
    return frames.trials(rows, {})


sizes = st.integers(1 << 20, 1 << 40)


@settings(max_examples=50)
@given(
    st.lists(
        st.fixed_dictionaries({arm: st.one_of(st.none(), sizes) for arm in ARMS}), min_size=1, max_size=6
    )
)
def test_steps_add_up_to_the_ends_over_the_blocks_complete_in_all_rungs(blocks):
    arms = ("native", "chroot", "cgroup", "docker")
    found = ladder.path_over(arms, pd.DataFrame(blocks, dtype="Float64"))
    complete = [block for block in blocks if all(block[arm] is not None for arm in arms)]
    assert found.blocks == len(complete)
    if complete:
        ends = [block["docker"] - block["native"] for block in complete]
        assert found.ends.mean == pytest.approx(sum(ends) / len(ends))
        assert abs(found.gap_bytes) < 0.01  # of sums of doubles
    else:
        assert found.gap_bytes is None


def test_a_path_for_every_rung_that_nothing_builds_on():
    blocks = [{"native": 9, "chroot": 8, "cgroup": 8, "limit": None, "docker": 8}, dict.fromkeys(ARMS, 7)]
    found = ladder.climb(plan(), trials(blocks), ARMS)
    by_end = {path.arms[-1]: path for path in found.paths}
    assert by_end["docker"].arms == ("native", "chroot", "cgroup", "docker")
    assert (by_end["docker"].blocks, by_end["limit"].blocks) == (2, 1)
    json.dumps(ladder.summary(found), allow_nan=False)


def test_each_rung_is_held_against_the_one_it_builds_on():
    blocks = [
        {"native": 1000 + n, "chroot": 990 + n, "cgroup": 990 + n, "limit": 400 + n, "docker": 991 + n}
        for n in range(4)
    ]
    rungs = {rung.arm: rung for rung in ladder.climb(plan(), trials(blocks), ARMS).rungs}
    assert {arm: rung.neighbour for arm, rung in rungs.items()} == BELOW
    assert rungs["chroot"].step.delta_bytes == -10
    assert rungs["docker"].step.delta_bytes == 1
    assert rungs["chroot"].equivalent  # 1 % with a margin of 2 %
    assert not rungs["limit"].equivalent


def test_no_spread_is_none_of_n_and_never_nan(tmp_path):
    def records(block, arm):
        return [record(block, arm)]

    arms = ("native", "chroot", "docker")
    below = {"chroot": "native", "docker": "chroot"}
    experiment = plan(arms, below)["experiment"] | {
        "name": "rungs",
        "contrast": {"baseline": "native", "against": "docker"},
    }
    folder = compose(tmp_path / "run", records, arms=arms, plan={"experiment": experiment})
    summary = report.write(folder)
    page = (folder / "report.html").read_text()
    for rung in summary["ladder"]["rungs"]:
        assert rung["differing_blocks"] == 0
        assert rung["delta_kv_cache_bytes"]["note"] == "0 of 4 blocks differ"
        assert rung["equivalent"]
        assert rung["largest_term"] is None
    assert "0 of 4 blocks differ" in page
    assert "0 of 4 blocks differ" in summary["verdict"]
    assert "NaN" not in json.dumps(summary)
    assert '<div class="chart" id="chart-ladder">' in page
    assert len(pd.read_parquet(folder / "ladder.parquet")) == 8


def test_an_arm_that_was_left_out_is_stepped_over_and_said():
    executed = ("native", "cgroup", "docker")
    found = ladder.neighbours(plan(), executed)
    assert found == {"cgroup": ("native", ("chroot",)), "docker": ("cgroup", ())}
    assert ladder.neighbours(plan(), ("chroot", "docker")) == {"docker": ("chroot", ("cgroup",))}
    assert ladder.climb(plan(below={}), trials([dict.fromkeys(ARMS, 5)]), ARMS) is None


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"experiment": None},
        {"experiment": {"arms": [1]}},
        {"experiment": {"arms": {"a": 3, "b": {"builds_on": ["a"]}}}},
    ],
)
def test_a_plan_without_rungs_has_no_ladder(odd):
    assert ladder.neighbours(odd, ("a", "b")) == {}


def test_the_largest_term_of_a_step_is_named(tmp_path):
    def records(block, arm):
        return [record(block, arm, cached=(700 + 512 * (arm == "chroot")) * MIB)]

    experiment = plan(("native", "chroot"), {"chroot": "native"})["experiment"] | {"name": "rungs"}
    summary = report.write(
        compose(tmp_path / "run", records, arms=("native", "chroot"), plan={"experiment": experiment})
    )
    (rung,) = summary["ladder"]["rungs"]
    assert rung["largest_term"]["term"] == "page cache: everything else"
    assert rung["largest_term"]["bytes"] == pytest.approx(-0.125 * 512 * MIB)


def test_a_rung_without_any_complete_block_hides_no_other():
    """The limit is too small for the engine in every block: its path has none, and the one beside it has all."""
    block = {"native": 100 * MIB, "chroot": 90 * MIB, "cgroup": 90 * MIB, "limit": None, "docker": 60 * MIB}
    found = ladder.climb(plan(), trials([block] * 3), ARMS)
    levels = steps._levels(found)
    assert levels == {"native": 0, "chroot": -10 << 20, "cgroup": -10 << 20, "docker": -40 << 20}
    figure = steps.staircase(found, figures.Style(ARMS))
    assert "limit" not in figure.figure.to_json()
    paths = {tuple(path["arms"])[-1]: path for path in ladder.summary(found)["paths"]}
    assert paths["limit"]["steps_bytes"] is None
    assert paths["limit"]["sum_of_steps_bytes"] is None
    assert sum(paths["docker"]["steps_bytes"]) == -40 << 20
