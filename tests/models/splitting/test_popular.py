"""The 30 most used models are split as docs/popular-models.md says, where their libraries are installed."""

import importlib.util
import re

import pytest
from popular import MODELS, PAGE, allow_torchvision_without_operators, row

ROWS = PAGE.read_text(encoding="utf-8").splitlines()[-len(MODELS) :]
SLOW = {"torchvision", "timm"}


def key(line):
    """Return library, name, way and layers: all but the seconds."""
    return re.findall(r"[^|]+", line)[:4]


def cases():
    for one, line in zip(MODELS, ROWS, strict=True):
        library = one[0].partition(".")[0]
        marks = [pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")]
        if library in SLOW:
            marks.append(pytest.mark.slow)
        yield pytest.param(one, line, marks=marks, id=f"{one[0]}-{one[1]}")


@pytest.mark.parametrize(("model", "line"), list(cases()))
def test_is_split_as_the_page_says(model, line):
    if model[0] in SLOW:
        allow_torchvision_without_operators()
    assert key(row(*model)) == key(line)
