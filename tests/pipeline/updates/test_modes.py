"""Optimizers with train() and eval(), which keep weights to train with and others to evaluate (schedule-free ones)."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from decoupled_pp import Trainer, partition
from decoupled_pp.run.checkpoints.opened import latest_checkpoint, open_checkpoint
from decoupled_pp.run.checkpoints.resume import load_model
from decoupled_pp.run.checkpoints.weights import export_safetensors
from kit import differences, ignore, states, tanh_network, vector_batches

BATCHES = vector_batches(4, 4, 6, 3)
HELD = {"validate": BATCHES[:2], "validate_every": 2}


class ScheduleFree(torch.optim.Optimizer):
    """SGD without a schedule (Defazio et al. 2024) as in the package `schedulefree`: it steps in train mode only."""

    def __init__(self, parameters, lr=0.2, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _switch(self, mode, weight):
        for group in self.param_groups:
            if group["train_mode"] is not mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["train_mode"] = mode

    def train(self):
        self._switch(True, lambda beta: 1 - beta)

    def eval(self):
        self._switch(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "Optimizer was not in train mode when step is called"
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


def trainer(stages=2, **options):
    plan = partition(tanh_network(3, 6, 3), stages, "uniform", BATCHES[0][0])
    given = {"critic": "head", "optimizer": ScheduleFree, "device": "cpu", "observer": ignore}
    return Trainer(plan, **(given | options))


def test_one_stage_is_plain_pytorch():
    ours, theirs = trainer(1), tanh_network(3, 6, 3)
    plain = ScheduleFree(theirs.parameters())
    plain.train()
    for number in range(6):
        inputs, target = BATCHES[number % len(BATCHES)]
        cross_entropy(theirs(inputs), target).backward()
        plain.step()
        plain.zero_grad()
    plain.eval()
    ours.fit(BATCHES, 6, **HELD)
    assert differences(dict(ours.export().state_dict()), dict(theirs.state_dict())) == []


def test_scores_are_those_of_the_weights_to_evaluate():
    """At the end, and during training."""
    records = []
    for steps in (4, 6):
        ours = trainer(observer=records.extend)
        ours.fit(BATCHES, steps, **HELD)
        expected = [exit.val_loss for exit in ours.evaluate(HELD["validate"])]
        found = {r["step"]: r["loss"] for r in records if r["kind"] == "validation" and r["stage"] == 1}
        assert found[steps] == expected[-1]
        with torch.no_grad():
            network = ours.export().eval()
            whole = sum(cross_entropy(network(x), y).item() for x, y in HELD["validate"]) / 2
        assert expected[-1] == pytest.approx(whole)
    assert found[4] == next(r["loss"] for r in records if r["kind"] == "validation" and r["step"] == 4 and r["stage"])


def test_evaluations_and_checkpoints_in_between_change_nothing(tmp_path):
    watched, alone = trainer(checkpoints=tmp_path), trainer()
    watched.fit(BATCHES, 7, save_every=3, **HELD)
    alone.fit(BATCHES, 7)
    assert differences(states(watched), states(alone)) == []


def test_scoring_a_trained_network_changes_nothing():
    ours = trainer()
    ours.fit(BATCHES, 5)
    before = states(ours)
    ours.evaluate(BATCHES[:2])
    assert differences(states(ours), before) == []


def test_save_stop_resume_equals_never_stopped(tmp_path):
    whole, stopped, resumed = (trainer(checkpoints=folder) for folder in (None, tmp_path, tmp_path))
    whole.fit(BATCHES, 9)
    stopped.fit(BATCHES, 4, **HELD)
    resumed.fit(BATCHES, 9, resume=latest_checkpoint(tmp_path))
    assert differences(states(resumed), states(whole)) == []


def test_a_checkpoint_has_the_weights_to_evaluate_as_those_of_the_model(tmp_path):
    ours = trainer(checkpoints=tmp_path / "checkpoints")
    ours.fit(BATCHES, 5)
    network = tanh_network(3, 6, 3)
    load_model(latest_checkpoint(tmp_path / "checkpoints"), network)
    assert differences(dict(network.state_dict()), dict(ours.export().state_dict())) == []
    export_safetensors(ours.export(), tmp_path / "model.safetensors")
    assert differences(load_file(tmp_path / "model.safetensors"), dict(network.state_dict())) == []
    again = trainer()
    assert again.evaluate(BATCHES[:2], resume=latest_checkpoint(tmp_path / "checkpoints")) == ours.evaluate(BATCHES[:2])


def test_other_optimizers_save_one_set_of_weights(tmp_path):
    ours = trainer(optimizer="SGD", checkpoints=tmp_path)
    ours.fit(BATCHES, 2)
    places = open_checkpoint(next(tmp_path.glob("step-*"))).places
    assert not any(name.startswith("train.") for name in places)
