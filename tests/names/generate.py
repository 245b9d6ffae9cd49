"""Names and defaults of TensorRT-LLM, release by release, out of its own source files.

`python tests/names/generate.py FOLDER` reads FOLDER/<version>/origin.json and the source files named there, and writes
tests/names/<version>.json and docs/reference/tensorrt-llm-names.md; without FOLDER it writes the page only. The sources
are NVIDIA's and stay out of this repository: kept are facts (names, annotations, defaults) and where they were read.

A source file is Python, or a page of Sphinx's "module code" (`_modules/….html`), which holds the same text: the branch
gh-pages of NVIDIA/TensorRT-LLM has those of every release.
"""

from __future__ import annotations

import ast
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "reference" / "tensorrt-llm-names.md"
CLASSES = {
    "LLM": "TorchLlmArgs",  # LLM(...) takes the fields of this class, whose bases are in the same file
    "KvCacheConfig": "KvCacheConfig",
    "CudaGraphConfig": "CudaGraphConfig",
    "SamplingParams": "SamplingParams",
}

Fields = dict[str, dict[str, str]]


# ---- from a source file to its fields ---------------------------------------------------------------------


class _Code(HTMLParser):
    """The text of a page's listing: what stands in <pre>, without the links that Sphinx puts between."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.link = False
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = self.inside or tag == "pre"
        self.link = self.link or (tag == "a" and ("class", "viewcode-back") in attrs)

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "pre"
        self.link = self.link and tag != "a"

    def handle_data(self, data: str) -> None:
        if self.inside and not self.link:
            self.text.append(data)


def source(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".html":
        return text
    code = _Code()
    code.feed(text)
    return "".join(code.text)


def _default(value: ast.expr | None) -> str:
    """As it is written; a factory as a call; `required` where there is none."""
    if not (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id in {"Field", "field"}
    ):
        return "required" if value is None else ast.unparse(value)
    named = {word.arg: word.value for word in value.keywords}
    if "default_factory" in named:
        return f"{ast.unparse(named['default_factory'])}()"
    given = named.get("default") or (value.args[0] if value.args else None)
    missing = given is None or (isinstance(given, ast.Constant) and given.value is ...)
    return "required" if missing else ast.unparse(given)


def _own(node: ast.ClassDef) -> Fields:
    found = {}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            annotation = ast.unparse(line.annotation)
            if not line.target.id.startswith("_") and not annotation.startswith("ClassVar"):
                found[line.target.id] = {"annotation": annotation, "default": _default(line.value)}
    return found


def fields(text: str) -> dict[str, Fields]:
    """Of every class of a module: its own and those of bases in the same module, under its name and its aliases."""
    classes: dict[str, Fields] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            inherited: Fields = {}
            for base in reversed(node.bases):
                inherited |= classes.get(ast.unparse(base), {})
            classes[node.name] = inherited | _own(node)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in classes:
            for target in node.targets:
                classes[ast.unparse(target)] = classes[node.value.id]
    return classes


def table(folder: Path) -> dict[str, Any]:
    """Facts of one version. Of a name in several files the first file counts."""
    origin = json.loads((folder / "origin.json").read_text())
    found: dict[str, Fields] = {ours: {} for ours in CLASSES}
    for name, where in origin["files"].items():
        classes = fields(source(folder / name))
        for ours, theirs in CLASSES.items():
            for field, facts in classes.get(theirs, {}).items():
                found[ours].setdefault(field, {**facts, "file": where["path"]})
    return {
        "version": origin["version"],
        "files": list(origin["files"].values()),
        "classes": {
            ours: {"complete": ours in origin["complete"], "fields": dict(sorted(found[ours].items()))}
            for ours in CLASSES
        },
    }


# ---- the page ---------------------------------------------------------------------------------------------

_PREFACE = """\
# TensorRT-LLM: names and defaults

<!-- Written by tests/names/generate.py from tests/names/*.json: do not edit. -->

What the adapter (`spark_ray/worker/tensorrt_llm_api.py`) passes to TensorRT-LLM, what each version calls it and does by
default. *ours* is the value, or the experiment key it comes from. **–**: that version has no such name. **?**: not in the
part of the file that was read. Where a version lacks a name that is asked for, the trial ends as `engine_error` and says
which; a name is left away only where the version does the same without it.

TensorRT-LLM itself was never run for this page. To make it anew, check out the branch `gh-pages` of
`NVIDIA/TensorRT-LLM`, put the files below into a folder per version with an `origin.json`, and run
`python tests/names/generate.py FOLDER`. The files were looked up one by one and their field lines copied into class
skeletons, from which the script took names, annotations and defaults.
"""


def tables() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(HERE.glob("[0-9]*.json"))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def cell(version: dict[str, Any], owner: str, name: str) -> str:
    known = version["classes"][owner]
    if name in known["fields"]:
        return f"`{_cell(known['fields'][name]['default'])}`"
    return "–" if known["complete"] else "?"


def knobs() -> dict[str, dict[str, str]]:
    """What the adapter can pass, class by class: name -> its value, or the key it comes from."""
    from spark_ray.worker import tensorrt_llm_api as api

    settings = {
        "tokens_per_block": 32,
        "kv_dtype": "auto",
        "kv_cache_manager": "v1",
        "tensor_parallel_size": 1,
        "max_seq_len": 2048,
        "load_format": "auto",
    }
    configuration = {"memory_fraction": 0.9, "max_batch_size": 8, "max_num_tokens": 1024}
    found = {
        "LLM": api.llm_knobs(settings, configuration, "model", None, None),
        "KvCacheConfig": api.kv_cache_knobs(settings, configuration, 4096),
        "CudaGraphConfig": api.cuda_graph_knobs(configuration),
        "SamplingParams": api.sampling_knobs(128),
    }
    return {
        owner: {
            knob.name: f"`{knob.value}`" if knob.asked_by.startswith("spark_ray:") else knob.asked_by
            for knob in each
        }
        for owner, each in found.items()
    }


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    versions = tables()
    parts = [_PREFACE]
    for owner, ours in knobs().items():
        head = [owner, "ours", *(version["version"] for version in versions)]
        rows = [
            [f"`{name}`", value, *(cell(version, owner, name) for version in versions)]
            for name, value in ours.items()
        ]
        parts.append(f"\n## {owner}\n\n{_rows(head, rows)}")
    others = sorted(
        {name for version in versions for name in version["classes"]["KvCacheConfig"]["fields"]}
        - knobs()["KvCacheConfig"].keys()
    )
    head = ["KvCacheConfig", *(version["version"] for version in versions)]
    rows = [[f"`{name}`", *(cell(version, "KvCacheConfig", name) for version in versions)] for name in others]
    parts.append(f"\n## Names of KvCacheConfig that are left at their default\n\n{_rows(head, rows)}")
    facts = json.loads((HERE / "facts.json").read_text())
    rows = [[_cell(fact["what"]), _cell(fact["versions"]), fact["source"]] for fact in facts]
    parts.append(f"\n## Looked up by hand\n\n{_rows(['what', 'versions', 'source'], rows)}")
    rows = [
        [version["version"], f"`{file['path']}`", f"`{file['commit'][:12]}`", file["of"]]
        for version in versions
        for file in version["files"]
    ]
    head = ["version", "file in NVIDIA/TensorRT-LLM", "at commit", "source of"]
    parts.append(f"\n## Sources\n\n{_rows(head, rows)}")
    return "".join(parts)


def main(words: list[str]) -> None:
    for folder in sorted(Path(words[0]).iterdir()) if words else ():
        facts = table(folder)
        (HERE / f"{facts['version']}.json").write_text(json.dumps(facts, indent=1) + "\n")
    PAGE.write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
