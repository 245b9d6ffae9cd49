"""What a worker runs on, made ready on a node: model, interpreter, rootfs, image. Everything is cached by content."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from . import capabilities, cdi, driver, guest_podman, image, native_tensorrt_llm, rootfs, rootfs_check, roots
from .engines import AnyEngine, EmbeddedEngine, TensorRTLLMEngine
from .environment_spec import (
    ChrootEnvironment,
    DockerEnvironment,
    IsolatedEnvironment,
    NativeEnvironment,
    PodmanEnvironment,
)
from .environments import DEFAULT_PATH, PASSED_VARIABLES, Content, EnvironmentSpec, Gpu, Problem, docker
from .errors import InputError, UnavailableError
from .experiment import Experiment

logger = logging.getLogger("spark_ray")
TRANSFORMERS = SpecifierSet(">=5.23,<5.24")
"""Versions whose paged cache the embedded engine reads; pyproject.toml says the same."""

_WORKER = Path(__file__).parent / "worker"
_NO_DRIVER = Problem(
    "no NVIDIA driver here: it takes /dev/nvidia0 and a libcuda.so.1 that the loader finds",
    "install the driver, or add its folder to LD_LIBRARY_PATH; without a GPU use engine.device: cpu (embedded), or "
    "rehearse with --double (tensorrt_llm)",
)


cache_folder = roots.cache_folder


def host_driver() -> driver.Driver | None:
    """What a guest needs of the NVIDIA driver: as the host's CDI specification says, else as it is found."""
    return cdi.find() or driver.find()


def driver_problems() -> list[Problem]:
    """What keeps a guest from the NVIDIA driver of this host."""
    try:
        return [_NO_DRIVER] if host_driver() is None else []
    except InputError as error:  # a CDI specification that is none
        return [Problem(error.message, error.mend or cdi.MEND)]


# ---- engine and model -------------------------------------------------------------------------------------


def engine_problems(experiment: Experiment) -> list[Problem]:
    """What the engine lacks in this interpreter (which every host-made environment shares)."""
    on_gpu = any(experiment.engine_of(arm).needs_gpu for arm in experiment.arms)
    problems = driver_problems() if on_gpu else []
    if not isinstance(experiment.engine, EmbeddedEngine):
        return problems
    mend = "pip install -c constraints.txt 'spark_ray[embedded]'"
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return [Problem(f"engine embedded needs {' and '.join(missing)}", mend)]
    found = Version(importlib.metadata.version("transformers"))
    if not TRANSFORMERS.contains(found, prereleases=True):  # its cache and its settings change their names
        wrong = Problem(f"engine embedded needs transformers {TRANSFORMERS}, found {found}", mend)
        problems.insert(0, wrong)
    return problems


def model_problems(experiment: Experiment) -> list[Problem]:
    """What is wrong with a model folder, found without loading it."""
    model = experiment.model
    if model is None or model.path is None:
        return []
    folder = Path(model.path)
    mend = "name a folder with config.json and *.safetensors in model.path"
    if not folder.is_dir():
        return [Problem(f"model folder {folder} does not exist", mend)]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model_type" not in config:
            return [Problem(f"{folder}/config.json names no model_type", mend)]
    except (OSError, ValueError) as error:
        return [Problem(f"{folder}/config.json cannot be read: {error}", mend)]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return [Problem(f"{folder} holds no *.safetensors", mend)]
    for path in weights:
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
        except OSError as error:
            return [Problem(f"{path} cannot be read: {error.strerror}", "copy it again, or let it be read")]
        if not 2 <= header <= size - 8:
            return [Problem(f"{path} is not a whole safetensors file ({size} bytes)", "copy the file again")]
    return _leading_out(folder, experiment)


def _leading_out(folder: Path, experiment: Experiment) -> list[Problem]:
    """Links out of the folder, as a cache of the hub is made of: an environment with a root of its own has the folder alone."""
    specs = {name: arm.environment for name, arm in experiment.arms.items()}
    bound = [
        name
        for name, spec in specs.items()
        if not isinstance(spec, NativeEnvironment) and getattr(spec, "root", None) != "host"
    ]
    inside = Path(os.path.realpath(folder))
    for path in sorted(folder.iterdir()) if bound else ():
        if path.is_symlink() and inside not in Path(os.path.realpath(path)).parents:
            what = f"{path} leads out of its folder, which is all that arm {bound[0]} would have of it"
            return [Problem(what, "give it a folder of its own: hf download --local-dir, or cp -rL")]
    return []


def _model_key(shape: dict[str, Any]) -> str:
    recipe = (_WORKER / "checkpoint.py").read_bytes() + json.dumps(shape, sort_keys=True).encode()
    return hashlib.sha256(recipe).hexdigest()[:16]


def model_to_make(experiment: Experiment) -> Path | None:
    """Where the random checkpoint will be made, when there is one to make."""
    model = experiment.model
    if model is None or model.random_llama is None:
        return None
    folder = cache_folder() / "models" / f"random-llama-{_model_key(model.random_llama.model_dump())}"
    return None if (folder / "config.json").is_file() else folder


def prepare_model(experiment: Experiment) -> Path | None:
    """The model's folder; a random checkpoint is made here once."""
    model = experiment.model
    if model is None:
        return None
    if model.path is not None:
        return Path(model.path).absolute()
    assert model.random_llama is not None  # noqa: S101  the model has exactly one source
    shape = model.random_llama.model_dump()
    folder = cache_folder() / "models" / f"random-llama-{_model_key(shape)}"
    if (folder / "config.json").is_file():
        return folder
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "spark_ray.worker.checkpoint", str(part), json.dumps(shape), str(os.getpid())],
            capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"},
        )  # fmt: skip
        if done.returncode:
            raise UnavailableError(
                f"the random checkpoint could not be made:\n{done.stderr.strip()[-2000:]}",
                mend="see the message above",
            )
        for path in part.iterdir():
            path.chmod(0o644)
        try:
            part.rename(folder)
        except OSError:  # another driver made it meanwhile
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


# ---- trees and images -------------------------------------------------------------------------------------


def _host_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}


def _mounts(tree: rootfs.Rootfs) -> tuple[tuple[str, str, bool], ...]:
    return tuple((mount.source, mount.target, mount.read_only) for mount in tree.mounts)


@dataclass(frozen=True)
class Trees:
    """Trees and hashes of what is bound into them, each looked at once for all arms of a slot."""

    _trees: dict[str, rootfs.Rootfs] = field(default_factory=dict)
    _bound: dict[tuple[rootfs.Mount, ...], str] = field(default_factory=dict)

    def tree(self, name: str) -> rootfs.Rootfs:
        if name not in self._trees:
            host = name == "host"
            self._trees[name] = (
                rootfs.build_host(cache_folder() / "rootfs") if host else rootfs.load_usable(Path(name))
            )
        return self._trees[name]

    def bound_sha256(self, mounts: tuple[rootfs.Mount, ...]) -> str | None:
        if mounts and mounts not in self._bound:
            self._bound[mounts] = rootfs.bound_sha256(mounts)
        return self._bound.get(mounts)

    def own_bound_sha256(self) -> str | None:
        """What native runs on, named as in the trees made from it; None where it may not be read."""
        try:
            return self.bound_sha256(rootfs.host_mounts())
        except OSError:
            return None


def prepare(spec: EnvironmentSpec, docker_client: Any | None, trees: Trees | None = None) -> Content:
    """Make one environment's content ready on this node. `trees` is filled, to be handed on to the next arm."""
    trees = trees or Trees()
    match spec:
        case NativeEnvironment() | IsolatedEnvironment(root="host"):
            path = f"{sys.prefix}/bin:{DEFAULT_PATH}"  # as in the trees made from this interpreter
            return Content(
                python=sys.executable,
                variables={"PATH": path, **_host_variables()},
                bound_sha256=trees.own_bound_sha256(),
            )
        case ChrootEnvironment() | IsolatedEnvironment():
            content = _content(trees.tree(spec.rootfs), trees, spec.python, host=spec.rootfs == "host")
            if "net" not in getattr(spec, "namespaces", ()):
                content = replace(content, mounts=(*content.mounts, *_names_of_host()))
            return _with_driver(content) if spec.gpus else content
        case PodmanEnvironment():
            if (lacks := guest_podman.lacking()) is not None:
                raise UnavailableError(lacks[0], mend=lacks[1])
            return _content(trees.tree(spec.rootfs), trees, spec.python, host=spec.rootfs == "host")
        case DockerEnvironment(image="host"):
            tree = trees.tree("host")
            made = image.build(docker_client, tree)
            content = _content(tree, trees, spec.python, host=True)
            content = replace(content, root=None, image_id=made.id)
            return _with_gpu(content, docker_client) if spec.gpus else content
        case DockerEnvironment():
            found = image.inspect(docker_client, spec.image)
            content = Content(
                python=spec.python or "python3", variables=dict(found.env), entrypoint=found.entrypoint,
                image_id=found.image.id, sha256=found.image.rootfs_sha256,
            )  # fmt: skip
            return _with_gpu(content, docker_client) if spec.gpus else content


_NAMES = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf")


def _names_of_host() -> tuple[tuple[str, str, bool], ...]:
    """The host's name and how it finds others: a container on the host's network has them too, and MPI asks for them."""
    return tuple((os.path.realpath(name), name, True) for name in _NAMES if Path(name).is_file())


def _content(tree: rootfs.Rootfs, trees: Trees, python: str | None, *, host: bool) -> Content:
    return Content(
        python=python or tree.python,
        variables={**tree.env, **(_host_variables() if host else {})},
        entrypoint=tree.entrypoint,
        root=str(tree.path),
        mounts=_mounts(tree),
        image_id=tree.image_id,
        sha256=tree.sha256,
        bound_sha256=trees.bound_sha256(tree.mounts),
    )


def _with_gpu(content: Content, docker_client: Any) -> Content:
    """The GPU for a container: as the daemon gives it, by `--gpus` or by CDI; else the driver's files and nodes."""
    assert content.image_id is not None  # noqa: S101  a container has an image
    ways: tuple[tuple[Literal["request", "cdi"], str], ...] = (("request", "all"), ("cdi", "cdi"))
    for exposure, gpus in ways:
        refusal = image.try_flag(docker_client, content.image_id, {"gpus": gpus})
        if refusal is None or image.no_such_program(refusal):
            return replace(content, gpu=Gpu(exposure))
    logger.warning("Docker gives no GPU by --gpus or CDI: the driver's files and nodes are bound instead")
    return _with_driver(content)


def _with_driver(content: Content) -> Content:
    """The driver's files in one folder, which comes after the image's own paths, as in the loader's order in a container."""
    found = host_driver()
    if found is None:
        raise UnavailableError(_NO_DRIVER.what, mend=_NO_DRIVER.mend)
    files = found.libraries | found.programs
    bound = ((source, f"{driver.INSIDE}/{name}", True) for name, source in files.items())
    libraries = content.variables.get("LD_LIBRARY_PATH")
    programs = content.variables.get("PATH", DEFAULT_PATH)
    return replace(
        content,
        mounts=(*content.mounts, *bound),
        variables={
            **content.variables,
            **found.variables,
            "LD_LIBRARY_PATH": f"{libraries}:{driver.INSIDE}" if libraries else driver.INSIDE,
            "PATH": f"{programs}:{driver.INSIDE}",
        },
        gpu=Gpu("devices", found.version, found.devices, found.source, found.left_out),
    )


def agree(contents: Mapping[str, Content]) -> dict[str, Content]:
    """The same contents, where an image that a tree here was extracted from has the tree's hash: it is the same content."""
    known = {each.image_id or "": each.sha256 for each in contents.values() if each.root and each.image_id}
    return {
        arm: replace(each, sha256=each.sha256 or known.get(each.image_id or ""))
        for arm, each in contents.items()
    }


def on_host_tree(spec: EnvironmentSpec) -> bool:
    """Whether it runs on the tree that is made from this interpreter, or on an image of that."""
    own_root = isinstance(spec, IsolatedEnvironment) and spec.root == "host"
    return not own_root and "host" in (getattr(spec, "rootfs", None), getattr(spec, "image", None))


def environment_problems(spec: EnvironmentSpec) -> list[Problem]:
    """What an environment's own content lacks, where that can be told before any effect: all of it at once."""
    found = driver_problems() if getattr(spec, "gpus", None) else []
    try:
        found += [Problem(each.found, each.mend) for each in tree_findings(spec) if each.status == "missing"]
        if isinstance(spec, DockerEnvironment):
            found += _docker_problems(spec)
        if isinstance(spec, PodmanEnvironment) and not found:
            found += guest_podman.refused_flags(spec)
    except (InputError, UnavailableError) as error:
        found.append(Problem(error.message, error.mend or "see docs/troubleshooting.md"))
    return found


def tree_findings(spec: EnvironmentSpec, module: str | None = None) -> list[rootfs_check.Finding]:
    """What can be seen in the tree of a vendor's image without starting anything; nothing of a tree made here."""
    name = getattr(spec, "rootfs", "host")
    if name == "host":
        return []
    tree = rootfs.load_usable(Path(name))
    return [] if tree.mounts else list(rootfs_check.look(tree, getattr(spec, "python", None), module))


def library_of(engine: AnyEngine) -> str | None:
    """The library that must be in an arm's own environment; None: the host's interpreter has it, or the run brings it."""
    return "tensorrt_llm" if isinstance(engine, TensorRTLLMEngine) and engine.double is None else None


def library_problems(experiment: Experiment, arm: str) -> list[Problem]:
    """Where the library of the engine is not in an arm's environment, as far as that can be told without starting it."""
    module, spec = library_of(experiment.engine_of(arm)), experiment.arms[arm].environment
    if module is None:
        return []
    if isinstance(spec, NativeEnvironment) or on_host_tree(spec) or getattr(spec, "root", None) == "host":
        return list(native_tensorrt_llm.problems())
    try:
        found = tree_findings(spec, module)
    except (InputError, UnavailableError):  # said by `environment_problems`
        return []
    return [
        Problem(each.found, each.mend) for each in found if each.name == module and each.status == "missing"
    ]


def _image_of(spec: DockerEnvironment, client: Any) -> contextlib.AbstractContextManager[str]:
    if spec.image == "host":
        return image.for_trying(client)
    return contextlib.nullcontext(str(image.inspect(client, spec.image).image.id))


def _docker_problems(spec: DockerEnvironment) -> list[Problem]:
    client = image.connect()
    try:
        with _image_of(spec, client) as made:
            refused = refused_flags(spec, client, made)
        return [refused] if refused else []
    finally:
        client.close()


def refused_flags(spec: DockerEnvironment, client: Any, image_id: str) -> Problem | None:
    """What the daemon says to this environment's flags, in its own words, tried on a container that does nothing."""
    changed = docker.changed_flags(spec)
    settings = docker.flags(spec) | {
        "gpus": None
    }  # how the GPU is given is tried when the content is prepared
    refusal = image.try_flag(client, image_id, settings) if changed else None
    if refusal is None or image.no_such_program(refusal):
        return None
    words, mend = capabilities.explain(refusal, settings)
    return Problem(f"the Docker daemon refuses {', '.join(changed)}: {words}", mend)
