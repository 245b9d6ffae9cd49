"""Which folders an experiment's YAML may name. A file from somebody else must not choose what a guest gets to see.

Real paths are compared: symbolic links and `..` are resolved first. What the user types (`--set`) is not held to this.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "SPARK_RAY_ALLOWED_ROOTS"


def cache_folder() -> Path:
    """Where built trees and models are kept: SPARK_RAY_CACHE, else the user's cache folder."""
    chosen = os.environ.get("SPARK_RAY_CACHE")
    return Path(chosen).absolute() if chosen else _user_cache() / "spark_ray"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def real(text: str | Path, base: Path = Path()) -> Path:
    """Absolute, from `base` or the current folder, with ~/ and links resolved. ValueError if it cannot be a path."""
    return Path(os.path.realpath(base / os.path.expanduser(text)))  # noqa: PTH111  Path's own raises for ~nobody


def allowed(file: Path, extra: Iterable[str | Path] = ()) -> tuple[Path, ...]:
    """The folder of the file, the current one, the caches of spark_ray and Hugging Face, and what the user adds."""
    usual = [
        file.absolute().parent,
        Path.cwd(),
        cache_folder(),
        Path(os.environ.get("HF_HOME") or _user_cache() / "huggingface"),
    ]
    # A program that happens to be started in / has not been told that everything is allowed.
    found = [folder for folder in map(real, usual) if folder != Path("/")]
    found += map(real, [*filter(None, os.environ.get(VARIABLE, "").split(":")), *extra])
    return tuple(dict.fromkeys(found))


def refusal(path: Path, folders: Iterable[Path]) -> str:
    return (
        f"{path} is outside the folders that a file may name ({', '.join(map(str, folders))}); "
        f"if you trust this file, add --allow-root {shlex.quote(str(path))}"
    )
