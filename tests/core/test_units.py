"""Numbers with units are read as they are meant, and nothing else is."""

import pytest

from decoupled_pp.core import units


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.bandwidth, "25GB/s", 25e9),
        (units.bandwidth, "100Mbit/s", 12.5e6),
        (units.bandwidth, "1.5GiB/s", 1.5 * 2**30),
        (units.seconds, "5us", 5e-6),
        (units.seconds, "0.2ms", 2e-4),
        (units.seconds, "1s", 1.0),
        (units.count, "7B", 7e9),
        (units.count, "1e9", 1e9),
        (units.speed, "400TFLOP/s", 4e14),
        (units.speed, "1 PFLOP/s", 1e15),
    ],
)
def test_numbers(read, text, value):
    assert read(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (units.bandwidth, "25"),
        (units.bandwidth, "25GB"),
        (units.bandwidth, "0GB/s"),
        (units.bandwidth, "-1GB/s"),
        (units.bandwidth, "fastB/s"),
        (units.seconds, "5"),
        (units.seconds, "-5us"),
        (units.count, "7Q"),
        (units.speed, "400T"),
        (units.whole_numbers, "8,x"),
        (units.whole_numbers, "8,0"),
        (units.whole_numbers, ""),
    ],
)
def test_no_numbers(read, text):
    with pytest.raises(ValueError, match="write it like"):
        read(text)
