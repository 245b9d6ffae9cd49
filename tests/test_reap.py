"""What a death leaves is found and removed; what lives, or is not ours, is not touched."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import experiment_data, guests_of, wait_until, write_yaml

from spark_ray import group, image, reap, rootact, rootfs
from spark_ray.rootact import RootActs
from spark_ray.store import Store

pytestmark = pytest.mark.process


def sweep(path, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "spark_ray.sweep", str(path), "--out", str(folder), "--local"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def client(request):
    if not request.node.get_closest_marker("docker"):
        yield None
        return
    made = image.connect()
    yield made
    made.close()


def test_a_driven_run_is_left_alone_and_a_dead_ones_file_goes(tmp_path):
    folder = tmp_path / "run"
    driver = sweep(write_yaml(tmp_path, experiment_data(blocks=1, hold="4s")), folder)
    assert wait_until(lambda: guests_of(folder), 30)
    fill = folder / "scratch" / "local-0" / "page-cache-fill-1"
    fill.parent.mkdir(parents=True, exist_ok=True)
    fill.write_bytes(b"x")
    assert reap.leftovers(folder, None) == []
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert wait_until(lambda: not guests_of(folder), 5)
    found = reap.leftovers(folder, None)
    assert [(one.kind, one.name) for one in found] == [("fill file", str(fill))]
    reap.remove(found[0], None)
    assert reap.leftovers(folder, None) == []


def test_a_process_of_a_dead_run_is_found_and_a_stranger_is_not(tmp_path):
    folder = tmp_path / "run"
    Store.create(folder, {}, {}).close()
    ours = subprocess.Popen(["sleep", "100"], env={"SPARK_RAY_RUN": str(folder)})
    stranger = subprocess.Popen(["sleep", "100"], env={"SPARK_RAY_RUNNER": str(folder)})
    found = reap.leftovers(folder, None)
    assert [(one.kind, one.name) for one in found] == [("process", str(ours.pid))]
    reap.remove(found[0], None)
    assert ours.wait(timeout=10) == -signal.SIGKILL
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.docker
def test_a_container_whose_guest_was_stopped_when_its_driver_died(tmp_path, client):
    """SIGSTOP of the whole container: nobody inside can notice. This is what reap is for."""
    folder = tmp_path / "run"
    driver = sweep(
        write_yaml(tmp_path, experiment_data(blocks=1, arms=("docker", "docker"), hold="30s")), folder
    )
    assert wait_until(lambda: guests_of(folder), 60)
    for pid in guests_of(folder):
        os.kill(pid, signal.SIGSTOP)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    found = [one for one in reap.leftovers(folder, client) if one.kind == "container"]
    assert len(found) == 1
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray", "reap", str(folder), "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert "would remove container" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray", "reap", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert "removed container" in done.stdout
    assert wait_until(lambda: not guests_of(folder), 10)
    assert reap.leftovers(folder, client) == []


@pytest.mark.root
def test_a_group_of_a_dead_run_goes_with_what_is_in_it_and_a_driven_one_stays(tmp_path, monkeypatch):
    """Also when its guest is stopped, in a pid namespace of its own or not."""
    acts = RootActs()
    run, other = tmp_path / "run", tmp_path / "other"
    names = [group.name_of(str(folder), "b0000.a/1") for folder in (run, other)]
    acts.run("make-group", names[0])
    driven = group.Group(names[1], None, acts.prefix())
    sleeper = subprocess.Popen(["sleep", "100"], env={})
    try:
        (driven.folder.parent / names[0] / "cgroup.procs").write_text(str(sleeper.pid))
        os.kill(sleeper.pid, signal.SIGSTOP)
        assert wait_until(lambda: names[0] in list(group.left()), 5), (
            "for a second its maker may be about to lock it"
        )
        assert names[1] not in list(group.left())
        assert reap.leftovers(other, None) == []
        (one,) = reap.leftovers(run, None)
        assert (one.kind, one.name, one.run) == ("cgroup", names[0], str(run))
        assert reap.remove(one, None) is None
        assert sleeper.wait(timeout=10) == -signal.SIGKILL
        assert not (driven.folder.parent / names[0]).exists()
        assert reap.remove(one, None) is None, "gone already is success"
        assert driven.folder.is_dir()
        monkeypatch.setattr(rootact.RootActs, "available", lambda self: (False, "no sudo"))  # noqa: ARG005
        assert "needs root" in reap.remove(one, None)
    finally:
        driven.finish()
        sleeper.kill()


def test_a_container_is_told_from_a_process_in_a_pid_namespace_of_its_own(tmp_path, monkeypatch):
    """By the id in its groups, beyond what this process itself has in its own."""
    outer, inner = "a" * 64, "b" * 64
    for name, space, path in (
        ("self", 1, f"/docker/{outer}"),
        ("same", 1, f"/docker/{inner}"),
        ("isolated", 2, f"/docker/{outer}/spark_ray/x"),
        ("container", 2, f"/docker/{inner}"),
    ):
        (tmp_path / name / "ns").mkdir(parents=True)
        (tmp_path / name / "ns" / "pid").symlink_to(f"pid:[{space}]")
        (tmp_path / name / "cgroup").write_text(f"4:memory:{path}\n0::/\n")
    monkeypatch.setattr(reap, "_SELF", tmp_path / "self")
    found = {name: reap._in_container(tmp_path / name) for name in ("same", "isolated", "container", "gone")}
    assert found == {"same": False, "isolated": False, "container": True, "gone": True}


# ---- what belongs to no run, and what is out of date --------------------------------------------------------


def reap_command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray", "reap", *map(str, arguments)],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    return done.stdout


def unfinished(cache):
    """Without what other runs of this machine left: a cgroup does not say whose it is."""
    return [one for one in reap.of_no_run(cache, None) if one.kind != "cgroup"]


def test_what_died_while_it_was_made_goes_and_what_is_being_made_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_RAY_CACHE", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    gone, living = (tmp_path / "models" / f"random-llama-0.part-{pid}" for pid in (dead.pid, os.getpid()))
    whole = tmp_path / "models" / "random-llama-0"
    for folder in (gone, living, whole, tmp_path / "rootfs" / ".tree.dead"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("")
        os.utime(folder, (0, 0))
    with rootfs.in_the_making(tmp_path / "rootfs" / "tree") as making:
        os.utime(making, (0, 0))
        found = {one.name for one in unfinished(tmp_path)}
        assert found == {str(gone), str(tmp_path / "rootfs" / ".tree.dead")}
        assert "would remove unfinished" in reap_command("--dry-run")
        assert gone.is_dir()
        reap_command()
        assert (gone.exists(), living.exists(), whole.exists(), making.exists()) == (False, True, True, True)
    assert unfinished(tmp_path) == []


def a_tree(cache, name, source):
    tree = cache / "rootfs" / name
    (tree / "etc").mkdir(parents=True)
    rootfs.save(
        rootfs.Rootfs(tree, "0" * 64, (rootfs.Mount(str(source), str(source)),), "python3", {}, (), "host")
    )
    (cache / "rootfs" / f"key-{name}.json").write_text(json.dumps({"tree": name, "sources": {}}))
    return tree


def test_a_tree_whose_environment_is_gone_is_stale_and_the_others_stay(tmp_path):
    here = tmp_path / "venv"
    here.mkdir()
    kept, old = a_tree(tmp_path, "kept", here), a_tree(tmp_path, "old", tmp_path / "deleted")
    (tmp_path / "rootfs" / "strange.json").write_text("{")
    (tmp_path / "rootfs" / "strange").mkdir()
    (one,) = reap.stale(tmp_path, None)
    assert (one.kind, one.name) == ("tree", str(old))
    assert reap.remove(one, None) is None
    left = sorted(path.name for path in (tmp_path / "rootfs").iterdir())
    assert left == ["kept", "kept.json", "key-kept.json", "strange", "strange.json"]
    assert kept.is_dir()
    assert reap.stale(tmp_path, None) == []


@pytest.mark.root
def test_a_tree_with_something_mounted_in_it_stays(tmp_path):
    tree = a_tree(tmp_path, "old", tmp_path / "deleted")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tree / "etc")], check=True)
    try:
        (one,) = reap.stale(tmp_path, None)
        assert "mounted at" in reap.remove(one, None)
        assert tree.is_dir()
    finally:
        subprocess.run(["umount", str(tree / "etc")], check=True)


@pytest.mark.docker
def test_an_image_whose_environment_is_gone_goes_and_one_in_use_stays(tmp_path, client):
    made = []
    for place, folder in enumerate((tmp_path / "deleted" / "bin", tmp_path)):
        tree = tmp_path / f"tree{place}"
        (tree / "etc").mkdir(parents=True)
        rootfs.finish(tree)
        env = {"PATH": f"{folder}:/usr/bin"}
        made.append(image.build(client, rootfs.Rootfs(tree, f"{os.getpid():064x}"[::-1][:63] + str(place), (), "python3", env, (), "host"), f"spark_ray/rootfs:test-{os.getpid()}-{place}"))  # fmt: skip
    gone, kept = (each.reference for each in made)
    container = client.api.create_container(made[0].id, command=["/none"])["Id"]
    try:
        stale = {one.name: one for one in reap.stale(tmp_path, client)}
        assert gone in stale
        assert kept not in stale
        assert "container" in reap.remove(stale[gone], client), "the engine's own words: it is in use"
        client.api.remove_container(container)
        assert reap.remove(stale[gone], client) is None
        assert reap.remove(stale[gone], client) is None, "gone already is success"
        assert gone not in {one.name for one in reap.stale(tmp_path, client)}
    finally:
        for each in made:
            image.remove_image(client, each.reference)


@pytest.mark.docker
def test_a_probe_container_left_behind_goes_when_it_is_old(tmp_path, client, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    rootfs.finish(tree)
    made = image.build(client, rootfs.Rootfs(tree, "e" * 64, (), "python3", {"PATH": "/bin"}, (), "host"), f"spark_ray/test:{os.getpid()}")  # fmt: skip
    labels = {reap.LABEL_PURPOSE: "probe"}
    container = client.api.create_container(made.id, command=["/none"], labels=labels)["Id"]
    try:
        assert container not in {one.name for one in reap.of_no_run(tmp_path, client)}, "it may be at work"
        monkeypatch.setattr(reap, "PROBE_AGE_S", -1)
        (one,) = [one for one in reap.of_no_run(tmp_path, client) if one.name == container]
        assert reap.remove(one, client) is None
        assert container not in {one.name for one in reap.of_no_run(tmp_path, client)}
    finally:
        image.remove_container(client, container)
        image.remove_image(client, made.reference)


def test_without_a_run_the_files_of_dead_runs_below_here_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "runs" / "one", tmp_path / "runs" / "night" / "two"):
        Store.create(folder, {}, {}).close()
        fill = folder / "scratch" / "local-0" / "page-cache-fill-1"
        fill.parent.mkdir(parents=True)
        fill.write_bytes(b"x")
    found = [one for one in reap.leftovers(None, None) if one.kind == "fill file"]
    assert sorted(Path(one.name).parts[-4] for one in found) == ["one", "two"]
