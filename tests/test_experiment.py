"""The models: what they accept, derive and refuse, apart from any file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from spark_ray.engines import FakeEngine
from spark_ray.experiment import Experiment
from spark_ray.units import GIB, format_bytes, parse_duration_s, parse_size_bytes


def experiment(**changes):
    plain = {
        "name": "a",
        "engine": {"kind": "fake", "hold": "2s"},
        "search": {"space": {"max_batch_size": 1, "max_num_tokens": [8, 16], "memory_fraction": 0.5}},
        "arms": {"one": {"environment": "native"}, "two": {"environment": {"kind": "docker"}}},
    }
    return Experiment.model_validate(plain | changes)


def problems(**changes):
    with pytest.raises(ValidationError) as caught:
        experiment(**changes)
    return {(error["loc"], error["msg"]) for error in caught.value.errors()}


def test_a_bare_name_is_an_environment():
    assert experiment().arms["one"].environment.kind == "native"


def test_of_two_arms_the_first_is_the_baseline():
    compared = experiment().compared
    assert (compared.baseline, compared.against) == ("one", "two")


def test_a_named_contrast_wins():
    compared = experiment(contrast={"baseline": "two", "against": "one"}).compared
    assert (compared.baseline, compared.against) == ("two", "one")


def test_an_arm_changes_only_what_it_names():
    arms = {
        "one": {"environment": "native"},
        "two": {"environment": "native", "engine": {"kv_cache": "3GiB"}},
    }
    loaded = experiment(arms=arms)
    assert loaded.engine_of("one") == FakeEngine(kind="fake", hold="2s")
    assert loaded.engine_of("two") == FakeEngine(kind="fake", hold="2s", kv_cache="3GiB")


def test_problems_of_several_fields_come_together():
    arms = {"one": {"environment": "native"}, "two": {"environment": "native", "engine": {"kv_cach": "3GiB"}}}
    found = {loc for loc, _ in problems(arms=arms, seed=-1, limits={"trial_timeout": "0s"})}
    assert found == {("arms", "two", "engine", "kv_cach"), ("seed",), ("limits", "trial_timeout")}


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"name": "Bad Name"}, ("name",), "plain name"),
        ({"engine": {"kind": "embedded"}}, ("model",), "needs a model"),
        ({"model": {}}, ("model",), "exactly one of"),
        (
            {"model": {"random_llama": {"attention_heads": 8, "kv_heads": 3}}},
            ("model", "random_llama"),
            "divide",
        ),
        ({"contrast": {"baseline": "one", "against": "one"}}, ("contrast",), "itself"),
        ({"contrast": {"baseline": "one", "against": "three"}}, ("contrast", "against"), "not an arm"),
        ({"engine": {"kind": "fake", "only_in_arm": "three"}}, ("engine", "only_in_arm"), "not an arm"),
    ],
)
def test_refused(changes, where, words):
    assert [loc for loc, message in problems(**changes) if words in message] == [where]


def test_quoted_numbers_and_yes_are_not_guessed_at():
    found = {
        loc for loc, _ in problems(seed="1", search={"space": {}, "blocks": "4"}, engine={"kind": "fake"})
    }
    assert {("seed",), ("search", "blocks")} <= found


@given(st.integers(0, 10**6))
def test_sizes_round_trip(number):
    assert parse_size_bytes(f"{number}GiB") == number * GIB
    assert parse_size_bytes(f" {number} MB ") == number * 10**6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2", "with its unit"),
        (2, "with its unit"),
        (True, "with its unit"),
        ("2gib", "did you mean 2GiB"),
        ("2 g", "did you mean 2GiB"),
        ("2 stones", "use one of"),
        ("-1GiB", "with its unit"),
        ("9" * 400 + "GiB", "too large"),
    ],
)
def test_sizes_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_size_bytes(text)


@given(st.text())
def test_a_duration_is_a_number_or_a_value_error(text):
    try:
        assert parse_duration_s(text) >= 0
    except ValueError as error:
        assert "duration" in str(error)  # noqa: PT017


def test_sizes_for_people():
    assert format_bytes(parse_size_bytes("1536 MiB")) == "1.50 GiB"
