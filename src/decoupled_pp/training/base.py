"""Defines what every trainer offers to whoever runs it: decoupled stages and baselines alike."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from decoupled_pp.core import environment
from decoupled_pp.core.channels import Control
from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.device import choose_device
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.reports import Record, Report
from decoupled_pp.data.iterables import Batches
from decoupled_pp.links import LocalControl, World, join_world
from decoupled_pp.run.checkpoints.parts import Checkpoint
from decoupled_pp.training.recipe import Recipe

Observer = Callable[[list[Record]], None]


class BaseTrainer(ABC):
    """One process of a run: it has built its part of a plan, or does so in the first `fit`."""

    every_rank_reads: ClassVar[bool] = False  # true if all ranks read the data, False if only rank 0 does

    def __init__(self, plan: Plan, recipe: Recipe, device: str, observer: Observer | None = None) -> None:
        """Take over the parts, and join the other ranks of the launch if there are any."""
        self.plan = plan
        self.recipe = recipe
        self.device: torch.device = choose_device(device, environment.local_rank(), environment.local_world_size())
        self.interrupted = threading.Event()  # set by a signal handler: the run is to end in order
        self._observer = observer
        self._timeout = recipe.links.timeout_seconds
        self._world: World | None = join_world(self._timeout) if environment.world_size() > 1 else None
        self._control: Control = LocalControl()

    @property
    def rank(self) -> int:
        """This process's rank, 0 in a single process."""
        return self._world.rank if self._world is not None else 0

    def observe(self, observer: Observer) -> None:
        """Hand the metric records (on rank 0) to `observer` from now on."""
        self._observer = observer

    @abstractmethod
    def build(self, resume: Checkpoint | None = None) -> None:
        """Build this process's part now, to find what does not fit before a run starts."""

    @abstractmethod
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
        """Train; every rank calls this with the same arguments and gets the same report.

        Args:
            train_batches: Training micro-batches.
            steps: Optimizer steps.
            validate: Held-out micro-batches; scored at the end, and every `validate_every` steps.
            validate_every: Optimizer steps between evaluations; default: the recipe's.
            validation_batches: Micro-batches per evaluation; default: the recipe's, else all.
            save_every: Optimizer steps between checkpoints, for trainers that save them; default: the recipe's.
            resume: Checkpoint to go on from, for trainers that save them.
            trace_packets: Numbers of the micro-batches whose spans are recorded.
        """

    @abstractmethod
    def finished_network(self) -> nn.Module | None:
        """Return the whole trained network after `fit`, on rank 0; None on other ranks, or if no rank has it whole."""

    def _channel(self) -> Control:
        return self._world.channel() if self._world is not None else LocalControl()
