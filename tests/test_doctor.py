import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import experiment, experiment_data, write_yaml
from rich.console import Console

from spark_ray import capabilities, doctor, image, nvml, rootact
from spark_ray.errors import UnavailableError
from spark_ray.experiment import Experiment
from spark_ray.terminal import show_checks

ROOT = Path(__file__).parent.parent


def by_name(found):
    return {check.name: check for check in found}


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "spark_ray", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )


def no_engine(timeout_s=60):  # noqa: ARG001
    raise UnavailableError("no Docker engine answers", mend="start it")


def test_an_experiment_is_asked_only_for_what_it_needs(tmp_path):
    found = by_name(doctor.checks(experiment(), tmp_path))
    assert {"python", "ray", "memory", "disk", "cgroup"} <= set(found)
    assert not {"docker", "torch", "host rootfs"} & set(found)
    assert found["root acts"].status in {"ok", "warn"}, "native arms can do without"


def test_every_finding_that_is_not_ok_has_words(tmp_path):
    for check in doctor.checks(experiment(), tmp_path):
        assert check.found
        if check.status == "missing":
            assert check.mend


def test_a_missing_daemon_is_missing_with_a_mend_and_exit_3(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    done = run(write_yaml(tmp_path, experiment_data(arms=("native", "docker"))), "--json")
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["docker"]["status"] == "missing"
    assert checks["docker"]["mend"]
    assert report["versions"]["spark_ray"] == "0.1.0"


@pytest.mark.docker
def test_the_daemon_is_asked_for_each_flag_and_its_refusal_is_told():
    client, said = image.connect(), []
    found = by_name(doctor._docker(None, False, said.append))
    try:
        assert found["docker"].status == "ok"
        assert found["docker --memory 64m"].status == "ok"
        flags = {flag: found[f"docker {flag}"] for flag in doctor.FLAGS}
        for check in flags.values():
            assert (check.status == "ok") == (check.found == "works")
            assert check.status in {"ok", "warn"}
            assert "OCI runtime" not in check.found, "without the layers it came through"
        for flag, settings in doctor.FLAGS.items():
            for name in capabilities.lacking(settings):
                assert name in flags[flag].found
                assert name in flags[flag].mend
        assert any("rootfs" in each for each in said), "what takes a while is said"
        assert client.containers.list(all=True, filters={"label": "spark_ray.purpose=probe"}) == []
    finally:
        client.close()


@pytest.mark.docker
@pytest.mark.parametrize(("required", "code"), [(True, 3), (False, 0)])
def test_an_experiment_is_asked_only_for_the_flags_it_uses(tmp_path, required, code):
    data = experiment_data(arms=("native", "native", "docker"))
    data["arms"]["c"] |= {"environment": {"kind": "docker", "cpuset_cpus": "4000"}, "required": required}
    done = run(write_yaml(tmp_path, data), "--json")
    assert done.returncode == code, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert not [name for name in checks if name.startswith("docker --")]
    assert checks["arm a"]["status"] == "ok"
    assert checks["arm c"]["status"] == ("missing" if required else "warn")
    assert "refuses cpuset_cpus" in checks["arm c"]["found"]
    assert checks["arm c"]["mend"]


@pytest.mark.docker
def test_a_missing_image_is_named(tmp_path):
    data = experiment_data()
    data["arms"]["a"]["environment"] = {"kind": "docker", "image": "nobody/nothing:0"}
    found = by_name(doctor.checks(Experiment.model_validate(data), tmp_path))
    assert found["image nobody/nothing:0"].status == "missing"
    assert "image pull" in found["image nobody/nothing:0"].mend


def test_a_broken_model_folder_is_missing(tmp_path):
    data = experiment_data()
    data |= {"engine": {"kind": "embedded"}, "model": {"path": str(tmp_path)}}
    found = by_name(doctor.checks(Experiment.model_validate(data), tmp_path))
    assert found["model"].status == "missing"


@pytest.mark.parametrize(
    ("changes", "arm", "statuses"),
    [
        ({}, {}, set()),
        ({"engine": {"kind": "embedded", "device": "cpu"}, "model": {"random_llama": {}}}, {}, set()),
        ({"engine": {"kind": "embedded", "device": "cuda"}, "model": {"random_llama": {}}}, {}, {"missing"}),
        ({}, {"environment": {"kind": "docker", "gpus": "all"}}, {"missing"}),
    ],
)
def test_a_gpu_is_asked_for_where_one_is_needed(tmp_path, monkeypatch, changes, arm, statuses):
    monkeypatch.setattr(nvml, "fields", lambda: "no NVIDIA driver answers: absent")
    monkeypatch.setattr(image, "connect", no_engine)
    data = experiment_data() | changes
    data["arms"]["a"] |= arm
    checks = doctor.checks(Experiment.model_validate(data), tmp_path)
    assert {check.status for check in checks if check.name.startswith("gpu")} == statuses


def test_without_an_experiment_no_gpu_no_root_and_no_docker_are_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(nvml, "fields", lambda: "no NVIDIA driver answers: absent")
    monkeypatch.setattr(rootact.RootActs, "available", lambda self: (False, "sudo asks for a password"))  # noqa: ARG005
    monkeypatch.setattr(image, "connect", no_engine)
    found = by_name(doctor.checks(None, tmp_path))
    assert [found[name].status for name in ("gpu", "root acts", "docker")] == ["warn"] * 3


@pytest.mark.root
def test_each_way_of_separating_is_tried_and_what_fails_is_named(tmp_path, monkeypatch):
    data = experiment_data(arms=("native", "isolated"))
    made = Experiment.model_validate(data)
    works = by_name(doctor.checks(made, tmp_path))["isolation"]
    assert works.status == "ok"
    assert "mount" in works.found
    refused = {"overlay": "Operation not permitted (it lacks CAP_SYS_ADMIN)"}
    monkeypatch.setattr(rootact.RootActs, "isolation", lambda self, folder: refused)  # noqa: ARG005
    found = by_name(doctor.checks(made, tmp_path))
    assert "overlay" not in found["isolation"].found
    assert found["isolation overlay"].status == "warn"
    assert "CAP_SYS_ADMIN" in found["isolation overlay"].found
    assert "an overlay root" in found["isolation overlay"].mend
    assert found["arm b"].status == "ok", "it does not ask for an overlay"


def test_a_required_isolated_arm_needs_root(tmp_path, monkeypatch):
    monkeypatch.setattr(rootact.RootActs, "available", lambda self: (False, "sudo asks for a password"))  # noqa: ARG005
    made = Experiment.model_validate(experiment_data(arms=("native", "isolated")))
    found = by_name(doctor.checks(made, tmp_path))
    assert found["root acts"].status == "missing"
    assert "isolation" not in found
    assert found["arm b"].status == "missing"


def test_cgroup_controllers_are_read_in_both_versions(tmp_path):
    proc, top = tmp_path / "proc", tmp_path / "top"
    proc.mkdir()
    top.mkdir()
    rows = [
        "#subsys_name\thierarchy\tnum_cgroups\tenabled",
        "cpuset\t4\t9\t1",
        "memory\t0\t9\t0",
        "pids\t7\t9\t1",
    ]
    (proc / "cgroups").write_text("\n".join(rows) + "\n")
    (top / "cgroup.controllers").write_text("cpuset cpu memory pids\n")
    assert doctor.cgroup_controllers(1, proc, top) == {"cpuset", "pids"}
    assert doctor.cgroup_controllers(2, proc, top) == {"cpuset", "cpu", "memory", "pids"}
    assert doctor.cgroup_controllers(2, proc, tmp_path / "none") == set()


def test_a_kernel_without_the_memory_controller_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "cgroup_controllers", lambda version: {"cpuset"})  # noqa: ARG005
    check = by_name(doctor.checks(experiment(), tmp_path))["cgroup controllers"]
    assert check.status == "warn"
    assert "not memory" in check.found
    assert "cgroup_enable=memory" in check.mend


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_a_terminal(width):
    checks = [
        {"name": "docker --cap-add SYS_RESOURCE", "status": "warn", "found": "no " * 60, "mend": "do " * 60},
        {"name": "gpu", "status": "missing", "found": "[none]", "mend": "pip install '.[embedded]'"},
    ]
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    show_checks(console, checks)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("docker --cap-add SYS_RESOURCE" in line for line in lines), "names are whole"
    assert "mend: pip install '.[embedded]'" in console.file.getvalue()
    assert lines[-1] == "required and missing: gpu; 1 warning"


# ---- why a daemon refuses -----------------------------------------------------------------------------------


def bounds_without(*names):
    return (1 << len(capabilities.NAMES)) - 1 - sum(1 << capabilities.NAMES.index(name) for name in names)


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [
        ({}, []),
        ({"ulimits": {"memlock": -1}}, ["CAP_SYS_RESOURCE"]),
        ({"cap_add": ["SYS_RESOURCE"]}, ["CAP_SYS_RESOURCE"]),
        ({"cap_add": ["CAP_IPC_LOCK"]}, []),
        ({"cap_add": ["ALL"]}, ["CAP_SYS_MODULE", "CAP_SYS_RESOURCE"]),
        ({"privileged": True}, ["CAP_SYS_MODULE", "CAP_SYS_RESOURCE"]),
    ],
)
def test_the_capability_that_is_missing_is_named(settings, lacks):
    assert capabilities.lacking(settings, bounds_without("SYS_RESOURCE", "SYS_MODULE")) == lacks
    assert capabilities.lacking(settings, bounds_without()) == []


def test_the_bounding_set_is_the_daemons_where_it_can_be_seen(tmp_path):
    for process, bits in (("12", "00000000000000ff"), ("self", "0000000000000001")):
        (tmp_path / process).mkdir()
        (tmp_path / process / "status").write_text(f"Name:\tx\nCapBnd:\t{bits}\n")
    pid_file = tmp_path / "docker.pid"
    assert capabilities.bounding_set(tmp_path, pid_file) == 1
    pid_file.write_text("12")
    assert capabilities.bounding_set(tmp_path, pid_file) == 255


def test_a_refusal_loses_the_layers_it_came_through():
    refusal = (
        "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
        "error during container init: error setting rlimits for ready process: operation not permitted: unknown"
    )
    words, mend = capabilities.explain(refusal, {"shm_size": 1})
    assert words == "error setting rlimits for ready process: operation not permitted"
    assert mend
