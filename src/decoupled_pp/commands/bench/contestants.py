"""One rank of an emulated pipeline, trained decoupled or by a pipelined baseline, and its own compute alone."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decoupled_pp.commands.bench.durations import Durations
from decoupled_pp.commands.bench.emulated import EmulatedLayer
from decoupled_pp.commands.plan.orders import SPLIT
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.reports import Record, SpansRecord
from decoupled_pp.links import World
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings
from decoupled_pp.training.baselines import Training, build_baseline, stages_needed
from decoupled_pp.training.baselines.alone import pass_seconds, pipeline_of_one
from decoupled_pp.training.partition import partition
from decoupled_pp.training.trainer import Trainer

WIDTH, CLASSES, RATE, TIMEOUT = 64, 10, 0.01, 60.0
_WARM_UP, _ALONE, _PASSES = 5, 25, 8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What every contestant is given.

    Attributes:
        world: The ranks.
        forward_seconds: Emulated forward of one rank and micro-batch.
        backward_seconds: Emulated backward of one rank and micro-batch.
        batch: Samples per micro-batch.
        packets: Micro-batches per measurement of a decoupled pipeline.
        micro_batches: Micro-batches per optimizer step of a pipelined baseline.
        steps: Optimizer steps per measurement of a pipelined baseline, after one that is not counted.
        capacity: Packets a link of the decoupled pipeline may hold.
        durations: What this rank's sleeps are multiplied by; every measurement starts them over.
    """

    world: World
    forward_seconds: float
    backward_seconds: float
    batch: int
    packets: int
    micro_batches: int
    steps: int
    capacity: int
    durations: Durations

    @property
    def alone(self) -> int:
        """Micro-batches that a rank's own compute is measured on: the pipeline's own, if they differ in duration."""
        return self.packets if self.durations.drawn else _ALONE

    @property
    def fill(self) -> int:
        """Packets that fill a decoupled pipeline before it is measured."""
        return max(_WARM_UP, self.packets // 5)

    def plan(self, stages: int, ranks: int | None = None) -> Plan:
        """An emulated network for all ranks (or so many); the stages of a rank share its compute equally."""
        torch.manual_seed(0)
        share = (ranks or self.world.size) / stages
        layers: list[nn.Module] = [
            EmulatedLayer(WIDTH, self.forward_seconds * share, self.backward_seconds * share, self.durations)
            for _ in range(stages)
        ]
        layers[-1] = nn.Sequential(layers[-1], nn.Linear(WIDTH, CLASSES))
        return partition(layers, stages, "uniform", self.data()[0], device="cpu")

    def data(self) -> tuple[Tensor, Tensor]:
        """One micro-batch."""
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(CLASSES, (self.batch,), generator=generator)
        return torch.randn(self.batch, WIDTH, generator=generator), targets


class Contestant(ABC):
    """A way to train the emulated pipeline; every rank calls the same methods at the same time."""

    @abstractmethod
    def period(self) -> float:
        """Seconds per micro-batch in steady state, as this rank sees it (0 if another rank knows better)."""

    @abstractmethod
    def alone(self) -> float:
        """Seconds per micro-batch of this rank's own compute as a plain PyTorch loop, back to back, without links."""

    @abstractmethod
    def passes(self, alone: float) -> dict[int, tuple[float, float, float]]:
        """Stage -> seconds of its forward, input's and weights' gradients without links, for the planner.

        Args:
            alone: What `alone` has just given.
        """


class Decoupled(Contestant):
    """Our own runtime, with linear critics; one optimizer step per micro-batch."""

    def __init__(self, work: Work) -> None:
        """Build the stages, connect, and warm up."""
        self._work, self._batch = work, work.data()
        self._ends: dict[int, float] = {}  # packet -> when the last stage was done with it
        self._done = _WARM_UP
        self._trainer = Trainer(
            work.plan(work.world.size),
            optimizer={"kind": "SGD", "lr": RATE},
            device="cpu",
            capacity=work.capacity,
            timeout_seconds=TIMEOUT,
            log_every=1000,
            observer=self._observe,
        )
        self._trainer.fit([self._batch], _WARM_UP)

    def _observe(self, records: list[Record]) -> None:
        for record in records:
            if isinstance(record, SpansRecord) and record.stage == self._work.world.size - 1:
                self._ends.update((span.packet, span.end) for span in record.spans if span.phase == "step")

    def period(self) -> float:
        """Between two ends of the last stage's steps, once the pipeline is full (rank 0 collects the spans)."""
        self._ends.clear()
        packets, start = self._work.packets, self._done
        fill = self._work.fill
        self._work.durations.restart(fill)
        self._done += fill + packets
        self._trainer.fit([self._batch], fill + packets, trace_packets=range(start, self._done))
        first, last = start + fill - 1, self._done - 1
        return (self._ends[last] - self._ends[first]) / packets if self._work.world.rank == 0 else 0.0

    def alone(self) -> float:
        """The same trunk, critic, loss and optimizer."""
        stage = self._trainer.stages[0]
        trunk, critic = copy.deepcopy(stage.trunk), copy.deepcopy(stage.critic) or nn.Identity()
        optimizer = torch.optim.SGD([*trunk.parameters(), *critic.parameters()], lr=RATE)

        def step() -> None:
            stage.body.loss(critic(trunk(self._batch[0])), self._batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()

        self._work.durations.restart(1)
        return seconds_per_call(step, self._work.alone)

    def passes(self, alone: float) -> dict[int, tuple[float, float, float]]:
        """All of `alone`, split as the sleeps are; only the sum sets the pace."""
        share = self._work.forward_seconds / (self._work.forward_seconds + self._work.backward_seconds)
        return {self._work.world.rank: (share * alone, (1 - share) * alone, 0.0)}


class Pipelined(Contestant):
    """A baseline with a flush, and one optimizer step, per `micro_batches`."""

    def __init__(self, kind: str, work: Work) -> None:
        """Build this rank's stages and warm up.

        Raises:
            UsageError: The schedule does not fit the ranks or the micro-batches.
        """
        self._kind, self._work, self._count = kind, work, work.micro_batches
        self._stages = stages_needed(kind, work.world.size) or work.world.size
        plan = work.plan(self._stages)
        self._training = Training(cross_entropy, OptimizerSettings(kind="SGD", lr=RATE), ScheduleSettings(), 1)
        self._strategy = build_baseline(kind, plan, self._training, _CPU, rank=work.world.rank, ranks=work.world.size)
        self._batches = [work.data()] * self._count
        self._strategy.step(self._batches)

    def period(self) -> float:
        """Whole steps, flush and optimizer step included."""
        self._work.durations.restart(self._count)
        return seconds_per_call(lambda: self._strategy.step(self._batches), self._work.steps) / self._count

    def alone(self) -> float:
        """Copies of this rank's stages, each on an input of its own; the last one with the loss."""
        parts = [copy.deepcopy(part.layers) for part in self._strategy.parts.values()]
        optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=RATE)
        inputs, target = self._work.data()

        def step() -> None:
            for _ in range(self._count):
                for part in parts:
                    output = part(inputs)
                    last = output.shape[1] == CLASSES
                    (cross_entropy(output, target) / self._count if last else output.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

        self._work.durations.restart(self._count)
        return seconds_per_call(step, max(2, self._work.alone // self._count)) / self._count

    def passes(self, alone: float) -> dict[int, tuple[float, float, float]]:
        """The passes that the schedule will call, one after the other, and its own share of each.

        That share is what the same schedule takes longer with all its stages on this rank alone, where it runs the
        same Python and sends nothing.
        """
        parts, (inputs, target) = copy.deepcopy(self._strategy.parts), self._work.data()
        split = self._kind in SPLIT
        seconds = pass_seconds(parts, inputs, target, cross_entropy, stages=self._stages, split=split, repeats=_PASSES)
        calls = (3 if split else 2) * len(seconds)
        share = max(0.0, self._on_one_rank() - sum(map(sum, seconds.values()))) / calls
        return {k: (f + share, i + share, w + share if split else w) for k, (f, i, w) in seconds.items()}

    def _on_one_rank(self) -> float:
        """Seconds per micro-batch of this rank's share of the network as a pipeline of its own, without neighbours."""
        plan = self._work.plan(len(self._strategy.parts), ranks=1)
        with pipeline_of_one(self._kind, plan, self._training, _CPU, rank=self._work.world.rank) as strategy:
            return seconds_per_call(lambda: strategy.step(self._batches), max(2, _PASSES // self._count)) / self._count


def contestant(kind: str, work: Work) -> Contestant:
    """`decoupled`, or a pipelined baseline by name."""
    return Decoupled(work) if kind == "decoupled" else Pipelined(kind, work)


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Mean over `calls`, after one that is not counted."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
