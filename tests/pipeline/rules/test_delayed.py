"""The delayed rule: plain PyTorch with gradients that come late, whatever the timing, saved and resumed in between."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.settings.load import check_settings
from kit import differences, ignore, merged, refused, states, vector_batches, weights
from ranks import launch, values

B, WIDTH, CLASSES = 4, 6, 3
DELAYED = {"kind": "delayed"}
MOMENTUM = {"kind": "SGD", "lr": 0.05, "arguments": {"momentum": 0.9, "fused": False}}
ADAMW = {"kind": "AdamW", "lr": 0.01, "arguments": {"fused": False}}
MADE = {"SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01)}


def batches(count, size=B):
    return vector_batches(count, size, WIDTH, CLASSES)


def network(*, dropout=0.0, norm=False):
    torch.manual_seed(1)

    def block():
        between = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), between, nn.Tanh(), nn.Dropout(dropout))

    return nn.Sequential(block(), block(), block(), nn.Linear(WIDTH, CLASSES))


def trainer(stages=3, target=DELAYED, *, layers=None, **options):
    plan = partition(layers or network(), stages, "uniform", batches(1)[0][0], critic_target=target)
    defaults = {"optimizer": MOMENTUM, "capacity": 2}
    return Trainer(plan, device="cpu", observer=ignore, critic_target=target, **(defaults | options))


def by_hand(stages, optimizer, steps, *, lag=1, current=False, accumulate=1, given=None):
    """One loop in one process: whole-network gradients at weights of several ages, each applied when it is due."""
    plan = partition(network(), stages, "uniform", batches(1)[0][0])
    parts = [plan.stage_module(k).train() for k in range(stages)]
    optimizers = [MADE[optimizer](part.parameters()) for part in parts]
    sent = [{} for _ in parts]  # by packet: input, and weights that saw it
    back = [{} for _ in parts]  # by packet: the gradient for the output
    for number, (inputs, target) in enumerate(given or batches(steps * accumulate)):
        hidden = inputs
        for k, part in enumerate(parts if (target >= 0).any() else []):
            sent[k][number] = (hidden.detach(), copy.deepcopy(part))
            hidden = part(hidden)
        for k in reversed(range(stages)):
            due = number - lag * (stages - 1 - k)
            if due in sent[k]:
                seen, then = sent[k].pop(due)
                then = parts[k] if current else then
                seen.requires_grad_()
                output = then(seen)
                if k == stages - 1:
                    loss = F.cross_entropy(output, target)
                    found = torch.autograd.grad(loss, [*then.parameters(), seen])
                else:
                    found = torch.autograd.grad(output, [*then.parameters(), seen], back[k].pop(due))
                if k:
                    back[k - 1][due] = found[-1]
                for parameter, gradient in zip(parts[k].parameters(), found[:-1], strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if (number + 1) % accumulate == 0 and any(p.grad is not None for p in parts[k].parameters()):
                for parameter in parts[k].parameters():
                    parameter.grad /= min(accumulate, due + 1)  # the first step may have fewer packets
                optimizers[k].step()
                optimizers[k].zero_grad()
    return dict(plan.module.state_dict())


@pytest.mark.parametrize("target", [{}, {"lag": 2}, {"weights": "current"}], ids=["one", "lag 2", "current"])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_against_a_plain_loop(stages, optimizer, target):
    """Bit for bit: gradients of packet n at the weights that saw it, applied at the lag of each stage."""
    trained = trainer(stages, DELAYED | target, optimizer=optimizer)
    trained.fit(batches(9), 9)
    options = {"lag": target.get("lag", 1), "current": "weights" in target}
    assert differences(dict(trained.plan.module.state_dict()), by_hand(stages, optimizer["kind"], 9, **options)) == []


def test_lateness_matters():
    late = [by_hand(3, "SGD", 9, lag=lag)["0.0.weight"] for lag in (1, 2)]
    late += [by_hand(stages, "SGD", 9)["0.0.weight"] for stages in (1, 2)]
    late.append(by_hand(3, "SGD", 9, current=True)["0.0.weight"])
    assert all(not torch.equal(a, b) for i, a in enumerate(late) for b in late[:i])


def test_checkpointed_activations_change_nothing():
    """Law 6: layers recompute inside of the pass that recomputes the stage."""
    trained = [trainer(layers=network(dropout=0.3, norm=True), checkpoint_activations=on) for on in (False, True)]
    for one in trained:
        one.fit(batches(9), 9)
    assert differences(*map(states, trained)) == []


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation(accumulate):
    """A step takes the packets that are due in it, whichever step of the last stage they were in."""
    trained = trainer(3, accumulate=accumulate)
    trained.fit(batches(6 * accumulate), 6)
    expected = by_hand(3, "SGD", 6, accumulate=accumulate)
    for name, tensor in trained.plan.module.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert [stage.updates for stage in trained.stages] == [6, 6, 6]


def test_one_stage_is_plain_training():
    plain = network(norm=True)
    optimizer = MADE["SGD"](plain.parameters())
    for inputs, target in batches(9):
        F.cross_entropy(plain(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = trainer(1, layers=network(norm=True))
    trained.fit(batches(9), 9)
    assert differences(dict(trained.plan.module.state_dict()), dict(plain.state_dict())) == []


class Recorded(nn.Module):
    """Passes on what it is given, and keeps it."""

    def __init__(self, first, again):
        super().__init__()
        # Not lists of the module's own: what a forward pass adds to those is taken back after the second one.
        self.keep = lambda hidden: (again if torch.is_grad_enabled() else first).append(hidden.detach().clone())

    def forward(self, hidden):
        self.keep(hidden)
        return hidden


class Drifting(nn.Module):
    """Gives something else for every packet: by a buffer that is a new tensor each time, and statistics in use."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))
        self.calls = 0

    def forward(self, hidden):
        self.calls += 1
        self.count = self.count + 1
        F.batch_norm(hidden, self.mean, self.variance, training=True)  # changes them, and not their versions
        return hidden * self.count - self.mean / self.variance.sqrt()


def test_the_second_forward_pass_is_the_first_one():
    """It finds the input, weights, masks and statistics of that time; and it counts in no statistics."""
    first, again = [], []
    spectral, drifting = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)), Drifting()
    layers = nn.Sequential(*network(dropout=0.5, norm=True)[:2], spectral, drifting, Recorded(first, again))
    trained = trainer(2, layers=nn.Sequential(layers, nn.Linear(WIDTH, CLASSES)), target=DELAYED | {"lag": 3})
    trained.build()
    del first[:], again[:]  # of the cut
    trained.fit(batches(9), 9)
    assert len(first) == 9 and len(again) == 6
    assert all(torch.equal(one, other) for one, other in zip(first[:6], again, strict=True))
    assert int(trained.plan.module[0][0][1].num_batches_tracked) == drifting.count == drifting.calls == 9


def _train(steps, options, delays):
    trained = trainer(3, layers=network(dropout=0.3, norm=True), **options)

    def slow(method):
        def run(stage, *arguments):
            time.sleep(delays.get(stage.index, 0.0))
            return method(stage, *arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "train", slow(Stage.train))
        report = trained.fit(batches(steps), steps, validate=batches(2), validate_every=4)
    return states(trained), [dict(link) for link in report.links]


def test_ranks_equal_one_process_whatever_the_timing(tmp_path):
    """Laws 2 and 3, and what is counted; the last link's gradients are all back, the first one's all but one packet."""
    together, links = _train(11, {}, {})
    expected = [10 * B * WIDTH * 4, 11 * B * WIDTH * 4]
    assert [link["payload_bytes_backward"] for link in links] == expected
    for name, delays in {"even": {}, "slow last": {2: 0.02}, "slow first": {0: 0.02}}.items():
        found = values(launch(_train, 11, {}, delays, size=3, folder=tmp_path / name))
        assert differences(together, merged(part for part, _ in found)) == [], name
        assert [link["payload_bytes_backward"] for link in found[0][1]] == expected


@pytest.mark.parametrize(
    ("target", "options"),
    [({"lag": 3}, {}), ({"weights": "current"}, {"checkpoint_activations": True}), ({"lag": 2}, {"precision": "bf16"})],
    ids=["lag 3", "current", "bf16"],
)
def test_ranks_equal_one_process_whatever_the_lag(target, options, tmp_path):
    """Also with more packets late than a link holds, several in an optimizer step, and steps that are clipped."""
    options |= {"target": DELAYED | target, "accumulate": 2, "clip_norm": 0.1, "capacity": 1}
    together = _train(5, options, {})
    found = values(launch(_train, 5, options, {1: 0.01}, size=3, folder=tmp_path))
    assert differences(together[0], merged(part for part, _ in found)) == []


def test_a_second_fit_goes_on_where_the_first_ended():
    once, twice = trainer(), trainer()
    once.fit(batches(10), 10)
    twice.fit(batches(10)[:5], 5)
    twice.evaluate(batches(1))
    twice.fit(batches(10)[5:], 5)
    assert differences(states(once), states(twice)) == []


@pytest.mark.parametrize("target", [{}, {"lag": 3}, {"weights": "current"}], ids=["one", "lag 3", "current"])
def test_saved_and_resumed_equals_never_stopped(target, tmp_path):
    """Law 7: packets in flight, the weights they were sent on with, and gradients that have come are saved."""

    def one(folder):
        layers = network(dropout=0.3, norm=True)
        layers[0][0] = nn.utils.spectral_norm(layers[0][0])  # its output depends on its buffers
        return trainer(target=DELAYED | target, checkpoints=folder, accumulate=2, layers=layers)

    whole = one(tmp_path / "a")
    whole.fit(batches(24), 12, save_every=5)
    one(tmp_path / "b").fit(batches(24), 7)
    resumed = one(tmp_path / "b")
    resumed.fit(batches(24), 12, resume=True)
    assert differences(states(whole), states(resumed)) == []


def _resumed(folder, steps):
    trained = trainer(checkpoints=folder, layers=network(dropout=0.3, norm=True))
    trained.fit(batches(12), steps, resume=True)
    return states(trained)


def test_saved_in_one_process_resumed_over_ranks(tmp_path):
    whole = _resumed(tmp_path / "a", 12)
    _resumed(tmp_path / "b", 7)
    found = merged(values(launch(_resumed, tmp_path / "b", 12, size=3, folder=tmp_path / "ranks")))
    assert differences(whole, found) == []


def test_a_checkpoint_of_another_lag_or_cut_goes_on_without_what_was_in_flight(tmp_path):
    trainer(checkpoints=tmp_path).fit(batches(6), 6)
    for stages, target in ((3, {"lag": 2}), (2, {})):
        other = trainer(stages, DELAYED | target, checkpoints=tmp_path)
        other.build(resume=True)
        assert not any(stage.rule.in_flight for stage in other.stages)
        assert other.fit(batches(9), 9, resume=True).steps == 9
        for path in tmp_path.glob("step-00000009"):
            path.rename(tmp_path / f"moved-{stages}")


def gapped(count):
    """Of every third packet nothing counts; of another third, not every sample."""
    kept = [[True] * B, [False] * B, [n % 2 == 0 for n in range(B)]]
    return [(given, target.where(torch.tensor(kept[n % 3]), -100)) for n, (given, target) in enumerate(batches(count))]


def _gapped(steps, accumulate=2):
    trained = trainer(3, accumulate=accumulate, layers=network(norm=accumulate > 1))
    trained.fit(gapped(steps * accumulate), steps)
    return states(trained), dict(trained.plan.module.state_dict())


def test_packets_in_which_nothing_counts(tmp_path):
    """They send no gradient back; those that are due when one passes are learnt from all the same."""
    together, _ = _gapped(7)
    found = merged(part for part, _ in values(launch(_gapped, 7, size=3, folder=tmp_path)))
    assert differences(together, found) == []
    assert differences(_gapped(8, 1)[1], by_hand(3, "SGD", 8, given=gapped(8))) == []


def test_a_frozen_stage_hands_gradients_on():
    trained = trainer(3, optimizer={**MOMENTUM, "lr_per_stage": [1.0, 0.0, 1.0]})
    trained.build()
    before = weights(trained)
    trained.fit(batches(6), 6)
    moved = {key.split(".")[0] for key in differences(weights(trained), before)}
    assert moved == {"0", "2"}


def test_only_the_last_stage_has_an_exit_and_all_keep_activations():
    trained = trainer()
    report = trained.fit(batches(6), 6, validate=batches(2))
    assert [one.val_loss is None for one in report.exits] == [True, True, False]
    assert all(stage.saved_activation_bytes_peak > 0 for stage in trained.stages)


class Fuse(nn.Module):
    """Passes its input on; raises once, at the training packet after it is armed."""

    armed = False

    def forward(self, hidden):
        if self.armed and self.training:
            self.armed = False
            raise ValueError("blown")
        return hidden


def test_a_session_that_failed_leaves_nothing_that_the_next_waits_for():
    fuse = Fuse()
    layers = nn.Sequential(*network()[:2], fuse, nn.Linear(WIDTH, CLASSES))
    trained = trainer(layers=layers, timeout_seconds=5)
    trained.fit(batches(4), 4)
    fuse.armed = True
    with pytest.raises(ValueError, match="blown"):
        trained.fit(batches(4), 4)
    assert trained.fit(batches(6), 5).steps == 9


def test_what_cannot_be_with_it_is_refused():
    with refused("rule-needs-every-packet", UsageError, "global_correction", "delayed"):
        trainer(global_correction={"every": 2})
    with refused("rule-needs-every-packet", UsageError, "`stagger`", "delayed"):
        trainer(stagger=2)
    with refused("rule-without-critics", UsageError, "`critic_warmup`", "delayed"):
        trainer(critic_warmup=2)
    with refused("rule-without-critics", UsageError, "`schedule.kind` plateau", "delayed"):
        trainer(schedule="plateau")
    raw = {"name": "x", "model": {"kind": "mlp"}, "data": {"kind": "digits"}, "training": {"steps": 9}}
    for code, key, value in (
        ("unusable-value", "lag", 0),
        ("not-one-of-the-choices", "weights", "old"),
        ("unknown-setting", "late", 1),
    ):
        with refused(code, UsageError, f"`critic_target.{key}`"):
            check_settings({**raw, "critic_target": {"kind": "delayed", key: value}})


def test_gradients_for_a_sparse_output_are_refused():
    class Sparse(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).to_sparse()

    class Dense(nn.Module):
        def forward(self, hidden):
            return hidden.to_dense()

    layers = nn.Sequential(Sparse(WIDTH, WIDTH), nn.Sequential(Dense(), nn.Linear(WIDTH, CLASSES)))
    with refused("sparse-without-gradient", UsageError, "critic_target"):
        trainer(2, layers=layers).fit(batches(3), 3)


@pytest.mark.parametrize("kind", ["Muon", "NAdam"])
def test_optimizers_that_suit_late_gradients(kind):
    before = weights_of(trainer())
    trained = trainer(optimizer={"kind": kind, "lr": 0.01})
    trained.fit(batches(6), 6)
    assert all(differences({"w": weights(trained)[key]}, {"w": before[key]}) for key in before)


def weights_of(trained):
    trained.build()
    return weights(trained)
