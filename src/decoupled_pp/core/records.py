"""Writes records (frozen dataclasses) as JSON and builds them from it again; no other file does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class JsonRecord(Mapping[str, Any]):
    """A frozen dataclass that is written as one JSON object.

    It is a mapping by the keys of that object as well: `record["loss"]` and `dict(record)` work beside `record.loss`.
    A field is written under its own name, unless its metadata says otherwise:

    - `key`: the name in JSON, for one that Python reserves (`from`);
    - `optional`: the key is left out where the value is None;
    - `read`: builds the value from parsed JSON, for one that is a record itself.
    """

    kind: ClassVar[str | None] = None
    """If it is set, the object begins with it under the key `kind`."""

    # Every access builds the object anew: records are small, and a cache would be one more field.
    def __getitem__(self, key: str) -> Any:
        return self._content()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content())

    def __len__(self) -> int:
        return len(self._content())

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {} if self.kind is None else {"kind": self.kind}
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or not one.metadata.get("optional"):
                content[one.metadata.get("key", one.name)] = value
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Builds the record from a parsed JSON object; keys of a later version are ignored.

        Raises:
            KeyError: A key is missing.
        """
        values = {}
        for one in fields(cls):
            key = one.metadata.get("key", one.name)
            if key not in content and one.default is not MISSING:
                continue
            value = content[key]
            read = one.metadata.get("read")
            values[one.name] = value if read is None or value is None else read(value)
        return cls(**values)


def tuple_of(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Returns a reader of a JSON list whose items `read` builds."""
    return lambda items: tuple(read(item) for item in items)


def write_json(value: Any, *, indent: int | None = None) -> str:
    """Returns JSON for files. NaN and infinity become null: strict JSON knows neither."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_message(value: Any) -> str:
    """Returns JSON for another rank: unlike in files NaN and infinity stay, so a report says the same on every rank."""
    return json.dumps(value, default=dict)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
