"""What a GPU host offers, on hosts without one: a driver of stand-in files, and NVML with its answers made up."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from helpers import experiment_data, write_yaml
from pydantic import ValidationError

from spark_ray import cdi, content, driver, image, nvml, rootact, rootfs
from spark_ray.environment_spec import ChrootEnvironment, DockerEnvironment
from spark_ray.environments import Content, Gpu, Site, chroot, docker
from spark_ray.errors import UnavailableError
from spark_ray.experiment import Experiment
from spark_ray.store import Store


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A dev folder and a library folder as the driver leaves them; the libraries are this interpreter's own file."""
    dev, lib, old = tmp_path / "dev", tmp_path / "lib", tmp_path / "lib32"
    for folder in (dev, lib, old):
        folder.mkdir()
    for node in ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-nvswitch0", "null"):
        (dev / node).touch()
    own = Path(sys.executable).resolve().read_bytes()[:64]
    for name in ("libcuda.so.580.1", "libnvidia-ml.so.580.1", "libnvidia-glcore.so.580.1", "libother.so.1"):
        (lib / name).write_bytes(own)
    (lib / "libcuda.so.1").symlink_to("libcuda.so.580.1")
    (lib / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.580.1")
    (old / "libcuda.so.1").write_bytes(own[:4] + b"\x01" + own[5:])  # 32 bits
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{old}:{lib}::/nowhere")
    monkeypatch.setattr(cdi, "FOLDERS", ())
    return SimpleNamespace(dev=dev, lib=lib)


def test_the_driver_is_its_nodes_and_its_compute_libraries_of_this_machine(files):
    found = driver.find(files.dev)
    assert found.version == "580.1"
    assert [Path(node).name for node in found.devices] == ["nvidia-uvm", "nvidia0", "nvidiactl"]
    wanted = {
        "libcuda.so.1": "libcuda.so.580.1", "libcuda.so.580.1": "libcuda.so.580.1",
        "libnvidia-ml.so.1": "libnvidia-ml.so.580.1", "libnvidia-ml.so.580.1": "libnvidia-ml.so.580.1",
    }  # fmt: skip
    mine = {name: path for name, path in found.libraries.items() if path.startswith(str(files.lib))}
    assert mine == {name: str(files.lib / target) for name, target in wanted.items()}


def test_no_node_or_no_libcuda_is_no_driver(files):
    (files.dev / "nvidia0").unlink()
    assert driver.find(files.dev) is None
    (files.dev / "nvidia0").touch()
    for name in ("libcuda.so.1", "libcuda.so.580.1"):
        (files.lib / name).unlink()
    assert driver.find(files.dev) is None or not driver.find(files.dev).libraries["libcuda.so.1"].startswith(
        str(files.lib)
    )


# ---- given to a guest -------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(files, monkeypatch):
    """A driver whose device node is one that every container may have."""
    found = dataclasses.replace(driver.find(files.dev), devices=("/dev/full",))
    monkeypatch.setattr(driver, "find", lambda: found)
    return found


def site(tmp_path, made):
    return Site(
        attempt=tmp_path, bundle=tmp_path, model=None, content=made, label="x/1", run_label="r", uid=0, gid=0
    )


def test_one_library_under_two_names_is_bound_twice(stand_in, tmp_path):
    made = content._with_driver(Content(python="python3", image_id="sha256:0", variables={}))
    start = docker.start(DockerEnvironment(kind="docker", gpus="all"), site(tmp_path, made))
    binds = start.container["host_config"]["binds"]
    real = stand_in.libraries["libcuda.so.1"]
    assert f"{real}:{driver.INSIDE}/libcuda.so.1:ro" in binds
    assert f"{real}:{driver.INSIDE}/libcuda.so.580.1:ro" in binds
    assert start.container["host_config"]["devices"] == ["/dev/full:/dev/full:rw"]
    assert start.container["host_config"]["gpus"] is None
    assert start.variables["LD_LIBRARY_PATH"] == driver.INSIDE


def test_the_daemons_own_way_binds_nothing(tmp_path):
    made = Content(python="python3", image_id="sha256:0", gpu=Gpu("request"))
    start = docker.start(DockerEnvironment(kind="docker", gpus="all"), site(tmp_path, made))
    assert start.container["host_config"]["gpus"] == "all"
    assert "devices" not in start.container["host_config"]


def test_a_chroot_gets_them_in_a_folder_of_its_own(stand_in, tmp_path):
    made = content._with_driver(Content(python="python3", root="/r", variables={"LD_LIBRARY_PATH": "/x"}))
    start = chroot.start(ChrootEnvironment(kind="chroot", gpus="all"), site(tmp_path, made))
    mounts = [(mount["source"], mount["target"], mount["read_only"]) for mount in start.enter["mounts"]]
    assert (None, driver.INSIDE, True) in mounts
    assert (stand_in.libraries["libcuda.so.1"], f"{driver.INSIDE}/libcuda.so.1", True) in mounts
    assert start.enter["env"]["LD_LIBRARY_PATH"] == f"/x:{driver.INSIDE}"  # the image's own come first


@pytest.mark.root
@pytest.mark.usefixtures("stand_in")
def test_inside_a_chroot_they_are_there_and_closed(tmp_path):
    tree = rootfs.build_host(content.cache_folder() / "rootfs")
    base = Content(
        python=tree.python,
        root=str(tree.path),
        mounts=tuple((m.source, m.target, m.read_only) for m in tree.mounts),
    )
    start = chroot.start(
        ChrootEnvironment(kind="chroot", gpus="all"), site(tmp_path, content._with_driver(base))
    )
    script = f"cat {driver.INSIDE}/libcuda.so.1 | head -c 4 && (: > {driver.INSIDE}/new) 2>/dev/null || echo closed"
    argv = ["/bin/sh", "-c", script.replace("| head -c 4 ", ">/dev/null ")]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(start.enter | {"argv": argv}))
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(rootact.ISOLATE), "enter", str(spec)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.stdout == "closed\n", done.stderr
    assert driver.INSIDE not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.process
@pytest.mark.root
@pytest.mark.docker
def test_a_sweep_gives_the_driver_to_chroot_and_container_and_says_how(tmp_path, files):
    """The whole way with stand-in files: plan, preparation, start, record. The daemon here has no GPU of its own to give."""
    path = write_yaml(
        tmp_path,
        {
            "name": "gpus",
            "engine": {"kind": "fake"},
            "search": {
                "blocks": 1,
                "space": {"max_batch_size": 8, "max_num_tokens": 8, "memory_fraction": 0.5},
            },
            "arms": {
                "chroot": {"environment": {"kind": "chroot", "gpus": "all"}},
                "docker": {"environment": {"kind": "docker", "gpus": "all"}},
            },
        },
    )
    code = (
        "import dataclasses, sys; from pathlib import Path; from spark_ray import cdi, driver, sweep\n"
        "cdi.FOLDERS = ()\n"
        f"found = dataclasses.replace(driver.find(Path({str(files.dev)!r})), devices=('/dev/full',))\n"
        "driver.find = lambda: found\n"
        f"sweep.command([{str(path)!r}, '--local', '--out', {str(tmp_path / 'run')!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"LD_LIBRARY_PATH": str(files.lib)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for record in Store.read(tmp_path / "run").records():
        assert record["outcome"]["kind"] == "ok"
        assert record["content"]["gpu"] == {
            "exposure": "devices",
            "driver": "580.1",
            "devices": ["/dev/full"],
            "source": "files",
            "left_out": [],
        }
        seen = record["result"]["evidence"]["environment"]
        assert seen["LD_LIBRARY_PATH"].split(":")[-1] == seen["PATH"].split(":")[-1] == driver.INSIDE


def test_without_a_driver_it_is_a_problem_of_the_plan(monkeypatch):
    monkeypatch.setattr(cdi, "FOLDERS", ())
    monkeypatch.setattr(driver, "find", lambda: None)
    (problem,) = content.environment_problems(ChrootEnvironment(kind="chroot", gpus="all"))
    assert "no NVIDIA driver" in problem.what
    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        content._with_driver(Content(python="python3"))


# ---- NVML -------------------------------------------------------------------------------------------------


@pytest.fixture
def gb10(monkeypatch):
    """One device that answers as GB10 does: no device memory of its own, the rest as usual."""

    def refuse(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    process = SimpleNamespace(pid=7, usedGpuMemory=None)
    answers = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index, "nvmlDeviceGetMemoryInfo": refuse,
        "nvmlDeviceGetName": lambda _: "NVIDIA GB10", "nvmlDeviceGetUUID": lambda _: "GPU-0",
        "nvmlSystemGetDriverVersion": lambda: "580.95.05", "nvmlDeviceGetTemperature": lambda *_: 41,
        "nvmlDeviceGetPowerUsage": lambda _: 4500, "nvmlDeviceGetTotalEnergyConsumption": lambda _: 2500,
        "nvmlDeviceGetClockInfo": lambda *_: 2418, "nvmlDeviceGetMaxClockInfo": lambda *_: 3003, "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=3),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 0x21 | 1 << 40,
        "nvmlDeviceGetComputeRunningProcesses": lambda _: [process],
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    nvml.memory_bytes.cache_clear()
    yield
    nvml.memory_bytes.cache_clear()


@pytest.mark.usefixtures("gb10")
def test_what_a_device_does_not_answer_is_absent_with_its_words_never_zero():
    with nvml.Reader() as reader:
        (reading,) = reader.read()
        (row,) = reader.sample()
    assert reading["absent"] == {
        "memory_total_bytes": "Not Supported",
        "memory_used_bytes": "Not Supported",
    }
    assert "memory_used_bytes" not in reading
    assert reading["power_w"] == 4.5
    assert reading["energy_j"] == 2.5
    assert reading["processes"] == [{"pid": 7}]
    assert reading["throttle_reasons"] == ["idle", "sw_thermal_slowdown", hex(1 << 40)]
    assert dict(zip(nvml.SAMPLE_FIELDS, row, strict=True))["memory_used_bytes"] is None


@pytest.mark.usefixtures("gb10")
def test_a_question_that_failed_once_is_asked_again(monkeypatch):
    answers = iter([pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT), 5000])

    def power(_):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", power)
    with nvml.Reader() as reader:
        assert "power_w" in reader.read()[0]["absent"]
        assert reader.read()[0]["power_w"] == 5.0


@pytest.mark.parametrize(
    ("refusal", "only"),
    [
        ('exec: "/bin/true": stat /bin/true: no such file or directory', True),
        ('exec: "/bin/true": executable file not found in $PATH', True),
        ("nvidia-container-cli: libnvidia-ml.so.1: no such file or directory", False),
    ],
)
def test_a_toolkit_that_breaks_is_not_an_image_without_true(refusal, only):
    assert image.no_such_program(refusal) is only


@pytest.mark.usefixtures("gb10")
def test_unified_memory_is_the_hosts_and_counts_once():
    assert nvml.memory_bytes() == 0


def test_a_host_without_a_driver_says_why(monkeypatch):
    def missing():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    nvml.memory_bytes.cache_clear()
    with nvml.Reader() as reader:
        assert reader.why_not.startswith("no NVIDIA driver answers")
        assert reader.read() == reader.sample() == reader.describe() == []
    assert nvml.memory_bytes() == 0
    assert isinstance(nvml.fields(), str)
    nvml.memory_bytes.cache_clear()


# ---- an arm of its own on the GPU -------------------------------------------------------------------------


def embedded(memory_view="memfree", **own):
    data = experiment_data() | {"model": {"random_llama": {}}}
    data["engine"] = {"kind": "embedded", "memory_view": memory_view}
    data["arms"]["b"]["engine"] = own
    return data


def test_a_view_of_main_memory_does_not_go_with_a_gpu_also_when_an_arm_sets_one_of_the_two():
    assert Experiment.model_validate(embedded(device="cuda")).engine_of("b").needs_gpu
    with pytest.raises(ValidationError, match="memory_view cgroup is of main memory"):
        Experiment.model_validate(embedded("cgroup", device="cuda"))


@pytest.mark.embedded
def test_one_arm_on_the_gpu_is_enough_to_need_a_driver(monkeypatch):
    monkeypatch.setattr(cdi, "FOLDERS", ())
    monkeypatch.setattr(driver, "find", lambda: None)
    on_cpu, on_gpu = (Experiment.model_validate(embedded(**own)) for own in ({}, {"device": "cuda"}))
    assert "no NVIDIA driver" not in str(content.engine_problems(on_cpu))
    assert "no NVIDIA driver" in str(content.engine_problems(on_gpu))
