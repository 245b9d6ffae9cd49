"""Compiled kernels: one folder for each arm, given to the worker in every environment alike, cold or warm.

cold: the folder is empty at every start. warm: it is kept by arm and configuration, and an execution that is not
measured has filled it before. A note beside the folder, where no guest can write, says that this has happened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RunError


class CompileCaches:
    """The folders of one slot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder_of(self, state: str, arm: str, configuration: Mapping[str, Any]) -> Path:
        return self._folder / arm / (key(configuration) if state == "warm" else "cold")

    def is_warm(self, arm: str, configuration: Mapping[str, Any]) -> bool:
        return self._note(arm, configuration).is_file()

    def prepare(self, state: str, arm: str, configuration: Mapping[str, Any]) -> Path:
        """The folder for the next start: empty, unless it is warm already."""
        folder = self.folder_of(state, arm, configuration)
        try:
            if not (state == "warm" and self.is_warm(arm, configuration)):
                _remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot empty the compile cache {folder}: {error.strerror} ({error.filename})",
                mend="remove that folder, then continue with --resume",
            ) from error
        return folder

    def warmed(self, arm: str, configuration: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        """An execution that is not measured has ended by itself: the folder is warm from here on."""
        self._note(arm, configuration).write_text(json.dumps(note) + "\n")

    def _note(self, arm: str, configuration: Mapping[str, Any]) -> Path:
        return self._folder / arm / f"{key(configuration)}.json"

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def key(configuration: Mapping[str, Any]) -> str:
    """Names a configuration: what an engine compiles depends on it."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def content(folder: Path) -> tuple[int, int]:
    """(regular files, their bytes) below a folder. A guest writes there: no link is followed, and files may vanish."""
    files, size = 0, 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))  # noqa: PTH118  names of any bytes
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode):
                files += 1
                size += found.st_size
    return files, size


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except PermissionError:  # a guest took the rights on a folder of its own away
        folder.chmod(0o700)
        for place, folders, _ in os.walk(folder):
            for path in (Path(place, name) for name in folders):
                if not path.is_symlink():
                    path.chmod(0o700)
        shutil.rmtree(folder)
