"""What docs/security.md says: guests as they are isolated, files from strangers, paths, Ray's doors."""

import copy
import functools
import json
import os
import random
import re
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import experiment, experiment_data, write_yaml
from test_config import GOOD
from test_launch import ENVIRONMENTS, Bench
from test_record import RESULT

from analysis import frames
from spark_ray import opening, receive, roots
from spark_ray.cluster import one_local_node
from spark_ray.config import load_experiment
from spark_ray.environments import PASSED_VARIABLES
from spark_ray.errors import EXIT_BAD_INPUT, InputError
from spark_ray.experiment import DockerEnvironment, Experiment
from spark_ray.explain import json_schema
from spark_ray.outcome import Facts, derive
from spark_ray.preview import preview, probe
from spark_ray.record import Record
from spark_ray.result import Asked
from spark_ray.running import Options, look, resume_line
from spark_ray.store import RECORD, Store, read_record
from spark_ray.worker import protocol, sizing

ROOT = Path(__file__).parent.parent

# ---- result.json from a stranger --------------------------------------------------------------------------

ENGINE = {"kind": "embedded", "tokens_per_block": 64, "max_seq_len": 1024}
FRACTION = 0.05
BYTES_PER_TOKEN = 32768
CAPACITY = ("bytes", "blocks", "tokens", "tokens_per_block", "bytes_per_token", "sequences")
ASKED = Asked(
    "b0000.a", 1, ENGINE, {"max_batch_size": 2, "max_num_tokens": 512, "memory_fraction": FRACTION},
    {"requests": 4, "input_tokens": 16, "output_tokens": 8}, memory_bytes=1 << 50,
)  # fmt: skip


@functools.cache
def believable():
    """What the embedded engine writes, with the sizing terms of this machine now."""
    pool = sizing.size_pool(sizing.read_view("memfree"), 100 << 20, FRACTION)
    pool["meminfo"] = {
        name: pool["meminfo"][name] for name in ("MemTotal", "MemFree", "MemAvailable", "Cached")
    }
    blocks = pool["available_bytes"] // (64 * BYTES_PER_TOKEN)
    assert blocks >= 16, "this machine has no memory left for the test"
    size = blocks * 64 * BYTES_PER_TOKEN
    kv = {
        "bytes": size, "blocks": blocks, "tokens": blocks * 64, "tokens_per_block": 64, "bytes_per_token": BYTES_PER_TOKEN,
        "sequences": blocks * 64 // 1024, "source": "transformers PagedAttentionCache.num_blocks",
        "tensor_bytes": size + 2 * 64 * BYTES_PER_TOKEN, "second_source": {"bytes": size, "source": "num_sectors x bytes_per_sector"},
    }  # fmt: skip
    measurements = {
        "engine": {"name": "transformers continuous batching", "version": "5.23.0", "torch": "2.13.0", "threads": 2, "device": "cpu"},
        "model": {"weight_bytes": 79709184, "parameters": 39854592}, "sizing": pool, "kv_cache": kv,
        "throughput": {"requests": 4, "input_tokens": 64, "output_tokens": 32, "duration_s": 0.5, "output_throughput_tokens_per_s": 64.0},
    }  # fmt: skip
    return copy.deepcopy(RESULT) | {"engine": "embedded", "measurements": measurements}


def places(data, path=()):
    """Every path in a JSON value."""
    yield path
    for key, value in (
        data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    ):
        yield from places(value, (*path, key))


def replaced(data, path, text):
    """The JSON text of `data` with the raw `text` in place of one value."""
    mark = "@@here@@"
    data = copy.deepcopy(data)
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = mark
    return json.dumps(data).replace(f'"{mark}"', text)


def without(data, path, key=None):
    """`data` with one field left out, or under another key."""
    data = copy.deepcopy(data)
    place = data
    for step in path[:-1]:
        place = place[step]
    value = place.pop(path[-1])
    if key is not None and isinstance(place, dict):
        place[key] = value
    return json.dumps(data)


RAW = [
    "null", "true", "false", "0", "1", "-1", "0.5", "-0.0", '""', '"x"', "[]", "{}", "[1]", '{"a": 1}', "NaN", "Infinity",
    "-Infinity", "1e999", "1e15", str(1 << 60), str(1 << 64), "9" * 400, '"\\ud800"', '"\\u0000"', '"\\u2028"', '"1"', "[[[]]]",
]  # fmt: skip


def structured(data):
    """Every value replaced by each of RAW and by near misses of itself; every field lost, renamed, repeated."""
    for path in places(data):
        if not path:
            continue
        value = functools.reduce(lambda place, step: place[step], path, data)
        near = []
        if isinstance(value, int) and not isinstance(value, bool):
            near = [
                value + 1,
                value - 1,
                value * 2,
                -value,
                float(value),
                str(value),
                value + 64,
                value + (1 << 21),
            ]
        elif isinstance(value, float):
            near = [value * 1.5, -value, str(value), int(value)]
        elif isinstance(value, str):
            near = [value + " ", value[::-1], value.upper(), value * 2]
        for text in [*RAW, *map(json.dumps, near)]:
            yield replaced(data, path, text).encode()
        yield without(data, path).encode()
        yield without(data, path, f"{path[-1]}_").encode()
        if isinstance(path[-1], str):
            whole, key = json.dumps(value), json.dumps(path[-1])
            yield replaced(data, path, f"{whole}, {key}: {whole}").encode()
            yield replaced(data, path, f"0, {key}: {whole}").encode()


def bytewise(data, count, seed):
    """Bytes flipped, lost, doubled, inserted, cut off; pieces of the text moved elsewhere."""
    source, whole = random.Random(seed), data  # noqa: S311  no secret
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(source.choice([1, 1, 1, 2, 5])):
            at, length = source.randrange(max(1, len(data))), source.choice([1, 1, 2, 8, 64])
            data = data or bytearray(b"{")
            match source.randrange(7):
                case 0:
                    data[at] ^= 1 << source.randrange(8)
                case 1:
                    data[at] = source.choice(b'0123456789.,:"{}[]-eE \\\x00\xff')
                case 2:
                    del data[at : at + length]
                case 3:
                    data[at:at] = data[at : at + length]
                case 4:
                    data[at:at] = source.randbytes(length)
                case 5:
                    del data[at + 1 :]
                case 6:
                    other = source.randrange(len(data))
                    data[at : at + length] = data[other : other + length]
        yield bytes(data)


@functools.cache
def some_record():
    """A record as the host writes it, but for the result: of a real attempt of the fake engine."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        one = Bench(Path(folder) / "run", experiment())
        record = one.run()
        one.close()
    return record


def judged(folder, data):
    """The record that this result.json leads to."""
    (folder / "result.json").write_bytes(data)
    result, why = receive.read_result(folder, ASKED)
    outcome = derive(Facts(result, why, exit_code=0))
    record = some_record() | {"result": result, "outcome": outcome.as_dict()}
    if result is not None:
        Record.model_validate(record)
        json.dumps(record, allow_nan=False)
    kv = ((result or {}).get("measurements") or {}).get("kv_cache")
    if outcome.kind == "ok":
        good = believable()["measurements"]["kv_cache"]
        assert {name: kv[name] for name in CAPACITY} == {name: good[name] for name in CAPACITY}, data
        assert all(type(kv[name]) is int for name in CAPACITY), data
    else:
        assert outcome.kind in {"engine_error", "crashed"}, outcome
        assert outcome.message
        assert kv is None, "a capacity that was not believed is in no record"
    return record


@pytest.mark.process
def test_no_changed_result_json_becomes_a_wrong_record(tmp_path):
    good = believable()
    text = json.dumps(good).encode()
    assert judged(tmp_path, text)["outcome"]["kind"] == "ok"
    mutants = dict.fromkeys([*structured(good), *bytewise(text, 3000, 7)])
    mutants.pop(text, None)
    assert len(mutants) >= 200
    records = [judged(tmp_path, data) for data in mutants]
    kinds = {record["outcome"]["kind"] for record in records}
    assert kinds == {"ok", "crashed", "engine_error"}, "the mutations reach every branch"
    table = frames.trials([record | {"standing": "counts", "superseded": False} for record in records], {})
    ok = table["outcome"] == "ok"
    assert set(table.loc[ok, "kv_cache_bytes"]) == {good["measurements"]["kv_cache"]["bytes"]}
    assert table.loc[~ok, "kv_cache_bytes"].isna().all()


def test_each_number_of_a_capacity_is_held_by_the_others(tmp_path):
    """One number changed to anything else is never believed, whatever it is."""
    for name in CAPACITY:
        for value in (0, 1, 63, 65, 128, 1023, 1 << 20, 1 << 50):
            data = copy.deepcopy(believable())
            if data["measurements"]["kv_cache"][name] != value:
                data["measurements"]["kv_cache"][name] = value
                (tmp_path / "result.json").write_text(json.dumps(data))
                assert receive.read_result(tmp_path, ASKED)[1], (name, value)


# ---- YAML from a stranger ---------------------------------------------------------------------------------


def test_no_changed_yaml_is_more_than_an_input_error(tmp_path):
    path = tmp_path / "e.yaml"
    texts = [GOOD.encode(), (ROOT / "experiments/quickstart.yaml").read_bytes()]
    mutants = dict.fromkeys(mutant for text in texts for mutant in bytewise(text, 300, 11))
    assert len(mutants) >= 200
    refused = 0
    for data in mutants:
        path.write_bytes(data)
        try:
            loaded = load_experiment(path)
        except InputError as error:
            refused += 1
            assert error.exit_code == EXIT_BAD_INPUT  # noqa: PT017
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert Experiment.model_validate(loaded.resolved) == loaded.experiment
    assert 100 < refused < len(mutants), "some of both, or the mutations are no test"


def path_yaml(folder, model=None, rootfs="host"):
    data = experiment_data()
    data["arms"]["b"]["environment"] = {"kind": "chroot", "rootfs": str(rootfs)}
    if model is not None:
        data |= {"engine": {"kind": "embedded"}, "model": {"path": str(model)}}
    folder.mkdir(exist_ok=True)
    return write_yaml(folder, data)


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A folder that no YAML may name, and a current folder that is another one again."""
    (tmp_path / "here").mkdir()
    (tmp_path / "away" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("SPARK_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(roots.VARIABLE, raising=False)
    return tmp_path / "away"


def test_a_path_outside_the_allowed_folders_is_refused_with_the_mend(tmp_path, away):
    yaml = path_yaml(tmp_path / "yaml", model=away / "model", rootfs="/")
    with pytest.raises(InputError) as caught:
        load_experiment(yaml)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    model, rootfs = str(caught.value).splitlines()
    if "rootfs" in model:
        model, rootfs = rootfs, model
    assert re.match(rf"{yaml}:\d+: model.path: '?{away}/model is outside", model), model
    assert re.match(rf"{yaml}:\d+: arms.b.environment.rootfs: / is outside", rootfs), rootfs
    for folder in (yaml.parent, tmp_path / "here", tmp_path / "cache", tmp_path / "hub"):
        assert str(folder) in model, "it says what is allowed"
    assert model.endswith(f"--allow-root {away}/model")


@pytest.mark.parametrize("trick", ["..", "link", "link to a file's folder", "prefix", "~"])
def test_real_paths_are_compared(tmp_path, away, monkeypatch, trick):
    folder = tmp_path / "yaml"
    folder.mkdir()
    (tmp_path / "yaml-other").mkdir()
    monkeypatch.setenv("HOME", str(away))
    (folder / "link").symlink_to(away)
    written = {
        "..": folder / ".." / "away", "link": folder / "link", "link to a file's folder": folder / "link" / "model",
        "prefix": tmp_path / "yaml-other", "~": "~/model",
    }[trick]  # fmt: skip
    with pytest.raises(InputError, match=f"{tmp_path}/(away|yaml-other)"):
        load_experiment(path_yaml(folder, model=written))


def test_what_is_allowed(tmp_path, away, monkeypatch):
    folder = tmp_path / "yaml"

    def resolved(model, *overrides, allow=()):
        return load_experiment(path_yaml(folder, model=model), overrides, allow).resolved["model"]["path"]

    for inside in (
        folder / "m",
        folder,
        tmp_path / "here" / "m",
        tmp_path / "cache" / "m",
        tmp_path / "hub" / "a" / "b",
    ):
        assert resolved(inside) == str(inside)
    assert resolved("m") == str(tmp_path / "here" / "m"), "from the current folder"
    assert resolved(away / "model", allow=[away]) == str(away / "model")
    assert resolved(away / "model", allow=["/"]) == str(away / "model")
    typed = f"model.path={away}/model"
    assert resolved("/etc", typed) == str(away / "model"), "--set is the user's own word"
    assert resolved("m", f"model={{path: {away}/model}}") == str(away / "model")
    monkeypatch.setenv(roots.VARIABLE, f":{tmp_path}/elsewhere:{away}")
    assert resolved(away / "model") == str(away / "model")


def test_a_program_started_in_the_top_folder_does_not_allow_everything(tmp_path, away, monkeypatch):
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match="outside"):
        load_experiment(path_yaml(tmp_path / "yaml", model=away))


@pytest.mark.parametrize("odd", ['"a\\0b"', '"~\\0"', "~nobody/x", "'" + "x/" * 3000 + "'"])
@pytest.mark.usefixtures("away")
def test_an_odd_path_is_no_traceback(tmp_path, odd):
    yaml = path_yaml(tmp_path / "yaml", model="PLACE")
    yaml.write_text(yaml.read_text().replace("PLACE", odd))
    try:
        load_experiment(yaml)
    except InputError as error:
        assert "model.path" in str(error)  # noqa: PT017


@pytest.mark.usefixtures("away")
def test_a_loop_of_links_is_no_traceback(tmp_path):
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "loop").symlink_to(tmp_path / "yaml" / "loop")
    loaded = load_experiment(path_yaml(tmp_path / "yaml", model=tmp_path / "yaml" / "loop"))
    assert preview(loaded.experiment, one_local_node(), probe(loaded.experiment)).problems


def test_a_resumed_run_keeps_the_folders_it_was_begun_with(tmp_path, away):
    yaml = path_yaml(tmp_path / "yaml", model=away / "model")
    options = Options(out=tmp_path / "run", allow_roots=(away,))
    planned = look(yaml, (), options)
    opening.begin(planned.folder, planned.loaded, planned.plan, cluster=None, executor="local").close()
    assert str(away) in Store.read(tmp_path / "run").plan["allowed_roots"]
    again = look(tmp_path / "run" / "experiment.yaml", (), Options(out=tmp_path / "run", resume=True))
    assert again.loaded.resolved == planned.loaded.resolved
    assert f"--allow-root {away}" in resume_line([yaml], (), options, planned.folder)
    with pytest.raises(InputError, match="outside"):  # the same file, not as a run that is resumed
        look(tmp_path / "run" / "experiment.yaml", (), Options())


@pytest.mark.parametrize(
    "words", [["-m", "spark_ray.sweep", "--plan"], ["-m", "spark_ray", "plan"], ["-m", "spark_ray", "doctor"]]
)
def test_the_option_on_the_command_line(tmp_path, away, words):
    yaml = path_yaml(tmp_path / "yaml", rootfs=away)
    for allow, code in ([], EXIT_BAD_INPUT), (["--allow-root", str(away)], 3):  # 3: it is no rootfs
        done = subprocess.run(
            [sys.executable, *words, str(yaml), *allow], capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr


TEXT_KEYS = {  # every key of a YAML whose value is free text, and what it is
    "arms.*.environment.rootfs": "folder", "model.path": "folder",
    "arms.*.environment.python": "inside the guest", "arms.*.environment.image": "name",
    "arms.*.environment.cpuset_cpus": "docker's", "arms.*.environment.cgroup_parent": "docker's",
    "arms.*.environment.cap_add.*": "docker's", "arms.*.environment.cap_drop.*": "docker's",
    "name": "plain name", "question": "words", "contrast.baseline": "arm", "contrast.against": "arm", "engine.only_in_arm": "arm",
}  # fmt: skip


def text_keys(schema, path=()):
    """The path of every free text in the schema (sizes, durations and names have a pattern, choices an enum)."""
    if "$ref" in schema:
        schema = json_schema()["$defs"][schema["$ref"].rpartition("/")[2]] | {
            k: v for k, v in schema.items() if k != "$ref"
        }
    for member in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from text_keys(member, path)
    if schema.get("type") == "string" and not {"enum", "const", "pattern"} & schema.keys():
        yield ".".join(path)
    for key, child in schema.get("properties", {}).items():
        yield from text_keys(child, (*path, key))
    for child in (schema.get("additionalProperties"), schema.get("items")):
        if isinstance(child, dict):
            yield from text_keys(child, (*path, "*"))


def test_every_text_in_a_yaml_is_known_to_be_a_path_or_not():
    """A new key that names a file must be confined: add it to config._paths, then here."""
    assert set(text_keys(json_schema())) - set(TEXT_KEYS) == set()


def test_no_key_of_a_yaml_mounts_anything_or_runs_code_of_a_model():
    keys = {key for definition in json_schema()["$defs"].values() for key in definition.get("properties", {})}
    assert (
        not {
            "volumes",
            "binds",
            "mounts",
            "devices",
            "security_opt",
            "entrypoint",
            "command",
            "user",
            "trust_remote_code",
        }
        & keys
    )
    calls = [
        line
        for path in (ROOT / "spark_ray").rglob("*.py")
        for line in path.read_text().splitlines()
        if "trust_remote_code" in line
    ]
    assert calls
    assert all("trust_remote_code=False" in line.replace(" ", "") for line in calls)


def test_what_loosens_a_container_is_in_the_plan():
    data = experiment_data()
    data["arms"]["b"]["environment"] = {
        "kind": "docker",
        "privileged": True,
        "cap_add": ["IPC_LOCK"],
        "pid": "host",
        "network": "host",
    }
    made = Experiment.model_validate(data)
    words = preview(made, one_local_node(), probe(made)).arms[1].what
    for word in ("privileged=True", "IPC_LOCK", "pid=host", "network=host"):
        assert word in words


# ---- guests, as they really are ---------------------------------------------------------------------------

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
    assert writable - kernel - files == {"/spark_ray/attempt", "/tmp"}
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
    listed = {*ours.split(), *PASSED_VARIABLES, *record["content"]["variables"]} | dockers
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
    from spark_ray import launch

    monkeypatch.setattr(launch, "_MOST_NOISE", 1000)
    monkeypatch.setattr(launch, "_MOST_OBSERVATIONS", 20)
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
            timeout=60,
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
