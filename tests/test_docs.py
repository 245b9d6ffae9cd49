"""What the documents say is true: links lead somewhere, every block of code is executed, planned or validated, and the
reference leaves nothing out."""

import ast
import contextlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import click
import pandas
import pytest
import yaml
from helpers import experiment_data, write_yaml
from pydantic import BaseModel, Field
from schema_reference import sections, undescribed

from analysis.columns import MAP, SAMPLES, columns
from spark_ray import cli, cluster, config, errors, sweep
from spark_ray.errors import InputError
from spark_ray.experiment import Experiment
from spark_ray.outcome import OutcomeKind
from spark_ray.record import Record
from spark_ray.worker import protocol

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")])
DOCUMENTS = [*PAGES, *sorted(ROOT.glob("benchmarks/*.md"))]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BUILD = "python -m sphinx -W --keep-going -n -b html docs build/docs"


def blocks(language):
    """(id, text) of every fenced block of a language, as test parameters."""
    for page in PAGES:
        for found, text in FENCE.findall(page.read_text()):
            if found == language:
                yield pytest.param(text, id=f"{page.relative_to(ROOT)}: {text.strip().splitlines()[0][:50]}")


def run(*words, cwd=ROOT, timeout=600):
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd)


# ---- links and names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document):
    for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", document.read_text()):
        if "://" not in target:
            path = document.parent / target if target else document
            assert path.exists(), target
            assert not heading or heading in headings(path), f"{target}#{heading}"


def headings(page):
    """As code hosts and the pages name them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in found}


def test_each_test_that_a_document_names_exists():
    defined = {
        name
        for path in (ROOT / "tests").glob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    for document in DOCUMENTS:
        assert set(re.findall(r"`(test_\w+)`", document.read_text())) <= defined, document.name


def test_every_experiment_is_listed_with_its_question():
    listed = (ROOT / "experiments" / "README.md").read_text()
    for path in (ROOT / "experiments").glob("*.yaml"):
        assert f"[{path.name}]({path.name})" in listed


def test_no_registry_host_and_no_path_of_a_build_machine():
    for path in [*DOCUMENTS, ROOT / "constraints.txt", ROOT / "cluster.yaml", ROOT / ".ci" / "run"]:
        assert not re.search(r"https?://[^\s)]*pypi|/(work|root)/", path.read_text()), path


# ---- blocks of code ---------------------------------------------------------------------------------------


def test_every_block_is_of_a_language_that_is_checked():
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text()):
            checked = language in {"bash", "yaml", "python"} or re.fullmatch(r"\{[a-z-]+\}", language)
            assert checked, f"{page.name}: a block of {language or 'no language'}: {text[:60]!r}"


def commands():
    for parameter in blocks("bash"):
        for line in parameter.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                name = shlex.join(words)
                yield pytest.param(words, id=f"{parameter.id.split(':')[0]}: {name[:70]}")


def _parse(group, words):
    """Let click read a command line to its end without executing it."""
    context = None
    while isinstance(group, click.Group):
        context = group.make_context(words[0], [], parent=context, resilient_parsing=True)
        name, group, words = group.resolve_command(context, words[1:])
        words = [name, *words]
    group.make_context(words[0], words[1:], parent=context)


def _pip(words):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[:3] == ["install", "-c", "constraints.txt"]
    assert words[3] == "-e", words
    extras = re.fullmatch(r"\.\[([a-z,-]+)\]", words[4])
    assert extras, words
    assert set(extras[1].split(",")) <= set(known), words


def understand(words, folder):
    """One command of a block: planned, parsed, or known to be executed elsewhere in these tests or in CI."""
    name, *rest = words
    match [name.removeprefix(".venv/bin/"), *rest]:
        case ["python3", "-m", "venv", ".venv"] | ["python", "-m", "pytest"] | ["./.ci/run" | ".ci/run"]:
            return  # CI's
        case ["python", "-m", "sphinx", *_]:
            assert words[1:] == BUILD.split()[1:]  # built below
        case ["python", "-m", "spark_ray.sweep", *arguments]:
            planned = [*arguments, *([] if "--plan" in arguments else ["--plan"])]
            with contextlib.chdir(ROOT):
                assert sweep.main([*planned, "--out", str(folder / "run")]) in (0, 3)
        case ["tar", "xJf", archive, "-C", _]:
            assert (ROOT / archive).is_file()  # unpacked and reported in test_results.py
        case ["pip", *arguments]:
            _pip(arguments)
        case ["spark-ray", *_]:
            _parse(cli.command, ["spark-ray", *rest])
        case ["sudo", *command]:
            understand(command, folder)
        case ["apt-get" | "usermod" | "swapoff" | "systemctl" | "nvidia-ctk", *_]:
            return  # the system's own
        case ["hf", "download", *_, "--local-dir", _]:
            pytest.importorskip("huggingface_hub")
            done = run(str(Path(sys.executable).parent / "hf"), "download", "--help")
            assert "--local-dir" in done.stdout, done.stderr
        case ["ray", "up" | "down" as verb, file]:
            assert name == ".venv/bin/ray", "no other ray is installed"
            assert config.load_cluster(ROOT / file).nodes
            pytest.importorskip("ray")
            done = run(str(Path(sys.executable).parent / "ray"), verb, "--help")
            assert done.returncode == 0, done.stderr
        case _:
            pytest.fail(f"nothing here executes, plans or parses {shlex.join(words)}")


@pytest.mark.parametrize("words", list(commands()))
def test_each_command_of_the_documents_is_understood(words, tmp_path):
    while words:
        command = words[: words.index("&&")] if "&&" in words else words
        words = words[len(command) + 1 :]
        understand(command, tmp_path)


def test_a_command_that_does_not_exist_is_not_understood(tmp_path):
    with pytest.raises(click.UsageError):
        understand([".venv/bin/spark-ray", "status", "runs/a", "--no-such-option"], tmp_path)
    with pytest.raises(pytest.fail.Exception):
        understand(["rm", "-rf", "/"], tmp_path)


def merged(whole, part):
    """A fragment put into a whole file. What has another kind, or is no mapping, is replaced."""
    if not isinstance(whole, dict) or not isinstance(part, dict) or "kind" in part:
        return part
    return {
        **whole,
        **{key: merged(whole[key], value) if key in whole else value for key, value in part.items()},
    }


@pytest.mark.parametrize("text", list(blocks("yaml")))
def test_each_yaml_block_is_an_experiment_or_a_part_of_one(text, tmp_path):
    data = yaml.safe_load(text)
    if {"name", "search", "arms"} <= set(data):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        config.load_experiment(path)
        understand([".venv/bin/python", "-m", "spark_ray.sweep", str(path)], tmp_path)
    elif set(data) <= set(Experiment.model_fields):
        quickstart = yaml.safe_load((ROOT / "experiments" / "quickstart.yaml").read_text())
        config.load_experiment(write_yaml(tmp_path, merged(quickstart, data)))
    else:
        assert set(data) <= {key.split(".")[0] for key in cluster.CLUSTER_KEYS}
        whole = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        assert config.load_cluster(write_yaml(tmp_path, merged(whole, data))).nodes


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A folder with two small runs in it.

    runs/quickstart, of the fake engine, as its tables, summary and report are of any other's; and a map, runs/simulated-map.
    """
    folder = tmp_path_factory.mktemp("documents")
    fake = [str(write_yaml(folder, experiment_data(blocks=3))), "--out", "runs/quickstart"]
    mapped = [
        str(ROOT / "experiments" / "simulated_map.yaml"),
        "--out",
        "runs/simulated-map",
        "--set",
        "search.blocks=5",
    ]
    for words in (fake, mapped):
        done = run(sys.executable, "-m", "spark_ray.sweep", *words, "--local", cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.process
def test_the_columns_of_the_map_are_those_that_are_written(a_run):
    """With AXIS and ARM written out."""
    written = list(pandas.read_parquet(a_run / "runs" / "simulated-map" / "map.parquet").columns)
    axes = ["max_batch_size", "max_num_tokens", "memory_fraction"]
    of_arm = [name for name in MAP if "ARM" in name]
    of_arms = [name.replace("ARM", arm) for arm in ("native", "container") for name in of_arm]
    assert written == [*axes, *of_arms, *[name for name in MAP if name not in {"AXIS", *of_arm}]]


@pytest.mark.process
@pytest.mark.parametrize("text", list(blocks("python")))
def test_each_python_block_runs(text, a_run):
    done = run(sys.executable, "-W", "error", "-c", text, cwd=a_run)
    assert done.returncode == 0, done.stderr
    assert done.stdout


# ---- the reference leaves nothing out ---------------------------------------------------------------------


@pytest.mark.parametrize("model", [Experiment, Record])
def test_every_key_and_field_is_described(model):
    assert undescribed(sections(model)) == []


def test_a_key_without_description_is_found():
    class Inner(BaseModel):
        low: int = Field(ge=1, lt=5)

    class Outer(BaseModel):
        size: float = Field(default=1.0, description="a size")
        inner: dict[str, Inner] | None = Field(default=None, description="by name")

    outer, inner = sections(Outer)
    assert undescribed([outer, inner]) == ["inner.NAME.low"]
    assert [(key.type, key.required, key.default) for key in outer.keys] == [
        ("number", False, "1"),
        ("mapping of names, each mapping", False, None),
    ]
    assert [(key.path, key.type, key.required) for key in inner.keys] == [
        ("inner.NAME.low", "integer from 1 to 4", True)
    ]


def every_command(command, path="spark-ray"):
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from every_command(below, f"{path} {name}")


@pytest.mark.parametrize(("path", "command"), list(every_command(cli.command)))
def test_every_command_and_option_has_help(path, command):
    assert command.help, path
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, f"{path} {parameter.opts[0]}"


def test_the_cluster_keys_are_those_that_are_read(tmp_path):
    """Taking a key away changes what is loaded, or is an error, exactly if it is described."""
    whole = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    loaded = config.load_cluster(ROOT / "cluster.yaml")
    paths = [
        f"{key}.{inner}" if inner else key
        for key, value in whole.items()
        for inner in (value if key == "provider" else [None])
    ]
    read = set()
    for path in paths:
        key, _, inner = path.partition(".")
        without = {name: dict(value) if name == "provider" else value for name, value in whole.items()}
        (without[key] if inner else without).pop(inner or key)
        try:
            if config.load_cluster(write_yaml(tmp_path, without)) != loaded:
                read.add(path)
        except InputError:
            read.add(path)
    assert read == set(cluster.CLUSTER_KEYS)


@pytest.mark.process
def test_the_columns_are_those_that_are_written(a_run):
    folder = a_run / "runs" / "quickstart"
    fields = {key.path for section in sections(Record) for key in section.keys}
    for name in ("trials", "phases"):
        described = columns(name)
        assert [each.name for each in described] == list(
            pandas.read_parquet(folder / f"{name}.parquet").columns
        )
        assert [each for each in described if each.meaning is None and each.source not in fields] == []
    for path in (folder / "samples").glob("*.parquet"):
        assert list(SAMPLES) == list(pandas.read_parquet(path).columns)


def first_cells(text):
    """Names in backquotes in the first cell of each row of a page's tables."""
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.mark.process
def test_the_summary_is_described_field_by_field(a_run):
    summary = json.loads((a_run / "runs" / "quickstart" / "summary.json").read_text())
    page = (ROOT / "docs" / "reference" / "tables.md").read_text().partition("## `summary.json`")[2]
    assert first_cells(page) == [*summary, *summary["contrasts"][0]]


def written_reasons():
    """Every (kind, reason) that is written out in the source."""
    for path in (ROOT / "spark_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                pairs = {
                    k.value: v
                    for k, v in zip(node.keys, node.values, strict=True)
                    if isinstance(k, ast.Constant)
                }
                words = [pairs.get("kind"), pairs.get("reason")]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"Outcome", "_failure"}:
                words = node.args[:2]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Infeasible":
                words = [ast.Constant("infeasible"), node.args[0]]
            else:
                continue
            if all(isinstance(word, ast.Constant) for word in words):
                yield tuple(word.value for word in words)


def test_the_outcomes_and_their_reasons_are_described():
    page = (ROOT / "docs" / "reference" / "outcomes.md").read_text()
    kinds, _, reasons = page.partition("## Reasons")
    assert first_cells(kinds) == list(get_args(OutcomeKind))
    described = set(re.findall(r"^\| `(\w+)` \| `([a-z_]+)`", reasons, re.MULTILINE))
    assert described == set(written_reasons())


def test_the_readme_has_every_exit_code():
    listed = re.search(r"Exit codes: (.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"(?:^|· )(\d+)", listed[1])} == codes


def test_the_picture_has_the_phases_of_the_worker():
    picture = (ROOT / "docs" / "flow.svg").read_text()
    drawn = [name for name in re.findall(r">(\w+)</text>", picture) if name in protocol.PHASES]
    assert drawn == [name for name in protocol.PHASES if name not in ("before_launch", "after_exit")]


# ---- the pages --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    done = run(sys.executable, *BUILD.split()[1:-1], str(target))
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.docs
@pytest.mark.parametrize("model", [Experiment, Record])
def test_the_pages_have_every_key_and_field(model, site):
    page = (site / "reference" / f"{model.__name__.lower()}.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    for section in sections(model):
        assert section.path in text
        for key in section.keys:
            assert (key.path if model is Experiment and key.name != "kind" else key.name) in text


@pytest.mark.docs
def test_no_page_is_left_out_of_the_contents(site):
    index = (site / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert (
            f'href="{page.relative_to(ROOT / "docs").with_suffix(".html")}"' in index or page.stem == "index"
        )
