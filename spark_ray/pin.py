"""Names of images in an experiment, made to mean one content for ever: the digest that the engine has read, no other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import config, image
from .environment_spec import DockerEnvironment
from .errors import InputError
from .experiment import Experiment


def images_of(experiment: Experiment) -> list[str]:
    """Images that the experiment's docker arms name, each once."""
    specs = [arm.environment for arm in experiment.arms.values()]
    named = (spec.image for spec in specs if isinstance(spec, DockerEnvironment) and spec.image != "host")
    return list(dict.fromkeys(named))


def look_up(client: Any, references: list[str]) -> dict[str, str]:
    """The pinned name of each; UnavailableError where the engine knows no digest."""
    return {reference: image.pinned(client, reference) for reference in references}


def write(path: Path, pinned: Mapping[str, str]) -> None:
    """Put the pinned names into the file of an experiment; all else in it stays as it is."""
    text = path.read_text(encoding="utf-8")
    for reference, name in pinned.items():
        written = re.compile(rf"(\bimage:\s*)([\"']?){re.escape(reference)}\2(?=[\s,}}]|$)")
        text, count = written.subn(rf"\g<1>{name}", text)
        if not count:
            raise InputError(
                f"{path}: image: {reference} is not written there word for word", mend=f"write {name}"
            )
    path.write_text(text, encoding="utf-8")


def experiment_in(argument: str) -> Path | None:
    """The file, where the argument names one and not an image."""
    path = Path(argument)
    if path.suffix not in {".yaml", ".yml"}:
        return None
    if not path.is_file():
        raise InputError(f"there is no experiment {path}", mend="name a file that is there, or an image")
    return path


def load(path: Path) -> Experiment:
    return config.load_experiment(path, (), [path.absolute().parent]).experiment
