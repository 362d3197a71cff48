"""Carries what layers keep in their `state_dict` beside tensors (`get_extra_state`) where only tensors can go."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.structures import stored

_SUFFIX = "_extra_state"  # torch's name for it in a `state_dict`


def tensor_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module's `state_dict` as files hold them, in the module's own memory; no extra state."""
    return stored({key: value for key, value in module.state_dict().items() if not is_extra(key)})


def extra_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the extra state of all layers as bytes, by key of the `state_dict`.

    Raises:
        UsageError: It holds what torch does not load safely (`weights_only`).
    """
    return {key: _packed(key, value) for key, value in module.state_dict().items() if is_extra(key)}


def load_extra_state(module: nn.Module, packed: Mapping[str, Tensor]) -> None:
    """Give layers their extra state back."""
    parts = dict(module.named_modules(remove_duplicate=False))
    for key, content in packed.items():
        parts[_owner(key)].set_extra_state(_unpacked(content))


def exported_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the `state_dict` as tensors alone: extra state as it is if it is a tensor, else as bytes."""
    state = module.state_dict()
    return extra_state(module) | {key: value for key, value in state.items() if isinstance(value, Tensor)}


def load_exported(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `exported_state` returned into a module that has all of it."""
    own = module.state_dict()
    with torch.no_grad():
        for key, part in tensor_state(module).items():
            if key not in own:  # of a sparse tensor, which `load_state_dict` is then given as it is
                part.copy_(tensors[key])
    packed = {key for key, value in own.items() if is_extra(key) and not isinstance(value, Tensor)}
    given = {key: tensors.get(key, value) for key, value in own.items()}
    module.load_state_dict({key: _unpacked(value) if key in packed else value for key, value in given.items()})


def is_extra(key: str) -> bool:
    """Return whether a key of a `state_dict` is that of extra state."""
    return key.rpartition(".")[2] == _SUFFIX


def _owner(key: str) -> str:
    return key.removesuffix(_SUFFIX).removesuffix(".")


def _packed(key: str, value: Any) -> Tensor:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        packed = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        _unpacked(packed)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"layer {_owner(key)!r}: get_extra_state returns what cannot be saved safely ({type(value).__name__}); "
            "return tensors, numbers, text, and lists or dictionaries of them",
            code="extra-state-not-savable",
        ) from error
    return packed


def _unpacked(packed: Tensor) -> Any:
    # Never code: what is loaded may come from a stranger's file, or from a peer.
    return torch.load(io.BytesIO(packed.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
