"""Measures emulated pipelines on the ranks that there are: each rank alone, its passes, and the pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import predicted
from benchmarks.alone import message_seconds
from benchmarks.contenders import Contender, build_contender
from benchmarks.emulated import emulated_plan, micro_batch
from benchmarks.workload import TIMEOUT, Durations, Workload
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.reports import NoteRecord
from decoupled_pp.links import join_world

_MESSAGES = 15


def measure(
    work: Workload, strategies: Sequence[str], repeats: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """Measures all strategies in turn, `repeats` times (A B A B ...).

    Returns:
        Strategy -> figures of every repeat, predictions on rank 0 only; strategy -> why it was not measured.
    """
    torch.set_num_threads(1)
    rank = _Rank(work)
    contenders: dict[str, Contender] = {}
    refused: dict[str, str] = {}
    for kind in strategies:
        try:
            contenders[kind] = rank.contender(kind)
        except UsageError as error:  # on every rank alike, before anything is sent: the others can be measured
            refused[kind] = str(error)
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in contenders}
    for repeat in range(repeats):
        rank.durations.repeat = repeat
        message = rank.measure_message()
        for kind, contender in contenders.items():
            results[kind].append(rank.measure(kind, contender, message))
    rank.leave()
    return results, refused


class _Rank:
    """This rank's side of all measurements.

    Attributes:
        durations: Durations of its sleeps.
    """

    def __init__(self, work: Workload) -> None:
        """Joins the others."""
        self._work = work
        self._world = join_world(TIMEOUT)
        self._channel = self._world.channel()
        self.durations = Durations(work.unevenness, self._world.rank)

    def contender(self, kind: str) -> Contender:
        """Builds this rank of a strategy."""
        return build_contender(kind, self._world, self._work, self.durations)

    def measure(self, kind: str, contender: Contender, message: predicted.MessageCost) -> dict[str, float]:
        """Measures own compute alone, its passes, and the pipeline, one after the other."""
        work = self._work
        name = f"{kind}/{self.durations.repeat}"
        bound = TIMEOUT + 100 * work.packets * work.nominal_seconds
        self._channel.gather(f"start/{name}", 0, TIMEOUT)
        own = contender.alone()
        alone = max(self._channel.gather(f"alone/{name}", own, bound))
        with self.durations.pause():  # the planner multiplies by the factors itself
            passes = contender.passes(contender.alone() if work.unevenness.drawn else own)
        passes_of_all = self._channel.gather(f"passes/{name}", passes, bound)
        period = max(self._channel.gather(f"period/{name}", contender.period(), bound))
        found = figures_of(period, alone, work.nominal_seconds)
        if self._world.rank == 0:  # the others would only fight it for cores
            foreseen = predicted.predicted_period(kind, passes_of_all, message, work, self._factors())
            found |= predicted.figures(period, foreseen, passes_of_all, message)
        self._channel.gather(f"predicted/{name}", 0, bound + TIMEOUT)
        return found

    def _factors(self) -> predicted.Factors:
        """Returns the factors of all ranks in the present repeat."""
        own = self.durations
        ranks = [Durations(own.unevenness, rank, own.repeat) for rank in range(self._work.ranks)]
        return lambda rank, number: ranks[rank].factors(number)

    def measure_message(self) -> predicted.MessageCost:
        """Measures a message as large as a micro-batch's activations; a tiny one tells latency and bytes apart."""
        inputs, _ = micro_batch(self._work)
        layer = emulated_plan(self._work, self.durations, self._work.ranks, self._work.ranks).stage_module(0)

        def costs(name: str, tensor: Tensor) -> list[tuple[float | None, float]]:
            with self.durations.pause():
                own = message_seconds(
                    tensor,
                    rank=self._world.rank,
                    ranks=self._work.ranks,
                    compute=lambda: layer(inputs).sum().backward(),
                    repeats=_MESSAGES,
                )
            return list(self._channel.gather(f"{name}/{self.durations.repeat}", [own.latency, own.host], TIMEOUT))

        return predicted.MessageCost.of(costs("tiny", inputs[:1, :1].clone()), costs("whole", inputs))

    def leave(self) -> None:
        """Keeps rank 0 until the others have ended: without torchrun it hosts the store that they still need."""
        if self._world.rank:
            self._channel.post(NoteRecord(stage=self._world.rank, text="this rank is done"))
            return
        deadline = time.monotonic() + TIMEOUT
        left = self._work.ranks - 1
        while left > 0 and time.monotonic() < deadline:
            left -= len(self._channel.collect())
            time.sleep(0.01)


def figures_of(period: float, alone: float, nominal: float) -> dict[str, float]:
    """Returns the figures of one measurement; the arguments are seconds per micro-batch.

    Args:
        period: Period of the pipeline.
        alone: The slowest rank's own compute, back to back; all ranks run theirs at the same time. With uneven
            durations it is the mean over the very micro-batches that `period` is measured on.
        nominal: The bare sleeps; with uneven durations their expected length on the slowest rank.
    """
    return {
        "period_ms": period * 1000,
        "alone_ms": alone * 1000,
        "share_of_ideal": alone / period,
        "share_of_nominal": nominal / period,
        "cost_us": (period - alone) * 1e6,
    }
