"""Prepares a run from its settings: data, a network with seeded weights, and its cut."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoupled_pp.core.channels import Control
from decoupled_pp.core.datasets import Data, DataInfo
from decoupled_pp.core.device import seeded
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import as_tuple, map_payload
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.structures import spec_of, zeros_of
from decoupled_pp.critics import build_critic
from decoupled_pp.data import open_data
from decoupled_pp.links import LocalControl
from decoupled_pp.models import build_model
from decoupled_pp.models.cutting import By
from decoupled_pp.models.cutting.layers import LAYER_FAULTS, describe, trace, zeros_if_meta
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.pipeline.optim import find_optimizer
from decoupled_pp.run import folder as run_folder
from decoupled_pp.settings.run import Settings
from decoupled_pp.training.baselines import stages_needed
from decoupled_pp.training.partition import partition

logger = logging.getLogger(__name__)


def prepare(settings: Settings, control: Control | None = None) -> tuple[Data | None, DataInfo, Plan]:
    """Return the data (rank 0 only), their description, and the cut network with seeded weights."""
    if ":" not in settings.optimizer.kind:
        find_optimizer(settings.optimizer.kind)
    opened: list[Data] = []
    logger.info("opening the data (%s)", settings.data.kind)

    def describe_data() -> dict[str, Any]:
        opened.append(open_data(settings.data, settings.seed))
        info = opened[0].info
        payload, _ = next(opened[0].train.batches())
        sample = map_payload(torch.zeros_like, payload)
        if info.form == "sentences":  # micro-batches differ in length: measure and predict for the longest
            sample = tuple(torch.ones(len(tensor), *info.shape, dtype=tensor.dtype) for tensor in as_tuple(sample))
        if settings.sample is not None and (info.encode is None or info.decode is None):
            raise UsageError(
                f"`sample`: `data.kind` {settings.data.kind} is no text to go on from; leave `sample` out",
                code="sample-needs-text",
                key="sample",
            )
        return {"info": info.known(), "sample": spec_of(sample)}

    described = (control or LocalControl()).from_rank_0("data", describe_data, settings.links.timeout_seconds)
    baseline = settings.strategy != "decoupled"
    if not opened and baseline:  # every rank of a baseline reads the data
        opened.append(open_data(settings.data, settings.seed))
    info = opened[0].info if opened else DataInfo.of(described["info"])
    logger.info("building the network (%s)", settings.model.kind)
    with seeded(settings.seed), _within_memory():
        module = build_model(settings.model, info)
    if settings.start_from is not None:
        run_folder.load_weights(Path(settings.start_from), module)
    stages = settings.stages
    if baseline:
        stages = stages_needed(settings.strategy, settings.stages) or 1
    cut = _cut(settings, stages)
    if stages > 1:
        by = f"by {cut}" if isinstance(cut, str) else f"of {cut} layers"
        logger.info(
            "cutting its %d layers into %d stages %s", len(module), stages, by.replace("by time", "by measured time")
        )
    plan = partition(
        module,
        stages,
        cut,
        zeros_of(described["sample"]),
        critic=None if baseline else build_critic(settings.critic, settings.critic_overlap),
        critic_target=settings.critic_target,
        loss=settings.loss,
        device=settings.device,
        speeds=settings.balance.speeds,
        memory=settings.balance.memory,
        optimizer=settings.optimizer,
        accumulate=settings.training.accumulate,
        timeout_seconds=settings.links.timeout_seconds,
    )
    return (opened[0] if opened else None), info, plan


@contextmanager
def _within_memory() -> Iterator[None]:
    """Turn what an allocator refuses inside the block into one line; torch has no class of its own for the CPU's."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise UsageError(
            "`model`: the network does not fit into this machine's memory; use fewer or narrower layers",
            code="network-exceeds-memory",
            key="model",
        ) from error


def _cut(settings: Settings, stages: int) -> By:
    """Return how to cut into so many stages; a baseline may want more or fewer of them than the settings name."""
    if stages == 1:
        return "uniform"
    if isinstance(settings.cut, list) and len(settings.cut) != stages:
        return "time"
    return settings.cut


def check_losses(plan: Plan, settings: Settings, data: Data | None) -> None:
    """Raise UsageError unless network and losses take a batch of training and of validation data (on the CPU)."""
    if data is None:
        return
    loss = find_loss(settings.loss)
    held_out = find_loss(settings.validation.loss or loss, "validation.loss")
    for name, source, criterion in (("training", data.train, loss), ("validation", data.validation, held_out)):
        batch = next(source.batches(), None)
        if batch is None:
            raise UsageError(f"`data`: there is no {name} batch; give more data", code="no-batch", key="data")
        inputs, target = (map_payload(Tensor.cpu, part) for part in batch)
        _, output = trace(plan.module, inputs)
        met = f"the network's output {describe(output)} and a {name} target {describe(target)}"
        try:
            with torch.enable_grad():  # as in training: a loss without a gradient is found here
                criterion(zeros_if_meta(output).detach().requires_grad_(), target)
        except LAYER_FAULTS as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"`loss` fails on {met}: {error}; set another `loss`, or use data with other targets",
                code="loss-does-not-fit-targets",
                key="loss",
            ) from error
