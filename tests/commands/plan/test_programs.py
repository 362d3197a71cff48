"""What every rank sends, posts and waits for is what torch's schedules do, call for call."""

import pytest
from test_orders import SIZES, torchs_schedule
from torch.distributed.pipelining import schedules

from decoupled_pp.commands.plan.orders import TWO_STAGES, rank_of, stages_per_rank
from decoupled_pp.commands.plan.programs import PipelineShape, flushed
from decoupled_pp.commands.plan.simulate import Compute, Link, Post, Send, Wait, simulate
from kit import refused

RUNNING = [size for size in SIZES if size[0] <= size[1]]


def _shape(kind, ranks):
    boundaries = ranks * stages_per_rank(kind) - 1
    return PipelineShape(kind, ranks, (8,) * boundaries, (8,) * boundaries)


def _torch_refuses(kind, size):
    if kind == "deepspeed":
        return False
    try:
        torchs_schedule(kind, *size)
    except ValueError:
        return True
    return False


def _ours(program):
    """(what, kind, sending stage, micro-batch), as both sides of the comparison are written."""
    told = []
    for step in program:
        if isinstance(step, Compute):
            if step.operation.kind != "S":
                told.append(tuple(step.operation))
        else:
            message = step.message
            what = f"Wait {step.end}" if isinstance(step, Wait) else type(step).__name__
            told.append((what, message.kind, message.stage, message.micro_batch))
    return told


@pytest.mark.parametrize("size", RUNNING, ids=str)
@pytest.mark.parametrize("kind", TWO_STAGES)
def test_receives_are_posted_where_torch_posts_them(kind, size):
    if _torch_refuses(kind, size):
        with refused("schedule-does-not-fit"):
            flushed(_shape(kind, size[0]), size[1], 1)
        return
    lowered = torchs_schedule(kind, *size).pipeline_order_with_comms
    names = {"SEND_F": ("Send", "activation", 0), "SEND_B": ("Send", "gradient", 0)}
    names |= {"RECV_F": ("Post", "activation", -1), "RECV_B": ("Post", "gradient", 1)}
    for rank, program in enumerate(flushed(_shape(kind, size[0]), size[1], 1)):
        expected = []
        for action in lowered[rank]:
            letter = action.computation_type.value
            if letter in names:
                what, message, beyond = names[letter]
                expected.append((what, message, action.stage_index + beyond, action.microbatch_index))
            elif letter in "FBIW":
                expected.append((letter, action.stage_index, action.microbatch_index))
        assert [step for step in _ours(program) if not step[0].startswith("Wait")] == expected


@pytest.mark.parametrize("size", RUNNING, ids=str)
@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_one_stage_per_rank_does_what_torchs_step_does(kind, size, monkeypatch):
    ranks, count = size
    programs = flushed(_shape(kind, ranks), count, 1)
    for rank in range(ranks):
        assert _ours(programs[rank]) == _what_torch_does(torchs_schedule(kind, ranks, count, rank), monkeypatch)


def _what_torch_does(schedule, monkeypatch):
    """Computing, posting and waiting of one step, on a stage that only takes notes."""
    stage, done = schedule._stage, []
    index, last = stage.stage_index, stage.is_last

    def post(operations, desc=None):
        done.extend(operations)
        return list(operations)

    def wait(works):
        ends = {"Send": "Wait sent", "Post": "Wait received"}
        done.extend((ends[what], *rest) for what, *rest in works)

    monkeypatch.setattr(schedules, "_batch_p2p", post)
    monkeypatch.setattr(schedules, "_sorted_batch_p2p", lambda ops, desc=None: {0: post(ops)} if ops else {})
    monkeypatch.setattr(schedules, "_wait_batch_p2p", wait)
    stage.get_fwd_recv_ops = lambda n: [("Post", "activation", index - 1, n)] if index else []
    stage.get_fwd_send_ops = lambda n: [] if last else [("Send", "activation", index, n)]
    stage.get_bwd_recv_ops = lambda n: [] if last else [("Post", "gradient", index + 1, n)]
    stage.get_bwd_send_ops = lambda n: [("Send", "gradient", index, n)] if index else []
    stage.forward_one_chunk = lambda number, *_, **__: done.append(("F", index, number))
    stage.backward_one_chunk = lambda number, **_: done.append(("B", index, number))
    stage.perform_reduce_grad = lambda factor: None
    schedule._initialize_stage = lambda *_: None
    count = schedule._n_microbatches
    schedule._step_microbatches([()] * count, [{}] * count)
    return done


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "deepspeed", *TWO_STAGES])
@pytest.mark.parametrize("size", RUNNING, ids=str)
def test_every_program_ends_and_every_message_is_posted_and_sent_once(kind, size):
    ranks, count = size
    if _torch_refuses(kind, size):
        return
    programs = flushed(_shape(kind, ranks), count, 2)
    simulate(programs, lambda operation: 1.0, Link(0.1, 100.0, 0.01))
    for what in (Send, Post):
        ends = [step.message for program in programs for step in program if isinstance(step, what)]
        assert len(ends) == len(set(ends))
        for rank, program in enumerate(programs):
            mine = "source" if what is Send else "target"
            assert all(getattr(step.message, mine) == rank for step in program if isinstance(step, what))
    stages = ranks * stages_per_rank(kind)
    crossings = sum(rank_of(kind, s, ranks) != rank_of(kind, s + 1, ranks) for s in range(stages - 1))
    assert sum(isinstance(step, Send) for program in programs for step in program) == 2 * 2 * count * crossings
