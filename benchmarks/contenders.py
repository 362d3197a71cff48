"""One rank of an emulated pipeline, trained decoupled or by a pipelined baseline, and its own compute alone."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.alone import pass_seconds, pipeline_of_one
from benchmarks.emulated import CLASSES, emulated_plan, micro_batch
from benchmarks.workload import TIMEOUT, Durations, Workload
from decoupled_pp.commands.plan.orders import SPLIT
from decoupled_pp.core.reports import Record, SpansRecord
from decoupled_pp.links import World
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings
from decoupled_pp.training.baselines import Training, build_baseline, stages_needed
from decoupled_pp.training.trainer import Trainer

_RATE = 0.01
_WARM_UP = 5
_ALONE = 25
_PASSES = 8
_CPU = torch.device("cpu")


class Contender(ABC):
    """A way to train the emulated pipeline; every rank calls the same methods at the same time."""

    def __init__(self, world: World, work: Workload, durations: Durations) -> None:
        """Stores the ranks, the work, and the durations of this rank; every measurement starts them anew."""
        self._world = world
        self._work = work
        self._durations = durations

    @property
    def _alone_count(self) -> int:
        """Micro-batches that a rank alone is measured on: the pipeline's own, if they differ in duration."""
        return self._work.packets if self._durations.drawn else _ALONE

    @abstractmethod
    def period(self) -> float:
        """Returns the seconds per micro-batch in steady state that this rank sees (0 if another rank knows better)."""

    @abstractmethod
    def alone(self) -> float:
        """Returns the seconds per micro-batch of this rank's own compute in a plain PyTorch loop, without links."""

    @abstractmethod
    def passes(self, alone: float) -> dict[int, tuple[float, float, float]]:
        """Returns stage -> seconds of its forward, input's and weights' gradients without links, for the planner.

        Args:
            alone: Last result of `alone`.
        """


class Decoupled(Contender):
    """Our own runtime, with linear critics; one optimizer step per micro-batch."""

    def __init__(self, world: World, work: Workload, durations: Durations) -> None:
        """Builds the stages, connects them, and warms up."""
        super().__init__(world, work, durations)
        self._batch = micro_batch(work)
        self._ends: dict[int, float] = {}  # packet -> when the last stage was done with it
        self._done = _WARM_UP
        self._trainer = Trainer(
            emulated_plan(work, durations, work.ranks, work.ranks),
            optimizer={"kind": "SGD", "lr": _RATE},
            device="cpu",
            capacity=work.capacity,
            timeout_seconds=TIMEOUT,
            log_every=1000,
            observer=self._observe,
        )
        self._trainer.fit([self._batch], _WARM_UP)

    def _observe(self, records: list[Record]) -> None:
        for record in records:
            if isinstance(record, SpansRecord) and record.stage == self._work.ranks - 1:
                self._ends.update((span.packet, span.end) for span in record.spans if span.phase == "step")

    def period(self) -> float:
        """Measures between two ends of the last stage's steps, once the pipeline is full; rank 0 collects the spans."""
        self._ends.clear()
        packets = self._work.packets
        fill = self._work.fill
        start = self._done
        self._done += fill + packets
        self._durations.restart(fill)
        self._trainer.fit([self._batch], fill + packets, trace_packets=range(start, self._done))
        if self._world.rank != 0:
            return 0.0
        return (self._ends[self._done - 1] - self._ends[start + fill - 1]) / packets

    def alone(self) -> float:
        """Measures the same trunk, critic, loss and optimizer."""
        stage = self._trainer.stages[0]
        trunk = copy.deepcopy(stage.trunk)
        critic = copy.deepcopy(stage.critic) or nn.Identity()
        optimizer = torch.optim.SGD([*trunk.parameters(), *critic.parameters()], lr=_RATE)
        inputs, target = self._batch

        def step() -> None:
            stage.body.loss(critic(trunk(inputs)), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        self._durations.restart(1)
        return seconds_per_call(step, self._alone_count)

    def passes(self, alone: float) -> dict[int, tuple[float, float, float]]:
        """Splits `alone` as the sleeps are split; only the sum sets the pace."""
        share = self._work.forward_seconds / (self._work.forward_seconds + self._work.backward_seconds)
        return {self._world.rank: (share * alone, (1 - share) * alone, 0.0)}


class Pipelined(Contender):
    """A baseline with a flush, and one optimizer step, per `micro_batches`."""

    def __init__(self, kind: str, world: World, work: Workload, durations: Durations) -> None:
        """Builds this rank's stages and warms up.

        Raises:
            UsageError: The schedule does not fit the ranks or the micro-batches.
        """
        super().__init__(world, work, durations)
        self._kind = kind
        self._count = work.micro_batches
        self._stages = stages_needed(kind, work.ranks) or work.ranks
        self._training = Training(cross_entropy, OptimizerSettings(kind="SGD", lr=_RATE), ScheduleSettings(), 1)
        plan = emulated_plan(work, durations, self._stages, work.ranks)
        self._strategy = build_baseline(kind, plan, self._training, _CPU, rank=world.rank, ranks=work.ranks)
        self._batches = [micro_batch(work)] * self._count
        self._strategy.step(self._batches)

    def period(self) -> float:
        """Measures whole steps, flush and optimizer step included."""
        self._durations.restart(self._count)
        return seconds_per_call(lambda: self._strategy.step(self._batches), self._work.steps) / self._count

    def alone(self) -> float:
        """Measures copies of this rank's stages, each on an input of its own; the last one with the loss."""
        parts = [copy.deepcopy(part.layers) for part in self._strategy.parts.values()]
        optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=_RATE)
        inputs, target = micro_batch(self._work)

        def step() -> None:
            for _ in range(self._count):
                for part in parts:
                    output = part(inputs)
                    last = output.shape[1] == CLASSES
                    loss = cross_entropy(output, target) / self._count if last else output.sum()
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        self._durations.restart(self._count)
        return seconds_per_call(step, max(2, self._alone_count // self._count)) / self._count

    def passes(self, alone: float) -> dict[int, tuple[float, float, float]]:
        """Measures the passes that the schedule will call, and adds its own share of time to each.

        That share is what the same schedule takes longer with all its stages on this rank alone, where it runs the
        same Python and sends nothing.
        """
        parts = copy.deepcopy(self._strategy.parts)
        inputs, target = micro_batch(self._work)
        split = self._kind in SPLIT
        seconds = pass_seconds(parts, inputs, target, cross_entropy, stages=self._stages, split=split, repeats=_PASSES)
        calls = (3 if split else 2) * len(seconds)
        share = max(0.0, self._on_one_rank() - sum(map(sum, seconds.values()))) / calls
        return {
            stage: (forward + share, to_input + share, weights + share if split else weights)
            for stage, (forward, to_input, weights) in seconds.items()
        }

    def _on_one_rank(self) -> float:
        """Returns the seconds per micro-batch of this rank's share of the network as a pipeline without neighbours."""
        plan = emulated_plan(self._work, self._durations, len(self._strategy.parts), ranks=1)
        with pipeline_of_one(self._kind, plan, self._training, _CPU, rank=self._world.rank) as strategy:
            return seconds_per_call(lambda: strategy.step(self._batches), max(2, _PASSES // self._count)) / self._count


def build_contender(kind: str, world: World, work: Workload, durations: Durations) -> Contender:
    """Builds `decoupled`, or a pipelined baseline by name."""
    if kind == "decoupled":
        return Decoupled(world, work, durations)
    return Pipelined(kind, world, work, durations)


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Returns the mean over `calls`, after one that is not counted."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
