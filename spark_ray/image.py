"""The Docker engine's client, images made from rootfs trees, and vendors' images. Only `pull` pulls, when a person has said so."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.auth import resolve_repository_name
from docker.errors import APIError, DockerException, ImageNotFound, InvalidArgument, NotFound
from docker.types import DeviceRequest, Ulimit
from docker.utils import parse_repository_tag
from requests.exceptions import RequestException
from urllib3.exceptions import HTTPError

from .errors import InputError, UnavailableError, typed
from .rootfs import Rootfs, walk

LABEL = "spark_ray.rootfs_sha256"
REPOSITORY = "spark_ray/rootfs"
CDI_GPUS = "nvidia.com/gpu=all"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Image:
    """An image present in the engine. `rootfs_sha256` is known when the image was made from a rootfs here."""

    id: str
    reference: str
    rootfs_sha256: str | None


@dataclass(frozen=True)
class Inspected:
    """An image and what it says about how a program in it is started."""

    image: Image
    env: dict[str, str]
    entrypoint: tuple[str, ...]
    cwd: str
    size_bytes: int
    digests: tuple[str, ...]  # REPOSITORY@sha256:..., as the registries gave them; none of an image made here


# ---- the client -------------------------------------------------------------------------------------------


def connect(timeout_s: int = 60) -> Any:
    """A client of the engine that DOCKER_HOST or the current docker context names; it has answered once."""
    try:
        client = docker.from_env(timeout=timeout_s)
        client.ping()
    except (DockerException, OSError) as error:
        raise _unreachable(error) from error
    return client


def host_config(client: Any, settings: dict[str, Any]) -> Any:
    """Docker's form of container settings: `ulimits` are numbers by name, `gpus` is None, "all" (--gpus) or "cdi" (--device)."""
    config = {name: value for name, value in settings.items() if name not in {"ulimits", "gpus"}}
    limits = settings.get("ulimits") or {}
    if limits:
        config["ulimits"] = [Ulimit(name=name, soft=value, hard=value) for name, value in limits.items()]
    if settings.get("gpus") == "cdi":
        config["device_requests"] = [DeviceRequest(driver="cdi", device_ids=[CDI_GPUS])]
    elif settings.get("gpus"):
        config["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
    return client.api.create_host_config(**config)


@contextlib.contextmanager
def for_trying(client: Any) -> Iterator[str]:
    """Some image to try flags on: one made from a rootfs here, else one that holds nothing and is gone afterwards.

    In the latter no program can start, but what the daemon refuses it refuses before (`no_such_program`).
    """
    found = client.api.images(filters={"label": LABEL})
    if found:
        yield str(found[0]["Id"])
        return
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    answer = client.api.import_image_from_data(empty.getvalue(), changes=["LABEL spark_ray.purpose=probe"])
    made = str(json.loads(answer.splitlines()[-1])["status"])
    try:
        yield made
    finally:
        remove_image(client, made)


def try_flag(client: Any, image_id: str, settings: dict[str, Any]) -> str | None:
    """Start a container of `image_id` that does nothing, with host_config `settings`: the daemon's refusal, or None."""
    created = None
    try:
        created = client.api.create_container(
            image_id, command=["/bin/true"], entrypoint="", labels={"spark_ray.purpose": "probe"},
            host_config=host_config(client, {"network_mode": "none"} | settings),
        )["Id"]  # fmt: skip
        client.api.start(created)
        code = client.api.wait(created, timeout=30)["StatusCode"]
    except (APIError, InvalidArgument) as error:
        return str(getattr(error, "explanation", None) or error)
    finally:
        if created is not None:
            remove_container(client, created)
    return None if code == 0 else f"the container ended with status {code}"


def no_such_program(refusal: str) -> bool:
    """Whether all that is wrong is that the image has no /bin/true: the daemon has granted the flags by then."""
    return "/bin/true" in refusal and ("executable file not found" in refusal or "no such file" in refusal)


def remove_container(client: Any, container_id: str) -> None:
    """Remove a container, running or not. That it is gone already is success."""
    try:
        client.api.remove_container(container_id, v=True, force=True)
    except NotFound:
        return
    except APIError as error:
        if error.status_code != 409:  # "removal already in progress"
            raise


def ours(client: Any) -> Iterator[tuple[str, str]]:
    """(reference, first folder of its PATH) of each image that `build` has named, on an engine of this machine."""
    if not client.api.base_url.startswith("http+docker://"):
        return  # its folders are another machine's
    for found in client.api.images(name=REPOSITORY, filters={"label": LABEL}):
        for reference in found.get("RepoTags") or ():
            first = inspect(client, reference).env.get("PATH", "").split(":")[0]
            yield reference, first


def remove_image(client: Any, reference: str) -> str | None:
    """Remove an image; why it stays, if the engine refuses. That it is gone already is success."""
    try:
        client.api.remove_image(reference)
    except NotFound:
        return None
    except APIError as error:
        return str(error.explanation)
    return None


def wait_for_engine(client: Any, longest_s: float, given_up: Callable[[], bool]) -> None:
    """Until the engine of `client` answers again; UnavailableError when it has not within `longest_s`."""
    deadline = time.monotonic() + longest_s
    while not given_up():
        try:
            client.ping()
        except (DockerException, OSError) as error:
            if time.monotonic() > deadline:
                lost = _unreachable(error)
                raise UnavailableError(
                    f"{lost.message} (waited {longest_s:.0f} s for it to come back)",
                    mend=f"{lost.mend}, then continue with --resume",
                ) from error
            time.sleep(0.1)
        else:
            return


def remove_labelled(client: Any, labels: Mapping[str, str]) -> None:
    """Remove the containers that carry all of these labels."""
    filters = {"label": [f"{name}={value}" for name, value in labels.items()]}
    for container in client.api.containers(all=True, filters=filters):
        remove_container(client, container["Id"])


@contextlib.contextmanager
def in_words(doing: str) -> Iterator[None]:
    """An engine that refuses, or goes away in the middle of it, as an error of ours."""
    try:
        yield
    except (DockerException, RequestException, HTTPError, tarfile.TarError) as error:
        why = getattr(error, "explanation", None) or error
        mend = "look whether `docker info` answers and its disk has space, then do it again"
        raise UnavailableError(f"{doing} failed: {why}", mend=mend) from error


def _unreachable(error: BaseException) -> UnavailableError:
    """What keeps us from the engine, in the user's words."""
    where = os.environ.get("DOCKER_HOST", "its usual socket")
    causes = list(_causes(error))
    text = " ".join(str(cause) for cause in causes)
    if any(isinstance(cause, PermissionError) for cause in causes):
        return UnavailableError(
            f"this user may not talk to the Docker engine at {where}",
            mend="sudo usermod -aG docker $USER, then log in again",
        )
    if isinstance(error, docker.errors.InvalidVersion) or "client version" in text or "ApiVersion" in text:
        return UnavailableError(
            f"the docker package {docker.__version__} and the Docker engine at {where} do not understand each "
            f"other: {error}",
            mend="pip install --upgrade docker, or update the Docker engine",
        )
    return UnavailableError(
        f"no Docker engine answers at {where}: {error}",
        mend="sudo systemctl start docker (or set DOCKER_HOST to where it listens)",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The chain of an exception; requests hands some causes on as arguments only."""
    while error is not None:
        yield error
        for argument in error.args:
            if isinstance(argument, BaseException):
                yield from _causes(argument)
        error = error.__cause__ or error.__context__


# ---- images -----------------------------------------------------------------------------------------------


def inspect(client: Any, reference: str) -> Inspected:
    """What the engine knows about an image it has. A missing one is an error: it is never pulled."""
    try:
        found = client.images.get(reference)
    except ImageNotFound:
        raise UnavailableError(
            f"the Docker engine has no image {reference}; nothing is pulled without your word",
            mend=typed(f"image pull {reference}"),
        ) from None
    except APIError as error:
        raise InputError(f"{reference!r} cannot be an image: {error.explanation}") from None
    config = found.attrs.get("Config") or {}
    labels = config.get("Labels") or {}
    return Inspected(
        image=Image(id=found.id, reference=reference, rootfs_sha256=labels.get(LABEL)),
        env=dict(entry.split("=", 1) for entry in config.get("Env") or () if "=" in entry),
        entrypoint=tuple(config.get("Entrypoint") or ()),
        cwd=config.get("WorkingDir") or "/",
        size_bytes=int(found.attrs.get("Size") or 0),
        digests=tuple(found.attrs.get("RepoDigests") or ()),
    )


def build(client: Any, rootfs: Rootfs, tag: str | None = None) -> Image:
    """The image of a rootfs: its tree as one layer, with its environment and entrypoint. Reused when present."""
    reference = tag or f"{REPOSITORY}:{rootfs.sha256[:16]}"
    if present := _present(client, rootfs, reference):
        return present
    repository, version = parse_repository_tag(reference)
    with in_words(f"making an image of {rootfs.path}"):
        answer = client.api.import_image_from_stream(
            _tar(rootfs.path), repository=repository, tag=version or "latest", changes=_changes(rootfs)
        )
    for line in answer.splitlines():
        if (said := json.loads(line)) and "error" in said:
            raise UnavailableError(f"the Docker engine refused the rootfs {rootfs.path}: {said['error']}")
    return inspect(client, reference).image


def _present(client: Any, rootfs: Rootfs, reference: str) -> Image | None:
    try:
        found = inspect(client, reference)
    except UnavailableError:
        return None
    same_start = (found.env, found.entrypoint, found.cwd) == (rootfs.env, rootfs.entrypoint, rootfs.cwd)
    return found.image if same_start and found.image.rootfs_sha256 == rootfs.sha256 else None


def _changes(rootfs: Rootfs) -> list[str]:
    """The image's settings as Dockerfile lines, which is how the import call takes them."""
    if bad := [name for name, value in rootfs.env.items() if "\n" in value]:
        raise InputError(f"an image cannot hold a line break in an environment variable: {', '.join(bad)}")
    return [
        f"LABEL {LABEL}={rootfs.sha256}",
        f"WORKDIR {rootfs.cwd}",
        *(f"ENV {name}={_quoted(value)}" for name, value in rootfs.env.items()),
        *([f"ENTRYPOINT {json.dumps(rootfs.entrypoint)}"] if rootfs.entrypoint else []),
    ]


def _quoted(value: str) -> str:
    for special in ("\\", '"', "$"):
        value = value.replace(special, "\\" + special)
    return f'"{value}"'


def _tar(tree: Path) -> Iterator[bytes]:
    """The tree as a tar stream, made while it is sent; equal trees give equal bytes."""
    with tarfile.open(
        fileobj=io.BytesIO(), mode="w", format=tarfile.PAX_FORMAT
    ) as archive:  # knows hard links
        for name, _ in walk(tree):
            info = archive.gettarinfo(tree / name, arcname=name)
            info.mtime, info.uname, info.gname = 0, "", ""
            yield info.tobuf(tarfile.PAX_FORMAT)
            if info.isreg():
                yield from _padded(tree / name, info.size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _padded(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            left -= len(chunk)
            yield chunk
    if left:
        raise InputError(f"{path} became shorter while it was read")
    yield bytes(-size % tarfile.BLOCKSIZE)


# ---- registries -------------------------------------------------------------------------------------------


def registry_of(reference: str) -> str:
    """The registry that an image would come from."""
    try:
        return str(resolve_repository_name(parse_repository_tag(reference)[0])[0])
    except DockerException as error:
        raise InputError(f"{reference!r} cannot be an image: {error}") from None


def pull(client: Any, reference: str, progress: Callable[[int], None] = lambda done: None) -> Inspected:  # noqa: ARG005
    """Fetch an image from its registry, which a person has agreed to. `progress` is told the bytes so far."""
    registry = registry_of(reference)
    repository, version = parse_repository_tag(reference)
    done: dict[str, int] = {}
    with in_words(f"fetching {reference}"):
        try:
            for said in client.api.pull(repository, tag=version or "latest", stream=True, decode=True):
                if "error" in said:
                    raise _no_pull(reference, registry, str(said["error"]))
                if said.get("status") == "Downloading":
                    layer, detail = str(said.get("id")), said.get("progressDetail") or {}
                    done[layer] = max(done.get(layer, 0), int(detail.get("current") or 0))
                    progress(sum(done.values()))
        except APIError as error:
            raise _no_pull(reference, registry, str(error.explanation or error)) from None
        return inspect(client, reference)


def _no_pull(reference: str, registry: str, why: str) -> UnavailableError:
    refused = any(word in why.lower() for word in ("denied", "unauthorized", "authentication"))
    mend = f"docker login {registry}" if refused else f"look whether {registry} answers and has {reference}"
    return UnavailableError(f"{reference} could not be fetched: {why}", mend=mend)


def pinned(client: Any, reference: str) -> str:
    """REPOSITORY@sha256:... of an image that the engine has: the digest that it wrote down when it was pulled, no other."""
    facts = inspect(client, reference)
    wanted = resolve_repository_name(parse_repository_tag(reference)[0])
    for digest in facts.digests:
        if resolve_repository_name(digest.partition("@")[0]) == wanted:
            return digest
    raise UnavailableError(
        f"the Docker engine knows no digest of {reference}: it was made or loaded here, not pulled from {wanted[0]}",
        mend=typed(f"image pull {reference}"),
    )
