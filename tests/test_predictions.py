"""What was said beforehand: held, not held, undecided, each with the values of the sizing moment."""

import pytest
from test_analysis_frames import compose, frames, record, report
from test_attribution import FRACTION, state

from analysis import predictions
from spark_ray.experiment import Prediction
from spark_ray.units import MIB


def table(blocks):
    """`blocks`: the MiB of each holder in the arm, by block; the baseline has none."""
    rows = []
    for index, block in enumerate(blocks):
        for arm, mib in (("empty", {}), ("full", block)):
            rows.append(state(arm, **mib) | {"standing": "counts", "block_id": f"b{index}"})
    return frames.trials(rows, {})


def judge(blocks, **said):
    return predictions.judge(Prediction(arm="full", **said), "empty", table(blocks))


def test_a_ballast_costs_its_share():
    found = judge([{"ballast": 600 + 10 * n} for n in range(5)], quantity="ballast")
    assert found.word == "held"
    assert found.detected
    assert found.expected.mean == pytest.approx(-FRACTION * 620 * MIB)
    assert abs(found.off.mean) < 2 * MIB  # blocks of 2 MiB
    assert found.margins_bytes == (32 * MIB, 32 * MIB)
    assert all(each.held for each in found.blocks)


def test_more_than_was_said_is_not_held():
    found = judge([{"ballast": 600, "nowhere": 400 + 5 * n} for n in range(5)], quantity="ballast")
    assert found.word == "not held"
    assert not any(each.held for each in found.blocks)


def test_a_scatter_across_the_margin_is_undecided():
    found = judge([{"ballast": 600, "nowhere": size} for size in (0, 260, 10, 300, 20)], quantity="ballast")
    assert found.word == "undecided"


@pytest.mark.parametrize(("nowhere", "word"), [(0, "held"), (300, "not held")])
def test_a_single_block_is_held_within_the_margin_or_not(nowhere, word):
    assert judge([{"ballast": 600, "nowhere": nowhere}], quantity="ballast").word == word


def test_no_effect_is_a_prediction_too():
    assert judge([{}] * 3, quantity="none").word == "held"
    assert judge([{"ballast": 600 + n} for n in range(3)], quantity="none").word == "not held"
    assert judge([{"cache_fill": 600 + n} for n in range(3)], quantity="fill", times=0.0).word == "not held"
    assert judge([{}] * 3, quantity="none").detected is None


@pytest.mark.parametrize(
    ("quantity", "times", "holder"),
    [
        ("page_cache", -1.0, "cache_other"),
        ("fill", -1.0, "cache_fill"),
        ("view_free", 1.0, "kernel"),
        ("ballast", -1.0, "ballast"),
    ],
)
def test_each_quantity_is_the_reading_of_the_sizing_moment(quantity, times, holder):
    found = judge([{holder: 700 + n} for n in range(4)], quantity=quantity, times=times)
    assert found.word == "held"
    assert found.expected.mean == pytest.approx(-FRACTION * 701.5 * MIB)


def test_a_large_effect_has_a_margin_of_its_share():
    found = judge([{"ballast": 9000}] * 2, quantity="ballast", share=0.1)
    assert found.margins_bytes[0] == pytest.approx(0.1 * FRACTION * 9000 * MIB)


def test_what_was_not_read_is_undecided_and_said():
    rows = [
        state(arm, unread=[("host", "at_sizing")], ballast=600) | {"standing": "counts"}
        for arm in ("empty", "full")
    ]
    found = predictions.judge(Prediction(arm="full", quantity="ballast"), "empty", frames.trials(rows, {}))
    assert (found.word, found.unread, found.blocks) == ("undecided", 1, ())


def test_the_report_and_the_summary_say_what_held(tmp_path):
    said = [
        {"arm": "full", "quantity": "page_cache", "because": "free memory is <MemFree>"},
        {"arm": "full", "quantity": "none", "times": 0},
        {"arm": "full", "quantity": "no such thing"},
    ]

    def records(block, arm):
        return [record(block, arm, cached=(700 + 2048 * (arm == "full")) * MIB)]

    experiment = {
        "name": "p",
        "arms": {"empty": {}, "full": {}},
        "contrast": {"baseline": "empty", "against": "full"},
        "predictions": said,
    }
    folder = compose(tmp_path / "run", records, plan={"experiment": experiment})
    summary = report.write(folder)
    page = (folder / "report.html").read_text()
    assert [each["verdict"] for each in summary["predictions"]] == ["held", "not held"]
    assert summary["predictions"][0]["blocks_held"] == 4
    assert summary["predictions"][0]["detected"]
    assert summary["verdict"].endswith("Predictions: 1 held, 1 not held.")
    assert "free memory is &lt;MemFree&gt;" in page
    assert "full − empty = −fraction × Δ page cache" in page
