"""The command as a user meets it: exit codes, plain words, no traceback, no effect before the plan holds."""

import contextlib
import json
import os
import pty
import re
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import experiment_data, run, run_without_report, write_yaml

ROOT = Path(__file__).parent.parent


def changed(data, path, value):
    *folders, last = path.split(".")
    place = data
    for key in folders:
        place = place[key]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("search.samplr", "tpe", ["samplr", "did you mean sampler"]),
        ("search.blocks", "many", ["search.blocks", "many"]),
        ("search.space.max_batch_size", {"low": 9, "high": 2}, ["range is empty"]),
        ("search.space.memory_fraction", {"low": 0.2, "high": 1.0}, ["memory_fraction", "1"]),
        ("search.space.memory_fraction", 0.0, ["memory_fraction"]),
        ("arms.a.environment", "dokcer", ["dokcer", "did you mean docker"]),
        ("limits.trial_timeout", 60, ["limits.trial_timeout", "unit"]),
    ],
)
def test_bad_input_is_exit_2_with_file_line_and_words(tmp_path, path, value, words):
    file = write_yaml(tmp_path, changed(experiment_data(), path, value))
    done = run(file, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert f"{file}:" in done.stderr or f"{file.name}:" in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "run").exists(), "no effect"


def embedded(tmp_path, model):
    data = experiment_data()
    data["engine"] = {"kind": "embedded"}
    data["model"] = model
    return write_yaml(tmp_path, data)


@pytest.mark.parametrize("broken", ["absent", "no config", "bad config", "no weights", "torn weights"])
def test_a_broken_model_folder_is_found_before_any_effect(tmp_path, broken):
    folder = tmp_path / "model"
    if broken != "absent":
        folder.mkdir()
        (folder / "config.json").write_text("{" if broken == "bad config" else '{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(b"\xff" * 20)
        if broken == "no config":
            (folder / "config.json").unlink()
        if broken == "no weights":
            (folder / "model.safetensors").unlink()
    done = run(embedded(tmp_path, {"path": str(folder)}), "--out", tmp_path / "run")
    assert done.returncode == 3
    assert str(folder) in done.stderr
    assert "mend:" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_required_docker_without_daemon_is_exit_3_and_an_optional_one_is_a_notice(tmp_path):
    data = experiment_data(arms=("native", "native", "docker"))
    path = write_yaml(tmp_path, data)
    nowhere = {"DOCKER_HOST": f"unix://{tmp_path}/no.sock"}
    done = run(path, "--out", tmp_path / "run", **nowhere)
    assert done.returncode == 3
    assert "arm c" in done.stderr
    assert not (tmp_path / "run").exists()
    data["arms"]["c"]["required"] = False
    done = run_without_report(write_yaml(tmp_path, data), "--out", tmp_path / "run", **nowhere)
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stdout


@pytest.mark.docker
def test_a_flag_the_daemon_refuses_is_in_the_plan(tmp_path):
    from spark_ray import content, image, rootfs

    client = image.connect()
    image.build(client, rootfs.build_host(content.cache_folder() / "rootfs"))
    client.close()
    data = experiment_data(arms=("native", "native", "docker"))
    data["arms"]["c"] |= {"environment": {"kind": "docker", "cpuset_cpus": "4000"}, "required": False}
    done = run(write_yaml(tmp_path, data), "--plan")
    assert done.returncode == 0, done.stderr
    for word in ("left out", "refuses", "cpuset_cpus:", "4000"):
        assert word in done.stdout, "each in some line of a column that may be narrow"


@pytest.mark.docker
def test_a_missing_image_is_named_with_the_mend(tmp_path):
    data = experiment_data()
    data["arms"]["a"]["environment"] = {"kind": "docker", "image": "spark_ray/no-such-image:1"}
    done = run(write_yaml(tmp_path, data), "--out", tmp_path / "run")
    assert done.returncode == 3
    assert "spark_ray/no-such-image:1" in done.stderr
    assert "image pull" in done.stderr


DROP = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.environ['HOME'] = sys.argv[1]; os.chdir(sys.argv[1])\n"
SWEEP = "from spark_ray import sweep\n"
MAIN = "sys.exit(sweep.main(sys.argv[2:]))\n"


@pytest.fixture
def home():
    """A folder of an ordinary user; pytest's own folders are private to root."""
    folder = Path(tempfile.mkdtemp(prefix="spark_ray-home-"))
    os.chown(folder, 65534, 65534)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.root
def test_no_permission_is_said_to_an_ordinary_user(home):
    """Without root, sudo or the docker group; modules are loaded first, as the interpreter may be root's own."""
    closed = [p for p in Path(sys.prefix).parents if not p.stat().st_mode & 0o001]
    if closed:
        pytest.skip(f"{closed[0]} is closed to other users")
    shutil.copytree(ROOT / "spark_ray", home / "open" / "spark_ray")  # the checkout may be closed to others
    path = write_yaml(home, experiment_data(arms=("native", "chroot")))
    done = subprocess.run(
        [sys.executable, "-c", SWEEP + DROP + MAIN, str(home), str(path), "--out", str(home / "run")],
        capture_output=True, text=True, timeout=600, check=False,
        cwd="/", env={**os.environ, "PYTHONPATH": str(home / "open")},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "chroot needs root" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "run").exists()


@pytest.mark.process
@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user; every other run of yours shows the same"
)
def test_an_ordinary_user_runs_native_arms_and_is_warned(home):
    """With the system's Python, which others may execute, over this environment's packages."""
    packages = [str(ROOT), *site.getsitepackages()]
    python = next((p for p in ("/usr/bin/python3", sys.executable) if _others_may_run(p, packages)), None)
    if python is None:
        pytest.skip("no Python of this version that another user may execute")
    data = experiment_data(blocks=1)
    for arm in data["arms"].values():
        arm["treatment"] = {}
    done = subprocess.run(
        [python, "-c", "import os, sys\n" + DROP + SWEEP + MAIN, str(home), str(write_yaml(home, data)), "--local", "--out", str(home / "run")],
        capture_output=True, text=True, timeout=600, check=False, env={"PYTHONPATH": ":".join(packages), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "page_cache: drop needs root" in done.stdout
    assert (home / "run" / "report.html").exists()


def _others_may_run(python, packages):
    probe = "import os; os.setgid(65534); os.setuid(65534); import pandas, pydantic_core, optuna, spark_ray.sweep, subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    environment = {"PYTHONPATH": ":".join(packages), "PATH": os.environ["PATH"], "HOME": "/tmp"}
    return (
        subprocess.run(
            [python, "-c", probe], capture_output=True, check=False, env=environment, timeout=600
        ).returncode
        == 0
    )


@pytest.mark.parametrize("others", [["--json"], ["second.yaml"]])
def test_what_only_a_report_can_say_is_not_asked_for_without_one(tmp_path, others):
    path = write_yaml(tmp_path, experiment_data())
    (tmp_path / "second.yaml").write_text(path.read_text())
    words = [tmp_path / word if word.endswith("yaml") else word for word in others]
    done = run_without_report(path, *words, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "--no-report" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(write_yaml(tmp_path, experiment_data()), "--local", "--out", tmp_path / "file" / "run")
    assert done.returncode == 2
    assert "cannot create" in done.stderr


@pytest.mark.process
def test_json_is_alone_on_standard_output(tmp_path):
    done = run(
        write_yaml(tmp_path, experiment_data(blocks=1)), "--local", "--json", "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "test"


@pytest.mark.process
def test_too_many_failures_is_exit_4_and_answers_are_not_failures(tmp_path):
    failing = write_yaml(tmp_path, experiment_data(blocks=1, behaviour="exit"))
    done = run_without_report(failing, "--out", tmp_path / "bad")
    assert done.returncode == 4
    full = write_yaml(tmp_path, experiment_data(blocks=1, behaviour="infeasible"))
    done = run_without_report(full, "--out", tmp_path / "full")
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_the_watchdog_is_exit_5(tmp_path):
    data = experiment_data(blocks=1, hold="20s", limits={"watchdog": "4096GiB"})
    done = run_without_report(write_yaml(tmp_path, data), "--out", tmp_path / "run")
    assert done.returncode == 5
    assert "mend:" in done.stderr


@pytest.mark.process
def test_resume_refuses_another_experiment_and_shows_the_difference(tmp_path):
    path = write_yaml(tmp_path, experiment_data(blocks=1))
    assert run_without_report(path, "--out", tmp_path / "run").returncode == 0
    done = run(path, "--local", "--out", tmp_path / "run", "--resume", "--set", "seed=5")
    assert done.returncode == 2
    assert '"seed": 5' in done.stderr
    done = run_without_report(path, "--out", tmp_path / "run", "--resume", "--set", "search.blocks=2")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "blocks").iterdir())) == 2
    again = run(path, "--local", "--out", tmp_path / "run")
    assert again.returncode == 2
    assert "--resume" in again.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.name)
def test_every_experiment_plans(path, tmp_path):
    done = run(path, "--plan", "--out", tmp_path / "run")
    assert done.returncode in (0, 3), done.stderr
    assert "plan " in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_cluster_file_plans_its_slots(tmp_path):
    path = write_yaml(tmp_path, experiment_data())
    done = run(path, "--plan", "--cluster", ROOT / "cluster.yaml")
    assert done.returncode == 0, done.stderr
    assert "slots" in done.stdout
    assert "head, worker-1" in done.stdout
    done = run(path, "--cluster", ROOT / "cluster.yaml", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "add --address auto" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_a_budget_of_blocks_or_time_pauses_and_resume_does_the_rest(tmp_path):
    path, folder = write_yaml(tmp_path, experiment_data(blocks=3)), tmp_path / "run"
    done = run_without_report(path, "--out", folder, "--max-blocks", 1, "--seed", 4, "-v")
    assert done.returncode == 0, done.stderr
    assert "--set seed=4 --resume" in done.stdout
    assert "--no-report" in done.stdout, "the line that continues is the same command"
    assert "b0000 a/1 begins" in done.stderr
    assert "b0000 complete" in (folder / "run.log").read_text()
    assert len(list((folder / "blocks").iterdir())) == 1
    done = run_without_report(path, "--out", folder, "--seed", 4, "--resume", "--max-time", "0s")
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "blocks").iterdir())) == 1
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray", "resume", str(folder), "--local"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "blocks").iterdir())) == 3
    assert run(path, "--max-time", "soon").returncode == 2


@pytest.mark.process
def test_a_grid_is_counted_with_the_blocks_it_has(tmp_path):
    data = experiment_data(blocks=40)
    data["search"] |= {"sampler": "grid", "repetitions": 2}
    data["search"]["space"]["max_batch_size"] = 8
    data["search"]["space"]["memory_fraction"] = 0.2
    path, folder = write_yaml(tmp_path, data), tmp_path / "run"
    planned = run(path, "--plan")
    assert "grid, 2 blocks x 2 arms" in planned.stdout, planned.stdout
    assert run_without_report(path, "--out", folder).returncode == 0
    standing = subprocess.run(
        [sys.executable, "-m", "spark_ray", "status", str(folder), "--json"],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert (json.loads(standing.stdout)["blocks"], json.loads(standing.stdout)["complete"]) == (2, 2)
    again = run_without_report(path, "--out", folder, "--resume")
    assert again.returncode == 0, again.stderr
    assert "preparing" not in again.stdout + again.stderr, "nothing is missing"


@pytest.mark.process
def test_a_run_moved_elsewhere_is_reported_there(tmp_path):
    path = write_yaml(tmp_path, experiment_data(blocks=1))
    done = run_without_report(path, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"spark-ray report {tmp_path / 'run'}" in done.stdout
    assert not (tmp_path / "run" / "report.html").exists()
    (tmp_path / "run").rename(tmp_path / "moved")
    for arguments in (["report", "--json"], ["status", "--json"], ["status"]):
        done = subprocess.run(
            [sys.executable, "-m", "spark_ray", arguments[0], str(tmp_path / "moved"), *arguments[1:]],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "moved" / "report.html").exists()


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
COLOUR = re.compile(r"\x1b\[(\d+;)*[34][0-7][;m]")


@pytest.mark.process
@pytest.mark.parametrize(
    ("started", "variables"),
    [(run, {}), (run_without_report, {"NO_COLOR": "1"}), (run_without_report, {"TERM": "dumb"})],
)
def test_without_a_terminal_the_output_is_plain_text(tmp_path, started, variables):
    path = write_yaml(tmp_path, experiment_data(blocks=1, behaviour="exit", only_in_arm="b"))
    done = started(path, "--local", "--out", tmp_path / "run", "-v", **variables)
    assert not CONTROL.search(done.stdout + done.stderr)


def on_a_terminal(*arguments, **variables):
    """What a sweep writes when both its outputs are a terminal."""
    inside, outside = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "spark_ray.sweep", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=outside, stderr=outside, env={**os.environ, "TERM": "xterm-256color", **variables},
    ) as sweeping:  # fmt: skip
        os.close(outside)
        written = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while piece := os.read(inside, 65536):
                written += piece
        os.close(inside)
    return sweeping.returncode, written.decode()


@pytest.mark.process
def test_a_terminal_has_colours_unless_no_color_is_set(tmp_path):
    path = write_yaml(tmp_path, experiment_data(blocks=1))
    for name, variables, coloured in (
        ("plain", {"NO_COLOR": "1"}, False),
        ("colour", {"NO_COLOR": ""}, True),
    ):
        code, written = on_a_terminal(path, "--local", "--out", tmp_path / name, **variables)
        assert code == 0, written
        assert bool(COLOUR.search(written)) == coloured
        assert "NOT A MEASUREMENT" in written


@pytest.mark.process
def test_the_log_leads_to_the_cause(tmp_path):
    path = write_yaml(tmp_path, experiment_data(blocks=1, behaviour="raise", only_in_arm="b"))
    done = run_without_report(path, "--out", tmp_path / "run", "-v")
    log = (tmp_path / "run" / "run.log").read_text()
    for line in (
        r"b0000 b/1 begins on local-0, in .*/run/trials/b0000\.b/1",
        r"b0000 b/1 memory +[\d.]+ GiB available after 0\.0 s",
        r'b0000 b/1 treatment +page_cache: "keep", per_cpu_pages: "as_is", .*; then .* free, .* cached',
        r"b0000 b/1 command +\S*python\S* -m spark_ray_worker \S+",
        r"b0000 a/1 phases +after_load [\d.]+ s, sizing [\d.]+ s, end [\d.]+ s, after_exit [\d.]+ s",
        r"b0000 b/1 end +exit \d+ after [\d.]+ s",
        r"b0000 b/1 worker.log .*",
        r"WARNING b0000 b/1 engine_error .*",
        r"b0000 complete: contrast none, a compared arm failed",
    ):
        assert re.search(line, done.stderr), line
        assert re.search(line, log), line
    assert "a/1 worker.log" not in log, "an arm that answered needs no more words"


def test_a_folder_with_a_colon_is_refused_before_anything_happens(tmp_path):
    done = run(write_yaml(tmp_path, experiment_data(blocks=1)), "--local", "--out", tmp_path / "at 12:30")
    assert done.returncode == 2
    assert "a colon ends a path in PYTHONPATH" in done.stderr
    assert not (tmp_path / "at 12:30").exists()
