"""Trains a plan by backpropagation with the data, metrics and report of a decoupled run, which is compared with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from decoupled_pp.core import environment
from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.device import Clock, RandomStream, on_device
from decoupled_pp.core.errors import LinkError, UsageError, first_line
from decoupled_pp.core.packets import Batch, as_tuple, batch_size, map_payload
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.reports import Exit, Report, ValidationRecord
from decoupled_pp.pipeline.feed import Itinerary
from decoupled_pp.pipeline.meter import StageMeter
from decoupled_pp.pipeline.score import ExitScore
from decoupled_pp.run.checkpoints.opened import Checkpoint
from decoupled_pp.run.report import RankMeasurement, make_report, measure, summarize_link
from decoupled_pp.training.base import BaseTrainer, Observer, Task
from decoupled_pp.training.baselines import Strategy, Training, build_baseline
from decoupled_pp.training.recipe import Recipe
from decoupled_pp.training.watch import Watcher, told_to_all


class BaselineTrainer(BaseTrainer):
    """One rank of a baseline. Every rank reads the same micro-batches and uses what it needs of them.

    The records of a rank are those of a stage, with the rank in place of the stage. Held-out scores are computed on
    copies of the whole network, gathered on every rank, which share the micro-batches: exact for any shape of batch,
    and no part of training time, however long it takes. An interrupted run ends at once, and nothing is saved.
    """

    def __init__(
        self, kind: str, plan: Plan, recipe: Recipe, *, steps: int, device: str, observer: Observer | None = None
    ) -> None:
        """Take the parts; the strategy is built by `build` or the first `fit`."""
        super().__init__(plan, recipe, device, observer)
        if recipe.has_plateau:
            raise UsageError(
                f"`schedule.kind` plateau follows held-out losses of decoupled stages, and `strategy` {kind} has none; "
                "use cosine or linear",
                code="plateau-without-validation",
                key="schedule.kind",
            )
        self.kind = kind
        self.training = Training(recipe.loss, recipe.optimizer, recipe.schedule, steps, recipe.training)
        self.updates = 0
        self.samples = 0
        self._ranks = environment.world_size()
        self._random = RandomStream(recipe.seed * 1_000_003 + self.rank, self.device)
        self._strategy: Strategy | None = None
        self._score: tuple[float, float | None] | None = None

    @property
    def learning_rate(self) -> float:
        """Present learning rate."""
        optimizers = self._built().optimizers
        return float(optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0

    def build(self, resume: bool | Checkpoint | None = None) -> None:
        """Build this rank's part of the strategy now."""
        if resume is not None:
            raise UsageError(
                f"`strategy` {self.kind} saves no checkpoints to go on from; start anew",
                code="baseline-has-no-checkpoints",
            )
        self._built()

    def _session(self, task: Task) -> Report:
        self._control = self._channel()
        # An event of its own: an interrupt ends the steps at once, and the watcher must not ask for an orderly stop.
        watcher = Watcher(self._control, self._observer if self.rank == 0 else None, threading.Event())
        with watcher, told_to_all(self._control, self.rank), _as_link_errors(self.rank):
            assert task.train is not None, "a baseline has no evaluation alone"
            self.build(task.resume)
            strategy = self._built()
            every = self.recipe.metrics.every
            meter = StageMeter(self.rank, Clock(self.device), self._control.post, every=every, trace=task.trace_packets)
            strategy.recorder = meter
            self._control.gather("built", 0, self._timeout)
            for step in self._steps(task.train, task.itinerary, strategy, meter):
                if task.held_out is not None and _is_evaluated(step, task.itinerary):
                    meter.flush(self, 0)
                    self._evaluate(islice(task.held_out.batches(), task.itinerary.validation_batches), meter)
            meter.flush(self, 0)
            return self._report(strategy, meter)

    def _steps_done(self) -> int:
        return self.updates

    def export(self) -> nn.Module:
        """Return the whole network with the trained weights; every rank must call this."""
        self.plan.module.to(self.device)
        return self._gather_network(self._built().owner)

    def finished_network(self) -> nn.Module | None:
        """Return the whole network on rank 0; every rank must call this."""
        network = self.export()
        return network if self.rank == 0 else None

    def _built(self) -> Strategy:
        if self._strategy is None:
            self._strategy = build_baseline(
                self.kind, self.plan, self.training, self.device, rank=self.rank, ranks=self._ranks
            )
        return self._strategy

    def _steps(self, train: BatchSource, itinerary: Itinerary, strategy: Strategy, meter: StageMeter) -> Iterator[int]:
        """Take the steps; yield the number done after each."""
        batches = train.batches(itinerary.start * itinerary.accumulate)
        for step in range(itinerary.start + 1, itinerary.steps + 1):
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            some = [next(batches) for _ in range(itinerary.accumulate)]
            with self._random:
                losses = strategy.step(some)
            self.updates = step
            self.samples += sum(_samples(batch) for batch in some)
            if self._trained(some, losses, strategy, meter):
                meter.flush(self, 0)
            yield step

    def _trained(self, batches: Sequence[Batch], losses: list[Tensor], strategy: Strategy, meter: StageMeter) -> bool:
        """Tell the meter of the micro-batches that this rank worked on. Return whether a flush is due."""
        share = strategy.share(len(batches))
        due = False
        for place, number in enumerate(share):
            weight = strategy.weights[number]
            loss = losses[place] if weight and self.rank == self._judge(strategy) else None
            packet = strategy.first - len(batches) + number
            weight = 1.0 if strategy.criterion.sums else weight
            due |= meter.trained(packet, loss, _samples(batches[number]), weight)
        return due

    def _judge(self, strategy: Strategy) -> int:
        """Return the rank that reports the loss."""
        return strategy.owner(self.plan.stages - 1) or 0

    def _evaluate(self, batches: Iterator[Batch], meter: StageMeter) -> None:
        """Score the whole network: every rank a share of the micro-batches, the sums joined."""
        network = self.export().to(self.device).eval()
        criterion = self.recipe.scored_by()
        score = ExitScore(criterion)
        with torch.no_grad(), self._random:
            for batch in islice(batches, self.rank, None, self._ranks):
                weight = criterion.weight(batch)
                if not weight:
                    continue
                inputs, target = (map_payload(lambda t: on_device(t, self.device), part) for part in batch)
                with self.training.autocast(self.device):
                    score.add(as_tuple(network(inputs))[0], target, weight)
        network.train()
        sums = self._control.gather(f"evaluation/{self.updates}", score.sums(), self._timeout)
        loss, accuracy = score.join(sums)
        self._score = (loss, accuracy)
        meter.lap("evaluate")
        if self.rank == self._judge(self._built()):
            record = ValidationRecord(
                stage=self.rank,
                step=self.updates,
                samples=self.samples,
                loss=loss,
                accuracy=accuracy,
                seconds=meter.seconds(),
                training_seconds=meter.training_seconds(),
            )
            self._control.post(record)

    def _report(self, strategy: Strategy, meter: StageMeter) -> Report:
        """Return the report of what all ranks measured, the same on each."""
        judges = self.rank == self._judge(strategy)
        score = self._score or (None, None)
        own = measure(
            meter,
            index=self.rank,
            layers=strategy.parts.values(),
            critic=None,
            saved_activation_bytes_peak=strategy.saved_activation_bytes_peak,
            device=self.device,
            steps=self.updates,
            exit=Exit(self.plan.stages - 1, *score) if judges else None,
        )
        # The meter counts what this rank worked on, which is a share where the ranks divide the samples.
        seconds = own.training_seconds
        own = replace(own, samples_per_second=self.samples / seconds if seconds else 0.0)
        sent = tuple(summarize_link(*ends, counters) for ends, counters in strategy.links.items())
        mine = RankMeasurement(stages=(own,), links=sent)
        return make_report(self._control.gather("summary", mine, self._timeout))


def _samples(batch: Batch) -> int:
    return batch_size(batch[1])


def _is_evaluated(step: int, itinerary: Itinerary) -> bool:
    every = itinerary.validate_every
    return step == itinerary.steps or (every is not None and step % every == 0)


@contextmanager
def _as_link_errors(rank: int) -> Iterator[None]:
    """Raise LinkError, the echo of a fault elsewhere, if torch's or DeepSpeed's own transport breaks in here."""
    try:
        yield
    except RuntimeError as error:
        # Neither has an exception class for it: only the text tells.
        if not any(word in str(error) for word in ("gloo", "NCCL", "Connection closed")):
            raise
        raise LinkError(
            f"rank {rank} lost the connection to another rank: {first_line(error)}; look at the other ranks' logs",
            code="peer-gone",
        ) from error
