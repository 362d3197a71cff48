"""The default critic: the one that was measured to serve a kind of network best (docs/critics.md has the figures)."""

from __future__ import annotations

from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import first_tensor
from decoupled_pp.critics.auglocal import build_auglocal
from decoupled_pp.critics.head import matching_head
from decoupled_pp.settings.critics import AuglocalCritic, AutoCritic

IMAGES = AuglocalCritic(kind="auglocal", depth=2, resolution=7)
"""Two of the layers above, on images of 7 x 7. For all other forms `head` is as good or better."""


def build_auto(settings: AutoCritic, context: CriticContext) -> nn.Module:
    """Build `IMAGES` for images with one label each; `head` for all else, and where a layer cannot be copied."""
    is_image = first_tensor(context.hidden).dim() == 4 and context.output.dim() == 2
    if is_image:
        try:
            return build_auglocal(IMAGES, context)
        except UsageError:  # a layer of the user's own that cannot be made afresh or fit another shape
            pass
    return matching_head(context.hidden, context.output, context.stage, context.class_dim)
