"""A program that holds memory of known sizes and kinds, so that what meters say can be compared with the truth.

    python truth_child.py hold FOLDER SIZES [SECONDS]    SIZES as JSON: {"anonymous": bytes, ...}, see PARTS
    python truth_child.py neighbour FOLDER               takes, frees, writes, reads and forgets all the time

`hold` says `ready`, waits for a line on standard input, takes the parts, says one line of JSON and keeps them until
standard input closes. With SECONDS it neither waits nor listens: for meters that start programs themselves.
Every page is touched one by one; sizes are whole pages; the files lie in FOLDER, which must be on a disk.
Standard library only.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import time
from pathlib import Path

PARTS = {
    "anonymous": "private memory of the child",
    "grandchild": "private memory of the grandchild",
    "shared": "MAP_SHARED memory of both",
    "mapped": "a file mapped and touched by the child",
    "page_cache": "a file read by the child, mapped by nobody",
    "inherited": "private memory of the child when it forked the grandchild",
    "copied": "the part of `inherited` that the grandchild then wrote: as much again",
}
PAGE = mmap.PAGESIZE
MIB = 1 << 20


def write(block: mmap.mmap, size_bytes: int) -> None:
    for offset in range(0, size_bytes, PAGE):
        block[offset] = 1


def memory(size_bytes: int, flags: int = mmap.MAP_PRIVATE) -> mmap.mmap | None:
    if not size_bytes:
        return None
    block = mmap.mmap(-1, size_bytes, flags=flags | mmap.MAP_ANONYMOUS)
    write(block, size_bytes)
    return block


def file_of(folder: Path, name: str, size_bytes: int) -> Path:
    """Allocated, not written: reading it fills the page cache with no disk traffic."""
    path = folder / f"{name}-{os.getpid()}"
    with path.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size_bytes)
    return path


def mapped(path: Path, size_bytes: int) -> mmap.mmap:
    with path.open("rb") as stream:
        block = mmap.mmap(stream.fileno(), size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    for offset in range(0, size_bytes, PAGE):
        block[offset]
    return block


def read_through(path: Path) -> None:
    buffer = bytearray(4 * MIB)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def fork_grandchild(sizes: dict[str, int], shared: mmap.mmap | None, inherited: mmap.mmap | None) -> int:
    """A process that maps the shared part too, writes a part of what it inherited, and waits to be ended."""
    heard, say = os.pipe()
    child = os.getpid()
    grandchild = os.fork()
    if grandchild:
        os.close(say)
        if os.read(heard, 1) != b".":
            raise SystemExit("the grandchild died before it held its parts")
        return grandchild
    try:
        os.close(heard)
        own = memory(sizes["grandchild"])
        if shared is not None:
            write(shared, sizes["shared"])
        if inherited is not None:
            write(inherited, sizes["copied"])
        os.write(say, b".")
        while os.getppid() == child and own is not False:  # `own` lives as long as this process
            time.sleep(0.05)
    finally:
        os._exit(0)


def hold(folder: Path, sizes: dict[str, int], seconds: float | None) -> None:
    sizes = {name: sizes.get(name, 0) // PAGE * PAGE for name in PARTS}
    if seconds is None:
        print("ready", flush=True)
        sys.stdin.readline()
    files = {name: file_of(folder, name, sizes[name]) for name in ("mapped", "page_cache") if sizes[name]}
    try:
        inherited = memory(sizes["inherited"])
        shared = memory(sizes["shared"], mmap.MAP_SHARED)
        grandchild = fork_grandchild(sizes, shared, inherited)
        held = [memory(sizes["anonymous"]), inherited, shared]
        if "mapped" in files:
            held.append(mapped(files["mapped"], sizes["mapped"]))
        if "page_cache" in files:
            read_through(files["page_cache"])
        names = {name: str(path) for name, path in files.items()}
        print(json.dumps({"held": sizes, "grandchild": grandchild, "files": names}), flush=True)
        if seconds is None:
            sys.stdin.read()
        else:
            time.sleep(seconds)
        os.kill(grandchild, 9)
        os.waitpid(grandchild, 0)  # reaped, so that its usage counts in this process's own children
        del held
    finally:
        for path in files.values():
            path.unlink()


def neighbour(folder: Path) -> None:
    """The noise: up to 300 MiB taken and freed, up to 200 MiB written and read, several times a second."""
    generator = random.Random(0)
    parent = os.getppid()
    path = folder / f"noise-{os.getpid()}"
    try:
        while os.getppid() == parent:
            block = memory(generator.randrange(20 * MIB, 300 * MIB) // PAGE * PAGE)
            path.write_bytes(bytes(generator.randrange(20 * MIB, 200 * MIB)))
            read_through(path)
            del block
            path.unlink()
    finally:
        path.unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    word, folder, *rest = arguments
    if word == "neighbour":
        neighbour(Path(folder))
    elif word == "hold":
        hold(Path(folder), json.loads(rest[0]), float(rest[1]) if len(rest) > 1 else None)
    else:
        raise SystemExit(f"{word!r} is not one of: hold, neighbour")


if __name__ == "__main__":
    main(sys.argv[1:])
