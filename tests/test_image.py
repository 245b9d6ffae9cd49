"""Images made from trees and back, with a real engine; nothing is ever pulled."""

import gc
import json
import os
from dataclasses import replace

import docker
import pytest

from spark_ray import image, rootfs, rootfs_image
from spark_ray.errors import InputError, UnavailableError, typed

pytestmark = pytest.mark.docker
TAG = f"spark_ray/test-{os.getpid()}"  # its own: test runs may share the engine


@pytest.fixture(scope="module")
def client():
    try:
        client = image.connect()
    except UnavailableError as error:
        pytest.skip(str(error))
    yield client
    for found in client.images.list(TAG):
        for tag in found.tags:
            if tag.startswith(TAG):
                client.images.remove(tag)
    client.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return rootfs.build_host(tmp_path_factory.getbasetemp() / "rootfs")


@pytest.fixture(scope="module")
def made(client, host):
    return image.build(client, host, f"{TAG}:host")


@pytest.fixture
def small(tmp_path):
    """A tree with one of everything, an environment with every awkward character, and an entrypoint."""
    tree = tmp_path / "small"
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/bin/python3").write_text("no program")
    (tree / "usr/bin/python3").chmod(0o4755)
    (tree / "usr/bin/python").symlink_to("/usr/bin/python3")
    (tree / "usr/bin/same").hardlink_to(tree / "usr/bin/python3")
    (tree / "usr/empty").write_text("")
    (tree / "usr/é name").write_bytes(bytes(range(256)) * 5000)
    rootfs.finish(tree)
    env = {"PATH": "/usr/bin", "AWKWARD": 'a "b" $HOME ${X} \\ c=d #e'}
    entrypoint = ("/opt/entry", '--with "quotes"')
    return rootfs.save(
        rootfs.Rootfs(
            tree, rootfs.content_sha256(tree), (), "/usr/bin/python3", env, entrypoint, "test", "/usr"
        )
    )


def containers(client):
    return {
        found.id for found in client.containers.list(all=True, filters={"label": "spark_ray.purpose=extract"})
    }


def run(client, host, made, code):
    """Run Python in a container with the rootfs' mounts; the tightest settings."""
    binds = {mount.source: {"bind": mount.target, "mode": "ro"} for mount in host.mounts}
    output = client.containers.run(
        made.id, [host.python, "-c", code], volumes=binds, network_mode="none", read_only=True, remove=True,
        cap_drop=["ALL"], tmpfs={"/tmp": "exec"}, stderr=True, user="1234:1234",
    )  # fmt: skip
    return output.decode()


# ---- the client -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # docker leaves its socket open
def test_no_daemon_says_how_to_start_it(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent")
    with pytest.raises(UnavailableError, match="no Docker engine answers at unix:///nonexistent") as caught:
        image.connect()
    assert "systemctl start docker" in caught.value.mend
    del caught
    gc.collect()


def test_no_permission_names_the_group():
    error = docker.errors.DockerException("Error while fetching server API version")
    error.__cause__ = ConnectionError("Connection aborted.", PermissionError(13, "Permission denied"))
    assert "usermod -aG docker" in image._unreachable(error).mend


@pytest.mark.usefixtures("client")
def test_versions_that_do_not_fit_are_named():
    error = docker.errors.InvalidVersion("API versions below 1.24 are no longer supported")
    assert "do not understand" in image._unreachable(error).message
    newer = docker.DockerClient.from_env(version="1.99")
    with pytest.raises(docker.errors.APIError) as caught:
        newer.version()
    newer.close()
    assert "do not understand" in image._unreachable(caught.value).message


@pytest.mark.parametrize("reference", ["spark_ray/no-such-image:1", "sha256:" + "0" * 64])
def test_a_missing_image_is_never_pulled(client, reference, tmp_path):
    for act in (
        lambda: image.inspect(client, reference),
        lambda: rootfs_image.extract(client, reference, tmp_path / "new"),
    ):
        with pytest.raises(UnavailableError, match=reference) as caught:
            act()
        assert caught.value.mend == typed(f"image pull {reference}")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_cannot_be_an_image_is_refused(client):
    with pytest.raises(InputError, match="cannot be an image"):
        image.inspect(client, "Not An Image")


# ---- there and back ---------------------------------------------------------------------------------------


def test_there_and_back_is_the_same_content(client, small, tmp_path):
    made = image.build(client, small, f"{TAG}:small")
    seen, before = [], containers(client)
    back = rootfs_image.extract(client, made.reference, tmp_path / "back", seen.append)
    assert back.sha256 == small.sha256 == made.rootfs_sha256
    assert (back.env, back.entrypoint, back.cwd) == (small.env, small.entrypoint, small.cwd)
    assert back.python == "/usr/bin/python3"
    assert seen == sorted(seen)
    assert seen[-1] > 1_000_000
    assert rootfs.load(tmp_path / "back") == back
    assert containers(client) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "back.json", "small", "small.json"]


def test_an_image_is_reused_until_content_or_settings_differ(client, small):
    reference = f"{TAG}:reuse"
    first = image.build(client, small, reference)
    assert image.build(client, small, reference) == first
    other = image.build(client, replace(small, env={"A": "b"}), reference)
    assert other.id != first.id
    assert image.inspect(client, reference).env == {"A": "b"}
    client.images.remove(first.id, force=True)


def test_the_tag_follows_from_the_content(client, small):
    made = image.build(client, small)
    try:
        assert made.reference == f"spark_ray/rootfs:{small.sha256[:16]}"
        labels = client.images.get(made.id).labels
        assert labels == {"spark_ray.rootfs_sha256": small.sha256}
    finally:
        client.images.remove(made.id, force=True)


def test_equal_trees_send_equal_bytes(small):
    assert b"".join(image._tar(small.path)) == b"".join(image._tar(small.path))


def test_a_line_break_in_the_environment_is_refused(client, small):
    with pytest.raises(InputError, match="line break"):
        image.build(client, replace(small, env={"A": "b\nc"}), f"{TAG}:never")


def test_a_broken_export_leaves_nothing(client, small, tmp_path, monkeypatch):
    made = image.build(client, small, f"{TAG}:small")
    before = containers(client)

    def broken(*_args, **_options):
        raise OSError("disk full")

    monkeypatch.setattr(rootfs_image, "unpack", broken)
    with pytest.raises(OSError, match="disk full"):
        rootfs_image.extract(client, made.id, tmp_path / "deep/back")
    assert list((tmp_path / "deep").iterdir()) == []
    assert containers(client) == before


def test_the_description_is_there_as_soon_as_the_tree_is(client, small, tmp_path, monkeypatch):
    """Hashing takes minutes on a real image; a tree that is ended there would be in its own way."""
    made = image.build(client, small, f"{TAG}:small")

    def ended(_tree):
        raise KeyboardInterrupt

    monkeypatch.setattr(rootfs_image, "content_sha256", ended)
    with pytest.raises(KeyboardInterrupt):
        rootfs_image.extract(client, made.id, tmp_path / "deep/back")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_stream_that_is_cut_is_said_in_words(client, small, tmp_path, monkeypatch):
    made = image.build(client, small, f"{TAG}:small")
    real = rootfs_image.unpack
    monkeypatch.setattr(
        rootfs_image,
        "unpack",
        lambda chunks, folder, progress: real([b"".join(chunks)[:400_000]], folder, progress),
    )
    with pytest.raises(UnavailableError, match=f"unpacking {made.id} failed"):
        rootfs_image.extract(client, made.id, tmp_path / "back")


def test_the_host_tree_survives_the_way_back(client, host, made, tmp_path):
    assert rootfs_image.extract(client, made.id, tmp_path / "back").sha256 == host.sha256


def test_python_runs_in_a_container(client, host, made):
    found = json.loads(
        run(client, host, made, "import json, os, sys; print(json.dumps([sys.version, os.getuid()]))")
    )
    assert found[1] == 1234


@pytest.mark.embedded
def test_torch_and_transformers_import_in_a_container(client, host, made):
    pytest.importorskip("torch")
    code = "import torch, transformers; print(torch.ones(2).sum().item(), transformers.__name__)"
    assert run(client, host, made, code) == "2.0 transformers\n"


@pytest.mark.docker
def test_flags_can_be_tried_before_any_image_was_made(client, monkeypatch):
    monkeypatch.setattr(image, "LABEL", "spark_ray.no_image_has_this")
    before = {each["Id"] for each in client.api.images(all=True)}
    with image.for_trying(client) as made:
        assert made not in before
        granted = image.try_flag(client, made, {"ipc_mode": "host"})
        refused = image.try_flag(
            client, made, {"ulimits": {"nofile": 1 << 62}}
        )  # above any kernel's fs.nr_open
    assert granted is not None
    assert image.no_such_program(granted)
    assert refused is not None
    assert not image.no_such_program(refused)
    assert {each["Id"] for each in client.api.images(all=True)} == before
