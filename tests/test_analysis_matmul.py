"""The matrix product by arm, and how a container was given the GPU: as tables, numbers, a page and reasons to doubt."""

import pytest
from test_analysis_frames import compose, record

from analysis.report import write


def product(block, arm, seconds, device="NVIDIA GB10"):
    each = record(block, arm)
    durations = [seconds * (1 + block.index / 10)] * 3
    flop = 2 * 100**3 / durations[0]
    each["result"]["measurements"]["matmul"] = {
        "size": 100, "library": "torch 2", "device": device, "dtype": "float32", "durations_s": durations, "median_flop_per_s": flop,
    }  # fmt: skip
    return [each]


def test_an_arm_that_multiplies_slower_is_a_ratio_over_blocks(tmp_path):
    folder = compose(tmp_path / "run", lambda block, arm: product(block, arm, 0.3 if arm == "full" else 0.2))
    base, other = write(folder)["matmul"]
    assert (base["arm"], base["ratio"], other["trials"], other["devices"]) == (
        "empty",
        None,
        4,
        ["NVIDIA GB10"],
    )
    assert base["median_s"] == pytest.approx(0.23)
    assert other["ratio"]["n"] == 4
    assert other["ratio"]["mean"] == pytest.approx(1.5)
    page = (folder / "report.html").read_text()
    assert 'id="matmul"' in page
    assert "1.5 (95 %" in page


def test_durations_that_cannot_be_are_absent_and_wide_ones_no_traceback(tmp_path):
    def records(block, arm):
        (each,) = product(block, arm, 1e-300 if arm == "full" and block.index % 2 else 1e299)
        if block.index == 0:
            each["result"]["measurements"]["matmul"]["durations_s"] = [0, -1, "x", None, True]
        return [each]

    other = write(compose(tmp_path / "run", records))["matmul"][1]
    assert (other["trials"], other["ratio"]["n"]) == (3, 3)


def test_without_a_product_nothing_is_said_of_it(tmp_path):
    folder = compose(tmp_path / "run", lambda block, arm: [record(block, arm)])
    assert write(folder)["matmul"] == []
    assert 'id="matmul"' not in (folder / "report.html").read_text()


def test_a_gpu_against_a_cpu_is_no_comparison(tmp_path):
    def records(block, arm):
        return product(block, arm, 0.2, "cpu" if arm == "full" else "NVIDIA GB10")

    found = write(compose(tmp_path / "run", records))["findings"]
    (said,) = [each for each in found if "same device" in each["sentence"]]
    assert said["severity"] == "grave"
    assert "full: cpu" in said["sentence"]


@pytest.mark.parametrize(
    ("way", "severity"), [("devices", "doubt"), ("cdi", "note"), ("request", None), (None, None)]
)
def test_a_container_that_has_the_gpu_in_another_way_than_its_users_have_is_doubted(tmp_path, way, severity):
    def records(block, arm):
        each = record(block, arm)
        if arm == "full":
            each["environment"] = {"kind": "docker"}
            each["content"] = {"gpu": {"exposure": way}} if way else {}
        return [each]

    found = write(compose(tmp_path / "run", records))["findings"]
    assert [each["severity"] for each in found if "given the GPU" in each["sentence"]] == (
        [severity] if severity else []
    )
