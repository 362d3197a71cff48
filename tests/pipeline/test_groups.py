"""Parameter groups by name, and no weight decay for what is not to decay: equal to torch's own groups made by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.optim import build_optimizers
from decoupled_pp.settings.run import OptimizerSettings
from kit import differences, ignore, refused

TOKENS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
BATCHES = [(TOKENS, TOKENS.roll(1, 1))]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), nn.Linear(8, 11))


def trained(optimizer, stages=1):
    plan = partition(network(), stages, "uniform", TOKENS)
    trainer = Trainer(plan, critic="head", optimizer=optimizer, device="cpu", observer=ignore)
    trainer.fit(BATCHES, 4)
    return trainer


def plain(groups, **arguments):
    """Four steps of torch's AdamW with these groups of the network."""
    theirs = network()
    optimizer = torch.optim.AdamW(groups(theirs), fused=True, **arguments)
    for _ in range(4):
        logits = theirs(BATCHES[0][0])
        cross_entropy(logits.flatten(0, 1), BATCHES[0][1].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return theirs.state_dict()


DECAY = {"kind": "AdamW", "lr": 0.1, "arguments": {"weight_decay": 0.5}}


def test_groups_are_those_of_torch():
    entries = [{"match": "*.bias", "weight_decay": 0.0}, {"match": ["0.*", "1.0.*"], "lr": 0.01, "betas": [0.8, 0.9]}]
    ours = trained({**DECAY, "groups": entries}).plan.module.state_dict()

    def groups(theirs):
        named = dict(theirs.named_parameters())
        return [
            {"params": [named["1.1.weight"], named["2.weight"]]},
            {"params": [named[f"{name}.bias"] for name in ("1.0", "1.1", "2")], "weight_decay": 0.0},
            {"params": [named["0.weight"], named["1.0.weight"]], "lr": 0.01, "betas": [0.8, 0.9]},
        ]

    assert differences(dict(ours), dict(plain(groups, lr=0.1, weight_decay=0.5))) == []


def test_no_decay_is_for_biases_norms_and_embeddings():
    ours = trained({**DECAY, "no_decay": True}).plan.module.state_dict()

    def groups(theirs):
        named = dict(theirs.named_parameters())
        decaying = ["1.1.weight", "2.weight"]
        return [
            {"params": [named[name] for name in decaying]},
            {"params": [p for name, p in named.items() if name not in decaying], "weight_decay": 0.0},
        ]

    assert differences(dict(ours), dict(plain(groups, lr=0.1, weight_decay=0.5))) == []


def test_the_critic_has_names_of_its_own():
    trainer = trained({**DECAY, "groups": [{"match": "critic.*", "lr": 0.3}]}, stages=2)
    first, second = (stage.update.optimizers[0] for stage in trainer.stages)
    assert {id(p) for p in first.param_groups[1]["params"]} == {id(p) for p in trainer.stages[0].critic.parameters()}
    assert [group["lr"] for group in first.param_groups] == [0.1, 0.3]
    assert second.param_groups[1]["params"] == []


def test_rates_of_stages_are_factors_of_the_rates_of_groups_too():
    settings = OptimizerSettings(lr=0.1, lr_per_stage=[1, 0.5], groups=[{"match": "*.bias", "lr": 0.01}])
    (optimizer,) = build_optimizers(settings.of_stage(1), network(), None, owns_head=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]


def test_muon_and_its_adamw_take_both():
    settings = OptimizerSettings(kind="Muon", groups=[{"match": ["1.1.*", "2.*"], "weight_decay": 0.3}], no_decay=True)
    muon, adamw = build_optimizers(settings, network(), None, owns_head=True)
    assert [group["weight_decay"] for group in muon.param_groups if group["params"]] == [0.3]
    decays = {group["weight_decay"] for group in adamw.param_groups if group["params"]}
    assert decays == {0.3, 0.0}


def factory(groups, lr):
    return torch.optim.SGD(groups, lr=lr)


def test_a_factory_by_name_is_given_the_groups():
    settings = OptimizerSettings(kind=f"{__name__}:factory", lr=0.1, groups=[{"match": "*.bias", "lr": 0.2}])
    (optimizer,) = build_optimizers(settings, network(), None, owns_head=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_pattern_that_matches_nothing_is_refused(stages):
    with refused("parameter-group-matches-nothing", UsageError, "'*.biass'", "did you mean"):
        trained({**DECAY, "groups": [{"match": "*.biass"}]}, stages)


@pytest.mark.parametrize(
    "choice",
    [
        {"kind": "SGD", "groups": [{"match": "*", "betas": [0.1, 0.2]}]},
        {"kind": "AdamW", "groups": [{"match": "*", "wieght_decay": 0}]},
        {"kind": "Rprop", "no_decay": True},
    ],
)
def test_arguments_that_the_class_does_not_take(choice):
    with refused("optimizer-refuses-arguments") as caught:
        build_optimizers(OptimizerSettings(**choice), network(), None, owns_head=True)
    assert caught.value.key.startswith("optimizer.groups.0.") or caught.value.key == "optimizer.no_decay"


def sparse_network(sparse):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8, sparse=sparse), nn.Linear(8, 11))


@pytest.mark.parametrize(
    "optimizer",
    [
        "AdamW",
        {"kind": "SGD", "lr": 0.5},
        {"kind": "SGD", "lr": 0.5, "arguments": {"momentum": 0.9, "weight_decay": 0.1, "fused": False}},
        {"kind": "Adagrad", "lr": 0.5},
    ],
)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"accumulate": 2}, {"critic_target": "cascade"}])
def test_sparse_gradients_train_as_dense_ones(optimizer, options, tmp_path):
    if optimizer == "AdamW":
        options = {**options, "checkpoints": tmp_path}
    found = []
    for sparse in (False, True):
        plan = partition(sparse_network(sparse), 2, "uniform", TOKENS)
        folder = {"checkpoints": tmp_path / str(sparse)} if "checkpoints" in options else {}
        trainer = Trainer(
            plan, critic="head", optimizer=optimizer, device="cpu", observer=ignore, **{**options, **folder}
        )
        trainer.fit(BATCHES, 3)
        found.append(copy.deepcopy(dict(plan.module.state_dict())))
    assert differences(*found) == []
