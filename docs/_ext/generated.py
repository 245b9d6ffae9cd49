"""The directive `{generated} PART`: parts of the reference that are made from the source when the pages are built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from docutils import nodes
from schema_reference import Section, sections
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from analysis import reading
from analysis.attribution import TERMS
from analysis.columns import MAP, SAMPLES, columns
from spark_ray import errors
from spark_ray.cluster import CLUSTER_KEYS
from spark_ray.experiment import Experiment
from spark_ray.record import Record

Lines = Iterator[str]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Lines:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _prose(text: str) -> str:
    """A description as Markdown: what stands in backquotes is code, all else is text, also *.json and <name>."""
    pieces = text.split("`")
    return "`".join(
        re.sub(r"([*<\[\\])", r"\\\1", piece) if n % 2 == 0 else piece for n, piece in enumerate(pieces)
    )


def _heading(section: Section) -> Lines:
    kind = f", kind `{section.kind}`" if section.kind else ""
    yield f"## `{section.path}`{kind}" if section.path else "## Top level"
    yield ""
    if section.intro:
        yield from (_prose(section.intro), "")
    if section.also:
        yield from (f"The same at {', '.join(f'`{path}`' for path in section.also)}.", "")


# ---- YAML keys --------------------------------------------------------------------------------------------


def experiment_keys() -> Lines:
    """A `confval` for every key of an experiment."""
    described: set[str] = set()
    for section in sections(Experiment):
        yield from _heading(section)
        for key in section.keys:
            if key.name == "kind" and section.kind:  # said in the heading
                continue
            yield f"```{{confval}} {key.path}"
            if key.path in described:  # the same key of another kind: links go to the first
                yield ":no-index:"
            described.add(key.path)
            yield f":type: {key.type}"
            if key.required:
                yield ":default: none, the key is required"
            elif key.default:
                yield f":default: `{key.default}`"
            yield from ("", _prose(key.meaning), "```", "")


def cluster_keys() -> Lines:
    yield from _table(
        ("Key", "Meaning"), [(f"`{key}`", _prose(meaning)) for key, meaning in CLUSTER_KEYS.items()]
    )


# ---- records and tables -----------------------------------------------------------------------------------


def record_fields() -> Lines:
    """A table for every mapping in a record."""
    for section in sections(Record):
        yield from _heading(section)
        rows = [
            (f"`{key.name}`", key.type + ("" if key.required else "; may be absent"), _prose(key.meaning))
            for key in section.keys
        ]
        yield from _table(("Field", "Type", "Meaning"), rows)


def table_columns() -> Lines:
    """The columns of the parquet tables; what a record's field means is said there once."""
    types = {
        reading.COUNT: "integer",
        reading.NUMBER: "number",
        reading.TEXT: "text",
        reading.FLAG: "true or false",
    }
    meanings = {key.path: key.meaning for section in sections(Record) for key in section.keys}
    for name, rows_are in (("trials", "attempt"), ("phases", "attempt, phase and side")):
        yield from (f"## `{name}.parquet`", "", f"One row per {rows_are}.", "")
        rows = []
        for each in columns(name):
            meaning = _prose(each.meaning or meanings[each.source or ""])
            field = (each.source or each.name).removeprefix("inside[].")
            rows.append(
                (f"`{each.name}`", types[each.kind], meaning + (f"; `{field}`" if field != each.name else ""))
            )
        yield from _table(("Column", "Type", "Meaning; field"), rows)


def sample_columns() -> Lines:
    yield from _table(("Column", "Meaning"), [(f"`{name}`", _prose(text)) for name, text in SAMPLES.items()])


def map_columns() -> Lines:
    yield from _table(("Column", "Meaning"), [(f"`{name}`", _prose(text)) for name, text in MAP.items()])


def terms() -> Lines:
    yield from _table(("Term", "Memory"), [(f"`{name}`", text) for name, text in TERMS.items()])


# ---- ends -------------------------------------------------------------------------------------------------


def exit_codes() -> Lines:
    documented = ModuleAnalyzer.for_module(errors.__name__).find_attr_docs()
    codes = [name for name in vars(errors) if name.startswith("EXIT_")]
    rows = [(f"`{getattr(errors, name)}`", _prose(" ".join(documented["", name]).strip())) for name in codes]
    yield from _table(("Code", "Meaning"), rows)


PARTS: dict[str, Callable[[], Lines]] = {
    "experiment-keys": experiment_keys,
    "cluster-keys": cluster_keys,
    "record-fields": record_fields,
    "table-columns": table_columns,
    "sample-columns": sample_columns,
    "map-columns": map_columns,
    "terms": terms,
    "exit-codes": exit_codes,
}


class Generated(SphinxDirective):
    """Puts a part here, parsed as the page is, in place of the note for those who read the page elsewhere."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(PARTS[self.arguments[0]]()), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
