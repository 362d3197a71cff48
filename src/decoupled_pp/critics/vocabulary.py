"""Cheap critics for large vocabularies: they train on some tokens, at low rank, on sampled or hashed classes.

Exits are scored on all tokens and all classes; only training is cheap. Legend: B batch, T tokens, D width, V
vocabulary, N positions that count, R rank, S sampled classes, J hash functions, M buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.criterion import IGNORED, classes_in
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, first_tensor
from decoupled_pp.critics.requirements import class_indices, critic_unfit, ignored_by, of_drawn_classes, shapes_of
from decoupled_pp.settings.critics import VocabularyCritic


class _Linear(Critic):
    """Norm and projection of every position by itself: (B, T, D) -> (B, T, V), trained on a share of the positions.

    With a rank the projection is in two steps, D -> R -> V.
    """

    def __init__(self, width: int, outputs: int, settings: VocabularyCritic) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tokens = settings.tokens
        self.reduction: nn.Module = nn.Identity()
        if settings.rank is not None:
            self.reduction = nn.Linear(width, settings.rank, bias=False)
            width = settings.rank
        self.projection = nn.Linear(width, outputs, bias=False)

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output: all tokens, all classes."""
        return self.all_classes(self.norm(first_tensor(hidden)))

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return the loss of a random share of the positions, drawn from the stage's own stream.

        Positions that count are taken first.
        """
        hidden = first_tensor(view.hidden)
        rows = hidden.flatten(0, -2)
        wanted = class_indices("vocabulary", view.target, hidden).flatten()
        if self.tokens < 1:
            count = max(1, round(self.tokens * len(wanted)))
            chosen = torch.randperm(len(wanted), device=wanted.device)
            ignored = (wanted[chosen] == ignored_by(loss)).to(torch.uint8)
            chosen = chosen[ignored.argsort(stable=True)][:count]  # a stable sort keeps the random order
            rows = rows[chosen]
            wanted = wanted[chosen]
        return self.cheap_loss(self.norm(rows), wanted, loss)

    def all_classes(self, rows: Tensor) -> Tensor:
        """Return the logits of all classes: (..., D) -> (..., V)."""
        logits: Tensor = self.projection(self.reduction(rows))
        return logits

    def cheap_loss(self, rows: Tensor, target: Tensor, loss: Loss) -> Tensor:
        """Return the training loss: (N, D), (N,) -> scalar."""
        return loss(self.all_classes(rows), target)


class _Sampled(_Linear):
    """Estimates the softmax's denominator from S sampled classes: Z ~ exp z_y + (V - 1) / S sum over s of exp z_s.

    The estimate is unbiased; draws of the target itself are left out.

    Source: Bengio & Senecal 2008; Jean et al. 2015 (1412.2007), section 3, here with uniform proposals.
    """

    def __init__(self, width: int, vocabulary: int, settings: VocabularyCritic, classes: int) -> None:
        super().__init__(width, vocabulary, settings)
        self.classes = classes
        self.vocabulary = vocabulary

    def cheap_loss(self, rows: Tensor, target: Tensor, loss: Loss) -> Tensor:
        rows = self.reduction(rows)
        counted = target != ignored_by(loss)
        # One draw for all rows: S rows of the projection are gathered, instead of S for every position.
        drawn = torch.randint(self.vocabulary, (self.classes,), device=target.device)
        own = functional.embedding(target.clamp(min=0), self.projection.weight)
        others = rows @ functional.embedding(drawn, self.projection.weight).T
        hit = drawn[None, :] == target[:, None]
        # Each draw that is no hit weighs (V - 1) / (draws that are none), so that the sum stays unbiased. A weight of
        # an exponential is added to its logit as a logarithm.
        others = others + math.log(self.vocabulary - 1) - (~hit).sum(dim=1, keepdim=True).clamp(min=1).log()
        logits = torch.cat([(rows * own).sum(dim=1, keepdim=True), others.masked_fill(hit, -torch.inf)], dim=1)
        return of_drawn_classes(loss)(logits, torch.where(counted, 0, IGNORED))


class _Hashed(_Linear):
    """Predicts the buckets of J hash functions with M buckets each: log p(class) ~ sum of its buckets' log p.

    Source: Medini et al. 2019 (1910.13830), merged-averaged classifiers via hashing.
    """

    bucket_of: Tensor

    def __init__(self, width: int, vocabulary: int, settings: VocabularyCritic, buckets: int) -> None:
        super().__init__(width, settings.hashes * buckets, settings)
        self.hashes = settings.hashes
        self.buckets = buckets
        self.register_buffer("bucket_of", torch.randint(buckets, (self.hashes, vocabulary)))

    def all_classes(self, rows: Tensor) -> Tensor:
        logs = self._bucket_logits(rows).log_softmax(dim=-1)
        return torch.stack([logs[..., j, :][..., self.bucket_of[j]] for j in range(self.hashes)]).sum(dim=0)

    def cheap_loss(self, rows: Tensor, target: Tensor, loss: Loss) -> Tensor:
        counted = target != ignored_by(loss)
        loss = of_drawn_classes(loss)
        logits = self._bucket_logits(rows)
        # IGNORED is -100, an index from the end: such targets are looked up as class 0, and then set back.
        buckets = torch.where(counted, self.bucket_of[:, target.clamp(min=0)], IGNORED)  # (J, N)
        return torch.stack([loss(logits[:, j], buckets[j]) for j in range(self.hashes)]).sum()

    def _bucket_logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = super().all_classes(rows).unflatten(-1, (self.hashes, self.buckets))
        return logits


def build_vocabulary(settings: VocabularyCritic, context: CriticContext) -> nn.Module:
    """Build the cheap token critic of one stage."""
    hidden = first_tensor(context.hidden)
    output = context.output
    are_tokens = hidden.dim() == 3 and output.dim() == 3 and hidden.shape[1] == output.shape[1]
    if not are_tokens or not hidden.is_floating_point():
        raise critic_unfit(context, f"critic vocabulary is for tokens, not for {shapes_of(context)}")
    if classes_in(output, context.class_dim) != 2:
        raise critic_unfit(
            context, f"critic vocabulary takes the classes in the last dimension, not in {context.class_dim}"
        )
    width = hidden.shape[2]
    vocabulary = output.shape[2]
    for key, fewer in (("critic.classes", settings.classes), ("critic.buckets", settings.buckets)):
        if fewer is not None and fewer >= vocabulary:
            raise UsageError(
                f"`{key}` {fewer} must be fewer than the {vocabulary} classes there are; lower it",
                code="too-few-classes",
                key=key,
            )
    critic: _Linear
    if settings.classes is not None:
        critic = _Sampled(width, vocabulary, settings, settings.classes)
    elif settings.buckets is not None:
        critic = _Hashed(width, vocabulary, settings, settings.buckets)
    else:
        critic = _Linear(width, vocabulary, settings)
    return critic.to(device=hidden.device, dtype=hidden.dtype)
