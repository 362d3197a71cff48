"""Defines what every trainer offers to whoever runs it: decoupled stages and baselines alike."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from decoupled_pp.core import environment
from decoupled_pp.core.arguments import expect
from decoupled_pp.core.channels import Control
from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.device import choose_device
from decoupled_pp.core.errors import UsageError, shown
from decoupled_pp.core.extra_state import extra_state, load_extra_state, tensor_state
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.reports import Record, Report
from decoupled_pp.data.iterables import Batches, as_source
from decoupled_pp.links import LocalControl, World, join_world
from decoupled_pp.pipeline.feed import Itinerary
from decoupled_pp.run.checkpoints.folder import CheckpointFolder
from decoupled_pp.run.checkpoints.opened import Checkpoint
from decoupled_pp.settings.run import CheckpointSettings, TrainingSettings, ValidationSettings
from decoupled_pp.training.choices import choose_section
from decoupled_pp.training.recipe import Recipe

Observer = Callable[[list[Record]], None]
S = TypeVar("S", ValidationSettings, CheckpointSettings)


@dataclass(frozen=True)
class Task:
    """The work of one session of a trainer, between joining its links and leaving them."""

    train: BatchSource | None  # None: nothing is trained, only evaluated
    held_out: BatchSource | None
    itinerary: Itinerary
    resume: Checkpoint | None = None  # where it begins; None: where the trainer stands
    trace_packets: range = range(0)


class BaseTrainer(ABC):
    """One process of a run: it has built its part of a plan, or does so in the first `fit`."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        device: str,
        observer: Observer | None = None,
        checkpoints: CheckpointFolder | None = None,
    ) -> None:
        """Take over the parts, and join the other ranks of the launch if there are any."""
        self.plan = plan
        self.recipe = recipe
        self.interrupted = threading.Event()  # set by a signal handler: the run is to end in order
        self._observer = observer
        self._checkpoints = checkpoints
        self._timeout = recipe.links.timeout_seconds
        self._world: World | None = join_world(self._timeout) if environment.world_size() > 1 else None
        self._control: Control = LocalControl()
        # After the ranks have met: by hand-started ones the place on this machine is known only then.
        self.device: torch.device = choose_device(device, environment.local_rank(), environment.local_world_size())

    @property
    def rank(self) -> int:
        """This process's rank, 0 in a single process."""
        return self._world.rank if self._world is not None else 0

    def observe(self, observer: Observer) -> None:
        """Hand the metric records (on rank 0) to `observer` from now on."""
        self._observer = observer

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
        """Train; every rank calls this. Of decoupled stages only rank 0 reads the batches.

        Args:
            train_batches: Micro-batches (input, target), started over when they end; each is one packet. A second
                `fit` goes on in them; a one-shot iterator is read on from where it stands, or for `resume` from its
                beginning.
            steps: Optimizer steps to take; a second `fit` adds its own, and the schedule spans all of them.
            validate: Held-out micro-batches; scored at the end, and every `validate_every` steps.
            validate_every: Optimizer steps between evaluations; default: the recipe's.
            validation_batches: Micro-batches per evaluation; default: the recipe's, else all.
            save_every: Optimizer steps between checkpoints (also at the end) if the trainer has a checkpoint folder;
                default: the recipe's.
            resume: Go on from the newest checkpoint of the trainer's folder, if it has one, or from this one; `steps`
                is then the total.
            trace_packets: Packet numbers whose spans are recorded.

        Returns:
            The report, the same on every rank.

        Raises:
            UsageError: The user's input is at fault.
            TrainingError: Training cannot go on; the text names stage and packet, or the rank that failed.
        """
        expect("trace_packets", trace_packets, range, "a range of packet numbers")
        steps = choose_section({"steps": steps}, TrainingSettings, "training").steps
        validation = _with(self.recipe.validation, "validation", every=validate_every, batches=validation_batches)
        checkpoint = _with(self.recipe.checkpoint, "checkpoint", every=save_every)
        self._refuse_unused(validation if validate is None else None, checkpoint)
        self._refuse_blind_plateau(None if validate is None else validation.every)
        done = self._steps_done()
        found = self._checkpoint(resume)
        itinerary = Itinerary(
            steps=steps if resume else done + steps,
            start=found.step if found is not None else done,
            accumulate=self.recipe.training.accumulate,
            validate_every=validation.every,
            validation_batches=validation.batches,
            save_every=checkpoint.every,
            save=self._checkpoints is not None,
        )
        first = itinerary.accumulate * done if found is None else 0
        train = as_source(train_batches, endless=True, first=first)
        held_out = as_source(validate) if validate is not None else None
        return self._session(Task(train, held_out, itinerary, found, trace_packets))

    @abstractmethod
    def build(self, resume: bool | Checkpoint | None = None) -> None:
        """Build this process's part now, in the state of a checkpoint; raise UsageError for what does not fit."""

    @abstractmethod
    def finished_network(self) -> nn.Module | None:
        """Return the whole trained network after `fit`, on rank 0; None on other ranks, or if no rank has it whole."""

    @abstractmethod
    def _session(self, task: Task) -> Report:
        """Build what is missing, train (unless there is nothing to train on), evaluate, and gather the report."""

    @abstractmethod
    def _steps_done(self) -> int: ...

    def _channel(self) -> Control:
        return self._world.channel() if self._world is not None else LocalControl()

    def _gather_network(self, rank_of: Callable[[int], int | None]) -> nn.Module:
        """Return the whole network, every stage as the rank that trains it has it (None: as every rank has it)."""
        for stage in range(self.plan.stages):
            rank = rank_of(stage)
            if self._world is not None and rank is not None:
                self._take_over(self._world, self.plan.stage_module(stage), rank)
        return self.plan.module

    def _take_over(self, world: World, module: nn.Module, rank: int) -> None:
        """Let every rank have a stage as one rank has it."""
        for tensor in tensor_state(module).values():
            world.broadcast(tensor, rank)
        taken = {}
        for key, content in extra_state(module).items():
            size = torch.tensor(content.numel())  # it may have grown there
            world.broadcast(size, rank)
            taken[key] = content if self.rank == rank else torch.empty(int(size), dtype=torch.uint8)
            world.broadcast(taken[key], rank)
        load_extra_state(module, taken)

    def _checkpoint(self, resume: bool | Checkpoint | None) -> Checkpoint | None:
        """Return the checkpoint that `resume` asks for: the newest, this one, or none."""
        if isinstance(resume, Checkpoint):
            return resume
        if resume is not None and not isinstance(resume, bool):
            raise UsageError(
                f"resume={shown(resume)} is no checkpoint; give the trainer checkpoints=FOLDER, and resume=True",
                code="no-checkpoint-folder",
            )
        if not resume:
            return None
        if self._checkpoints is None:
            raise UsageError("resume=True needs a trainer with checkpoints=FOLDER", code="no-checkpoint-folder")
        return self._checkpoints.newest(self._channel())

    def _refuse_unused(self, unused: ValidationSettings | None, checkpoint: CheckpointSettings) -> None:
        """Raise UsageError for options of `fit` that would do nothing."""
        if unused is not None and (unused.every is not None or unused.batches is not None):
            raise UsageError(
                "`validation.every` and `validation.batches` need held-out data: give fit validate=batches",
                code="validation-without-data",
                key="validation.every",
            )
        if checkpoint.every is not None and self._checkpoints is None:
            raise UsageError(
                "`checkpoint.every` needs a trainer with checkpoints=FOLDER",
                code="no-checkpoint-folder",
                key="checkpoint.every",
            )

    def _refuse_blind_plateau(self, validated_every: int | None) -> None:
        """Raise UsageError for a plateau schedule that would never hear a held-out loss."""
        if self.recipe.has_plateau and validated_every is None:
            raise UsageError(
                "`schedule.kind` plateau follows held-out losses: give fit validate=batches and `validation.every`",
                code="plateau-without-validation",
                key="schedule.kind",
            )


def _with(section: S, key: str, **given: int | None) -> S:
    """Return the section with the values that are given, checked."""
    changed = {field: value for field, value in given.items() if value is not None}
    return choose_section(section.model_dump() | changed, type(section), key)
