"""Arguments that are files, as the command line and the shell's completion know them."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem


class YamlFile(click.Path):
    """A YAML file; existence is said by who reads it, in its own words. The shell completes YAML files and folders."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        head, slash, typed = incomplete.rpartition("/")
        try:
            here = sorted(Path(head + slash or ".").iterdir())
        except OSError:
            here = []
        found = [p for p in here if p.name.startswith(typed) and (typed or not p.name.startswith("."))]
        files = [head + slash + p.name for p in found if p.suffix in {".yaml", ".yml"} and p.is_file()]
        if not files:
            return [CompletionItem(incomplete, type="file")]  # the shell knows best how to go into folders
        return [
            CompletionItem(name)
            for name in [*files, *(f"{head}{slash}{p.name}/" for p in found if p.is_dir())]
        ]


YAML = YamlFile()
FOLDER = click.Path(path_type=Path, file_okay=False)
