"""Reads a YAML file into checked, typed `Settings`, or says in one line what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from decoupled_pp.core.errors import UsageError, shortened, shown
from decoupled_pp.core.paths import expanded
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.settings.run import Settings
from decoupled_pp.settings.sections import Section, kinds_of, section_types
from decoupled_pp.settings.yaml_text import read_yaml, read_yaml_file


def load_settings(path: str | Path, overrides: tuple[str, ...] = ()) -> Settings:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML) and check everything, or raise UsageError."""
    path = Path(expanded(path))
    try:
        raw = read_yaml_file(path)
    except OSError as error:
        raise UsageError(
            f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file",
            code="configuration-unreadable",
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(
            f"{path} is not YAML: {' '.join(str(error).split())}; correct it there", code="configuration-is-no-yaml"
        ) from None
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path} must hold a mapping of settings, not {type(raw).__name__}; write `key: value` lines",
            code="configuration-is-no-mapping",
        )
    for override in overrides:  # before the check, so that a value and its override are checked as one
        _apply(raw, override)
    return check_settings(raw, str(path), overrides)


def check_settings(raw: dict[str, Any], source: str = "settings", overrides: tuple[str, ...] = ()) -> Settings:
    """Check a mapping of settings; UsageError names the first fault, and `source` or the override it came from."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        fault = usage_error(error)
        source = _source(fault, source, overrides)
        raise UsageError(f"{source}: {fault.text}", code=fault.code, key=fault.key) from None


def _source(fault: UsageError, path: str, overrides: tuple[str, ...]) -> str:
    """Return where the key of a fault was given: in the last override that the fault names, else in the file."""
    for override in reversed(overrides):  # the last one for a key is the one that holds
        key, _, _ = override.partition("=")
        section, _, last = key.rpartition(".")
        named = rf"(?<![\w.]){re.escape(key)}(?!\w)"
        # A check of a whole section may name its field alone.
        in_section = rf"(?<![\w.]){re.escape(last)}(?!\w)"
        if re.search(named, fault.text) or (fault.key == section and re.search(in_section, fault.text)):
            return f"--set {shortened(override)}"
    return path


def _apply(raw: dict[str, Any], override: str) -> None:
    def unreadable(remedy: str) -> UsageError:
        return UsageError(f"override {shown(override)} {remedy}", code="override-unreadable")

    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise unreadable("must look like key.sub=value")
    *path, last = key.split(".")
    section = raw
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise unreadable(f"cannot be set: {name!r} holds a value; give `{name}` as a section first")
    try:
        section[last] = read_yaml(value)
    except yaml.YAMLError as error:
        cause = getattr(error, "problem", None) or error
        raise unreadable(f"has a value that is not YAML ({cause}); quote it or correct it") from None


def usage_error(error: ValidationError, section: str | None = None, checked: type[Section] | None = None) -> UsageError:
    """Return the first fault of a failed check as an error of one line.

    The check was that of `Settings`, or of one `section` by its key, whose class (`checked`) may take fewer keys there.
    """
    # pydantic finds all faults; a user mends one at a time, and the first often explains the others.
    faults = error.errors()
    places = [_place(fault, section) for fault in faults]
    key, known = places[0]
    found = _explained(faults[0], key, sorted(checked.model_fields) if checked is not None else known)
    more = len({place for place, _ in places}) - 1
    if more:
        found.text += f" (and {more} more)"
    return found


def _place(fault: Any, section: str | None) -> tuple[str, list[str]]:
    """Return the key of a fault as a user writes it, and the keys that could stand beside it."""
    named = [shortened(str(part)) for part in fault["loc"] if not isinstance(part, int)]  # numbers count in lists
    path = [*([section] if section else []), *named]
    if fault["type"] == "yes_no":  # a check of the whole section found it
        path.append(fault["ctx"]["field"])
    shown: list[str] = []
    beside: list[type[Section]] = []
    here: list[type[Section]] = [Settings]
    for part in path:
        # pydantic puts the tag of the member that was tried behind the key of a union.
        tagged = [member for member in here if part in kinds_of(member)]
        if len(here) > 1 and tagged:
            here = tagged
        elif part not in _CUT_TAGS:
            shown.append(part)
            beside = here
            field = next((member.model_fields[part] for member in here if part in member.model_fields), None)
            here = section_types(field.annotation) if field is not None else []
    return ".".join(shown), sorted({key for member in beside for key in member.model_fields})


_CUT_TAGS = ("literal['time','parameters','uniform']", "list[int]")
"""pydantic's names of the members of `cut`, a union without a `kind`."""


def _explained(fault: Any, key: str, known: list[str]) -> UsageError:
    """Return the error of one of `ValidationError.errors` at `key`, where the `known` keys could stand."""
    # Codes are ours: pydantic's types of faults are many, and change from release to release.
    kind = fault["type"]
    value = fault["ctx"]["value"] if kind == "yes_no" else fault.get("input")
    section, _, last = key.rpartition(".")
    if kind == "extra_forbidden":
        remedy = did_you_mean(last, known) or f"; use one of {', '.join(known)}"
        if section == "optimizer":
            remedy += "; arguments of its class go under `optimizer.arguments`"
        return UsageError(f"`{key}`: unknown key, given {shown(value)}{remedy}", code="unknown-setting", key=key)
    if kind == "missing":
        return UsageError(f"`{key}`: required key is missing; give it a value", code="missing-setting", key=key)
    # A union takes its kind from `kind`; it is the kind that is wrong, not the whole section.
    if kind in ("union_tag_invalid", "union_tag_not_found", "model_attributes_type", "model_type"):
        return _explained_kind(fault, f"{key}.kind".removeprefix("."))
    if kind == "value_error":
        return _explained_check(fault, key)
    message = fault["msg"]
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        remedy = did_you_mean(shown(value).strip("'"), choices)
        if key == "cut":
            remedy += "; or give the layers per stage, e.g. [3, 2]"
        return UsageError(f"`{key}`: {message}, not {shown(value)}{remedy}", code="not-one-of-the-choices", key=key)
    remedy = "; quote it" if kind == "string_type" and isinstance(value, int | float) else ""
    return UsageError(f"`{key}`: {message}, not {shown(value)}{remedy}", code="unusable-value", key=key)


def _explained_check(fault: Any, key: str) -> UsageError:
    """Return the error of a fault that a validator of ours raised."""
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UsageError) and cause.key is not None:  # it says all itself
        return UsageError(cause.text, code=cause.code, key=cause.key)
    message = fault["msg"].removeprefix("Value error, ")
    text = f"`{key}`: {message}" if key else message
    code = cause.code if isinstance(cause, UsageError) else "contradictory-settings"
    return UsageError(text, code=code, key=key or None)


def _explained_kind(fault: Any, key: str) -> UsageError:
    value = fault.get("input")
    section = key.removesuffix(".kind")
    if fault["type"] == "model_type":  # pydantic would name a class of ours
        text = f"`{section}` is one section, not {shown(value)}; write its keys, as docs/configuration.md has them"
        return UsageError(text, code="section-expected", key=section)
    if isinstance(value, str):
        text = f"`{section}` is a section, not {shown(value)}; write {section}: {{kind: {shown(value)[1:-1]}}}"
        return UsageError(text, code="section-expected", key=section)
    expected = fault.get("ctx", {}).get("expected_tags", "")
    kinds = [tag.strip("' ") for tag in expected.split(",") if tag]
    given = value.get("kind") if isinstance(value, dict) else value
    remedy = f"one of {', '.join(kinds)}" if kinds else "give a section with a `kind`"
    meant = did_you_mean(shown(given).strip("'"), kinds)
    text = f"`{key}`: {shown(given)} is not known{meant}; {remedy}"
    return UsageError(text, code="unknown-kind", key=key)
