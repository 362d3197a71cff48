"""Builds GPT, a pre-norm decoder with causal attention, as a list of layers.

Legend: B batch, T tokens, D width, H heads, V vocabulary.

Input and output embedding are *not* tied, unlike GPT-2: the embedding lives in the first stage and the output
projection in the last, and in this kind of training these never exchange gradients, so one shared matrix would silently
become two different ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.fit import expect_form
from decoupled_pp.settings.sections import GptModel

INITIAL_STD = 0.02  # of initial weights (GPT-2, Radford et al. 2019; the released code)


class Embedding(nn.Module):
    """Token plus learned position embedding, then dropout: (B, T) int64 -> (B, T, D)."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise afresh."""
        nn.init.normal_(self.token.weight, std=INITIAL_STD)
        nn.init.normal_(self.position.weight, std=INITIAL_STD)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Embed token ids; T must not exceed the context the model was built for."""
        length = tokens_BT.shape[1]
        context = self.position.num_embeddings
        if length > context:
            raise UsageError(
                f"the GPT was built for a context of {context} tokens but got {length}; shorten the input, or raise "
                "`data.context`",
                code="context-exceeded",
                key="data.context",
            )
        positions_T = torch.arange(length, device=tokens_BT.device)
        hidden_BTD: Tensor = self.dropout(self.token(tokens_BT) + self.position(positions_T))
        return hidden_BTD


class Attention(nn.Module):
    """Causal multi-head self-attention: (B, T, D) -> (B, T, D); a position attends to itself and the past."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Attend."""
        batch, length, width = hidden_BTD.shape
        split = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.queries_keys_values(hidden_BTD).view(split).permute(2, 0, 3, 1, 4).unbind(0)
        # One fused projection and one view: (B, T, 3, H, D/H) -> three of (B, H, T, D/H).
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed_BTD: Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return mixed_BTD


class Block(nn.Module):
    """One pre-norm transformer block, attention then a 4x GELU MLP, each on a residual branch: (B, T, D) -> same."""

    def __init__(self, width: int, heads: int, dropout: float, depth: int) -> None:
        super().__init__()
        # 2 residual branches per block: this keeps the variance of the residual stream at 1 over `depth` blocks.
        self.residual_std = INITIAL_STD / math.sqrt(2 * depth)
        self.depth = depth
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.expansion = nn.Linear(width, 4 * width)
        self.contraction = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise afresh as GPT-2 does; a critic that copies this block calls it, too."""
        for norm in (self.attention_norm, self.mlp_norm):
            norm.reset_parameters()
        for linear, std in (
            (self.attention.queries_keys_values, INITIAL_STD),
            (self.attention.projection, self.residual_std),
            (self.expansion, INITIAL_STD),
            (self.contraction, self.residual_std),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def auglocal_copy(self, in_channels: int, stride: int, out_channels: int) -> Block:
        """Build a block of another width for a narrow AugLocal critic; its heads are about as wide as here."""
        size = self.attention.queries_keys_values.in_features // self.attention.heads
        heads = max(1, out_channels // size)
        while out_channels % heads:
            heads -= 1
        return Block(out_channels, heads, self.dropout.p, self.depth)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Apply both branches."""
        hidden_BTD = hidden_BTD + self.dropout(self.attention(self.attention_norm(hidden_BTD)))
        expanded = F.gelu(self.expansion(self.mlp_norm(hidden_BTD)))
        output_BTD: Tensor = hidden_BTD + self.dropout(self.contraction(expanded))
        return output_BTD


class Head(nn.Module):
    """Final norm and vocabulary projection: (B, T, D) -> (B, T, V).

    Initial weights are torch's own, with a standard deviation of 1/sqrt(3 D): at GPT-2's width of 768 that is its 0.02.
    Narrow networks get more, and learn much faster for it (docs/log.md).
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise afresh."""
        self.norm.reset_parameters()
        self.projection.reset_parameters()

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Project to logits."""
        logits_BTV: Tensor = self.projection(self.norm(hidden_BTD))
        return logits_BTV


def build_gpt(settings: GptModel, info: DataInfo) -> nn.Sequential:
    """Build layers `embedding`, `block0`.., `head`: (B, T) int64 -> (B, T, V) logits; V is `info.outputs`.

    Source: GPT-2 (Radford et al. 2019), section 2.3: pre-norm, residual projections scaled by the square root of the
        number of residual branches.
    """
    expect_form(info, "gpt", "tokens")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["embedding"] = Embedding(info.outputs, info.shape[0], settings.width, settings.dropout)
    for index in range(settings.depth):
        layers[f"block{index}"] = Block(settings.width, settings.heads, settings.dropout, settings.depth)
    layers["head"] = Head(settings.width, info.outputs)
    return nn.Sequential(layers)
