"""Compares layers with the model they come from, and finds out what has to travel to the last one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn

from decoupled_pp.core.device import seeded, untouched
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.plans import Layers
from decoupled_pp.models.splitting.call import ForwardCall
from decoupled_pp.models.splitting.layers import BlockLayer, CarriedResult, Travel
from decoupled_pp.models.splitting.loose import LooseTensor
from decoupled_pp.models.splitting.stubs import BlockStub

_Result = TypeVar("_Result")
_DRAWS = 32  # tries to see a block left out, of models that draw random numbers before or between their blocks


def make_exact(  # noqa: PLR0917 - the model, its layers, and what may be moved between them
    model: nn.Module,
    layers: Layers,
    call: ForwardCall,
    inputs: tuple[Tensor, ...],
    carriable: tuple[CarriedResult, ...],
    loose: tuple[LooseTensor, ...],
) -> None:
    """Give the last layer what it needs and no more: results and inputs that travel to it, tensors of the model itself.

    Raises:
        UsageError: The layers do not give the model's output whatever the last one is given.
    """
    whole = _Whole(model, layers, call, inputs)
    chosen = whole.travel
    fault = whole.fault(chosen)
    if fault is not None and carriable:
        chosen = replace(chosen, carried=carriable)
        fault = whole.fault(chosen)
    if fault is not None and loose:
        for one in loose:
            one.place(entry=True, exit=True)
        fault = whole.fault(chosen) or _place(loose, whole, chosen)
    if fault is not None:
        raise fault
    for result in reversed(chosen.carried):
        # An earlier call of a part must travel if a later one does: the stub returns them in their order.
        if not any(one.part == result.part and one.call > result.call for one in chosen.carried):
            fewer = tuple(one for one in chosen.carried if one is not result)
            chosen = whole.choice(replace(chosen, carried=fewer), chosen)
    # Try without each floating input in turn: its NaNs would show in the output if the exit used its values.
    for place, tensor in enumerate(inputs):
        if tensor.is_floating_point():  # tokens and masks are small, and an end may look for padding in them
            travels = tuple(one and index != place for index, one in enumerate(chosen.inputs))
            chosen = whole.choice(replace(chosen, inputs=travels), chosen)
    whole.use(chosen)


def _place(loose: Sequence[LooseTensor], whole: _Whole, travel: Travel) -> UsageError | None:
    """Give each loose tensor to the one end that uses it; return why that cannot be."""
    for one in loose:
        one.place(entry=True, exit=False)
        if whole.fault(travel) is None:
            continue
        one.place(entry=False, exit=True)
        if whole.fault(travel) is None:
            continue
        if isinstance(one.tensor, nn.Parameter):
            return UsageError(
                f"the parameter {one.name!r} is used before and after the blocks, so it would belong to several "
                "stages; make it two",
                code="part-in-several-stages",
            )
        one.place(entry=True, exit=True)
    return None


def refuse_other_output(model: nn.Module, changed: nn.Module, call: ForwardCall, inputs: tuple[Tensor, ...]) -> None:
    """Raise UsageError if a model whose groups of modules are blocks gives another output than the user's."""

    def run(one: nn.Module, *, training: bool) -> Tensor | None:
        """Return the output, or None if the model fails: where the user's does, that is said when it is watched."""
        device = inputs[0].device
        with suppress(Exception), torch.no_grad(), untouched(one, device), _seeded_everything(0, device):
            return call.picked(call.run(one.train(training), inputs))
        return None

    for training in (False, True):
        expected = run(model, training=training)
        found = run(changed, training=training)
        if expected is not None and (found is None or not _is_equal(found, expected)):
            raise UsageError(
                "the loop over groups of modules is no chain: what one round takes is not what the round before it "
                "leaves, or it uses other modules; make each group a module with a forward of its own",
                code="groups-not-chained",
            )


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two outputs are the same bit for bit; NaNs are equal."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


class _Whole:
    """The model in one piece, and its outputs.

    Attributes:
        travel: The values that have to travel in any case.
    """

    def __init__(self, model: nn.Module, layers: Layers, call: ForwardCall, inputs: tuple[Tensor, ...]) -> None:
        self._model = model
        self._name = type(model).__name__
        self._layers = layers
        self._inputs = inputs
        self._blocks = [layer.block for layer in layers if isinstance(layer, BlockLayer)]
        self._stubs = [part for end in (layers[0], layers[-1]) for part in end.modules() if isinstance(part, BlockStub)]
        self._seed = 0
        self.travel = Travel((True,) * len(inputs))
        self._expected: dict[bool, Tensor] = {}

        def run() -> Tensor:
            return call.picked(call.run(model, inputs))

        model.eval()
        with self._noting_ragged():
            self._expected[False] = self._run(run, self._seed)
        model.train()
        self._note_left_out_blocks()
        # It may not be able to train on this sample (batch statistics of a single row): then evaluation has to do.
        with suppress(Exception):
            self._expected[True] = self._run(run, self._seed)

    def fault(self, travel: Travel) -> UsageError | None:
        """Return why layers are not the model, if this travels."""
        self.use(travel)
        for training, expected in self._expected.items():
            mode = "training" if training else "evaluation"
            self._layers.train(training)
            try:
                found = self._run(lambda: self._layers(self._inputs), self._seed)
            except UsageError as error:
                return error
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                return UsageError(
                    f"split into layers at its blocks, {self._name} fails ({reason}): its code around them needs "
                    "weights of other parts, or more of their results than shapes; call modules there, rather than use "
                    "their weights",
                    code="split-changes-output",
                )
            if not _is_equal(found, expected):
                return UsageError(
                    f"split into layers at its blocks, {self._name} gives another output in {mode} than in one piece: "
                    "its end uses something of its beginning that no module makes; let a module make it, and use its "
                    "weights nowhere else",
                    code="split-changes-output",
                )
        return None

    def choice(self, wanted: Travel, present: Travel) -> Travel:
        """Return the wanted one if the layers are exact with it."""
        return present if self.fault(wanted) else wanted

    def use(self, travel: Travel) -> None:
        """Tell the layers what travels."""
        for layer in self._layers:
            layer.travel = travel  # type: ignore[assignment]

    def _run(self, forward: Callable[[], _Result], seed: int) -> _Result:
        """Run the model or the layers with the same random numbers and buffers."""
        with torch.no_grad(), untouched(self._model, self._inputs[0].device), self._seeded_blocks(seed):
            return forward()

    @contextmanager
    def _noting_ragged(self) -> Iterator[None]:
        """Note whether the first block is given a nested tensor."""

        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            is_ragged = any(isinstance(one, Tensor) and one.is_nested for one in (*args, *kwargs.values()))
            self.travel = replace(self.travel, is_ragged=is_ragged)

        handle = self._blocks[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _note_left_out_blocks(self) -> None:
        """Note whether the model leaves out blocks at random in training, and take a seed with which it does."""
        entry = self._layers[0]
        tolerant = replace(self.travel, leaves_out=True)
        entry.travel = tolerant  # type: ignore[assignment]
        entry.train()
        for seed in range(_DRAWS):
            drew = False

            def run() -> tuple[Tensor, ...]:
                nonlocal drew
                before = _generators()
                outgoing: tuple[Tensor, ...] = entry(self._inputs)
                drew = _generators() != before
                return outgoing

            try:
                runs = self._run(run, seed)[1 + self.travel.is_ragged]
            except UsageError:
                return  # the comparison will tell of it
            # With the last block left out, what is drawn after it would differ in the comparison.
            if runs[-1] and not runs.all():
                self.travel = tolerant
                self._seed = seed
                return
            if not drew:
                return

    @contextmanager
    def _seeded_blocks(self, seed: int) -> Iterator[None]:
        """Seed before and after each block and its stubs, so that draws between them shift nobody else's numbers."""
        count = len(self._blocks)
        with ExitStack() as hooks, _seeded_everything(seed, self._inputs[0].device):
            for index, block in enumerate((*self._blocks, *self._stubs)):
                before = _seeding(seed + 1000 * (2 * (index % count) + 1))
                after = _seeding(seed + 1000 * (2 * (index % count) + 2))
                hooks.callback(block.register_forward_pre_hook(before).remove)
                hooks.callback(block.register_forward_hook(after).remove)
            yield


def _seeding(seed: int) -> Callable[..., None]:
    def plant(*_: object) -> None:
        torch.manual_seed(seed)

    return plant


@contextmanager
def _seeded_everything(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of torch, Python and NumPy, and put them back at the end."""
    python = random.getstate()
    arrays = numpy.random.get_state()
    try:
        with seeded(seed, device):
            random.seed(seed)
            numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), str(numpy.random.get_state())
