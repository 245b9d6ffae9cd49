"""What a worker runs on, made ready on a node: model, interpreter, rootfs, image. Everything is cached by content."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import image, rootfs
from .environments import DEFAULT_PATH, PASSED_VARIABLES, Content, EnvironmentSpec, Problem, docker
from .errors import InputError, UnavailableError
from .experiment import (
    ChrootEnvironment,
    DockerEnvironment,
    EmbeddedEngine,
    Experiment,
    Model,
    NativeEnvironment,
)

_WORKER = Path(__file__).parent / "worker"


def cache_folder() -> Path:
    """Where built trees and models are kept: SPARK_RAY_CACHE, else the user's cache folder."""
    chosen = os.environ.get("SPARK_RAY_CACHE")
    if chosen:
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spark_ray"


# ---- engine and model -------------------------------------------------------------------------------------


def engine_problems(experiment: Experiment) -> list[Problem]:
    """What the engine lacks in this interpreter (which every host-made environment shares)."""
    if not isinstance(experiment.engine, EmbeddedEngine):
        return []
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return [
            Problem(
                f"engine embedded needs {' and '.join(missing)}",
                "pip install -c constraints.txt 'spark_ray[embedded]'",
            )
        ]
    return []


def model_problems(model: Model | None) -> list[Problem]:
    """What is wrong with a model folder, found without loading it."""
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
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if not 2 <= header <= size - 8:
            return [Problem(f"{path} is not a whole safetensors file ({size} bytes)", "copy the file again")]
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
            [sys.executable, str(_WORKER / "checkpoint.py"), str(part), json.dumps(shape)],
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


def _tree(name: str) -> rootfs.Rootfs:
    return rootfs.build_host(cache_folder() / "rootfs") if name == "host" else rootfs.load(Path(name))


def prepare(spec: EnvironmentSpec, docker_client: Any | None) -> Content:
    """Make one environment's content ready on this node."""
    match spec:
        case NativeEnvironment():
            path = f"{sys.prefix}/bin:{DEFAULT_PATH}"  # as in the trees made from this interpreter
            return Content(python=sys.executable, variables={"PATH": path, **_host_variables()})
        case ChrootEnvironment():
            tree = _tree(spec.rootfs)
            return _content(tree, spec.python, host=spec.rootfs == "host")
        case DockerEnvironment(image="host"):
            tree = _tree("host")
            made = image.build(docker_client, tree)
            content = _content(tree, spec.python, host=True)
            return Content(**{**content.__dict__, "root": None, "image_id": made.id})
        case DockerEnvironment():
            found = image.inspect(docker_client, spec.image)
            return Content(
                python=spec.python or "python3", variables=dict(found.env), entrypoint=found.entrypoint,
                image_id=found.image.id, sha256=found.image.rootfs_sha256,
            )  # fmt: skip


def _content(tree: rootfs.Rootfs, python: str | None, *, host: bool) -> Content:
    return Content(
        python=python or tree.python,
        variables={**tree.env, **(_host_variables() if host else {})},
        entrypoint=tree.entrypoint,
        root=str(tree.path),
        mounts=_mounts(tree),
        sha256=tree.sha256,
        bound_sha256=rootfs.bound_sha256(tree.mounts) if tree.mounts else None,
    )


def environment_problems(spec: EnvironmentSpec) -> list[Problem]:
    """What an environment's own content lacks, where that can be told before any effect."""
    try:
        if isinstance(spec, ChrootEnvironment) and spec.rootfs != "host":
            rootfs.load(Path(spec.rootfs))
        if isinstance(spec, DockerEnvironment):
            return _docker_problems(spec)
    except (InputError, UnavailableError) as error:
        return [Problem(error.message, error.mend or "see docs/troubleshooting.md")]
    return []


def _docker_problems(spec: DockerEnvironment) -> list[Problem]:
    client = image.connect()
    try:
        made = (
            image.any_of_ours(client) if spec.image == "host" else image.inspect(client, spec.image).image.id
        )
        refused = refused_flags(spec, client, made) if made else None
        return [refused] if refused else []
    finally:
        client.close()


def refused_flags(spec: DockerEnvironment, client: Any, image_id: str) -> Problem | None:
    """What the daemon says to this environment's flags, in its own words, tried on a container that does nothing."""
    changed = docker.changed_flags(spec)
    refusal = image.try_flag(client, image_id, docker.flags(spec)) if changed else None
    if refusal is None or "executable file not found" in refusal or "no such file" in refusal:
        return None  # an image without /bin/true has passed the flags by then
    return Problem(
        f"the Docker daemon refuses {', '.join(changed)}: {refusal}",
        "leave that key out, or give the daemon what it lacks",
    )
