"""Root acts, for real: mounts that end with the process, drained lists, refusals before any effect."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import wait_until

from spark_ray import privileged, rootact, rootfs
from spark_ray.errors import UnavailableError
from spark_ray.rootact import RootActs
from spark_ray.worker import observe

PREFIX = [sys.executable, "-I", "-S"]
SCRIPTS = [rootact.SCRIPT, rootact.ISOLATE]
HIGH_FRACTION = Path(privileged.HIGH_FRACTION)


def needs_root(test):
    return pytest.mark.root(pytest.mark.skipif(os.geteuid() != 0, reason="needs root")(test))


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return rootfs.build_host(tmp_path_factory.getbasetemp() / "rootfs").path


def act(*args, **options):
    return subprocess.run(
        rootact.act(PREFIX, *args), capture_output=True, text=True, timeout=600, check=False, **options
    )


def spec_file(folder, tree, *argv, **more):
    path = folder / "spec.json"
    path.write_text(json.dumps({"root": str(tree), "argv": argv, "env": {"PATH": "/usr/bin:/bin"}} | more))
    return str(path)


def mounts_of_host():
    """Without those of containers, which come and go."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/docker/" not in line and "/containers/" not in line]


# ---- the script -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (rootact.SCRIPT, []),
        (rootact.SCRIPT, ["reboot"]),
        (rootact.SCRIPT, ["drop-caches", "now"]),
        (rootact.SCRIPT, ["make-group"]),
        (rootact.SCRIPT, ["make-group", "x", "-1"]),
        (rootact.SCRIPT, ["enter", "a"]),
        (rootact.ISOLATE, []),
        (rootact.ISOLATE, ["enter"]),
        (rootact.ISOLATE, ["enter", "a", "b"]),
        (rootact.ISOLATE, ["probe"]),
    ],
)
def test_any_other_word_is_refused_in_one_line(script, words):
    done = subprocess.run([*PREFIX, script, *words], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert ("drop-caches, drain-per-cpu" if script == rootact.SCRIPT else "enter SPEC.json") in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_imports_the_standard_library_only_and_parses_as_python_3_10(script):
    parsed = ast.parse(script.read_text(), feature_version=(3, 10))
    names = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    assert names <= sys.stdlib_module_names
    assert not names & {"subprocess", "pathlib"}  # slow to import


@needs_root
def test_dropping_caches_works():
    done = act("drop-caches")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_root
def test_draining_empties_the_lists_and_restores_the_setting():
    before = HIGH_FRACTION.read_text()
    both = [
        subprocess.Popen(rootact.act(PREFIX, "drain-per-cpu"), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [json.loads(process.communicate(timeout=600)[0]) for process in both]  # at once: they take turns
    assert HIGH_FRACTION.read_text() == before
    for one in said:
        assert one["after_bytes"] < max(64 << 20, one["before_bytes"] // 2)


# ---- enter ------------------------------------------------------------------------------------------------


@needs_root
def test_the_guest_keeps_process_id_streams_and_exact_environment(tree, tmp_path):
    spec = spec_file(
        tmp_path, tree, "/bin/sh", "-c", "echo $$; cat; echo err >&2; cat /proc/self/environ; exit 7"
    )
    process = subprocess.Popen(
        rootact.act(PREFIX, "enter", spec),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate("through stdin\n", timeout=600)
    assert process.returncode == 7
    assert out.startswith(f"{process.pid}\nthrough stdin\n")
    assert "PATH=/usr/bin:/bin" in out
    assert "HOME=" not in out
    assert err == "err\n"


@needs_root
def test_no_mount_outlives_a_killed_guest(tree, tmp_path):
    before = mounts_of_host()
    spec = spec_file(tmp_path, tree, "/bin/sh", "-c", "echo ready; cat", tmp=True)
    process = subprocess.Popen(
        rootact.act(PREFIX, "enter", spec), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        root = Path(f"/proc/{process.pid}/root")
        assert root.readlink() == tree
        namespace = Path(f"/proc/{process.pid}/ns/mnt").readlink()
        assert namespace != Path("/proc/self/ns/mnt").readlink()
        assert mounts_of_host() == before
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert mounts_of_host() == before


@needs_root
def test_what_may_be_written_is_what_the_spec_says(tree, tmp_path):
    source = tmp_path / "attempt"
    source.mkdir()
    script = """
    for place in /etc/x /tmp/x /sys/x /spark_ray/attempt/x /spark_ray/bundle/x
    do (echo hello > $place) 2> /dev/null && echo $place; done; true"""
    mounts = [
        {"source": str(source), "target": "/spark_ray/attempt", "read_only": False},
        {"source": str(source), "target": "/spark_ray/bundle", "read_only": True},
    ]
    done = act("enter", spec_file(tmp_path, tree, "/bin/sh", "-c", script, mounts=mounts, tmp=True))
    assert done.stderr == ""
    assert done.stdout.split() == ["/tmp/x", "/spark_ray/attempt/x"]
    assert (source / "x").read_text() == "hello\n"
    assert not (tree / "tmp/x").exists()


@needs_root
def test_a_mount_inside_a_mount_and_inside_tmp(tree, tmp_path):
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "file").write_text("content\n")
    mounts = [
        {"source": str(tmp_path / "file"), "target": "/tmp/new/file", "read_only": True},
        {"source": "/etc", "target": "/spark_ray/attempt/inner", "read_only": True},
        {"source": str(tmp_path / "outer"), "target": "/spark_ray/attempt", "read_only": True},
    ]
    script = "cat /tmp/new/file; test -f /spark_ray/attempt/inner/passwd"
    done = act("enter", spec_file(tmp_path, tree, "/bin/sh", "-c", script, mounts=mounts, tmp=True))
    assert (done.returncode, done.stdout, done.stderr) == (0, "content\n", "")


@needs_root
def test_user_group_and_working_folder(tree, tmp_path):
    script = "cat /proc/self/status; echo cwd $PWD"
    spec = spec_file(tmp_path, tree, "/bin/sh", "-c", script, uid=12345, gid=23456, cwd="/spark_ray")
    lines = act("enter", spec).stdout.splitlines()
    assert "Uid:\t12345\t12345\t12345\t12345" in lines
    assert "Gid:\t23456\t23456\t23456\t23456" in lines
    assert any(line.split() == ["Groups:", "23456"] for line in lines)
    assert "cwd /spark_ray" in lines


def bind(source, target):
    return {"mounts": [{"source": str(source), "target": target, "read_only": True}]}


@needs_root
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (bind("/etc", "/spark_ray/nowhere"), "the mount point /spark_ray/nowhere is missing"),
        (bind("/does/not/exist", "/spark_ray/model"), "/does/not/exist, to be mounted at /spark_ray/model"),
        (bind("/etc/passwd", "/spark_ray/model"), "not both folders or both files"),
        (bind("/etc", "/spark_ray/../etc"), "not a plain absolute path"),
        (bind("/etc", "/lib"), "goes through a symbolic link"),
        ({"root": "/"}, "not a folder to change root into"),
        ({"unknown": 1}, "may hold"),
        ({"argv": ["no-such-program"]}, "cannot execute no-such-program in the new root"),
        ({"cwd": "/nowhere"}, "/nowhere"),
        ({"namespaces": ["user"]}, "user is not one of the namespaces cgroup, ipc, net, pid, uts"),
        ({"namespaces": ["pid"], "argv": ["no-such-program"]}, "cannot execute no-such-program"),
        ({"group": "no-such-group"}, "no-such-group"),
        ({"root": None, "tmp": True}, "need a root of their own"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(tree, tmp_path, more, said):
    before = mounts_of_host()
    done = act("enter", spec_file(tmp_path, tree, "/bin/true", **more))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert mounts_of_host() == before


# ---- namespaces and layers --------------------------------------------------------------------------------


def on_host(folder, script, **more):
    """A spec on the host's own root, which has every program."""
    path = folder / "spec.json"
    spec = {
        "root": None,
        "argv": ["/bin/sh", "-c", script],
        "env": {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
    } | more
    path.write_text(json.dumps(spec))
    return str(path)


def started(spec):
    return subprocess.Popen(rootact.act(PREFIX, "enter", spec), stdout=subprocess.PIPE, text=True)


@needs_root
@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$; exit 3", 3)])
def test_the_first_process_of_a_pid_namespace_ends_with_its_status(tree, tmp_path, script, code):
    """Its own signals do not end it, as in a container: the kernel protects the first process."""
    more = {"namespaces": ["pid"], "uid": 12345, "gid": 12345}
    assert act("enter", spec_file(tmp_path, tree, "/bin/sh", "-c", script, **more)).returncode == code


@needs_root
def test_a_signal_that_ends_it_is_its_status(tmp_path):
    with started(on_host(tmp_path, "echo $$; exec sleep 100", namespaces=["pid"])) as process:
        assert process.stdout.readline() == "1\n"
        (first,) = observe.descendants(process.pid)[1:]
        os.kill(first, signal.SIGKILL)
        assert process.wait(timeout=10) == 128 + signal.SIGKILL


@needs_root
def test_signals_are_handed_on(tmp_path):
    script = "trap 'exit 42' TERM; echo ready; while true; do sleep 0.05; done"
    with started(on_host(tmp_path, script, namespaces=["pid"])) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(timeout=10) == 42


@needs_root
@pytest.mark.parametrize("stopped", [False, True])
def test_everything_in_a_pid_namespace_dies_with_what_waits_for_it(tmp_path, stopped):
    script = "setsid sleep 100 & echo ready; exec sleep 100"
    with started(on_host(tmp_path, script, namespaces=["pid"], uid=12345, gid=12345)) as process:
        assert process.stdout.readline() == "ready\n"
        inside = observe.descendants(process.pid)[1:]
        assert len(inside) == 2
        for pid in inside if stopped else ():
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait(timeout=10)
        assert process.stdout.read() == "", "the channel is closed: the waiting process does not hold it"
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inside))


@needs_root
def test_what_shows_a_namespace_is_its_own(tmp_path):
    script = (
        "echo $$; ls /dev/shm | wc -l; ls -d /proc/[0-9]* | wc -l; tail -n +3 /proc/net/dev | wc -l; "
        "hostname elsewhere; hostname; cat /proc/self/cgroup"
    )
    name = os.uname().nodename
    done = act("enter", on_host(tmp_path, script, namespaces=["pid", "ipc", "uts", "net", "cgroup"]))
    first, shared, processes, interfaces, nodename, *groups = done.stdout.splitlines()
    assert (first, shared, interfaces, nodename) == ("1", "0", "1", "elsewhere")
    assert int(processes) <= 4, "the shell and its pipe"
    assert groups
    assert all(line.endswith(":/") for line in groups)
    assert os.uname().nodename == name


@needs_root
def test_an_overlay_is_writable_and_the_tree_below_is_not_touched(tree, tmp_path):
    script = "echo new > /etc/passwd && cat /etc/passwd && echo > /x && cd / && echo *"
    before = sorted(path.name for path in tree.iterdir()), (tree / "etc/passwd").read_text()
    done = act("enter", spec_file(tmp_path, tree, "/bin/sh", "-c", script, overlay=True))
    assert done.stdout.splitlines()[0] == "new"
    assert sorted(done.stdout.split()[1:]) == sorted([*(each for each in before[0] if each[0] != "."), "x"])
    assert (sorted(path.name for path in tree.iterdir()), (tree / "etc/passwd").read_text()) == before


@needs_root
def test_the_hosts_own_root_needs_no_tree(tmp_path):
    path = tmp_path / "spec.json"
    argv = [sys.executable, "-c", "import os; print(os.getcwd(), os.stat('/').st_ino, os.getpid())"]
    path.write_text(json.dumps({"root": None, "argv": argv, "env": {}, "namespaces": ["pid"]}))
    assert act("enter", str(path)).stdout.split() == ["/", str(Path("/").stat().st_ino), "1"]


@needs_root
def test_a_way_that_does_not_work_is_said_with_its_reason(tmp_path):
    """The script as it is, in a bounding set without CAP_SYS_ADMIN."""
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv")
    command = [
        "setpriv",
        "--bounding-set=-sys_admin",
        "--inh-caps=-sys_admin",
        *rootact.act(PREFIX, "probe", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    failed = json.loads(done.stdout)
    assert set(failed) == {"mount", "overlay", "pid", "ipc", "uts", "net", "cgroup"}
    assert all("Operation not permitted" in reason for reason in failed.values())
    assert "/" not in failed["pid"]


def test_the_root_folder_itself_is_never_tried(tmp_path):  # noqa: ARG001
    failed = json.loads(act("probe", "/").stdout)
    assert failed["overlay"]


def test_a_missing_or_broken_spec_is_refused(tmp_path):
    assert "cannot read the spec" in act("enter", str(tmp_path / "none.json")).stderr
    (tmp_path / "bad.json").write_text("{")
    assert "cannot read the spec" in act("enter", str(tmp_path / "bad.json")).stderr


# ---- the host's side --------------------------------------------------------------------------------------


@needs_root
def test_root_acts_as_root():
    acts = RootActs()
    assert acts.available() == (True, "this is root")
    assert acts.argv("drop-caches") == rootact.act(PREFIX, "drop-caches")
    with pytest.raises(UnavailableError, match="reboot") as caught:
        acts.run("reboot")
    assert caught.value.mend


def test_without_root_and_sudo_the_mend_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    acts = RootActs()
    assert acts.available() == (False, "this is not root and there is no sudo")
    with pytest.raises(UnavailableError, match="needs root") as caught:
        acts.argv("drop-caches")
    assert caught.value.mend == rootact.MEND


@pytest.mark.parametrize(
    ("script", "works"), [('shift; test "$1" = -- && shift; exec "$@"', True), ("exit 1", False)]
)
def test_sudo_is_used_when_it_does_not_ask(monkeypatch, tmp_path, script, works):
    sudo = tmp_path / "sudo"
    sudo.write_text(f"#!/bin/sh\n{script}\n")
    sudo.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    acts = RootActs()
    assert acts.available() == (works, "through sudo" if works else "sudo asks for a password")
    if works:
        assert acts.argv("enter", "x")[:4] == ["sudo", "-n", "--", sys.executable]
        with pytest.raises(UnavailableError, match="cannot read the spec"):
            acts.run("enter", "/does/not/exist")


def test_an_act_that_hangs_has_a_deadline(monkeypatch):
    acts = RootActs()
    monkeypatch.setattr(acts, "argv", lambda *_: ["sleep", "30"])
    with pytest.raises(UnavailableError, match=r"within 0\.1 s"):
        acts.run("drop-caches", timeout_s=0.1)
