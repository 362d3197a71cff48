"""Measures one stage while it runs: phases by the device's clock, losses, throughput, and the spans of a trace."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import numpy
import torch
from torch import Tensor

from decoupled_pp.core.device import Clock, Mark
from decoupled_pp.core.errors import TrainingError
from decoupled_pp.core.reports import PHASES, Record, Span, SpansRecord, StepSeconds, TrainRecord

BUSY = ("forward", "critic", "backward", "step")  # phases in which a stage computes
PAUSES = ("evaluate", "save")  # no training: they do not count in training time, in periods or in throughput


class StageProgress(Protocol):
    """The progress of a stage in optimizer steps and training samples, and its rate; `Stage` has it."""

    @property
    def updates(self) -> int: ...  # noqa: D102
    @property
    def samples(self) -> int: ...  # noqa: D102
    @property
    def learning_rate(self) -> float: ...  # noqa: D102


class StageMeter:
    """Counts for one stage. Nothing here waits for the device except `flush`, every `every` packets."""

    def __init__(
        self,
        stage: int,
        clock: Clock,
        post: Callable[[Record], None],
        *,
        every: int,
        trace: range,
        updates_every: int = 1,
        hint: str = "",
    ) -> None:
        self._stage = stage
        self._clock = clock
        self._post = post
        self._every = every
        self._trace = trace  # numbers of the packets whose spans are posted
        self._updates_every = updates_every  # laps of phase `step` per optimizer update
        self._hint = hint  # what else may be the cause of a loss that is NaN
        # What has gathered since the last flush. Marks are read then: on a GPU that waits for the device.
        self._marks: list[Mark] = [clock.mark()]
        self._phases: list[tuple[str, int]] = []
        self._losses: list[tuple[int, Tensor, float]] = []  # packet, its loss, how much that counts
        self._packets_since = 0
        self._samples_since = 0
        self._packet = 0
        self._last_packet = 0
        self._samples = 0
        # Times up to the last flush. Pauses after the last step are not yet between two steps: they are kept apart.
        self._started: float | None = None
        self._trained_until: float | None = None
        self._paused_before_last_step = 0.0
        self._paused = 0.0
        self._step_ends: list[float] = []  # in training time
        self.totals: defaultdict[str, float] = defaultdict(float)  # phase -> its seconds
        self.last_loss: float | None = None  # mean between the last two flushes; None if this rank knows no loss
        self.last_exit: tuple[float, float | None] | None = None  # loss and accuracy of the last evaluation
        self.last_knn: float | None = None  # accuracy of its nearest-neighbour probe

    def lap(self, phase: str) -> None:
        """Give the time since the last lap to `phase`; no time is left out."""
        self._marks.append(self._clock.mark())
        self._phases.append((phase, self._packet))

    def begin(self, packet: int) -> None:
        """Let the laps from here on belong to training packet `packet`."""
        self._packet = packet

    def trained(self, packet: int, loss: Tensor | None, samples: int, weight: float = 1.0) -> bool:
        """Count a training packet, with its loss where this rank knows it; return True if a flush is due."""
        if loss is not None:
            self._losses.append((packet, loss, weight))
        self._last_packet = packet
        self._packets_since += 1
        self._samples += samples
        self._samples_since += samples
        return self._packets_since >= self._every

    def flush(self, stage: StageProgress, queue: int) -> None:
        """Post what has gathered since the last flush; TrainingError if a loss is NaN or infinite."""
        times = self._clock.seconds(self._marks)
        sums: defaultdict[str, float] = defaultdict(float)
        spans: list[Span] = []
        for (phase, packet), start, end in zip(self._phases, times[:-1], times[1:], strict=True):
            sums[phase] += end - start
            if phase in PAUSES:
                self._paused += end - start
            elif phase == "step":
                self._trained_until = end
                self._paused_before_last_step = self._paused
                self._step_ends.append(end - self._paused)
            if packet in self._trace:
                spans.append(Span(phase, start, end - start, packet))
        self._marks = [self._marks[-1]]  # the next phase begins where the last one ended
        self._phases = []
        for phase, seconds in sums.items():
            self.totals[phase] += seconds
        if self._started is None:
            self._started = times[0]
        if spans:
            self._post(SpansRecord(stage=self._stage, spans=tuple(spans)))
        if self._packets_since:
            self._post_training(times[-1] - times[0], sum(sums[phase] for phase in BUSY), stage, queue)

    def _post_training(self, elapsed: float, busy: float, stage: StageProgress, queue: int) -> None:
        self.last_loss = self._mean_loss()
        record = TrainRecord(
            stage=self._stage,
            packet=self._last_packet,
            step=stage.updates,
            samples=stage.samples,
            loss=self.last_loss,
            samples_per_second=_ratio(self._samples_since, elapsed),
            busy_fraction=_ratio(busy, elapsed),
            queue=queue,
            lr=stage.learning_rate,
            seconds=self.seconds(),
            training_seconds=self.training_seconds(),
        )
        self._post(record)
        self._losses.clear()
        self._packets_since = 0
        self._samples_since = 0

    def _mean_loss(self) -> float | None:
        if not self._losses:
            return None
        # The one place that reads losses from the device; in one stack, so that it is waited for once, not per loss.
        losses: list[float] = torch.stack([loss for _, loss, _ in self._losses]).tolist()
        for (packet, _, _), loss in zip(self._losses, losses, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"stage {self._stage}: the loss is {loss} at packet {packet}; lower `optimizer.lr`, clip "
                    f"gradients (`training.clip_norm`), or look at the data{self._hint if math.isnan(loss) else ''}",
                    code="loss-not-finite",
                )
        unit = self._losses[0][2]  # where all weigh alike, the mean is the plain one to the last digit
        weights = [weight / unit for _, _, weight in self._losses]
        return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)

    def seconds(self) -> float:
        """Return the seconds from the start to the last optimizer step."""
        if self._started is None or self._trained_until is None:
            return 0.0
        return self._trained_until - self._started

    def training_seconds(self) -> float:
        """Return the seconds from the start to the last optimizer step, without evaluations and checkpoints."""
        return self.seconds() - self._paused_before_last_step

    def step_seconds(self) -> StepSeconds | None:
        """Return the training time from one optimizer update to the next, in steady state; None without two of them."""
        updates = self._step_ends[self._updates_every - 1 :: self._updates_every]
        warm_up = math.ceil(len(updates) / 10)  # compilation, caches, the fill of the pipeline
        steady = updates[warm_up:]
        if len(steady) < 2:
            return None
        periods = numpy.diff(steady)
        middle, high = numpy.percentile(periods, [50, 95])
        return StepSeconds(float(periods.mean()), float(middle), float(high))

    def samples_per_second(self) -> float:
        """Return the training samples per training second."""
        return _ratio(self._samples, self.training_seconds())

    def phase_seconds(self) -> dict[str, float]:
        """Return the seconds of every phase of training."""
        return {phase: self.totals[phase] for phase in PHASES}

    def busy_fraction(self) -> float:
        """Return the share of all phases in which the stage computed."""
        return _ratio(self._busy_seconds(), sum(self.phase_seconds().values()))

    def critic_time_fraction(self) -> float:
        """Return the share of forward, critic and backward that the critic took."""
        return _ratio(self.totals["critic"], self._busy_seconds() - self.totals["step"])

    def _busy_seconds(self) -> float:
        return sum(self.totals[phase] for phase in BUSY)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0  # 0 where nothing has been measured
