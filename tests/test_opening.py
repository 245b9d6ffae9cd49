"""A run opened again: by a newer version, with its journal gone, with a block that was given up."""

import json
import subprocess
import sys

import pytest
from helpers import experiment, experiment_data, run, run_without_report, write_yaml

from spark_ray import __version__, running, several
from spark_ray.cluster import one_local_node
from spark_ray.errors import EXIT_TOO_MANY_FAILURES
from spark_ray.preview import preview, probe
from spark_ray.search import Search
from spark_ray.store import Store
from spark_ray.worker import protocol


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.process
def test_a_run_goes_on_with_a_newer_version_by_its_own_worker_and_says_so(tmp_path):
    path, folder = write_yaml(tmp_path, experiment_data(blocks=2)), tmp_path / "run"
    assert run_without_report(path, "--out", folder, "--max-blocks", 1).returncode == 0
    with (folder / "bundle" / protocol.PACKAGE / "engine_fake.py").open("a") as stream:
        stream.write("# as an older version had it\n")
    older = protocol.package_sha256(folder / "bundle" / protocol.PACKAGE)
    edited(folder / "plan.json", spark_ray_version="0.0.9", bundle_sha256=older)
    for record in folder.glob("trials/*/1/record.json"):
        edited(record, spark_ray_version="0.0.9", bundle_sha256=older)
    done = run(path, "--local", "--out", folder, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    for said in ("begun with spark_ray 0.0.9 and is continued with", "the run's own, bundle/, is used"):
        assert said in " ".join(done.stderr.split())
        assert said in (folder / "run.log").read_text()
    records = list(Store.read(folder).records())
    assert {record["bundle_sha256"] for record in records} == {older}
    assert sorted({record["spark_ray_version"] for record in records}) == ["0.0.9", __version__]
    findings = [
        each["sentence"] for each in json.loads(done.stdout)["findings"] if each["severity"] == "doubt"
    ]
    assert any(
        f"mixed in this run: 0.0.9 (2 attempts), {__version__} (2 attempts)" in each for each in findings
    )


@pytest.mark.process
def test_a_run_of_another_protocol_or_with_a_changed_bundle_is_refused_with_the_reason(tmp_path):
    path, folder = write_yaml(tmp_path, experiment_data(blocks=2)), tmp_path / "run"
    assert run_without_report(path, "--out", folder, "--max-blocks", 1).returncode == 0
    plan = (folder / "plan.json").read_text()
    edited(folder / "plan.json", protocol_version=999, spark_ray_version="9.9.9")
    done = run(path, "--local", "--out", folder, "--resume")
    assert (done.returncode, "speaks protocol 999" in done.stderr) == (2, True)
    assert "continue with spark_ray 9.9.9" in done.stderr
    (folder / "plan.json").write_text(plan)
    (folder / "bundle" / protocol.PACKAGE / "engine_fake.py").write_text("")
    done = run(path, "--local", "--out", folder, "--resume")
    assert (done.returncode, "bundle was changed" in done.stderr) == (2, True)


@pytest.mark.process
def test_a_study_whose_journal_is_gone_is_made_again_from_the_blocks(tmp_path):
    path = write_yaml(tmp_path, experiment_data(blocks=4))
    assert run_without_report(path, "--out", tmp_path / "whole").returncode == 0
    folder = tmp_path / "run"
    assert run_without_report(path, "--out", folder, "--max-blocks", 2).returncode == 0
    (folder / "study.journal").unlink()
    done = run_without_report(path, "--out", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert "study.journal was lost: made again from 2 blocks on disk" in done.stdout
    assert Store.read(folder).blocks() == Store.read(tmp_path / "whole").blocks()
    assert sum(record["standing"] == "counts" for record in Store.read(folder).records()) == 8


@pytest.mark.process
def test_a_block_that_was_given_up_is_tried_again_on_resume(tmp_path):
    """As after a night in which something kept disturbing it: every arm of the block has been void, and it was left."""
    path, folder = write_yaml(tmp_path, experiment_data(blocks=1)), tmp_path / "run"
    assert run_without_report(path, "--out", folder).returncode == 0
    (block,) = Store.read(folder).blocks()
    for record in folder.glob("trials/*/1/record.json"):
        edited(record, outcome={"kind": "disturbed", "reason": "not_reached", "message": "memory was taken"})
    (folder / "study.journal").unlink()
    search = Search(experiment(blocks=1).search, seed=0, journal=folder / "study.journal", name="test")
    search.rebuild([(block.study_trial, block.configuration, block.repetition)])
    search.abandon(block.study_trial, "disturbed 3 times")
    done = run(path, "--local", "--out", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert Store.read(folder).blocks() == [block], "the same block, by the same name"
    assert Store.read(folder).state(block).valid == 2


@pytest.mark.process
def test_what_a_run_is_asked_for_later_is_in_its_plan_for_whoever_continues_it(tmp_path):
    path, folder = write_yaml(tmp_path, experiment_data(blocks=1)), tmp_path / "run"
    assert run_without_report(path, "--out", folder).returncode == 0
    more = ("--set", "search.blocks=3", "--set", "limits.trial_timeout=77s")
    done = run_without_report(path, "--out", folder, "--resume", "--max-blocks", 1, *more)
    assert done.returncode == 0, done.stderr
    assert Store.read(folder).plan["experiment"]["limits"]["trial_timeout"] == "77s"
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray", "resume", str(folder), "--local"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(Store.read(folder).blocks()) == 3
    assert several.standing(Store.read(folder))["blocks"] == 3


@pytest.mark.process
def test_blocks_under_other_rights_would_be_of_another_treatment(tmp_path):
    path, folder = write_yaml(tmp_path, experiment_data(blocks=2)), tmp_path / "run"
    assert run_without_report(path, "--out", folder, "--max-blocks", 1).returncode == 0
    plan = json.loads((folder / "plan.json").read_text())
    arm = plan["arms"][0]
    edited(folder / "plan.json", executed_as=plan["executed_as"] | {arm: "native; files advised away"})
    done = run(path, "--local", "--out", folder, "--resume")
    assert done.returncode == 2
    assert f"{arm}: native; files advised away; now " in done.stderr
    assert "the rights that the run was begun with" in done.stderr


def test_an_arm_that_the_host_offers_by_now_stays_out_of_a_run_that_was_begun_without_it():
    made = experiment(blocks=1)
    plan = preview(made, one_local_node(), probe(made))
    assert len(plan.executed) == 2
    limited = plan.limited_to(plan.executed[:1])
    assert limited.executed == plan.executed[:1]
    assert plan.limited_to(plan.executed) == plan


def test_a_run_of_which_blocks_were_given_up_is_not_finished(tmp_path, monkeypatch, capsys):
    def run_nothing(self, slots):  # noqa: ARG001
        self.given_up.append("b0000")

    monkeypatch.setattr(running.Drive, "run", run_nothing)
    path = write_yaml(tmp_path, experiment_data(blocks=1))
    options = running.Options(local=True, out=tmp_path / "run", report=False)
    assert running.run(path, (), options) == EXIT_TOO_MANY_FAILURES
    said = capsys.readouterr().out
    assert "blocks were given up; everything measured is kept. Continue with:" in said
