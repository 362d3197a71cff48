"""Reads a YAML file into checked, typed `Settings`, or says in one line what is wrong with it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.settings.critics import CriticSettings
from decoupled_pp.settings.rules import CriticTargetSettings
from decoupled_pp.settings.run import Settings
from decoupled_pp.settings.sections import DataSettings, ModelSettings, Section, kinds_of, section_types
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
            f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file",
            code="configuration-unreadable",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not YAML: {' '.join(str(error).split())}; correct it there", code="configuration-is-no-yaml"
        ) from None
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path} must hold a mapping of settings, not {type(raw).__name__}; write `key: value` lines",
            code="configuration-is-no-mapping",
        )
    for override in overrides:
        _apply(raw, override)
    return check_settings(raw, str(path), overrides)


def check_settings(raw: dict[str, Any], source: str = "settings", overrides: tuple[str, ...] = ()) -> Settings:
    """Check a mapping of settings.

    Args:
        raw: The settings.
        source: Where they come from, for messages.
        overrides: Overrides that are in them already, for messages.

    Raises:
        UsageError: The first fault, in one line.
    """
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        fault = usage_error(error)
        source = _source(fault, source, overrides)
        raise UsageError(f"{source}: {fault.text}", code=fault.code, key=fault.key) from None


def _source(fault: UsageError, path: str, overrides: tuple[str, ...]) -> str:
    """Return where the key of a fault was given: in the last override that the fault names, else in the file."""
    for override in reversed(overrides):
        key, _, _ = override.partition("=")
        section, _, last = key.rpartition(".")
        named = rf"(?<![\w.]){re.escape(key)}(?!\w)"
        # A check of a whole section may name its field alone.
        in_section = rf"(?<![\w.]){re.escape(last)}(?!\w)"
        if re.search(named, fault.text) or (fault.key == section and re.search(in_section, fault.text)):
            return f"--set {override}"
    return path


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"override {override!r} must look like key.sub=value", code="override-unreadable")
    *path, last = key.split(".")
    section = raw
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise UsageError(
                f"override {override!r}: {name!r} holds a value, so it has no keys; give `{name}` as a section first",
                code="override-unreadable",
            )
    try:
        section[last] = read_yaml(value)
    except yaml.YAMLError:
        raise UsageError(
            f"override {override!r}: {value!r} is not YAML; quote it or correct it", code="override-unreadable"
        ) from None


def usage_error(error: ValidationError, section: str | None = None, checked: type[Section] | None = None) -> UsageError:
    """Return the first fault of a failed check as an error of one line: where, what, which value, what would be right.

    Args:
        error: Raised by the check of `Settings`, or of a section alone.
        section: The key of that section.
        checked: The class that was checked in place of the section's own, if it takes fewer keys.
    """
    # pydantic finds all faults; a user mends one at a time, and the first often explains the others.
    faults = [_with_field(fault) for fault in error.errors()]
    paths = [[*([section] if section else []), *map(str, fault["loc"])] for fault in faults]
    keys = [_shown(path) for path in paths]
    known = sorted(checked.model_fields) if checked is not None else _keys_at(paths[0][:-1])
    found = _explained(faults[0], paths[0], keys[0], known)
    more = len(set(keys)) - 1
    if more:
        found.text += f" (and {more} more)"
    return found


def _with_field(fault: Any) -> Any:
    """Return the fault with the field that a check of the whole section found, and its value."""
    if fault["type"] != "yes_no":
        return fault
    found = fault["ctx"]
    return {**fault, "loc": (*fault["loc"], found["field"]), "input": found["value"]}


def _explained(fault: Any, path: list[str], key: str, known: list[str]) -> UsageError:
    """Return the error of one fault that pydantic found.

    Args:
        fault: From `ValidationError.errors`.
        path: Where, with the tags of unions.
        key: Where, as a user writes it.
        known: Keys that could stand there.
    """
    # Codes are ours: pydantic's types of faults are many, and change from release to release.
    kind = fault["type"]
    value = fault.get("input")
    if kind == "extra_forbidden":
        remedy = did_you_mean(path[-1], known) or f"; use one of {', '.join(known)}"
        if path[0] == "optimizer":
            remedy += "; arguments of its class go under `optimizer.arguments`"
        return UsageError(f"`{key}`: unknown key, given {value!r}{remedy}", code="unknown-setting", key=key)
    if kind == "missing":
        return UsageError(f"`{key}`: required key is missing; give it a value", code="missing-setting", key=key)
    if kind in ("union_tag_invalid", "union_tag_not_found", "model_attributes_type"):
        return _explained_kind(fault, f"{key}.kind".removeprefix("."))
    if kind == "value_error":
        return _explained_check(fault, key)
    message = fault["msg"]
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        remedy = did_you_mean(str(value), choices)
        if key == "cut":
            remedy += "; or give the layers per stage, e.g. [3, 2]"
        return UsageError(f"`{key}`: {message}, not {value!r}{remedy}", code="not-one-of-the-choices", key=key)
    return UsageError(f"`{key}`: {message}, not {value!r}", code="unusable-value", key=key)


def _explained_check(fault: Any, key: str) -> UsageError:
    """Return the error of a fault that a validator of ours raised."""
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return UsageError(cause.text, code=cause.code, key=cause.key)
    message = fault["msg"].removeprefix("Value error, ")
    text = f"`{key}`: {message}" if key else message
    return UsageError(text, code="contradictory-settings", key=key or None)


def _explained_kind(fault: Any, key: str) -> UsageError:
    value = fault.get("input")
    section = key.removesuffix(".kind")
    if isinstance(value, str):
        text = f"`{section}` is a section, not {value!r}; write {section}: {{kind: {value}}}"
        return UsageError(text, code="section-expected", key=section)
    expected = fault.get("ctx", {}).get("expected_tags", "")
    kinds = [tag.strip("' ") for tag in expected.split(",") if tag]
    given = value.get("kind") if isinstance(value, dict) else value
    remedy = f"one of {', '.join(kinds)}" if kinds else "give a section with a `kind`"
    text = f"`{key}`: {given!r} is not known{did_you_mean(str(given), kinds)}; {remedy}"
    return UsageError(text, code="unknown-kind", key=key)


def _shown(path: list[str]) -> str:
    """Return a path as a user writes it: without the tags that tell which member of a union was tried."""
    tags = _kinds()
    shown = path[:1]
    for before, part in pairwise(path):
        if not (before in _UNIONS and part in tags):
            shown.append(part)
    return ".".join(shown)


_UNIONS = {"model", "data", "critic", "critic_target", "cut"}


def _kinds() -> set[str]:
    """Return the tags that pydantic puts into the path of a fault in a union."""
    tags = {"literal['time','parameters','uniform']", "list[int]"}  # the members of `cut`
    for union in (ModelSettings, DataSettings, CriticSettings, CriticTargetSettings):
        for section in section_types(union):
            tags.update(kinds_of(section))
    return tags


def _keys_at(path: list[str]) -> list[str]:
    """Return the keys of the section at `path` (which holds a union's tag after the union's key)."""
    sections: list[type[Section]] = [Settings]
    for part in path:
        holder = next((section for section in sections if part in section.model_fields), None)
        if holder is not None:
            sections = section_types(holder.model_fields[part].annotation)
        else:  # a union's tag
            sections = [section for section in sections if part in kinds_of(section)]
    return sorted({key for section in sections for key in section.model_fields})
