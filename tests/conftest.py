"""Tiers: what a test needs is its marker; what this machine lacks is skipped with the reason, and listed.

`--require-tiers a,b` turns a lack, or any skipped test of that tier, into a failure: CI passes every tier that its
machine can have.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("no_times", deadline=None)
hypothesis.settings.load_profile("no_times")  # tests assert no times: a busy machine is no failure

TIERS = ("docs", "process", "root", "docker", "mpi", "podman", "ray", "embedded", "browser", "gpu")
BESIDE_OTHERS = {"docs", "process"}
"""Tiers whose tests see nothing of what else happens on the machine; all others are marked `machine`."""
_LIBRARIES = {
    "embedded": ("torch", "transformers"),
    "docs": ("sphinx", "myst_parser", "furo", "sphinx_click"),
}


def _lack_of(tier: str) -> str | None:
    if tier == "root":
        return None if os.geteuid() == 0 else "not root"
    if tier == "docker":
        from spark_ray import image
        from spark_ray.errors import UnavailableError

        try:
            image.connect(timeout_s=10).close()
        except UnavailableError as error:
            return error.message
        return None
    if tier == "mpi":
        return _no_openmpi()
    if tier == "podman":
        from spark_ray import guest_podman

        return (guest_podman.lacking() or (None,))[0]
    if tier in _LIBRARIES:
        missing = [name for name in _LIBRARIES[tier] if importlib.util.find_spec(name) is None]
        return f"{' and '.join(missing)} not installed: pip install -e '.[{tier}]'" if missing else None
    if tier == "gpu":
        from spark_ray import driver

        return None if driver.find() else "no NVIDIA driver"
    if tier == "browser":
        return None if shutil.which("chromium") or shutil.which("chromium-browser") else "no chromium"
    return None


def _no_openmpi() -> str | None:
    """Debian's own is unpacked into a tree of the tests'; nothing is installed."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "not root on a Debian or Ubuntu"
    asked = subprocess.run(
        ["apt-cache", "show", "-q", "openmpi-bin"], capture_output=True, check=False, timeout=60
    )
    return "apt knows no openmpi-bin: apt-get update" if asked.returncode else None


def pytest_addoption(parser):
    parser.addoption("--require-tiers", default="", help="comma-separated tiers that must run whole")


def pytest_configure(config):
    config.lacks = {tier: _lack_of(tier) for tier in TIERS}
    config.ran = dict.fromkeys(TIERS, 0)
    config.skipped = []
    unknown = set(filter(None, config.getoption("--require-tiers").split(","))) - set(TIERS)
    if unknown:
        raise pytest.UsageError(f"no such tier: {', '.join(unknown)}")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    for item in items:
        tiers = [tier for tier in TIERS if item.get_closest_marker(tier)]
        for tier in tiers:
            if config.lacks[tier]:
                item.add_marker(pytest.mark.skip(reason=f"tier {tier}: {config.lacks[tier]}"))
        if not BESIDE_OTHERS.issuperset(tiers):
            item.add_marker(pytest.mark.machine)
    # Quick tiers first: a mistake shows in seconds, and the long end-to-end test comes last.
    items.sort(key=lambda item: sum(1 << TIERS.index(t) for t in TIERS if item.get_closest_marker(t)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    tiers = [tier for tier in TIERS if item.get_closest_marker(tier)]
    lacking = [tier for tier in tiers if item.config.lacks[tier]]
    if report.when == "call" and report.passed:
        for tier in tiers:
            item.config.ran[tier] += 1
    if (
        report.skipped
    ):  # a test of several tiers is missing from those that the machine lacks, not from the others
        item.config.skipped += [(tier, item.nodeid) for tier in lacking or tiers]


def _broken_promises(config):
    required = [tier for tier in config.getoption("--require-tiers").split(",") if tier]
    return [
        f"tier {tier}: {config.lacks[tier] or 'no test ran' if not config.ran[tier] else 'tests were skipped'}"
        for tier in required
        if not config.ran[tier] or any(tier == skipped for skipped, _ in config.skipped)
    ]


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and _broken_promises(session.config):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("tiers")
    for tier in TIERS:
        lack = config.lacks[tier]
        terminalreporter.line(
            f"{tier:9} {config.ran[tier]:4} passed" + (f"   not run: {lack}" if lack else "")
        )
    for broken in _broken_promises(config):
        terminalreporter.line(f"REQUIRED BUT NOT WHOLE  {broken}", red=True)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Trees and models are made once a session and away from the user's own cache."""
    folder = Path(os.environ.get("SPARK_RAY_TEST_CACHE") or tmp_path_factory.getbasetemp() / "cache")
    old = os.environ.get("SPARK_RAY_CACHE")
    os.environ["SPARK_RAY_CACHE"] = str(folder)
    yield folder
    if old is None:
        del os.environ["SPARK_RAY_CACHE"]
    else:
        os.environ["SPARK_RAY_CACHE"] = old


# ---- a run that several files read ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def map_run(tmp_path_factory):
    """experiments/simulated_map.yaml, its first ten blocks, with a report. Nobody changes it."""
    from helpers import run

    folder = tmp_path_factory.mktemp("map") / "run"
    file = Path(__file__).parent.parent / "experiments" / "simulated_map.yaml"
    done = run(file, "--local", "--set", "search.blocks=10", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def few_blocks(map_run, tmp_path):
    """The same run when it had two blocks: too few for a map."""
    folder = tmp_path / "few"
    shutil.copytree(map_run, folder, ignore=shutil.ignore_patterns("*.parquet", "report.html"))
    for later in sorted((folder / "blocks").glob("b*.json"))[2:]:
        later.unlink()
    return folder
