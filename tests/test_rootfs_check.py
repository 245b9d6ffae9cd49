"""What is seen in a vendor's tree without starting anything in it, and what is said of it before any effect."""

import io
import shutil
import tarfile
from types import SimpleNamespace

import pytest
from helpers import experiment_data

from spark_ray import content, doctor, driver, image, preview, rootfs, rootfs_check, rootfs_image
from spark_ray.environment_spec import ChrootEnvironment
from spark_ray.errors import InputError
from spark_ray.experiment import Experiment


@pytest.fixture
def tree(tmp_path):
    """As NVIDIA's images are laid out, for aarch64; paths are followed inside of it."""
    root = tmp_path / "tree"
    for name in (
        "usr/bin",
        "usr/local/cuda-13.0/bin",
        "etc/alternatives",
        "opt/hpcx/ompi/lib",
        "opt/hpcx/ucx/lib",
    ):
        (root / name).mkdir(parents=True)
    rootfs.finish(root)
    (root / "usr/bin/python3.12").write_bytes(b"\x7fELF\x02\x01" + bytes(12) + b"\xb7\x00")
    (root / "usr/bin/python3").symlink_to("/usr/bin/python3.12")
    (root / "usr/local/cuda").symlink_to("/etc/alternatives/cuda")
    (root / "etc/alternatives/cuda").symlink_to("/usr/local/cuda-13.0")
    for name in ("opt/hpcx/ompi/lib/libmpi.so.40", "opt/hpcx/ucx/lib/libucs.so.0"):
        (root / name).write_bytes(b"")
    package = root / "usr/local/lib/python3.12/dist-packages/tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (root / "etc/shinit_v2").write_text(
        "export LD_LIBRARY_PATH=/opt/hpcx/ucx/lib:/opt/hpcx/ompi/lib:$LD_LIBRARY_PATH\n"
    )
    (root / "opt/entry.sh").write_text("")
    return rootfs.save(
        rootfs.Rootfs(
            root,
            "0" * 64,
            (),
            "/usr/bin/python3",
            {"PATH": "/usr/bin"},
            ("/opt/entry.sh",),
            "x",
            "/",
            "sha256:1",
        )
    )


def looked(tree):
    return {each.name: each for each in rootfs_check.look(tree, module="tensorrt_llm")}


def test_what_a_whole_tree_holds_is_found_along_its_own_links(tree, monkeypatch):
    monkeypatch.setattr(driver, "loader_cache", lambda _=None: [])
    found = looked(tree)
    assert found["tensorrt_llm"].found == "/usr/local/lib/python3.12/dist-packages/tensorrt_llm"
    assert found["libmpi.so.40"].found == "/opt/hpcx/ompi/lib/libmpi.so.40"
    assert found["libucs.so.0"].found == "/opt/hpcx/ucx/lib/libucs.so.0"
    assert found["/usr/local/cuda"].found == "/usr/local/cuda-13.0"
    assert {each.status for name, each in found.items() if name != "machine"} == {"ok"}


def test_a_tree_of_another_processor_is_missing_on_this_host(tree, monkeypatch):
    monkeypatch.setattr(
        driver, "elf_kind", lambda path: (b"\x02\x01", b"\xb7\x00" if "tree" in str(path) else b"\x3e\x00")
    )
    assert looked(tree)["machine"].status == "missing"
    assert "is for aarch64" in looked(tree)["machine"].found
    spec = ChrootEnvironment(kind="chroot", rootfs=str(tree.path))
    assert "is for aarch64" in content.environment_problems(spec)[0].what


def test_each_lack_has_the_studys_own_mend(tree, monkeypatch):
    monkeypatch.setattr(
        driver, "loader_cache", lambda _=None: [("libucs.so.0", "/usr/lib/aarch64-linux-gnu/libucs.so.0")]
    )
    shutil.rmtree(tree.path / "usr/local/lib")
    shutil.rmtree(tree.path / "opt/hpcx/ompi")
    (tree.path / "etc/alternatives/cuda").unlink()
    (tree.path / "opt/entry.sh").unlink()
    assert {name for name, each in looked(tree).items() if each.status == "missing" and name != "machine"} == {
        "tensorrt_llm", "entrypoint"
    }  # fmt: skip
    assert {name for name, each in looked(tree).items() if each.status == "warn"} == {
        "libmpi.so.40",
        "/usr/local/cuda",
    }
    (tree.path / "etc/shinit_v2").write_text("")
    assert (
        looked(tree)["libucs.so.0"].status == "warn"
    )  # only the distribution's is known, and it is not there
    (tree.path / "usr/lib/aarch64-linux-gnu").mkdir(parents=True)
    (tree.path / "usr/lib/aarch64-linux-gnu/libucs.so.0").write_bytes(b"")
    assert looked(tree)["libucs.so.0"].status == "ok"
    (tree.path / "etc/shinit_v2").write_text(
        "export LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu:/opt/hpcx/ucx/lib\n"
    )
    mixed = looked(tree)["libucs.so.0"]
    assert (mixed.status, "UCX" in mixed.mend or "paths" in mixed.mend or "path" in mixed.mend) == (
        "warn",
        True,
    )


def test_a_package_that_a_pth_file_may_lead_to_is_not_called_missing(tree):
    packages = tree.path / "usr/local/lib/python3.12/dist-packages"
    shutil.rmtree(packages / "tensorrt_llm")
    assert looked(tree)["tensorrt_llm"].status == "missing"
    (packages / "__editable__.tensorrt_llm.pth").write_text("/src/tensorrt_llm\n")
    assert looked(tree)["tensorrt_llm"].status == "warn"


def test_paths_that_only_a_shell_reads_need_an_entrypoint(tree):
    bare = rootfs.save(rootfs.Rootfs(**{**vars(tree), "entrypoint": ()}))
    assert looked(bare)["entrypoint"].status == "warn"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("/usr/local/cuda/bin", "usr/local/cuda-13.0/bin"), ("/usr/bin/../bin/python3", "usr/bin/python3.12"), ("/../../etc", "etc"),
     ("/loop", None), ("/nowhere", None)],
)  # fmt: skip
def test_a_path_is_followed_as_inside(tree, path, wanted):
    (tree.path / "loop").symlink_to("/loop")
    assert rootfs_check.inside(tree.path, path) == (tree.path / wanted if wanted else None)


def test_an_archive_still_cannot_lead_out_of_its_folder(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../out"))
    with pytest.raises(InputError, match="leads out"):
        rootfs_image.unpack([stream.getvalue()], tmp_path)


# ---- before any effect ------------------------------------------------------------------------------------


def wanting_tensorrt_llm(rootfs_path, tmp_path):
    data = experiment_data(kind="tensorrt_llm")
    data["model"] = {"path": str(tmp_path)}
    data["arms"]["b"]["environment"] = {"kind": "chroot", "rootfs": str(rootfs_path), "gpus": "all"}
    return Experiment.model_validate(data)


def test_where_the_engine_is_not_is_said_with_the_mend_before_any_effect(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "loader_cache", lambda _=None: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    wanted = wanting_tensorrt_llm(tree.path, tmp_path)
    (native,) = content.library_problems(wanted, "a")
    assert "no tensorrt_llm in this interpreter" in native.what
    assert "spark-ray rootfs extract" in native.mend
    assert content.library_problems(wanted, "b") == []
    shutil.rmtree(tree.path / "usr/local/lib/python3.12")
    (lacking,) = content.library_problems(wanted, "b")
    assert f"no tensorrt_llm where /usr/bin/python3 of {tree.path} imports from" in lacking.what


@pytest.mark.parametrize(("now", "said"), [("sha256:1", 0), ("sha256:2", 1)])
def test_a_tree_of_an_older_image_of_that_name_is_warned_of(tree, monkeypatch, now, said):
    docker = {"kind": "docker", "image": "x"}
    data = experiment_data(arms=({"kind": "chroot", "rootfs": str(tree.path)}, docker, "native"))
    wanted = Experiment.model_validate(data)
    monkeypatch.setattr(image, "connect", lambda: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(
        image, "inspect", lambda _client, _name: SimpleNamespace(image=SimpleNamespace(id=now))
    )
    found = {name: preview._aged(wanted, arm.environment) for name, arm in wanted.arms.items()}
    assert {name: len(each) for name, each in found.items()} == {"a": said, "b": 0, "c": 0}


def test_doctor_shows_what_it_saw_in_a_vendors_tree(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "loader_cache", lambda _=None: [])
    shutil.rmtree(tree.path / "opt/hpcx/ompi")
    found = {each.name: each for each in doctor._trees(wanting_tensorrt_llm(tree.path, tmp_path))}
    assert found["b: tensorrt_llm"].status == "ok"
    assert found["b: libmpi.so.40"].status == "warn"
    assert "spark-ray rootfs extract" in found["b: libmpi.so.40"].mend
