"""LoPT for fine-tuning: a small decoder rebuilds a stage's input from its output (2605.04913).

Legend: B batch, T tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, first_tensor
from decoupled_pp.critics.requirements import critic_unfit
from decoupled_pp.settings.critics import ReconstructCritic

_GAIN = 0.1


class Reconstruct(Critic):
    """A decoder: (B, T, D) or (B, D) -> the same shape. It makes no logits and looks at no targets."""

    needs_first = True
    exits = False

    def __init__(self, decoder: nn.Module, weight: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.weight = weight

    def forward(self, hidden: Payload) -> Tensor:
        """Rebuild the stage's input."""
        rebuilt: Tensor = self.decoder(first_tensor(hidden))
        return rebuilt

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return lambda mean (d(h_k) - sg(h_{k-1}))^2.

        A stage that is given no activations (the first one, given token ids) rebuilds the output of its first layer.
        """
        hidden = first_tensor(view.hidden)
        for source in (view.inputs, view.first):
            given = first_tensor(source)
            if given.is_floating_point() and given.shape == hidden.shape:
                # Detached: the first layer's output still has its graph, and would be drawn towards the decoder's.
                return self.weight * functional.mse_loss(self(view.hidden), given.detach())
        raise UsageError(
            f"critic reconstruct rebuilds activations shaped like the stage's output {tuple(hidden.shape)}, but was "
            f"given {tuple(first_tensor(view.inputs).shape)}; `cut` elsewhere or choose `critic.kind` head",
            code="critic-unfit",
            key="critic.kind",
        )


def mlp_decoder(width: int) -> nn.Sequential:
    """Build LayerNorm, linear to a quarter of the width, GELU, linear back.

    Source: LoPT (2605.04913), the authors' code, `lopt/modeling_lopt.py`.
    """
    narrow = max(1, width // 4)
    first, last = nn.Linear(width, narrow), nn.Linear(narrow, width)
    for layer in (first, last):
        nn.init.xavier_uniform_(layer.weight, gain=_GAIN)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)


def linear_decoder(width: int) -> nn.Linear:
    """Build one linear layer, the decoder of earlier versions."""
    layer = nn.Linear(width, width)
    nn.init.xavier_normal_(layer.weight, gain=_GAIN)
    nn.init.zeros_(layer.bias)
    return layer


def build_reconstruct(settings: ReconstructCritic, context: CriticContext) -> Reconstruct:
    """Build the decoder of one stage.

    LoPT's loss is lambda times the mean over the K - 1 critics, so each has its share of lambda.
    """
    hidden = first_tensor(context.hidden)
    if hidden.dim() not in {2, 3} or not hidden.is_floating_point():
        raise critic_unfit(
            context,
            "critic reconstruct is for token and vector activations, not for a stage output of shape "
            f"{tuple(hidden.shape)} {hidden.dtype}",
        )
    width = hidden.shape[-1]
    if settings.decoder == "linear":
        critic = Reconstruct(linear_decoder(width), settings.weight)
    else:
        critic = Reconstruct(mlp_decoder(width), settings.weight / (context.stages - 1))
    return critic.to(device=hidden.device, dtype=hidden.dtype)
