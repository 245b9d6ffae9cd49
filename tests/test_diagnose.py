"""Known errors are explained wherever they turn up; images are fetched on a person's word and pinned by what was read."""

from types import SimpleNamespace

import docker
import pytest
from click.testing import CliRunner
from helpers import experiment_data, spark_ray, write_yaml

from spark_ray import cli, cli_content, diagnose, image, pin
from spark_ray.errors import InputError, UnavailableError

STUDY = {  # the text of each, as the study shows it
    "no-tensorrt-llm": "ModuleNotFoundError: No module named 'tensorrt_llm'",
    "no-mpi": "ImportError: libmpi.so.40: cannot open shared object file",
    "no-gpu": "CUDA Error: no CUDA-capable device is detected",
    "two-ucx": "MPI Error: undefined symbol: ucs_config_doc_nop",
    "no-ucx": "mpirun: error while loading shared libraries: libucs.so.0: cannot open shared object file",
    "triton-cuda": "RuntimeError: Triton only supports CUDA 10.0 or higher, but got CUDA version: 13.0",
}
ELSEWHERE = {
    "two-ucx": "symbol lookup error: /opt/hpcx/ompi/lib/libucc.so.1: undefined symbol: ucp_worker_progress",
    "triton-cuda": "RuntimeError: Triton only support CUDA 10.0 or higher, but got CUDA version: 13.0",  # Triton's own spelling
    "ptxas-arch": "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'",
    "mpi-root": "mpirun has detected an attempt to run as root.",
    "mpi-unreachable": "  BTLs attempted: self",
    "mpi-init": "It looks like orte_init failed for some reason; your parallel process is",
    "wrong-machine": "exec /usr/bin/python3: exec format error",
}


@pytest.mark.parametrize(("name", "text"), [*STUDY.items(), *ELSEWHERE.items()])
def test_each_error_of_the_study_and_its_kin_is_known(name, text):
    found = diagnose.explain(f"12:00 line before\n{text}\nline after")
    assert found.name == name
    assert found.what
    assert found.mend


def test_what_it_ended_with_counts_and_nothing_known_is_nothing():
    log = f"{STUDY['no-mpi']}\nretrying\n{STUDY['no-gpu']}\n"
    assert diagnose.explain(log).name == "no-gpu"
    assert [each.name for each in diagnose.explain_all(log)] == ["no-mpi", "no-gpu"]
    assert diagnose.explain("all is well") is None
    assert diagnose.explain("Triton only supports CUDA 10.0 or higher, but got CUDA version: 9.2") is None


def test_names_are_distinct():
    names = [each.name for each in diagnose.CATALOGUE]
    assert len(set(names)) == len(names)


def test_explain_error_reads_a_file_or_standard_input(tmp_path):
    (tmp_path / "log").write_text(STUDY["two-ucx"])
    done = spark_ray("explain-error", tmp_path / "log")
    assert done.returncode == 0
    assert "two builds of UCX met" in done.stdout
    assert "mend: " in done.stdout
    answer = CliRunner().invoke(cli.command, ["explain-error", "-"], input="nothing known")
    assert "no known error" in answer.output


# ---- pull -------------------------------------------------------------------------------------------------

REFERENCE = "nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc13"


class Engine:
    """A Docker client that has one image after a pull, and says what it was asked."""

    def __init__(self, said=(), error=None, digests=()):
        self.asked, self._said, self._error = [], said, error
        self.api = SimpleNamespace(pull=self._pull)
        found = SimpleNamespace(
            id="sha256:1", attrs={"Config": {}, "Size": 7 << 30, "RepoDigests": list(digests)}
        )
        self.images = SimpleNamespace(get=lambda _: found)

    def _pull(self, repository, **options):
        self.asked.append((repository, options["tag"]))
        if self._error:
            raise self._error
        yield from self._said

    def close(self):
        return


def test_without_a_yes_nothing_is_asked_of_anyone(monkeypatch):
    monkeypatch.setattr(image, "connect", lambda: pytest.fail("the engine was asked"))
    done = spark_ray("image", "pull", REFERENCE)  # standard input is no terminal
    assert done.returncode == 2
    assert "nvcr.io" in done.stderr
    assert "nothing was fetched" in done.stderr
    monkeypatch.setattr(cli_content.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("click.confirm", lambda *_, **__: False)
        assert cli.main(["image", "pull", REFERENCE]) == 0


def test_with_a_yes_it_is_fetched_and_its_digest_said(monkeypatch, capsys):
    said = [
        {"status": "Downloading", "id": "a", "progressDetail": {"current": 5}},
        {"status": "Downloading", "id": "b", "progressDetail": {"current": 7}},
        {"status": "Downloading", "id": "a", "progressDetail": {"current": 9}},
        {"status": "Extracting", "id": "a", "progressDetail": {"current": 1}},
    ]
    digest = f"nvcr.io/nvidia/tensorrt-llm/release@sha256:{'ab' * 32}"
    engine, heard = Engine(said, digests=[digest]), []
    assert image.pull(engine, REFERENCE, heard.append).digests == (digest,)
    assert engine.asked == [("nvcr.io/nvidia/tensorrt-llm/release", "1.3.0rc13")]
    assert heard == [5, 12, 16]
    monkeypatch.setattr(image, "connect", lambda: engine)
    assert cli.main(["image", "pull", "--yes", REFERENCE]) == 0
    assert f"digest  {digest}" in capsys.readouterr().out


def api_error(text):
    return docker.errors.APIError("500 Server Error", explanation=text)


@pytest.mark.parametrize(
    ("engine", "mend"),
    [
        (Engine(error=api_error("unauthorized: authentication required")), "docker login nvcr.io"),
        (Engine(error=api_error("dial tcp: lookup nvcr.io: no such host")), "look whether nvcr.io answers"),
        (Engine([{"error": "write /var/lib/docker: no space left on device"}]), "look whether"),
    ],
)
def test_a_pull_that_fails_says_why_and_what_mends_it(engine, mend):
    with pytest.raises(UnavailableError, match="could not be fetched") as caught:
        image.pull(engine, REFERENCE)
    assert caught.value.mend.startswith(mend)


@pytest.mark.parametrize(
    ("reference", "registry"),
    [("debian", "docker.io"), ("localhost:5000/a/b:1", "localhost:5000"), (REFERENCE, "nvcr.io")],
)
def test_the_registry_is_known_from_the_name(reference, registry):
    assert image.registry_of(reference) == registry


def test_no_name_of_an_image_is_an_error_in_words():
    with pytest.raises(InputError, match="cannot be an image"):
        image.registry_of("https://nvcr.io/x")


# ---- pin --------------------------------------------------------------------------------------------------


def test_only_a_digest_of_the_same_repository_pins():
    other, own = f"mirror.example/x@sha256:{'00' * 32}", f"debian@sha256:{'11' * 32}"
    assert image.pinned(Engine(digests=[other, own]), "docker.io/debian:12") == own
    with pytest.raises(UnavailableError, match="knows no digest of debian:12"):
        image.pinned(Engine(digests=[other]), "debian:12")


def test_a_file_that_is_not_there_is_no_image(tmp_path):
    with pytest.raises(InputError, match="there is no experiment"):
        pin.experiment_in(str(tmp_path / "typo.yaml"))
    assert pin.experiment_in("debian:12") is None


def test_the_file_of_an_experiment_keeps_all_but_the_name(tmp_path):
    text = f"# why\narms:\n  a: {{environment: {{kind: docker, image: {REFERENCE}, gpus: all}}}}\n  b:\n    environment:\n      image: '{REFERENCE}'  # as tested\n      other-image: {REFERENCE}x\n"
    path = tmp_path / "x.yaml"
    path.write_text(text)
    name = f"nvcr.io/nvidia/tensorrt-llm/release@sha256:{'ab' * 32}"
    pin.write(path, {REFERENCE: name})
    assert path.read_text() == text.replace(f"image: {REFERENCE},", f"image: {name},").replace(
        f"image: '{REFERENCE}'  #", f"image: {name}  #"
    )
    with pytest.raises(InputError, match="not written there word for word"):
        pin.write(path, {"debian:12": name})


@pytest.mark.docker
def test_an_experiment_without_an_image_has_nothing_to_pin_and_a_missing_one_names_the_pull(tmp_path):
    path = write_yaml(tmp_path, experiment_data())
    assert "no docker arm names an image" in spark_ray("image", "pin", path).stdout
    done = spark_ray("image", "pin", "nobody/nothing:0")
    assert done.returncode == 3
    assert "spark-ray image pull nobody/nothing:0" in done.stderr
    assert spark_ray("image", "pin", "--write", "nobody/nothing:0").returncode == 2
