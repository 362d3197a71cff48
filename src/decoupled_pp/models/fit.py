"""Refuses data that a network cannot take, before any layer is built."""

from __future__ import annotations

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError

_SHAPES = {"image": "(C, H, W)", "vector": "(D,)", "tokens": "(T,)"}


def expect_form(info: DataInfo, kind: str, *forms: str) -> None:
    """Check that the data has one of `forms`, and a shape that goes with it.

    Args:
        info: What is known about the data.
        kind: The model kind, for the error text.
        forms: Accepted values of `DataInfo.form`.

    Raises:
        UsageError: The form is another, or the shape is empty or has the wrong number of dimensions.
    """
    if info.form not in forms:
        raise UsageError(
            f"model.kind {kind!r} takes {' or '.join(forms)} data, but the data are {info.form!r}; "
            "choose another model.kind or data.kind"
        )
    dimensions = {"image": 3, "vector": 1, "tokens": 1}.get(info.form)
    if not info.shape or min(info.shape) < 1 or (dimensions is not None and len(info.shape) != dimensions):
        raise UsageError(
            f"model.kind {kind!r}: {info.form!r} data of sample shape {tuple(info.shape)} do not fit; "
            f"give DataInfo.shape as {_SHAPES.get(info.form, 'at least one positive dimension')}"
        )
    if info.outputs < 1:
        raise UsageError(f"model.kind {kind!r}: DataInfo.outputs is {info.outputs}; give the number of classes (>= 1)")
