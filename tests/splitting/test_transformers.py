"""Models of `transformers`, split without an adapter: the same output and gradients as in one piece."""

import pytest
import torch
from tests.splitting.families import FAMILIES, TABLE, inputs_of, model_of, table
from torch import nn

from decoupled_pp.contracts import UsageError
from decoupled_pp.models.huggingface import split_transformers

transformers = pytest.importorskip("transformers")


def output_of(model, inputs):
    result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


def as_payload(inputs):
    return tuple(inputs.values()) if len(inputs) > 1 else next(iter(inputs.values()))


def without_dropout(model):
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_passes(family):
    model, inputs = model_of(family), inputs_of(family)
    names = set(model.state_dict())
    found = split_transformers(model, inputs_of(family, padding=False))
    assert set(found.names.values()) == names
    others = [inputs_of(family, 1, 7, padding=False), inputs_of(family, 3, 5)]
    with torch.no_grad():
        for given in (inputs, *others):
            assert torch.equal(found.layers.eval()(as_payload(given)), output_of(model, given))


@pytest.mark.parametrize("family", FAMILIES)
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
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is an encoder-decoder"):
        split_transformers(transformers.T5ForConditionalGeneration(config), {"input_ids": torch.ones(1, 3).long()})


def test_the_table_of_families_is_up_to_date():
    assert TABLE.read_text(encoding="utf-8") == table()
