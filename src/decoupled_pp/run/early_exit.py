"""Describes the smaller network of an exit, the stages up to it and its critic, so that an export can be loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.plans import Layers
from decoupled_pp.core.structures import zeros_of
from decoupled_pp.critics import build_critic
from decoupled_pp.models.cutting.layers import critic_context, trace
from decoupled_pp.settings.run import Settings

EXIT_FILE = "exit.json"


@dataclass(frozen=True)
class EarlyExit:
    """The place of an exit in the network of a run."""

    stage: int  # the stage after which to leave
    stages: int  # of the whole network
    layers: int  # up to the exit
    sample: list[Any]  # what a micro-batch was like: the critic was built to fit it (`spec_of`)

    @property
    def is_last(self) -> bool:
        """True if it is the output of the whole network, which has no critic."""
        return self.stage == self.stages - 1

    def text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self)) + "\n"

    def network(self, whole: nn.Sequential, settings: Settings) -> Layers:
        """Return the smaller network, with a fresh critic, from the layers of the whole one."""
        critic = None
        if not self.is_last:
            hiddens, output = trace(whole, zeros_of(self.sample))
            context = critic_context(whole, hiddens, output, boundary=self.layers, stage=self.stage, stages=self.stages)
            critic = build_critic(settings.critic, settings.critic_overlap)(context)
        return ended_by(list(whole.named_children())[: self.layers], critic)


def ended_by(layers: Iterable[tuple[str, nn.Module]], critic: nn.Module | None) -> Layers:
    """Return layers by their own names, and the critic behind them as `exit`."""
    found = dict(layers)
    if critic is not None:
        name = "exit"
        while name in found:
            name += "_"
        found[name] = critic
    return Layers(found.items())


def read_early_exit(folder: Path) -> EarlyExit | None:
    """Return what an exported folder says of its exit; None if it holds a whole network."""
    file = folder / EXIT_FILE
    if not file.is_file():
        return None
    try:
        found = EarlyExit(**json.loads(file.read_text(encoding="utf-8")))
        in_order = 0 <= found.stage < found.stages and found.layers > 0
        zeros_of(found.sample)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError):  # whatever is not as `text` writes it
        in_order = False
    if not in_order:
        raise UsageError(f"{file} is damaged; export the run again", code="exit-damaged")
    return found
