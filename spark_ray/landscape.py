"""A user's own landscape for the simulated engine: one Python file, of which each run takes a copy beside the worker.

A file named by a YAML is held to the same folders as every path in it (`roots`). It is parsed here and executed by the
guest alone, under a name of ours, so that it cannot stand in for another module.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from pathlib import Path

from . import guestfiles
from .environments import Problem
from .experiment import Experiment
from .simulated import Landscape, SimulatedEngine

MODULE = "spark_ray_landscape.py"
"""In the bundle; `worker/engine_simulated.py` imports it."""
_MOST_BYTES = 1 << 20
_MEND = "name a file such as experiments/landscapes/two_valleys.py, and a function that it defines"


def _landscapes(experiment: Experiment) -> list[Landscape]:
    engines = [experiment.engine_of(arm) for arm in experiment.arms]
    return [each.landscape for each in engines if isinstance(each, SimulatedEngine) and each.landscape]


def file_of(experiment: Experiment) -> Path | None:
    """The file that a run of the experiment takes a copy of."""
    return next((Path(each.file) for each in _landscapes(experiment)), None)


def sha256(file: Path) -> str:
    """Hash of the file; of one that is not there, that of nothing."""
    return hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()


def problems(experiment: Experiment) -> list[Problem]:
    """What is wrong with the landscape of an experiment, before any effect and without executing it."""
    chosen = _landscapes(experiment)
    if len({each.file for each in chosen}) > 1:
        what = "arms differ in engine.landscape.file, and a run has one copy for all of them"
        return [Problem(what, "put the functions of all arms into one file")]
    found = dict.fromkeys(_misfit(each) for each in chosen)
    return [Problem(why, _MEND) for why in found if why]


def _misfit(chosen: Landscape) -> str | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # of the user's own style
            tree = ast.parse(guestfiles.read(Path(chosen.file), _MOST_BYTES), chosen.file)
    except OSError as error:
        return f"{chosen.file} cannot be read: {error.strerror}"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{chosen.file} is not Python: {error}"
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return None if chosen.function in defined else f"{chosen.file} defines no function {chosen.function}"
