"""Turns gradients into new weights: accumulation, clipping, the optimizers' steps and their schedules."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from decoupled_pp.core.packets import Packet
from decoupled_pp.pipeline.optim import has_modes, make_gradients_dense, set_mode
from decoupled_pp.pipeline.schedules import Plateau, set_rates
from decoupled_pp.pipeline.updates.accumulation import Accumulation
from decoupled_pp.settings.run import StageSettings


class Update:
    """The update of one stage that no other rank shares.

    `synchronise` is the seam for stages that several ranks hold: a subclass averages gradients there.

    Attributes:
        optimizers: Over the trainable parameters of layers and critic; empty if there are none.
        schedules: Learning-rate schedules of the optimizers, set when it is known how long a run trains.
        plateau: Follows the held-out loss for the schedules; None: they follow the steps alone.
        weights_to_train: While `optimizers` show the weights to evaluate: those to train with, of optimizers that keep
            both (schedule-free ones); None: the weights are those to train with.
        accumulate: Packets per optimizer step.
        steps: Optimizer steps done.
        samples: Training samples done.
    """

    def __init__(self, optimizers: list[Optimizer], training: StageSettings, *, sums: bool = False) -> None:
        """Take over the optimizers; with `sums` the losses of micro-batches add up, else they are means."""
        self.optimizers = optimizers
        self.schedules: Sequence[LRScheduler] = []
        self.plateau: Plateau | None = None
        self.weights_to_train: dict[Tensor, Tensor] | None = {}
        self.accumulate = training.accumulate
        self.steps = 0
        self.samples = 0
        self._clip_norm = training.clip_norm
        self._accumulation = Accumulation(training.accumulate, sums=sums)

    @property
    def learning_rate(self) -> float:
        """Present learning rate of the first optimizer's first group, 0 if nothing trains."""
        return float(self.optimizers[0].param_groups[0]["lr"]) if self.optimizers else 0.0

    @torch.no_grad()
    def show_weights_to_train(self) -> None:
        """Let optimizers that keep other weights to evaluate show those to train with, bit for bit."""
        if self.weights_to_train is None:
            return
        set_mode(self.optimizers, training=True)
        for parameter, kept in self.weights_to_train.items():
            parameter.copy_(kept)  # the optimizer computes them anew, and rounds
        self.weights_to_train = None

    @torch.no_grad()
    def show_weights_to_evaluate(self, *, last: bool = False) -> None:
        """Let such optimizers show the weights to evaluate; the `last` time, those to train with are not kept."""
        if self.weights_to_train is None:
            groups = [
                group for optimizer in self.optimizers if has_modes(optimizer) for group in optimizer.param_groups
            ]
            self.weights_to_train = {p: p.detach().clone() for group in groups for p in group["params"]}
            set_mode(self.optimizers, training=False)
        if last:  # a later session may find weights that the user has changed
            self.weights_to_train = {}

    def hear(self, loss: float) -> None:
        """Take the stage's own held-out loss; a plateau schedule may lower the rates by it."""
        if self.plateau is not None:
            self.plateau.hear(loss, self.steps)
            for schedule in self.schedules:
                set_rates(schedule)

    def begin(self, packet: Packet) -> None:
        """Go on with a training packet, before its gradients are computed; packets that count are begun by the rule."""
        self._accumulation.begin(packet.weight)

    def backward(self, loss: Tensor, inputs: Sequence[nn.Parameter] | None = None) -> None:
        """Add the gradients of the present packet's loss to those of `inputs`; None: of all that it depends on."""
        self._accumulation.part(loss).backward(inputs=inputs)

    def backward_from(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the gradients of the present packet's loss, given those of the loss for the stage's outputs."""
        if outputs:
            torch.autograd.backward(outputs, [self._accumulation.part(gradient) for gradient in gradients])

    def of_packet(self, gradient: Tensor) -> Tensor:
        """Return a gradient that `backward` has left in the stage's input as that of the present packet's own loss."""
        return self._accumulation.whole(gradient)

    def count(self, packet: Packet) -> None:
        """Count a training packet whose gradients are there; take the step if the packet completes it."""
        self.samples += packet.samples
        if (packet.number + 1) % self.accumulate:
            return
        make_gradients_dense(self.optimizers)
        if self._accumulation.finish(self._parameters()):
            self.synchronise()
            self.clip()
            self.step()
        else:
            self.skip()

    def synchronise(self) -> None:
        """Do nothing: no other rank holds this stage."""

    def clip(self) -> None:
        """Scale the gradients of the stage and its critic down to the largest norm allowed for all of them together."""
        if self._clip_norm is not None:
            # By the optimizers, not the modules: a critic that its rule updates is not clipped with the layers.
            nn.utils.clip_grad_norm_(self._parameters(), self._clip_norm)

    def step(self) -> None:
        """Take one step of every optimizer, forget the gradients, and move the schedules on."""
        for optimizer in self.optimizers:
            optimizer.step()
        self._advance()

    def skip(self) -> None:
        """Move on without a step, because nothing counted: no weight decay, no momentum, no second moment moves."""
        with warnings.catch_warnings():  # a schedule warns if its optimizer has not taken a step yet
            warnings.simplefilter("ignore", UserWarning)
            self._advance()

    def forget(self) -> None:
        """Forget the gradients of a step that was begun and never taken."""
        self._accumulation.finish([])
        for optimizer in self.optimizers:
            # To None: the memory is free until the next backward pass, and optimizers skip what has no gradient.
            optimizer.zero_grad(set_to_none=True)

    def _advance(self) -> None:
        self.forget()
        for schedule in self.schedules:
            schedule.step()
        self.steps += 1

    def _parameters(self) -> list[nn.Parameter]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]
