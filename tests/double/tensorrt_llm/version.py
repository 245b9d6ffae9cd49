"""Which TensorRT-LLM the double stands for. An unknown version has the newest surface, and its own name."""

from __future__ import annotations

import re

from .settings import setting

VERSIONS = ("1.0.0", "1.1.0", "1.2.1", "1.3.0rc13", "1.3.0rc28", "1.4.0rc1")
"""One of each generation: releases that have the same names and log lines."""
V1_0, V1_1, V1_2, V1_3, LATE_1_3, V1_4 = range(len(VERSIONS))
_LATE_CANDIDATE = 21  # of 1.3.0: from here on LLM tells its capacity

__version__ = setting("VERSION", "1.2.1")


def generation_of(version: str) -> int:
    found = re.match(r"1\.(\d+)(?:\.0rc(\d+))?", version)
    if found is None:
        return V1_4
    minor, candidate = int(found[1]), int(found[2] or _LATE_CANDIDATE)
    late = minor > 3 or (minor == 3 and candidate >= _LATE_CANDIDATE)
    return min(minor + late, V1_4)


GENERATION = generation_of(__version__)
