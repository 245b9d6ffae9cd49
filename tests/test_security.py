"""What docs/security.md says: guests as they are isolated, what they plant, Ray's doors."""

import json
import os
import re
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import experiment, experiment_data
from test_launch import ENVIRONMENTS, Bench
from test_receive import believable

from spark_ray.environment_spec import DockerEnvironment
from spark_ray.environments import MPI_VARIABLES, PASSED_VARIABLES, compile_cache_variables
from spark_ray.experiment import Experiment
from spark_ray.store import RECORD, Store, read_record
from spark_ray.worker import protocol

ROOT = Path(__file__).parent.parent


PROBE = """
def _probe(talk):
    import json, socket
    from pathlib import Path

    def tried(act):
        try:
            act()
        except OSError as error:
            return error.strerror
        return "done"

    def connect():
        with socket.socket(socket.AF_UNIX) as end:
            end.connect("/run/docker.sock")

    def program():
        Path("/tmp/program").write_text("#!/bin/sh\\n")
        os.chmod("/tmp/program", 0o755)
        os.spawnv(os.P_WAIT, "/tmp/program", ["program"])

    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        mounts[fields[4]] = fields[5].split(",")
    bundle = Path(__file__).parent
    found = {
        "mounts": mounts,
        "interfaces": os.listdir("/sys/class/net"),
        "write": {
            "/": tried(Path("/planted").touch),
            "bundle": tried((bundle / "planted").touch),
            "model": tried(Path("/spark_ray/model/planted").touch),
            "attempt": tried((talk.folder / "planted").touch),
            "/tmp": tried(program),
        },
        "mknod": tried(lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(8, 0))),
        "docker": tried(connect),
    }
    (talk.folder / "probe.json").write_text(json.dumps(found))


def run(talk: Session"""


class Probed(Bench):
    """A bench whose fake engine looks around first, with a model folder to look at."""

    def __init__(self, folder, environment, code=PROBE, call="_probe(talk)"):
        super().__init__(folder, experiment(arms=(environment, "native")))
        engine = folder / "bundle" / protocol.PACKAGE / "engine_fake.py"
        text = engine.read_text().replace("\ndef run(talk: Session", code, 1)
        engine.write_text(
            text.replace("    settings = talk.engine\n", f"    {call}\n    settings = talk.engine\n", 1)
        )
        assert call in engine.read_text()
        self.runner._bundle_sha256 = protocol.package_sha256(engine.parent)
        self.runner._model = folder.parent / "model"
        self.runner._model.mkdir(exist_ok=True)

    def once(self):
        """The record of the one attempt; the bench is put away whatever happens."""
        try:
            return self.run()
        finally:
            self.close()

    @property
    def attempt(self):
        return self.store.attempt_folder(self.block.trial_id("a"), 1)


@pytest.fixture
def probed(tmp_path, request, monkeypatch):
    """(record, what the probe found) of a guest in the environment of the test's parameter, started with a secret around."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(8))
    monkeypatch.setenv("HF_TOKEN", secrets.token_hex(8))
    monkeypatch.setenv("DOCKER_CONFIG", "/nowhere")
    one = Probed(tmp_path / "run", request.param)
    record = one.once()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    return record, json.loads((one.attempt / "probe.json").read_text())


@pytest.mark.docker
@pytest.mark.parametrize("probed", ["docker"], indirect=True)
def test_a_container_has_no_capabilities_no_network_and_nothing_to_write_but_its_folder(probed):
    record, found = probed
    status = record["result"]["evidence"]["status"]
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert found["interfaces"] == ["lo"]
    writable = {target for target, options in found["mounts"].items() if "rw" in options}
    kernel = {target for target in writable if target.startswith(("/proc", "/sys", "/dev"))}
    files = {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}  # the daemon's own copies for this container
    assert writable - kernel - files == {"/spark_ray/attempt", "/spark_ray/cache", "/tmp"}
    assert found["write"] == {
        "/": "Read-only file system", "bundle": "Read-only file system", "model": "Read-only file system", "attempt": "done", "/tmp": "done",
    }  # fmt: skip
    assert found["mknod"] == "Operation not permitted"
    assert found["docker"] == "No such file or directory"
    assert record["result"]["evidence"]["docker_sockets"] == []
    spaces, own = record["host"]["outside"]["namespaces"], record["host"]["outside"]["host"]["namespaces"]
    assert all(spaces[kind] != own[kind] for kind in ("mnt", "pid", "net", "ipc", "uts"))


@pytest.mark.root
@pytest.mark.process
@pytest.mark.parametrize("probed", ["chroot"], indirect=True)
def test_a_chroot_protects_content_by_read_only_mounts_and_is_no_security_boundary(probed):
    record, found = probed
    assert found["write"] == {
        "/": "Read-only file system", "bundle": "Read-only file system", "model": "Read-only file system", "attempt": "done", "/tmp": "done",
    }  # fmt: skip
    assert found["docker"] == "No such file or directory"
    assert record["result"]["evidence"]["docker_sockets"] == []
    assert "ro" in found["mounts"]["/sys"]
    # What it does not do, and docs/security.md says so: capabilities, network and /dev are the host's.
    assert record["result"]["evidence"]["status"]["CapEff"] != "0" * 16
    assert set(found["interfaces"]) == set(os.listdir("/sys/class/net"))  # noqa: PTH208
    assert "rw" in found["mounts"]["/dev"]


@pytest.mark.process
@pytest.mark.parametrize("probed", ENVIRONMENTS, indirect=True)
def test_no_variable_of_the_caller_reaches_a_guest_but_the_listed_ones(probed):
    record, _ = probed
    ours = "PATH HOME TMPDIR LANG PYTHONPATH PYTHONDONTWRITEBYTECODE SPARK_RAY_TRIAL SPARK_RAY_RUN"
    dockers = {"HOSTNAME"}
    listed = {
        *ours.split(),
        *PASSED_VARIABLES,
        *record["content"]["variables"],
        *compile_cache_variables(""),
        *MPI_VARIABLES,
    } | dockers
    inside = record["result"]["evidence"]["environment"]
    assert set(inside) <= listed
    assert not any(os.environ[name] in json.dumps(record) for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN"))


@pytest.mark.docker
def test_a_container_that_reaches_the_docker_daemon_is_a_wrong_environment(tmp_path, monkeypatch):
    from spark_ray.environments import docker

    honest = docker._binds
    monkeypatch.setattr(
        docker, "_binds", lambda site: [*honest(site), "/run/docker.sock:/run/docker.sock:rw"]
    )
    one = Probed(tmp_path / "run", "docker")
    record = one.once()
    assert record["outcome"]["kind"] == "wrong_environment"
    assert "can reach a Docker daemon: /run/docker.sock" in record["outcome"]["message"]


def test_a_container_is_asked_for_tight_unless_the_yaml_says_otherwise():
    from spark_ray.environments import docker

    tight = docker.flags(DockerEnvironment(kind="docker"))
    assert (tight["cap_drop"], tight["security_opt"], tight["read_only"]) == (
        ["ALL"],
        ["no-new-privileges"],
        True,
    )
    assert (tight["network_mode"], tight["privileged"]) == ("none", False)
    assert not {"cap_add", "pid_mode", "ipc_mode"} & tight.keys()


# ---- guests that plant things -----------------------------------------------------------------------------

EVIL = """
def _plant(talk):
    import json
    from pathlib import Path

    here = talk.folder
    for name in {names!r}:
        target = here / name
        if target.exists():
            target.unlink()
        {act}


def run(talk: Session"""
HOSTS_FILES = [
    RECORD,
    RECORD + ".part",
    "host.json",
    "host.json.part",
    "samples.json",
    "worker.log",
    "observations.jsonl",
]


@pytest.mark.process
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "file"])
def test_what_a_guest_plants_is_neither_followed_nor_believed(tmp_path, environment, kind):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    act = {
        "link": f"target.symlink_to({str(secret)!r})", "pipe": "os.mkfifo(target)", "folder": "(target / 'x').mkdir(parents=True)",
        "file": 'target.write_text(json.dumps({"record_version": 1, "trial_id": "x", "outcome": {"kind": "ok"}}))',
    }[kind]  # fmt: skip
    one = Probed(tmp_path / "run", environment, EVIL.format(names=HOSTS_FILES, act=act), "_plant(talk)")
    record = one.once()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    assert read_record(one.attempt / RECORD) == record
    assert json.loads((one.attempt / "host.json").read_text()) == record["host"]
    assert (
        len(json.loads((one.attempt / "samples.json").read_text())["rows"])
        == record["host"]["samples"]["count"]
    )
    assert secret.read_text() == "secret"


@pytest.mark.process
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("kind", ["link", "pipe", "huge", "closed"])
def test_a_result_that_is_no_file_is_not_read(tmp_path, environment, kind):
    """The guest ends at once after planting: its own result.json would replace what it planted."""
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(believable()))
    act = {
        "link": f"target.symlink_to({str(secret)!r})", "pipe": "os.mkfifo(target)",
        "huge": "target.touch(); os.truncate(target, 1 << 40)", "closed": "target.write_text('{}'); os.chmod(here, 0)",
    }[kind]  # fmt: skip
    code = EVIL.format(names=["result.json"], act=f"{act}; os._exit(0)")
    one = Probed(tmp_path / "run", environment, code, "_plant(talk)")
    record = one.once()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("crashed", "no_result")
    assert record["result"] is None
    words = {
        "link": "it is a symbolic link",
        "pipe": "it is no regular file",
        "huge": "larger than 16 MiB",
        "closed": "missing",
    }
    assert words[kind] in record["outcome"]["message"]


@pytest.mark.process
def test_a_guest_that_names_another_process_is_not_seen_in_its_place(tmp_path):
    one = Bench(tmp_path / "run", experiment())
    main = one.store.folder / "bundle" / protocol.PACKAGE / "__main__.py"
    text = main.read_text()
    assert 'talk.exchange("ready", os.getpid())' in text
    main.write_text(text.replace('talk.exchange("ready", os.getpid())', 'talk.exchange("ready", 1)'))
    one.runner._bundle_sha256 = protocol.package_sha256(main.parent)
    record = one.run()
    one.close()
    assert record["outcome"]["kind"] == "wrong_environment"
    assert "could not look" in record["outcome"]["message"]


@pytest.mark.process
def test_a_guest_that_floods_its_control_channel_fills_no_memory(tmp_path, monkeypatch):
    from spark_ray import attend

    monkeypatch.setattr(attend, "_MOST_NOISE", 1000)
    monkeypatch.setattr(attend, "_MOST_OBSERVATIONS", 20)
    flood = """
def _flood(talk):
    for _ in range(200):
        os.write(talk._control, b"x" * 99 + b"\\n")
    os.write(talk._control, b"y" * 1_000_000 + b"\\n@spark_ray phase elsewhere\\n")
    for _ in range(50):
        talk.exchange("phase", "after_load")


def run(talk: Session"""
    one = Probed(tmp_path / "run", "native", flood, "_flood(talk)")
    record = one.once()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    assert len(record["host"]["observations"]) == 21  # and after_exit
    assert "elsewhere" not in {seen["phase"] for seen in record["host"]["observations"]}
    assert (one.attempt / "worker.log").stat().st_size < 10_000


# ---- Ray --------------------------------------------------------------------------------------------------


def _status(url, token=None):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.ray
@pytest.mark.process
def test_a_local_ray_asks_for_its_token_and_shows_its_dashboard_to_this_machine_only(tmp_path, monkeypatch):
    import ray

    from spark_ray.actors import RaySlots

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    made = experiment()
    Store.create(
        tmp_path / "run", {}, {"experiment": experiment_data()}, worker=Path(protocol.__file__).parent
    ).close()
    slots = RaySlots(tmp_path / "run", made, list(made.arms), None)
    try:
        join = "import ray, sys; ray.init(address=sys.argv[1], logging_level='error')"
        stranger = subprocess.Popen(  # Ray tries for 20 s
            [sys.executable, "-c", join, ray.get_runtime_context().gcs_address],
            env={**os.environ, "RAY_AUTH_MODE": "disabled"}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        host, _, port = slots.dashboard_url.partition(":")
        assert host == "127.0.0.1"
        lines = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        listening = {
            fields[1].split(":")[0]
            for fields in lines
            if fields[3] == "0A" and fields[1].endswith(f":{int(port):04X}")
        }
        assert listening == {"0100007F"}
        url = f"http://{slots.dashboard_url}/api/v0/nodes"
        assert (_status(url), _status(url, "wrong")) == (401, 403)
        token = subprocess.run(
            [Path(sys.executable).parent / "ray", "get-auth-token"],
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
        assert _status(url, token.stdout.split()[-1]) == 200
        assert "Failed to connect" in stranger.communicate(timeout=100)[1], (
            "Ray's own port wants the token as well"
        )
    finally:
        slots.close()


@pytest.mark.embedded
def test_a_model_of_pickles_is_not_loaded(tmp_path):
    """A file that looks like weights gets the folder past the plan; the pickle beside it must not be the fallback."""
    import torch

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    model = tmp_path / "model"
    model.mkdir()
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 64,
    }
    (model / "config.json").write_text(
        json.dumps(shape | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}})
    )
    (model / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    (model / "bait.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    torch.save({"weight": Code()}, model / "pytorch_model.bin")
    data = experiment_data() | {"engine": {"kind": "embedded"}, "model": {"path": str(model)}}
    one = Bench(tmp_path / "run", Experiment.model_validate(data))
    record = one.run()
    one.close()
    assert record["outcome"]["kind"] == "engine_error", record["outcome"]
    assert "safetensors" in record["outcome"]["message"]
    assert not (tmp_path / "executed").exists()


# ---- the page ---------------------------------------------------------------------------------------------


def test_every_test_that_the_page_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text()))
    files = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    there = {name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    assert len(named) >= 15
    assert named <= there, named - there
