"""A text to show to others, without what is the user's own: places, and names of the user and the machine."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import re
import socket
from collections.abc import Sequence
from pathlib import Path


def private(folder: Path, base: Path, model: str | None = None) -> list[tuple[str, str]]:
    """What is the user's own, and what stands for it; longer ones first. Under sudo that is who called it."""
    names = [(getpass.getuser(), "USER"), (socket.gethostname(), "HOST")]
    places = [(str(folder), "WORK"), (str(base.absolute()), "."), (str(Path.home()), "~")]
    if caller := os.environ.get("SUDO_USER"):
        names.append((caller, "USER"))
        with contextlib.suppress(KeyError):
            places.append((pwd.getpwnam(caller).pw_dir, "~"))
    if model is not None and not Path(model).is_relative_to(base.absolute()):
        places.append((model, "MODEL"))
    places.sort(key=lambda place: len(place[0]), reverse=True)
    known = [(text, mark) for text, mark in places if text != "/"]
    return known + [(text, mark) for text, mark in names if len(text) > 2 and text != "root"]


def clean(text: str, known: Sequence[tuple[str, str]]) -> str:
    """The text without what is the user's own."""
    for found, mark in known:
        # A path ends where a part of it ends, and a name is a word: `al` is not in `all`.
        text = re.sub(rf"(?<![\w.-]){re.escape(found)}(?![\w-])", mark, text)
    return text
