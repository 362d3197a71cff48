"""Splits a model of repeated blocks into layers: its own code is watched once and then replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from decoupled_pp.core.device import on_meta, untouched
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.plans import Layers
from decoupled_pp.core.torch_private import slow_attention
from decoupled_pp.models.splitting.arguments import check_calls, check_model, check_sample
from decoupled_pp.models.splitting.call import (
    ForwardCall,
    forward_call,
    network_output,
    of_any_size,
)
from decoupled_pp.models.splitting.exact import make_exact, refuse_other_output
from decoupled_pp.models.splitting.groups import with_blocks_of_groups
from decoupled_pp.models.splitting.layers import BlockLayer, CarriedResult, EntryLayer, ExitLayer, Travel
from decoupled_pp.models.splitting.loose import LooseTensor, loose_tensors
from decoupled_pp.models.splitting.observe import Call, find_blocks, observe, parts_around
from decoupled_pp.models.splitting.split import Split
from decoupled_pp.models.splitting.stubs import (
    BeyondBlocksStub,
    MissingPartStub,
    PassThroughStub,
    RecordingStub,
    copy_replacing,
)
from decoupled_pp.models.splitting.tying import give_copies, tied_again_if_it_fails
from decoupled_pp.models.splitting.wiring import TENSOR, Wiring, wire


@dataclass(frozen=True)
class _Source:
    """A model to be split."""

    model: nn.Module
    blocks: Mapping[str, nn.Module]  # its repeated blocks by name; once watched, with what runs between them, in order
    parts: Mapping[str, nn.Module]  # its outermost parts around the blocks, by name
    call: ForwardCall
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Ends:
    """Parts that are called before the blocks (or hold a state and are never called), and after them."""

    entry: dict[str, nn.Module]
    exit: dict[str, nn.Module]


def split_blocks(
    model: nn.Module,
    sample: Any,
    *,
    options: Mapping[str, Any] | None = None,
    output: Callable[[Any], Tensor] = network_output,
) -> Split:
    """Split a model whose repeated blocks lie in an `nn.ModuleList` or `nn.Sequential` into layers, exactly.

    The model's own `forward` is watched once on the sample. What its blocks are given besides the hidden state (masks,
    position embeddings) travels with it, and so do results of earlier parts that the end needs (a condition). The parts
    before and after the blocks run in copies of the model with stubs for all that is elsewhere. Dropout draws the same
    numbers as in one piece. The output is compared bit for bit, in evaluation and in training.

    A model that without targets gives the logits of the last token only, and of all tokens with them, is split as if it
    were given targets. A model on the meta device is split by its shapes; nothing can be checked then.

    Args:
        model: Its blocks and other parts become part of the layers; where two of them share a parameter, the later
            one gets its own copy.
        sample: An input micro-batch: a tensor or tuple (positional arguments), or a dictionary by argument name; one
            that shows all that may occur (padding, too).
        options: Further arguments of its `forward`. Tensors among them that look like an input and whose values do not
            matter follow the size of the micro-batch.
        output: Picks the network's output from its result; by default `logits` or its like, or the first tensor.

    Raises:
        UsageError: The model is not built that way (the text names what stands in the way), or the layers do not give
            the same output.
    """
    check_model(model)
    check_sample(model, sample)
    check_calls(output, options)
    call, inputs = forward_call(model, sample, options or {}, output)
    original = model
    model, renamed = with_blocks_of_groups(model, find_blocks(model))
    if renamed and not on_meta(model):
        refuse_other_output(original, model, call, inputs)
    blocks = find_blocks(model)
    source = _Source(model, blocks, parts_around(model, blocks.values()), call, inputs)
    modes = {name: part.training for name, part in model.named_modules()}
    # Watched in eval mode: dropout would draw random numbers.
    with untouched(model, inputs[0].device), tied_again_if_it_fails(model):
        model.eval()
        source, calls = _watch(source)
        block_calls = [one for one in calls if one.module in set(source.blocks.values())]
        wiring = wire(block_calls, list(source.blocks))
        ends = _find_ends(source.parts, calls, block_calls)
        # Blocks come second: where an embedding and a head share a weight, the head gets the copy.
        untied = give_copies([ends.entry, source.blocks, ends.exit])
        layers, loose = _build(source, wiring, ends)
        if not on_meta(model):
            make_exact(model, layers, source.call, inputs, _carriable(ends.entry, calls, block_calls), loose)
    _set_modes(layers, modes)
    names = _model_names(layers, list(source.blocks), renamed)
    keys = {name: key for key, name in names.items()}
    layers.tied = {keys[copy]: keys[first] for copy, first in untied.items()}
    return Split(layers, names, untied, way="blocks")


def _watch(source: _Source) -> tuple[_Source, list[Call]]:
    """Run the model once; return it with its blocks in order, and the calls of its blocks and parts."""
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
        with slow_attention():  # or the padding mask of nn.TransformerEncoder would not be seen
            if running is source.model:
                call = of_any_size(call, running, source.inputs)
            _, calls = observe(lambda: call.picked(call.run(running, source.inputs)), watched)
    except UsageError:
        raise
    except Exception as error:
        shown = zip(call.names, source.inputs, strict=True)
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in shown)
        raise UsageError(
            f"{type(source.model).__name__} fails on {given}{how}: {first_line(error)}; give other inputs (such as a "
            "smaller `data.context`), or change its config",
            code="model-fails-on-sample",
        ) from error
    return _in_order(source, call, calls), calls


def _in_order(source: _Source, call: ForwardCall, calls: Sequence[Call]) -> _Source:
    """Return the source with its blocks in the order of their calls, and as blocks what is called once between them."""
    names = {part: name for name, part in (*source.blocks.items(), *source.parts.items())}
    blocks = set(source.blocks.values())
    order = [names[one.module] for one in calls if one.module in blocks]
    if sorted(order) != sorted(source.blocks):
        raise UsageError(
            f"the blocks are called as {', '.join(order) or 'none of them'}, and not once each",
            code="blocks-out-of-order",
        )
    start = next(one.begin for one in calls if one.module in blocks)
    end = max(one.end for one in calls if one.module in blocks)
    times = [one.module for one in calls]
    between = {one.module for one in calls if start < one.begin < end and times.count(one.module) == 1}
    chain = [one.module for one in calls if one.module in blocks or one.module in between]
    parts = {name: part for name, part in source.parts.items() if part not in between}
    return _Source(source.model, {names[part]: part for part in chain}, parts, call, source.inputs)


def _find_ends(parts: Mapping[str, nn.Module], calls: Sequence[Call], blocks: Sequence[Call]) -> _Ends:
    """Tell which parts belong before the blocks, and which after them. Those without a state may be in both copies."""
    start = blocks[0].begin
    end = blocks[-1].end
    ends = _Ends({}, {})
    for name, part in parts.items():
        has_state = next(part.parameters(), None) is not None or next(part.buffers(), None) is not None
        times = [call.begin for call in calls if call.module is part]
        early = any(time < start for time in times)
        late = any(time > end for time in times)
        if has_state and ((early and late) or any(start < time < end for time in times)):
            where = "before and after" if early and late else "between"
            raise UsageError(
                f"{name!r} is called {where} the blocks, so it would belong to several stages; make it one module for "
                "each place (they may share weights)",
                code="part-in-several-stages",
            )
        if has_state or early != late:
            side = ends.exit if late else ends.entry
            side[name] = part
    return ends


def _carriable(
    entry: Mapping[str, nn.Module], calls: Sequence[Call], blocks: Sequence[Call]
) -> tuple[CarriedResult, ...]:
    """Return the results of the parts before the blocks, in order."""
    names = {part: name for name, part in entry.items()}
    found: list[CarriedResult] = []
    for call in calls:
        if (
            call.module in names
            and call.begin < blocks[0].begin
            and any(isinstance(leaf, Tensor) for leaf in call.made)
        ):
            name = names[call.module]
            leaves = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in call.made)
            found.append(CarriedResult(name, sum(one.part == name for one in found), leaves, call.made_form))
    return tuple(found)


def _build(source: _Source, wiring: Wiring, ends: _Ends) -> tuple[Layers, tuple[LooseTensor, ...]]:
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

    first = copy_replacing(model, recording | {part: part for part in at_entry} | _stubs(BeyondBlocksStub, at_exit))
    last = copy_replacing(model, passing | stay_at_exit | _stubs(MissingPartStub, at_entry))
    loose = loose_tensors(model, [*blocks, *at_entry, *at_exit], (first, last))
    for tensor in loose:
        tensor.place(entry=True, exit=False)

    entry_shapes = None
    exit_shapes = None
    if on_meta(model):
        stubs = _stubs(MissingPartStub, source.parts.values())
        entry_shapes = copy_replacing(model, recording | stubs)
        exit_shapes = copy_replacing(model, passing | stubs | stay_at_exit)

    layers: dict[str, nn.Module] = {}
    layers["entry"] = EntryLayer(first, entry_shapes, source.call, list(recording.values()), wiring)
    for index, block in enumerate(blocks):
        layers[f"block{index}"] = BlockLayer(block, wiring, index, Travel((True,) * len(source.inputs)))
    layers["exit"] = ExitLayer(last, exit_shapes, source.call, passing[blocks[-1]])
    return Layers(layers.items()), loose


def _stubs(kind: type[MissingPartStub], parts: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    return {part: kind(part) for part in parts}


def _set_modes(layers: Layers, modes: Mapping[str, bool]) -> None:
    """Give the copies and the wrappers around the model's own parts the training flags that the model had."""
    for end in (layers.get_submodule("entry"), layers.get_submodule("exit")):
        for name, part in end.get_submodule("model").named_modules():
            part.training = modes.get(name, part.training)
    for part in (layers, *layers):
        part.training = modes[""]


def _model_names(layers: nn.Sequential, blocks: Sequence[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Return key of `layers.state_dict()` -> key of the model's own."""
    prefixes = {"entry": "", "exit": ""}
    for index, name in enumerate(blocks):
        prefixes[f"block{index}"] = f"{name}."
    names = {}
    for key in layers.state_dict():
        layer, _, own = key.split(".", 2)  # "entry.model.x", "block0.block.x"
        name = prefixes[layer] + own
        beginning = next((one for one in renamed if name.startswith(one)), "")
        names[key] = renamed.get(beginning, "") + name.removeprefix(beginning)
    return names
