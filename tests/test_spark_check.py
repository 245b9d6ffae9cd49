"""`doctor --spark` on a composed Spark and on ways to be none; looking, on a tree of files; the reader of CUDA memory."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
import yaml
from helpers import experiment_data, spark_ray, write_yaml

from spark_ray import cli, cuda_view, image, spark_check
from spark_ray.doctor import Check
from spark_ray.errors import UnavailableError
from spark_ray.spark_check import GIB, DockerFacts, Readings
from spark_ray.worker import observe

ROOT = Path(__file__).parent.parent
GB10 = Path(__file__).parent / "trees" / "gb10" / "proc"
TOTAL = observe.meminfo(GB10)["MemTotal"]
GPU = {
    "device": 0, "name": "NVIDIA GB10", "uuid": "GPU-x", "driver": "580.142", "temperature_celsius": 42, "sm_clock_mhz": 208,
    "max_sm_clock_mhz": 3003, "throttle_reasons": ["idle"], "processes": [],
    "absent": {"memory_total_bytes": "Not Supported", "memory_used_bytes": "Not Supported"},
}  # fmt: skip
READING = cuda_view.Reading(110 * GIB, TOTAL, 110 * GIB, TOTAL, 13000)
SPARK = Readings(
    machine="aarch64",
    kernel="6.17.0-1014-nvidia",
    system="Ubuntu 24.04.4 LTS, DGX 7.4.0",
    meminfo=observe.meminfo(GB10) | {"MemAvailable": 114 * GIB},
    gpus=(GPU,),
    no_gpu="",
    cuda=READING,
    docker=DockerFacts(version="29.2.1", runtimes=("nvidia", "runc"), has_image=True),
    cdi_files=(),
    cdi_error="",
    memlock_bytes=None,
    disks={"/srv": (1, 900 * GIB), "/var/lib/docker": (1, 900 * GIB)},
    has_rootfs=True,
    has_model=True,
    root_acts=(True, "this is root"),
    killers=(),
    watchdog=Check("watchdog", "ok", "outside every memory group"),
)


def by_name(seen):
    found = list(spark_check.checks(seen))
    assert len({check.name for check in found}) == len(found), "one line each"
    return {check.name: check for check in found}


def test_a_composed_spark_lacks_nothing():
    found = by_name(SPARK)
    assert {check.status for check in found.values()} == {"ok"}
    assert len(found) <= 24, "one page"
    assert "MemTotal 121.69 GiB" in found["unified memory"].found


def gpu(**changes):
    return {"gpus": ({key: value for key, value in (GPU | changes).items() if value is not None},)}


@pytest.mark.parametrize(
    ("changes", "name", "status", "word"),
    [
        ({"machine": "x86_64"}, "machine", "missing", "aarch64"),
        ({"system": "Debian GNU/Linux 12"}, "system", "warn", "Debian"),
        ({"kernel": "6.8.0-45-generic"}, "kernel", "warn", "NVIDIA's"),
        ({"gpus": (), "no_gpu": "no NVIDIA driver answers: x"}, "gpu", "missing", "no NVIDIA driver"),
        (gpu(name="NVIDIA H200"), "gpu", "missing", "H200"),
        (gpu(driver="570.86"), "driver", "warn", "570.86"),
        (gpu(memory_used_bytes=1, memory_total_bytes=TOTAL), "nvml memory", "warn", "121.69 GiB"),
        (gpu(throttle_reasons=["sw_thermal_slowdown"]), "clocks", "warn", "sw_thermal_slowdown"),
        (gpu(max_sm_clock_mhz=850), "clocks", "warn", "850 MHz"),
        (gpu(temperature_celsius=71), "clocks", "warn", "71"),
        (gpu(temperature_celsius=None, max_sm_clock_mhz=None), "clocks", "ok", "None"),
        (gpu(processes=[{"pid": 4711}]), "gpu processes", "warn", "4711"),
        ({"cuda": "no NVIDIA driver here"}, "cuda", "missing", "no NVIDIA driver"),
        ({"cuda": replace(READING, cuda_version=12080)}, "cuda", "warn", "12.8"),
        ({"cuda": replace(READING, total_bytes=80 * GIB)}, "unified memory", "warn", "80.00 GiB"),
        ({"cuda": replace(READING, free_bytes=114 * GIB)}, "free is MemFree", "warn", "114.00 GiB"),
        ({"meminfo": SPARK.meminfo | {"MemTotal": 64 * GIB}}, "memory", "missing", "64.00 GiB"),
        ({"meminfo": SPARK.meminfo | {"MemAvailable": 60 * GIB}}, "memory", "warn", "60.00 GiB"),
        ({"meminfo": SPARK.meminfo | {"SwapTotal": 16 * GIB, "SwapFree": 15 * GIB}}, "swap", "warn", "1.00 GiB of 16"),
        ({"memlock_bytes": 8 << 20}, "memlock", "warn", "8.00 MiB"),
        ({"killers": ("earlyoom",)}, "other watchdogs", "warn", "earlyoom"),
        ({"root_acts": (False, "sudo asks for a password")}, "root acts", "missing", "password"),
        ({"docker": DockerFacts(error="no Docker engine answers", mend="start it")}, "docker", "missing", "answers"),
        ({"docker": replace(SPARK.docker, runtimes=("runc",))}, "docker gpu", "warn", "CDI"),
        ({"cdi_error": "x.yaml is no CDI specification"}, "docker gpu", "warn", "nvidia-ctk cdi generate"),
        ({"docker": replace(SPARK.docker, runtimes=(), cdi_devices=("nvidia.com/gpu=all",))}, "docker gpu", "ok", "=all"),
        ({"docker": replace(SPARK.docker, runtimes=()), "cdi_files": ("/etc/cdi/nvidia.yaml",)}, "docker gpu", "ok", "/etc/cdi"),
        ({"docker": replace(SPARK.docker, has_image=False)}, "image", "warn", "not here yet"),
        ({"has_rootfs": False}, "rootfs", "warn", "not here yet"),
        ({"has_rootfs": False, "has_model": False, "disks": {"/srv": (1, 50 * GIB), "/var/lib/docker": (2, GIB)}}, "disk", "missing", "69.00 GiB"),
        ({"disks": {"/srv": (1, 10 * GIB), "/var/lib/docker": (2, GIB)}}, "disk", "ok", "9.00 GiB"),
        ({"watchdog": Check("watchdog", "warn", "not locked")}, "watchdog", "warn", "not locked"),
    ],
)  # fmt: skip
def test_each_way_to_be_no_spark_is_named(changes, name, status, word):
    check = by_name(replace(SPARK, **changes))[name]
    assert check.status == status
    assert word in f"{check.found} {check.mend}"
    assert bool(check.mend) == (status != "ok") or name == "watchdog"


def test_what_is_still_to_come_is_counted_by_disk():
    bare = replace(SPARK, has_rootfs=False, has_model=False, docker=replace(SPARK.docker, has_image=False))
    assert "109.00 GiB" in by_name(bare)["disk"].found
    apart = replace(bare, disks={"/srv": (1, 70 * GIB), "/var/lib/docker": (2, 39 * GIB)})
    found = [check for check in spark_check.checks(apart) if check.name.startswith("disk")]
    assert [check.status for check in found] == ["ok", "missing"]


def test_the_image_is_that_of_the_experiments():
    for name in ("spark_kv_divergence", "phase1_replication", "discrete_gpu_control", "phase2_docker_flags"):
        data = yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text())
        of_arms = [
            arm["environment"] for arm in data["arms"].values() if isinstance(arm["environment"], dict)
        ]
        assert {each["image"] for each in of_arms if "image" in each} == {spark_check.IMAGE}
        assert {each["rootfs"] for each in of_arms if "rootfs" in each} == {spark_check.ROOTFS}
        assert data["limits"].get("gate", {}).get("temperature_celsius", 60) == spark_check.COOL_CELSIUS


# ---- looking ----------------------------------------------------------------------------------------------


def no_engine(timeout_s=60):  # noqa: ARG001
    raise UnavailableError("no Docker engine answers", mend="start it")


def reader(*lines):
    """A reader that answers each question with the next of these lines, and then ends."""
    script = "import sys\nfor line in sys.argv[1:]:\n    sys.stdin.readline()\n    print(line, flush=True)"
    return (sys.executable, "-S", "-c", script, *lines)


SAID = json.dumps(vars(READING))


def test_a_tree_of_files_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "connect", no_engine)
    monkeypatch.setattr(spark_check, "watchdog_check", lambda: SPARK.watchdog)
    etc, proc = tmp_path / "etc", tmp_path / "proc"
    (etc / "cdi").mkdir(parents=True)
    (etc / "os-release").write_text('NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.4 LTS"\n')
    (etc / "dgx-release").write_text('DGX_NAME="DGX Spark"\nDGX_SWBUILD_VERSION="7.4.0"\n')
    (etc / "cdi" / "nvidia.yaml").write_text("cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: []\n")
    (etc / "cdi" / "other.yaml").write_text("kind: vendor.com/net\n")
    for pid, name in (("7", "earlyoom"), ("8", "bash")):
        (proc / pid).mkdir(parents=True)
        (proc / pid / "comm").write_text(name + "\n")
    (proc / "meminfo").write_text((GB10 / "meminfo").read_text())
    (tmp_path / spark_check.ROOTFS).mkdir(parents=True)
    seen = spark_check.look(tmp_path, proc, etc, tmp_path / "run", reader(SAID))
    assert seen.system == "Ubuntu 24.04.4 LTS, DGX 7.4.0"
    assert seen.meminfo["MemTotal"] == TOTAL
    assert seen.cuda == READING
    assert seen.cdi_files == (str(etc / "cdi" / "nvidia.yaml"),)
    assert (seen.killers, seen.has_rootfs, seen.has_model) == (("earlyoom",), False, False)
    assert seen.docker.error
    assert by_name(seen)["docker"].status == "missing"
    (tmp_path / f"{spark_check.ROOTFS}.json").write_text("{}")
    (tmp_path / "models/x").mkdir(parents=True)
    (tmp_path / "models/x/config.json").write_text("{}")
    (etc / "cdi" / "other.yaml").write_text("kind: [of nobody here")
    (etc / "cdi" / "z.yaml").write_text("kind: nvidia.com/gpu\ndevices: [")
    seen = spark_check.look(tmp_path, proc, etc, tmp_path / "run", reader(SAID))
    assert (seen.has_rootfs, seen.has_model) == (True, True)
    assert "z.yaml is no CDI specification" in seen.cdi_error


def test_a_command_to_type_is_one_that_sudo_finds(monkeypatch, tmp_path):
    (tmp_path / "spark-ray").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    bare = replace(SPARK, has_rootfs=False, docker=replace(SPARK.docker, has_image=False))
    found = by_name(bare)
    assert found["rootfs"].mend.startswith(f"sudo {tmp_path}/spark-ray rootfs extract")
    assert found["image"].mend.startswith(f"{tmp_path}/spark-ray image pull")


def test_this_host_can_be_looked_at(tmp_path):
    done = spark_ray("doctor", "--spark", "--json", DOCKER_HOST=f"unix://{tmp_path}/no.sock")
    found = json.loads(done.stdout)["checks"]
    statuses = {check["status"] for check in found}
    assert done.returncode == (3 if "missing" in statuses else 0)
    assert {"machine", "gpu", "memory", "root acts", "docker", "disk"} <= {check["name"] for check in found}


def test_the_host_or_an_experiment(tmp_path):
    file = write_yaml(tmp_path, experiment_data())
    with pytest.raises(click.UsageError, match="choose"):
        cli.command.main(["doctor", "--spark", str(file)], standalone_mode=False)


# ---- CUDA memory ------------------------------------------------------------------------------------------


def test_two_readings_are_of_one_process():
    later = json.dumps(vars(READING) | {"free_bytes": 3})
    with cuda_view.CudaView(reader(SAID, later)) as view:
        assert [view.read().free_bytes, view.read().free_bytes] == [110 * GIB, 3]


@pytest.mark.parametrize(
    ("lines", "why"),
    [(['{"error": "cuInit: no device (CUDA error 100)"}'], "no device"), ([], "without a word")],
)
def test_why_there_is_no_reading_is_said(lines, why):
    assert why in cuda_view.once(reader(*lines))


def test_a_reader_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(cuda_view, "DEADLINE_S", 0.05)
    hanging = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
    assert "did not answer" in cuda_view.once(hanging)


def test_the_real_reader_answers_here():
    found = cuda_view.once()
    assert isinstance(found, cuda_view.Reading) or "NVIDIA driver" in found or "CUDA" in found
