"""The public `Trainer`: the same script trains in one process and under torchrun."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import torch
from torch import nn

from decoupled_pp.core import environment
from decoupled_pp.core.channels import Control
from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.device import choose_device
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Loss, as_tuple
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.reports import Exit, Record, Report
from decoupled_pp.data.iterables import Batches, as_source
from decoupled_pp.links import LocalControl, StoreControl, World, join_world
from decoupled_pp.pipeline.feed import Feed, Itinerary
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.pipeline.optim import build_schedules
from decoupled_pp.pipeline.optimizer_state import refuse_unsavable
from decoupled_pp.pipeline.runtime import Worker, run
from decoupled_pp.pipeline.stage import Stage, StageOptions
from decoupled_pp.run.checkpoints.folder import CheckpointFolder, tied_weights
from decoupled_pp.run.checkpoints.parts import Checkpoint
from decoupled_pp.run.checkpoints.resume import load_stage, refuse_other_network, with_cut_of
from decoupled_pp.run.live import LiveView
from decoupled_pp.run.report import link_records, make_report, stage_record
from decoupled_pp.settings.critics import LabelTarget
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, refuse_lag, refuse_pauses, refuse_rates
from decoupled_pp.training.build import (
    CorrectionChoice,
    CriticChoice,
    CriticTargetChoice,
    OptimizerChoice,
    Recipe,
    Session,
    build_stages,
    join_in_process,
    join_ranks,
    plan_digest,
    resolve_correction,
    resolve_critic,
    resolve_optimizer,
    resolve_target,
)
from decoupled_pp.training.watch import Watcher, explain_failure

Observer = Callable[[list[Record]], None]


def _check_counts(**counts: int | None) -> None:
    """Raises UsageError unless each is a whole number above 0, or None."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or count < 1):
            raise UsageError(f"{name} {count!r} must be a whole number above 0")


class Trainer:
    """Trains a plan: all stages in this process, or under torchrun the one stage of this rank."""

    def __init__(
        self,
        plan: Plan,
        *,
        loss: str | Loss = "cross_entropy",
        critic: CriticChoice = "auto",
        critic_target: CriticTargetChoice = "label",
        global_correction: CorrectionChoice = None,
        optimizer: OptimizerChoice = "AdamW",
        schedule: ScheduleSettings | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        precision: str = "fp32",
        checkpoint_activations: bool = False,
        compile: bool = False,
        stagger: int = 0,
        critic_warmup: int = 0,
        knn: int | None = None,
        knn_samples: int = 2000,
        device: str = "auto",
        seed: int = 0,
        capacity: int = 4,
        timeout_seconds: float = 300.0,
        log_every: int = 50,
        checkpoints: str | Path | None = None,
        refresh_tied: bool = False,
        keep_checkpoints: int = 2,
        observer: Observer | None = None,
    ) -> None:
        """Check everything; stages are built by the first `fit` or `evaluate`.

        Args:
            plan: From `partition`, with a sample.
            loss: "cross_entropy", "mse", "package.module:function", or loss(logits, target) -> scalar mean.
            critic: A kind ("auto", "head", "auglocal", ...), a settings dictionary, one module (copied for every
                stage), a list of modules (one per stage but the last), or a function of a `CriticContext`.
            critic_target: What critics learn from: "label", or "cascade" or "mix", or a settings dictionary.
            global_correction: End-to-end steps between local ones, like {"every": 100, "steps": 1}; None: none.
            optimizer: Name in `torch.optim`, a dictionary like {"kind": "AdamW", "lr": 3e-4}, or a function of the
                parameters of one stage.
            schedule: Learning-rate schedule; None: constant.
            accumulate: Packets per optimizer step.
            clip_norm: Largest gradient norm per stage.
            precision: "fp32" or "bf16" (autocast).
            checkpoint_activations: Recompute activations in backward.
            compile: `torch.compile` stages and critics.
            stagger: Optimizer steps by which each stage starts to learn after the one before it.
            critic_warmup: Optimizer steps at the start in which stages with a critic train that alone.
            knn: Score every stage's output by this many nearest of the last training samples, too; None: do not.
            knn_samples: How many of them are kept.
            device: "auto", "cpu" or "cuda".
            seed: Of critics' weights and dropout; seed your layers' weights yourself, before making them.
            capacity: Packets a link may hold.
            timeout_seconds: Longest wait of any rank for another.
            log_every: Packets between two flushes of the metrics.
            checkpoints: Folder for checkpoints (shared by all ranks), or None.
            refresh_tied: At every checkpoint (`save_every`) the earlier user of a weight that was tied takes what the
                later one had at the checkpoint before.
            keep_checkpoints: Checkpoints to keep.
            observer: Takes the metric records, on rank 0; None: a live view in the terminal.

        Raises:
            UsageError: A setting that cannot be; the number of ranks is not the number of stages.
        """
        ranks = environment.world_size()
        if ranks not in (1, plan.stages):
            raise UsageError(f"{plan.stages} stages need {plan.stages} ranks (or one process for all), not {ranks}")
        _check_counts(
            knn=knn,
            knn_samples=knn_samples,
            capacity=capacity,
            accumulate=accumulate,
            log_every=log_every,
            keep_checkpoints=keep_checkpoints,
            stagger=stagger or None,
            critic_warmup=critic_warmup or None,
        )
        for name, value in (("timeout_seconds", timeout_seconds), ("clip_norm", clip_norm)):
            if value is not None and not value > 0:
                raise UsageError(f"{name} {value} must be above 0")
        if precision not in ("fp32", "bf16"):
            raise UsageError(f"precision {precision!r} must be 'fp32' or 'bf16'")
        if not isinstance(plan.sample, torch.Tensor) and not plan.sample:
            raise UsageError("the plan has no sample to fit critics to; pass sample= to partition")
        self.plan = plan
        self.recipe = Recipe(
            find_loss(loss),
            resolve_critic(critic),
            resolve_optimizer(optimizer),
            schedule or ScheduleSettings(),
            StageOptions(
                accumulate,
                clip_norm,
                precision,
                checkpoint_activations,
                compile,
                stagger,
                critic_warmup,
                resolve_correction(global_correction),
                knn,
                knn_samples,
            ),
            seed,
            log_every,
            resolve_target(critic_target),
        )
        refuse_lag(self.recipe.target, capacity)
        refuse_pauses(self.recipe.options.correction, stagger, self.recipe.target)
        if isinstance(self.recipe.optimizer, OptimizerSettings):
            refuse_rates(self.recipe.optimizer, plan.stages)
        self.device = choose_device(device, environment.local_rank(), environment.local_world_size())
        self.interrupted = threading.Event()
        self._capacity, self._timeout = capacity, timeout_seconds
        self._checkpoints: CheckpointFolder | None = None
        tied = tied_weights(plan) if refresh_tied else None
        if checkpoints is not None:
            self._checkpoints = CheckpointFolder(
                Path(checkpoints), keep=keep_checkpoints, timeout_seconds=timeout_seconds, tied=tied
            )
        elif refresh_tied:
            raise UsageError("refresh_tied takes weights from checkpoints: give checkpoints=FOLDER")
        self._observer = observer
        self._world: World | None = join_world(timeout_seconds) if ranks > 1 else None
        self._stages: list[Stage] = []
        self._loaded: Checkpoint | None = None
        self._notes: list[Record] = []
        self._control: Control = LocalControl()

    @property
    def rank(self) -> int:
        """This process's rank, 0 in a single process."""
        return self._world.rank if self._world is not None else 0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of this process, once built: all, or under torchrun this rank's one."""
        return tuple(self._stages)

    def observe(self, observer: Observer) -> None:
        """Hand the metric records (on rank 0) to `observer` from now on."""
        self._observer = observer

    def build(self, resume: Checkpoint | None = None) -> None:
        """Build this rank's stages now rather than in the first `fit`, to find what does not fit before a run starts.

        Args:
            resume: Bring them to the state of this checkpoint; give `fit` the same. A plan of as many stages that was
                cut by time is cut as the checkpoint is: measured again, it may have come out otherwise.

        Raises:
            UsageError: A critic, the optimizer or the checkpoint does not fit.
        """
        if resume is not None:
            refuse_other_network(resume, self.plan.module)
            self.plan = with_cut_of(resume, self.plan) if not self._stages else self.plan
        if not self._stages:
            mine = range(self.plan.stages) if self._world is None else [self._world.rank]
            self._stages = build_stages(self.plan, self.recipe, list(mine), self.device)
            for stage in self._stages if self._checkpoints is not None else ():
                refuse_unsavable(stage.first_groups)
        if resume is not None and resume is not self._loaded:
            for stage in self._stages:
                notes = load_stage(resume, stage, self.plan)
                self._notes += [{"kind": "note", "stage": stage.index, "text": note} for note in notes]
        self._loaded = resume

    def fit(
        self,
        train_batches: Batches | BatchSource,
        steps: int,
        *,
        validate: Batches | BatchSource | None = None,
        validate_every: int | None = None,
        validation_batches: int | None = None,
        save_every: int | None = None,
        resume: bool | Checkpoint | None = None,
        trace_packets: range = range(0),
    ) -> Report:
        """Train; every rank calls this, only rank 0 reads the batches.

        Args:
            train_batches: Micro-batches (input, target), started over when they end; each is one packet. A second
                `fit` goes on in them; a one-shot iterator is read on from where it stands, or for `resume` from its
                beginning.
            steps: Optimizer steps to take; a second `fit` adds its own, and the schedule spans all of them.
            validate: Held-out micro-batches; scored at the end, and every `validate_every` steps.
            validate_every: Optimizer steps between evaluations.
            validation_batches: Micro-batches per evaluation; None: all.
            save_every: Optimizer steps between checkpoints (also at the end) if the trainer has a checkpoint folder.
            resume: Go on from the newest checkpoint of the trainer's folder, if it has one, or from this one; `steps`
                is then the total.
            trace_packets: Packet numbers whose spans are recorded.

        Returns:
            The report, the same on every rank.

        Raises:
            UsageError: The user's input is at fault.
            TrainingError: Training cannot go on; the text names stage and packet, or the rank that failed.
        """
        _check_counts(steps=steps, validate_every=validate_every, validation_batches=validation_batches)
        _check_counts(save_every=save_every)
        if validate is None and (validate_every is not None or validation_batches is not None):
            raise UsageError("validate_every and validation_batches need validate=batches")
        if save_every is not None and self._checkpoints is None:
            raise UsageError("save_every needs a trainer with checkpoints=FOLDER")
        done = self._stages[0].updates if self._stages else 0
        checkpoint = self._newest() if resume is True else resume or None
        start = checkpoint.step if checkpoint is not None else done
        itinerary = Itinerary(
            steps=steps if resume else done + steps,
            start=start,
            accumulate=self.recipe.options.accumulate,
            validate_every=validate_every,
            validation_batches=validation_batches,
            save_every=save_every,
            save=self._checkpoints is not None,
        )
        first = itinerary.accumulate * done if checkpoint is None else 0
        train = as_source(train_batches, endless=True, first=first)
        held_out = as_source(validate) if validate is not None else None
        return self._session(train, held_out, itinerary, checkpoint, trace_packets)

    def evaluate(self, batches: Batches | BatchSource, *, resume: Checkpoint | None = None) -> tuple[Exit, ...]:
        """Score every exit on held-out micro-batches; every rank calls this and gets the same scores."""
        step = resume.step if resume is not None else (self._stages[0].updates if self._stages else 0)
        return self._session(None, as_source(batches), Itinerary(step, step), resume, range(0)).exits

    def export(self) -> nn.Module:
        """The user's own module with the trained weights; under torchrun every rank calls this and gets all of them.

        Raises:
            UsageError: Other stages of a network on the meta device are on other ranks only.
        """
        if any(parameter.is_meta for parameter in self.plan.module.parameters()):
            raise UsageError("this rank has its own stage only; write it out of a checkpoint with dpp.write_shards")
        if self._world is not None:
            for stage in range(self.plan.stages):
                for tensor in self.plan.stage_module(stage).state_dict().values():
                    self._world.broadcast(tensor, stage)
        return self.plan.module

    def _session(
        self,
        train: BatchSource | None,
        held_out: BatchSource | None,
        itinerary: Itinerary,
        resume: Checkpoint | None,
        trace_packets: range,
    ) -> Report:
        """Build what is missing, connect, run to the END packet, and gather the report."""
        self._control = self._channel()
        wanted = self._observer is None and self.rank == 0 and train is not None
        view = LiveView(self.plan.stages, itinerary.steps) if wanted else None
        observer = self._observer or (view.update if view is not None else None)
        watcher = Watcher(self._control, observer if self.rank == 0 else None, self.interrupted)
        workers: list[Worker] = []
        try:
            self._begin(itinerary, resume, training=train is not None)
            stop = watcher.stop_requested
            feed = Feed(train, held_out, itinerary, self.device, lambda: stop() is not None)
            workers = self._join(feed, itinerary, trace_packets)
            run(workers)
            for worker in workers:
                worker.close()  # now every byte is out, and counted
            mine = {
                "stages": [stage_record(worker.stage, worker.meter) for worker in workers],
                "links": link_records([worker.outlet for worker in workers] + [worker.inlet for worker in workers]),
                "stopped": self._control.stop_requested(),
            }
            gathered = self._control.gather("summary", mine, self._timeout * self.plan.stages)  # as stages end in turn
            if self.rank == 0 and train is not None and self._stages[0].updates > itinerary.start:
                self._ensure_saved()
            report = make_report(gathered, self.plan, gathered[0]["stopped"])
            return replace(report, stopped=None) if report.steps >= itinerary.steps else report
        except Exception as error:
            cause = explain_failure(error, self._control, self.rank)
            if cause is error:
                raise
            raise cause from error
        finally:
            for worker in workers:
                worker.close()
            if self._world is not None:
                self._world.disconnect()
            try:
                watcher.close()
            finally:
                if view is not None:
                    view.close()

    def _begin(self, itinerary: Itinerary, resume: Checkpoint | None, *, training: bool) -> None:
        """Bring this rank's stages to where the run begins, and wait until all ranks have."""
        self.build(resume)
        for stage in self._stages if training else ():
            schedule = self.recipe.schedule
            stage.schedules = build_schedules(schedule, stage.optimizers, itinerary.steps, stage.updates)
        self._loaded = None  # training changes what was loaded
        devices = self._control.gather("built", self.device.type, self._timeout)
        if len(set(devices)) > 1:
            raise UsageError(f"device: the ranks compute on {', '.join(devices)}; set device: cpu, or give each a GPU")
        if self._checkpoints is not None and training:
            self._checkpoints.prepare(self._control, self.rank, itinerary.start, itinerary.save_every)
        while self._notes:
            self._post(self._notes.pop(0))

    def _newest(self) -> Checkpoint | None:
        if self._checkpoints is None:
            raise UsageError("resume=True needs a trainer with checkpoints=FOLDER")
        return self._checkpoints.newest(self._channel())

    def _channel(self) -> Control:
        return self._world.channel() if self._world is not None else LocalControl()

    def _join(self, feed: Feed, itinerary: Itinerary, trace: range) -> list[Worker]:
        log_every = self.recipe.log_every
        back = 0 if isinstance(self.recipe.target, LabelTarget) else as_tuple(self.plan.sample)[0].shape[0]
        ends = self.recipe.options.correction is not None
        session = Session(feed, self._save, self._post, log_every, trace, self._capacity, self._timeout, back, ends)
        if self._world is None or not isinstance(self._control, StoreControl):
            return join_in_process(session, self._stages)
        digest = plan_digest(self.plan, self.recipe, self._capacity, itinerary)
        return [join_ranks(session, self._stages[0], self._world, self._control, digest)]

    def _post(self, record: Record) -> None:
        self._control.post(record)

    def _save(self, stage: Stage, packet: int) -> None:
        if self._checkpoints is not None and self._checkpoints.save(stage, self.plan, packet):
            self._post({"kind": "checkpoint", "stage": stage.index, "step": stage.updates})

    def _ensure_saved(self) -> None:
        """Rank 0, once all ranks have written their parts: no run ends well without its last checkpoint."""
        step = self._stages[0].updates
        if self._checkpoints is not None and self._checkpoints.ensure_committed(step, self.plan.stages):
            self._post({"kind": "checkpoint", "stage": 0, "step": step})
