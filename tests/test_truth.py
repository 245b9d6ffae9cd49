"""The instrument against a program whose memory is known: benchmarks/memory_truth.py in a short form."""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import wait_until

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import memory_truth
import truth_child

pytestmark = pytest.mark.process
MIB = 1 << 20


def told(draw, component, source):
    """Whether one source told one part of a draw; None where it was not asked."""
    rows = memory_truth.judged([draw | {"beside": "idle"}])
    found = [row for row in rows if (row["component"], row["source"]) == (component, source)]
    return found[0]["told"] == 1 if found else None


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """Sizes that no two parts share, well above the tolerance of 8 MiB."""
    sizes = memory_truth.draw(random.Random(4), 30, 90)  # noqa: S311
    return memory_truth.execute(tmp_path_factory.mktemp("truth"), sizes, 2, None)


@pytest.mark.parametrize("component", ["anonymous", "shared", "mapped file", "grandchild's own"])
def test_the_process_tree_tells_its_parts(draw, component):
    assert told(draw, component, memory_truth.TREE)


@pytest.mark.parametrize("component", ["mapped file", "page cache", "file pages"])
def test_residency_tells_files(draw, component):
    assert told(draw, component, memory_truth.FILES)


@pytest.mark.root
@pytest.mark.parametrize(
    "component", ["anonymous", "shared", "mapped file", "page cache", "file pages", "everything"]
)
def test_a_group_of_its_own_tells_everything(draw, component):
    if draw["absent"]:
        pytest.skip(draw["absent"])
    assert told(draw, component, memory_truth.GROUP)


def test_page_cache_is_not_in_the_tree_and_the_peak_of_one_process_is_not_the_tree(draw):
    """What the meters beside ours leave out is left out: the truth is not so kind that any meter tells it."""
    readings = {(component, source): value for component, source, value in draw["readings"]}
    tree = sum(readings[part, memory_truth.TREE] for part in ("anonymous", "shared", "mapped file"))
    assert draw["truth"]["everything"] - tree > draw["truth"]["page cache"] - 16 * MIB
    # Across fork and exec the kernel keeps the parent's peak as the child's: here that of a grown test process.
    parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert draw["rivals"]["getrusage"]["ru_maxrss"] < max(tree, parent + 16 * MIB)


def test_a_wrong_reading_is_not_told(draw):
    """The judgement itself: a reading that is off by more than the tolerance fails, whatever its sign."""
    for off in (-20 * MIB, 20 * MIB):
        readings = [[c, s, v + off * (s == memory_truth.TREE)] for c, s, v in draw["readings"]]
        assert not told(draw | {"readings": readings}, "anonymous", memory_truth.TREE)
        assert told(draw | {"readings": readings}, "page cache", memory_truth.FILES)


def test_the_child_leaves_nothing_when_it_is_killed(tmp_path):
    sizes = {"anonymous": MIB, "shared": MIB, "inherited": MIB, "copied": MIB}
    child = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "truth_child.py"), "hold", str(tmp_path), json.dumps(sizes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("hold\n")
        child.stdin.flush()
        said = json.loads(child.stdout.readline())
        assert said["held"] == {
            name: sizes.get(name, 0) // truth_child.PAGE * truth_child.PAGE for name in truth_child.PARTS
        }
        child.kill()
    assert wait_until(lambda: not Path(f"/proc/{said['grandchild']}").exists())
