"""The orders of compute are torch's own, and each strategy's passes are all there, once, in an order that can run."""

from collections import Counter
from types import SimpleNamespace

import pytest
from torch import nn
from torch.distributed.pipelining import schedules

from decoupled_pp.commands.plan.orders import PIPELINES, SPLIT, Operation, pipeline_order, rank_of, stages_per_rank
from decoupled_pp.core.errors import UsageError
from kit import refused

KINDS = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}
SIZES = [
    (1, 1),
    (1, 4),
    (2, 2),
    (2, 4),
    (2, 7),
    (3, 3),
    (3, 6),
    (4, 4),
    (4, 8),
    (4, 6),
    (4, 16),
    (5, 15),
    (8, 8),
    (8, 16),
]


def torchs_schedule(kind, ranks, micro_batches, rank=0):
    """A schedule object of torch, built on stand-ins for the stages: nothing is computed or sent."""
    count = ranks * stages_per_rank(kind)
    stages = [
        SimpleNamespace(
            num_stages=count,
            group_size=ranks,
            group_rank=rank,
            stage_index=stage,
            is_last=stage == count - 1,
            is_first=stage == 0,
            submod=nn.Identity(),
        )
        for stage in range(count)
        if rank_of(kind, stage, ranks) == rank
    ]
    given = stages if stages_per_rank(kind) == 2 else stages[0]
    return KINDS[kind](given, n_microbatches=micro_batches, loss_fn=None)


def torchs_order(kind, ranks, micro_batches):
    if stages_per_rank(kind) == 1:  # what their steps do: 1F1B's own description of its order is wrong (last stage)
        return [what_a_step_does(torchs_schedule(kind, ranks, micro_batches, rank)) for rank in range(ranks)]
    order = torchs_schedule(kind, ranks, micro_batches).pipeline_order
    return [
        [Operation(a.computation_type.value, a.stage_index, a.microbatch_index) for a in order[rank] if a is not None]
        for rank in range(ranks)
    ]


def what_a_step_does(schedule):
    """The compute of one step of a schedule with one stage per rank, on a stage that only takes notes."""
    stage, done = schedule._stage, []
    for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        setattr(stage, name, lambda number: [])
    stage.forward_one_chunk = lambda number, *_, **__: done.append(Operation("F", stage.stage_index, number))
    stage.backward_one_chunk = lambda number, **_: done.append(Operation("B", stage.stage_index, number))
    stage.perform_reduce_grad = lambda factor: None
    schedule._stage_forward_initialized = schedule._stage_backward_initialized = True
    schedule._initialize_stage = lambda *_: None
    count = schedule._n_microbatches
    schedule._step_microbatches([()] * count, [{}] * count)
    return done


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_torchs(kind, size):
    try:
        expected = torchs_order(kind, *size)
    except ValueError:
        with refused("schedule-does-not-fit"):
            pipeline_order(kind, *size)
        return
    assert pipeline_order(kind, *size) == expected


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_pass_is_there_once(kind):
    ranks, micro_batches = 4, 8
    passes = Counter(operation for order in pipeline_order(kind, ranks, micro_batches) for operation in order)
    kinds = "FIW" if kind in SPLIT else "FB"
    stages = range(ranks * stages_per_rank(kind))
    assert passes == Counter(Operation(k, s, n) for k in kinds for s in stages for n in range(micro_batches))


def test_what_cannot_be_ordered_is_refused():
    with refused("unknown-strategy", UsageError, "not a pipeline with a flush"):
        pipeline_order("decoupled", 2, 2)
