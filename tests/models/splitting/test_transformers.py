"""Models of `transformers`, split without an adapter: the same output and gradients as in one piece."""

import pytest
import torch
from families import FAMILIES, FURTHER, TABLE, inputs_of, model_of, table
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError
from decoupled_pp.critics.fresh import fresh_copy
from decoupled_pp.models.huggingface import split_transformers
from decoupled_pp.models.splitting.call import network_output
from kit import ignore, refused

transformers = pytest.importorskip("transformers")


CASES = [pytest.param(name, marks=pytest.mark.slow) if name in FURTHER else name for name in FAMILIES]


def output_of(model, inputs):
    return network_output(model(**inputs))


def as_payload(inputs):
    return tuple(inputs.values()) if len(inputs) > 1 else next(iter(inputs.values()))


def without_dropout(model):
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


@pytest.mark.parametrize("family", CASES)
def test_a_family_passes(family):
    model, inputs = model_of(family), inputs_of(family)
    names = set(model.state_dict())
    found = split_transformers(model, inputs_of(family, padding=False))
    assert set(found.names.values()) == names
    others = [inputs_of(family, 1, 7, padding=False), inputs_of(family, 3, 5)]
    with torch.no_grad():
        for given in (inputs, *others):
            assert torch.equal(found.layers.eval()(as_payload(given)), output_of(model, given))


@pytest.mark.parametrize("family", CASES)
def test_a_family_learns_as_in_one_piece(family):
    """One step of SGD on the layers, all in one stage, against one on the model. Tied weights are two in both."""
    whole, inputs = model_of(family), inputs_of(family)
    parts = model_of(family)
    layers = split_transformers(parts, inputs).layers
    split_transformers(whole, inputs)  # unties
    results = []
    for model, run in ((whole, lambda: output_of(whole, inputs)), (parts, lambda: layers(as_payload(inputs)))):
        model.train()
        layers.train()
        without_dropout(model)
        without_dropout(layers)
        torch.manual_seed(1)
        run().square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with refused("encoder-decoder-model", UsageError, "T5ForConditionalGeneration"):
        split_transformers(transformers.T5ForConditionalGeneration(config), {"input_ids": torch.ones(1, 3).long()})


def test_the_table_of_families_is_up_to_date():
    assert TABLE.read_text(encoding="utf-8") == table()


def test_critics_make_fresh_copies_of_blocks_by_the_librarys_own_rule():
    """AugLocal copies blocks: new weights from the generator, the model's own left as they are."""
    inputs = {"input_ids": inputs_of("Llama", padding=False)["input_ids"]}
    ids = inputs["input_ids"]
    model = model_of("Llama")
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
        parameter._is_hf_initialized = True  # as from_pretrained leaves them
    block = split_transformers(model, inputs).layers.get_submodule("block0")
    copies = []
    for _ in range(2):
        torch.manual_seed(0)
        copies.append(fresh_copy(block, "block0"))
    assert copies[0].initialiser is block.initialiser  # the model itself is not copied along
    for first, second, own in zip(*(one.parameters() for one in (*copies, block)), strict=True):
        assert torch.equal(first, second) and bool((own == 7.0).all()) and not bool((first == 7.0).any())
    plan = dpp.partition(split_transformers(model_of("Llama"), inputs).layers, 2, "uniform", ids)
    dpp.Trainer(plan, critic={"kind": "auglocal", "depth": 2}, observer=ignore).fit([(ids, ids)], 2)


def test_the_models_own_head_judges_any_stage():
    """`weights: network`: a copy of what comes after the blocks, behind a stage whose payload has sides as well."""
    model, inputs = model_of("BERT, classifier"), inputs_of("BERT, classifier", padding=False)
    layers = split_transformers(model, inputs).layers
    given, target = as_payload(inputs), torch.tensor([0, 1])
    plan = dpp.partition(layers, 3, "uniform", given)
    trainer = dpp.Trainer(plan, critic={"kind": "head", "weights": "network"}, device="cpu", observer=ignore)
    trainer.build()
    for stage in trainer.stages[:-1]:
        assert type(stage.critic) is type(layers[-1]) and stage.critic is not layers[-1]
    trainer.fit([(given, target)], 2)


class Wrapper(nn.Module):
    """Names some arguments and hands the others on, or not, as libraries of adapters do."""

    def __init__(self, base, hands_on):
        super().__init__()
        self.base, self.config, self.hands_on = base, base.config, hands_on

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.base(input_ids=input_ids, attention_mask=attention_mask, **(kwargs if self.hands_on else {}))


@pytest.mark.parametrize("hands_on", [True, False])
def test_a_wrapper_around_a_model_is_split(hands_on):
    """Its caches are off in the layers, and as before in the model."""
    whole, inputs = Wrapper(model_of("GPT-2"), hands_on), inputs_of("GPT-2")
    assert whole.config.use_cache
    for found in (split_transformers(whole, inputs), dpp.split(whole, inputs)):
        assert found.way in {"blocks", "transformers"} and whole.config.use_cache
        assert set(found.names.values()) == set(whole.state_dict())
        with torch.no_grad():
            assert torch.equal(found.layers.eval()(as_payload(inputs)), whole.eval()(**inputs).logits)


def test_what_is_no_model_of_transformers_is_refused():
    with refused("not-a-transformers-model"):
        split_transformers(nn.Linear(2, 2), {"input": torch.ones(2, 2)})
