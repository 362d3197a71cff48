"""What makes splitting hard beside the ways in: results that are no tensors, losses of a model's own, dtypes, flags."""

from dataclasses import dataclass

import pytest
import torch
from families import inputs_of, model_of
from torch import Tensor, nn

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.huggingface import split_transformers
from kit import ignore, refused

X = torch.randn(4, 4)


def tokens(family):
    return {"input_ids": inputs_of(family, padding=False)["input_ids"]}


@dataclass
class Result:
    """As a model's own code may return it."""

    hidden: Tensor
    norm: Tensor


class Block(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(8, 8), form

    def forward(self, hidden):
        hidden = torch.relu(self.linear(hidden))
        return {"hidden": hidden, "norm": hidden.norm()} if self.form == "dict" else Result(hidden, hidden.norm())


class Model(nn.Module):
    """Blocks that return a dictionary or a dataclass, in a model that does so too, or returns its loss."""

    def __init__(self, form, result="form"):
        super().__init__()
        self.enter, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(form) for _ in range(3))
        self.form, self.result = form, result

    def forward(self, x):
        hidden = self.enter(x)
        for block in self.blocks:
            made = block(hidden)
            hidden = made["hidden"] if self.form == "dict" else made.hidden
        logits = self.head(hidden)
        if self.result == "loss":
            return logits.square().mean()
        return {"logits": logits} if self.form == "dict" else Result(logits, logits.norm())


PICK = {"dict": lambda result: result["logits"], "dataclass": lambda result: result.hidden}


@pytest.mark.parametrize("form", PICK)
def test_dictionaries_and_dataclasses(form):
    torch.manual_seed(0)
    whole, parts = Model(form), Model(form)
    parts.load_state_dict(whole.state_dict())
    layers = dpp.split_blocks(parts, {"x": X}, output=PICK[form]).layers
    for model, run in ((whole, lambda: PICK[form](whole(X))), (parts, lambda: layers(X))):
        run().square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(PICK[form](whole(X)), layers(X))


@pytest.mark.parametrize(
    ("result", "pick", "part"), [("loss", lambda result: result, "a scalar"), ("form", lambda result: result, "Result")]
)
def test_what_is_no_output_is_refused(result, pick, part):
    with refused("output-not-a-tensor", UsageError, part):
        dpp.split_blocks(Model("dataclass", result), {"x": X}, output=pick)
    with refused("output-not-a-tensor", UsageError, part):
        dpp.split_traced(Model("dataclass", result), X, ["blocks.0"], output=pick)


def test_the_models_own_loss_is_refused_by_its_labels():
    ids = tokens("Llama")["input_ids"]
    with refused("bad-sample", UsageError, "leave labels out"):
        split_transformers(model_of("Llama"), {"input_ids": ids, "labels": ids})


def test_half_precision_weights_travel_as_they_are():
    inputs = tokens("Llama")
    model = model_of("Llama").to(torch.bfloat16)
    layers = split_transformers(model, inputs).layers.eval()
    hidden = layers[0](inputs["input_ids"])
    assert hidden[0].dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(layers(inputs["input_ids"]), model.eval()(**inputs).logits)
    plan = dpp.partition(layers, 3, "uniform", inputs["input_ids"])
    trainer = dpp.Trainer(plan, critic="head", optimizer="SGD", observer=ignore, device="cpu")
    trainer.fit([(inputs["input_ids"], inputs["input_ids"])], 2)
    assert {critic.dtype for critic in trainer.stages[0].critic.parameters()} == {torch.bfloat16}


def test_a_models_own_checkpointing_changes_nothing_but_memory():
    inputs = tokens("Llama")
    ids, states = inputs["input_ids"], []
    for checkpointed in (False, True):
        model = model_of("Llama")
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        plan = dpp.partition(split_transformers(model, inputs).layers, 2, "uniform", ids)
        trainer = dpp.Trainer(plan, critic="head", observer=ignore, device="cpu")
        trainer.fit([(ids, ids)], 3)
        states.append((trainer.export().state_dict(), trainer.stages[0].saved_activation_bytes_peak))
    (plain, kept), (recomputed, fewer) = states
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert fewer < kept


def test_checkpointing_that_loses_gradients_is_refused():
    model = model_of("Llama")
    model.activation_checkpointing_enable({"use_reentrant": True})
    with refused("reentrant-checkpointing"):
        split_transformers(model, tokens("Llama"))


def test_a_mixture_of_experts_goes_without_its_balancing_loss():
    """Its router's logits would have to come from all blocks; asked for in the config, they are left out."""
    inputs = tokens("Mixtral, mixture of experts")
    model = model_of("Mixtral, mixture of experts")
    model.config.output_router_logits = True
    layers = split_transformers(model, inputs).layers.eval()
    with torch.no_grad():
        assert torch.equal(layers(inputs["input_ids"]), model.eval()(**inputs, output_router_logits=False).logits)
