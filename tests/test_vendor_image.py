"""A vendor's image, as chroot and as container, with nothing set by hand: its own libraries, variables, entrypoint and MPI.

The stand-in is made here: this interpreter, its own build of a library that the host has as well (same name, other
content), variables, an entrypoint that sets another one, and, where apt can fetch it, Debian's OpenMPI.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace

import docker
import pytest
import requests
import urllib3
from helpers import QUIET, experiment_data
from test_launch import Bench

from spark_ray import driver, image, rootfs, rootfs_check, rootfs_image
from spark_ray.errors import InputError, UnavailableError
from spark_ray.experiment import Experiment

VENDOR = "/opt/vendor"
ENTRYPOINT = f"""#!/bin/sh
echo 'a banner, as vendors print it'
export STANDIN_ENTRYPOINT=ran LD_LIBRARY_PATH={VENDOR}/lib:$LD_LIBRARY_PATH
exec "$@"
"""
NOT_NEEDED = shutil.ignore_patterns(
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "idlelib",
    "ensurepip",
    "config-*",
    "lib2to3",
    "tkinter",
)
MPI = """
import ctypes, os, sys
mpi = ctypes.CDLL("libmpi.so.40", mode=ctypes.RTLD_GLOBAL)
def handle(name):
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(mpi, name)))
mpi.MPI_Init(None, None)
"""
RANK = """
rank, size = ctypes.c_int(), ctypes.c_int()
mpi.MPI_Comm_rank(handle("ompi_mpi_comm_world"), ctypes.byref(rank))
mpi.MPI_Comm_size(handle("ompi_mpi_comm_world"), ctypes.byref(size))
place = next(line.split()[-1] for line in open("/proc/self/maps") if "libmpi.so" in line)
print(f"rank {rank.value} of {size.value} by {place}")
mpi.MPI_Finalize()
"""
SPAWN = """
other, size = ctypes.c_void_p(), ctypes.c_int()
if "child" in sys.argv:
    mpi.MPI_Comm_get_parent(ctypes.byref(other))
else:
    words = (ctypes.c_char_p * 4)(b"-c", b"import os; exec(os.environ['STANDIN_SPAWN'])", b"child", None)
    mpi.MPI_Comm_spawn(
        sys.executable.encode(), words, 1, handle("ompi_mpi_info_null"), 0, handle("ompi_mpi_comm_self"), ctypes.byref(other), None
    )
mpi.MPI_Comm_remote_size(other, ctypes.byref(size))
print("spawned" if "child" in sys.argv else "spawner", "sees", size.value, flush=True)
mpi.MPI_Comm_disconnect(ctypes.byref(other))
mpi.MPI_Finalize()
"""
"""As TensorRT-LLM does for its engine's process: started by no mpirun, a program asks MPI for another one."""
PROGRAM = f"""    settings = talk.engine
    import shutil, subprocess
    library = ctypes.CDLL("libz.so.1")
    library.zlibVersion.restype = ctypes.c_char_p
    print("library", library.zlibVersion().decode())
    if shutil.which("mpirun.openmpi"):
        os.environ["STANDIN_SPAWN"] = {MPI + SPAWN!r}
        two = ["mpirun.openmpi", "--oversubscribe", "-n", "2", sys.executable, "-c", {MPI + RANK!r}]
        for command in (two, [sys.executable, "-c", os.environ["STANDIN_SPAWN"]]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
            print(done.stdout, done.stderr, "status", done.returncode, sep="\\n")
"""


def own_build(target, label):
    """This host's libz with another version in it: the loader takes it for any other, and it says who it is."""
    found = next(path for name, path in driver.loader_cache() if name == "libz.so.1")
    data = Path(found).read_bytes()
    version = Path(found).resolve().name.partition(".so.")[2].encode()
    assert version in data
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(
        data.replace(version, b"1" + label.encode().ljust(len(version) - 1, b".")[: len(version) - 1])
    )


def stand_alone(tree, host):
    """The host tree with the interpreter and its standard library in it, instead of bound."""
    shutil.copytree(host.path, tree, symlinks=True, dirs_exist_ok=True)
    stdlib = Path(sysconfig.get_path("stdlib"))
    real = Path(os.path.realpath(sys.executable))
    shutil.copytree(stdlib, f"{tree}{stdlib}", symlinks=True, ignore=NOT_NEEDED, dirs_exist_ok=True)
    for path in (real, *real.parent.parent.glob("lib/libpython3*.so*")):
        place = Path(f"{tree}{path}")
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copy(path, place, follow_symlinks=False)
    return str(real)


def add_openmpi(tree, cache):
    """Unpack Debian's OpenMPI and what it needs; why not, where that cannot be had."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "partial").mkdir(exist_ok=True)
    command = [
        "apt-get", "install", "--download-only", "-qq", "-y", "--no-install-recommends", "-o", "Dir::State::status=/dev/null",
        "-o", f"Dir::Cache::archives={cache}", "-o", "APT::Sandbox::User=root", "openmpi-bin",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return f"apt-get: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
    for package in sorted(cache.glob("*.deb")):
        if package.name.startswith(("libc6_", "dpkg_", "perl", "libicu")):
            continue  # the tree has its own, or nothing of the test needs it
        out = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, timeout=600, check=True
        ).stdout
        into = ["tar", "-x", "--keep-directory-symlink", "-C", str(tree)]
        subprocess.run(into, input=out, timeout=600, check=True)
    return None


@pytest.fixture(scope="module")
def client():
    client = image.connect()
    yield client
    client.close()


@pytest.fixture(scope="module")
def vendor(client, cache, request, tmp_path_factory):
    """The image in the engine, and the tree extracted from it."""
    folder = tmp_path_factory.mktemp("vendor")
    tree = folder / "made"
    python = stand_alone(tree, rootfs.build_host(cache / "rootfs"))
    own_build(Path(f"{tree}{VENDOR}/lib/libz.so.1"), "vendor")
    script = Path(f"{tree}{VENDOR}/entrypoint.sh")
    script.write_text(ENTRYPOINT)
    script.chmod(0o755)
    Path(f"{tree}{VENDOR}/bin").mkdir()
    Path(f"{tree}{VENDOR}/bin/python3").symlink_to(python)
    no_mpi = request.config.lacks["mpi"] or add_openmpi(tree, cache / "openmpi")
    settings = [
        f"ENV PATH={VENDOR}/bin:/usr/bin:/bin",
        "ENV STANDIN_ENV=set",
        f'ENTRYPOINT ["{VENDOR}/entrypoint.sh"]',
    ]
    tag = f"spark-ray-test/vendor-{os.getpid()}"
    client.api.import_image_from_stream(image._tar(tree), repository=tag, tag="1", changes=settings)
    shutil.rmtree(tree)
    extracted = rootfs_image.extract(client, f"{tag}:1", folder / "tree")
    yield SimpleNamespace(reference=f"{tag}:1", tree=extracted, no_mpi=no_mpi)
    client.images.remove(f"{tag}:1")


def arms(vendor):
    data = experiment_data(arms=("native",) * 3)
    data["arms"] = {
        "chroot": {"environment": {"kind": "chroot", "rootfs": str(vendor.tree.path)}, "treatment": QUIET},
        "docker": {"environment": {"kind": "docker", "image": vendor.reference}, "treatment": QUIET},
        "native": {"environment": "native", "treatment": QUIET},
    }
    return data | {"contrast": {"baseline": "chroot", "against": "docker"}}


@pytest.fixture(scope="module")
def seen(vendor, tmp_path_factory):
    """What the stand-in's program found in each arm: the record, and its log."""
    folder = tmp_path_factory.mktemp("run")
    own_build(folder / "host/libz.so.1", "host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(folder / "host"))
        one = Bench(folder / "run", Experiment.model_validate(arms(vendor)))
        try:
            one.change_worker("engine_fake.py", "    settings = talk.engine\n", PROGRAM)
            records = {arm: one.run(arm) for arm in ("chroot", "docker", "native")}
        finally:
            one.close()
    found = {}
    for arm, record in records.items():
        log = one.store.attempt_folder(one.block.trial_id(arm), 1) / "worker.log"
        found[arm] = SimpleNamespace(
            record=record, log=log.read_text(), evidence=(record["result"] or {}).get("evidence")
        )
    return found


vendor_tests = [pytest.mark.process, pytest.mark.root, pytest.mark.docker]


class TestStandIn:
    pytestmark = vendor_tests

    @pytest.mark.parametrize("arm", ["chroot", "docker"])
    def test_the_images_own_library_is_loaded_and_natively_the_hosts(self, seen, arm):
        assert seen[arm].record["outcome"]["kind"] == "ok", seen[arm].record["outcome"]
        assert "library 1vend" in seen[arm].log
        assert f"{VENDOR}/lib/libz.so.1" in seen[arm].evidence["libraries"]
        assert "library 1host" in seen["native"].log
        assert f"{VENDOR}/lib/libz.so.1" not in seen["native"].evidence["libraries"]

    @pytest.mark.parametrize("arm", ["chroot", "docker"])
    def test_variables_and_entrypoint_are_the_images(self, seen, arm):
        variables = seen[arm].evidence["environment"]
        assert variables["STANDIN_ENV"] == "set"
        assert variables["STANDIN_ENTRYPOINT"] == "ran"
        assert variables["LD_LIBRARY_PATH"].split(":")[0] == f"{VENDOR}/lib"
        assert "a banner" in seen[arm].log
        assert "STANDIN_ENTRYPOINT" not in seen["native"].evidence["environment"]

    def test_both_say_that_they_hold_the_same_content(self, vendor, seen):
        chroot, docker = (seen[arm].record["content"] for arm in ("chroot", "docker"))
        assert chroot["image_id"] == docker["image_id"] == vendor.tree.image_id
        assert chroot["sha256"] == docker["sha256"] == vendor.tree.sha256
        assert seen["native"].record["content"]["image_id"] is None

    def test_shared_memory_is_of_a_real_size_and_names_are_the_hosts(self, seen):
        host = os.statvfs("/dev/shm")
        assert seen["chroot"].evidence["shm_bytes"] == host.f_blocks * host.f_frsize
        assert seen["docker"].evidence["shm_bytes"] == 64 << 20
        bound = {target for _, target, _ in seen["chroot"].record["content"]["mounts"]}
        assert bound == {
            name for name in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf") if Path(name).is_file()
        }

    def test_root_may_use_mpi_everywhere_alike(self, seen):
        for one in seen.values():
            assert one.evidence["environment"]["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"

    @pytest.mark.mpi
    @pytest.mark.parametrize("arm", ["chroot", "docker"])
    def test_its_own_mpi_starts_ranks_and_spawns_a_process(self, vendor, seen, arm):
        if vendor.no_mpi:
            pytest.skip(vendor.no_mpi)
        lines = seen[arm].log.splitlines()
        ranks = [line.rpartition(" by ") for line in lines if line.startswith("rank ")]
        assert sorted(rank for rank, _, _ in ranks) == ["rank 0 of 2", "rank 1 of 2"], seen[arm].log
        assert lines.count("spawner sees 1") == lines.count("spawned sees 1") == 1, seen[arm].log
        assert lines.count("0") == 2, seen[arm].log  # each command's status
        (place,) = {path for _, _, path in ranks}
        assert rootfs_check.inside(vendor.tree.path, place) is not None

    def test_an_image_made_here_has_no_digest_to_pin(self, client, vendor):
        with pytest.raises(UnavailableError, match="knows no digest") as caught:
            image.pinned(client, vendor.reference)
        assert "image pull" in caught.value.mend

    def test_a_known_error_is_explained_in_the_record(self, vendor, tmp_path):
        one = Bench(tmp_path / "run", Experiment.model_validate(arms(vendor)))
        error = "libmpi.so.40: cannot open shared object file: No such file or directory"
        one.change_worker(
            "engine_fake.py", "    settings = talk.engine\n", f"    raise ImportError({error!r})\n"
        )
        outcome = one.run("chroot")["outcome"]
        one.close()
        assert outcome["kind"] == "engine_error"
        assert outcome["message"].startswith(f"{error}: TensorRT-LLM is linked to OpenMPI")


# ---- the loader's cache -----------------------------------------------------------------------------------


@pytest.mark.root
def test_a_stale_or_missing_loader_cache_is_made_anew_and_a_good_one_is_left(tmp_path):
    tree = tmp_path / "tree"
    own_build(tree / "opt/vendor/registered/libz.so.1", "cached")
    (tree / "bin").mkdir()
    shutil.copy(os.path.realpath("/bin/sh"), tree / "bin/sh")
    (tree / "etc").mkdir()
    (tree / "etc/ld.so.conf").write_text("/opt/vendor/registered\n")
    assert rootfs_image.renew_loader_cache(tree) is True
    assert ("libz.so.1", "/opt/vendor/registered/libz.so.1") in driver.loader_cache(tree)
    assert not (tree / "var/cache/ldconfig/aux-cache").exists()
    before = (tree / "etc/ld.so.cache").read_bytes()
    assert rootfs_image.renew_loader_cache(tree) is False
    assert (tree / "etc/ld.so.cache").read_bytes() == before
    (tree / "opt/vendor/registered").rename(tree / "opt/vendor/moved")
    (tree / "etc/ld.so.conf").write_text("/opt/vendor/moved\n")
    assert rootfs_image.renew_loader_cache(tree) is True
    assert driver.loader_cache(tree) == [("libz.so.1", "/opt/vendor/moved/libz.so.1")]


def test_a_cache_of_another_machine_is_left(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").write_bytes(b"\x7fELF\x02\x01" + bytes(12) + b"\xb8\x0b")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.conf").write_text("/opt\n")
    assert rootfs_image.renew_loader_cache(tmp_path) is False
    assert not (tmp_path / "etc/ld.so.cache").exists()


def test_only_root_can_keep_the_owners(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnavailableError, match="needs root") as caught:
        rootfs_image.extract(None, "vendor/image", tmp_path / "tree")
    assert caught.value.mend.startswith("sudo ")


def test_what_a_killed_extraction_left_goes_and_nothing_else(tmp_path):
    left, living = tmp_path / ".tree.abcd_123", tmp_path / ".tree.efgh4567"
    others = [tmp_path / ".other.abcd1234", tmp_path / ".tree.more.abcd1234", tmp_path / "tree.abcd1234"]
    for folder in (left, living, *others):
        (folder / "etc").mkdir(parents=True)
        os.utime(folder, (0, 0))
    lock = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rootfs_image._remove_unfinished(tmp_path / "tree")
    finally:
        os.close(lock)
    assert set(tmp_path.iterdir()) == {living, *others}


@pytest.mark.parametrize(
    "error",
    [requests.ConnectionError("gone"), urllib3.exceptions.ProtocolError("cut"), docker.errors.DockerException("no"), tarfile.ReadError("end")],
)  # fmt: skip
def test_an_engine_that_goes_away_is_said_in_words(error):
    with pytest.raises(UnavailableError, match="fetching it failed") as caught, image.in_words("fetching it"):
        raise error
    assert caught.value.mend


def test_no_room_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"unpacked, and .* free"):
        rootfs_image._room(tmp_path / "new", 1 << 60)
