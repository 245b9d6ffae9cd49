"""The report of composed runs: what it says, what it warns of, and that it is one safe file."""

import html.parser
import json
import shutil

import pandas as pd
import pytest
from test_analysis_frames import OTHERS_MIB, compose, record, two_gib_of_cache

from analysis import attribution, noise, overview, report, statistics, verdict
from spark_ray import power
from spark_ray.units import GIB, MIB

NAN_FREE = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}


def written(folder):
    summary = report.write(folder)
    assert json.loads((folder / "summary.json").read_text(), **NAN_FREE) == json.loads(
        json.dumps(summary, allow_nan=False)
    )
    return summary, (folder / "report.html").read_text()


def sentences(summary):
    return {each["sentence"]: each["severity"] for each in summary["findings"]}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = compose(tmp_path_factory.mktemp("golden") / "run", two_gib_of_cache, blocks=8)
    return folder, *written(folder)


def test_the_verdict_names_the_arms_the_size_the_interval_and_the_cause(golden):
    assert golden[1]["verdict"] == (
        "full has 463.50 MiB (8.8 %, 95 % interval 8.8 % to 8.9 %) less KV cache than empty, mean of 8 blocks. It comes from page cache: "
        "−fraction × Δ page cache predicts 460.80 MiB less, which leaves 2.70 MiB of the mean to other memory."
    )


def test_the_summary_has_the_numbers(golden):
    summary = golden[1]
    assert summary["blocks"] == {"wanted": 8, "complete": 8}
    counts = [(arm["arm"], arm["ok"], arm["no_capacity"], arm["failed"]) for arm in summary["arms"]]
    assert counts == [("empty", 8, 0, 0), ("full", 8, 0, 0)]
    assert [arm["median_peak_memory_bytes"] for arm in summary["arms"]] == [310 * MIB] * 2
    (found,) = summary["contrasts"]
    assert found["mean_predicted_delta_bytes"] == pytest.approx(-0.225 * 2 * GIB)
    assert sum(found["mean_term_bytes"].values()) == pytest.approx(found["mean_delta_kv_cache_bytes"])
    assert found["mean_term_bytes"]["other_processes"] == pytest.approx(
        -MIB * 0.05 * sum((i + 1) * more for i, more in enumerate(OTHERS_MIB)) / 8
    )


def test_a_quiet_run_leaves_only_notes(golden):
    assert set(sentences(golden[1]).values()) == {"note"}


def test_the_same_records_make_the_same_report(golden, tmp_path):
    folder, _, page = golden
    again = shutil.copytree(folder, tmp_path / folder.name)
    assert written(again)[1] == page
    assert (again / "trials.parquet").read_bytes() == (folder / "trials.parquet").read_bytes()


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]


def test_it_is_one_file_that_asks_for_nothing(golden):
    page, parser = golden[2], _Links()
    parser.feed(page)
    assert set(parser.links) <= {"#audit", "data:,"}
    assert page.count("<script>") == 2
    assert len(page.encode()) < 6_000_000


def test_what_a_record_says_is_text_and_never_markup(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"

    def records(block, arm):
        yield record(block, arm, kind="engine_error", message=evil) | {"slot": evil}

    folder = compose(
        tmp_path / "run",
        records,
        plan={"warnings": {"full": [evil]}, "host": {evil: evil}, "overrides": [evil]},
    )
    page, parser = written(folder)[1], _Links()
    parser.feed(page)
    assert "img" not in parser.tags
    assert "<script>alert" not in page
    assert "&lt;img src=x" in page


def test_no_record_at_all(tmp_path):
    summary, page = written(compose(tmp_path / "run", lambda block, arm: [], wanted=8))  # noqa: ARG005
    assert summary["verdict"] == "No attempt has ended: there is nothing to say yet."
    assert "There is nothing to draw." in page
    assert [arm["median_kv_cache_bytes"] for arm in summary["arms"]] == [None, None]


def test_one_block_has_no_interval(tmp_path):
    summary, _ = written(compose(tmp_path / "run", two_gib_of_cache, blocks=1))
    assert "no interval from one block" in summary["verdict"]
    assert (
        sentences(summary)["The compared arms both have a capacity in 1 block: no interval can be given."]
        == "grave"
    )


def test_an_incomplete_block_is_not_counted(tmp_path):
    def records(block, arm):
        return [] if (block.index, arm) == (2, "full") else two_gib_of_cache(block, arm)

    summary, _ = written(compose(tmp_path / "run", records))
    assert summary["blocks"] == {"wanted": 4, "complete": 3}
    assert sentences(summary)["Only 3 of 4 blocks are complete."] == "doubt"


def test_only_failures(tmp_path):
    summary, page = written(
        compose(tmp_path / "run", lambda block, arm: [record(block, arm, kind="crashed", message="boom")])
    )
    assert summary["verdict"].startswith("No block in which both full and empty have KV capacity")
    assert page.count("boom") == 8
    assert [arm["failed"] for arm in summary["arms"]] == [4, 4]


def test_an_arm_that_does_not_fit_is_an_answer(tmp_path):
    def records(block, arm):
        return [
            record(
                block,
                arm,
                kind="out_of_memory" if arm == "full" and block.index == 0 else "ok",
                cached=2 * GIB if arm == "full" else GIB,
            )
        ]

    summary, page = written(compose(tmp_path / "run", records))
    assert summary["verdict"].endswith(" full had no KV capacity in 1 of 4 blocks.")
    assert summary["arms"][1]["no_capacity"] == 1
    assert "full: no capacity" in page  # drawn as a cross


def test_a_disturbed_block_runs_again_and_both_are_on_record(tmp_path):
    def records(block, arm):
        if block.index == 1:
            return [
                record(block, arm, 1, kind="disturbed" if arm == block.order[-1] else "ok"),
                *(two_gib_of_cache(block, arm)[0] | {"attempt": n} for n in [2]),
            ]
        return two_gib_of_cache(block, arm)

    summary, page = written(compose(tmp_path / "run", records))
    assert summary["blocks"]["complete"] == 4
    assert sentences(summary)["2 attempts superseded: on record below, in no number above."] == "note"
    assert "no: superseded" in page


def test_a_fake_engine_is_said_first_and_loud(tmp_path):
    def records(block, arm):
        return [record(block, arm, engine="fake")]

    summary, page = written(compose(tmp_path / "run", records, engine="fake"))
    assert summary["verdict"].startswith("NOT A MEASUREMENT: the engine is fake")
    assert summary["findings"][0]["severity"] == "grave"
    assert 'class="verdict alarm"' in page


WITH_A_TWIN = ("empty", "full", "empty-again")


def restless(block, arm):
    """Records of a host whose other programs move some memory."""
    drift = 4 * MIB * ((block.index * 7 + len(arm)) % 5)
    return [record(block, arm, cached=2 * GIB if arm == "full" else 700 * MIB, anon=450 * MIB + drift)]


def test_equal_arms_are_called_equal_and_set_the_noise_floor(tmp_path):
    summary, _ = written(compose(tmp_path / "run", restless, blocks=6, arms=WITH_A_TWIN))
    assert 0 < summary["noise_floor"] < 0.01
    assert not any("A/A" in each for each in sentences(summary))
    (twin,) = summary["noise"]
    assert (twin["arm"], twin["blocks"], twin["floor"]) == ("empty-again", 6, summary["noise_floor"])
    assert twin["detectable_contrast"] == pytest.approx(power.detectable(twin["sd_per_block"], 6))
    assert "Noise floor: " in summary["verdict"]
    assert "with 80 % power" in summary["verdict"]
    assert summary["contrasts"][1]["equivalence"]["p"] < 0.05


def test_arms_that_a_knob_makes_equal_in_some_blocks_are_no_noise_floor():
    columns = {"block_id": ["b0", "b0", "b1", "b1"], "arm": ["a", "b"] * 2, "setup": ["x", "x", "x", "y"]}
    pairs = pd.DataFrame({"arm": ["b", "b"], "contrast": [0.0, 0.2]})
    trials = pd.DataFrame(columns)
    assert noise.twins(trials, pairs, "a") == []
    (twin,) = noise.twins(trials[trials["block_id"] == "b0"], pairs, "a")
    assert twin.arm == "b"
    assert noise.twins(trials, pairs, "c") == []


def test_a_compared_arm_that_was_left_out(tmp_path):
    experiment = {
        "name": "n",
        "engine": {"kind": "embedded"},
        "arms": {"empty": {}, "full": {}, "gone": {}},
        "contrast": {"baseline": "empty", "against": "gone"},
    }
    summary, _ = written(
        compose(
            tmp_path / "run",
            two_gib_of_cache,
            plan={"experiment": experiment, "left_out": {"gone": ["no docker"]}},
        )
    )
    assert summary["verdict"] == "No contrast: gone was left out of this run."
    assert sentences(summary)['Arm gone was left out: ["no docker"].'] == "grave"


def test_every_doubt_of_the_host_is_raised(tmp_path):
    def records(block, arm):
        each = record(
            block, arm, cached=2 * GIB if arm == "full" else GIB, anon=(450 + 900 * (block.index % 2)) * MIB
        )
        each["host"]["wait"]["reached"] = False
        each["host"]["outside"] = {"pid": 1}
        each["host"]["observations"][1]["meminfo"] |= {"SwapTotal": GIB, "SwapFree": 0, "MemTotal": 25 * GIB}
        each["result"]["measurements"]["sizing"]["available_bytes"] += 10 * MIB
        each["result"]["evidence"]["python"] = arm
        return [each]

    said = " ".join(
        sentences(
            written(
                compose(tmp_path / "run", records, plan={"warnings": {"full": ["advised, not dropped"]}})
            )[0]
        )
    )
    for words in (
        "Memory had not come back",
        "Swap was in use",
        "MemTotal changed",
        "could not be read",
        "do not reproduce",
        "not quiet",
        "1 recorded property",
        "advised, not dropped",
    ):
        assert words in said


def test_a_difference_within_its_interval_is_none(tmp_path):
    def records(block, arm):
        return [record(block, arm, cached=(700 + 60 * ((block.index + (arm == "full")) % 2)) * MIB)]

    text = written(compose(tmp_path / "run", records, blocks=8))[0]["verdict"]
    assert text.startswith("No divergence shown between full and empty")
    assert "Equivalent within ±2.0 %" in text


def divided(terms):
    """An attribution with these means."""
    total = statistics.paired([sum(terms.values())])
    return attribution.Attribution(
        total, {name: statistics.paired([size]) for name, size in terms.items()}, ()
    )


def test_more_capacity_is_said_as_more():
    found = verdict.Comparison(
        "b",
        "a",
        statistics.paired([-0.1, -0.12, -0.11]),
        1.0,
        2700.0 * MIB,
        300.0 * MIB,
        None,
        None,
        None,
        divided({"view": 300.0 * MIB}),
        3,
        {},
    )
    text = verdict.sentence(found)
    assert "b has 300.00 MiB (11.0 %" in text
    assert "more KV cache than a" in text


def test_a_difference_below_the_noise_floor_is_not_above_the_noise():
    found = verdict.Comparison(
        "b",
        "a",
        statistics.paired([0.010, 0.012, 0.011]),
        0.0,
        300.0 * MIB,
        -3.0 * MIB,
        None,
        None,
        None,
        divided({}),
        3,
        {},
    )
    assert "not above the noise" in verdict.sentence(found, 0.02)


def compared(contrasts, delta, terms):
    total = divided(terms) if terms else divided({})
    return verdict.Comparison("b", "a", statistics.paired(contrasts), 1.0, 1e10, delta, None, None, None, total, len(contrasts), {})  # fmt: skip


def test_shares_and_bytes_that_disagree_are_both_said():
    """Most configurations lose a share, and the few large ones gain more bytes."""
    text = verdict.sentence(compared([0.1] * 11 + [0.099] + [-0.02] * 4, 230.0 * MIB, {}))
    assert "b has in the mean of shares less KV cache than a (7.0 %" in text
    assert "230.00 MiB more in the mean of bytes" in text


def test_what_was_not_read_is_the_cause_only_where_little_else_is():
    three = [0.1, 0.11, 0.12]
    some = verdict.sentence(compared(three, -1000.0 * MIB, {"rest": -400.0 * MIB, "kernel": -350.0 * MIB, "ballast": -250.0 * MIB}))  # fmt: skip
    assert "The largest part, 400.00 MiB, is in no term that was read." in some
    most = verdict.sentence(compared(three, -1000.0 * MIB, {"rest": -900.0 * MIB, "kernel": -100.0 * MIB}))
    assert "No term that was read explains it." in most


def test_the_floor_of_a_pilot_holds_for_every_sentence_and_equal_arms_are_marked(tmp_path):
    planned = {"noise": {"pilot": "runs/pilot", "blocks": 8, "sd": 0.1, "floor": 0.2}}
    summary, page = written(compose(tmp_path / "run", restless, blocks=6, arms=WITH_A_TWIN, plan=planned))
    quiet = "Two equal arms of the pilot differ by up to 20.0 %: this is not above the noise."
    assert quiet in summary["verdict"]
    assert page.count(quiet) >= 2  # the headline, and the list of arms
    assert "It comes from page cache" not in page
    assert "empty and empty-again are the same (A/A): what follows is noise." in page


def test_a_disturbed_attempt_ran_again_only_if_it_did_and_a_third_arm_costs_the_pair_nothing(tmp_path):
    def records(block, arm):
        made = record(block, arm, cached=2 * GIB if arm == "full" else 700 * MIB)
        if block.index == 3:
            made["outcome"] = {"kind": "disturbed", "reason": "gate", "message": "not quiet"}
            return [made] if arm == block.order[0] else []
        if arm == "third" and block.index == 1:
            made["outcome"] = {"kind": "engine_error", "reason": "died", "message": "died"}
            made.pop("result", None)
        return [made]

    summary, _ = written(compose(tmp_path / "run", records, blocks=4, arms=("empty", "full", "third")))
    said = " ".join(sentences(summary))
    assert "in blocks that are open: resume runs them again" in said
    assert "ran again as a whole" not in said
    assert "missing from the contrast of their arm, and not at random" in said


def test_the_command_line(tmp_path, capsys):
    folder = compose(tmp_path / "run", two_gib_of_cache)
    assert report.main([str(folder)]) == 0
    assert "less KV cache" in capsys.readouterr().out
    assert report.main([str(tmp_path)]) == 2
    assert report.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_attempts_of_an_open_block_do_not_count_yet_and_are_not_superseded(tmp_path):
    def records(block, arm):
        if block.index < 3:
            return two_gib_of_cache(block, arm)
        return two_gib_of_cache(block, arm) if arm == block.order[0] else []

    summary, page = written(compose(tmp_path / "run", records))
    assert summary["blocks"]["complete"] == 3
    assert [(arm["open"], arm["superseded"]) for arm in summary["arms"]].count((1, 0)) == 1
    assert any("of blocks that are not complete yet" in each for each in sentences(summary))
    assert "not yet: its block is open" in page
    assert "superseded" not in page.split("<h2>Method")[0]


def test_mixed_versions_are_a_reason_for_doubt(tmp_path):
    def records(block, arm):
        version = "0.1.0" if block.index < 2 else "0.2.0"
        return [each | {"spark_ray_version": version} for each in two_gib_of_cache(block, arm)]

    found = sentences(written(compose(tmp_path / "run", records))[0])
    (sentence,) = [each for each in found if "mixed" in each]
    assert "0.1.0 (4 attempts), 0.2.0 (4 attempts)" in sentence
    assert found[sentence] == "doubt"


def test_long_hashes_are_short_and_whole_in_their_title(tmp_path):
    digits = "0123456789abcdef" * 4
    evil = f'<b title="{digits}">'

    def records(block, arm):
        return [
            each | {"content": {"image_id": f"sha256:{digits}"}, "outcome": each["outcome"] | {"kind": "engine_error", "message": evil}}
            for each in two_gib_of_cache(block, arm)
        ]  # fmt: skip

    page = written(compose(tmp_path / "run", records))[1]
    assert f'sha256:<span title="{digits}">{digits[:12]}…</span>' in page
    assert f'&lt;b title=&#34;<span title="{digits}">{digits[:12]}…</span>&#34;&gt;' in page
    assert f">{digits}<" not in page


def test_a_folder_of_runs_is_one_page_that_links_the_reports(tmp_path):
    runs = [compose(tmp_path / name, two_gib_of_cache) for name in ("one", "a <b> & c")]
    rows = overview.write(tmp_path, runs)
    page, parser = (tmp_path / "index.html").read_text(), _Links()
    parser.feed(page)
    assert parser.links == ["data:,", "one/report.html", "a%20%3Cb%3E%20%26%20c/report.html"]
    assert rows[0]["verdict"] in page
    assert (tmp_path / "one" / "report.html").is_file(), "a run without a report is reported first"
    (tmp_path / "one" / "report.html").write_text("mine")
    overview.write(tmp_path, runs)
    assert (tmp_path / "one" / "report.html").read_text() == "mine"
    overview.write(tmp_path, runs, again=True)
    assert (tmp_path / "one" / "report.html").read_text() != "mine"
