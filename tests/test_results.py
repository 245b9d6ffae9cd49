"""The committed results: the README's figures are those of the records beside it, and the tables can be made again."""

import tarfile
from pathlib import Path

import pandas as pd
import pytest

from analysis import report

RESULTS = Path(__file__).parent.parent / "experiments" / "results" / "h200"
README = (RESULTS / "README.md").read_text()


@pytest.fixture(params=["discrete_gpu", "discrete_gpu_engine"])
def run(request, tmp_path):
    with tarfile.open(RESULTS / request.param / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param


def test_tables_made_again_are_the_committed_ones(run):
    """Columns that came later are beside them; what was said once is still said."""
    report.write(run)
    for name in ("trials.parquet", "phases.parquet"):
        committed = pd.read_parquet(RESULTS / run.name / name)
        again = pd.read_parquet(run / name)[list(committed.columns)]
        pd.testing.assert_frame_equal(again, committed)
    assert (run / "experiment.yaml").read_text() == (RESULTS / run.name / "experiment.yaml").read_text()


def test_every_arm_has_the_same_capacity_in_every_block(run):
    trials = pd.read_parquet(RESULTS / run.name / "trials.parquet")
    counted = trials[trials["standing"] == "counts"]
    by_block = counted.groupby("block_id")["kv_cache_bytes"]
    assert (by_block.nunique() == 1).all()
    assert set(counted["outcome"]) == {"ok"}
    assert set(counted["sizing_free_bytes"]) == {148_771_045_376}
    assert "148 771 045 376" in README
    smallest, largest = counted["kv_cache_bytes"].min() / 2**30, counted["kv_cache_bytes"].max() / 2**30
    assert f"{smallest:.2f} to {largest:.2f} GiB" in README
    assert counted["gpu_processes_before"].eq(0).all()
    assert counted["gpu_throttle_reasons"].eq("").all()
    assert counted["gpu_lowest_sm_clock_mhz"].eq(1980).all()
