"""Reads and writes YAML as PyYAML's safe loader does, but plainer: what it cannot read is always a yaml.YAMLError.

A key stands once; 1e-3 is a number and 2026-01-31 is text, as in YAML 1.2; and no text costs more than it is long, by
its depth, aliases or tags.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from decoupled_pp.core.errors import shown

_EXPONENT_WITHOUT_POINT = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$")
"""A number that YAML 1.1, and so PyYAML, takes for text."""

_LONGEST = 2**18  # characters: PyYAML reads some 100,000 of them in a second
_MOST_NODES = 20_000
_DEEPEST = 50

_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_UNWANTED = {_TAG + "timestamp", _TAG + "value"}  # a run may be called 2026-01-31, and `=` is text


class _Loader(yaml.SafeLoader):
    """Refuses what would cost more than it is long, and a key that stands twice in one mapping."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self.name = "the text"  # as faults call it
        self._visited = 0

    def fetch_flow_collection_start(self, kind: type) -> None:
        """Read an opening bracket: PyYAML's time grows with the square of how many are open."""
        if self.flow_level > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep")
        super().fetch_flow_collection_start(kind)

    def get_single_node(self) -> yaml.Node | None:
        """Return the root, after a walk over all that it holds."""
        root = super().get_single_node()
        if root is not None:
            self._walk(root, 1)
        return root

    def _walk(self, node: yaml.Node, depth: int) -> None:
        """Visit a node as often as aliases show it: what is built, printed and checked later is as large."""
        self._visited += 1
        if depth > _DEEPEST:
            raise _refusal(node, f"is nested more than {_DEEPEST} levels deep, perhaps by an alias of itself")
        if self._visited > _MOST_NODES:
            raise _refusal(node, f"takes the text over {_MOST_NODES} values, aliases counted as often as they stand")
        if node.tag not in _TAGS:
            raise _refusal(node, f"has the tag {node.tag!r}, which no setting takes; leave it out")
        if isinstance(node, yaml.ScalarNode):
            if any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in node.value):
                raise _refusal(node, "holds a character that is none (NUL, or half of a pair)")
            return
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                self._walk(part, depth + 1)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # `!!int x`, or more digits than Python takes
            raise _refusal(node, f"is no {node.tag.removeprefix(_TAG)}") from error
        if isinstance(value, int) and value.bit_length() > 64:  # its digits may be too many to be shown
            raise _refusal(node, "is a number of more than 64 bits")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping, after a look at its keys; those that `<<` merges in may be overridden."""
        first: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _TAG + "merge":
                line = key.start_mark.line + 1
                if key.value in first:
                    where = f"on line {first[key.value]} and again on line {line}"
                    raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} is given {where}; keep one")
                first[key.value] = line
        return super().construct_mapping(node, deep)


def _refusal(node: yaml.Node, fault: str) -> yaml.YAMLError:
    what = shown(node.value) if isinstance(node, yaml.ScalarNode) else "a list or section"
    return yaml.constructor.ConstructorError(problem=f"{what} on line {node.start_mark.line + 1} {fault}")


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would take for a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in _UNWANTED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(_TAG + "float", _EXPONENT_WITHOUT_POINT, list("-+0123456789"))


def read_yaml(text: str | bytes) -> Any:
    """Return the value that a YAML text holds, in UTF-8 or UTF-16 if it is bytes; else raise yaml.YAMLError."""
    if len(text) > _LONGEST:
        raise yaml.YAMLError(f"it is longer than {_LONGEST} characters, which settings never are")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep") from None


def read_yaml_file(path: Path) -> Any:
    """Return the value that a file holds, or a pipe that somebody fills; raises OSError or yaml.YAMLError."""
    # Without O_NONBLOCK, to open a pipe that nobody fills would wait for ever. A device may have no end.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:  # noqa: PTH123 - Path.open takes no flags
        os.set_blocking(stream.fileno(), True)
        return read_yaml(stream.read(_LONGEST + 1))


def write_yaml(value: Any) -> str:
    """Return YAML text that `read_yaml` reads as `value`; the order of keys is kept."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
