"""Several experiments into one folder: planned together, driven one after the other, continued and reported together."""

import json
import re
import signal
import subprocess
import sys

import pytest
from helpers import experiment_data, guests_of, spark_ray, wait_until, write_yaml
from rich.console import Console

from spark_ray import running
from spark_ray.store import Store

CRASHES = {"behaviour": "exit", "only_in_arm": "b"}


def written(tmp_path, **experiments):
    """YAML files, by name; each value is what differs from a quick experiment with two native arms."""
    paths = []
    for name, changes in experiments.items():
        folder = tmp_path / "yaml" / name
        folder.mkdir(parents=True)
        paths.append(write_yaml(folder, experiment_data(**{"blocks": 1} | changes) | {"name": name}))
    return paths


def complete_blocks(run):
    store = Store.read(run)
    return sum(store.state(block).complete for block in store.blocks())


@pytest.mark.process
def test_each_has_its_run_a_failing_one_does_not_stop_the_next_and_the_worst_exit_code_is_told(tmp_path):
    night = tmp_path / "night"
    done = spark_ray("sweep", *written(tmp_path, one={}, two=CRASHES, three={}), "--out", night, "--local")
    assert done.returncode == 4, done.stderr
    assert sorted(path.name for path in night.iterdir()) == ["index.html", "one", "three", "two"]
    assert [complete_blocks(night / name) for name in ("one", "two", "three")] == [1, 1, 1]
    plans, begins = done.stdout.rindex("plan three"), done.stdout.index("1 of 3  one")
    assert plans < begins, "all are planned before the first begins"
    page = (night / "index.html").read_text()
    assert re.findall(r'href="([^"]+)"', page) == [
        "data:,",
        "one/report.html",
        "two/report.html",
        "three/report.html",
    ]
    for name in ("one", "two", "three"):
        assert (night / name / "report.html").is_file()
        assert json.loads((night / name / "summary.json").read_text())["verdict"] in page

    status = spark_ray("status", night).stdout.splitlines()
    assert [line.split(":")[0] for line in status] == ["one", "two", "three"], (
        "one line each, as they were begun"
    )
    assert status[1] == "two: 1 of 1 blocks complete; 1 crashed, 1 ok"
    assert json.loads(spark_ray("status", night, "--json").stdout)["two"]["outcomes"] == {
        "crashed": 1,
        "ok": 1,
    }

    (night / "index.html").unlink()
    (night / "one" / "report.html").unlink()
    done = spark_ray("report", night, "--json")
    assert [row["run"] for row in json.loads(done.stdout)] == ["one", "two", "three"]
    assert (night / "index.html").is_file()
    assert (night / "one" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["one", "one"], 2, ["both named one", "mend:"]),
        (["one", "typo", "empty range"], 2, ["did you mean sampler", "range is empty"]),
        (["one", "no docker"], 3, ["nodocker", "arm b", "no.sock"]),
    ],
)
def test_all_must_be_valid_before_anything_happens(tmp_path, arguments, code, words):
    bad = {"low": 9, "high": 2}
    typo, empty, docker, one = (experiment_data() for _ in range(4))
    typo["search"]["samplr"] = typo["search"].pop("sampler")
    empty["search"]["space"]["max_batch_size"] = bad
    docker["arms"]["b"]["environment"] = "docker"
    known = {"one": one, "typo": typo, "empty range": empty, "no docker": docker}
    paths = []
    for place, name in enumerate(arguments):
        folder = tmp_path / str(place)
        folder.mkdir()
        paths.append(write_yaml(folder, known[name] | {"name": name.replace(" ", "")}))
    nowhere = {"DOCKER_HOST": f"unix://{tmp_path}/no.sock"}
    done = spark_ray("sweep", *paths, "--out", tmp_path / "night", "--local", **nowhere)
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "night").exists()


def test_several_need_a_folder_that_is_not_a_run_nor_taken(tmp_path):
    paths = written(tmp_path, one={}, two={})
    assert "--out" in spark_ray("sweep", *paths).stderr
    Store.create(tmp_path / "run", {}, {}).close()
    done = spark_ray("sweep", *paths, "--out", tmp_path / "run", "--local")
    assert (done.returncode, "is the run of one experiment" in done.stderr) == (2, True)
    (tmp_path / "night" / "two").mkdir(parents=True)
    (tmp_path / "night" / "two" / "file").write_text("")
    done = spark_ray("sweep", *paths, "--out", tmp_path / "night", "--local")
    assert (done.returncode, "two is not empty" in done.stderr, "--resume" in done.stderr) == (2, True, True)
    assert not (tmp_path / "night" / "one").exists()
    assert spark_ray("status", tmp_path / "yaml").returncode == 2


def test_the_plan_alone_has_no_effect(tmp_path):
    done = spark_ray("sweep", *written(tmp_path, one={}, two={}), "--out", tmp_path / "night", "--plan")
    assert done.returncode == 0, done.stderr
    assert "plan one" in done.stdout
    assert "plan two" in done.stdout
    assert not (tmp_path / "night").exists()


@pytest.mark.process
def test_time_is_for_all_together_and_resume_needs_only_the_folder(tmp_path):
    night = tmp_path / "night"
    paths = written(tmp_path, one={}, two={"blocks": 2})
    done = spark_ray("sweep", *paths, "--out", night, "--local", "--max-time", "0s")
    assert done.returncode == 0, done.stderr
    assert "not finished: one, two" in done.stdout
    assert "--resume --out" in done.stdout
    assert [complete_blocks(night / name) for name in ("one", "two")] == [0, 0]
    assert spark_ray("status", night).stdout.splitlines()[1] == "two: 0 of 2 blocks complete; no trial yet"
    done = spark_ray("sweep", *paths, "--out", night, "--local", "--resume", "--max-blocks", 1)
    assert "not finished: two" in done.stdout, "of each experiment"
    for path in paths:
        path.unlink()
    done = spark_ray("resume", night, "--local")
    assert done.returncode == 0, done.stderr
    assert [complete_blocks(night / name) for name in ("one", "two")] == [1, 2]
    before = sorted(night.rglob("record.json"))
    done = spark_ray("resume", night, "--local")
    assert done.returncode == 0
    assert "preparing" not in done.stdout, "nothing is missing, nothing is started"
    assert sorted(night.rglob("record.json")) == before


@pytest.mark.process
def test_resume_begins_what_was_never_begun(tmp_path):
    night = tmp_path / "night"
    one, two = written(tmp_path, one={}, two={})
    assert spark_ray("sweep", one, "--out", night / "one", "--local").returncode == 0
    done = spark_ray("sweep", one, two, "--out", night, "--local", "--resume", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["runs"]
    assert [(row["run"], row["blocks"]["complete"]) for row in rows] == [("one", 1), ("two", 1)]


@pytest.mark.process
def test_the_watchdog_stops_those_that_follow(tmp_path):
    night = tmp_path / "night"
    low = {"hold": "20s", "limits": {"watchdog": "4096GiB"}}
    done = spark_ray("sweep", *written(tmp_path, one=CRASHES, two=low, three={}), "--out", night, "--local")
    assert done.returncode == 5, done.stderr
    assert "not finished: two, three" in done.stdout
    assert not list((night / "three" / "trials").iterdir())
    page = (night / "index.html").read_text()
    assert "The watchdog ended" in (night / "two" / "report.html").read_text()
    assert "three/report.html" in page, "also what has not begun has its line"


@pytest.mark.process
def test_an_interrupt_stops_all_and_resume_finishes(tmp_path):
    night = tmp_path / "night"
    paths = written(tmp_path, one={"hold": "3s"}, two={})
    driver = subprocess.Popen(
        [sys.executable, "-m", "spark_ray", "sweep", *map(str, paths), "--out", str(night), "--local"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert wait_until(lambda: guests_of(night / "one"), 30)
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=600)
    assert driver.returncode == 130, err
    assert "not finished: one, two" in out
    assert not guests_of(night)
    assert not list((night / "two" / "trials").iterdir())
    done = spark_ray("resume", night, "--local")
    assert done.returncode == 0, done.stderr
    assert [complete_blocks(night / name) for name in ("one", "two")] == [1, 1]


@pytest.mark.ray
def test_a_ray_of_its_own_for_each(tmp_path):
    night = tmp_path / "night"
    done = spark_ray("sweep", *written(tmp_path, one={}, two={}), "--out", night, "-v")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" phases ") == 4, "the log is the same wherever an attempt was executed"
    assert [complete_blocks(night / name) for name in ("one", "two")] == [1, 1]


def test_a_report_that_cannot_be_written_is_said_and_ends_nothing(tmp_path, capsys):
    assert running._report_apart(tmp_path / "no run", Console()) == {}
    said = " ".join(capsys.readouterr().out.split())
    assert "there is no such folder" in said
    assert "mend: spark-ray report" in said
