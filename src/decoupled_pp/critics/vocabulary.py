"""Cheap critics for large vocabularies: the loss on some tokens, a low-rank projection, sampled or hashed classes.

Exits are scored on all tokens and all classes; only training is cheap. Legend: B batch, T tokens, D width, V
vocabulary, N positions that count, R rank, S sampled classes, J hash functions, M buckets.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import IGNORED, Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, as_tuple, first_tensor
from decoupled_pp.settings.critics import VocabularyCritic


class _Cheap(Critic):
    """Norm and projection of every position by itself: (B, T, D) -> (B, T, V), trained on a share of the positions."""

    def __init__(self, width: int, tokens: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tokens = tokens

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output: every token, every class."""
        return self.all_classes(self.norm(first_tensor(hidden)))

    def objective(self, view: View, loss: Loss) -> Tensor:
        """The loss of a random share of the positions (those that count first), drawn from the stage's own stream."""
        hidden, target = first_tensor(view.hidden), as_tuple(view.target)[0]
        if target.is_floating_point() or target.shape != hidden.shape[:-1]:
            raise UsageError(
                f"critic vocabulary needs one class index per position as target, not {tuple(target.shape)} "
                f"{target.dtype}; choose critic.kind head"
            )
        rows, wanted = hidden.flatten(0, -2), target.flatten()
        if self.tokens < 1:
            count = max(1, round(self.tokens * len(wanted)))
            chosen = torch.randperm(len(wanted), device=wanted.device)
            ignored = (wanted[chosen] == IGNORED).to(torch.uint8)
            chosen = chosen[ignored.argsort(stable=True)][:count]  # those that count first, in their random order
            rows, wanted = rows[chosen], wanted[chosen]
        return self.cheap_loss(self.norm(rows), wanted, loss)

    @abstractmethod
    def all_classes(self, rows: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""

    def cheap_loss(self, rows: Tensor, target: Tensor, loss: Loss) -> Tensor:
        """(N, D), (N,) -> scalar; by default the loss over all classes."""
        return loss(self.all_classes(rows), target)


class _Linear(_Cheap):
    """A projection, or with a rank one in two steps, D -> R -> V."""

    def __init__(self, width: int, vocabulary: int, settings: VocabularyCritic) -> None:
        super().__init__(width, settings.tokens)
        rank = settings.rank
        self.reduction = nn.Identity() if rank is None else nn.Linear(width, rank, bias=False)
        self.projection = nn.Linear(width if rank is None else rank, vocabulary, bias=False)

    def all_classes(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.projection(self.reduction(rows))
        return logits


class _Sampled(_Linear):
    """Z ~ exp z_y + (V - 1) / S sum over S sampled classes of exp z_s, an unbiased estimate; the target is never drawn.

    Source: Bengio & Senecal 2008; Jean et al. 2015 (1412.2007), section 3, here with uniform proposals.
    """

    def __init__(self, width: int, vocabulary: int, settings: VocabularyCritic, classes: int) -> None:
        super().__init__(width, vocabulary, settings)
        self.classes, self.vocabulary = classes, vocabulary

    def cheap_loss(self, rows: Tensor, target: Tensor, loss: Loss) -> Tensor:
        rows, counted = self.reduction(rows), target != IGNORED
        drawn = torch.randint(self.vocabulary, (self.classes,), device=target.device)
        own = functional.embedding(target.clamp(min=0), self.projection.weight)
        others = rows @ functional.embedding(drawn, self.projection.weight).T
        hit = drawn[None, :] == target[:, None]
        # The weight of each draw that is no hit: (V - 1) / (draws that are none), so that the sum stays unbiased.
        others = others + math.log(self.vocabulary - 1) - (~hit).sum(dim=1, keepdim=True).clamp(min=1).log()
        logits = torch.cat([(rows * own).sum(dim=1, keepdim=True), others.masked_fill(hit, -torch.inf)], dim=1)
        return loss(logits, torch.where(counted, 0, IGNORED))


class _Hashed(_Cheap):
    """J hash functions to M buckets each; trained to predict buckets, log p(class) ~ sum of its buckets' log p.

    Source: Medini et al. 2019 (1910.13830), merged-averaged classifiers via hashing.
    """

    bucket_of: Tensor

    def __init__(self, width: int, vocabulary: int, settings: VocabularyCritic, buckets: int) -> None:
        super().__init__(width, settings.tokens)
        rank, self.hashes, self.buckets = settings.rank, settings.hashes, buckets
        self.reduction = nn.Identity() if rank is None else nn.Linear(width, rank, bias=False)
        self.projection = nn.Linear(width if rank is None else rank, self.hashes * buckets, bias=False)
        self.register_buffer("bucket_of", torch.randint(buckets, (self.hashes, vocabulary)))

    def all_classes(self, rows: Tensor) -> Tensor:
        logs = self._buckets(rows).log_softmax(dim=-1)
        return torch.stack([logs[..., j, :][..., self.bucket_of[j]] for j in range(self.hashes)]).sum(dim=0)

    def cheap_loss(self, rows: Tensor, target: Tensor, loss: Loss) -> Tensor:
        counted, logits = target != IGNORED, self._buckets(rows)
        buckets = torch.where(counted, self.bucket_of[:, target.clamp(min=0)], IGNORED)  # (J, N)
        return torch.stack([loss(logits[:, j], buckets[j]) for j in range(self.hashes)]).sum()

    def _buckets(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.projection(self.reduction(rows)).unflatten(-1, (self.hashes, self.buckets))
        return logits


def build_vocabulary(settings: VocabularyCritic, context: CriticContext) -> nn.Module:
    """The cheap token critic of one stage.

    Raises:
        UsageError: Stage output and network output are not (B, T, D) and (B, T, V), or there are too few classes.
    """
    hidden, output = first_tensor(context.hidden), context.output
    if hidden.dim() != 3 or output.dim() != 3 or hidden.shape[1] != output.shape[1] or not hidden.is_floating_point():
        raise UsageError(
            f"stage {context.stage}: critic vocabulary is for tokens, not for a stage output of shape "
            f"{tuple(hidden.shape)} and network outputs of shape {tuple(output.shape)}; choose critic.kind head"
        )
    width, vocabulary = hidden.shape[2], output.shape[2]
    reduced = settings.classes or settings.buckets
    if reduced is not None and reduced >= vocabulary:
        raise UsageError(
            f"critic vocabulary: classes or buckets {reduced} must be fewer than the {vocabulary} classes there are"
        )
    critic: nn.Module
    if settings.classes is not None:
        critic = _Sampled(width, vocabulary, settings, settings.classes)
    elif settings.buckets is not None:
        critic = _Hashed(width, vocabulary, settings, settings.buckets)
    else:
        critic = _Linear(width, vocabulary, settings)
    return critic.to(device=hidden.device, dtype=hidden.dtype)
