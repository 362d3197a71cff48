"""Turns gradients into new weights: accumulation, clipping, the optimizers' steps and their schedules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from decoupled_pp.core.packets import Packet
from decoupled_pp.settings.run import StageSettings


class Update:
    """The update of one stage that no other rank shares.

    `synchronise` is the seam for stages that several ranks hold: a subclass averages gradients there.

    Attributes:
        optimizers: Over the trainable parameters of layers and critic; empty if there are none.
        schedules: Learning-rate schedules of the optimizers, set when it is known how long a run trains.
        accumulate: Packets per optimizer step.
        steps: Optimizer steps done.
        samples: Training samples done.
    """

    def __init__(self, optimizers: list[Optimizer], training: StageSettings) -> None:
        self.optimizers = optimizers
        self.schedules: Sequence[LambdaLR] = []
        self.accumulate = training.accumulate
        self.steps = 0
        self.samples = 0
        self._clip_norm = training.clip_norm

    @property
    def learning_rate(self) -> float:
        """Present learning rate of the first optimizer's first group, 0 if nothing trains."""
        return float(self.optimizers[0].param_groups[0]["lr"]) if self.optimizers else 0.0

    def backward(self, loss: Tensor, inputs: Sequence[nn.Parameter] | None = None) -> None:
        """Add the gradients of one packet's mean loss to those of `inputs`; None: of all that it depends on."""
        # The loss is a mean over a packet, and the step's gradient the mean over its packets (law 5). Dividing by 1
        # would be another operation in the graph.
        mean = loss / self.accumulate if self.accumulate > 1 else loss
        mean.backward(inputs=inputs)

    def count(self, packet: Packet) -> None:
        """Count a training packet whose gradients are there; take the step if the packet completes it."""
        self.samples += packet.samples
        if (packet.number + 1) % self.accumulate == 0:
            self.synchronise()
            self.clip()
            self.step()

    def synchronise(self) -> None:
        """Do nothing: no other rank holds this stage."""

    def clip(self) -> None:
        """Scale the gradients of the stage and its critic down to the largest norm allowed for all of them together."""
        if self._clip_norm is not None:
            # By the optimizers, not the modules: a critic that its rule updates is not clipped with the layers.
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], self._clip_norm)

    def step(self) -> None:
        """Take one step of every optimizer, forget the gradients, and move the schedules on."""
        for optimizer in self.optimizers:
            optimizer.step()
            # To None: the memory is free until the next backward pass, and optimizers skip what has no gradient.
            optimizer.zero_grad(set_to_none=True)
        for schedule in self.schedules:
            schedule.step()
        self.steps += 1
