"""A stand-in for TensorRT-LLM's library: an experiment rehearsed where there is no GPU, no image and no model.

`engine.double` names a folder that holds a package `tensorrt_llm` which says of itself that it is none
(ENGINE_IS_DOUBLE). Each run takes a copy of it, beside the worker, so that every environment imports that one. The flag
`--double FOLDER` stands for the overrides that such a rehearsal needs; every record of it says `engine_is_double`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import config
from .environments import Problem
from .errors import InputError
from .experiment import Experiment
from .units import parse_size_bytes

PACKAGE = "tensorrt_llm"
_MARK = "ENGINE_IS_DOUBLE = True"
_MODEL = {
    "random_llama": {
        "layers": 2, "hidden_size": 64, "intermediate_size": 128, "attention_heads": 4, "kv_heads": 2, "head_dim": 16,
        "vocabulary": 256,
    }
}  # fmt: skip
_SUFFIX, _LONGEST_NAME = "-double", 40
_FILL = "256MiB"  # of page cache: a laptop has no 8 GiB to hold
_HERE: dict[str, Any] = {
    "rootfs": "host", "image": "host", "python": None, "gpus": None, "ulimits": {}, "privileged": False,
}  # fmt: skip
"""What an environment has in a rehearsal instead, where it has the key: no vendor's image, no GPU, no special rights."""


def _misfit(folder: Path) -> str | None:
    """Why a folder holds no double."""
    init = folder / PACKAGE / "__init__.py"
    try:
        text = init.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return f"{folder} holds no package {PACKAGE}"
    return None if _MARK in text else f"{init} does not say {_MARK}: it is not a double"


def _folders(experiment: Experiment) -> set[str | None]:
    return {getattr(experiment.engine_of(arm), "double", None) for arm in experiment.arms}


def problems(experiment: Experiment) -> list[Problem]:
    """What is wrong with the double of an experiment, before any effect."""
    folders = _folders(experiment)
    if len(folders) > 1:
        what = "arms differ in engine.double, and a run has one copy for all of them"
        return [Problem(what, "set engine.double for the whole experiment, or not at all")]
    found = [_misfit(Path(folder)) for folder in folders if folder is not None]
    return [Problem(why, "name a folder such as tests/double") for why in found if why]


def package_of(experiment: Experiment) -> Path | None:
    """The package that a run of the experiment takes a copy of."""
    folders = [folder for folder in _folders(experiment) if folder is not None]
    return Path(folders[0]) / PACKAGE if folders else None


def package_sha256(package: Path) -> str:
    """Hash of everything in it: names and contents, in name order."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


# ---- the flag ---------------------------------------------------------------------------------------------


def overrides(path: Path, folder: Path) -> tuple[str, ...]:
    """What `--double FOLDER` stands for with this experiment, as `--set` would say it. InputError if they do not go together."""
    if why := _misfit(folder.absolute()):
        raise InputError(f"--double: {why}", mend="name a folder such as tests/double")
    data = config.load_plain(path)
    engine = data.get("engine") if isinstance(data, dict) else None
    kind = engine.get("kind") if isinstance(engine, dict) else None
    if kind != PACKAGE:
        raise InputError(
            f"--double stands in for {PACKAGE}; the engine of {path} is {kind}", mend="leave out --double"
        )
    return tuple(f"{key}={json.dumps(value)}" for key, value in _changes(data, folder.absolute()))


def _changes(data: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    name = data.get("name")
    if isinstance(name, str):
        yield "name", name[: _LONGEST_NAME - len(_SUFFIX)] + _SUFFIX
    yield "engine.double", str(folder)
    yield "model", _MODEL
    arms = data.get("arms")
    for arm, said in arms.items() if isinstance(arms, Mapping) else ():
        environment = said.get("environment") if isinstance(said, Mapping) else None
        for key, value in environment.items() if isinstance(environment, Mapping) else ():
            if key in _HERE and value != _HERE[key]:
                yield f"arms.{arm}.environment.{key}", _HERE[key]
        treatment = said.get("treatment") if isinstance(said, Mapping) else None
        cache = treatment.get("page_cache") if isinstance(treatment, Mapping) else None
        if isinstance(cache, Mapping) and _is_large(cache.get("fill")):
            yield f"arms.{arm}.treatment.page_cache.fill", _FILL


def _is_large(fill: object) -> bool:
    try:
        return parse_size_bytes(fill) > parse_size_bytes(_FILL)
    except ValueError:  # said where the experiment is read
        return False
