"""One stage: what it sends and when, what it trains, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from decoupled_pp.core.channels import Ends, Outlet
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.core.reports import PHASES
from decoupled_pp.pipeline.body import Body
from decoupled_pp.pipeline.feed import Feed, Itinerary
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import StageSettings
from decoupled_pp.training.build import assemble_stage
from decoupled_pp.training.recipe import Recipe
from kit import refused

CPU = torch.device("cpu")
B = 4


class Collector(Outlet):
    """Hands every packet to a function."""

    def __init__(self, take):
        self._take = take

    def send(self, packet):
        self._take(packet)


def make(trunk=None, critic=None, *, learning_rate=0.1, loss=cross_entropy, schedule=None, **options):
    trunk = trunk or nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    parameters = [p for module in (trunk, critic) if module is not None for p in module.parameters()]
    optimizers = [torch.optim.SGD(parameters, lr=learning_rate)] if parameters else []
    recipe = Recipe(loss, lambda context: critic, "unused", training=StageSettings(**options))
    body = Body(3, trunk, critic, loss, device=CPU, seed=7, training=recipe.training)
    stage = assemble_stage(3, 5, body, optimizers, recipe)
    stage.update.schedules = [LambdaLR(optimizer, schedule) for optimizer in optimizers] if schedule else []
    return stage


def with_critic(**options):
    return make(critic=nn.Linear(5, 2), **options)


def packet(number=0, payload=None, kind=PacketKind.TRAIN):
    inputs = torch.randn(B, 3) if payload is None else payload
    return Packet(kind, number, inputs, torch.tensor([0, 1, 1, 0]))


def step(stage, given, send=lambda sent: None, lap=lambda phase: None):
    return stage.train(given, Ends(Feed(None, None, Itinerary(0), CPU), Collector(send)), lap).loss


def weights(stage):
    modules = [module for module in (stage.trunk, stage.critic) if module is not None]
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_output_leaves_after_forward_and_before_anything_trains():
    stage, phases, phases_before_sending = with_critic(), [], []
    before = weights(stage)

    def send(sent):
        phases_before_sending.extend(phases)
        assert equal(weights(stage), before)
        assert all(parameter.grad is None for parameter in stage.trunk.parameters())

    step(stage, packet(), send, phases.append)
    assert ("wait_in", *phases) == PHASES
    assert phases_before_sending == ["forward"]
    assert not equal(weights(stage), before)


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_critics_phase_ends_before_the_trunk_is_differentiated(outputs):
    """Whether the trunk returns one tensor or several; its backward pass is seen by a hook inside."""
    phases = []

    class Trunk(nn.Linear):
        def forward(self, hidden):
            inside = super().forward(hidden)
            inside.register_hook(lambda _: phases.append("trunk"))
            return inside.tanh() if outputs == 1 else tuple(inside.tanh() for _ in range(outputs))

    class Critic(nn.Linear):
        def forward(self, payload):
            return super().forward(payload if outputs == 1 else sum(payload))

    stage = make(Trunk(3, 5), Critic(5, 2))
    for number in range(2):
        phases.clear()
        step(stage, packet(number), lap=phases.append)
        assert phases == ["forward", "wait_out", "critic", "trunk", "backward", "step"]


def test_what_is_sent():
    stage, sent = with_critic(), []
    given = packet(number=6)
    expected = stage.trunk(given.payload).detach()
    step(stage, given, sent.append)
    (one,) = sent
    assert (one.kind, one.number) == (PacketKind.TRAIN, 6)
    assert one.target is given.target
    assert torch.equal(one.payload, expected)
    assert not one.payload.requires_grad


def test_trunk_and_critic_learn_as_if_they_were_one_network():
    stage, given = with_critic(learning_rate=0.5), packet()
    joined = copy.deepcopy(nn.Sequential(stage.trunk, stage.critic))
    optimizer = torch.optim.SGD(joined.parameters(), lr=0.5)
    loss = cross_entropy(joined(given.payload), given.target)
    loss.backward()
    optimizer.step()

    assert torch.equal(step(stage, given), loss.detach())
    assert equal(weights(stage), list(joined.state_dict().values()))


def test_the_last_stage_is_judged_by_its_own_output():
    stage, given = make(nn.Sequential(nn.Linear(3, 2))), packet()
    expected = cross_entropy(stage.trunk(given.payload), given.target)
    assert torch.equal(step(stage, given), expected.detach())


def test_an_update_takes_as_many_packets_as_accumulate_says():
    stage = with_critic(accumulate=3)
    changed = []
    for number in range(6):
        before = weights(stage)
        step(stage, packet(number))
        changed.append(not equal(before, weights(stage)))
    assert changed == [False, False, True, False, False, True]
    assert (stage.updates, stage.samples) == (2, 6 * B)


def test_gradients_are_clipped_over_trunk_and_critic_together():
    stage = with_critic(clip_norm=0.01, learning_rate=1.0)
    before = weights(stage)
    step(stage, packet())
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(stage), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_gradients_of_all_optimizers_are_clipped_as_one():
    """Muon's half and AdamW's half of a stage have one norm."""
    stage = with_critic(clip_norm=0.01)
    halves = stage.trunk.parameters(), stage.critic.parameters()
    stage.update.optimizers = [torch.optim.SGD(parameters, lr=1.0) for parameters in halves]
    before = weights(stage)
    step(stage, packet())
    moved = [a - b for a, b in zip(weights(stage), before, strict=True)]
    assert all(part.any() for part in moved)
    assert float(torch.cat([part.flatten() for part in moved]).norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_schedule_goes_on_with_every_update():
    stage = with_critic(schedule=lambda update: 1 / (1 + update), accumulate=2)
    rates = []
    for number in range(4):
        rates.append(stage.learning_rate)
        step(stage, packet(number))
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_a_stage_with_nothing_to_train_passes_packets_on():
    stage, sent = make(nn.Sequential(nn.Softmax(-1))), []
    loss = step(stage, packet(), sent.append)
    assert not loss.requires_grad
    assert len(sent) == 1
    assert stage.learning_rate == 0.0


def test_tuples_with_integers_travel_and_only_what_has_a_gradient_gets_one():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, inputs):
            return self.linear(inputs), torch.arange(B)

    stage, sent = make(nn.Sequential(Pair())), []
    before = weights(stage)
    step(stage, packet(), sent.append)
    assert [tensor.dtype for tensor in sent[0].payload] == [torch.float32, torch.int64]
    assert not equal(before, weights(stage))


def test_what_cannot_travel_is_refused_by_name():
    class WithSet(nn.Module):
        def forward(self, inputs):
            return {"hidden": [inputs, {1, 2}]}

    with refused("output-cannot-travel", UsageError, "stage 3 returned a set at ['hidden'][1]"):
        step(make(nn.Sequential(WithSet())), packet())


def test_evaluation_scores_in_eval_mode_and_trains_nothing():
    trunk = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    stage, sent = make(trunk, nn.Linear(5, 2)), []
    given = packet(kind=PacketKind.EVALUATE)
    before = weights(stage)
    stage.evaluate(given, sent.append)
    loss, accuracy = stage.finish_evaluation()

    with torch.no_grad():
        output = trunk.eval()(given.payload)
        logits = stage.critic(output)
    assert torch.equal(sent[0].payload, output)
    assert not sent[0].payload.requires_grad
    assert loss == pytest.approx(float(cross_entropy(logits, given.target)), rel=1e-6)
    assert accuracy == float((logits.argmax(-1) == given.target).double().mean())
    assert equal(before, weights(stage))


def test_evaluation_ends_in_training_mode_with_a_fresh_score():
    stage = with_critic()
    for seed in (1, 2):
        torch.manual_seed(seed)
        given = packet(kind=PacketKind.EVALUATE)
        stage.evaluate(given, lambda sent: None)
        loss, _ = stage.finish_evaluation()
        with torch.no_grad():
            expected = cross_entropy(stage.critic(stage.trunk(given.payload)), given.target)
        assert loss == pytest.approx(float(expected))
    assert stage.trunk.training
    assert stage.critic.training


def test_evaluation_leaves_frozen_parts_frozen():
    frozen = nn.BatchNorm1d(5).eval()
    stage = make(nn.Sequential(nn.Linear(3, 5), frozen), nn.Sequential(nn.Linear(5, 2), nn.Dropout(0.5).eval()))
    before = {name: part.training for module in stage.body.modules for name, part in module.named_modules()}
    stage.evaluate(packet(kind=PacketKind.EVALUATE), lambda sent: None)
    assert {name: part.training for module in stage.body.modules for name, part in module.named_modules()} == before
    step(stage, packet())
    assert torch.equal(frozen.running_mean, torch.zeros(5))


def test_the_random_numbers_of_others_are_left_alone():
    stage = make(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5)), nn.Linear(5, 2))
    given, outside = packet(), torch.get_rng_state()
    own = stage.body.random.state
    step(stage, given)
    assert torch.equal(torch.get_rng_state(), outside)
    assert not torch.equal(stage.body.random.state, own)


def test_saved_activations_are_counted_in_the_first_step():
    """By hand: the input, Tanh's output, the critic's input (the same), and the loss's log-probabilities."""
    stage = with_critic()
    step(stage, packet())
    float_bytes, weight_of_loss = 4, 4
    by_hand = (B * 3 + B * 5 + B * 2) * float_bytes + B * 8 + weight_of_loss
    assert stage.saved_activation_bytes_peak == by_hand
    step(stage, Packet(PacketKind.TRAIN, 1, torch.randn(99, 3), torch.ones(99, dtype=torch.int64)))
    assert stage.saved_activation_bytes_peak == by_hand


def test_bf16_computes_in_bf16_and_keeps_fp32_weights():
    stage, sent = make(nn.Sequential(nn.Linear(3, 5)), nn.Linear(5, 2), precision="bf16"), []
    step(stage, packet(), sent.append)
    assert sent[0].payload.dtype is torch.bfloat16
    assert {tensor.dtype for tensor in weights(stage)} == {torch.float32}


def test_an_evaluation_that_draws_random_numbers_changes_no_training():
    """Whether an evaluation has happened when a checkpoint is written may not matter to a run that goes on from it."""

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    stage = make(nn.Sequential(nn.Linear(3, 5), Noise()), nn.Linear(5, 2))
    before, scores = stage.body.random.state, []
    for _ in range(2):
        stage.evaluate(packet(kind=PacketKind.EVALUATE, payload=torch.ones(B, 3)), lambda sent: None)
        scores.append(stage.finish_evaluation())
    assert torch.equal(stage.body.random.state, before)
    assert scores[0] == scores[1]


def test_a_critic_without_logits_has_no_exit_and_sees_the_first_layers_output():
    seen = []

    class Watcher(Critic):
        needs_first, exits = True, False

        def objective(self, view, loss):
            seen.append(view)
            return view.hidden.square().mean()

    stage = make(trunk=nn.Sequential(nn.Linear(3, 5), nn.Tanh()), critic=Watcher())
    given = packet()
    first = stage.trunk[0](given.payload)
    step(stage, given)
    assert torch.equal(seen[0].first, first) and not seen[0].first.requires_grad
    assert not stage.trunk[0]._forward_hooks
    stage.evaluate(packet(kind=PacketKind.EVALUATE), lambda sent: None)
    assert stage.finish_evaluation() is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_critic_warms_up_before_its_stage_learns(accumulate):
    """Kumar et al. 2022: first the head, then all. The critic learns what it would behind frozen layers."""
    stage, frozen = (with_critic(accumulate=accumulate, critic_warmup=warmup) for warmup in (3, 0))
    frozen.trunk.load_state_dict(stage.trunk.state_dict())
    frozen.critic.load_state_dict(stage.critic.state_dict())
    frozen.trunk.requires_grad_(False)
    start = weights(frozen)
    for number in range(3 * accumulate):
        given = packet(number)
        step(stage, given)
        step(frozen, given)
    warm = weights(stage)
    assert equal(warm, weights(frozen)) and not equal(warm, start)
    for number in range(3 * accumulate, 4 * accumulate):
        step(stage, packet(number))
    assert not torch.equal(weights(stage)[0], warm[0])


def test_the_last_stage_has_no_critic_to_warm_up():
    stage = make(critic=None, critic_warmup=3)
    before = weights(stage)
    step(stage, packet())
    assert not equal(weights(stage), before)


def test_a_staggered_stage_passes_packets_on_and_begins_to_learn_when_it_is_due():
    """Stage 3 with stagger 2 begins after 6 of its own updates."""
    stage, sent = with_critic(stagger=2), []
    before = weights(stage)
    for number in range(6):
        step(stage, packet(number), sent.append)
    assert (len(sent), stage.updates) == (6, 6)
    assert equal(weights(stage), before)
    step(stage, packet(6), sent.append)
    assert not equal(weights(stage), before)
