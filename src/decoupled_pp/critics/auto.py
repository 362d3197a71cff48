"""The default critic: what has been measured to serve a kind of network best (docs/critics.md has the figures)."""

from __future__ import annotations

from torch import nn

from decoupled_pp.contracts import CriticContext, UsageError, first_tensor
from decoupled_pp.critic_sections import AuglocalCritic, AutoCritic
from decoupled_pp.critics.auglocal import build_auglocal
from decoupled_pp.critics.head import matching_head

IMAGES = AuglocalCritic(kind="auglocal", depth=1)
TOKENS = AuglocalCritic(kind="auglocal", depth=1)


def build_auto(settings: AutoCritic, context: CriticContext) -> nn.Module:
    """The critic that suits the form of a stage's output; `head` for other forms, and where layers cannot be copied.

    Raises:
        UsageError: No critic of ours judges such an output.
    """
    form = first_tensor(context.hidden).dim(), context.output.dim()
    chosen = {(4, 2): IMAGES, (3, 3): TOKENS}.get(form)
    if chosen is not None:
        try:
            return build_auglocal(chosen, context)
        except UsageError:  # a layer of the user's own that cannot be made afresh, say
            pass
    return matching_head(context.hidden, context.output, context.stage)
