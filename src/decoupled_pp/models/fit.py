"""Refuses data that a network cannot take, before any layer is built."""

from __future__ import annotations

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError

_SHAPES = {"image": "(C, H, W)", "vector": "(D,)", "tokens": "(T,)"}
_DIMENSIONS = {"image": 3, "vector": 1, "tokens": 1}


def expect_form(info: DataInfo, kind: str, *forms: str) -> None:
    """Check that the data that a model of `kind` gets have one of `forms`, and a shape that goes with it."""
    if info.form not in forms:
        raise UsageError(
            f"`model.kind` {kind!r} takes {' or '.join(forms)} data, but the data are {info.form!r}; "
            "choose another `model.kind` or `data.kind`",
            code="model-data-mismatch",
            key="model.kind",
        )
    dimensions = _DIMENSIONS.get(info.form, len(info.shape))
    fault = None
    if not info.shape or min(info.shape) < 1 or len(info.shape) != dimensions:
        expected = _SHAPES.get(info.form, "at least one positive dimension")
        fault = f"has shape {tuple(info.shape)} for {info.form!r} data; give {expected}"
    elif info.outputs < 1:
        fault = f"has outputs {info.outputs}; give the number of classes (>= 1)"
    if fault is not None:
        raise UsageError(f"the DataInfo of the data {fault}", code="bad-data-info", key="data.kind")
