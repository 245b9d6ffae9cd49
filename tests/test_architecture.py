"""The import rule of the house, on source text: data flows one way, and each heavy library has one home."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spark_ray"
LAYERS = [
    {"worker"}, {"errors", "units", "diagnose", "guestfiles", "roots", "redact"}, {"nvml", "driver", "cuda_view"}, {"spec"}, {"simulated"}, {"engines", "environment_spec", "conditions", "search_spec"}, {"knobs"}, {"experiment"}, {"privileged", "isolate", "tether", "ballast_process", "watchdog_process", "watchdog", "capabilities"}, {"rootact"}, {"group"},
    {"rootfs_host"}, {"rootfs"}, {"rootfs_check"}, {"image"}, {"rootfs_image"}, {"environments"}, {"page_cache", "ballast", "compile_cache"}, {"treatments"}, {"cluster"}, {"explain"}, {"config"}, {"plan", "duration", "cdi", "double", "landscape"},
    {"measurements"}, {"result"}, {"divergence", "outcome", "plausible", "observation", "host_view"}, {"record", "ledger"}, {"store"}, {"told", "power"}, {"host", "guest", "receive", "footprint"}, {"guest_podman", "sampler", "gate", "guard"}, {"attend"}, {"native_tensorrt_llm"}, {"content"}, {"launch", "reap", "digest"}, {"execute"}, {"drive"}, {"actors", "search"}, {"mapping"}, {"orchestrator"},
    {"preview"}, {"pin", "predict"}, {"terminal", "opening"}, {"running", "completion"}, {"several", "pilot"}, {"sweep", "doctor"}, {"spark_check"}, {"selftest"}, {"cli_content"}, {"cli"}, {"__main__"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Pairs that know each other on purpose: the host build is a part of rootfs, split for size.
MUTUAL = {("rootfs_host", "rootfs")}
HOMES = {
    "yaml": {"spark_ray/config.py"},
    "ray": {"spark_ray/actors.py"},
    "optuna": {"spark_ray/search"},
    "pandas": {"analysis"},
    "plotly": {"analysis"},
    "scipy": {"analysis", "spark_ray/search", "spark_ray/power.py"},
    "sklearn": {"spark_ray/search/kernel.py"},
    "torch": {"spark_ray/worker"},
    "transformers": {"spark_ray/worker"},
    "docker": {"spark_ray/image.py", "spark_ray/guest.py"},
    "pynvml": {"spark_ray/nvml.py"},
}
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "analysis").rglob("*.py")])


def imports(path):
    """(level, module, names) of every import in a file, deferred ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def own_module(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in FILES if PACKAGE in p.parents], ids=lambda p: str(p.relative_to(ROOT))
)
def test_modules_import_only_from_below(path):
    me = own_module(path)
    if me == "__init__":
        return
    depth = len(path.relative_to(PACKAGE).parts)
    for level, module, names in imports(path):
        if level == depth:  # reaches the top package: `from .store import x` or `from . import store`
            targets = [module.split(".")[0]] if module else names
        elif module.split(".")[0] == "spark_ray":
            targets = [module.split(".")[1]] if "." in module else names
        else:
            continue
        for target in targets:
            if target == "__version__":
                continue
            assert target == me or RANK[target] < RANK[me] or (me, target) in MUTUAL, (
                f"{path.name} imports {target}, which is not below it"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_heavy_library_has_one_home(path):
    here = str(path.relative_to(ROOT))
    for level, module, _ in imports(path):
        homes = HOMES.get(module.split(".")[0]) if level == 0 else None
        if homes:
            assert any(here == home or here.startswith(home + "/") for home in homes), (
                f"{here} imports {module}"
            )


@pytest.mark.parametrize("path", sorted((PACKAGE / "worker").glob("*.py")), ids=lambda p: p.name)
def test_the_guest_is_python_3_10_and_imports_nothing_of_the_host(path):
    ast.parse(path.read_text(), feature_version=(3, 10))
    for level, module, _ in imports(path):
        assert level <= 1, f"{path.name} reaches out of the worker package"
        assert not module.startswith("spark_ray")


def test_the_host_touches_only_the_open_parts_of_the_guest():
    allowed = {"protocol", "observe", "evidence", "identity"}
    for path in FILES:
        if PACKAGE / "worker" in path.parents:
            continue
        for match in re.finditer(r"from \.+worker(?:\.(\w+))? import ([\w, ]+)", path.read_text()):
            names = [match[1]] if match[1] else [name.strip() for name in match[2].split(",")]
            assert set(names) <= allowed, f"{path.name}: {names}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
