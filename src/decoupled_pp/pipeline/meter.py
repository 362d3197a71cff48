"""What one stage measures while it runs: phases by the device's clock, losses, throughput, and the spans of a trace."""

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
from decoupled_pp.core.reports import PHASES, Record

BUSY = ("forward", "critic", "backward", "step")
"""Phases in which a stage computes."""

PAUSES = ("evaluate", "save")
"""Phases that are no training: they do not count in training time, in periods or in throughput."""


class StageProgress(Protocol):
    """How far a stage is; `Stage` is one."""

    @property
    def updates(self) -> int:
        """Optimizer steps done."""

    @property
    def samples(self) -> int:
        """Training samples done."""

    @property
    def learning_rate(self) -> float:
        """Present learning rate."""


class StageMeter:
    """Counts for one stage. Nothing here waits for the device except `flush`, every `every` packets.

    Phases are contiguous: `lap(phase)` gives the time since the lap before to `phase`.
    """

    def __init__(
        self,
        stage: int,
        clock: Clock,
        post: Callable[[Record], None],
        *,
        every: int,
        trace: range,
        updates_every: int = 1,
    ) -> None:
        """Start the clock.

        Args:
            stage: Index of the stage.
            clock: Clock of its device.
            post: Takes finished records.
            every: Training packets between two flushes.
            trace: Packet numbers whose spans go into the trace.
            updates_every: Laps of phase `step` per optimizer update.
        """
        self._stage, self._clock, self._post = stage, clock, post
        self._every, self._trace = every, trace
        self._packets_since = 0
        self._last_packet = 0
        self._paused = self._pausing = 0.0  # seconds of pauses before the last step, and before now
        self._step_ends: list[float] = []  # training time at the end of every `step`
        self._updates_every = updates_every
        self._marks: list[Mark] = [clock.mark()]
        self._phases: list[tuple[str, int]] = []
        self._losses: list[tuple[int, Tensor]] = []
        self._samples_since = 0
        self._packet = 0
        self.totals: defaultdict[str, float] = defaultdict(float)
        self._samples = 0
        self.started: float | None = None
        self.trained_until: float | None = None
        self.last_loss: float | None = None
        self.last_exit: tuple[float, float | None] | None = None
        self.last_knn: float | None = None

    def lap(self, phase: str) -> None:
        """The work since the last lap was `phase`."""
        self._marks.append(self._clock.mark())
        self._phases.append((phase, self._packet))

    def begin(self, packet: int) -> None:
        """The laps from here on belong to training packet `packet`."""
        self._packet = packet

    def trained(self, packet: int, loss: Tensor | None, samples: int) -> bool:
        """Note a training packet and its loss, 0-dim on the device, if it is known here. Returns if a flush is due."""
        if loss is not None:
            self._losses.append((packet, loss))
        self._last_packet = packet
        self._packets_since += 1
        self._samples += samples
        self._samples_since += samples
        return self._packets_since >= self._every

    def flush(self, stage: StageProgress, queue: int) -> None:
        """Post what has gathered since the last flush; the one place that reads losses from the device.

        Args:
            stage: How far the stage is.
            queue: Packets that wait for it.

        Raises:
            TrainingError: A loss is NaN or infinite; names the stage and the first such packet.
        """
        times = self._clock.seconds(self._marks)
        sums: defaultdict[str, float] = defaultdict(float)
        spans: list[list[object]] = []
        for (phase, packet), start, end in zip(self._phases, times[:-1], times[1:], strict=True):
            sums[phase] += end - start
            if phase in PAUSES:
                self._pausing += end - start
            elif phase == "step":
                self.trained_until, self._paused = end, self._pausing
                self._step_ends.append(end - self._pausing)
            if packet in self._trace:
                spans.append([phase, start, end - start, packet])
        self._marks, self._phases = [self._marks[-1]], []
        for phase, seconds in sums.items():
            self.totals[phase] += seconds
        if self.started is None:
            self.started = times[0]
        if spans:
            self._post({"kind": "spans", "stage": self._stage, "spans": spans})
        if self._packets_since:
            self._post_training(times[-1] - times[0], sum(sums[phase] for phase in BUSY), stage, queue)

    def _post_training(self, elapsed: float, busy: float, stage: StageProgress, queue: int) -> None:
        losses = torch.stack([loss for _, loss in self._losses]).tolist() if self._losses else []
        for (packet, _), loss in zip(self._losses, losses, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"stage {self._stage}: the loss is {loss} at packet {packet}; lower the learning rate, "
                    "clip gradients (training.clip_norm), or look at the data"
                )
        self.last_loss = sum(losses) / len(losses) if losses else None
        self._post(
            {
                "kind": "train",
                "stage": self._stage,
                "packet": self._last_packet,
                "step": stage.updates,
                "samples": stage.samples,
                "loss": self.last_loss,
                "samples_per_second": self._samples_since / elapsed if elapsed > 0 else 0.0,
                "busy_fraction": busy / elapsed if elapsed > 0 else 0.0,
                "queue": queue,
                "lr": stage.learning_rate,
                "seconds": self.seconds(),
                "training_seconds": self.training_seconds(),
            }
        )
        self._losses.clear()
        self._packets_since = self._samples_since = 0

    def seconds(self) -> float:
        """Seconds from the start to the last flush."""
        if self.started is None or self.trained_until is None:
            return 0.0
        return self.trained_until - self.started

    def training_seconds(self) -> float:
        """The same without evaluations and checkpoints."""
        return self.seconds() - self._paused

    def step_seconds(self) -> dict[str, float] | None:
        """Mean and percentiles of the training time from one optimizer update to the next, in steady state.

        The first tenth of the updates (warm-up, fill of the pipeline) does not count. None with fewer than two others.
        """
        updates = self._step_ends[self._updates_every - 1 :: self._updates_every]
        steady = updates[-(-len(updates) // 10) :]
        if len(steady) < 2:
            return None
        periods = numpy.diff(steady)
        middle, high = numpy.percentile(periods, [50, 95])
        return {"mean": float(periods.mean()), "p50": float(middle), "p95": float(high)}

    def summary(self) -> Record:
        """Totals of the run so far, for `summary.json`."""
        busy = sum(self.totals[phase] for phase in BUSY)
        compute = busy - self.totals["step"]
        whole = sum(self.totals[phase] for phase in PHASES)
        return {
            "seconds": self.seconds(),
            "training_seconds": self.training_seconds(),
            "step_seconds": self.step_seconds(),
            "samples_per_second": self._samples / self.training_seconds() if self.training_seconds() else 0.0,
            "critic_time_fraction": self.totals["critic"] / compute if compute else 0.0,
            "busy_fraction": busy / whole if whole else 0.0,
            "wait_in_seconds": self.totals["wait_in"],
            "wait_out_seconds": self.totals["wait_out"],
            "phase_seconds": {phase: self.totals[phase] for phase in PHASES},
        }
