"""The laws on a GPU: 1, 2 (in one process, and over NCCL where there are two GPUs), 3, 5 and 6.

Optimizer: SGD with momentum. Adam makes a full step of a gradient that is nothing but rounding, such as a key bias has,
so that one atomic addition in another order would fail a test.
"""

import copy
import functools
import random
import warnings
from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import pytest
import torch
from cases import CASES, MOMENTUM
from on_gpu import DEVICE, GPU, ON_CUDA, assert_states_close, busy
from torch import nn
from torch.nn import functional

from decoupled_pp.core.packets import map_payload
from decoupled_pp.links import InProcessLink
from decoupled_pp.pipeline import runtime
from decoupled_pp.pipeline.rules.local import Local
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.pipeline.updates.update import Update
from kit import merged, states
from ranks import launch, values

pytestmark = GPU


def train(case, stages, steps, batches=7, **options):
    """The states after training on the device under test."""
    trainer = CASES[case].trainer(stages, device=DEVICE.type, **({"optimizer": MOMENTUM} | options))
    trainer.fit(CASES[case].batches(batches), steps)
    assert trainer.device == DEVICE
    assert all(p.device == DEVICE for stage in trainer.stages for p in stage.trunk.parameters())
    return states(trainer)


def train_plainly(case, stages, steps, *, batches=7, accumulate=1, clip_norm=None):
    """The same by a loop of plain PyTorch, each stage on its own: trunk, critic and optimizer; the weights by stage."""
    trainer = CASES[case].trainer(stages, device=DEVICE.type, optimizer=MOMENTUM)
    trainer.build(steps)
    parts = [copy.deepcopy(nn.ModuleList([s.trunk, s.critic or nn.Identity()])) for s in trainer.stages]
    settings = {"lr": MOMENTUM["lr"], **MOMENTUM["arguments"]}
    optimizers = [torch.optim.SGD(part.parameters(), **settings) for part in parts]
    data = [
        tuple(map_payload(lambda t: t.to(DEVICE), half) for half in batch) for batch in CASES[case].batches(batches)
    ]
    for number in range(steps * accumulate):
        hidden, target = data[number % len(data)]
        for part, optimizer in zip(parts, optimizers, strict=True):
            output = part[0](hidden)
            logits = part[1](output)
            (functional.cross_entropy(logits.flatten(0, -2), target.flatten()) / accumulate).backward()
            if (number + 1) % accumulate == 0:
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(part.parameters(), clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            hidden = output.detach()
    named = [
        {f"model.{k}": t for k, t in part[0].state_dict().items()}
        | {f"critic.{k}": t for k, t in part[1].state_dict().items()}
        for part in parts
    ]
    return dict(enumerate(named))


def weights(states):
    return {stage: {k: t for k, t in s.items() if k.startswith(("model.", "critic."))} for stage, s in states.items()}


@pytest.mark.parametrize(("accumulate", "clip_norm"), [(1, None), (3, 0.1)])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("case", ["gpt", "resnet"])
def test_laws_1_and_2_pipeline_is_plain_training(case, stages, accumulate, clip_norm):
    ours = train(case, stages, 20, accumulate=accumulate, clip_norm=clip_norm)
    theirs = train_plainly(case, stages, 20, accumulate=accumulate, clip_norm=clip_norm)
    assert_states_close(weights(ours), theirs)


@pytest.mark.skipif(
    ON_CUDA and torch.cuda.device_count() < 2,
    reason="NCCL takes one rank per GPU and there are not two; gloo sends host tensors only, and a link does not stage "
    "CUDA payloads through the host, so two ranks cannot share one",
)
def test_law_2_ranks_equal_one_process(tmp_path):
    together = train("gpt with dropout", 2, 6, capacity=2)
    apart = merged(values(launch(_train_on_a_rank, size=2, folder=tmp_path)))
    assert_states_close(together, apart)


def _train_on_a_rank():
    warnings.simplefilter("ignore")  # NCCL's own
    trainer = CASES["gpt with dropout"].trainer(2, device=DEVICE.type, optimizer=MOMENTUM, capacity=2)
    trainer.fit(CASES["gpt with dropout"].batches(7), 6)
    return {stage: {k: t.cpu() for k, t in found.items()} for stage, found in states(trainer).items()}


@pytest.mark.parametrize("capacity", [1, 4])
def test_law_3_delays_on_streams_change_nothing(capacity):
    undisturbed = train("gpt with dropout", 3, 8, capacity=capacity)
    sleeper, slept = random.Random(1), [0]

    def slowed(method):
        @functools.wraps(method)
        def slow(*arguments, **options):
            slept[0] += 1
            busy(sleeper.random() ** 4 * 8)
            return method(*arguments, **options)

        return slow

    places = [
        (Stage, "train"),
        (Local, "learn"),
        (Update, "step"),
        (InProcessLink, "send"),
        (InProcessLink, "receive"),
    ]
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(patch.object(owner, name, slowed(getattr(owner, name))))
        disturbed = train("gpt with dropout", 3, 8, capacity=capacity)

    assert slept[0] > 8 * 3 * 3  # the delays did happen
    assert_states_close(undisturbed, disturbed)


def test_law_3_streams_equal_one_stream():
    several = train("gpt with dropout", 3, 8)
    with patch.object(runtime, "own_stream", lambda device: nullcontext()):
        one = train("gpt with dropout", 3, 8)
    assert_states_close(several, one)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("case", ["gpt", "mlp"])
def test_law_5_parts_equal_the_whole(case, clip_norm):
    """In fp64, as on the CPU: 1e-6 relative."""
    torch.set_default_dtype(torch.float64)
    try:
        parts, steps = 3, 6
        small = CASES[case].batches(parts * steps)
        large = [
            tuple(torch.cat(halves) for halves in zip(*small[at : at + parts], strict=True))
            for at in range(0, len(small), parts)
        ]
        options = {"device": DEVICE.type, "optimizer": MOMENTUM, "clip_norm": clip_norm}
        in_parts = CASES[case].trainer(2, accumulate=parts, **options)
        at_once = CASES[case].trainer(2, **options)
        in_parts.fit(small, steps)
        at_once.fit(large, steps)
        assert_states_close(states(in_parts), states(at_once), rtol=1e-6, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", ["gpt with dropout", "mlp with dropout", "resnet"])
def test_law_6_checkpointed_activations(case):
    kept = train(case, 2, 5, accumulate=2)
    recomputed = train(case, 2, 5, accumulate=2, checkpoint_activations=True)
    assert_states_close(kept, recomputed)


@pytest.mark.timeout(300)
def test_law_6_compiled(tmp_path):
    """Fused kernels add in another order: 1e-3 relative, 1e-5 absolute after 4 steps."""
    eager = train("mlp", 2, 4)
    (compiled,) = values(launch(_train_compiled, size=1, folder=tmp_path, seconds=280))
    assert_states_close(eager, compiled, rtol=1e-3)


def _train_compiled():
    """In a process of its own: the compiler keeps threads and processes for its next job."""
    warnings.simplefilter("ignore")  # the compiler's own
    found = train("mlp", 2, 4, compile=True)
    return {stage: {k: t.cpu() for k, t in state.items()} for stage, state in found.items()}
