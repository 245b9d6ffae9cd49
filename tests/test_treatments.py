"""Treatments: what this user can have of one, what is really done on the host, and whether it held at the sizing moment."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import experiment_data, wait_until
from hypothesis import given
from hypothesis import strategies as st
from test_launch import ENVIRONMENTS, Bench

from spark_ray import ballast, compile_cache, page_cache, reap, record, treatments
from spark_ray.ballast import Ballast
from spark_ray.cluster import one_local_node
from spark_ray.conditions import Fill, Limits, Share, Treatment
from spark_ray.environments import Content, Site, chroot, compile_cache_variables, docker, native
from spark_ray.errors import RunError, UnavailableError
from spark_ray.experiment import Experiment
from spark_ray.preview import preview, probe
from spark_ray.rootact import RootActs
from spark_ray.store import Store
from spark_ray.treatments import Treatments
from spark_ray.units import GIB, MIB
from spark_ray.worker import observe

KEPT = {"page_cache": "keep", "per_cpu_pages": "as_is"}
HELD = {"per_cpu_free_bytes": 8 * MIB, "per_cpu_allowed_bytes": 100 * MIB}


def asked(**keys):
    """An effective treatment, with nothing done that is not named."""
    return treatments.effective(Treatment.model_validate(KEPT | keys), True)[0]


# ---- as data ----------------------------------------------------------------------------------------------

sizes = st.integers(1, 1 << 40)
TREATMENTS = st.builds(
    Treatment.model_construct,
    page_cache=st.one_of(
        st.none(), st.sampled_from(["drop", "keep", "advise"]), st.builds(Fill.model_construct, fill=sizes)
    ),
    per_cpu_pages=st.sampled_from([None, "as_is", "drained"]),
    compile_cache=st.sampled_from(["cold", "warm"]),
    swap=st.sampled_from(["as_is", "require_off"]),
    ballast=st.one_of(st.none(), sizes, st.builds(Share.model_construct, share=st.floats(0.001, 0.999))),
)


@given(TREATMENTS, st.booleans())
def test_an_effective_treatment_has_every_key_and_fits_the_record(treatment, root):
    state, warnings = treatments.effective(treatment, root)
    assert set(state) == set(Treatment.model_fields)
    record.Treatment.model_validate(state, strict=True)
    chosen = [name for name in ("page_cache", "per_cpu_pages") if getattr(treatment, name) is None]
    assert len(warnings) == (0 if root else len(chosen))
    for name in {"compile_cache", "swap", "per_cpu_pages"} - set(chosen):
        assert state[name] == getattr(treatment, name)


@given(TREATMENTS)
def test_the_words_of_a_treatment_name_what_is_asked_for(treatment):
    said = treatments.words(treatments.effective(treatment, True)[0])
    assert ("warm" in said) == (treatment.compile_cache == "warm")
    assert ("swap" in said) == (treatment.swap == "require_off")
    assert ("ballast" in said) == (treatment.ballast is not None)
    assert ("fill" in said) == isinstance(treatment.page_cache, Fill)


@given(TREATMENTS)
def test_only_what_is_named_can_be_missing(treatment):
    assert treatments.missing(treatment, root_acts=True) is None
    lacks = treatments.missing(treatment, root_acts=False) or ""
    assert ("page_cache: drop" in lacks) == (treatment.page_cache == "drop")
    assert ("per_cpu_pages: drained" in lacks) == (treatment.per_cpu_pages == "drained")


@given(st.integers(0, 1 << 40), st.floats(0.001, 0.999))
def test_a_share_is_of_what_is_free(free, share):
    assert ballast.size_of({"size_bytes": 7}, free) == 7
    assert 0 <= free * share - ballast.size_of({"share": share}, free) < 1


@pytest.mark.parametrize(
    ("keys", "seen", "words"),
    [
        ({"page_cache": {"fill": "100MiB"}}, {"fill_resident_bytes": 99 * MIB}, None),
        ({"page_cache": {"fill": "100MiB"}}, {"fill_resident_bytes": 97 * MIB}, "page cache fill"),
        ({"page_cache": {"fill": "100MiB"}}, {}, "page cache fill: 0 of"),
        ({"page_cache": "drop"}, {"unexplained_cache_bytes": 2 * GIB}, None),
        ({"page_cache": "drop"}, {"unexplained_cache_bytes": 2 * GIB + 1}, "2.00 GiB came from elsewhere"),
        ({"page_cache": "keep"}, {"unexplained_cache_bytes": 9 * GIB}, None),
        ({"per_cpu_pages": "drained"}, HELD, None),
        ({"per_cpu_pages": "drained"}, HELD | {"per_cpu_free_bytes": 101 * MIB}, "101.00 MiB waited there"),
        ({"per_cpu_pages": "drained"}, HELD | {"drain_error": "it broke"}, "drained at the sizing moment: it broke"),
        ({"compile_cache": "warm"}, {"compile_cache_warm": True}, None),
        ({"compile_cache": "warm"}, {"compile_cache_warm": False}, "compile cache"),
        ({"swap": "require_off"}, {"swap_total_bytes": 0}, None),
        ({"swap": "require_off"}, {"swap_total_bytes": GIB}, "1.00 GiB of swap space"),
        ({"ballast": "1GiB"}, {"ballast_bytes": GIB, "ballast_resident_bytes": GIB}, None),
        ({"ballast": "1GiB"}, {"ballast_bytes": GIB, "ballast_resident_bytes": GIB - 6 * MIB}, "ballast: "),
        ({"ballast": "1GiB"}, {}, "ballast: "),
    ],
)  # fmt: skip
def test_what_did_not_hold_is_said(keys, seen, words):
    treatment = asked(**keys)
    found = treatments.not_held(treatment, seen, Limits())
    assert words in found if words else found is None
    assert treatments.not_held(treatment, None, Limits()) is None, "a worker that never got there"


def test_all_that_did_not_hold_is_said_at_once():
    found = treatments.not_held(asked(swap="require_off", ballast="1GiB"), {"swap_total_bytes": 1}, Limits())
    assert "swap: " in found
    assert "ballast: " in found


def planned(monkeypatch, **treatment):
    """The plan's problems of an arm with a treatment, on a host with 8 GiB and 1 GiB of swap."""
    info = {"MemTotal": 8 * GIB, "MemFree": 8 * GIB, "SwapTotal": GIB}
    monkeypatch.setattr(observe, "meminfo", lambda: info)
    data = experiment_data()
    data["arms"]["a"]["treatment"] = KEPT | treatment
    experiment = Experiment.model_validate(data)
    return [str(each) for each in preview(experiment, one_local_node(), probe(experiment)).arms[0].problems]


def test_the_plan_says_what_this_host_cannot_have(monkeypatch):
    assert planned(monkeypatch) == []
    (swap,) = planned(monkeypatch, swap="require_off")
    assert "1.00 GiB of swap space (mend: swapoff -a" in swap
    assert planned(monkeypatch, ballast="7GiB") == []
    (large,) = planned(monkeypatch, ballast="7.5GiB")
    assert "more than this host's memory" in large
    assert planned(monkeypatch, ballast={"share": 0.8}) == []
    assert len(planned(monkeypatch, ballast={"share": 0.9}, swap="require_off")) == 2


def test_a_compile_cache_is_given_alike_in_every_environment(tmp_path):
    site = Site(
        attempt=tmp_path, bundle=tmp_path, model=None, content=Content("python3", {"TRITON_CACHE_DIR": "/image"}, root="/tree"),
        label="t/1", run_label="/run", uid=0, gid=0, compile_cache=tmp_path / "kernels",
    )  # fmt: skip
    spec = Experiment.model_validate(experiment_data(arms=("native", "chroot", "docker"))).arms
    inside = compile_cache_variables("/spark_ray/cache")
    outside = compile_cache_variables(str(tmp_path / "kernels"))
    assert native.start(spec["a"].environment, site).variables.items() >= outside.items()
    entered = chroot.start(spec["b"].environment, site).enter
    assert entered["env"].items() >= inside.items()
    bound = {"source": str(tmp_path / "kernels"), "target": "/spark_ray/cache", "read_only": False}
    assert bound in entered["mounts"]
    made = docker.start(spec["c"].environment, site).container
    assert made["environment"].items() >= inside.items()
    assert f"{tmp_path}/kernels:/spark_ray/cache:rw" in made["host_config"]["binds"]


# ---- compiled kernels -------------------------------------------------------------------------------------


def made(tmp_path, known=(), acts=None):
    return Treatments(acts or RootActs(), tmp_path / "run" / "scratch" / "slot", list(known))


@pytest.fixture
def treater(tmp_path):
    one = made(tmp_path)
    yield one
    one.close()
    assert not list((tmp_path / "run").rglob("*.bin")), "closing leaves nothing"
    assert one.children() == []


def test_a_cold_cache_is_empty_at_every_start(treater):
    state = asked()
    for _ in range(2):
        done = treater.apply(state, arm="a", configuration={"x": 1})
        assert (done["compile_cache_files"], done["compile_cache_warm"]) == (0, False)
        assert not treater.needs_warming(state, "a", {"x": 1})
        folder = treater.compile_cache(state, "a", {"x": 1})
        (folder / "deep").mkdir(mode=0o500)
        (folder / "kernel.bin").write_bytes(bytes(1000))
        (folder / "link").symlink_to("/etc/passwd")
        seen = treater.at_sizing()
        assert (seen["compile_cache_files"], seen["compile_cache_bytes"]) == (1, 1000)
        assert treatments.not_held(state, seen) is None
        treater.undo()


def test_a_warm_cache_is_one_of_the_configuration_that_was_warmed(treater):
    state, first, second = asked(compile_cache="warm"), {"x": 1, "y": 2}, {"x": 2, "y": 2}
    assert treater.needs_warming(state, "a", first)
    treater.apply(state, arm="a", configuration=first)
    (treater.compile_cache(state, "a", first) / "half.bin").write_bytes(b"1")
    assert "compile cache" in treatments.not_held(state, treater.at_sizing()), "nothing has warmed it"
    treater.undo()
    done = treater.apply(state, arm="a", configuration=first)  # that execution did not end by itself
    assert done["compile_cache_files"] == 0
    (treater.compile_cache(state, "a", first) / "whole.bin").write_bytes(b"123")
    treater.undo()
    treater.warmed("a", first, {"outcome": "ok"})
    assert not treater.needs_warming(state, "a", {"y": 2, "x": 1})
    assert treater.needs_warming(state, "a", second)
    assert treater.needs_warming(state, "b", first)
    done = treater.apply(state, arm="a", configuration=first)
    assert (done["compile_cache_files"], done["compile_cache_bytes"]) == (1, 3)
    assert treatments.not_held(state, treater.at_sizing()) is None


def test_a_cache_that_cannot_be_emptied_is_said(treater, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder / "kernel"))

    monkeypatch.setattr(compile_cache, "_remove", refuse)
    with pytest.raises(RunError, match=r"cannot empty the compile cache .*kernel") as caught:
        treater.apply(asked(), arm="a", configuration={})
    assert "remove that folder" in caught.value.mend


LOADED = '    talk.phase("after_load")\n'
COMPILE = """
    os.makedirs(os.environ["TRITON_CACHE_DIR"], exist_ok=WARM)
    open(os.environ["TRITON_CACHE_DIR"] + "/kernel", "w").write("compiled")
"""


@pytest.mark.process
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_worker_compiles_into_the_folder_it_is_given(tmp_path, environment):
    one = Bench(tmp_path / "run", Experiment.model_validate(experiment_data(arms=(environment, "native"))))
    try:
        # makedirs refuses a folder that is there already: the second start was as cold as the first.
        one.change_worker("engine_fake.py", LOADED, LOADED + COMPILE.replace("WARM", "False"))
        for attempt in 1, 2:
            seen = one.run(attempt=attempt)
            assert seen["outcome"]["kind"] == "ok", seen["outcome"]
            assert seen["host"]["treatment"]["compile_cache_files"] == 0
            assert seen["host"]["at_sizing"]["compile_cache_files"] == 1
            assert seen["host"]["at_sizing"]["compile_cache_bytes"] == len("compiled")
            record.Record.model_validate(seen)
    finally:
        one.close()
    assert not list((tmp_path / "run" / "scratch").glob("*/compile-cache"))


@pytest.mark.process
def test_an_execution_that_is_not_measured_warms_a_cache_once_a_configuration(tmp_path):
    data = experiment_data()
    data["arms"]["a"]["treatment"] = KEPT | {"compile_cache": "warm"}
    one = Bench(tmp_path / "run", Experiment.model_validate(data))
    try:
        one.change_worker("engine_fake.py", LOADED, LOADED + COMPILE.replace("WARM", "True"))
        for attempt in 1, 2:
            seen = one.run(attempt=attempt)
            assert seen["outcome"]["kind"] == "ok", seen["outcome"]
            assert (seen["host"]["warming"] is not None) == (attempt == 1)
            treated = seen["host"]["treatment"]
            assert (treated["compile_cache_warm"], treated["compile_cache_files"]) == (True, 1)
            assert seen["host"]["at_sizing"]["compile_cache_warm"] is True
    finally:
        one.close()


# ---- ballast ----------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_ballast_is_held_until_it_is_given_back(treater):
    done = treater.apply(asked(ballast="384MiB"), spare_bytes=GIB)
    assert done["ballast_bytes"] == 384 * MIB
    (pid,) = treater.children()
    assert observe.smaps(pid)["Pss_Anon"] >= 384 * MIB, "it was really touched, and is private"
    assert os.getpgid(pid) == pid, "Ctrl-C is for the driver"
    seen = treater.at_sizing()
    assert 0.995 * 384 * MIB <= seen["ballast_resident_bytes"] <= 385 * MIB
    assert treatments.not_held(asked(ballast="384MiB"), seen) is None
    if os.geteuid() == 0:
        assert done["ballast_locked"] is True
        assert observe.cgroup_path(pid)[1] == "/"
    treater.undo()
    assert not Path(f"/proc/{pid}").exists()
    assert treater.children() == []


@pytest.mark.process
def test_a_share_of_what_is_free_before(treater):
    state = asked(ballast={"share": 0.01})
    done = treater.apply(state)
    assert 0 < done["ballast_bytes"] <= 0.01 * observe.meminfo()["MemTotal"]
    assert treatments.not_held(state, treater.at_sizing()) is None


@pytest.mark.process
def test_a_ballast_that_somebody_killed_is_seen(treater):
    treater.apply(asked(ballast="64MiB"))
    os.kill(treater.children()[0], signal.SIGKILL)
    assert wait_until(lambda: treater.at_sizing()["ballast_resident_bytes"] == 0)
    assert "ballast: 0 of 67108864 bytes" in treatments.not_held(asked(ballast="64MiB"), treater.at_sizing())


def test_a_ballast_that_leaves_too_little_is_refused_before_any_effect(treater):
    total = observe.meminfo()["MemTotal"]
    with pytest.raises(RunError, match=r"limits\.watchdog wants 1\.00 GiB") as caught:
        treater.apply(asked(ballast=f"{total // MIB}MiB"), spare_bytes=GIB)
    assert "lower treatment.ballast" in caught.value.mend
    assert treater.children() == []


@pytest.mark.process
def test_a_ballast_that_cannot_be_held_is_no_traceback(monkeypatch, tmp_path):
    with pytest.raises(RunError, match="cannot be held: Cannot allocate memory"):
        Ballast(1 << 46, "/run")
    dying = tmp_path / "dying.py"
    dying.write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(ballast, "SCRIPT", dying)
    with pytest.raises(RunError, match="its process ended with status -9"):
        Ballast(MIB, "/run")
    slow = tmp_path / "slow.py"
    slow.write_text("import sys\nsys.stdin.read()\n")
    monkeypatch.setattr(ballast, "SCRIPT", slow)
    monkeypatch.setattr(ballast, "_START_S", 0.2)
    with pytest.raises(RunError, match="not all of it was held after"):
        Ballast(MIB, "/run")


def is_dead(pid):
    """Gone, or with no memory left and only its status to collect: that is its new parent's to do."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


HOLD = """
import sys, time
from spark_ray.ballast import Ballast
one = Ballast(64 << 20, sys.argv[1])
print(one.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.process
@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_driver_leaves_no_ballast(tmp_path, stopped):
    driver = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    with driver:
        pid = int(driver.stdout.readline())
        if stopped:  # nothing can be read from its standard input then
            os.kill(pid, signal.SIGSTOP)
        driver.kill()
    assert wait_until(lambda: is_dead(pid), 5)


@pytest.mark.process
def test_what_a_dead_run_left_is_found_and_removed(tmp_path):
    run = tmp_path / "run"
    Store.create(run, {}, {}).close()
    one = Ballast(16 * MIB, str(run))
    kernels = run / "scratch" / "slot" / "compile-cache"
    (kernels / "a" / "cold").mkdir(parents=True)
    assert [each.kind for each in reap.leftovers(run, None)] == ["process"], "an empty folder is no leftover"
    (kernels / "a" / "cold" / "kernel").write_bytes(b"1")
    found = reap.leftovers(run, None)
    assert {(each.kind, each.name) for each in found} == {
        ("process", str(one.pid)),
        ("compile cache", str(kernels)),
    }
    for each in found:
        assert reap.remove(each, None) is None
    one.release()
    assert reap.leftovers(run, None) == []
    assert not kernels.exists()


@pytest.mark.process
def test_a_trial_with_a_ballast_records_it_and_outlives_it(tmp_path):
    data = experiment_data()
    data["arms"]["a"]["treatment"] = KEPT | {"ballast": "256MiB"}
    one = Bench(tmp_path / "run", Experiment.model_validate(data))
    try:
        seen = one.run()
        assert seen["outcome"]["kind"] == "ok", seen["outcome"]
        record.Record.model_validate(seen)
        at = seen["host"]["at_sizing"]
        assert at["ballast_resident_bytes"] >= 0.995 * 256 * MIB
        assert not Path(f"/proc/{seen['host']['treatment']['ballast_pid']}").exists()
    finally:
        one.close()


# ---- page cache, per-CPU lists, swap ----------------------------------------------------------------------


@pytest.mark.root
def test_a_fill_is_held_and_its_loss_is_seen(treater):
    state = asked(page_cache={"fill": "256MiB"})
    done = treater.apply(state)
    assert done["filled_bytes"] == 256 * MIB
    seen = treater.at_sizing()
    assert treatments.not_held(state, seen) is None
    page_cache.advise_away([treater._fill])
    assert "page cache fill: " in treatments.not_held(state, treater.at_sizing())
    assert treater.settle()["refilled_bytes"] == 256 * MIB
    assert treatments.not_held(state, treater.at_sizing()) is None
    treater._fill.unlink()
    assert "page cache fill: 0 of" in treatments.not_held(state, treater.at_sizing())


@pytest.mark.root
@pytest.mark.parametrize("cache", ["drop", "advise", {"fill": "128MiB"}])
def test_page_cache_that_somebody_else_filled_is_seen_and_what_is_known_is_not(tmp_path, cache):
    """Others work on this machine as well: the tolerance is far above what they read, and far below the file."""
    model, other = (page_cache.fill(tmp_path / name, 512 * MIB) for name in ("model", "other"))
    page_cache.advise_away([model, other])
    limits = Limits(cache_tolerance="256MiB")
    treater, state = made(tmp_path, [model]), asked(page_cache=cache)
    try:
        treater.apply(state)
        page_cache.read_through(model)
        seen = treater.at_sizing()
        assert seen["model_resident_bytes"] == 512 * MIB
        assert treatments.not_held(state, seen, limits) is None, seen
        page_cache.read_through(other)
        assert "came from elsewhere" in treatments.not_held(state, treater.at_sizing(), limits)
        mapped = treater.at_sizing(mapped_file_bytes=512 * MIB)
        assert treatments.not_held(state, mapped, limits) is None, "files mapped by the worker explain it"
    finally:
        treater.close()
        page_cache.advise_away([model, other])


def test_without_the_models_residency_nothing_is_said_to_be_unexplained():
    left = {"page_cache_bytes": 0, "model_resident_bytes": None}
    seen = {"page_cache_bytes": 9, "model_resident_bytes": 1, "mapped_file_bytes": None}
    assert treatments._unexplained_bytes(left, seen) is None
    left["model_resident_bytes"] = 0
    assert treatments._unexplained_bytes(left, seen) == 8
    assert treatments._unexplained_bytes(left, seen | {"page_cache_bytes": 0}) == 0


FREE_MUCH = """
import mmap, os
for cpu in os.sched_getaffinity(0):
    os.sched_setaffinity(0, {cpu})
    with mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for start in range(0, 256 << 20, 4096):
            memory[start] = 1
"""


@pytest.mark.root
def test_lists_are_drained_before_the_start_and_again_before_the_engine_reads(treater):
    state = asked(per_cpu_pages="drained")
    done = treater.apply(state)
    assert done["drained"]["after_bytes"] <= done["drained"]["before_bytes"]
    subprocess.run([sys.executable, "-c", FREE_MUCH], check=True)  # what a worker does while it loads a model
    waiting = observe.per_cpu_free_bytes()
    settled = treater.settle()["drained"]
    seen = treater.at_sizing()
    assert seen["drained"] == settled, "not drained a third time"
    assert settled["after_bytes"] < 0.005 * observe.meminfo()["MemTotal"] < waiting
    assert treatments.not_held(state, seen) is None, seen
    treater.undo()
    treater.apply(state)
    assert treater.at_sizing()["drained"], "a worker of an older program never says settle"


def test_a_drain_that_fails_disturbs_the_attempt_and_not_the_run(tmp_path):
    class Broken(RootActs):
        def run(self, verb, *_, **__):
            if self.broken:
                raise UnavailableError(f"{verb} did not end within 60 s")
            return '{"before_bytes": 2, "after_bytes": 1, "rounds": 1, "duration_s": 0.1}'

    acts = Broken()
    acts.broken = False
    treater, state = made(tmp_path, acts=acts), asked(per_cpu_pages="drained")
    treater.apply(state)
    acts.broken = True
    treater.settle()
    assert "drain-per-cpu did not end within 60 s" in treatments.not_held(state, treater.at_sizing())
    treater.close()


def test_swap_that_appears_is_seen(treater, monkeypatch):
    state, real = asked(swap="require_off"), observe.meminfo
    treater.apply(state)
    monkeypatch.setattr(observe, "meminfo", lambda: real() | {"SwapTotal": 0})
    assert treatments.not_held(state, treater.at_sizing()) is None
    monkeypatch.setattr(observe, "meminfo", lambda: real() | {"SwapTotal": GIB})
    assert "1.00 GiB of swap" in treatments.not_held(state, treater.at_sizing())


@pytest.mark.parametrize(
    ("engine", "workload", "pages"),
    [
        ({"kind": "fake"}, {}, "drained"),
        ({"kind": "tensorrt_llm", "worker": "single_process"}, {}, "drained"),
        ({"kind": "tensorrt_llm"}, {}, "as_is"),
        ({"kind": "tensorrt_llm", "worker": "single_process"}, {"tool": "trtllm_bench"}, "as_is"),
    ],
)
def test_lists_are_drained_by_default_only_for_an_engine_that_waits(engine, workload, pages):
    data = experiment_data() | {
        "engine": engine | {"double": "double"} if engine["kind"] != "fake" else engine
    }
    data |= {"model": {"random_llama": {}}, "workload": workload}
    experiment = Experiment.model_validate(data)
    state, warnings = treatments.effective(Treatment(), True, settles=experiment.settles("a"))
    assert state["per_cpu_pages"] == pages
    assert any("does not wait" in warning for warning in warnings) == (pages == "as_is")
    asked = Treatment.model_validate({"per_cpu_pages": "drained"})
    assert treatments.effective(asked, True, settles=False)[0]["per_cpu_pages"] == "drained"
