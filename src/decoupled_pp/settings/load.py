"""YAML -> checked, typed `Settings`, or one line that says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.settings.critics import CriticSettings
from decoupled_pp.settings.run import Settings
from decoupled_pp.settings.sections import DataSettings, ModelSettings, Section
from decoupled_pp.settings.yaml_text import read_yaml


def load_settings(path: str | Path, overrides: tuple[str, ...] = ()) -> Settings:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML) and check everything.

    Raises:
        UsageError: One line with the file, the key, the value and the remedy.
    """
    path = Path(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} must hold a mapping of settings, not {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        text = explain(error)
        raise UsageError(f"{_source(text, str(path), overrides)}: {text}") from None


def check_settings(raw: dict[str, Any], source: str = "settings") -> Settings:
    """Check a mapping of settings; `source` names it in errors."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{source}: {explain(error)}") from None


def _source(text: str, path: str, overrides: tuple[str, ...]) -> str:
    """Where the key of a fault was given: the last override whose key the text names, else the file."""
    for override in reversed(overrides):
        key, _, _ = override.partition("=")
        section, _, last = key.rpartition(".")
        inside = rf"{re.escape(section)}: .*(?<![\w.]){re.escape(last)}(?!\w)"  # "model: width 10 is not ..."
        if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", text) or re.match(inside, text):
            return f"--set {override}"
    return path


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"override {override!r} must look like key.sub=value")
    *path, last = key.split(".")
    section = raw
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise UsageError(f"override {override!r}: {name!r} is not a section")
    try:
        section[last] = read_yaml(value)
    except yaml.YAMLError:
        raise UsageError(f"override {override!r}: {value!r} is not YAML; quote it or correct it") from None


def explain(error: ValidationError, section: str | None = None) -> str:
    """The first fault of a failed check, in one line: where, what, which value, what would be right.

    Args:
        error: What the check of `Settings`, or of a section alone, raised.
        section: The key of that section.
    """
    paths = [[*([section] if section else []), *map(str, fault["loc"])] for fault in error.errors()]
    fault, path, shown = error.errors()[0], paths[0], _shown(paths[0])
    more = len({_shown(path) for path in paths}) - 1
    others = f" (and {more} more)" if more else ""
    value = fault.get("input")
    if fault["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        remedy = did_you_mean(path[-1], known) or f"; use one of {', '.join(known)}"
        return f"{shown}: unknown key, given {value!r}{remedy}{others}"
    if fault["type"] == "missing":
        return f"{shown}: required key is missing; give it a value{others}"
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [tag.strip("' ") for tag in fault.get("ctx", {}).get("expected_tags", "").split(",") if tag]
        kind = value.get("kind") if isinstance(value, dict) else value
        choice = f"; one of {', '.join(kinds)}" if kinds else "; a section with a `kind` is needed"
        return f"{shown}.kind: {kind!r} is not known{did_you_mean(str(kind), kinds)}{choice}{others}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":  # of a section as a whole; of all settings, the message begins with the key
        return f"{shown}: {message}{others}" if shown else f"{message}{others}"
    if fault["type"] == "literal_error":
        remedy = did_you_mean(str(value), re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
        remedy += "; or give the layers per stage, e.g. [3, 2]" if shown == "cut" else ""
        return f"{shown}: {message}, not {value!r}{remedy}{others}"
    return f"{shown}: {message}, not {value!r}{others}"


def _shown(path: list[str]) -> str:
    """A path as a user writes it: without the tags that tell which member of a union was tried."""
    tags = _kinds()
    return ".".join(part for at, part in enumerate(path) if not (part in tags and at > 0 and path[at - 1] in _UNIONS))


_UNIONS = {"model", "data", "critic", "cut"}


def _kinds() -> set[str]:
    tags = {"literal['time','parameters','uniform']", "list[int]"}
    for union in (ModelSettings, DataSettings, CriticSettings):
        for section in get_args(get_args(union)[0]):
            tags.update(get_args(section.model_fields["kind"].annotation))
    return tags


def _keys_at(path: list[str]) -> list[str]:
    """The keys of the section at `path` (which holds a union's tag after the union's key)."""
    sections: list[type[Section]] = [Settings]
    for part in path:
        for section in sections:
            if part in section.model_fields:
                annotation = section.model_fields[part].annotation
                candidates = [annotation, *get_args(annotation)]
                sections = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
                break
        else:
            sections = [
                s for s in sections if part in get_args(getattr(s.model_fields.get("kind"), "annotation", None))
            ]
    return sorted({key for section in sections for key in section.model_fields})
