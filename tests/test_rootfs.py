"""Trees: one name for content, safe unpacking, and the host's own Python made to run in another root."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ray import content as contents
from spark_ray import rootact, rootfs, rootfs_host, rootfs_image
from spark_ray.environment_spec import ChrootEnvironment, NativeEnvironment
from spark_ray.errors import InputError, UnavailableError
from spark_ray.rootfs import Mount, Rootfs, bound_sha256, content_sha256, load, save
from spark_ray.rootfs_image import unpack


def needs_root(test):
    return pytest.mark.root(pytest.mark.skipif(os.geteuid() != 0, reason="needs root")(test))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "rootfs"


@pytest.fixture(scope="session")
def host(cache):
    return rootfs.build_host(cache)


@pytest.fixture
def lasting():
    """A folder outside of /tmp, which guests have to themselves."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def enter(built, folder, *argv):
    """Run a command in the tree with its mounts; `built` is a rootfs as JSON holds it."""
    spec = {"root": built["path"], "mounts": built["mounts"], "argv": argv, "env": built["env"], "tmp": True}
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-I", "-S", str(rootact.ISOLATE), "enter", str(folder / "spec.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


# ---- content ----------------------------------------------------------------------------------------------

NAMES = st.text("abc.é", min_size=1, max_size=4).filter(lambda name: name not in {".", ".."})
FILES = st.tuples(st.just("file"), st.binary(max_size=20), st.sampled_from([0o600, 0o644, 0o755, 0o4755]))
LINKS = st.tuples(st.just("link"), st.text("ab/.", min_size=1, max_size=6), st.just(0))
FOLDERS = st.tuples(
    st.just("folder"), st.dictionaries(NAMES, FILES | LINKS, max_size=3), st.sampled_from([0o700, 0o755])
)
TREES = st.dictionaries(NAMES, FILES | LINKS | FOLDERS, min_size=1, max_size=5)


def make(folder, tree, order=list, time_s=0):
    for name, (kind, content, mode) in order(tree.items()):
        path = folder / name
        if kind == "link":
            path.symlink_to(content)
            continue
        if kind == "file":
            path.write_bytes(content)
        else:
            path.mkdir()
            make(path, content, order, time_s)
        path.chmod(mode)
        os.utime(path, (time_s, time_s))


def hash_of(tree, **how):
    with tempfile.TemporaryDirectory() as name:
        make(folder := Path(name), tree, **how)
        return content_sha256(folder)


@settings(max_examples=60)
@given(TREES)
def test_order_and_times_do_not_count(tree):
    assert hash_of(tree) == hash_of(tree, order=lambda items: reversed(list(items)), time_s=1_000_000)


@settings(max_examples=100)
@given(TREES, st.data())
def test_name_content_mode_type_and_target_count(tree, data):
    name = data.draw(st.sampled_from(sorted(tree)))
    kind, content, mode = tree[name]
    other = dict(tree)
    change = data.draw(st.sampled_from(["name", "content", "mode", "type", "removed"]))
    if change == "name":
        other[name + "x"] = other.pop(name)
    elif change == "removed":
        del other[name]
    elif change == "type":
        other[name] = ("folder", {}, 0o755) if kind != "folder" else ("file", b"", 0o755)
    elif change == "mode" and kind != "link":
        other[name] = (kind, content, mode ^ 0o020)
    elif kind == "folder":
        other[name] = (kind, {**content, "new": ("file", b"", 0o644)}, mode)
    else:
        other[name] = (kind, content + (b"x" if kind == "file" else "x"), mode)
    assert hash_of(other) != hash_of(tree)


def test_names_and_content_do_not_flow_together():
    assert hash_of({"ab": ("file", b"c", 0o644)}) != hash_of({"a": ("file", b"bc", 0o644)})


def test_the_kernels_folders_count_but_not_what_is_below(tmp_path):
    (tmp_path / "dev").mkdir()
    before = content_sha256(tmp_path)
    (tmp_path / "dev/null").write_text("")
    assert content_sha256(tmp_path) == before


def test_what_is_bound_is_named_by_its_packages_wherever_they_lie(tmp_path):
    for place in ("a", "b/c"):
        record = tmp_path / place / "torch-1.dist-info/RECORD"
        record.parent.mkdir(parents=True)
        record.write_text("torch/__init__.py,sha256=x,1\n")
    one, other = (bound_sha256([Mount(f"{tmp_path}/{place}", "/x")]) for place in ("a", "b"))
    assert one == other != bound_sha256([])
    (tmp_path / "a/torch-1.dist-info/RECORD").write_text("torch/__init__.py,sha256=y,1\n")
    assert bound_sha256([Mount(str(tmp_path / "a"), "/x")]) != other


# ---- the description --------------------------------------------------------------------------------------


def test_the_description_lies_beside_the_tree_and_moves_with_it(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    saved = save(
        Rootfs(tree, "00", (Mount("/a", "/b"),), "/bin/python", {"A": "b"}, ("/entry",), "host", "/work")
    )
    assert list(tree.iterdir()) == []
    assert load(tree) == saved
    tree.rename(tmp_path / "moved")
    (tmp_path / "tree.json").rename(tmp_path / "moved.json")
    assert load(tmp_path / "moved") == replace(saved, path=tmp_path / "moved")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"path": "x"}'])
def test_a_wrong_description_is_refused(tmp_path, text):
    (tmp_path / "tree").mkdir()
    with pytest.raises(UnavailableError, match="no rootfs"):
        load(tmp_path / "tree")
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(InputError, match="does not describe a rootfs"):
        load(tmp_path / "tree")


# ---- unpacking --------------------------------------------------------------------------------------------


def tar(*members):
    """(name, kind, content or link target, mode) as tar bytes."""
    out = io.BytesIO()
    kinds = dict(zip(("dir", "sym", "hard", "dev", "file"), (b"5", b"2", b"1", b"3", b"0"), strict=True))
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, content, mode in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid = kinds[kind], mode, 1234, 4321
            body = content.encode() if kind == "file" else b""
            info.size, info.linkname = len(body), "" if kind == "file" else content
            archive.addfile(info, io.BytesIO(body))
    return out.getvalue()


def test_modes_links_and_owners_are_kept_and_devices_left_out(tmp_path):
    seen = []
    data = tar(
        ("./", "dir", "", 0o755),
        ("full", "dir", "", 0o555),
        ("full/su", "file", "x", 0o4755),
        ("full/same", "hard", "full/su", 0),
        ("away", "sym", "/etc/passwd", 0o777),
        ("away2", "hard", "away", 0),
        ("node", "dev", "", 0o666),
        ("dev", "dir", "", 0o755),
        ("dev/console", "file", "", 0o600),
    )
    unpack([data[:700], b"", data[700:]], tmp_path, seen.append)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["away", "away2", "dev", "full", "same", "su"]
    found = (tmp_path / "full/su").stat()
    assert (oct(found.st_mode), found.st_nlink) == ("0o104755", 2)
    assert (tmp_path / "full").stat().st_mode & 0o777 == 0o555
    assert (tmp_path / "away2").is_symlink()
    assert seen == [700, len(data)]
    assert (found.st_uid, found.st_gid) == (1234, 4321) or os.geteuid() != 0


@pytest.mark.parametrize(
    "members",
    [
        [("../x", "file", "", 0o644)],
        [("a/../../x", "file", "", 0o644)],
        [("{outside}/x", "file", "", 0o644)],
        [("a", "sym", "{outside}", 0), ("a/x", "file", "", 0o644)],
        [("a", "sym", "..", 0), ("a/x", "dir", "", 0o755)],
        [("x", "sym", "{outside}/x", 0), ("x", "file", "", 0o644)],
        [("x", "hard", "../outside/secret", 0)],
        [("x", "hard", "{outside}/secret", 0)],
        [("a", "sym", "{outside}", 0), ("x", "hard", "a/secret", 0)],
    ],
)
def test_nothing_is_written_or_reached_outside_of_the_folder(tmp_path, members):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (outside / "secret").write_text("secret")
    filled = [
        (name.format(outside=outside), kind, text.format(outside=outside), mode)
        for name, kind, text, mode in members
    ]
    with pytest.raises(InputError, match=r"leads out of the folder|twice"):
        unpack([tar(*filled)], folder)
    assert names(outside) == ["secret"]
    assert names(tmp_path) == ["folder", "outside"]
    assert not (folder / "x").is_file()


def test_a_tree_whose_etc_leads_away_is_refused(tmp_path):
    (tmp_path / "away").mkdir()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/etc").symlink_to(tmp_path / "away")
    with pytest.raises(InputError, match="symbolic link"):
        rootfs.finish(tmp_path / "tree")
    assert names(tmp_path / "away") == []


# ---- the host's environment -------------------------------------------------------------------------------


def test_links_on_the_way_are_recreated_and_bound_folders_left_alone(lasting):
    real, tree = lasting / "real", lasting / "tree"
    (real / "bound").mkdir(parents=True)
    tree.mkdir()
    (real / "file").write_text("content")
    (real / "bound/file").symlink_to("../short")
    (real / "short").symlink_to("file")
    (lasting / "link").symlink_to("real")
    copied = rootfs_host.bring(tree, f"{lasting}/link/bound/file", [real / "bound"])
    inside = tree / lasting.relative_to("/")
    assert copied == str(real / "file")
    assert (inside / "link").readlink() == Path("real")
    assert (inside / "real/short").readlink() == Path("file")
    assert (inside / "real/file").read_text() == "content"
    assert names(inside / "real/bound") == []


def test_a_link_below_tmp_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real").mkdir()
    (tmp_path / "tree").mkdir()
    with pytest.raises(InputError, match="symbolic link") as caught:
        rootfs_host.bring(tmp_path / "tree", f"{tmp_path}/link/python", [])
    assert f"{tmp_path}/real" in caught.value.mend


def test_the_host_tree_is_whole_and_cached(host, cache):
    assert host.path.name == host.sha256[:16] == content_sha256(host.path)[:16]
    assert load(host.path) == host == rootfs.build_host(cache)
    assert (host.path / "tmp").stat().st_mode & 0o7777 == 0o1777
    for mount in (*host.mounts, Mount("", "/spark_ray/attempt"), Mount("", "/spark_ray/model")):
        assert (host.path / mount.target[1:]).is_dir()
    assert not list(host.path.rglob("libcuda*"))
    assert not [path.name for path in cache.iterdir() if path.name.startswith(".")]


def test_builds_at_once_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(rootfs_host, "_shared_objects", lambda _bound: [os.path.realpath(sys.executable)])
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(rootfs.build_host, [tmp_path / "cache"] * 4))
    assert len({one.sha256 for one in built}) == 1
    assert content_sha256(built[0].path) == built[0].sha256
    assert len(names(tmp_path / "cache")) == 3  # the tree, its description, its key


def test_a_changed_system_library_builds_again_and_a_changed_tree_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rootfs_host, "_shared_objects", lambda _bound: [os.path.realpath(sys.executable)])
    first = rootfs.build_host(tmp_path)
    note = next(tmp_path.glob("key-*"))
    said = json.loads(note.read_text())
    note.write_text(json.dumps({**said, "sources": dict.fromkeys(said["sources"])}))
    assert rootfs.build_host(tmp_path) == first
    assert json.loads(note.read_text()) == said
    (first.path / "etc/passwd").write_text("")
    with pytest.raises(InputError, match="was changed") as caught:
        rootfs.build_host(tmp_path)
    assert str(first.path) in caught.value.mend


@needs_root
def test_python_runs_in_the_tree(host, tmp_path):
    done = enter(
        json.loads(host.to_json()),
        tmp_path,
        host.python,
        "-c",
        "import ssl, sqlite3, sys; print(sys.version)",
    )
    assert (done.stdout, done.stderr) == (f"{sys.version}\n", "")


@needs_root
@pytest.mark.embedded
def test_torch_and_transformers_import_in_the_tree(host, tmp_path):
    pytest.importorskip("torch")
    code = "import torch, transformers; print(torch.ones(2).sum().item(), transformers.__name__)"
    done = enter(json.loads(host.to_json()), tmp_path, host.python, "-c", code)
    assert done.stdout == "2.0 transformers\n", done.stderr


@needs_root
@pytest.mark.parametrize("kind", ["system", "venv", "venv --copies", "linked venv"])
def test_any_way_of_having_python_works(kind, lasting, cache):
    """The builder needs the standard library only, so any Python can make its own tree."""
    system = shutil.which("python3", path="/usr/bin")
    recent = [system, "-c", "import sys, venv; sys.exit(sys.version_info < (3, 11))"]
    if (python := system) is None or subprocess.run(recent, check=False).returncode:
        pytest.skip("no system Python 3.11 or later with venv")
    if kind != "system":
        copies = ["--copies"] if "copies" in kind else []
        subprocess.run([system, "-m", "venv", "--without-pip", *copies, lasting / "real/venv"], check=True)
        python = lasting / "real/venv/bin/python"
    if kind == "linked venv":
        (lasting / "link").symlink_to("real")
        python = lasting / "link/venv/bin/python"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from spark_ray import rootfs"
    )
    code += "; print(rootfs.build_host(Path(sys.argv[2])).to_json())"
    arguments = [str(Path(rootfs.__file__).parent.parent), str(cache)]
    made = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert made.returncode == 0, made.stderr
    built = json.loads(made.stdout)
    assert not {"/", "/usr", "/usr/local"} & {mount["source"] for mount in built["mounts"]}
    probe = "import ssl, ctypes, sys, os; print(sys.prefix, os.__file__)"
    done = enter(built, lasting, built["python"], "-c", probe)
    outside = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (outside.stdout, "")


# ---- from a distribution ----------------------------------------------------------------------------------


def test_a_folder_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="is in the way"):
            rootfs.debootstrap(folder)
        with pytest.raises(InputError, match="is in the way"):
            rootfs_image.extract(None, "any", folder)


def test_without_debootstrap_the_mend_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="not installed") as caught:
        rootfs.debootstrap(tmp_path / "new")
    assert "apt-get install debootstrap" in caught.value.mend


@needs_root
@pytest.mark.skipif(shutil.which("dpkg") is None, reason="needs dpkg")
@pytest.mark.parametrize("works", [True, False])
def test_debootstrap_is_called_for_this_architecture(tmp_path, monkeypatch, works):
    program = tmp_path / "bin/debootstrap"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "E: no such suite"; {"" if works else "exit 1"}\n'
        'mkdir -p "$5/usr/bin" "$5/etc"; touch "$5/usr/bin/python3"; echo "$@" > "$5/etc/arguments"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    if not works:
        with pytest.raises(UnavailableError, match="no such suite"):
            rootfs.debootstrap(tmp_path / "new")
        assert names(tmp_path) == ["bin"]
        return
    made = rootfs.debootstrap(tmp_path / "new", packages=("python3",))
    assert made.python == "/usr/bin/python3"
    assert made.mounts == ()
    assert (made.path / "etc/arguments").read_text().startswith("--variant=minbase --arch=")
    assert load(made.path) == made


def test_native_names_what_it_runs_on_as_the_tree_made_from_it_does(host):
    """So that the fingerprint can tell that native, chroot and docker run the same packages."""
    assert rootfs.host_mounts() == host.mounts
    native, chroot = (
        contents.prepare(spec, None)
        for spec in (NativeEnvironment(kind="native"), ChrootEnvironment(kind="chroot"))
    )
    assert native.bound_sha256 == chroot.bound_sha256 == bound_sha256(host.mounts)


@pytest.mark.parametrize(
    ("source", "read_only"),
    [("/var/run/docker.sock", True), ("/run", True), ("/", True), ("/etc", True), ("HERE", False)],
)
def test_a_description_that_binds_more_than_an_interpreter_is_refused(tmp_path, source, read_only):
    tree = tmp_path / "tree"
    for name in rootfs.MOUNT_POINTS:
        (tree / name).mkdir(parents=True)
    here = str(tmp_path)
    bound = Mount(here if source == "HERE" else source, "/x", read_only)
    rootfs.save(Rootfs(tree, "00", (bound,), "/bin/python", {}, (), "host"))
    with pytest.raises(InputError, match="which no build of a rootfs does"):
        rootfs.load_usable(tree)
    rootfs.save(Rootfs(tree, "00", (Mount(here, here),), "/bin/python", {}, (), "host"))
    assert rootfs.load_usable(tree).mounts == (Mount(here, here),)
