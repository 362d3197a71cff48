"""Reads numbers with units as people write them: 25GB/s, 100Mbit/s, 5us, 7B, 400TFLOP/s. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_PREFIXES = {**_DECIMAL, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SIZES = {f"{prefix}B": factor for prefix, factor in _PREFIXES.items()}
_BITS_PER_SECOND = {f"{prefix}bit/s": factor / 8 for prefix, factor in _PREFIXES.items()}
_BANDWIDTHS = _BITS_PER_SECOND | {f"{unit}/s": factor for unit, factor in _SIZES.items()}
_SPEEDS = {f"{prefix}FLOP{per}": _DECIMAL[prefix] for prefix in _DECIMAL for per in ("", "/s", "S", "s")}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_COUNTS = {"": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def bandwidth(text: str) -> float:
    """Return bytes per second, from 25GB/s, 12.5GiB/s or 100Mbit/s; raises ValueError."""
    return _positive(text, _BANDWIDTHS, "bandwidth; write it like 25GB/s or 100Mbit/s")


def size(text: str) -> float:
    """Return bytes, from 20GiB, 80GB or 512MiB; raises ValueError."""
    return _in_units(text, _SIZES, "size; write it like 20GiB or 80GB")


def seconds(text: str) -> float:
    """Return seconds, from 5us, 0.2ms or 1s; raises ValueError."""
    return _in_units(text, _TIMES, "time; write it like 5us or 0.2ms")


def count(text: str) -> float:
    """Return a count, from 7B, 350M or 1e9; raises ValueError."""
    return _in_units(text, _COUNTS, "count; write it like 7B or 350M")


def speed(text: str) -> float:
    """Return floating-point operations per second, from 400TFLOP/s; raises ValueError."""
    return _positive(text, _SPEEDS, "speed; write it like 400TFLOP/s")


def whole_numbers(text: str) -> list[int]:
    """Return a comma-separated list of whole numbers of at least 1, such as 8,64,512; raises ValueError."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{text!r} is no list of whole numbers of at least 1; write it like 8,64,512")
    return numbers


def _positive(text: str, units: Mapping[str, float], otherwise: str) -> float:
    number = _in_units(text, units, otherwise)
    if number == 0:
        raise ValueError(f"{text!r} is no {otherwise}")
    return number


def _in_units(text: str, units: Mapping[str, float], otherwise: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*", text)
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is no {otherwise}")
    return float(match[1]) * units[match[2]]
