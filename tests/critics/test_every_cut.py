"""Every critic on every network at every cut: shapes, trainability, determinism, causality."""

import pytest
import torch

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.models import build_model
from decoupled_pp.settings.critics import AuglocalCritic, HeadCritic, MlpSrCritic
from decoupled_pp.settings.sections import GptModel, MlpModel, ResnetModel, VggModel
from kit import refused

NETWORKS = {
    "resnet": (ResnetModel(kind="resnet", depth=14, width=4), DataInfo("image", (3, 16, 16), 10)),
    "vgg": (VggModel(kind="vgg", width=4), DataInfo("image", (3, 16, 16), 10)),
    "mlp": (MlpModel(kind="mlp", width=12, depth=4), DataInfo("vector", (20,), 10)),
    "gpt": (GptModel(kind="gpt", width=16, depth=4, heads=2), DataInfo("tokens", (8,), 11)),
}
CRITICS = {
    "head": HeadCritic(),
    "mlp_sr": MlpSrCritic(kind="mlp_sr"),
    **{f"auglocal{depth}": AuglocalCritic(kind="auglocal", depth=depth) for depth in (1, 2, 3, 20)},
}
PAIRS = [(n, c) for n in NETWORKS for c in CRITICS if (n, c) != ("gpt", "mlp_sr")]


def network_and_sample(name):
    torch.manual_seed(0)
    settings, info = NETWORKS[name]
    network = build_model(settings, info)
    shape = (3, *info.shape)
    return network, torch.randint(info.outputs, shape) if info.form == "tokens" else torch.randn(shape)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_cut(name, kind, context_of):
    network, sample = network_and_sample(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    own = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    build = build_critic(CRITICS[kind])
    for boundary in range(1, len(network)):
        context = context_of(network, sample, boundary)
        torch.manual_seed(1)
        critic = build(context)
        check_critic(critic, context)
        assert all(not count for key, count in critic.state_dict().items() if key.endswith("num_batches_tracked"))
        assert all(part.training for part in critic.modules())
        assert not own & {id(tensor) for tensor in (*critic.parameters(), *critic.buffers())}
        hidden = context.hidden.clone().requires_grad_()
        critic(hidden).square().mean().backward()
        assert hidden.grad is not None
        assert all(parameter.grad is not None for parameter in critic.parameters())
        torch.manual_seed(1)
        again = build(context).state_dict()
        assert list(again) == list(critic.state_dict())
        for key, parameter in critic.named_parameters():
            assert torch.equal(again[key], parameter)
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("kind", [kind for kind in CRITICS if kind != "mlp_sr"])
def test_token_critics_are_causal(kind, context_of):
    network, sample = network_and_sample("gpt")
    for boundary in range(1, len(network)):
        context = context_of(network, sample, boundary)
        critic = build_critic(CRITICS[kind])(context).eval()
        changed = context.hidden.clone()
        changed[:, 5] += torch.randn(changed.shape[-1])
        before, after = critic(context.hidden), critic(changed)
        assert torch.equal(before[:, :5], after[:, :5])
        assert (before[:, 5] != after[:, 5]).any()


def test_mlp_sr_refuses_tokens(context_of):
    network, sample = network_and_sample("gpt")
    with refused("critic-unfit", UsageError, "critic mlp_sr"):
        build_critic(CRITICS["mlp_sr"])(context_of(network, sample, 2))
