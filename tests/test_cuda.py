"""CUDA memory through ctypes, with a stand-in for the driver's library that the C compiler makes here."""

import shutil
import subprocess

import pytest

from spark_ray.worker import cuda

SOURCE = """
#include <stddef.h>
static int context, depth, retained;
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *handle, int device) { *handle = device + 40; return 0; }
int cuDevicePrimaryCtxRetain(void **made, int handle) { retained++; *made = &context; return handle == 40 ? 0 : 101; }
int cuCtxPushCurrent_v2(void *given) { depth++; return given == &context ? 0 : 201; }
int cuCtxPopCurrent_v2(void **popped) { depth--; *popped = &context; return 0; }
#ifndef OLD
int cuMemGetInfo_v2(size_t *free, size_t *total) {
  *free = 5000000000UL + retained; *total = 130663006208UL; return depth == 1 ? 0 : 201;
}
#endif
int cuGetErrorString(int error, const char **text) { *text = "no CUDA-capable device is detected"; return 0; }
"""


@pytest.fixture
def libcuda(tmp_path):
    """Builds a stand-in with given macros and returns its path."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")

    def build(*macros):
        source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", *macros, "-o", str(library), str(source)], check=True)
        return str(library)

    return build


def test_free_and_total_of_the_primary_context_which_is_taken_once(libcuda):
    path = libcuda("-DINIT=0")
    assert cuda.memory(library=path) == (5000000001, 130663006208)
    assert cuda.memory(library=path) == (
        5000000001,
        130663006208,
    )  # pushed and popped again, not retained again


def test_a_device_that_is_not_there(libcuda):
    with pytest.raises(cuda.Unavailable, match="no CUDA device 3: 1 can be seen"):
        cuda.memory(3, libcuda("-DINIT=0"))


def test_the_drivers_own_words_are_the_reason(libcuda):
    with pytest.raises(
        cuda.Unavailable, match=r"cuInit: no CUDA-capable device is detected \(CUDA error 100\)"
    ):
        cuda.memory(library=libcuda("-DINIT=100"))


def test_a_driver_without_the_function(libcuda):
    with pytest.raises(cuda.Unavailable, match="has no cuMemGetInfo_v2: the driver is too old"):
        cuda.memory(library=libcuda("-DINIT=0", "-DOLD"))


def test_no_driver(tmp_path):
    with pytest.raises(cuda.Unavailable, match="no NVIDIA driver here"):
        cuda.memory(library=str(tmp_path / "libcuda.so.1"))
