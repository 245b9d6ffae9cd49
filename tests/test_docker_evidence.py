"""What contradicts a docker arm: each namespace must be the host's or the container's own, as its flags say."""

import pytest

from spark_ray.environment_spec import DockerEnvironment
from spark_ray.environments import docker

ID = "c" * 64
OWN = {"ipc": "i2", "mnt": "m2", "net": "n2", "pid": "p2"}
OUTSIDE = {
    "container_id": ID, "cgroup": [f"5:memory:/docker/{ID}"], "root": "0:50:1",
    "host": {"root": "8:1:2", "namespaces": {"ipc": "i1", "mnt": "m1", "net": "n1", "pid": "p1"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "seen", "said"),
    [
        ({}, {}, []),
        ({}, {"net": "n1"}, ["the net namespace is the host's own"]),
        ({"network": "host"}, {"net": "n1"}, []),
        ({"network": "host"}, {}, ["the net namespace is not the host's own"]),
        ({"ipc": "host"}, {}, ["the ipc namespace is not the host's own"]),
        ({"ipc": "host", "pid": "host"}, {"ipc": "i1", "pid": "p1"}, []),
        ({"pid": "host"}, {"mnt": "m1"}, ["the mnt namespace is the host's own", "the pid namespace is not the host's own"]),
    ],
)  # fmt: skip
def test_each_flag_shows_in_its_namespace(keys, seen, said):
    outside = OUTSIDE | {"namespaces": OWN | seen}
    assert docker.contradictions(DockerEnvironment(kind="docker", **keys), None, {}, outside) == said


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({}, []),  # could not be read
        ({"group_limit_bytes": 1 << 30}, []),
        ({"group_limit_bytes": None}, ["the limit of the memory cgroup is None, not 1073741824"]),
        ({"group_limit_bytes": 1 << 31}, ["the limit of the memory cgroup is 2147483648, not 1073741824"]),
    ],
)
def test_a_limit_that_the_daemon_did_not_set_is_found_out(limit, said):
    outside = OUTSIDE | {"namespaces": OWN} | limit
    limited = DockerEnvironment(kind="docker", memory="1GiB")
    assert docker.contradictions(limited, None, {}, outside) == said
    assert docker.contradictions(DockerEnvironment(kind="docker"), None, {}, outside) == []


def test_a_group_must_name_it_and_its_root_is_not_the_hosts():
    outside = OUTSIDE | {"namespaces": OWN, "cgroup": ["5:memory:/user.slice"], "root": "8:1:2"}
    assert docker.contradictions(DockerEnvironment(kind="docker"), None, {}, outside) == [
        f"no cgroup of the process names container {ID[:12]}",
        "root is the host's own",
    ]
