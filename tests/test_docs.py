"""What the documents say is true: links lead somewhere, commands exist, experiments plan, YAML is valid."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("experiments/*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]
)
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands():
    """Every sweep and spark-ray line of a bash fence, without its comment and what comes before &&."""
    for document in DOCUMENTS:
        for fence in FENCE.findall(document.read_text()):
            for line in fence.splitlines():
                part = line.split("#")[0].split("&&")[-1].strip()
                if part:
                    yield pytest.param(part, id=f"{document.name}: {part[:60]}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("command", list(commands()))
def test_each_command_of_the_documents_is_understood(command, tmp_path):
    """Sweeps are planned, other commands are asked for --help: real runs of both README commands are CI's."""
    words = shlex.split(command)
    if words[0] == ".venv/bin/python" and words[2] == "pytest":
        return
    if words[0] == ".venv/bin/python":
        assert words[1:3] == ["-m", "spark_ray.sweep"]
        call = [sys.executable, *words[1:], "--plan", "--out", str(tmp_path / "run")]
    else:
        assert words[0] == ".venv/bin/spark-ray"
        call = [sys.executable, "-m", "spark_ray", words[1], "--help"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode in ((0, 3) if "--plan" in call else (0,)), done.stderr


def test_every_experiment_is_listed_with_its_question():
    listed = (ROOT / "experiments" / "README.md").read_text()
    for path in (ROOT / "experiments").glob("*.yaml"):
        assert f"[{path.name}]({path.name})" in listed


def test_no_registry_host_and_no_path_of_a_build_machine():
    for path in [*DOCUMENTS, ROOT / "constraints.txt", ROOT / "cluster.yaml", ROOT / ".ci" / "run"]:
        assert not re.search(r"https?://[^\s)]*pypi|/(work|root)/", path.read_text()), path
