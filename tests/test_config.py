"""YAML in, an experiment or a clear InputError out; never anything else."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spark_ray.config import MAX_BYTES, json_schema, load_experiment
from spark_ray.errors import EXIT_BAD_INPUT, InputError
from spark_ray.experiment import Experiment

GOOD = """\
name: quickstart
question: Does a container cost KV capacity?
seed: 7
engine: {kind: fake, kv_cache: 2GiB}
search:
  sampler: qmc
  blocks: 4
  space:
    max_batch_size: {low: 1, high: 16, log: true}
    max_num_tokens: [128, 256]
    memory_fraction: .5
arms:
  native:
    environment: native
    treatment: {page_cache: {fill: 2GiB}}
  docker:
    environment: {kind: docker, memory: 8GiB, cap_add: [IPC_LOCK], ulimits: {memlock: -1}}
    engine: {kv_cache: 3GiB}
contrast: {baseline: native, against: docker}
limits:
  trial_timeout: 90s
"""

MISTAKES = [
    # old, new, what is said
    ("  sampler", "  samplr", ":6: search.samplr: unknown key; did you mean sampler?"),
    ("seed: 7", "sed: 7", ":3: sed: unknown key; did you mean seed?"),
    ("seed: 7", "xyzzy: 7", ":3: xyzzy: unknown key; keys here: arms, contrast, engine, "),
    ("kv_cache: 2GiB", "memory_view: cgroup", ":4: engine.memory_view: unknown key; keys here: allocate, "),
    ("memory: 8GiB", "memry: 8GiB", ":17: arms.docker.environment.memry: unknown key; did you mean memory?"),
    ("  sampler", "  target: {margn: 0.1}\n  sampler", "search.target.margn: unknown key; did you mean margin?"),
    ("    treatment", "    treatmint", ":15: arms.native.treatmint: unknown key; did you mean treatment?"),
    ("{fill: 2GiB}", "{fil: 2GiB}", ":15: arms.native.treatment.page_cache.fil: unknown key; did you mean fill?"),
    ("{fill: 2GiB}", "dorp", "page_cache: must be one of drop, keep, advise: got 'dorp'; did you mean drop?"),
    ("qmc", "tpee", ":6: search.sampler: must be one of grid, random, qmc, tpe, gp, map: got 'tpee'; did you mean tpe?"),
    ("kind: fake", "kind: fkae", ":4: engine.kind: must be one of embedded, probe, tensorrt_llm, simulated, fake: got 'fkae'; did you mean fake?"),
    ("kind: fake, ", "", ":4: engine.kind: this key is missing: one of embedded, probe, tensorrt_llm, simulated, fake"),
    ("kind: docker", "kind: dokcer", ":17: arms.docker.environment.kind: must be one of native, chroot, isolated, docker, podman: got"),
    (": native\n", ": natve\n", ":14: arms.native.environment: must be one of native, chroot, isolated, docker, podman: got 'natve'"),
    ("blocks: 4", "blocks: four", ":7: search.blocks: must be a valid integer: got 'four'"),
    ("blocks: 4", "blocks: 0", ":7: search.blocks: must be greater than 0: got 0"),
    ("blocks: 4", "blocks: 1:30", ":7: search.blocks: must be a valid integer: got '1:30'"),
    ("blocks: 4", 'blocks: "4"', ":7: search.blocks: must be a valid integer: got '4'"),
    ("blocks: 4", "blocks: 010", ":7: search.blocks: must be a valid integer: got '010'"),
    ("blocks: 4", "blocks:", ":7: search.blocks: must be a valid integer: got nothing"),
    ("log: true", "log: yes", ":9: search.space.max_batch_size.log: must be true or false: got 'yes'; did you mean true?"),
    ("low: 1,", "low: 32,", ":9: search.space.max_batch_size: the range is empty: low 32 is above high 16"),
    ("low: 1,", "", ":9: search.space.max_batch_size.low: this key is missing"),
    ("[128, 256]", "lots", ":10: search.space.max_num_tokens: must be a valid integer: got 'lots'"),
    ("[128, 256]", "[128, x]", ":10: search.space.max_num_tokens.1: must be a valid integer: got 'x'"),
    ("[128, 256]", "[]", ":10: search.space.max_num_tokens: must have at least 1: got 0"),
    ("[128, 256]", "[8, 8]", ":10: search.space.max_num_tokens: the list holds a value twice"),
    ("on: .5", "on: 1.5", ":11: search.space.memory_fraction: must be less than 1: got 1.5"),
    ("on: .5", "on: 0", ":11: search.space.memory_fraction: must be greater than 0: got 0"),
    ("on: .5", "on: .nan", ":11: search.space.memory_fraction: must be a valid number: got '.nan'"),
    ("on: .5", "on: 1e999", ":11: search.space.memory_fraction: '1e999' is not a float here"),
    ("kv_cache: 2GiB", "kv_cache: 2", ":4: engine.kv_cache: 2 is not a size: write a number with its unit"),
    ("kv_cache: 3GiB", "kv_cache: 3gb", ":18: arms.docker.engine.kv_cache: '3gb' is not a size: gb is not a unit; did"),
    ("kv_cache: 3GiB", "kv_cach: 3GiB", ":18: arms.docker.engine.kv_cach: unknown key; did you mean kv_cache?"),
    ("kv_cache: 3GiB", "kind: fake", ":18: arms.docker.engine.kind: cannot differ here"),
    ("trial_timeout: 90s", "trial_timeout: 1:30", ":21: limits.trial_timeout: '1:30' is not a duration"),
    ("trial_timeout: 90s", "trial_timeout: 0s", ":21: limits.trial_timeout: must be greater than 0: got '0s'"),
    ("baseline: native", "baseline: nativ", ":19: contrast.baseline: is not an arm (arms: native, docker): got 'nativ'; did"),
    ("baseline: native", "baseline: docker", ":19: contrast: compares an arm with itself"),
    ("contrast", "  third: {environment: native}\ncontrst", ": contrast: with 3 arms, say which two are compared"),
    ("kind: fake, kv_cache: 2GiB", "kind: embedded", ": model: engine embedded needs a model"),
    ("  docker:", "  Docker:", ":16: arms.Docker: 'Docker' is not a plain name"),
    ("name: quickstart", "name: 2024", ":1: name: must be a valid string: got 2024; write it in quotes"),
    ("engine: {kind: fake, kv_cache: 2GiB}", "engine: fake", ":4: engine: must be a mapping (key: value): got 'fake'"),
    ("seed: 7", "name: twice", ":3: name: this key is here twice, first at"),
    ("seed: 7", "<<: {seed: 7}", ":3: <<: merge keys are not read here"),
    ("seed: 7", "seed: !!python/object:os.system 7", ":3: seed: the tag !!python/object:os.system is not read here"),
    ("seed: 7", "seed: !!bool 7", ":3: seed: '7' is not a bool here"),
    ("seed: 7", "? [a, b]\n: 7", ":3: ?: a key must be plain text"),
    ("seed: 7", "seed: " + "9" * 5000, ":3: seed: a number of 5000 characters is too long"),
    ("seed: 7", "seed: 0x" + "f" * 5000, ":3: seed: a number of 5002 characters is too long"),
    ("seed: 7", 'question: "\\ud800"', ":3: question: this key is here twice"),
    ("seed: 7", '"\\ud800": 1', ":3: ?: a key must be plain text"),
    ("seed: 7", "seed: &a [*a]", ":3: seed.0.0: more than 20000 values or 32 levels: does an alias"),
    ("seed: 7", "\tseed: 7", ":3: not YAML: a tab; indent with spaces"),
    ("seed: 7", "seed: [7", ":4: not YAML: while parsing a flow sequence expected ',' or ']', but got ':' (begun on line 3)"),
    ("seed: 7", "--- {}", ":3: not YAML: expected a single document in the stream but found another document"),
    ("seed: 7", "seed: *nowhere", ":3: not YAML: found undefined alias 'nowhere'"),
    ("seed: 7", 'seed: "\\Uffffffff"', ":1: not YAML: "),
    ("seed: 7", "seed: \x00", ":3: not YAML: the character '\\x00'"),
    ("seed: 7", "seed: " + "[" * 600, "not YAML: deeper than 32 levels"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


@pytest.fixture(scope="module")
def load(folder):
    def load(text, *overrides):
        path = folder / "e.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_experiment(path, overrides)

    return load


@pytest.fixture(scope="module")
def said(load, folder):
    def said(text, *overrides):
        with pytest.raises(InputError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == EXIT_BAD_INPUT
        return str(caught.value).replace(str(folder / "e.yaml"), "")

    return said


def test_a_good_file_is_read(load):
    loaded = load(GOOD)
    assert loaded.text == GOOD
    assert loaded.experiment.name == "quickstart"
    assert loaded.experiment.search.space.memory_fraction == 0.5
    assert loaded.experiment.limits.trial_timeout == 90
    assert loaded.experiment.engine_of("docker").kv_cache == 3 << 30


def test_resolved_is_the_same_experiment(load):
    loaded = load(GOOD, "search.blocks=9", "limits.watchdog=3GiB")
    assert Experiment.model_validate(loaded.resolved) == loaded.experiment
    again = load(json.dumps(loaded.resolved))  # JSON is YAML
    assert again.experiment == loaded.experiment
    assert again.resolved == loaded.resolved


@pytest.mark.parametrize(("old", "new", "words"), MISTAKES, ids=[words[:60] for _, _, words in MISTAKES])
def test_a_mistake_is_said_plainly(said, old, new, words):
    assert old in GOOD
    lines = said(GOOD.replace(old, new, 1)).splitlines()
    assert [line for line in lines if words in line], lines


def test_one_mistake_in_a_union_is_one_line(said):
    for old, new, words in MISTAKES:
        if "max_num_tokens" in words or "page_cache: must" in words:
            assert len(said(GOOD.replace(old, new, 1)).splitlines()) == 1


def test_all_problems_at_once_in_the_order_of_lines(said):
    text = GOOD
    for old, new in [("qmc", "qmcc"), ("seed: 7", "seed: x"), ("90s", "90"), (".5", "5")]:
        text = text.replace(old, new, 1)
    lines = said(text, "search.blocks=x").splitlines()
    assert [re.match(r":(\d+): |--set", line)[1] for line in lines] == ["3", "6", "11", "21", None]
    assert lines[-1].startswith("--set search.blocks=x: search.blocks: must be a valid integer")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ": the file is empty"),
        (b"# nothing\n", ": the file is empty"),
        (b"- a\n", ":1: the file must be a mapping (key: value): got a list of 1"),
        (b"{}", ":1: arms: this key is missing"),
        (b"name: \xff", ":1: not UTF-8: got byte 0xff"),
        (b"a: 1\nb: \xe4", ":2: not UTF-8: got byte 0xe4"),
        (b"#" * (MAX_BYTES + 1), ": larger than 1 MiB"),
    ],
)
def test_not_an_experiment_at_all(said, content, words):
    assert words in said(content)


def test_no_file_and_a_folder(folder):
    for path, words in [
        (folder / "none.yaml", "No such file"),
        (folder, "Is a directory"),
        (Path("a\0b"), "null"),
    ]:
        with pytest.raises(InputError, match=words):
            load_experiment(path)


def test_a_thousand_problems_are_not_a_thousand_lines(said):
    lines = said(GOOD.replace("[128, 256]", str(["x"] * 1000))).splitlines()
    assert len(lines) == 51
    assert lines[-1] == ": and 950 more problems"


def test_an_alias_bomb_is_refused(said):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "more than 20000 values" in said("\n".join(lines))


def test_an_honest_alias_is_fine(load):
    text = GOOD.replace("{low: 1, high: 16, log: true}", "&both [128, 256]").replace(
        "s: [128, 256]", "s: *both"
    )
    assert load(text).experiment.search.space.max_num_tokens == [128, 256]


def test_windows_line_ends_and_a_byte_order_mark_are_kept_and_read(load):
    text = "\ufeff" + GOOD.replace("\n", "\r\n")
    loaded = load(text)
    assert loaded.text == text
    assert loaded.experiment == load(GOOD).experiment


def test_keys_and_names_are_text_whatever_they_look_like(load):
    text = GOOD.replace("  docker:", "  on:").replace("against: docker", "against: on")
    text = text.replace("  native:", "  2024:").replace("baseline: native", 'baseline: "2024"')
    assert set(load(text).experiment.arms) == {"on", "2024"}


# ---- --set ------------------------------------------------------------------------------------------------


@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1).filter(lambda tokens: tokens != 128))
def test_set_replaces_exactly_one_value(load, blocks, tokens):
    loaded = load(GOOD, f"search.blocks={blocks}", f"search.space.max_num_tokens.1= {tokens}")
    search = loaded.experiment.search
    assert (search.blocks, search.space.max_num_tokens) == (blocks, [128, tokens])
    plain = load(GOOD)
    assert loaded.overrides == (f"search.blocks={blocks}", f"search.space.max_num_tokens.1= {tokens}")
    assert loaded.text == plain.text
    assert loaded.experiment.arms == plain.experiment.arms


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search", "--set search: write it as key.path=value"),
        ("=3", "--set =3: write it as key.path=value"),
        ("search..blocks=3", "write it as key.path=value"),
        ("serch.blocks=3", "--set serch.blocks=3: serch: unknown key; did you mean search?"),
        ("search.bloks=3", "--set search.bloks=3: search.bloks: unknown key; did you mean blocks?"),
        ("limits.trial_timeout=9", "--set limits.trial_timeout=9: limits.trial_timeout: 9 is not a duration"),
        ("name.x=3", "--set name.x=3: name: is not a mapping: got 'quickstart'"),
        ("search.space.max_num_tokens.2=3", "search.space.max_num_tokens: has no item 2: got a list of 2"),
        ("search.space.max_num_tokens." + "9" * 5000 + "=3", "has no item 999"),
        ("seed=[1", "--set seed=[1: not YAML: while parsing a flow sequence"),
        ("seed={a: 1, a: 2}", "--set seed={a: 1, a: 2}: seed.a: this key is here twice"),
        ("search.space.max_batch_size={low: 1}", "--set search.space.max_batch_size={low: 1}: search.space.max_batch"),
        ("seed=\ud800", "write it as key.path=value"),
    ],
)  # fmt: skip
def test_a_bad_set_is_said_plainly(said, override, words):
    text = said(GOOD, override)
    assert words in text
    text.encode()


def test_set_reaches_a_knob_whose_key_has_dots():
    file = Path(__file__).parent.parent / "experiments" / "simulated_knobs.yaml"
    said = [
        "engine.tokens_per_block=[16, 64]",  # one more
        "engine.max_seq_len.1=4096",
        "arms.container.engine.effect.held.high=4GiB",
    ]
    found = load_experiment(file, [f"search.space.further.{each}" for each in said]).experiment
    axes = found.search.space.axes
    assert axes["engine.tokens_per_block"] == (16, 64)
    assert axes["engine.max_seq_len"] == (2048, 4096)
    assert axes["arms.container.engine.effect.held"].high == 4 << 30
    with pytest.raises(InputError, match=r"--set .*engine\.holt: unknown key"):
        load_experiment(file, ["search.space.further.engine.holt=1s"])


def test_set_makes_the_mappings_it_needs_and_the_last_one_wins(load):
    text = GOOD.partition("\nlimits:")[0]
    loaded = load(text, "limits.block_attempts=5", "limits.block_attempts=6", "arms.native.required=false")
    assert loaded.experiment.limits.block_attempts == 6
    assert loaded.resolved["limits"] == {"block_attempts": 6}
    assert not loaded.experiment.arms["native"].required


def test_set_mends_what_the_file_has_wrong(load):
    text = GOOD.replace("{low: 1, high: 16, log: true}", "{low: 99, high: 16}")
    assert load(text, "search.space.max_batch_size=4").experiment.search.space.max_batch_size == 4


# ---- anything at all --------------------------------------------------------------------------------------

_PIECES = [b"\t", b"- ", b": ", b"[", b"{", b"}", b"&a ", b"*a", b"<<", b"!!int ", b"!", b"---\n", b"|", b">", b"%",
           b"null", b"yes", b"-1", b"1e9", b"\x00", b"\xff", b"'", b'"', b"\n", b"\r", b"  ", b"#", b"kind", b".inf",
           b'"\\ud800"', b"? ", b",", b"mapping", b"list", b"value", b"\xe2\x80\xa8", b"{}", b"[]"]  # fmt: skip


@st.composite
def _mutated(draw):
    data = GOOD.encode()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 20)))
        piece = draw(st.sampled_from(_PIECES) | st.binary(max_size=4))
        lines = data.splitlines(keepends=True)
        match draw(st.sampled_from(["replace", "insert", "drop", "line", "swap"])):
            case "replace":
                data = data[:start] + piece + data[end:]
            case "insert":
                data = data[:start] + piece + data[start:]
            case "drop":
                data = data[:start] + data[end:]
            case "line" if lines:
                del lines[draw(st.integers(0, len(lines) - 1))]
                data = b"".join(lines)
            case "swap" if lines:
                one, two = draw(st.tuples(*[st.integers(0, len(lines) - 1)] * 2))
                lines[one] = lines[two]
                data = b"".join(lines)
    return data


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(_mutated())
@example(b"engine: {kind: fake, fake: {fake: 1}}")
@example(b"search: {space: {max_batch_size: {mapping: {low: 1}}}}")
@example(b'seed: !!int "0b2"')
@example(b"%TAG ! tag:x,%ff:\n---\n!a b")
@example(b"arms: {a: {environment: {kind: [1]}}, '': {engine: {'': 1}}}")
def test_any_text_is_an_experiment_or_an_input_error(load, data):
    try:
        loaded = load(data)
    except InputError as error:
        assert all(line and line.isprintable() for line in str(error).splitlines())  # noqa: PT017
    else:
        assert Experiment.model_validate(loaded.resolved) == loaded.experiment


@settings(max_examples=200)
@given(st.text(max_size=20), st.sampled_from(["", "arms.docker", "search.space.max_num_tokens.0", "engine"]))
def test_any_set_is_an_experiment_or_an_input_error(load, text, before):
    try:
        load(GOOD, before + text)
        load(GOOD, f"{before or 'question'}={text}")
    except InputError as error:
        assert str(error)  # noqa: PT017


# ---- the schema for editors -------------------------------------------------------------------------------


def test_the_schema_file_is_up_to_date():
    file = Path(__file__).parent.parent / "experiments" / "schema.json"
    assert json.loads(file.read_text()) == json_schema(), (
        "python -m spark_ray.config > experiments/schema.json"
    )


def test_the_schema_is_sound_and_accepts_a_good_file(load):
    validator = jsonschema.validators.validator_for(json_schema())
    assert validator is jsonschema.Draft202012Validator
    validator.check_schema(json_schema())
    validator(json_schema()).validate(load(GOOD).resolved)
    assert "$id" not in json_schema()


@pytest.mark.parametrize("mistake", ["samplr", "kv_cache: 2\n", "log: yes", "natve", "on: 1.5"])
def test_the_schema_refuses_what_we_refuse(mistake):
    old, new = next((old, new) for old, new, _ in MISTAKES if mistake.strip() in new)
    yaml = pytest.importorskip("yaml")
    data = yaml.load(GOOD.replace(old, new, 1), yaml.BaseLoader if mistake == "log: yes" else yaml.SafeLoader)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json_schema())


def test_defaults_in_the_schema_are_written_as_a_file_would():
    limits = json_schema()["$defs"]["Limits"]["properties"]
    assert limits["watchdog"]["default"] == "1GiB"
    for definition in json_schema()["$defs"].values():
        for field in definition.get("properties", {}).values():
            if "default" in field:
                schema = field | {"$defs": json_schema()["$defs"]}
                assert jsonschema.Draft202012Validator(schema).is_valid(field["default"]), field


def test_a_required_key_that_is_misspelt_is_one_problem(tmp_path):
    text = "name: t\nengine: {kind: fake}\nserach: {}\narms: {a: {enviroment: native}, b: {environment: native}}\n"
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_experiment(tmp_path / "x.yaml")
    lines = [line.split(": ", 1)[1] for line in caught.value.message.splitlines()]
    assert lines == [
        "serach: unknown key; did you mean search?",
        "arms.a.enviroment: unknown key; did you mean environment?",
    ]
