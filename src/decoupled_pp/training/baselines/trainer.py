"""Trains a plan by backpropagation with the data, metrics and report of a decoupled run, which is compared with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from decoupled_pp.core import environment
from decoupled_pp.core.channels import Control
from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.device import Clock, RandomStream, choose_device, on_device, peak_memory
from decoupled_pp.core.errors import LinkError
from decoupled_pp.core.packets import Batch, as_tuple, map_payload
from decoupled_pp.core.plans import Plan, count_parameters
from decoupled_pp.core.reports import Exit, Record, Report
from decoupled_pp.links import LocalControl, World, join_world
from decoupled_pp.pipeline.losses import ExitScore
from decoupled_pp.pipeline.meter import StageMeter
from decoupled_pp.training.baselines import Strategy, Training, build_baseline
from decoupled_pp.training.watch import Watcher, explain_failure

Observer = Callable[[list[Record]], None]


class BaselineTrainer:
    """One rank of a baseline. Every rank reads the same micro-batches and uses what it needs of them.

    The records of a rank are those of a stage, with the rank in place of the stage. Held-out scores are computed on
    copies of the whole network, gathered on every rank, which share the micro-batches: exact for any shape of batch,
    and no part of training time, whatever it takes.

    Attributes:
        updates: Optimizer steps done.
        samples: Training samples done, on all ranks.
        interrupted: Set by a signal handler: the run is to end at once (nothing is saved).
    """

    def __init__(
        self,
        kind: str,
        plan: Plan,
        training: Training,
        *,
        accumulate: int,
        device: str,
        seed: int,
        timeout_seconds: float,
        log_every: int,
    ) -> None:
        """Take the parts; the strategy is built by `build` or the first `fit`.

        Args:
            kind: One of `baselines.BASELINES`.
            plan: The network, cut into as many stages as the strategy needs.
            training: How it trains.
            accumulate: Micro-batches per optimizer step.
            device: "auto", "cpu" or "cuda".
            seed: Of dropout.
            timeout_seconds: Longest wait for another rank outside of the strategy itself.
            log_every: Micro-batches between two flushes of the metrics.
        """
        self.kind, self.plan, self.training = kind, plan, training
        self.device = choose_device(device, environment.local_rank(), environment.local_world_size())
        self.interrupted = threading.Event()
        self.updates = self.samples = 0
        self._accumulate, self._timeout, self._log_every = accumulate, timeout_seconds, log_every
        self._world: World | None = join_world(timeout_seconds) if environment.world_size() > 1 else None
        self.rank, self._ranks = environment.rank(), environment.world_size()
        self._random = RandomStream(seed * 1_000_003 + self.rank, self.device)
        self._strategy: Strategy | None = None
        self._observer: Observer | None = None
        self._control: Control = LocalControl()
        self._score: tuple[float, float | None] | None = None

    @property
    def learning_rate(self) -> float:
        """Present learning rate."""
        optimizers = self.build().optimizers
        return float(optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0

    def observe(self, observer: Observer) -> None:
        """Hand the metric records (on rank 0) to `observer` from now on."""
        self._observer = observer

    def build(self) -> Strategy:
        """This rank's part of the strategy, built now if it has not been.

        Raises:
            UsageError: The strategy does not fit the plan, the ranks or the settings.
        """
        if self._strategy is None:
            self._strategy = build_baseline(
                self.kind, self.plan, self.training, self.device, rank=self.rank, ranks=self._ranks
            )
        return self._strategy

    def fit(
        self,
        train: BatchSource,
        steps: int,
        *,
        validate: BatchSource,
        validate_every: int | None,
        validation_batches: int | None,
        trace_packets: range,
    ) -> Report:
        """Train; every rank calls this with the same arguments and gets the same report.

        Args:
            train: Training micro-batches.
            steps: Optimizer steps.
            validate: Held-out micro-batches; scored at the end, and every `validate_every` steps.
            validate_every: Optimizer steps between evaluations.
            validation_batches: Micro-batches per evaluation; None: all.
            trace_packets: Numbers of the micro-batches whose spans are recorded.

        Raises:
            UsageError: The strategy cannot run with these micro-batches.
            TrainingError: Training cannot go on.
        """
        self._control = self._world.channel() if self._world is not None else LocalControl()
        watcher = Watcher(self._control, self._observer if self.rank == 0 else None, threading.Event())
        try:
            strategy = self.build()
            meter = StageMeter(
                self.rank, Clock(self.device), self._control.post, every=self._log_every, trace=trace_packets
            )
            strategy.recorder = meter
            self._control.gather("built", 0, self._timeout)
            for step in self._steps(train, steps, strategy, meter):
                if step == steps or (validate_every is not None and step % validate_every == 0):
                    meter.flush(self, 0)
                    self._evaluate(islice(validate.batches(), validation_batches), meter)
            meter.flush(self, 0)
            return self._report(strategy, meter)
        except Exception as error:
            cause = explain_failure(_as_link_error(error, self.rank), self._control, self.rank)
            if cause is error:
                raise
            raise cause from error
        finally:
            watcher.close()

    def export(self) -> nn.Module:
        """The whole network with the trained weights, on every rank (which all must call this)."""
        strategy = self.build()
        for stage in range(self.plan.stages):
            owner = strategy.owner(stage)
            if owner is not None and self._world is not None:
                module = self.plan.stage_module(stage).to(self.device)
                for tensor in module.state_dict().values():
                    self._world.broadcast(tensor, owner)
        return self.plan.module

    def _steps(self, train: BatchSource, steps: int, strategy: Strategy, meter: StageMeter) -> Iterator[int]:
        """Take the steps; yields the number done after each."""
        batches = train.batches()
        for step in range(1, steps + 1):
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            some = [next(batches) for _ in range(self._accumulate)]
            with self._random:
                losses = strategy.step(some)
            self.updates = step
            self.samples += sum(_samples(batch) for batch in some)
            if self._trained(some, losses, strategy, meter):
                meter.flush(self, 0)
            yield step

    def _trained(self, batches: Sequence[Batch], losses: list[Tensor], strategy: Strategy, meter: StageMeter) -> bool:
        """Tell the meter of the micro-batches that this rank worked on. Returns whether a flush is due."""
        share, due = strategy.share(len(batches)), False
        for place, number in enumerate(share):
            loss = losses[place] if self.rank == self._judge(strategy) else None
            due |= meter.trained(strategy.first - len(batches) + number, loss, _samples(batches[number]))
        return due

    def _judge(self, strategy: Strategy) -> int:
        """The rank that reports the loss."""
        return strategy.owner(self.plan.stages - 1) or 0

    def _evaluate(self, batches: Iterator[Batch], meter: StageMeter) -> None:
        """Score the whole network: every rank a share of the micro-batches, the sums joined."""
        network, score = self.export().to(self.device).eval(), ExitScore()
        with torch.no_grad(), self._random:
            for inputs, target in islice(batches, self.rank, None, self._ranks):
                given, wanted = (map_payload(lambda t: on_device(t, self.device), part) for part in (inputs, target))
                with self.training.autocast(self.device):
                    logits = as_tuple(network(given))[0]
                    score.add(self.training.loss(logits, wanted), logits, wanted)
        network.train()
        sums = self._control.gather(f"evaluation/{self.updates}", score.sums(), self._timeout)
        self._score = loss, accuracy = ExitScore.of_sums(sums)
        meter.lap("evaluate")
        if self.rank == self._judge(self.build()):
            record = {"kind": "validation", "stage": self.rank, "step": self.updates, "samples": self.samples}
            times = {"seconds": meter.seconds(), "training_seconds": meter.training_seconds()}
            self._control.post({**record, "loss": loss, "accuracy": accuracy, **times})

    def _report(self, strategy: Strategy, meter: StageMeter) -> Report:
        mine = {
            "stage": self.rank,
            "parameters": sum(count_parameters(part) for part in strategy.parts.values()),
            "critic_parameters": 0,
            "saved_activation_bytes_peak": strategy.saved_activation_bytes_peak,
            "memory_bytes_peak": peak_memory(self.device),
            **meter.summary(),
            "critic_time_fraction": 0.0,  # the phase `critic` is the loss of the network itself
        }
        sent = [{"from": a, "to": b, **vars(counters)} for (a, b), counters in strategy.links.items()]
        gathered = self._control.gather("summary", [mine, meter.last_loss, sent], self._timeout)
        judge = self._judge(strategy)
        rows, (_, last_loss, _) = [row for row, _, _ in gathered], gathered[judge]
        links: dict[tuple[int, int], Record] = {}
        for record in (record for _, _, records in gathered for record in records):
            link = links.setdefault((record["from"], record["to"]), {"from": record["from"], "to": record["to"]})
            link |= {key: link.get(key, 0) + n for key, n in record.items() if key not in ("from", "to")}
        seconds = rows[judge]["training_seconds"]
        score = self._score or (None, None)
        hidden = ("seconds", "samples_per_second", "training_seconds", "step_seconds")
        return Report(
            steps=self.updates,
            seconds=rows[judge]["seconds"],
            training_seconds=seconds,
            step_seconds=rows[judge]["step_seconds"],
            samples_per_second=self.samples / seconds if seconds else 0.0,
            train_loss=last_loss,
            exits=(Exit(self.plan.stages - 1, *score),),
            per_stage=tuple({key: value for key, value in row.items() if key not in hidden} for row in rows),
            links=tuple(links[ends] for ends in sorted(links)),
        )


def _samples(batch: Batch) -> int:
    return as_tuple(batch[0])[0].shape[0]


def _as_link_error(error: Exception, rank: int) -> Exception:
    """A broken connection inside of torch's or DeepSpeed's own transport, as the echo of a fault elsewhere."""
    text = str(error)
    if isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection closed")):
        return LinkError(f"rank {rank} lost the connection to another rank: {text.splitlines()[0]}")
    return error
