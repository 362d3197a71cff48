"""A model of repeated blocks as a list of layers: its own code is watched once and then replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import untouched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.plans import Layers
from decoupled_pp.models.splitting.layers import Block, Entry, Exit
from decoupled_pp.models.splitting.observe import Call, find_blocks, observe, units
from decoupled_pp.models.splitting.stubs import Absent, Noting, Passing, copy_with, made_up, without_weights
from decoupled_pp.models.splitting.tying import give_copies
from decoupled_pp.models.splitting.wiring import Wiring, wire


@dataclass(frozen=True)
class Split:
    """A model as layers.

    Attributes:
        layers: `entry`, `block0` .., `exit`; they hold the model's own parameters.
        names: Key of `layers.state_dict()` -> key of the model's own.
        untied: Key of the model whose parameter was another one's and has become one of its own -> key of that one.
    """

    layers: Layers
    names: Mapping[str, str]
    untied: Mapping[str, str]


@dataclass(frozen=True)
class _Ends:
    """Which parts of the model belong before its blocks, and which after; by name."""

    before: Mapping[str, nn.Module]
    after: Mapping[str, nn.Module]
    idle: Mapping[str, nn.Module]


def split_blocks(
    model: nn.Module,
    sample: Mapping[str, Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    output: Callable[[Any], Tensor],
) -> Split:
    """Split a model whose repeated blocks lie in an `nn.ModuleList` into layers, exactly.

    The model's own `forward` is watched once on the sample. What its blocks are given besides the hidden state (masks,
    position embeddings) travels with it. The parts before and after run in copies of the model with stubs for all
    that is elsewhere. With dropout, the last layer draws other random numbers than the model in one piece.

    A model on the meta device is split by its shapes; nothing can be checked then.

    Args:
        model: Its blocks and other parts become part of the layers; where two of them share a parameter, the later
            one gets its own copy.
        sample: An input micro-batch by argument name, one that shows all that may occur (padding, too).
        options: Further arguments of its `forward`.
        output: The tensor of its result that is the network's output.

    Raises:
        UsageError: The model is not built that way (what stands in the way is named), or the layers do not give the
            same output.
    """
    options = dict(options or {})
    list_name, blocks = find_blocks(model)
    parts = units(model, blocks)
    names = [f"{list_name}.{index}" for index in range(len(blocks))]
    empty = without_weights(model)
    modes = {name: part.training for name, part in model.named_modules()}
    with untouched(model, next(iter(sample.values())).device):
        model.eval()
        found: list[Tensor] = []
        watched = {part: Absent(part) if empty else part for part in (*blocks, *parts.values())}
        stand = copy_with(model, watched, {}) if empty else model
        try:
            calls = observe(lambda: found.append(picked(output, stand(**sample, **options))), watched.values())
        except UsageError:
            raise
        except Exception as error:
            raise _fails(model, sample, error, empty=empty) from error
        originals = {id(one): part for part, one in watched.items()}
        for call in calls:
            call.module = originals[id(call.module)]
        own = _calls_of(blocks, calls, names)
        wiring = wire(own, names)
        ends = _ends(parts, calls, own)
        untied = give_copies([{**ends.before, **ends.idle}, dict(zip(names, blocks, strict=True)), ends.after])
        layers = _build(model, blocks, wiring, ends, sample=sample, options=options, output=output, names=names)
        if not empty:
            _spare_inputs(layers, sample, found[0])
    _set_modes(layers, modes)
    known = _names(layers, names)
    keys = {name: key for key, name in known.items()}
    layers.tied = {keys[copy]: keys[first] for copy, first in untied.items()}
    return Split(layers, known, untied)


def _fails(model: nn.Module, sample: Mapping[str, Tensor], error: Exception, *, empty: bool) -> UsageError:
    given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sample.items())
    reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
    where = " by its shapes alone (it is on the meta device)" if empty else ""
    return UsageError(
        f"{type(model).__name__} fails on {given}{where}: {reason}; give other "
        "inputs (a smaller data.context, say), or change its config"
    )


def picked(output: Callable[[Any], Tensor], result: Any) -> Tensor:
    """What `output` picks of a model's result.

    Raises:
        UsageError: No tensor, or a scalar: the model's own loss.
    """
    found = output(result)
    if not isinstance(found, Tensor):
        raise UsageError(
            f"output: picks {type(found).__name__} of the model's result, not a tensor; give a function that picks one"
        )
    if found.dim() == 0:
        raise UsageError(
            "output: picks a scalar of the model's result, its own loss, say; pick the logits and give the loss to the "
            "trainer: every stage computes its own"
        )
    return found


def _set_modes(layers: Layers, modes: Mapping[str, bool]) -> None:
    """Give the copies and what is around the model's own parts the training flags that the model had."""
    for end in (layers.get_submodule("entry"), layers.get_submodule("exit")):
        for name, part in end.get_submodule("model").named_modules():
            part.training = modes.get(name, part.training)
    for part in (layers, *layers):
        part.training = modes[""]


def _calls_of(blocks: nn.ModuleList, calls: Sequence[Call], names: Sequence[str]) -> list[Call]:
    """The call of every block.

    Raises:
        UsageError: They are not called once each, in order.
    """
    inside = {id(block): name for block, name in zip(blocks, names, strict=True)}
    order = [call for call in calls if id(call.module) in inside]
    if [id(call.module) for call in order] != [id(block) for block in blocks]:
        called = ", ".join(inside[id(call.module)] for call in order) or "none of them"
        raise UsageError(
            f"the blocks are called as {called}, and not once each in order; pass the layers as a list, or trace the "
            "model"
        )
    return order


def _ends(parts: Mapping[str, nn.Module], calls: Sequence[Call], blocks: Sequence[Call]) -> _Ends:
    """Which parts with parameters or buffers are called before the blocks, and which after them."""
    start, end = blocks[0].begin, blocks[-1].end
    before: dict[str, nn.Module] = {}
    after: dict[str, nn.Module] = {}
    idle: dict[str, nn.Module] = {}
    for name, part in parts.items():
        if next(part.parameters(), None) is None and next(part.buffers(), None) is None:
            continue  # without a state, each end has a copy
        when = [call.begin for call in calls if call.module is part]
        early, late = any(w < start for w in when), any(w > end for w in when)
        if (early and late) or any(start < w < end for w in when):
            where = "before and after" if early and late else "between"
            raise UsageError(
                f"{name!r} is called {where} the blocks, so it would belong to several stages; pass the layers as a "
                "list, or trace the model"
            )
        (before if early else after if late else idle)[name] = part
    return _Ends(before, after, idle)


def _build(
    model: nn.Module,
    blocks: nn.ModuleList,
    wiring: Wiring,
    ends: _Ends,
    *,
    sample: Mapping[str, Tensor],
    options: Mapping[str, Any],
    output: Callable[[Any], Tensor],
    names: Sequence[str],
) -> Layers:
    rows = list(zip(blocks, wiring.blocks, names, strict=True))
    notes = [Noting(block, one, name, last=block is blocks[-1]) for block, one, name in rows]
    passing = [Passing(block, one) for block, one, _ in rows]
    own = list(_loose(model, [*blocks, *ends.before.values(), *ends.idle.values(), *ends.after.values()]))
    first = copy_with(
        model,
        dict(zip(blocks, notes, strict=True))
        | {part: part for part in (*ends.before.values(), *ends.idle.values())}
        | {part: nn.Identity() for part in ends.after.values()},
        {tensor: tensor for _, _, tensor in own},
    )
    last = copy_with(
        model,
        dict(zip(blocks, passing, strict=True))
        | {part: part for part in ends.after.values()}
        | {part: Absent(part) for part in (*ends.before.values(), *ends.idle.values())},
        {},
    )
    for name, key, tensor in own:
        holder = last.get_submodule(name)
        (holder._parameters if key in holder._parameters else holder._buffers).pop(key)
        holder.register_buffer(key, made_up(tensor), persistent=False)
    hollow: list[nn.Module | None] = [None, None]
    if without_weights(model):
        outer = {part: Absent(part) for part in units(model, blocks).values()}
        kept = dict.fromkeys(ends.after.values())
        inner = {part: part if part in kept else stub for part, stub in outer.items()}
        hollow = [
            copy_with(model, {**dict(zip(blocks, notes, strict=True)), **outer}, {}),
            copy_with(model, {**dict(zip(blocks, passing, strict=True)), **inner}, {}),
        ]
    live = (*wiring.live, ())
    inside = [Block(block, one, live[i], live[i + 1]) for i, (block, one, _) in enumerate(rows)]
    layers: dict[str, nn.Module] = {"entry": Entry(first, notes, wiring, sample, options, hollow[0])}
    layers |= {f"block{i}": block for i, block in enumerate(inside)}
    layers["exit"] = Exit(last, passing[-1], sample, options, output, hollow[1])
    return Layers(layers.items())


def _loose(model: nn.Module, parts: Iterable[nn.Module]) -> Iterable[tuple[str, str, Tensor]]:
    """Parameters and buffers of the model that are in none of the parts: (name of the module, key, tensor)."""
    held = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in held:
                yield name, key, tensor


def _spare_inputs(layers: nn.Sequential, sample: Mapping[str, Tensor], expected: Tensor) -> None:
    """Check the layers against the model, and find out which floating inputs (images) need not travel to the end.

    Raises:
        UsageError: The output is not the model's, bit for bit.
    """
    ends = layers.get_submodule("entry"), layers.get_submodule("exit")
    inputs = tuple(sample.values())
    given = inputs[0] if len(inputs) == 1 else inputs

    def same(travels: tuple[bool, ...]) -> bool:
        for end in ends:
            end.travels = travels  # type: ignore[assignment]
        layers.eval()
        with torch.no_grad():
            return torch.equal(layers(given), expected)

    chosen = (True,) * len(inputs)
    try:
        if not same(chosen):
            raise UsageError(
                "split into layers, the model gives another output than in one piece: something passes from its "
                "beginning to its end beside the blocks; pass its layers as a list, or trace it"
            )
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"split into layers, the model fails ({type(error).__name__}: {error}): its code around the blocks needs "
            "more of them than their shapes; pass its layers as a list, or trace it"
        ) from error
    for place, tensor in enumerate(inputs):
        if not tensor.is_floating_point():  # tokens and masks are small, and an end may look for padding in them
            continue
        fewer = tuple(one and index != place for index, one in enumerate(chosen))
        try:
            chosen = fewer if same(fewer) else chosen
        except Exception:
            continue
    same(chosen)


def _names(layers: nn.Sequential, blocks: Sequence[str]) -> dict[str, str]:
    """Key of `layers.state_dict()` -> key of the model's own."""
    own = {"entry.model.": "", "exit.model.": ""}
    own |= {f"block{index}.block.": f"{name}." for index, name in enumerate(blocks)}
    return {
        key: prefix + key.removeprefix(place)
        for key in layers.state_dict()
        for place, prefix in own.items()
        if key.startswith(place)
    }
