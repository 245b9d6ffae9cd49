"""The committed results: the README's figures are those of the records beside it, and the tables can be made again."""

import tarfile
from pathlib import Path

import pandas as pd
import pytest

from analysis import report

RESULTS = Path(__file__).parent.parent / "experiments" / "results"
H200 = RESULTS / "h200"
README = (H200 / "README.md").read_text()
RUNS = sorted(path.parent for path in RESULTS.glob("*/*/run.tar.xz"))


@pytest.mark.parametrize("committed", RUNS, ids=lambda path: "/".join(path.parts[-2:]))
def test_tables_made_again_are_the_committed_ones(committed, tmp_path):
    """Columns that came later are beside them; what was said once is still said."""
    with tarfile.open(committed / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / committed.name
    report.write(run)
    for path in committed.glob("*.parquet"):
        kept = pd.read_parquet(path)
        again = pd.read_parquet(run / path.name)[list(kept.columns)]
        pd.testing.assert_frame_equal(again, kept)
    assert (run / "experiment.yaml").read_text() == (committed / "experiment.yaml").read_text()


def test_every_run_here_is_described():
    for run in RUNS:
        assert run.name in (run.parent / "README.md").read_text(), run


def counted(run):
    trials = pd.read_parquet(run / "trials.parquet")
    return trials[trials["standing"] == "counts"]


@pytest.mark.parametrize("name", ["mechanism_ladder_gpu", "mechanism_ladder_gpu_2"])
def test_no_rung_moves_the_capacity_of_a_gpu_with_memory_of_its_own(name):
    trials = counted(H200 / name)
    complete = trials.groupby("block_id").filter(
        lambda block: block["arm"].nunique() == trials["arm"].nunique()
    )
    assert (complete.groupby("block_id")["kv_cache_bytes"].nunique() == 1).all()
    assert set(complete["outcome"]) == {"ok"}
    assert complete["arm"].nunique() == 15


@pytest.mark.parametrize("name", ["discrete_gpu", "discrete_gpu_engine"])
def test_every_arm_has_the_same_capacity_in_every_block(name):
    run = H200 / name
    trials = pd.read_parquet(run / "trials.parquet")
    valid = trials[trials["standing"] == "counts"]
    by_block = valid.groupby("block_id")["kv_cache_bytes"]
    assert (by_block.nunique() == 1).all()
    assert set(valid["outcome"]) == {"ok"}
    assert set(valid["sizing_free_bytes"]) == {148_771_045_376}
    assert "148 771 045 376" in README
    smallest, largest = valid["kv_cache_bytes"].min() / 2**30, valid["kv_cache_bytes"].max() / 2**30
    assert f"{smallest:.2f} to {largest:.2f} GiB" in README
    assert valid["gpu_processes_before"].eq(0).all()
    assert valid["gpu_throttle_reasons"].eq("").all()
    assert valid["gpu_lowest_sm_clock_mhz"].eq(1980).all()
