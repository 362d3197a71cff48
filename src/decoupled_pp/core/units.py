"""Reads numbers with units as people write them: 25GB/s, 100Mbit/s, 5us, 7B, 400TFLOP/s. No torch."""

from __future__ import annotations

import re

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_COUNTS = {"": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def bandwidth(text: str) -> float:
    """Return bytes per second, from 25GB/s, 12.5GiB/s or 100Mbit/s.

    Raises:
        ValueError: The text is no bandwidth.
    """
    number, unit = _split(text)
    for ending, size in (("bit/s", 1 / 8), ("B/s", 1.0)):
        prefix = unit.removesuffix(ending)
        factor = {**_DECIMAL, **_BINARY}.get(prefix)
        if unit.endswith(ending) and factor is not None and number > 0:
            return number * factor * size
    raise ValueError(f"{text!r} is no bandwidth; write it like 25GB/s or 100Mbit/s")


def size(text: str) -> float:
    """Return bytes, from 20GiB, 80GB or 512MiB.

    Raises:
        ValueError: The text is no size.
    """
    number, unit = _split(text)
    factor = {**_DECIMAL, **_BINARY}.get(unit.removesuffix("B"))
    if not unit.endswith("B") or factor is None:
        raise ValueError(f"{text!r} is no size; write it like 20GiB or 80GB")
    return number * factor


def seconds(text: str) -> float:
    """Return seconds, from 5us, 0.2ms or 1s.

    Raises:
        ValueError: The text is no time.
    """
    return _in_units(text, _TIMES, "no time; write it like 5us or 0.2ms")


def count(text: str) -> float:
    """Return a count, from 7B, 350M or 1e9.

    Raises:
        ValueError: The text is no count.
    """
    return _in_units(text, _COUNTS, "no count; write it like 7B or 350M")


def speed(text: str) -> float:
    """Return floating-point operations per second, from 400TFLOP/s.

    Raises:
        ValueError: The text is no speed.
    """
    number, unit = _split(text)
    prefix = re.sub(r"FLOP(/s|S|s)?$", "", unit)
    if prefix == unit or prefix not in _DECIMAL or number <= 0:
        raise ValueError(f"{text!r} is no speed; write it like 400TFLOP/s")
    return number * _DECIMAL[prefix]


def whole_numbers(text: str) -> list[int]:
    """Return a comma-separated list of whole numbers, such as 8,64,512.

    Raises:
        ValueError: The text is no such list.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{text!r} is no list of whole numbers of at least 1; write it like 8,64,512")
    return numbers


def _in_units(text: str, units: dict[str, float], otherwise: str) -> float:
    number, unit = _split(text)
    if unit not in units:
        raise ValueError(f"{text!r} is {otherwise}")
    return number * units[unit]


def _split(text: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*", text)
    return (float(match[1]), match[2]) if match else (-1.0, "?")
