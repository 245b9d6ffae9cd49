"""The adapter and the double against TensorRT-LLM's own names: tests/names/*.json, read from its source by version."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "names"))
import generate

from spark_ray.worker import tensorrt_llm_api as api

DOUBLE = Path(__file__).parent / "double"
VERSIONS = {table["version"]: table for table in generate.tables()}
SETTINGS = {
    "tokens_per_block": 32,
    "kv_dtype": "auto",
    "kv_cache_manager": "v1",
    "tensor_parallel_size": 1,
    "max_seq_len": 2048,
    "load_format": "auto",
}
UNREAD = {"1.3.0rc28": {"LLM", "CudaGraphConfig"}}  # of that version the page of KvCacheConfig was read
CONFIGURATION = {"memory_fraction": 0.9, "max_batch_size": 8, "max_num_tokens": 1024}


def names(version, owner):
    return frozenset(VERSIONS[version]["classes"][owner]["fields"])


def complete(version, owner):
    return VERSIONS[version]["classes"][owner]["complete"]


def passed(owner, **settings):
    knobs = {
        "KvCacheConfig": lambda: api.kv_cache_knobs({**SETTINGS, **settings}, CONFIGURATION, 4096),
        "CudaGraphConfig": lambda: api.cuda_graph_knobs(CONFIGURATION),
        "LLM": lambda: api.llm_knobs({**SETTINGS, **settings}, CONFIGURATION, "model", None, None),
        "SamplingParams": lambda: api.sampling_knobs(128),
    }
    return knobs[owner]()


# ---- the adapter ------------------------------------------------------------------------------------------


def test_every_release_that_the_adapter_calls_known_was_looked_up():
    looked_up = {
        tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", version).groups()) for version in VERSIONS
    }
    assert looked_up == api.KNOWN_RELEASES


@pytest.mark.parametrize(
    ("version", "owner"),
    [
        (version, owner)
        for version in VERSIONS
        for owner in generate.CLASSES
        if owner not in UNREAD.get(version, ())
    ],
)
def test_what_the_adapter_passes_exists_in_every_version(version, owner):
    """Or is left away, where the version does by itself what was asked for."""
    given = api.arguments(owner, version, names(version, owner), passed(owner))
    left_away = {knob.name for knob in passed(owner)} - given.keys()
    assert left_away <= {"tokens_per_block", "use_kv_cache_manager_v2"}
    assert all(generate.cell(VERSIONS[version], owner, name) == "–" for name in left_away)


@pytest.mark.parametrize(
    ("version", "setting", "name"),
    [
        ("1.0.0", {"tokens_per_block": 64}, "tokens_per_block"),
        ("1.0.0", {"kv_cache_manager": "v2"}, "use_kv_cache_manager_v2"),
        ("1.2.0", {"kv_cache_manager": "v2"}, "use_kv_cache_manager_v2"),
    ],
)
def test_what_a_version_cannot_do_is_refused_by_name(version, setting, name):
    with pytest.raises(api.UnsupportedError, match=name):
        api.arguments(
            "KvCacheConfig", version, names(version, "KvCacheConfig"), passed("KvCacheConfig", **setting)
        )


@pytest.mark.parametrize("owner", list(generate.CLASSES))
def test_a_knob_that_may_be_left_away_names_the_default_of_versions_that_have_it(owner):
    """Else leaving it away would be something else than what was asked for. Where the versions differ, ours is said."""
    ours = {
        "host_cache_size",
        "enable_iter_perf_stats",
        "use_kv_cache_manager_v2",
    }  # their default is another
    for knob in passed(owner):
        if knob.absent is api._REQUIRED or knob.name in ours:
            continue
        for version in VERSIONS.values():
            said = generate.cell(version, owner, knob.name).strip("`")
            assert said in {"–", "?", repr(knob.absent), f"LoadFormat.{str(knob.absent).upper()}"}, knob.name


# ---- the double -------------------------------------------------------------------------------------------

# The double's surfaces, and the version whose names were read: of a patch release (1.2.1) those of the one before.
SURFACES = {
    "1.0.0": "1.0.0", "1.1.0": "1.1.0", "1.2.1": "1.2.0", "1.3.0rc13": "1.3.0rc13", "1.3.0rc28": "1.3.0rc28",
    "1.4.0rc1": "1.4.0rc",
}  # fmt: skip

_SHOW = """
import json
from tensorrt_llm.version import VERSIONS
from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig, SamplingParams, TorchLlmArgs
def shown(fields):
    return {name: repr(field.default) for name, field in fields.items()}
print(json.dumps({
    "versions": VERSIONS,
    "LLM": shown(TorchLlmArgs.model_fields), "KvCacheConfig": shown(KvCacheConfig.model_fields),
    "CudaGraphConfig": shown(CudaGraphConfig.model_fields), "SamplingParams": shown(SamplingParams.__dataclass_fields__),
}))
"""


@pytest.fixture(scope="module", params=SURFACES)
def double(request):
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW],
        env={"PYTHONPATH": str(DOUBLE), "TLLM_DOUBLE_VERSION": request.param, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return SURFACES[request.param], json.loads(shown.stdout.splitlines()[-1])


def test_the_double_takes_exactly_the_names_of_its_version(double):
    version, shown = double
    assert set(shown["versions"]) == SURFACES.keys()
    for owner in generate.CLASSES:
        if complete(version, owner):
            assert shown[owner].keys() == names(version, owner), owner
        else:
            assert names(version, owner) <= shown[owner].keys(), owner


def test_the_double_has_the_defaults_of_its_version(double):
    version, shown = double
    simple = re.compile(r"None|True|False|-?[\d.]+|'.*'")
    for owner, known in VERSIONS[version]["classes"].items():
        for name, facts in known["fields"].items():
            if (
                simple.fullmatch(facts["default"]) and shown[owner][name] != "'pytorch'"
            ):  # backend: None means pytorch
                assert shown[owner][name] == facts["default"], f"{owner}.{name}"


# ---- the table --------------------------------------------------------------------------------------------


def test_the_page_is_what_the_tables_say():
    assert generate.PAGE.read_text() == generate.page()


SOURCE = """
class Base(StrictModel):
    first: int = Field(default=1, description="words that are not kept")
    second: Optional[str] = None
    LIMIT: ClassVar[int] = 3
    _hidden: bool = PrivateAttr(default=True)

class KvCacheConfig(Base):
    second: str = Field("x")
    third: Other = Field(default_factory=Other)
    fourth: int
    fifth: int = Field(..., gt=0)

    def method(self): ...

Alias = KvCacheConfig
"""


def test_names_annotations_and_defaults_are_read_from_source():
    found = generate.fields(SOURCE)
    assert found["Alias"] == found["KvCacheConfig"]
    assert {name: facts["default"] for name, facts in found["KvCacheConfig"].items()} == {
        "first": "1",
        "second": "'x'",
        "third": "Other()",
        "fourth": "required",
        "fifth": "required",
    }
    assert found["Base"]["second"] == {"annotation": "Optional[str]", "default": "None"}


def test_a_page_of_module_code_is_read_as_the_source_it_shows(tmp_path):
    page = tmp_path / "llm_args.html"
    page.write_text(
        "<h1>not <code>code</code></h1><pre>\n<span></span><div id='A'>\n"
        '<a class="viewcode-back" href="../reference.html">[docs]</a>\n'
        '<span class="k">class</span> A:\n    <span class="n">size</span>: <span class="nb">int</span> = 0  # &lt; 1\n'
        "</div></pre><p>more</p>"
    )
    assert generate.fields(generate.source(page)) == {"A": {"size": {"annotation": "int", "default": "0"}}}
