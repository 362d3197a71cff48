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
from decoupled_pp.models.splitting.layers import BlockLayer, EntryLayer, ExitLayer, ForwardCall
from decoupled_pp.models.splitting.observe import Call, find_blocks, observe, parts_around
from decoupled_pp.models.splitting.split import Split
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
class _Source:
    """A model to be split."""

    model: nn.Module
    blocks: Mapping[str, nn.Module]  # its repeated blocks by name, in order
    parts: Mapping[str, nn.Module]  # its outermost parts around the blocks, by name
    call: ForwardCall


@dataclass(frozen=True)
class _Ends:
    """Parts with a state that are called before the blocks (or never: somebody has to hold them), and after them."""

    entry: dict[str, nn.Module]
    exit: dict[str, nn.Module]


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
    list_name, block_list = find_blocks(model)
    blocks: dict[str, nn.Module] = {f"{list_name}.{index}": block for index, block in enumerate(block_list)}
    call = ForwardCall(sample, dict(options or {}), output)
    source = _Source(model, blocks, parts_around(model, block_list), call)
    modes = {name: part.training for name, part in model.named_modules()}
    # Watched in eval mode: dropout would draw random numbers, and the check below compares bit for bit.
    with untouched(model, next(iter(sample.values())).device):
        model.eval()
        expected, calls = _watch(source)
        block_calls = _calls_of_blocks(blocks, calls)
        wiring = wire(block_calls, list(blocks))
        ends = _find_ends(source.parts, calls, block_calls)
        # Blocks come second: where an embedding and a head share a weight, the head gets the copy.
        untied = give_copies([ends.entry, blocks, ends.exit])
        layers = _build(source, wiring, ends)
        if not on_meta(model):
            _choose_travelling_inputs(layers, sample, expected)
    _set_modes(layers, modes)
    names = _model_names(layers, list(blocks))
    keys = {name: key for key, name in names.items()}
    layers.tied = {keys[copy]: keys[first] for copy, first in untied.items()}
    return Split(layers, names, untied)


def picked(output: Callable[[Any], Tensor], result: Any) -> Tensor:
    """Return what `output` picks from a model's result: no scalar, which would be the model's own loss."""
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
    """Run the model once and return its output and the calls of its blocks and parts, in order."""
    running = source.model
    call = source.call
    watched: dict[nn.Module, nn.Module] = {part: part for part in (*source.blocks.values(), *source.parts.values())}
    how = ""
    if on_meta(source.model):
        # Without weights nothing can be computed: each part is replaced by a stub that makes the right shapes.
        stubs = {part: MissingPartStub(part) for part in watched}
        running = copy_replacing(source.model, stubs)
        watched = {stub: part for part, stub in stubs.items()}
        how = " by its shapes alone (it is on the meta device)"
    try:
        return observe(lambda: picked(call.output, running(**call.sample, **call.options)), watched)
    except UsageError:
        raise
    except Exception as error:
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in call.sample.items())
        raise UsageError(
            f"{type(source.model).__name__} fails on {given}{how}: {first_line(error)}; give other inputs (such as a "
            "smaller `data.context`), or change its config",
            code="model-fails-on-sample",
        ) from error


def _calls_of_blocks(blocks: Mapping[str, nn.Module], calls: Sequence[Call]) -> list[Call]:
    """Return the call of every block, if they are called once each, in order."""
    names = {block: name for name, block in blocks.items()}
    found = [call for call in calls if call.module in names]
    order = [names[call.module] for call in found]
    if order != list(blocks):
        raise UsageError(
            f"the blocks are called as {', '.join(order) or 'none of them'}, and not once each in order; pass the "
            "layers as a list, or trace the model",
            code="blocks-out-of-order",
        )
    return found


def _find_ends(parts: Mapping[str, nn.Module], calls: Sequence[Call], blocks: Sequence[Call]) -> _Ends:
    """Tell which parts with parameters or buffers belong before the blocks, and which after them."""
    start = blocks[0].begin
    end = blocks[-1].end
    ends = _Ends({}, {})
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
        side = ends.exit if late else ends.entry
        side[name] = part
    return ends


def _build(source: _Source, wiring: Wiring, ends: _Ends) -> Layers:
    model = source.model
    blocks = list(source.blocks.values())
    recording: dict[nn.Module, RecordingStub] = {}
    passing: dict[nn.Module, PassThroughStub] = {}
    for (name, block), one in zip(source.blocks.items(), wiring.blocks, strict=True):
        recording[block] = RecordingStub(block, one, name, last=block is blocks[-1])
        passing[block] = PassThroughStub(block, one)
    at_entry = ends.entry.values()
    at_exit = ends.exit.values()
    stay_at_exit = {part: part for part in at_exit}

    # Tensors of the model itself, in none of its parts, stay in the entry; the exit has NaNs in their places.
    loose = list(_loose_tensors(model, [*blocks, *at_entry, *at_exit]))
    stay_at_entry = {part: part for part in at_entry} | {tensor: tensor for _, _, tensor in loose}
    first = copy_replacing(model, recording | stay_at_entry | {part: nn.Identity() for part in at_exit})
    last = copy_replacing(model, passing | stay_at_exit | {part: MissingPartStub(part) for part in at_entry})
    for name, key, tensor in loose:
        holder = last.get_submodule(name)
        # register_buffer refuses a name that is taken.
        tensors = own_parameters(holder) if key in own_parameters(holder) else own_buffers(holder)
        tensors.pop(key)
        holder.register_buffer(key, nan_like(tensor), persistent=False)

    entry_shapes = None
    exit_shapes = None
    if on_meta(model):
        stubs = {part: MissingPartStub(part) for part in source.parts.values()}
        entry_shapes = copy_replacing(model, recording | stubs)
        exit_shapes = copy_replacing(model, passing | stubs | stay_at_exit)

    layers: dict[str, nn.Module] = {}
    layers["entry"] = EntryLayer(first, entry_shapes, source.call, list(recording.values()), wiring)
    for index, block in enumerate(blocks):
        layers[f"block{index}"] = BlockLayer(block, wiring, index)
    layers["exit"] = ExitLayer(last, exit_shapes, source.call, passing[blocks[-1]])
    return Layers(layers.items())


def _loose_tensors(model: nn.Module, parts: Iterable[nn.Module]) -> Iterable[tuple[str, str, Tensor]]:
    """Yield parameters and buffers of the model that are in none of the parts: (name of the module, key, tensor)."""
    held = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    for name, module in model.named_modules():
        for key, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
            if tensor is not None and id(tensor) not in held:
                yield name, key, tensor


def _choose_travelling_inputs(layers: nn.Sequential, sample: Mapping[str, Tensor], expected: Tensor) -> None:
    """Check the layers against the model, and find out which floating inputs (images) need not travel to the exit."""
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
    prefixes = {"entry": "", "exit": ""}
    for index, name in enumerate(blocks):
        prefixes[f"block{index}"] = f"{name}."
    names = {}
    for key in layers.state_dict():
        layer, _, own = key.split(".", 2)  # "entry.model.x", "block0.block.x"
        names[key] = prefixes[layer] + own
    return names
