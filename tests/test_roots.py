"""YAML from a stranger: which folders it may name, and what reading it can do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import experiment_data, write_yaml
from test_config import GOOD
from test_receive import bytewise

from spark_ray import opening, roots
from spark_ray.cluster import one_local_node
from spark_ray.config import load_experiment
from spark_ray.errors import EXIT_BAD_INPUT, InputError
from spark_ray.experiment import Experiment
from spark_ray.explain import json_schema
from spark_ray.preview import preview, probe
from spark_ray.running import Options, look, resume_line
from spark_ray.store import Store

ROOT = Path(__file__).parent.parent


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


def test_a_run_that_is_resumed_elsewhere_finds_what_it_was_begun_with(tmp_path, away, monkeypatch):
    """Relative paths, of the file and typed, are meant from where the run was begun: the same bytes there and here."""
    yaml = path_yaml(tmp_path / "yaml", model="models/a")
    (here := tmp_path / "here" / "models" / "a").mkdir(parents=True)
    planned = look(yaml, (), Options(out=tmp_path / "run"))
    assert planned.loaded.resolved["model"]["path"] == str(here)
    typed = look(yaml, ("model.path=models/b",), Options(out=tmp_path / "typed"))
    for each in planned, typed:
        opening.begin(each.folder, each.loaded, each.plan, cluster=None, executor="local").close()
    monkeypatch.chdir(away)
    for each in planned, typed:
        stored = Store.read(each.folder).plan
        again = look(
            each.folder / "experiment.yaml", tuple(stored["overrides"]), Options(out=each.folder, resume=True)
        )
        assert again.loaded.resolved == each.loaded.resolved
        opening.again(each.folder, again.loaded, again.plan).close()
        assert Store.read(each.folder).plan == stored, "and so the next time"
    monkeypatch.chdir(tmp_path)  # by the experiment's own file: typed anew, from here
    again = look(yaml, ("model.path=here/models/b",), Options(out=typed.folder, resume=True))
    opening.again(typed.folder, again.loaded, again.plan).close()
    monkeypatch.chdir(away)
    assert Store.read(typed.folder).plan["begun_in"] == str(tmp_path)
    last = look(
        typed.folder / "experiment.yaml",
        ("model.path=here/models/b",),
        Options(out=typed.folder, resume=True),
    )
    assert last.loaded.resolved == typed.loaded.resolved


@pytest.mark.parametrize(
    "words", [["-m", "spark_ray.sweep", "--plan"], ["-m", "spark_ray", "plan"], ["-m", "spark_ray", "doctor"]]
)
def test_the_option_on_the_command_line(tmp_path, away, words):
    yaml = path_yaml(tmp_path / "yaml", rootfs=away)
    lacking = 3 if words[-1] == "doctor" else 0  # it is no rootfs: a plan says so and is a plan all the same
    for allow, code in ([], EXIT_BAD_INPUT), (["--allow-root", str(away)], lacking):
        done = subprocess.run(
            [sys.executable, *words, str(yaml), *allow], capture_output=True, text=True, check=False, timeout=600,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert ("is no rootfs" in " ".join(done.stdout.split())) == bool(allow)
        assert "Traceback" not in done.stderr


TEXT_KEYS = {  # every key of a YAML whose value is free text, and what it is
    "arms.*.environment.rootfs": "folder", "model.path": "folder", "engine.double": "folder", "search.target.pilot": "folder",
    "engine.landscape.file": "file", "engine.landscape.function": "a function's name",
    **dict.fromkeys(("search.space.further.*", "search.space.further.*.*"), "no path: test_knobs.py"),
    **dict.fromkeys(("search.space.further.*.low", "search.space.further.*.high"), "size or duration"),
    "arms.*.environment.python": "inside the guest", "arms.*.environment.image": "name",
    "arms.*.environment.cpuset_cpus": "docker's", "arms.*.environment.cgroup_parent": "docker's",
    "arms.*.environment.cap_add.*": "docker's", "arms.*.environment.cap_drop.*": "docker's",
    "name": "plain name", "question": "words", "contrast.baseline": "arm", "contrast.against": "arm", "engine.only_in_arm": "arm",
    "arms.*.builds_on": "arm", "predictions.*.arm": "arm", "predictions.*.baseline": "arm", "predictions.*.because": "words",
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
        if re.search(r"\btrust_remote_code\b(?! *=True, so)", line)  # prose about trtllm-bench, which does
    ]
    assert len(calls) == 3
    assert all(re.search(r"trust_remote_code\"?[=:,] ?False", line) for line in calls), calls


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
