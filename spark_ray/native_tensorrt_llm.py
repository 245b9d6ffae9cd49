"""What this interpreter lacks for TensorRT-LLM to run in it. Nothing is imported: that alone would take device memory."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from . import diagnose
from .environments import Problem

_PACKAGES = ("tensorrt_llm", "tensorrt-llm")


def problems() -> Iterator[Problem]:
    """The library itself, then what starts its worker process: mpi4py, and an MPI that it can load."""
    why = diagnose.CATALOGUE[0]
    found = importlib.util.find_spec("tensorrt_llm")
    if found is None:
        stub = (
            _installed()
        )  # what the package index has is a stub: it fetches the real one as it is installed
        what = "no tensorrt_llm in this interpreter"
        if stub is not None:
            what = f"tensorrt-llm {stub} is installed here as a stub, without its module"
        yield Problem(f"{what}: {why.what}", why.mend)
        return
    if not _is_whole(found.origin):
        yield Problem(
            f"the tensorrt_llm that this interpreter finds ({found.origin or 'a folder'}) holds no compiled library: it is a "
            "stub or a checkout of the sources",
            why.mend,
        )
    mend = "sudo apt-get install libopenmpi-dev, then pip install mpi4py"
    if importlib.util.find_spec("mpi4py") is None:
        yield Problem("tensorrt_llm needs mpi4py, which this interpreter does not have", mend)
    elif ctypes.util.find_library("mpi") is None and shutil.which("mpirun") is None:
        yield Problem("tensorrt_llm needs OpenMPI: the loader finds no libmpi, PATH no mpirun", mend)


def _installed() -> str | None:
    for name in _PACKAGES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _is_whole(origin: str | None) -> bool:
    """The real package has its bindings and libraries beside its first file."""
    if origin is None:
        return False
    folder = Path(origin).parent
    return (folder / "libs").is_dir() or any(folder.glob("bindings*"))
