"""YAML text: numbers as YAML 1.2 writes them, keys once, and every value comes back as it was."""

import pytest
import yaml

from decoupled_pp.settings.yaml_text import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-2", 0.01), ("-1E+3", -1000.0), ("1.5e-2", 0.015), ("'1e-2'", "1e-2"), ("1e", "1e"), ("e3", "e3"), ("12", 12)],
)
def test_numbers_need_no_point_before_the_exponent(text, value):
    found = read_yaml(text)
    assert found == value and type(found) is type(value)


def test_a_key_stands_once_in_a_mapping():
    assert read_yaml("a: {x: 1}\nb: {x: 2}") == {"a": {"x": 1}, "b": {"x": 2}}
    with pytest.raises(yaml.YAMLError, match="key 'stages' is given on line 1 and again on line 3; keep one"):
        read_yaml("stages: 4\nname: run\nstages: 1")


def test_what_a_merged_mapping_gives_may_be_overridden():
    assert read_yaml("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}")["b"] == {"x": 2, "y": 1}


@pytest.mark.parametrize("value", ["1e5", "1e-2", 1e-05, 1e22, "yes", None, [True, "a: b"], {"b": 1, "a": 2}])
def test_a_value_comes_back_as_it_was(value):
    assert read_yaml(write_yaml({"key": value})) == {"key": value}
    assert list(read_yaml(write_yaml({"b": 1, "a": 2}))) == ["b", "a"]
