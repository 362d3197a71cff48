"""Splits a model of repeated blocks into layers: its own code is watched once and then replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import on_meta, untouched
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.plans import Layers
from decoupled_pp.core.torch_private import own_buffers, own_parameters
from decoupled_pp.models.splitting.layers import BlockLayer, EntryLayer, ExitLayer
from decoupled_pp.models.splitting.observe import Call, find_blocks, observe, parts_around
from decoupled_pp.models.splitting.stubs import (
    MissingPartStub,
    PassThroughStub,
    RecordingStub,
    copy_replacing,
    nan_like,
)
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
class _Source:
    """A model to be split, and how it is called.

    Attributes:
        model: The model.
        blocks: Its repeated blocks.
        names: Their names.
        parts: Its outermost parts around the blocks, by name.
        sample: An input micro-batch by argument name.
        options: Further arguments of its `forward`.
        output: Picks the network's output from its result.
    """

    model: nn.Module
    blocks: nn.ModuleList
    names: Sequence[str]
    parts: Mapping[str, nn.Module]
    sample: Mapping[str, Tensor]
    options: Mapping[str, Any]
    output: Callable[[Any], Tensor]


@dataclass(frozen=True)
class _Ends:
    """Parts of the model with a state, by name: called before the blocks, called after them, or never called."""

    before: Mapping[str, nn.Module]
    after: Mapping[str, nn.Module]
    idle: Mapping[str, nn.Module]

    @property
    def at_entry(self) -> dict[str, nn.Module]:
        """Return the parts that belong to the entry: somebody has to hold those that are never called."""
        return {**self.before, **self.idle}


def split_blocks(
    model: nn.Module,
    sample: Mapping[str, Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    output: Callable[[Any], Tensor],
) -> Split:
    """Split a model whose repeated blocks lie in an `nn.ModuleList` into layers, exactly.

    The model's own `forward` is watched once on the sample. What its blocks are given besides the hidden state (masks,
    position embeddings) travels with it. The parts before and after the blocks run in copies of the model with stubs
    for all that is elsewhere. With dropout, the last layer draws other random numbers than the model in one piece.

    A model on the meta device is split by its shapes; nothing can be checked then.

    Args:
        model: Its blocks and other parts become part of the layers; where two of them share a parameter, the later
            one gets its own copy.
        sample: An input micro-batch by argument name, one that shows all that may occur (padding, too).
        options: Further arguments of its `forward`.
        output: Picks the network's output from its result.

    Raises:
        UsageError: The model is not built that way (the text names what stands in the way), or the layers do not give
            the same output.
    """
    list_name, blocks = find_blocks(model)
    names = [f"{list_name}.{index}" for index in range(len(blocks))]
    source = _Source(model, blocks, names, parts_around(model, blocks), sample, dict(options or {}), output)
    modes = {name: part.training for name, part in model.named_modules()}
    # Watched in eval mode: dropout would draw random numbers, and the check below compares bit for bit.
    with untouched(model, next(iter(sample.values())).device):
        model.eval()
        expected, calls = _watch(source)
        block_calls = _calls_of_blocks(source, calls)
        wiring = wire(block_calls, names)
        ends = _find_ends(source.parts, calls, block_calls)
        # Blocks come second: where an embedding and a head share a weight, the head gets the copy.
        untied = give_copies([ends.at_entry, dict(zip(names, blocks, strict=True)), ends.after])
        layers = _build(source, wiring, ends)
        if not on_meta(model):
            _choose_travelling_inputs(layers, sample, expected)
    _set_modes(layers, modes)
    known = _model_names(layers, names)
    keys = {name: key for key, name in known.items()}
    layers.tied = {keys[copy]: keys[first] for copy, first in untied.items()}
    return Split(layers, known, untied)


def picked(output: Callable[[Any], Tensor], result: Any) -> Tensor:
    """Return what `output` picks from a model's result.

    Raises:
        UsageError: It is no tensor, or a scalar, which would be the model's own loss.
    """
    found = output(result)
    if not isinstance(found, Tensor):
        raise UsageError(
            f"output: picks {type(found).__name__} of the model's result, not a tensor; give a function that picks one",
            code="output-not-a-tensor",
        )
    if found.dim() == 0:
        raise UsageError(
            "output: picks a scalar of the model's result, such as its own loss; pick the logits and give the loss to "
            "the trainer: every stage computes its own",
            code="output-not-a-tensor",
        )
    return found


def _watch(source: _Source) -> tuple[Tensor, list[Call]]:
    """Run the model once and return its output and the calls of its blocks and parts, in order.

    Raises:
        UsageError: The model fails on the sample.
    """
    model = source.model
    outputs: list[Tensor] = []
    watched: dict[nn.Module, nn.Module] = {part: part for part in (*source.blocks, *source.parts.values())}
    running = model
    empty = on_meta(model)
    if empty:
        # Without weights nothing can be computed: each part is replaced by a stub that makes the right shapes.
        watched = {part: MissingPartStub(part) for part in watched}
        running = copy_replacing(model, watched, {})
    try:
        calls = observe(
            lambda: outputs.append(picked(source.output, running(**source.sample, **source.options))), watched.values()
        )
    except UsageError:
        raise
    except Exception as error:
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in source.sample.items())
        how = " by its shapes alone (it is on the meta device)" if empty else ""
        raise UsageError(
            f"{type(model).__name__} fails on {given}{how}: {first_line(error)}; give other inputs (such as a smaller "
            "`data.context`), or change its config",
            code="model-fails-on-sample",
        ) from error
    originals = {id(stub): part for part, stub in watched.items()}
    for call in calls:
        call.module = originals[id(call.module)]
    return outputs[0], calls


def _calls_of_blocks(source: _Source, calls: Sequence[Call]) -> list[Call]:
    """Return the call of every block.

    Raises:
        UsageError: The blocks are not called once each, in order.
    """
    names = {id(block): name for block, name in zip(source.blocks, source.names, strict=True)}
    order = [call for call in calls if id(call.module) in names]
    if [id(call.module) for call in order] != [id(block) for block in source.blocks]:
        called = ", ".join(names[id(call.module)] for call in order) or "none of them"
        raise UsageError(
            f"the blocks are called as {called}, and not once each in order; pass the layers as a list, or trace the "
            "model",
            code="blocks-out-of-order",
        )
    return order


def _find_ends(parts: Mapping[str, nn.Module], calls: Sequence[Call], blocks: Sequence[Call]) -> _Ends:
    """Tell which parts with parameters or buffers are called before the blocks, and which after them.

    Raises:
        UsageError: A part is called on both sides, or between blocks.
    """
    start = blocks[0].begin
    end = blocks[-1].end
    before: dict[str, nn.Module] = {}
    after: dict[str, nn.Module] = {}
    idle: dict[str, nn.Module] = {}
    for name, part in parts.items():
        if next(part.parameters(), None) is None and next(part.buffers(), None) is None:
            continue  # a part without a state is copied to both ends
        times = [call.begin for call in calls if call.module is part]
        early = any(time < start for time in times)
        late = any(time > end for time in times)
        if (early and late) or any(start < time < end for time in times):
            where = "before and after" if early and late else "between"
            raise UsageError(
                f"{name!r} is called {where} the blocks, so it would belong to several stages; pass the layers as a "
                "list, or trace the model",
                code="part-in-several-stages",
            )
        if early:
            before[name] = part
        elif late:
            after[name] = part
        else:
            idle[name] = part
    return _Ends(before, after, idle)


def _build(source: _Source, wiring: Wiring, ends: _Ends) -> Layers:
    model, blocks = source.model, list(source.blocks)
    recording = [
        RecordingStub(block, one, name, last=block is blocks[-1])
        for block, one, name in zip(blocks, wiring.blocks, source.names, strict=True)
    ]
    passing = [PassThroughStub(block, one) for block, one in zip(blocks, wiring.blocks, strict=True)]
    recording_of: dict[nn.Module, nn.Module] = dict(zip(blocks, recording, strict=True))
    passing_of: dict[nn.Module, nn.Module] = dict(zip(blocks, passing, strict=True))
    at_entry = list(ends.at_entry.values())
    at_exit = list(ends.after.values())

    # Tensors of the model itself, in none of its parts, stay in the entry; the exit has NaNs in their places.
    loose = list(_loose_tensors(model, [*blocks, *at_entry, *at_exit]))
    first = copy_replacing(
        model,
        recording_of | {part: part for part in at_entry} | {part: nn.Identity() for part in at_exit},
        {tensor: tensor for _, _, tensor in loose},
    )
    last = copy_replacing(
        model,
        passing_of | {part: part for part in at_exit} | {part: MissingPartStub(part) for part in at_entry},
        {},
    )
    for name, key, tensor in loose:
        holder = last.get_submodule(name)
        # register_buffer refuses a name that is taken.
        tensors = own_parameters(holder) if key in own_parameters(holder) else own_buffers(holder)
        tensors.pop(key)
        holder.register_buffer(key, nan_like(tensor), persistent=False)

    entry_shapes = None
    exit_shapes = None
    if on_meta(model):
        stubs: dict[nn.Module, nn.Module] = {part: MissingPartStub(part) for part in source.parts.values()}
        entry_shapes = copy_replacing(model, recording_of | stubs, {})
        exit_shapes = copy_replacing(model, passing_of | stubs | {part: part for part in at_exit}, {})

    layers: dict[str, nn.Module] = {}
    layers["entry"] = EntryLayer(first, recording, wiring, source.sample, source.options, entry_shapes)
    live = (*wiring.live, ())
    for index, (block, one) in enumerate(zip(blocks, wiring.blocks, strict=True)):
        layers[f"block{index}"] = BlockLayer(block, one, live[index], live[index + 1])
    layers["exit"] = ExitLayer(last, passing[-1], source.sample, source.options, source.output, exit_shapes)
    return Layers(layers.items())


def _loose_tensors(model: nn.Module, parts: Iterable[nn.Module]) -> Iterable[tuple[str, str, Tensor]]:
    """Yield parameters and buffers of the model that are in none of the parts: (name of the module, key, tensor)."""
    held = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    for name, module in model.named_modules():
        for key, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
            if tensor is not None and id(tensor) not in held:
                yield name, key, tensor


def _choose_travelling_inputs(layers: nn.Sequential, sample: Mapping[str, Tensor], expected: Tensor) -> None:
    """Check the layers against the model, and find out which floating inputs (images) need not travel to the exit.

    Raises:
        UsageError: The output is not the model's, bit for bit.
    """
    ends = layers.get_submodule("entry"), layers.get_submodule("exit")
    inputs = tuple(sample.values())
    given = inputs[0] if len(inputs) == 1 else inputs

    def is_exact(travels: tuple[bool, ...]) -> bool:
        for end in ends:
            end.travels = travels  # type: ignore[assignment]
        layers.eval()
        with torch.no_grad():
            return torch.equal(layers(given), expected)

    remedy = "pass its layers as a list, or trace it"
    chosen = (True,) * len(inputs)
    try:
        exact = is_exact(chosen)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"split into layers, the model fails ({type(error).__name__}: {error}): its code around the blocks needs "
            f"more of them than their shapes; {remedy}",
            code="split-changes-output",
        ) from error
    if not exact:
        raise UsageError(
            "split into layers, the model gives another output than in one piece: something passes from its beginning "
            f"to its end beside the blocks; {remedy}",
            code="split-changes-output",
        )
    # Try without each floating input in turn: its NaNs would show in the output if the exit used its values.
    for place, tensor in enumerate(inputs):
        if not tensor.is_floating_point():  # tokens and masks are small, and an end may look for padding in them
            continue
        fewer = tuple(travels and index != place for index, travels in enumerate(chosen))
        try:
            if is_exact(fewer):
                chosen = fewer
        except Exception:  # the exit needs the values of this input
            continue
    is_exact(chosen)


def _set_modes(layers: Layers, modes: Mapping[str, bool]) -> None:
    """Give the copies and the wrappers around the model's own parts the training flags that the model had."""
    for end in (layers.get_submodule("entry"), layers.get_submodule("exit")):
        for name, part in end.get_submodule("model").named_modules():
            part.training = modes.get(name, part.training)
    for part in (layers, *layers):
        part.training = modes[""]


def _model_names(layers: nn.Sequential, blocks: Sequence[str]) -> dict[str, str]:
    """Return key of `layers.state_dict()` -> key of the model's own."""
    prefixes = {"entry.model.": "", "exit.model.": ""}
    for index, name in enumerate(blocks):
        prefixes[f"block{index}.block."] = f"{name}."
    names = {}
    for key in layers.state_dict():
        for prefix, own in prefixes.items():
            if key.startswith(prefix):
                names[key] = own + key.removeprefix(prefix)
    return names
