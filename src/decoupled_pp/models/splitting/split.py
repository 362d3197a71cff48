"""A model as layers, and its weights under its own names again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.plans import Layers


@dataclass(frozen=True)
class Split:
    """A model as layers.

    Attributes:
        layers: They hold the model's own parameters.
        names: Key of `layers.state_dict()` -> key of the model's own.
        untied: Key of the model whose parameter was another one's and has become one of its own -> key of that one.
        aliases: Further key of the model for a tensor -> the key among `names`.
        way: The way it was split: list, transformers, blocks or traced.
        failed: The ways that `dpp.split` tried before -> why each failed.
    """

    layers: Layers
    names: Mapping[str, str]
    untied: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    way: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let the layers know the model's own names, under which they are exported."""
        keys = {own: key for key, own in self.names.items()}
        self.layers.own_names = keys | {alias: keys[own] for alias, own in self.aliases.items()}

    def __str__(self) -> str:
        """Return in one line how the model was split, and why not in another way."""
        others = "".join(f"; not {way}: {reason}" for way, reason in self.failed.items())
        return f"{len(self.layers)} layers, {self.way}{others}"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the model's own names, for `load_state_dict` of another model of its class."""
        state = {self.names[key]: tensor for key, tensor in self.layers.state_dict().items()}
        return state | {alias: state[name] for alias, name in self.aliases.items()}

    def load_into(self, model: nn.Module) -> None:
        """Load the weights into another model of the class that was split.

        Raises:
            UsageError: It is another model, or it has one weight where splitting made two.
        """
        state = self.state_dict()
        tensors = model.state_dict(keep_vars=True)
        for later, first in self.untied.items():
            tied = tensors.get(later) is tensors.get(first)
            if tied and not torch.equal(state[later], state[first]):
                raise UsageError(
                    f"{later} and {first} are one weight in {type(model).__name__} and two in the layers, where they "
                    "trained apart; give a model in which they are two",
                    code="weights-tied-in-model",
                )
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UsageError(
                f"the weights do not fit {type(model).__name__}: {first_line(error)}; give a model that is built as "
                "the one that was split",
                code="weights-of-another-model",
            ) from error
