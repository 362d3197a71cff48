"""Trains a plan stage by stage: all stages in this process, or under torchrun the one stage of this rank."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn

from decoupled_pp.core import environment
from decoupled_pp.core.arguments import expect
from decoupled_pp.core.channels import LinkTerms
from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.extra_state import extra_state
from decoupled_pp.core.packets import PacketKind, as_tuple, batch_size
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.reports import CheckpointRecord, Exit, NoteRecord, Record, Report
from decoupled_pp.core.topology import Topology
from decoupled_pp.data.iterables import Batches, as_source
from decoupled_pp.links import StoreControl
from decoupled_pp.pipeline.feed import Feed, Itinerary
from decoupled_pp.pipeline.optimizer_state import refuse_unsavable
from decoupled_pp.pipeline.runtime import Worker, run
from decoupled_pp.pipeline.schedules import build_schedules
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.run.checkpoints.folder import CheckpointFolder, tied_weights
from decoupled_pp.run.checkpoints.opened import Checkpoint, latest_checkpoint
from decoupled_pp.run.checkpoints.parts import refuse_unsavable_tensors
from decoupled_pp.run.checkpoints.resume import load_model, load_stage, refuse_other_network, with_cut_of
from decoupled_pp.run.live import LiveView
from decoupled_pp.run.report import RankMeasurement, link_summaries, make_report, measure_stage
from decoupled_pp.settings.run import ScheduleSettings
from decoupled_pp.training.base import BaseTrainer, Observer, Task
from decoupled_pp.training.build import build_stages, plan_digest, renew_optimizers
from decoupled_pp.training.join import Session, join_in_process
from decoupled_pp.training.recipe import Recipe
from decoupled_pp.training.watch import Watcher, told_to_all


class DecoupledTrainer(BaseTrainer):
    """Trains decoupled stages by a recipe; `Trainer` is the same with the options of a script."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        device: str,
        folder: Path | None = None,
        observer: Observer | None = None,
        *,
        is_claimed: bool = False,  # the folder lies in a run folder that is this run's already
    ) -> None:
        """Check everything; stages are built by `build`, or the first `fit` or `evaluate`."""
        expect("plan", plan, Plan, "what dpp.partition returns")
        self._topology = Topology(plan.stages, environment.world_size())
        recipe.refuse_contradictions(plan.stages)
        if not as_tuple(plan.sample):
            raise UsageError(
                "the plan has no sample to fit critics to; pass sample= to partition", code="plan-without-sample"
            )
        super().__init__(plan, recipe, device, observer, _checkpoint_folder(plan, recipe, folder, is_claimed))
        self._stages: list[Stage] = []
        self._loaded: Checkpoint | None = None
        self._notes: list[Record] = []

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of this process, once built: all, or under torchrun this rank's one."""
        return tuple(self._stages)

    def build(self, resume: bool | Checkpoint | None = None) -> None:
        """Build this rank's stages now rather than in the first `fit`, to find what does not fit before a run starts.

        Args:
            resume: Bring them to the state of this checkpoint; give `fit` the same. Timing noise can move a cut, so a
                plan that was cut by time and has as many stages takes the checkpoint's cut.

        Raises:
            UsageError: A critic, the optimizer or the checkpoint does not fit.
        """
        resume = self._checkpoint(resume)
        if resume is not None:
            refuse_other_network(resume, self.plan.module)
        if not self._stages:
            if resume is not None:
                self.plan = with_cut_of(resume, self.plan)
            mine = [place.stage for place in self._topology.places_of(self.rank)]
            self._stages = build_stages(self.plan, self.recipe, mine, self.device)
            for stage in self._stages:
                self._refuse_unsavable(stage)
        if resume is not None and resume is not self._loaded:
            for stage in self._stages:
                notes = load_stage(resume, stage, self.plan)
                self._notes += [NoteRecord(stage=stage.index, text=note) for note in notes]
        self._loaded = resume

    def evaluate(self, batches: Batches | BatchSource, *, resume: bool | Checkpoint | None = None) -> tuple[Exit, ...]:
        """Score every exit on held-out micro-batches; every rank calls this and gets the same scores.

        Args:
            batches: Held-out micro-batches (input, target).
            resume: Score the newest checkpoint of the trainer's folder, or this one, whatever stages it was saved by;
                `export` returns its weights then, and `fit` goes on from it.

        Raises:
            UsageError: There is no checkpoint, or it is of another network.
        """
        found = self._checkpoint(resume)
        if resume and found is None:  # fit would begin anew, but nobody wants the scores of untrained weights
            raise UsageError(
                "resume=True: the trainer's folder has no checkpoint to evaluate yet; call fit first, or leave it out",
                code="no-checkpoint",
            )
        step = found.step if found is not None else self._steps_done()
        return self._session(Task(None, as_source(batches), Itinerary(step, step), found)).exits

    def export(self) -> nn.Module:
        """Return the user's own module, trained; under torchrun every rank calls this and gets all weights.

        Raises:
            UsageError: Other stages of a network on the meta device are on other ranks only.
        """
        if any(parameter.is_meta for parameter in self.plan.module.parameters()):
            raise UsageError(
                "this rank has its own stage only; write the network out of a checkpoint with dpp.write_shards",
                code="network-is-not-whole",
            )
        return self._gather_network(self._topology.rank_of)

    def finished_network(self) -> nn.Module | None:
        """Return the network on rank 0, the other ranks' stages from the newest checkpoint."""
        if self.rank != 0 or any(parameter.is_meta for parameter in self.plan.module.parameters()):
            return None
        if self._checkpoints is not None:
            newest = latest_checkpoint(self._checkpoints.path)
            if newest is not None:
                load_model(newest, self.plan.module)
        return self.plan.module

    def _session(self, task: Task) -> Report:
        """Build what is missing, connect, run to the END packet, and gather the report."""
        self._control = self._channel()
        wanted = self._observer is None and self.rank == 0 and task.train is not None
        view = LiveView(self.plan.stages, task.itinerary.steps) if wanted else None
        observer = self._observer or (view.update if view is not None else None)
        watcher = Watcher(self._control, observer if self.rank == 0 else None, self.interrupted)
        with closing(view) if view is not None else nullcontext(), watcher:
            report = self._run(task, watcher)
        if report.steps >= task.itinerary.steps:  # a stop that was asked for in the last step changed nothing
            return replace(report, stopped=None)
        return report

    def _run(self, task: Task, watcher: Watcher) -> Report:
        """Run to the END packet and gather the report, or tell all ranks why not."""
        workers: list[Worker] = []
        is_over = False
        try:
            with told_to_all(self._control, self.rank, self._topology):
                self._begin(task)
                feed = self._feed(task, watcher)
                workers = self._join(feed, task)
                run(workers)
                for worker in workers:
                    worker.close()  # now every byte is out, and counted
                report = self._gather(workers)
                step = self._stages[0].updates
                is_saved = self.rank == 0 and task.train is not None and step > task.itinerary.start
                folder = self._checkpoints
                # Every rank has sent its report, so all parts are written; the last to write may not have seen them.
                if is_saved and folder is not None and folder.ensure_committed(step, self.plan.stages):
                    self._control.post(CheckpointRecord(stage=0, step=step))
            is_over = True
            return report
        finally:
            if self._checkpoints is not None:
                self._checkpoints.leave(is_over=is_over)
            for worker in workers:
                worker.close()  # a second time in a good run, which does nothing
            if self._world is not None:
                self._world.disconnect()

    def _begin(self, task: Task) -> None:
        """Bring this rank's stages to where the run begins, and wait until all ranks have."""
        self.build(task.resume)
        for stage in self._stages:
            stage.begin()
            if task.train is not None:
                self._schedule(stage, task.itinerary)
        self._loaded = None  # training changes what was loaded
        devices = self._control.gather("built", self.device.type, self._timeout)
        if len(set(devices)) > 1:
            raise UsageError(
                f"`device`: the ranks compute on {', '.join(devices)}; set `device` to cpu, or give each rank a GPU",
                code="ranks-on-different-devices",
                key="device",
            )
        if self._checkpoints is not None and task.train is not None:
            itinerary = task.itinerary
            self._checkpoints.prepare(self._control, self.rank, itinerary.start, itinerary.save_every)
        while self._notes:
            self._control.post(self._notes.pop(0))

    def _schedule(self, stage: Stage, itinerary: Itinerary) -> None:
        """Let the optimizers train what requires a gradient now, and their schedules go on from the present step."""
        update = stage.update
        is_renewed = renew_optimizers(stage, self.plan, self.recipe)
        if update.plateau is not None:
            update.plateau.every = itinerary.validate_every
        choice = self.recipe.schedule
        # A schedule of the user's own goes on by itself; the others depend on the steps of all runs together.
        if isinstance(choice, ScheduleSettings) or is_renewed or not update.schedules:
            made = build_schedules(choice, update.optimizers, itinerary.steps, update.steps, update.plateau)
            update.schedules = made

    def _refuse_unsavable(self, stage: Stage) -> None:
        """Raise UsageError for state that could not go where it will have to: to a checkpoint, or to another rank."""
        if self._checkpoints is not None:
            refuse_unsavable(stage.first_groups)
            refuse_unsavable_tensors(stage, self.plan)
        if self._checkpoints is not None or self._world is not None:
            for module in stage.body.modules:
                extra_state(module)

    def _feed(self, task: Task, watcher: Watcher) -> Feed:
        body = self._stages[0].body
        weights = {PacketKind.TRAIN: body.loss.weight, PacketKind.EVALUATE: body.held_out_loss.weight}
        return Feed(
            task.train,
            task.held_out,
            task.itinerary,
            self.device,
            lambda: watcher.stop_requested() is not None,
            weights=weights,
        )

    def _join(self, feed: Feed, task: Task) -> list[Worker]:
        terms = LinkTerms(
            self.recipe.links.capacity,
            self._timeout,
            self._stages[0].rule.returns,
            samples=batch_size(self.plan.sample),
        )
        session = Session(feed, self._save, self._control.post, self.recipe.metrics.every, task.trace_packets, terms)
        if self._world is None or not isinstance(self._control, StoreControl):
            return join_in_process(session, self._stages)
        digest = plan_digest(self.plan, self.recipe, task.itinerary)
        inlet, outlet = self._world.connect(self._control, self._topology, self.device, digest, terms)
        return [session.worker(self._stages[0], inlet, outlet)]

    def _gather(self, workers: list[Worker]) -> Report:
        """Return the report of what all ranks measured, the same on each."""
        ends = [worker.ends.outlet for worker in workers] + [worker.ends.inlet for worker in workers]
        mine = RankMeasurement(
            stages=tuple(measure_stage(worker.stage, worker.meter) for worker in workers),
            links=link_summaries(ends),
            stopped=self._control.stop_requested(),
        )
        # Stages end one after the other, so the first may wait for all the others.
        gathered = self._control.gather("summary", mine, self._timeout * self.plan.stages)
        return make_report(gathered)

    def _steps_done(self) -> int:
        return self._stages[0].updates if self._stages else 0

    def _save(self, stage: Stage, packet: int) -> None:
        if self._checkpoints is not None and self._checkpoints.save(stage, self.plan, packet):
            self._control.post(CheckpointRecord(stage=stage.index, step=stage.updates))


def _checkpoint_folder(plan: Plan, recipe: Recipe, folder: Path | None, is_claimed: bool) -> CheckpointFolder | None:
    section = recipe.checkpoint
    if folder is not None:
        tied = tied_weights(plan) if section.refresh_tied else None
        timeout_seconds = recipe.links.timeout_seconds
        return CheckpointFolder(
            folder, keep=section.keep, timeout_seconds=timeout_seconds, tied=tied, is_claimed=is_claimed
        )
    if section.refresh_tied:
        raise UsageError(
            "`checkpoint.refresh_tied` takes weights from checkpoints: give checkpoints=FOLDER",
            code="no-checkpoint-folder",
            key="checkpoint.refresh_tied",
        )
    return None
