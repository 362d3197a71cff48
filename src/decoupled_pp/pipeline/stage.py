"""One stage: forward, send, local loss, backward, optimizer step; it knows neither its rank nor its links."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from decoupled_pp.core.device import RandomStream
from decoupled_pp.core.objective import Critic, View, has_exit, local_loss, rider_of
from decoupled_pp.core.packets import Loss, Packet, Payload, as_tuple, check_payload, map_payload
from decoupled_pp.pipeline.activations import SavedActivations
from decoupled_pp.pipeline.compiled import compiled
from decoupled_pp.pipeline.losses import ExitScore
from decoupled_pp.pipeline.neighbours import Neighbours
from decoupled_pp.pipeline.optimizer_state import group_entries
from decoupled_pp.pipeline.recompute import checkpointed
from decoupled_pp.pipeline.rules.cascade import Cascade, PerSample
from decoupled_pp.settings.run import CorrectionSettings

Send = Callable[[Packet], None]
Lap = Callable[[str], None]
"""Called at the end of each phase of a packet with the phase's name (`reports.PHASES`)."""

_NOTHING = nullcontext()


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes; see `TrainingSettings` and `ValidationSettings` for the fields."""

    accumulate: int = 1
    clip_norm: float | None = None
    precision: str = "fp32"
    checkpoint_activations: bool = False
    compile: bool = False
    stagger: int = 0
    critic_warmup: int = 0
    correction: CorrectionSettings | None = None
    knn: int | None = None
    knn_samples: int = 2000


class Stage:
    """A run of layers, its critic, and their optimizer.

    What happens with one training packet, and when its output leaves:

        packet n in ---> forward ---> critic forward + backward ---> backward ---> optimizer step
                            |
                            +-------> packet n out (detached; the next stage starts on it at once)
    """

    def __init__(
        self,
        index: int,
        trunk: nn.Module,
        critic: nn.Module | None,
        loss: Loss,
        optimizers: list[Optimizer],
        *,
        device: torch.device,
        seed: int,
        options: StageOptions,
        cascade: Cascade | None = None,
        per_sample: PerSample | None = None,
    ) -> None:
        """Take over the parts (already on `device`).

        Args:
            index: Place in the pipeline.
            trunk: The layers.
            critic: From the trunk's output to logits; None in the last stage, whose output is the logits.
            loss: loss(logits, target) -> scalar mean.
            optimizers: Over the trainable parameters of trunk and critic; empty if there are none.
            device: Where the stage computes.
            seed: Seed of the stage's own random stream (dropout).
            options: How to compute.
            cascade: Teaches the critic; None: it lowers the labels' loss with the trunk, or there is none.
            per_sample: The loss sample by sample, if the stage before is to learn it.
        """
        self.index, self.trunk, self.critic, self.loss = index, trunk, critic, loss
        self.optimizers = optimizers
        self.cascade, self._per_sample = cascade, per_sample
        self.losses: Tensor | None = None  # of the last packet's samples, (B,)
        self.first_groups = group_entries(self.all_optimizers)  # what steps change in them is the optimizers' state
        self.schedules: list[LambdaLR] = []  # given by the trainer, which knows how long it trains
        self.device, self.options = device, options
        self.updates = 0
        self.samples = 0
        self.saved_activation_bytes_peak: int | None = None
        self.random = RandomStream(seed, device)  # own stream, whoever else draws in this process (law 3)
        self._run_trunk: Callable[[Payload], Payload] = checkpointed(trunk) if options.checkpoint_activations else trunk
        self._run_critic: Callable[[Payload], Tensor] = critic if critic is not None else _own_logits
        self._run_objective: Callable[[View], Tensor] = lambda view: local_loss(self.critic, view, self.loss)
        if options.compile:
            self._run_trunk = compiled(self._run_trunk, f"trunk {index}")
            self._run_critic = compiled(critic, f"critic {index}") if critic is not None else _own_logits
            self._run_objective = compiled(self._run_objective, f"objective {index}")
        self._autocast: AbstractContextManager[object] = (
            torch.autocast(device.type, dtype=torch.bfloat16) if options.precision == "bf16" else _NOTHING
        )
        self._seed = seed
        self.neighbours = Neighbours(options.knn, options.knn_samples) if options.knn is not None else None
        self._begin_evaluation()

    def step(self, packet: Packet, send: Send, lap: Lap) -> Tensor:
        """Train on one packet; its output is sent as soon as it exists.

        Returns:
            The loss, a 0-dim tensor on the device (nothing waits for it here).
        """
        with self.random:  # around the update too: an optimizer may draw
            with self._probe() if self.saved_activation_bytes_peak is None else _NOTHING:
                view = self._forward(packet)
                lap("forward")
                if not self._late:
                    self._send(packet, view, send, lap)
                loss = self._judge(view)
                if self._late:
                    lap("critic")
                    self._send(packet, view, send, lap)
                if self.neighbours is not None:
                    self.neighbours.remember(view.hidden, view.target)
                if self.cascade is not None and self._has_begun:
                    hidden = map_payload(torch.detach, view.hidden)
                    self.cascade.remember(packet.number, hidden, packet.target)
                if self._has_begun:  # else no gradient: the update leaves all as it is
                    self._learn(loss, view, lap)
                lap("backward")
            self._done_with(packet)
        lap("step")
        return loss.detach()

    def is_end_to_end(self, number: int) -> bool:
        """Whether a training packet belongs to an end-to-end step (`global_correction`)."""
        correction, step = self.options.correction, number // self.options.accumulate
        return correction is not None and step >= self.options.critic_warmup and correction.covers(step)

    def begin_end_to_end(self, packet: Packet, send: Send, lap: Lap) -> EndToEnd:
        """Forward with a graph that ends at the stage's input; the output leaves."""
        with self.random:
            inputs = map_payload(_leaf if self.index else _same, packet.payload)
            view = self._forward(replace(packet, payload=inputs))
            lap("forward")
            send(replace(packet, payload=map_payload(torch.detach, view.hidden), rider=()))
            if self.neighbours is not None:
                self.neighbours.remember(view.hidden, view.target)
        lap("wait_out")
        return EndToEnd(packet, inputs, view.hidden)

    def finish_end_to_end(self, half: EndToEnd, gradient: Sequence[Tensor] | None, lap: Lap) -> Tensor | None:
        """Backward from the gradient of the network's loss for the stage's output, then the update, without a critic.

        Args:
            half: What `begin_end_to_end` returned; afterwards `half.gradient` is there for the stage before.
            gradient: One tensor for each floating one of the stage's output; None in the last stage.
            lap: As for `step`.

        Returns:
            The loss, in the last stage.
        """
        loss: Tensor | None = None
        with self.random:
            if gradient is None:
                with self._autocast:
                    loss = self.loss(as_tuple(half.hidden)[0], half.packet.target)
                (loss / self.options.accumulate).backward()
            else:
                pairs = [(t, g) for t, g in zip(floating(half.hidden), gradient, strict=True) if t.requires_grad]
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
            lap("backward")
            self._done_with(half.packet)
        lap("step")
        return loss.detach() if loss is not None else None

    def learn_lesson(self, losses: Tensor) -> None:
        """Teach the critic the next stage's losses, (B,), of its oldest lesson."""
        assert self.cascade is not None
        with self.random:
            self.cascade.teach(self._run_critic, losses, self._autocast)

    def evaluate(self, packet: Packet, send: Send) -> None:
        """Score this exit on one held-out packet and pass it on; changes nothing that trains."""
        with _evaluating(self._modules), torch.no_grad(), self._evaluation_random, self._autocast:
            output = self._run_trunk(packet.payload)
            send(replace(packet, payload=output))
            if self.neighbours is not None:
                self.neighbours.score(output, packet.target)
            if not has_exit(self.critic):
                return
            logits = self._run_critic(output)
            self._score.add(self.loss(logits, packet.target), logits, packet.target)

    def finish_evaluation(self) -> tuple[float, float | None] | None:
        """Held-out loss and accuracy of this exit since the last call; None if the critic makes no logits."""
        result = self._score.result() if has_exit(self.critic) else None
        self._begin_evaluation()
        return result

    @property
    def all_optimizers(self) -> list[Optimizer]:
        """The stage's, and those of a critic that is taught by itself."""
        return [*self.optimizers, *(self.cascade.optimizers if self.cascade is not None else [])]

    @property
    def learning_rate(self) -> float:
        """Present learning rate of the first optimizer's first group, 0 if nothing trains."""
        return float(self.optimizers[0].param_groups[0]["lr"]) if self.optimizers else 0.0

    def named_parameters(self, critic_name: str) -> dict[str, nn.Parameter]:
        """All parameters by the names they have in a checkpoint: `model.<name>`, `critic.<critic_name>.<name>`."""
        named = {f"model.{name}": p for name, p in self.trunk.named_parameters()}
        if self.critic is not None:
            named |= {f"critic.{critic_name}.{name}": p for name, p in self.critic.named_parameters()}
        return named

    @property
    def _modules(self) -> list[nn.Module]:
        return [module for module in (self.trunk, self.critic) if module is not None]

    @property
    def _has_begun(self) -> bool:
        """Whether the stage learns already; till then it passes packets on (`training.stagger`)."""
        return self.updates >= self.options.stagger * self.index

    @property
    def _late(self) -> bool:
        return isinstance(self.critic, Critic) and self.critic.late

    def _forward(self, packet: Packet) -> View:
        inputs = packet.payload
        if isinstance(self.critic, Critic) and self.critic.follows_input:
            inputs = map_payload(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, inputs)
        first: list[Payload] = []
        with self._autocast, self.watching_first_layer(first):
            hidden = check_payload(self._run_trunk(inputs), f"stage {self.index}")
        return View(inputs, hidden, packet.target, packet.rider, *first)

    def watching_first_layer(self, outputs: list[Payload]) -> AbstractContextManager[object]:
        """Keep what the first layer makes, without its graph, if the critic asks for it."""
        asked = isinstance(self.critic, Critic) and self.critic.needs_first
        return self._first_layer_kept(outputs) if asked else _NOTHING

    @contextmanager
    def _first_layer_kept(self, outputs: list[Payload]) -> Iterator[None]:
        keep = next(self.trunk.children()).register_forward_hook(
            lambda _module, _inputs, output: outputs.append(map_payload(torch.detach, output))
        )
        try:
            yield
        finally:
            keep.remove()

    def _send(self, packet: Packet, view: View, send: Send, lap: Lap) -> None:
        rider = map_payload(torch.detach, rider_of(self.critic, view))
        send(replace(packet, payload=map_payload(torch.detach, view.hidden), rider=rider))
        lap("wait_out")

    def _judge(self, view: View) -> Tensor:
        """The local loss."""
        with self._autocast:
            if isinstance(self.critic, Critic):
                return self._run_objective(view)
            logits = self._run_critic(view.hidden)
            if self._per_sample is not None:
                with torch.no_grad():
                    self.losses = self._per_sample(logits, view.target)
            return self.loss(logits, view.target)

    def _learn(self, loss: Tensor, view: View, lap: Lap) -> None:
        """Accumulate the loss's gradients in the critic and then in the trunk.

        One backward pass goes through both. It reaches the trunk's output when it is done with the critic, whose
        activations are free by then; a hook there ends the phase `critic`.
        """
        critic_is_done = _Once(lambda: lap("critic"))
        if loss.requires_grad:
            for tensor in as_tuple(view.hidden):
                if tensor.grad_fn is not None:
                    tensor.register_hook(critic_is_done)
            aims = self._aims()
            if aims != []:
                (loss / self.options.accumulate if self.options.accumulate > 1 else loss).backward(inputs=aims)
        critic_is_done()  # if no gradient came to the trunk, all of it was the critic's

    def _aims(self) -> list[nn.Parameter] | None:
        """The parameters that learn from the local loss; None: all that it depends on."""
        warming = self.critic is not None and self.updates < self.options.critic_warmup
        if self.cascade is not None:  # its critic learns from something else
            return [] if warming else [p for p in self.trunk.parameters() if p.requires_grad]
        return [p for p in self.critic.parameters() if p.requires_grad] if self.critic is not None and warming else None

    def _done_with(self, packet: Packet) -> None:
        """Count a training packet, and update if it completes an optimizer step."""
        self.samples += packet.samples
        if (packet.number + 1) % self.options.accumulate == 0:
            self._update()

    def _begin_evaluation(self) -> None:
        """An empty score, and a random stream that is the same in every evaluation and no part of training (law 7)."""
        self._score = ExitScore()
        self._evaluation_random = RandomStream(self._seed, self.device)

    def _update(self) -> None:
        if self.options.clip_norm is not None:
            parameters = [
                p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
            ]
            nn.utils.clip_grad_norm_(parameters, self.options.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for schedule in self.schedules:
            schedule.step()
        self.updates += 1

    @contextmanager
    def _probe(self) -> Iterator[None]:
        """Count the activations that a step saves for its backward pass."""
        with SavedActivations([t for m in self._modules for t in (*m.parameters(), *m.buffers())]) as saved:
            yield
        self.saved_activation_bytes_peak = saved.peak


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Evaluation mode; then every part goes back to its own: a frozen one (`layer.eval()`) stays frozen."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class _Once:
    """A gradient hook that calls `then` the first time it is called."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then: Callable[[], None] | None = then

    def __call__(self, _: Tensor | None = None) -> None:
        if self._then is not None:
            self._then()
            self._then = None


@dataclass(frozen=True)
class EndToEnd:
    """An end-to-end step on one packet, between its two halves.

    Attributes:
        packet: The packet.
        inputs: What the stage was given, as leaves of the graph.
        hidden: What it has made of it.
    """

    packet: Packet
    inputs: Payload
    hidden: Payload

    @property
    def gradient(self) -> list[Tensor]:
        """Of the loss for the stage's inputs: one tensor for each floating one."""
        return [t.grad if t.grad is not None else torch.zeros_like(t) for t in floating(self.inputs)]


def floating(payload: Payload) -> list[Tensor]:
    """The tensors of a payload that can have a gradient."""
    return [tensor for tensor in as_tuple(payload) if tensor.is_floating_point()]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _own_logits(output: Payload) -> Tensor:
    """The last stage: the network's own head has made the logits."""
    return as_tuple(output)[0]
