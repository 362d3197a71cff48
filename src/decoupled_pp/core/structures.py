"""Takes payloads apart into a text and plain tensors, for links and checkpoints, and puts them together again.

The text is JSON. A tensor is null and a constant {"is": value}. A container is a list: its class, its context (the keys
of a dictionary), its items. A sparse tensor is a list too: its layout, its size, whether it is coalesced, its parts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import coo_parts, is_container, of_items, split_container

CONSTANTS = (type(None), bool, int, float, str)
"""Types of leaves that travel by their value; a subclass, such as a number of numpy's, would arrive as another type."""

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
_STRIDED = torch.strided
_LAYOUTS = {str(layout): layout for layout in (torch.sparse_coo, *_COMPRESSED)}

_met: dict[str, type] = {}
"""Classes of containers that layers of this process have returned, by name: one made in a function is nowhere else."""


def is_flat(payload: Any) -> bool:
    """Return whether a payload is one tensor or a flat tuple of tensors, the common forms, which need no text."""
    if type(payload) is not tuple:
        return isinstance(payload, Tensor)
    for item in payload:  # noqa: SIM110 - `all` makes a generator, which for each packet and part takes as long
        if not isinstance(item, Tensor):
            return False
    return True


def is_plain(value: Any) -> bool:
    """Return whether a value is a tensor of a shape, a dtype and one piece of memory, so that it travels as it is."""
    return type(value) is Tensor and value.layout is _STRIDED and not value.is_nested


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a flat uint8 view, because not every transport knows every dtype; a copy only if it is not contiguous."""
    if not tensor.numel():  # torch cannot view some empty tensors as another dtype
        return tensor.new_empty(0, dtype=torch.uint8)
    # Conjugation and negation may be pending: bits of the tensor, not in its memory yet.
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def memory_of(tensor: Tensor) -> dict[str, Tensor]:
    """Return the strided tensors that hold the content of a tensor, in its own memory, by their role in it.

    A strided tensor is its own content, with the role "".
    """
    if tensor.layout is torch.sparse_coo:
        return dict(zip(("indices", "values"), coo_parts(tensor), strict=True))
    if tensor.layout not in _COMPRESSED:
        return {"": tensor}
    roles = (*_COMPRESSED[tensor.layout], "values")
    return {role: getattr(tensor, role)() for role in roles}


def write(tensor: Tensor, content: Tensor) -> None:
    """Copy content of the same kind into a tensor, also into a sparse one, or an expanded one, whose memory repeats."""
    for own, new in zip(memory_of(tensor).values(), memory_of(content).values(), strict=True):
        once = tuple(1 if stride == 0 else size for size, stride in zip(own.shape, own.stride(), strict=True))
        region = tuple(map(slice, once))
        own[region].copy_(new[region])


def stored(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `state_dict` as files hold it: of a sparse tensor its parts, as `name.values` and the like."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        parts = memory_of(value) if isinstance(value, Tensor) else {"": value}
        found |= {f"{name}.{role}" if role else name: part for role, part in parts.items()}
    return found


def remember_classes(payload: Any) -> None:
    """Keep the classes of a payload's containers, so that one that a peer names need never be imported."""
    if not is_container(payload):
        return
    _met[_name(type(payload))] = type(payload)
    for item in split_container(payload)[0]:
        remember_classes(item)


def dismantle(payload: Any, source: str = "a packet holds") -> tuple[str | None, tuple[Tensor, ...]]:
    """Return the structure as text (None: a plain tensor, or a flat tuple of them) and all plain tensors in order.

    Raises:
        UsageError: Something in it cannot travel; `source` begins the text, as "layer 'a' returned".
    """
    if is_plain(payload):
        return None, (payload,)
    if type(payload) is tuple and all(map(is_plain, payload)):
        return None, payload
    tensors: list[Tensor] = []
    return json.dumps(_written(payload, tensors, source)), tuple(tensors)


def form_of(payload: Any) -> tuple[bool | str, tuple[Tensor, ...]]:
    """Return form (JSON) and tensors of a payload: true stands for one tensor, false for a flat tuple, else a text."""
    text, tensors = dismantle(payload)
    return isinstance(payload, Tensor) if text is None else text, tensors


def of_form(form: bool | str, tensors: Sequence[Tensor]) -> Any:
    """Return the payload of a form and its tensors."""
    if isinstance(form, str):
        return assemble(form, tensors)
    return tensors[0] if form else tuple(tensors)


def spec_of(payload: Any) -> list[Any]:
    """Return form, shapes and dtypes of a payload, as JSON."""
    form, tensors = form_of(payload)
    return [form, *([list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for tensor in tensors)]


def zeros_of(spec: Sequence[Any]) -> Any:
    """Return a payload of zeros, as `spec_of` described one."""
    form, *tensors = spec
    return of_form(form, [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in tensors])


def assemble(text: str, tensors: Sequence[Tensor]) -> Any:
    """Return the payload that `dismantle` took apart; ValueError if the text is none of its own."""
    left = iter(tensors)
    try:
        payload = _read(json.loads(text), left)
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError, StopIteration) as error:
        raise ValueError(f"a payload cannot be put together: {error!r}") from error
    if next(left, None) is not None:
        raise ValueError("a payload has more tensors than its structure")
    return payload


def cannot_travel(source: str, value: Any, place: str, code: str = "output-cannot-travel") -> UsageError:
    """Return the error for what is neither tensor, container nor constant, at a place in a payload."""
    kind = type(value)
    remedy = "use tensors, in tuples, lists, dictionaries or named tuples, beside None, numbers and strings"
    if is_dataclass(value):
        remedy = f"call torch.export.register_dataclass({kind.__name__}) on every rank, or use a dictionary"
    where = f" at {place}" if place else ""
    return UsageError(f"{source} a {kind.__name__}{where}, which cannot travel between layers; {remedy}", code=code)


def _written(value: Any, tensors: list[Tensor], source: str) -> Any:
    if isinstance(value, Tensor):
        return _written_tensor(value, tensors, source)
    if type(value) in CONSTANTS:
        return {"is": value}
    if not is_container(value):
        raise cannot_travel(source, value, "")
    items, context = split_container(value)
    if not _is_readable(context):
        raise UsageError(
            f"{source} a {type(value).__name__} with keys that cannot travel to another stage; return a "
            "dictionary with strings as keys, or `cut` elsewhere",
            code="output-cannot-travel",
            key="cut",
        )
    return [_name(type(value)), context, *(_written(item, tensors, source) for item in items)]


def _written_tensor(tensor: Tensor, tensors: list[Tensor], source: str) -> Any:
    # A class that takes part in dispatch, like MaskedTensor, is more than its memory; others (tv_tensors) only tag it.
    is_known = tensor.layout is torch.strided or str(tensor.layout) in _LAYOUTS
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or tensor.is_nested or not is_known:
        kind = "nested tensor" if tensor.is_nested else type(tensor).__name__
        if type(tensor) is Tensor and not tensor.is_nested:
            kind = f"tensor of layout {tensor.layout}"
        raise UsageError(
            f"{source} a {kind}, which cannot travel to another stage; return plain tensors (a padded one and "
            "its mask, say), or `cut` elsewhere",
            code="output-cannot-travel",
            key="cut",
        )
    if tensor.layout is torch.strided:
        tensors.append(tensor.as_subclass(Tensor))
        return None
    parts = memory_of(tensor).values()
    tensors += parts
    is_coalesced = tensor.layout is torch.sparse_coo and tensor.is_coalesced()
    return [str(tensor.layout), [list(tensor.shape), is_coalesced], *(None for _ in parts)]


def _read(written: Any, tensors: Iterator[Tensor]) -> Any:
    if written is None:
        return next(tensors)
    if isinstance(written, dict):
        return written["is"]
    name, context, *items = written
    read = [_read(item, tensors) for item in items]
    if name in _LAYOUTS:
        shape, is_coalesced = context
        return _sparse(_LAYOUTS[name], shape, is_coalesced, read)
    return of_items(_class(name), read, context)


def _sparse(layout: torch.layout, shape: list[int], is_coalesced: bool, parts: list[Tensor]) -> Tensor:
    # Checked: an index out of range would read and write memory that is not the tensor's.
    if layout is torch.sparse_coo:
        indices, values = parts
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=is_coalesced, check_invariants=True)
    outer, inner, values = parts
    return torch.sparse_compressed_tensor(outer, inner, values, shape, layout=layout, check_invariants=True)


def _class(name: str) -> type:
    """Return a container class by name: one that was met here, or that is loaded; none is imported."""
    if name in _met:
        return _met[name]
    module, _, path = name.partition(":")
    found = reduce(getattr, path.split("."), sys.modules[module])
    if not isinstance(found, type) or not is_container(found):
        raise ValueError(f"{name} is no class of containers that this rank knows")
    return found


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _is_readable(context: Any) -> bool:
    """Return whether what a container keeps beside its items comes back from JSON as it was."""
    if type(context) is list:
        return all(_is_readable(item) for item in context)
    return type(context) in CONSTANTS
