"""Real guests with the fake engine: every way they can end, in every environment, and what is left afterwards."""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from helpers import QUIET, experiment, experiment_data, guests_of, wait_until

from spark_ray import attend, guest, host, image, launch
from spark_ray.errors import UnavailableError
from spark_ray.execute import SlotRunner
from spark_ray.experiment import Experiment
from spark_ray.plan import make_block
from spark_ray.store import RECORD, Store, copy_bundle, read_record
from spark_ray.worker import protocol, tensorrt_llm_api

pytestmark = [pytest.mark.process, pytest.mark.machine]  # out-of-memory kills are counted for all
WORKER = Path(protocol.__file__).parent
ENVIRONMENTS = [
    "native",
    pytest.param("chroot", marks=pytest.mark.root),
    pytest.param("docker", marks=pytest.mark.docker),
]


class Bench:
    """One run folder with one slot, and blocks on demand."""

    def __init__(self, folder, made):
        self.experiment = made
        self.store = Store.create(folder, {}, {})
        copy_bundle(WORKER, folder / "bundle" / protocol.PACKAGE)
        self.runner = SlotRunner(folder, made, list(made.arms), "slot")
        self.block = make_block(
            0, 0, {"max_batch_size": 4, "max_num_tokens": 512, "memory_fraction": 0.25}, 0, list(made.arms), 0
        )

    def run(self, arm="a", attempt=1):
        self.runner.run(self.block, arm, attempt)
        return read_record(self.store.attempt_folder(self.block.trial_id(arm), attempt) / RECORD)

    def change_worker(self, module, old, new):
        """Change the run's own copy of the worker, as if it had been begun with that."""
        path = self.store.folder / "bundle" / protocol.PACKAGE / module
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        self.runner._bundle_sha256 = protocol.package_sha256(path.parent)

    def close(self):
        self.runner.close()
        self.store.close()


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(first="native", **options):
        made.append(Bench(tmp_path / f"run{len(made)}", experiment(arms=(first, "native"), **options)))
        return made[-1]

    yield make
    for one in made:
        one.close()
        assert guests_of(one.store.folder) == []
        assert one.store.folder.name not in Path("/proc/self/mountinfo").read_text()


def containers(folder):
    client = image.connect()
    try:
        return client.containers.list(all=True, filters={"label": f"spark_ray.run={folder}"})
    finally:
        client.close()


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_trial_is_measured_where_it_says(bench, environment):
    one = bench(environment)
    record = one.run()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    inside, outside = record["result"]["evidence"], record["host"]["outside"]
    assert inside["root"] == outside["root"]
    own_root = outside["root"] == outside["host"]["root"]
    assert own_root == (environment == "native")
    assert (outside["namespaces"]["pid"] != outside["host"]["namespaces"]["pid"]) == (environment == "docker")
    if environment == "docker":
        assert any(outside["container_id"] in line for line in outside["cgroup"])
        assert containers(one.store.folder) == []
    assert inside["bundle_sha256"] == record["bundle_sha256"]
    assert [o["phase"] for o in record["inside"]] == ["after_load", "sizing", "end"]
    assert [o["phase"] for o in record["host"]["observations"]] == [
        "before_launch",
        "after_load",
        "sizing",
        "end",
        "after_exit",
    ]
    assert record["result"]["measurements"]["engine"]["fake"] is True
    kv = record["result"]["measurements"]["kv_cache"]
    assert kv["bytes"] == (1 << 28) // (64 * 8192) * 64 * 8192


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize(
    ("behaviour", "kind", "reason"),
    [
        ("segfault", "crashed", "SIGSEGV"),
        ("exit", "crashed", "exit_3"),
        ("raise", "engine_error", "RuntimeError"),
        ("infeasible", "infeasible", "told_so"),
        ("garbage", "engine_error", "no_capacity"),
        ("hang", "timeout", "trial_timeout"),
        ("stop", "timeout", "trial_timeout"),
    ],
)
def test_each_bad_end_has_its_outcome_and_leaves_nothing(bench, environment, behaviour, kind, reason):
    one = bench(
        environment, behaviour=behaviour, limits={"trial_timeout": "1500ms"} if kind == "timeout" else None
    )
    record = one.run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == (kind, reason)
    assert [o["phase"] for o in record["inside"]][:1] == ["after_load"], "what a dying worker saw is kept"
    assert guests_of(one.store.folder) == []
    if environment == "docker":
        assert containers(one.store.folder) == []
    if behaviour == "raise":
        assert "told to fail" in record["result"]["failure"]["traceback"]


@pytest.mark.docker
def test_a_container_out_of_memory_is_an_answer(tmp_path):
    data = experiment_data(arms=("native", "native"), allocate="256MiB")
    data["arms"]["a"]["environment"] = {"kind": "docker", "memory": "64MiB"}
    one = Bench(tmp_path / "run", Experiment.model_validate(data))
    record = one.run()
    one.close()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("out_of_memory", "kernel_oom_kill")
    assert record["host"]["end"]["oom_killed"] is True
    assert record["host"]["exit_code"] == 137
    assert containers(one.store.folder) == []


@pytest.mark.docker
def test_a_flag_the_engine_refuses_is_a_named_problem_before_any_trial(tmp_path):
    data = experiment_data()
    data["arms"]["a"]["environment"] = {"kind": "docker", "cpuset_cpus": "4000"}
    made = Experiment.model_validate(data)
    Store.create(tmp_path / "run", {}, {}, worker=WORKER).close()
    with pytest.raises(UnavailableError, match=r"refuses cpuset_cpus: .*4000"):
        SlotRunner(tmp_path / "run", made, list(made.arms), "slot")
    assert not list((tmp_path / "run" / "trials").iterdir())


@pytest.mark.docker
def test_a_flag_the_engine_refuses_is_an_outcome_with_its_words(tmp_path, monkeypatch):
    data = experiment_data()
    data["arms"]["a"]["environment"] = {"kind": "docker", "cpuset_cpus": "4000"}
    monkeypatch.setattr(image, "try_flag", lambda *_: None)  # as if the daemon had changed its mind since
    one = Bench(tmp_path / "run", Experiment.model_validate(data))
    record = one.run()
    one.close()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("crashed", "start_refused")
    assert "4000" in record["outcome"]["message"]
    assert containers(one.store.folder) == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_kill_from_outside_is_disturbed_not_an_answer(bench, environment):
    one = bench(environment, hold="20s")

    def kill():
        assert wait_until(lambda: len(guests_of(one.store.folder)) >= 2)
        os.kill(max(guests_of(one.store.folder)), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    record = one.run()
    killer.join()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("disturbed", "killed_from_outside")


def test_a_stopped_slot_interrupts_its_guest(bench):
    one = bench(hold="30s")
    threading.Timer(0.5, one.runner.stop).start()
    record = one.run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("disturbed", "interrupted")
    assert record["host"]["duration_s"] < 20


def test_a_changed_worker_is_a_wrong_environment(bench):
    one = bench()
    engine = one.store.folder / "bundle" / protocol.PACKAGE / "engine_fake.py"
    engine.write_text(engine.read_text() + "\n# changed after the run began\n")
    record = one.run()
    assert record["outcome"]["kind"] == "wrong_environment"
    assert "differ from the run's bundle" in record["outcome"]["message"]


@pytest.mark.root
def test_a_native_label_on_a_chroot_is_found_out(bench, monkeypatch):
    """The label says native; the process runs in the rootfs."""
    from spark_ray.environments import chroot, native

    one = bench("chroot")
    monkeypatch.setattr(chroot, "contradictions", native.contradictions)
    record = one.run()
    assert record["outcome"]["kind"] == "wrong_environment"
    assert "root is" in record["outcome"]["message"]


def test_memory_that_does_not_come_back_is_not_measured_and_disturbs_once(bench):
    one = bench(limits={"memory_wait": "200ms"})
    one.runner._launcher._level = level = host.Level(1 << 30)
    level.wanted_bytes = 1 << 60
    record = one.run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("disturbed", "not_reached")
    assert record["result"] is None
    assert one.run(attempt=2)["outcome"]["kind"] == "ok"


def warm(folder, environment="native", **engine):
    data = experiment_data(arms=(environment, "native"), **engine)
    data["arms"]["a"]["treatment"] = {**QUIET, "compile_cache": "warm"}
    return Bench(folder, Experiment.model_validate(data))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_warm_compile_cache_is_filled_by_one_execution_that_is_not_measured(tmp_path, environment):
    one = warm(tmp_path / "run", environment)
    try:
        compiled = "    import os; open(os.environ['TRITON_CACHE_DIR'] + f'-{time.monotonic_ns()}', 'w').write('kernel')\n"
        phase = '    talk.phase("after_load")\n'
        one.change_worker("engine_fake.py", phase, compiled + phase)
        first, second = one.run(), one.run(attempt=2)
    finally:
        one.close()
    assert [each["outcome"]["kind"] for each in (first, second)] == ["ok", "ok"], first["outcome"]
    assert first["host"]["warming"]["exit_code"] == 0
    assert first["host"]["warming"]["failure"] is None
    assert second["host"]["warming"] is None
    assert first["host"]["treatment"]["compile_cache_files"] == 1, "the kernel of the execution before"
    assert second["host"]["treatment"]["compile_cache_files"] == 2
    assert all(each["host"]["at_sizing"]["compile_cache_warm"] for each in (first, second))
    attempts = one.store.attempt_folder(first["trial_id"], 1)
    assert (attempts / "warming" / "result.json").exists()
    assert not (attempts / "warming" / RECORD).exists(), "it is no attempt"


def test_an_execution_to_warm_up_that_fails_is_noted_and_not_repeated(tmp_path):
    one = warm(tmp_path / "run", behaviour="raise")
    first, second = one.run(), one.run(attempt=2)
    one.close()
    assert "told to fail" in first["host"]["warming"]["failure"]
    assert first["outcome"]["reason"] == "RuntimeError"
    assert second["host"]["warming"] is None


def test_the_host_settles_what_must_hold_when_the_engine_reads(bench, monkeypatch):
    """The worker asks before it observes: the host answers when it has acted, and reads the state back after that."""
    one = bench()
    order = []
    treater = one.runner._treater
    for name in ("settle", "at_sizing"):
        act = getattr(treater, name)
        monkeypatch.setattr(
            treater, name, lambda *a, name=name, act=act, **k: (order.append(name), act(*a, **k))[1]
        )
    record = one.run()
    assert record["outcome"]["kind"] == "ok"
    assert order[0] == "settle"
    assert "at_sizing" in order
    assert record["host"]["at_sizing"]["mapped_file_bytes"] > 0


def test_a_record_has_a_ledger_at_each_phase_and_what_the_orchestrator_held(bench):
    host = bench().run()["host"]
    assert [each["phase"] for each in host["ledger"]] == [each["phase"] for each in host["observations"]]
    assert all(host["orchestrator"][side]["spark_ray"]["processes"] >= 2 for side in ("before", "after")), (
        "this process and the watchdog"
    )
    assert host["back"]["reached"] is True
    assert host["watchdog"]["looks"] > 0
    assert host["watchdog"]["fired"] is None


def test_a_worker_the_host_never_saw_is_not_believed(bench, monkeypatch):
    from spark_ray.guest import ProcessGuest

    def gone(*_):
        raise ProcessLookupError

    monkeypatch.setattr(ProcessGuest, "pid_of", gone)
    record = bench().run()
    assert record["outcome"]["kind"] == "wrong_environment"
    assert "could not look" in record["outcome"]["message"]


def test_nonsense_on_the_control_channel_is_only_noise(bench):
    one = bench()
    shout = "        os.write(self._control, b'banner\\n@spark_ray\\n@spark_ray ready\\n@spark_ray ready x\\n@spark_ray phase\\n')\n"
    write = '        os.write(self._control, (" "'
    one.change_worker("session.py", write, shout + write)
    record = one.run()
    assert record["outcome"]["kind"] == "ok", record["outcome"]
    assert "banner" in (one.store.attempt_folder(record["trial_id"], 1) / "worker.log").read_text()


@pytest.mark.docker
def test_a_daemon_that_went_away_disturbs_and_does_not_answer_for_the_engine(bench, monkeypatch):
    import requests

    one = bench("docker")

    def unreachable(*_args, **_options):
        raise requests.exceptions.ConnectionError("the daemon is gone")

    monkeypatch.setattr(one.runner._client.api, "create_container", unreachable)
    record = one.run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("disturbed", "environment_gone")


@pytest.mark.docker
def test_a_daemon_that_goes_away_before_the_host_has_looked_disturbs(bench, monkeypatch):
    """The worker ends well all the same; where it ran nobody can say, so it is neither believed nor called wrong."""
    import requests

    one = bench("docker")
    inspect = one.runner._client.api.inspect_container
    calls = []

    def away_at_first(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise requests.exceptions.ConnectionError("the daemon is gone")
        return inspect(*args, **options)

    monkeypatch.setattr(one.runner._client.api, "inspect_container", away_at_first)
    record = one.run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("disturbed", "environment_gone")
    assert record["result"] is not None


@pytest.mark.parametrize("left", ["result", "nothing"])
def test_a_guest_that_said_everything_and_does_not_end_is_killed_and_believed(bench, monkeypatch, left):
    """The engine's processes are taken down after the last word, and 100 GiB take their time."""
    monkeypatch.setattr(guest, "PATIENCE_S", (1, 30))
    one = bench(behaviour="exit" if left == "nothing" else "ok")
    once = "    status = _wait(worker, 0)\n"
    one.change_worker("supervise.py", once, once + "    import time; time.sleep(1000)\n")
    record = one.run()
    outcome = (record["outcome"]["kind"], record["outcome"]["reason"])
    assert outcome == (("ok", "measured") if left == "result" else ("crashed", "did_not_end"))
    assert (record["host"]["end"]["killed_by_host"], record["host"]["exit_code"]) == (True, 137)


def test_the_host_waits_as_long_as_a_worker_may_take_to_end_its_engine():
    assert guest.PATIENCE_S[0] >= tensorrt_llm_api.SHUTDOWN_S


def test_what_leaves_the_session_goes_at_the_deadline(bench):
    one = bench(behaviour="hang", limits={"trial_timeout": "1200ms"})
    spawn = "    import subprocess; subprocess.Popen(['sh', '-c', 'setsid sleep 1000 & wait'], start_new_session=True, env={'SPARK_RAY_TRIAL': str(talk.folder), 'PATH': '/usr/bin:/bin'})\n"
    phase = '    talk.phase("after_load")\n'
    one.change_worker("engine_fake.py", phase, spawn + phase)
    assert one.run()["outcome"]["kind"] == "timeout"
    assert guests_of(one.store.folder) == []


def test_compute_processes_of_the_guest_are_marked():
    class Gpus:
        def read(self):
            mine, other = child.pid, os.getppid()
            pids = [{"pid": mine, "used_bytes": 5}, {"pid": other, "used_bytes": 7}]
            return [{"device": 0, "processes": pids}, {"device": 1}]

    with subprocess.Popen(["sleep", "60"]) as child:
        seen = attend.look("sizing", Gpus(), os.getpid(), os.getpid())
        before = attend.look("before_launch", Gpus())
        child.kill()
    assert seen["gpus"][0]["processes"] == [
        {"pid": child.pid, "used_bytes": 5, "own": True},
        {"pid": os.getppid(), "used_bytes": 7},
    ]
    assert "own" not in before["gpus"][0]["processes"][0]


def test_the_watchdog_ends_the_guest(bench):
    one = bench(hold="30s", limits={"watchdog": "4096GiB"})
    record = one.run()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("host_wedged", "watchdog")


def test_grandchildren_do_not_outlive_the_worker(bench):
    one = bench()
    spawn = "    import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True, env={'SPARK_RAY_TRIAL': str(talk.folder)})\n"
    phase = '    talk.phase("after_load")\n'
    one.change_worker("engine_fake.py", phase, spawn + phase)
    assert one.run()["outcome"]["kind"] == "ok"
    assert guests_of(one.store.folder) == []


@pytest.mark.parametrize(
    "mutation", ["missing field", "other attempt", "not json", "other version", "list", "unknown failure"]
)
def test_a_broken_result_is_never_ok(bench, mutation):
    one = bench()
    engine = one.store.folder / "bundle" / protocol.PACKAGE / "__main__.py"
    change = {
        "missing field": "data.pop('evidence')",
        "other attempt": "data['attempt'] = 99",
        "not json": "data = 'x'; (folder / 'result.json').write_text('{'); os._exit(0)",
        "other version": "data['protocol_version'] = 99",
        "list": "data = []",
        "unknown failure": "data['failure'] = {'kind': 'fine', 'reason': '', 'message': ''}",
    }[mutation]
    text = engine.read_text()
    assert '    protocol.write_json(\n        folder / "result.json",\n        {' in text
    text = text.replace(
        '    protocol.write_json(\n        folder / "result.json",\n        {', "    data = (\n        {"
    ).replace(
        '            "observer": {"clock": "CLOCK_MONOTONIC"},\n        },\n    )',
        f'            "observer": {{"clock": "CLOCK_MONOTONIC"}},\n        }}\n    )\n    {change}\n    protocol.write_json(folder / "result.json", data)',
    )
    engine.write_text(text)
    one.runner._bundle_sha256 = protocol.package_sha256(engine.parent)
    record = one.run()
    assert record["outcome"]["kind"] == "crashed", record["outcome"]
    assert record["outcome"]["reason"] == "no_result"


def test_the_worker_runs_on_a_bare_interpreter(tmp_path):
    """`python -S`: no site-packages, nothing but the standard library."""
    import subprocess
    import sys

    copy_bundle(WORKER, tmp_path / "bundle" / protocol.PACKAGE)
    folder = tmp_path / "attempt"
    folder.mkdir()
    request = dict.fromkeys(protocol.REQUEST_FIELDS) | {
        "protocol_version": protocol.PROTOCOL_VERSION, "trial_id": "t", "attempt": 1, "arm": "a",
        "engine": {"kind": "fake", "behaviour": "ok", "kv_cache": 1 << 30}, "configuration": {"memory_fraction": 0.5},
    }  # fmt: skip
    protocol.write_json(folder / "request.json", request)
    process = subprocess.Popen(
        [sys.executable, "-S", "-m", protocol.PACKAGE, str(folder)], env={"PYTHONPATH": str(tmp_path / "bundle")},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    with process:
        for _ in process.stdout:
            process.stdin.write(b"go\n")
        assert process.wait(timeout=600) == 0, (folder / "worker.log").read_text()
    assert json.loads((folder / "result.json").read_text())["failure"] is None


def test_a_worker_whose_host_never_answers_ends_when_its_input_closes(tmp_path):
    import subprocess
    import sys

    copy_bundle(WORKER, tmp_path / "bundle" / protocol.PACKAGE)
    request = dict.fromkeys(protocol.REQUEST_FIELDS) | {"protocol_version": 1, "engine": {"kind": "fake"}}
    protocol.write_json(tmp_path / "request.json", request)
    process = subprocess.Popen(
        [sys.executable, "-m", "spark_ray_worker", str(tmp_path)], env={"PYTHONPATH": str(tmp_path / "bundle")},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert b"ready" in process.stdout.readline()
    process.stdin.close()
    assert process.wait(timeout=10) == 129
    process.stdout.close()
    assert not (tmp_path / "result.json").exists()


@pytest.mark.docker
@pytest.mark.embedded
def test_the_real_engine_out_of_memory_is_an_answer(tmp_path):
    """Loading the libraries alone needs more than 192 MiB: the kernel ends it, and the record says so."""
    data = experiment_data()
    data["engine"] = {"kind": "embedded", "memory_view": "cgroup"}
    data["model"] = {"random_llama": {"layers": 2}}
    data["arms"]["a"]["environment"] = {"kind": "docker", "memory": "192MiB"}
    one = Bench(tmp_path / "run", Experiment.model_validate(data))
    record = one.run()
    one.close()
    assert (record["outcome"]["kind"], record["outcome"]["reason"]) == ("out_of_memory", "kernel_oom_kill")
    assert record["host"]["end"]["oom_killed"] is True


def test_memory_that_is_late_is_waited_for_and_what_came_to_stay_disturbs_once(monkeypatch):
    present = [100]
    monkeypatch.setattr(host, "releasable_bytes", lambda: present[0])
    level = host.Level(10)

    def reached():
        return level.wait(0.0, lambda: False).reached

    assert reached()
    level.expect_this()
    present[0] = 40
    assert not reached()
    present[0] = 60  # it is coming back: nobody begins in between
    assert not reached()
    present[0] = 95
    assert reached()
    level.expect_this()
    present[0] = 40
    assert not reached()
    assert reached(), "nothing came back while it was waited for as long again"
    level.expect_this()
    assert level.wanted_bytes == 30


def test_secrets_of_an_image_are_in_no_record():
    told = {
        "variables": {"HF_TOKEN": "hidden", "PATH": "/bin"},
        "argv": ["podman", "--env=NGC_API_KEY=hidden", "--env=HOME=/x", "--max_num_tokens=4096"],
        "nested": [{"environment": {"PASSWORD": "hidden"}}],
        "tokens_per_block": 32,
    }
    shown = launch._without_secrets(told)
    assert "hidden" not in json.dumps(shown)
    assert shown["variables"]["PATH"] == "/bin"
    assert shown["argv"][2:] == told["argv"][2:]
    assert shown["tokens_per_block"] == 32
