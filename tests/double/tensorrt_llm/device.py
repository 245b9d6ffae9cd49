"""What cudaMemGetInfo and torch's allocator would answer, and the little memory that is really taken.

Free and total are those of /proc/meminfo (MemFree, MemTotal: what a GB10 answers), or fixed by `settings.py`. Of what
the engine takes, at most 64 MiB are really touched; the rest is only subtracted, so that the sums come out as if it were
there. As on unified memory, something larger than `free` can still be had, as long as the kernel could find it.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace

from .settings import setting

MIB = 1 << 20
MOST_TOUCHED = {"weights": 16 * MIB, "kv_cache": 32 * MIB, "activation": 16 * MIB}


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError."""


def meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}


def _waiting_bytes() -> int:
    path = setting("WAITING")
    return int(Path(path).read_text(encoding="utf-8")) if path and Path(path).exists() else 0


class _Cuda:
    """torch.cuda, as far as the sizing asks it."""

    device: Device

    def mem_get_info(self) -> tuple[int, int]:
        return self.device.mem_get_info()


torch = SimpleNamespace(cuda=_Cuda())


class Device:
    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._touched: dict[str, mmap.mmap] = {}
        self._outside = {"context", "graphs", "kv_cache"}  # not in torch's allocator
        self._peak = 0
        torch.cuda.device = self

    def mem_get_info(self) -> tuple[int, int]:
        """(free, total), as torch.cuda.mem_get_info."""
        free, total, _ = self._view()
        return free, total

    def _view(self) -> tuple[int, int, int]:
        """(free, total, what can still be had)."""
        held = sum(self._held.values()) + _waiting_bytes()
        if fixed := setting("FREE_BYTES"):
            left = max(0, int(fixed) - held)
            return left, int(setting("TOTAL_BYTES", fixed)), left
        info = meminfo()
        unseen = held - sum(map(len, self._touched.values()))
        total = int(setting("TOTAL_BYTES", str(info["MemTotal"])))
        return max(0, info["MemFree"] - unseen), total, max(0, info["MemAvailable"] - unseen)

    @property
    def torch_allocated(self) -> int:
        return sum(size for what, size in self._held.items() if what not in self._outside)

    @property
    def torch_peak(self) -> int:
        return max(self._peak, self.torch_allocated)

    def reset_peak(self) -> None:
        self._peak = self.torch_allocated

    def take(self, what: str, size_bytes: int) -> None:
        room = self._view()[2]
        if size_bytes > room:
            wanted, left = size_bytes / (1 << 30), room / (1 << 30)
            raise OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {wanted:.2f} GiB. GPU 0 has {left:.2f} GiB free."
            )
        self._held[what] = self._held.get(what, 0) + size_bytes
        self._peak = self.torch_peak
        touched = min(size_bytes, MOST_TOUCHED.get(what, 0))
        if touched and what not in self._touched:
            block = mmap.mmap(-1, touched, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            block[:: mmap.PAGESIZE] = b"\1" * -(-touched // mmap.PAGESIZE)
            self._touched[what] = block

    def leave_waiting(self, size_bytes: int) -> None:
        """What was given back waits in per-CPU lists, and is not free until somebody drains them."""
        if waiting := setting("WAITING"):
            Path(waiting).write_text(str(_waiting_bytes() + size_bytes), encoding="utf-8")

    def give_back(self, what: str) -> None:
        self._held.pop(what, None)
        block = self._touched.pop(what, None)
        if block is not None:
            block.close()
