"""A GPU's CDI specification, as NVIDIA's toolkit writes it, read for guests that no container runtime makes."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import experiment_data
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ray import cdi, content, driver, image
from spark_ray.environment_spec import ChrootEnvironment, DockerEnvironment
from spark_ray.environments import Content, Gpu, docker
from spark_ray.errors import InputError
from spark_ray.experiment import Experiment

VERSION = "580.95.05"


def hook(*arguments, program="nvidia-cdi-hook"):
    first = [program] if program == "nvidia-cdi-hook" else [program, "hook"]
    return {
        "hookName": "createContainer",
        "path": f"/usr/bin/{program}",
        "args": [*first, *arguments],
        "env": ["NVIDIA_CTK_DEBUG=false"],
    }


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A driver's files as ldconfig leaves them on an aarch64 host, and the specification of one GPU."""
    lib = tmp_path / "usr/lib/aarch64-linux-gnu"
    (tmp_path / "usr/bin").mkdir(parents=True)
    lib.mkdir(parents=True)
    for name, link in (
        ("libcuda", "libcuda.so.1"),
        ("libnvidia-ml", "libnvidia-ml.so.1"),
        ("libnvidia-gpucomp", None),
    ):
        (lib / f"{name}.so.{VERSION}").write_text(name)
        if link:
            (lib / link).symlink_to(f"{name}.so.{VERSION}")
    (lib / "libcudadebugger.so.1").symlink_to("elsewhere")
    (tmp_path / "usr/bin/nvidia-smi").write_text("a program")
    inside = "/usr/lib/aarch64-linux-gnu"
    mounts = [
        {
            "hostPath": str(lib / f"{name}.so.{VERSION}"),
            "containerPath": f"{inside}/{name}.so.{VERSION}",
            "options": ["ro", "rbind"],
        }
        for name in ("libcuda", "libnvidia-ml", "libnvidia-gpucomp")
    ]
    mounts.append({"hostPath": str(tmp_path / "usr/bin/nvidia-smi"), "containerPath": "/usr/bin/nvidia-smi"})
    mounts.append({"hostPath": "/lib/firmware/gsp.bin", "containerPath": "/lib/firmware/gsp.bin"})
    document = {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/full"}]}},
            {
                "name": "all",
                "containerEdits": {"deviceNodes": [{"path": "/dev/full"}, {"path": "/dev/nvidia-none"}]},
            },
        ],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [{"path": "/dev/null"}, {"path": "/dev/a", "hostPath": "/dev/b"}],
            "hooks": [
                hook(
                    "create-symlinks",
                    "--link",
                    f"libcuda.so.1::{inside}/libcuda.so",
                    "--link",
                    "../x::/usr/lib/gbm/nvidia-drm_gbm.so",
                ),
                hook("enable-cuda-compat", "--host-driver-version", VERSION),
                hook("update-ldcache", "--folder", inside, program="nvidia-ctk"),
            ],
            "mounts": mounts,
        },
    }
    monkeypatch.setattr(cdi, "FOLDERS", (tmp_path / "etc", tmp_path / "run"))
    return lib, document


def put(folder, document, name="nvidia.yaml"):
    folder.mkdir(exist_ok=True)
    text = json.dumps(document) if name.endswith("json") else yaml.safe_dump(document)
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", ["nvidia.yaml", "nvidia.json"])
def test_what_a_runtime_would_inject_is_found_under_every_name(host, tmp_path, name):
    lib, document = host
    put(tmp_path / "etc", document, name)
    found = cdi.find()
    assert found.version == VERSION
    assert found.source == str(tmp_path / "etc" / name)
    assert {name: Path(path).name for name, path in found.libraries.items()} == {
        "libcuda.so": f"libcuda.so.{VERSION}",
        "libcuda.so.1": f"libcuda.so.{VERSION}",
        f"libcuda.so.{VERSION}": f"libcuda.so.{VERSION}",
        "libnvidia-ml.so.1": f"libnvidia-ml.so.{VERSION}",
        f"libnvidia-ml.so.{VERSION}": f"libnvidia-ml.so.{VERSION}",
        f"libnvidia-gpucomp.so.{VERSION}": f"libnvidia-gpucomp.so.{VERSION}",
    }
    assert {str(Path(path).parent) for path in found.libraries.values()} == {str(lib)}
    assert found.programs == {"nvidia-smi": str(tmp_path / "usr/bin/nvidia-smi")}
    assert found.devices == ("/dev/full", "/dev/null")
    assert found.variables == {"NVIDIA_VISIBLE_DEVICES": "void"}


def test_what_is_not_given_is_named(host, tmp_path):
    put(tmp_path / "etc", host[1])
    assert set(cdi.find().left_out) == {
        "device /dev/nvidia-none (not on this host)",
        "device /dev/a (from /dev/b)",
        "link /usr/lib/gbm/nvidia-drm_gbm.so",
        "/lib/firmware/gsp.bin",
        "hook enable-cuda-compat",
    }


def test_the_generated_specification_wins_and_other_kinds_are_passed_over(host, tmp_path):
    put(tmp_path / "etc", host[1])
    put(tmp_path / "run", host[1])
    put(tmp_path / "run", {"kind": "vendor.com/nic", "devices": []}, "a.yaml")
    (tmp_path / "run/notes.txt").write_text("not: [a specification")
    assert cdi.find().source == str(tmp_path / "run/nvidia.yaml")


def test_without_a_device_called_all_every_gpu_is_given(host, tmp_path):
    document = host[1]
    document["devices"] = [
        {"name": number, "containerEdits": {"deviceNodes": [{"path": path}]}}
        for number, path in ((0, "/dev/zero"), (1, "/dev/full"))
    ]
    put(tmp_path / "run", document)
    assert cdi.find().devices == ("/dev/zero", "/dev/full", "/dev/null")


def test_none_where_there_is_none_or_it_names_no_libcuda(host, tmp_path):
    assert cdi.find() is None
    host[1]["containerEdits"]["mounts"] = []
    put(tmp_path / "run", host[1])
    assert cdi.find() is None


@pytest.mark.parametrize(
    ("change", "place"),
    [({"devices": "all"}, "devices"), ({"devices": [{"containerEdits": {}}]}, "devices.0.name"),
     ({"containerEdits": {"mounts": [{"hostPath": "/x"}]}}, "containerEdits.mounts.0.containerPath")],
)  # fmt: skip
def test_a_broken_one_is_named_with_its_place(host, tmp_path, change, place):
    put(tmp_path / "run", host[1] | change)
    with pytest.raises(InputError, match=rf"nvidia\.yaml is no CDI specification: {place}") as caught:
        cdi.find()
    assert "nvidia-ctk cdi generate" in caught.value.mend


def test_a_broken_file_is_ours_only_if_it_speaks_of_our_gpu(host, tmp_path):
    put(tmp_path / "etc", host[1])
    (tmp_path / "etc/a.yaml").write_text("kind: vendor.com/nic\ndevices: [")
    (tmp_path / "etc/b.json").write_bytes(b"\xff")
    assert cdi.find().source == str(tmp_path / "etc/nvidia.yaml")
    (tmp_path / "etc/c.yaml").write_text("kind: nvidia.com/gpu\ndevices: [")
    with pytest.raises(InputError, match=r"c\.yaml is no CDI specification") as caught:
        cdi.find()
    assert "nvidia-ctk cdi generate" in caught.value.mend


def test_a_broken_specification_is_a_problem_of_the_arms_that_need_it_and_no_other(host, tmp_path):
    put(tmp_path / "etc", host[1] | {"devices": "all"})
    (found,) = content.environment_problems(ChrootEnvironment(kind="chroot", gpus="all"))
    assert "is no CDI specification" in found.what
    assert content.environment_problems(ChrootEnvironment(kind="chroot")) == []
    data = experiment_data(kind="probe", memory_view="cuda")
    (found,) = content.engine_problems(Experiment.model_validate(data))
    assert "is no CDI specification" in found.what


PLAIN = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
EDITS = st.dictionaries(st.sampled_from(["env", "deviceNodes", "mounts", "hooks"]), PLAIN)


@settings(max_examples=150)
@given(
    st.fixed_dictionaries(
        {"kind": st.just(cdi.KIND)}, optional={"devices": PLAIN, "containerEdits": EDITS | PLAIN}
    )
)
def test_whatever_it_holds_it_is_read_or_refused_in_words(document):
    refused, found = "", None
    try:
        found = cdi.read(document, "x.yaml")
    except InputError as error:
        refused = error.message
    assert found is None  # a libcuda does not come about by chance
    assert refused == "" or refused.startswith("x.yaml is no CDI specification")


def test_a_guest_gets_it_after_the_images_own_paths(host, tmp_path):
    put(tmp_path / "run", host[1])
    made = content._with_driver(
        Content(python="python3", root="/r", variables={"LD_LIBRARY_PATH": "/own", "PATH": "/own/bin"})
    )
    assert made.variables["LD_LIBRARY_PATH"] == f"/own:{driver.INSIDE}"
    assert made.variables["PATH"] == f"/own/bin:{driver.INSIDE}"
    assert made.variables["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert {target for _, target, _ in made.mounts} >= {
        f"{driver.INSIDE}/libcuda.so.1",
        f"{driver.INSIDE}/nvidia-smi",
    }
    assert made.gpu.source == str(tmp_path / "run/nvidia.yaml")
    assert "hook enable-cuda-compat" in made.gpu.left_out


# ---- a daemon that knows CDI only ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granted", "exposure", "asked"),
    [("all", "request", "all"), ("cdi", "cdi", "cdi"), (None, "devices", None)],
)
def test_the_daemons_ways_are_tried_in_turn(host, tmp_path, monkeypatch, granted, exposure, asked):
    put(tmp_path / "run", host[1])
    monkeypatch.setattr(
        image, "try_flag", lambda _client, _image, settings: None if settings["gpus"] == granted else "no"
    )
    made = content._with_gpu(Content(python="python3", image_id="sha256:0"), None)
    assert made.gpu.exposure == exposure
    config = docker.flags(DockerEnvironment(kind="docker", gpus="all"), made.gpu)
    assert config["gpus"] == asked
    assert ("devices" in config) == (exposure == "devices")


@pytest.mark.docker
def test_this_daemon_is_asked_in_dockers_own_form():
    client = image.connect()
    try:
        asked = image.host_config(
            client, {"gpus": docker.flags(DockerEnvironment(kind="docker", gpus="all"), Gpu("cdi"))["gpus"]}
        )
    finally:
        client.close()
    (request,) = asked["DeviceRequests"]
    assert (request["Driver"], request["DeviceIDs"]) == ("cdi", ["nvidia.com/gpu=all"])


def test_a_host_with_a_specification_has_a_driver(host, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "find", lambda: None)
    data = experiment_data(kind="probe", memory_view="cuda")
    assert content.engine_problems(Experiment.model_validate(data))
    put(tmp_path / "run", host[1])
    assert not content.engine_problems(Experiment.model_validate(data))
