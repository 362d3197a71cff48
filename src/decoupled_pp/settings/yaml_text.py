"""Reads and writes YAML as PyYAML's safe loader does, but a key stands once, and 1e-3 is a number as in YAML 1.2."""

from __future__ import annotations

import re
from typing import Any

import yaml

_EXPONENT_WITHOUT_POINT = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$")
"""A number that YAML 1.1, and so PyYAML, takes for text."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping (PyYAML takes the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping, after a look at its keys; those that `<<` merges in may be overridden."""
        first: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in first:
                    where = f"on line {first[key.value]} and again on line {line}"
                    raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} is given {where}; keep one")
                first[key.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would take for a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_WITHOUT_POINT, list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """Return the value that a YAML text holds; raises yaml.YAMLError, also for a key that stands twice."""
    return yaml.load(text, _Loader)


def write_yaml(value: Any) -> str:
    """Return YAML text that `read_yaml` reads as `value`; the order of keys is kept."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
