"""What known errors of vendor images and their MPI mean, and what mends them: one catalogue, matched against any text.

The first entries are what https://github.com/brandonrc/dgx-spark-blog (part 2) met on the way from a container to a
chroot, one after the other, each made by the mend of the one before. They have one cause: a program of the image was
started without the image's variables (ENV) and without its entrypoint, which in NVIDIA's images is what reads
/etc/shinit_v2, where the library paths are set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE_TREE = "spark-ray rootfs extract IMAGE FOLDER, and the arm {kind: chroot, rootfs: FOLDER, gpus: all}"


@dataclass(frozen=True)
class Explanation:
    """One known error. `pattern` finds it in a log or a message."""

    name: str
    pattern: re.Pattern[str]
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what} (mend: {self.mend})"


def _entry(name: str, pattern: str, what: str, mend: str) -> Explanation:
    return Explanation(name, re.compile(pattern), what, mend)


CATALOGUE = (
    _entry(
        "no-tensorrt-llm",
        r"No module named '?tensorrt_llm\b",
        "this interpreter has no TensorRT-LLM: it is in the vendor's image, not on the host",
        f"run it where it is: a docker arm of the image, or {IMAGE_TREE}",
    ),
    _entry(
        "no-mpi",
        r"libmpi\.so\.\d+: cannot open shared object file",
        "TensorRT-LLM is linked to OpenMPI, and the loader found none: the image has its own (HPC-X, in /opt/hpcx/ompi), "
        "known to the image's loader cache and variables only",
        f"inside the image's tree: {IMAGE_TREE}, which brings cache, variables and entrypoint; "
        "on a bare host: sudo apt-get install libopenmpi-dev",
    ),
    _entry(
        "two-ucx",
        r"undefined symbol: uc[spmt]_\w+",
        "two builds of UCX met: a libucc or libucp of one (HPC-X, /opt/hpcx) was linked to the libucs of the other (a "
        "distribution's libucx0, or /usr/local/ucx)",
        "let no path set by hand come before the image's own: start through the image's entrypoint, as chroot and docker "
        "arms do, and leave LD_LIBRARY_PATH alone; a libucx0 that was installed into the image has to go again",
    ),
    _entry(
        "no-ucx",
        r"libuc[spmt]\.so\.\d+: cannot open shared object file",
        "an MPI of the image was found, by a PATH set by hand, but not the libraries beside it (/opt/hpcx/ucx/lib)",
        f"do not set PATH by hand: {IMAGE_TREE}",
    ),
    _entry(
        "triton-cuda",
        r"Triton only supports? CUDA 10\.0 or higher, but got CUDA version: (1[3-9]|[2-9]\d)",
        "Triton asked a ptxas of a newer CUDA than it knows: not the image's, but one that CUDA_HOME, PATH, "
        "TRITON_PTXAS_PATH or a link /usr/local/cuda to the host's toolkit named (Triton before 3.5 knows CUDA up to 12)",
        "use the image's own /usr/local/cuda: leave those variables unset and nothing of the host's bound over it",
    ),
    _entry(
        "ptxas-arch",
        r"ptxas\b.*(sm_1\d\d\w*)'? is not defined|Value '(sm_1\d\d\w*)' is not defined for option 'gpu-name'",
        "the ptxas that was asked is older than this GPU (GB10 is sm_121)",
        "use an image made for it (see docs/spark.md), or TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas of a CUDA that knows it",
    ),
    _entry(
        "no-gpu",
        r"no CUDA-capable device is detected|CUDA_ERROR_NO_DEVICE|Found no NVIDIA driver on your system"
        r"|libcuda\.so\.1: cannot open shared object file",
        "the driver is not inside: its libraries or its device nodes were not given, or CUDA_VISIBLE_DEVICES hides the GPU",
        "gpus: all in the arm's environment; spark-ray doctor says what this host has",
    ),
    _entry(
        "old-driver",
        r"CUDA driver version is insufficient for CUDA runtime version|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "the image's CUDA is newer than this host's driver, or libraries of another driver came first (a compat folder)",
        "update the driver, or take an older image",
    ),
    _entry(
        "mpi-root",
        r"(mpirun|prterun|orterun) has detected an attempt to run as root",
        "OpenMPI refuses root unless it is told to",
        "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1: every arm of spark_ray sets them where it runs as root",
    ),
    _entry(
        "mpi-init",
        r"It looks like \w*(opal_init|orte_init|prte_init|MPI_INIT\w*) failed",
        "OpenMPI did not find its own files: OPAL_PREFIX is not that of the MPI that started, or it was moved",
        "the image's own variables say where it is (OPAL_PREFIX): start through its ENV and entrypoint",
    ),
    _entry(
        "mpi-unreachable",
        r"BTLs attempted: self\b|ompi_dpm_dyn_init\(\) failed",
        "MPI started the engine's process and could not reach it: there is no network but the loopback, which OpenMPI leaves "
        "out by itself",
        "OMPI_MCA_btl_tcp_if_include=lo (every arm has it, unless the image names interfaces itself), or network: host",
    ),
    _entry(
        "mpi-spawn",
        r"There are not enough slots available in the system|MPI_ERR_SPAWN",
        "MPI could not start the engine's process beside the worker's",
        "for one GPU: engine.worker: single_process, which needs no second process",
    ),
    _entry(
        "wrong-machine",
        r"[Ee]xec format error",
        "a program for another processor: the image or tree is not of this machine's architecture",
        "pull the image on the machine that will run it, or name its platform (aarch64 on a DGX Spark)",
    ),
)  # fmt: skip


def explain(text: str) -> Explanation | None:
    """What the last known error in `text` means: the one it ended with. None: no known one."""
    found = [(match.start(), each) for each in CATALOGUE for match in each.pattern.finditer(text)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def explain_all(text: str) -> Sequence[Explanation]:
    """Every known error in `text`, each once, in the order in which they appear."""
    found = [(match.start(), each) for each in CATALOGUE if (match := each.pattern.search(text))]
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]
