"""A network as a list of layers: checks that it is one, and learns the shapes from one pass through it."""

from __future__ import annotations

from itertools import chain
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from decoupled_pp.core.criterion import Criterion
from decoupled_pp.core.device import kept_modes, untouched
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.gradients import WithoutGradients
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Loss, Payload, as_payload, as_tuple, check_payload, first_tensor, map_payload
from decoupled_pp.core.torch_private import child_modules, compile_in_place, compiled_module, has_hooks

# What a layer raises when its input does not fit.
LAYER_FAULTS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)


def as_sequential(layers: object) -> nn.Sequential:
    """Return the network (an `nn.Sequential`, or a list or tuple of modules) as an `nn.Sequential` of its layers."""
    if isinstance(layers, nn.Sequential):
        if not is_plain_sequential(layers):
            raise UsageError(
                f"{type(layers).__name__} is an nn.Sequential with a forward of its own, so its children are not its "
                "layers; pass the layers as a list",
                code="not-a-layer-list",
            )
        refuse_hooks(layers)
        module = layers
    elif isinstance(layers, list | tuple):
        for index, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise UsageError(
                    f"layer {index} is of type {type(layer).__name__}; every layer must be an nn.Module",
                    code="layer-not-a-module",
                )
        module = nn.Sequential(*layers)
    elif isinstance(layers, nn.Module) and compiled_module(layers) is not None:
        raise UsageError(
            "the network is compiled as a whole, and stages are parts of it; pass it as it was before torch.compile, "
            "and set `training.compile`",
            code="not-a-layer-list",
            key="training.compile",
        )
    else:
        raise UsageError(
            f"a network must be an nn.Sequential or a list of layers, not {_kind(layers)}; list its layers in "
            "the order in which they run, or pass the .layers that dpp.split_transformers, split_blocks or "
            "split_traced return",
            code="not-a-layer-list",
        )
    _refuse_duplicates(module)
    _unwrap_compiled(module)
    return module


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def is_plain_sequential(module: nn.Module) -> bool:
    """Return whether a module runs its children one after another: a subclass may have a forward of its own."""
    if not isinstance(module, nn.Sequential):
        return False
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def refuse_hooks(network: nn.Sequential) -> None:
    """Raise UsageError if hooks wait for calls of the network as a whole, which no stage makes."""
    if has_hooks(network):
        raise UsageError(
            f"the {type(network).__name__} has hooks of its own, and stages call its layers, not the whole; register "
            "them on its first layer (inputs) or its last one (outputs)",
            code="hooks-on-the-network",
        )


def _unwrap_compiled(network: nn.Module) -> None:
    """Put layers in the place of what `torch.compile` wrapped around them; they stay compiled and keep their names."""
    for part in list(network.modules()):
        for name, child in child_modules(part).items():
            if child is not None and compiled_module(child) is not None:
                child_modules(part)[name] = compile_in_place(child)


def missing_layer(name: str) -> UsageError:
    """Return the error for a layer that is None."""
    return UsageError(f"layer {name!r} is None; leave it out or use nn.Identity()", code="layer-not-a-module")


def _refuse_duplicates(module: nn.Sequential) -> None:
    if not len(module):
        raise UsageError("the network has no layers; pass at least one", code="too-few-layers")
    seen: dict[int, str] = {}
    for name, layer in child_modules(module).items():  # named_children() would skip the second one silently
        if layer is None:
            raise missing_layer(name)
        if id(layer) in seen:
            raise UsageError(
                f"layers {seen[id(layer)]!r} and {name!r} are one {type(layer).__name__} object, used twice; "
                "make a second one (copy.deepcopy)",
                code="layer-used-twice",
            )
        seen[id(layer)] = name


def describe_layer(name: str, layer: nn.Module) -> str:
    """Return how errors call a layer."""
    return f"layer {name!r} ({type(layer).__name__})"


def describe(payload: Payload) -> str:
    """Return shapes and dtypes of a payload, for an error text."""
    return ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in as_tuple(payload))


def misfit(name: str, module: nn.Module, given: Payload, error: Exception) -> UsageError:
    """Return the error for a layer or critic that fails on its input."""
    return UsageError(
        f"{name} ({type(module).__name__}) does not fit its input {describe(given)}: {first_line(error)}; "
        "correct it, or the layer that returns its input",
        code="layer-shape-mismatch",
    )


def trace(module: nn.Sequential, sample: Payload) -> tuple[list[Payload], Tensor]:
    """Return the input of every layer and the network's output, for a sample, in eval mode and without gradients.

    Train/eval flags, buffers and random generators are as before afterwards.
    """
    sample = as_payload(sample, "the sample has")
    with untouched(module, first_tensor(sample).device):
        *hiddens, current = _run(module.eval(), sample)
    if not isinstance(current, Tensor) or not current.is_floating_point():
        raise UsageError(
            f"the network returned {describe(current)}; its last layer must return one floating tensor",
            code="output-not-a-tensor",
        )
    return hiddens, current


def make_lazy_weights(module: nn.Sequential, sample: Payload | None) -> None:
    """Give the layers the weights that they make when they first see data (`nn.LazyLinear`)."""
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if not lazy:
        return
    if sample is None:
        raise UsageError(
            f"{lazy[0]!r} has no shape before its layer has seen data; pass a sample, or run the network once",
            code="plan-without-sample",
        )
    with kept_modes(module):
        _run(module.eval(), sample)


def _run(module: nn.Sequential, sample: Payload) -> list[Payload]:
    """Return the input of every layer, and the result of the last."""
    values = [as_payload(sample, "the sample has")]
    for name, layer in module.named_children():
        try:
            result = WithoutGradients()(layer, copy_for(layer, values[-1]))
        except UsageError:
            raise
        except LAYER_FAULTS as error:
            raise misfit(f"layer {name!r}", layer, values[-1], error) from error
        values.append(check_payload(result, f"{describe_layer(name, layer)} returned"))
    return values


def copy_for(layer: nn.Module, payload: Payload) -> Payload:
    """Return a copy on the layer's device; a copy, because the layer may work in place."""
    own = next(chain(layer.parameters(), layer.buffers()), None)
    return map_payload(lambda tensor: tensor.to(tensor.device if own is None else own.device, copy=True), payload)


def critic_context(
    module: nn.Sequential,
    hiddens: list[Payload],
    output: Tensor,
    loss: Loss | None = None,
    *,
    boundary: int,
    stage: int,
    stages: int,
) -> CriticContext:
    """Return what the critic of one stage may look at, from the results of `trace`."""
    return CriticContext(
        stage=stage,
        stages=stages,
        boundary=boundary,
        hidden=map_payload(zeros_if_meta, hiddens[boundary]),
        output=zeros_if_meta(output),
        layers=tuple(module.children()),
        hiddens=tuple(hiddens[boundary:]),
        sample=map_payload(zeros_if_meta, hiddens[0]),
        class_dim=loss.class_dim if isinstance(loss, Criterion) else None,
    )


# Zeros in use, by shape and dtype: the contexts of many places share them, so memory does not grow with places.
_zeros: WeakValueDictionary[object, Tensor] = WeakValueDictionary()


def zeros_if_meta(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or, for one on the meta device, shared CPU zeros: do not change them in place."""
    if not tensor.is_meta:
        return tensor
    key = tensor.shape, tensor.dtype
    zeros = _zeros.get(key)
    if zeros is None:
        zeros = torch.zeros_like(tensor, device="cpu")
        _zeros[key] = zeros
    return zeros
