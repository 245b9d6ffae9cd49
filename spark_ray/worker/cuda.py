"""Free and total device memory for engines without torch: libcuda through ctypes, what cudaMemGetInfo answers.

Asking needs a CUDA context, and the context itself costs device memory (hundreds of MiB on a discrete GPU; on unified
memory it is the host's). This takes the device's primary context, the one that the CUDA runtime and torch in the same
process use as well, once, and keeps it until the process ends: the first reading already has its cost in it, and no
later one is lower because of another context.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

LIBRARY = "libcuda.so.1"  # belongs to the driver: there is none without one


class Unavailable(Exception):
    """CUDA memory cannot be read here, and why."""


def _call(library: Any, name: str, *arguments: Any) -> None:
    try:
        status = getattr(library, name)(*arguments)
    except AttributeError:
        raise Unavailable(f"{LIBRARY} has no {name}: the driver is too old") from None
    if status != 0:
        text = ctypes.c_char_p()
        named = getattr(library, "cuGetErrorString", None)
        if named is not None and named(status, ctypes.byref(text)) == 0 and text.value:
            raise Unavailable(f"{name}: {text.value.decode(errors='replace')} (CUDA error {status})")
        raise Unavailable(f"{name}: CUDA error {status}")


@functools.cache
def _context(device: int, path: str) -> tuple[Any, ctypes.c_void_p]:
    """(libcuda, the device's primary context), made once."""
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise Unavailable(f"no NVIDIA driver here: {error}") from None
    _call(library, "cuInit", 0)
    count, handle, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    if not 0 <= device < count.value:
        raise Unavailable(f"there is no CUDA device {device}: {count.value} can be seen here")
    _call(library, "cuDeviceGet", ctypes.byref(handle), device)
    _call(library, "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return library, context


def memory(device: int = 0, library: str = LIBRARY) -> tuple[int, int]:
    """(free, total) bytes of a device as CUDA numbers them here. Raises Unavailable with the reason."""
    loaded, context = _context(device, library)
    free, total, popped = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
    _call(loaded, "cuCtxPushCurrent_v2", context)
    try:
        _call(loaded, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    finally:
        _call(loaded, "cuCtxPopCurrent_v2", ctypes.byref(popped))
    return free.value, total.value
