"""A rehearsal end to end: the mission's experiment with a stand-in for TensorRT-LLM, and the mark that it never loses."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from helpers import QUIET, guests_of, run, run_without_report, spark_ray, wait_until, write_yaml
from test_double import DOUBLE, model  # noqa: F401  a fixture

from spark_ray import double, receive
from spark_ray.errors import InputError
from spark_ray.experiment import Experiment
from spark_ray.measurements import Measurements
from spark_ray.record import Record
from spark_ray.result import Asked, _mark_misfits

ROOT = Path(__file__).parent.parent
SPARK = ROOT / "experiments" / "spark_kv_divergence.yaml"
SAID = "DOUBLE: a stand-in for TensorRT-LLM; its numbers are no measurements"


def experiment(**changes):
    return {
        "name": "rehearsal",
        "engine": {"kind": "tensorrt_llm", "max_seq_len": 512},
        "model": {"path": "models/none"},
        "workload": {"requests": 3, "input_tokens": 16, "output_tokens": 4},
        "search": {"sampler": "random", "blocks": 1, "space": {"max_batch_size": 4, "max_num_tokens": 256, "memory_fraction": 0.2}},
        "arms": {
            "mpi": {"environment": "native", "treatment": QUIET},
            "single": {"environment": "native", "treatment": QUIET, "engine": {"worker": "single_process"}},
        },
        "limits": {"trial_timeout": "60s"},
    } | changes  # fmt: skip


def records(folder):
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("trials/*/*/record.json"))]
    for record in found:
        Record.model_validate_json(json.dumps(record))
    return found


def weights(folder):
    return f"model={{path: {folder}}}"


@pytest.mark.process
def test_both_workers_natively_and_no_record_may_lose_its_mark(tmp_path, model):  # noqa: F811
    path, folder = write_yaml(tmp_path, experiment()), tmp_path / "run"
    options = ("--double", DOUBLE, "--set", weights(model), "--out", folder)
    done = run_without_report(path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAID in done.stdout
    assert f'set         engine.double="{DOUBLE}"' in done.stdout
    assert "b0000 DOUBLE done: divergence" in done.stdout
    found = records(folder)
    assert [record["outcome"]["kind"] for record in found] == ["ok"] * 2
    assert {record["engine"]["double"] for record in found} == {str(DOUBLE)}
    workers = {record["arm"]: record["result"]["measurements"]["engine"]["worker"] for record in found}
    assert workers == {"mpi": "mpi", "single": "single_process"}
    for record in found:
        measured = record["result"]["measurements"]
        kv, sizing = measured["kv_cache"], measured["sizing"]
        assert measured["engine"]["engine_is_double"] is True
        assert kv["second_source"]["source"] != kv["source"]
        step = kv["bytes_per_token"] * kv["tokens_per_block"] + sizing["resolution_bytes"]
        assert abs(kv["bytes"] - sizing["available_bytes"]) <= step
        assert measured["throughput"]["output_tokens"] == 12
    assert wait_until(lambda: not guests_of(folder)), "no worker of the double outlives its trial"
    unmarked(folder, found[0])
    with (folder / "bundle" / "tensorrt_llm" / "device.py").open("a") as stream:
        stream.write("# changed\n")
    done = run_without_report(path, *options, "--resume")
    assert (done.returncode, "bundle was changed" in done.stderr) == (2, True)


def unmarked(folder, record):
    """The same result without its mark is not believed."""
    attempt = folder / "trials" / record["trial_id"] / str(record["attempt"])
    asked = Asked(
        record["trial_id"], record["attempt"], record["engine"], record["configuration"], record["workload"]
    )
    assert receive.read_result(attempt, asked)[1] is None
    result = json.loads((attempt / "result.json").read_text())
    del result["measurements"]["engine"]["engine_is_double"]
    (attempt / "result.json").write_text(json.dumps(result))
    believed, why = receive.read_result(attempt, asked)
    assert believed is None
    assert "engine_is_double: is not true, engine.double was set" in why


def marked(folder):
    """Whether every place where a number stands says what made it."""
    summary = json.loads((folder / "summary.json").read_text())
    page = (folder / "report.html").read_text().partition("<body>")[2]
    trials = pd.read_parquet(folder / "trials.parquet")
    assert summary["engine_is_double"] is True
    assert summary["verdict"].startswith("DOUBLE: a stand-in for TensorRT-LLM, no engine ran")
    assert summary["findings"][0]["severity"] == "grave"
    assert "test double" in summary["findings"][0]["sentence"]
    assert "DOUBLE" in re.sub(r"<[^>]*>", "", page)[:200], "at the top of the report"
    assert trials["engine_is_double"].all()
    assert "engine.shutdown_s" not in summary["rivals"], "a quantity of each attempt is no property of an arm"
    return True


@pytest.mark.process
@pytest.mark.root
@pytest.mark.docker
def test_the_missions_experiment_is_rehearsed_in_chroot_docker_and_natively(tmp_path, model):  # noqa: F811
    folder = tmp_path / "run"
    less = ("search.blocks=1", "limits.memory_wait=30s")
    sets = [word for each in (weights(model), *less) for word in ("--set", each)]
    done = run(SPARK, "--local", "--double", DOUBLE, *sets, "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAID in done.stdout
    found = {record["arm"]: record for record in records(folder)}
    assert set(found) == {"chroot", "docker", "chroot-cache", "native"}
    assert {record["outcome"]["kind"] for record in found.values()} == {"ok"}
    for record in found.values():
        assert record["result"]["measurements"]["engine"]["engine_is_double"] is True
        assert record["result"]["measurements"]["kv_cache"]["second_source"]["bytes"] > 0
    roots = {arm: record["result"]["evidence"]["root"] for arm, record in found.items()}
    assert len({roots["chroot"], roots["docker"], roots["native"]}) == 3
    assert marked(folder)
    assert wait_until(lambda: not guests_of(folder))


@pytest.mark.docker
def test_without_the_flag_everything_that_is_missing_is_named_before_any_effect(tmp_path):
    from spark_ray import driver

    if driver.find() is not None:
        pytest.skip("this host has a GPU")
    done = run(SPARK, "--out", tmp_path / "run", COLUMNS="400")
    assert done.returncode == 3
    for words in (
        "no NVIDIA driver here",
        f"model folder {ROOT}/models/DeepSeek-R1-Distill-Qwen-7B does not exist",
        f"arm chroot: {ROOT}/rootfs/tensorrt-llm is no rootfs",
        "arm docker: the Docker engine has no image nvcr.io/nvidia/tensorrt-llm/release:",
    ):
        assert words in done.stderr
    assert "no tensorrt_llm in this interpreter" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_plan_shows_what_the_flag_stands_for():
    done = spark_ray("plan", SPARK, "--double", DOUBLE, "--set", "search.blocks=3")
    assert done.returncode == 0, done.stderr
    assert SAID in done.stdout
    for shown in (
        'name="spark_kv_divergence-double"',
        "arms.docker.environment.ulimits={}",
        "search.blocks=3",
    ):
        assert f"set         {shown}" in done.stdout
    assert "no NVIDIA driver" not in done.stdout


# ---- the host's side ----------------------------------------------------------------------------------------


def spark_yaml(folder, **changes):
    data = {
        "name": "x" * 38,
        "engine": {"kind": "tensorrt_llm"},
        "model": {"path": "models/x"},
        "search": {"blocks": 1, "space": {"max_batch_size": 1, "max_num_tokens": 64, "memory_fraction": 0.5}},
        "arms": {
            "chroot": {"environment": {"kind": "chroot", "rootfs": "rootfs/trt", "gpus": "all"}},
            "docker": {
                "environment": {"kind": "docker", "image": "nvcr.io/x:1", "gpus": "all", "ulimits": {"memlock": -1}, "ipc": "host"}
            },
            "native": {"environment": "native"},
        },
        "contrast": {"baseline": "chroot", "against": "docker"},
    } | changes  # fmt: skip
    path = folder / "spark.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_the_flag_stands_for_overrides_that_need_no_gpu_no_image_and_no_model(tmp_path):
    from spark_ray.config import load_experiment

    path = spark_yaml(tmp_path)
    said = double.overrides(path, DOUBLE)
    found = load_experiment(path, said).experiment
    assert found.name == "x" * 33 + "-double"
    assert found.engine.double == str(DOUBLE)
    assert found.model.random_llama.hidden_size == 64
    assert (found.arms["chroot"].environment.rootfs, found.arms["chroot"].environment.gpus) == ("host", None)
    docker = found.arms["docker"].environment
    assert (docker.image, docker.gpus, docker.ulimits, docker.ipc) == ("host", None, {}, "host")
    assert [each.partition("=")[0] for each in said if "native" in each] == []
    assert double.problems(found) == []
    assert double.package_of(found) == DOUBLE / "tensorrt_llm"


def test_a_rehearsal_holds_no_more_page_cache_than_a_laptop_has():
    fills = [each for each in double.overrides(SPARK, DOUBLE) if ".fill=" in each]
    assert fills == ['arms.chroot-cache.treatment.page_cache.fill="256MiB"']
    assert not double._is_large("1MiB")
    assert not double._is_large({"no": "size"})


def test_the_flag_is_for_tensorrt_llm_and_a_folder_with_a_double(tmp_path):
    with pytest.raises(InputError, match=r"stands in for tensorrt_llm; the engine of .* is probe"):
        double.overrides(spark_yaml(tmp_path, engine={"kind": "probe"}), DOUBLE)
    with pytest.raises(InputError, match="holds no package tensorrt_llm"):
        double.overrides(spark_yaml(tmp_path), tmp_path)
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text("__version__ = '1.2.1'\n")
    with pytest.raises(InputError, match="it is not a double"):
        double.overrides(spark_yaml(tmp_path), tmp_path)


def test_arms_cannot_differ_in_their_double():
    arms = {"a": {"environment": "native"}, "b": {"environment": "native", "engine": {"double": "elsewhere"}}}
    space = {"max_batch_size": 1, "max_num_tokens": 64, "memory_fraction": 0.5}
    engine = {"kind": "tensorrt_llm", "double": str(DOUBLE)}
    found = Experiment.model_validate(
        {
            "name": "x",
            "engine": engine,
            "model": {"random_llama": {}},
            "search": {"space": space},
            "arms": arms,
        }
    )
    assert [problem.what for problem in double.problems(found)] == [
        "arms differ in engine.double, and a run has one copy for all of them"
    ]


def test_a_double_in_the_file_must_be_in_a_folder_that_it_may_name(tmp_path):
    from spark_ray.config import load_experiment

    path = spark_yaml(tmp_path, engine={"kind": "tensorrt_llm", "double": "/srv/elsewhere"})
    with pytest.raises(InputError, match=r"engine\.double: /srv/elsewhere is outside the folders"):
        load_experiment(path, ("model={random_llama: {}}",))


def test_the_hash_is_of_every_file_and_of_nothing_compiled(tmp_path):
    package = tmp_path / "tensorrt_llm"
    shutil.copytree(DOUBLE / "tensorrt_llm", package, ignore=shutil.ignore_patterns("__pycache__"))
    first = double.package_sha256(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert double.package_sha256(package) == first
    with (package / "llmapi" / "llm.py").open("a") as stream:
        stream.write("# changed\n")
    assert double.package_sha256(package) != first


@pytest.mark.parametrize(
    ("mark", "asked", "believed"), [(True, "x", True), (None, "x", False), (False, "x", False), (True, None, False), (None, None, True)]
)  # fmt: skip
def test_numbers_of_a_double_without_its_mark_are_not_believed(mark, asked, believed):
    engine = {"name": "TensorRT-LLM", "version": "1.2.1"} | (
        {} if mark is None else {"engine_is_double": mark}
    )
    found = Measurements.model_validate({"engine": engine})
    assert (not list(_mark_misfits(found, {"kind": "tensorrt_llm", "double": asked}))) == believed


def test_numbers_without_a_name_are_not_believed_of_a_double():
    found = Measurements.model_validate({"model": {"weight_bytes": 1}})
    assert list(_mark_misfits(found, {"kind": "tensorrt_llm", "double": "x"}))
    assert not list(_mark_misfits(found, {"kind": "tensorrt_llm", "double": None}))
    assert not list(_mark_misfits(Measurements(), {"kind": "tensorrt_llm", "double": "x"})), (
        "nothing was measured"
    )
