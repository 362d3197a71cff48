"""Runs forward passes without gradients, also of layers that differentiate inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from decoupled_pp.core.packets import Payload, map_payload

_NEEDS_THEM = "does not require grad"
"""Part of what torch says where code differentiates and gradients are off."""


class WithoutGradients:
    """Runs one function of a payload without gradients, time and again.

    If it calls `torch.autograd.grad` and does not switch gradients on itself, it is run with them, and its result is
    detached: that costs the memory of a graph.
    """

    def __init__(self) -> None:
        self._needs_them: bool | None = None  # None: not known before the first call

    def __call__(self, function: Callable[[Payload], Any], payload: Payload) -> Any:
        """Return the function's result."""
        if self._needs_them is None:
            kept = map_payload(torch.clone, payload)  # the call that fails may have changed it in place
            try:
                with torch.no_grad():
                    result = function(payload)
                self._needs_them = False
                return result
            except RuntimeError as error:
                if _NEEDS_THEM not in str(error):
                    raise
            self._needs_them = True
            payload = kept
        with torch.set_grad_enabled(self._needs_them):
            return map_payload(torch.detach, function(payload))
