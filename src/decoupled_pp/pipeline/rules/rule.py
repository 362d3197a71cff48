"""Defines training rules: what one stage does with a training packet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from decoupled_pp.core.channels import Ends, Returns
from decoupled_pp.core.objective import View
from decoupled_pp.core.packets import Packet, map_payload
from decoupled_pp.pipeline.body import Body
from decoupled_pp.pipeline.pace import Pace
from decoupled_pp.pipeline.probes import Probe
from decoupled_pp.pipeline.updates.update import Update
from decoupled_pp.settings.rules import RuleSettings

Lap: TypeAlias = Callable[[str], None]
"""Called at the end of each phase of a packet with the phase's name (`reports.PHASES`)."""

RuleState: TypeAlias = dict[str, Any]
"""State of a rule from packet to packet, for checkpoints: tensors, numbers and truth values by name."""


@dataclass(frozen=True)
class Done:
    """A training packet that a stage is done with."""

    packet: Packet
    loss: Tensor | None  # 0-dim, on the device, so that nobody waits for it; None if this stage does not know it


@dataclass(frozen=True)
class RuleParts:
    """The parts of a stage that a rule works with."""

    index: int
    stages: int
    body: Body
    update: Update
    pace: Pace
    probes: Sequence[Probe] = ()  # are shown every packet

    @property
    def is_first(self) -> bool:
        """True if no stage comes before this one."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """True if no stage comes after this one."""
        return self.index == self.stages - 1


class Rule(ABC):
    """Says what one stage does with a training packet.

    A rule runs inside the stage's random stream. It ends every phase with a call of `lap`, in the order of
    `reports.PHASES`, sends the stage's output as early as it can, and names the packet whose gradients it makes
    (`Update.begin`).

    Attributes:
        returns: Describes what comes back over the links under this rule.
        owns_critic: True if the rule updates the critic by an optimizer of its own, so that `Update` leaves it out.
        parts: The parts of the stage.
        optimizers: The rule's own optimizers; checkpoints hold their state.
        unfinished: True between a `step` that returned None and its `resume`.
    """

    returns: ClassVar[Returns] = Returns()
    owns_critic: ClassVar[bool] = False
    unfinished: bool = False

    def __init__(self, parts: RuleParts, settings: RuleSettings) -> None:
        """Take over the parts and the section that chose the rule.

        Raises:
            UsageError: The rule cannot train this stage.
        """
        self.parts = parts
        self.optimizers: list[Optimizer] = []

    @abstractmethod
    def step(self, packet: Packet, ends: Ends, lap: Lap) -> Done | None:
        """Train on one packet; return None if `resume` is to finish it, once the next stage has done its part."""

    def resume(self, ends: Ends, lap: Lap) -> Done | None:
        """Finish the packet that `step` left unfinished; called only if there is one."""
        raise AssertionError(f"{type(self).__name__} left no packet unfinished")

    def skip(self, packet: Packet, ends: Ends, lap: Lap) -> None:  # noqa: B027 - nothing is due unless a rule says so
        """Do what is due after a packet in which nothing counts; `step` is not called for it, on any stage."""

    def begin(self) -> None:  # noqa: B027 - a rule that keeps nothing between packets has nothing to forget
        """Forget what a session that failed has left unfinished; called before a session begins."""

    def settle(self, ends: Ends) -> None:  # noqa: B027 - nothing is under way unless a rule says so
        """Take what is still under way on the links, before a checkpoint or the end of the run."""

    def state(self) -> RuleState:
        """Return the state that the rule keeps from packet to packet; called after `settle`."""
        return {}

    def load(self, state: Mapping[str, Any]) -> str | None:
        """Go on from a state. Return in words what is lost if the state is empty and the rule needs one."""
        return None

    def pass_on(self, packet: Packet, view: View, ends: Ends) -> None:
        """Send the stage's output, and what its critic sends along, to the next stage."""
        # Detached: a graph that came along would let later stages train this one, and keep its activations.
        rider = map_payload(torch.detach, self.parts.body.judge.rider(view))
        ends.outlet.send(replace(packet, payload=map_payload(torch.detach, view.hidden), rider=rider))

    def show(self, view: View) -> None:
        """Show a packet to the probes."""
        for probe in self.parts.probes:
            probe.trained(view)
