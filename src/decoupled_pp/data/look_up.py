"""Makes look-ups of several hops: a synthetic task that no shallow network solves.

A sample is a table, a random permutation f of `nodes` numbers written as f(0) f(1) ..., and then questions: some
nodes x for 1 hop, some for 2, up to `hops`. The answer to a question of h hops is f taken h times; the position tells
h. A layer of attention follows a hop, or joins two stretches that earlier layers have found. So in a stage that is too
shallow for h hops there is nothing to see but chance, 1 in `nodes`, whatever its critic.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from decoupled_pp.core.criterion import IGNORED
from decoupled_pp.core.datasets import BatchSource, Data, DataInfo
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.seeds import Purpose, generator
from decoupled_pp.settings.sections import LookUpData


def open_look_up(settings: LookUpData, seed: int) -> Data:
    """Open endless training samples, and held-out ones that are the same for every seed.

    `validation_samples` is rounded up to whole micro-batches.
    """
    info = DataInfo("tokens", (settings.nodes + settings.hops * settings.questions,), settings.nodes)
    train = LookUps(settings, settings.batch_size, seed, Purpose.ORDER)
    size = settings.validation_batch_size or settings.batch_size
    held_out = LookUps(settings, size, 0, Purpose.HELD_OUT, -(-settings.validation_samples // size))
    return Data(info, train, held_out)


class LookUps(BatchSource):
    """Micro-batches of look-ups; number n is a function of the seed and n."""

    def __init__(
        self, settings: LookUpData, batch_size: int, seed: int, purpose: Purpose, batches: int | None = None
    ) -> None:
        self._settings = settings
        self._batch_size = batch_size
        self._seed = seed
        self._purpose = purpose
        self._batches = batches  # None: endless

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches from number `start` on."""
        for number in count(start) if self._batches is None else range(start, self._batches):
            random = generator(self._seed, self._purpose, number)
            yield look_ups(self._settings, self._batch_size, random)


def look_ups(settings: LookUpData, samples: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) and targets (B, T), IGNORED in the table, with T = nodes + hops x questions."""
    table = _permutations(samples, settings.nodes, random)
    asked = []
    answers = []
    for hop in range(1, settings.hops + 1):
        nodes = _permutations(samples, settings.nodes, random)[:, : settings.questions]
        asked.append(nodes)
        for _ in range(hop):
            nodes = table.gather(1, nodes)
        answers.append(nodes)
    return torch.cat([table, *asked], 1), torch.cat([torch.full_like(table, IGNORED), *answers], 1)


def _permutations(samples: int, nodes: int, random: torch.Generator) -> Tensor:
    """Return one permutation of the nodes for every sample, (samples, nodes)."""
    return torch.rand(samples, nodes, generator=random).argsort(1)
