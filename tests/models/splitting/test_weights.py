"""Models on the meta device: split by shapes, every stage filled from disk by itself."""

import pytest
import torch
from families import inputs_of, model_of

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError
from kit import refused

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 64, (2, 8))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def llama(**changes):
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZES, **changes)
    return transformers.LlamaForCausalLM(config)


def on_meta(**changes):
    with torch.device("meta"):
        return llama(**changes)


def train(found, steps=3):
    plan = dpp.partition(found.layers, 3, "uniform", IDS)
    trainer = dpp.Trainer(plan, critic="head", device="cpu")
    trainer.fit([(IDS, IDS.roll(-1, 1))], steps=steps)
    return trainer.export().state_dict()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["one", "many"])
def test_stages_filled_from_disk_train_like_the_loaded_model(tmp_path, tied, shards):
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "many" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "many")
    loaded = train(dpp.split_transformers(model, {"input_ids": IDS}))
    filled = train(dpp.split_transformers(on_meta(tie_word_embeddings=tied), {"input_ids": IDS}, tmp_path))
    assert loaded.keys() == filled.keys()
    assert all(torch.equal(loaded[name], filled[name]) for name in loaded)


def test_a_stage_alone_is_filled(tmp_path):
    """The others stay empty, so a rank needs room for its own stage only."""
    llama().save_pretrained(tmp_path)
    found = dpp.split_transformers(on_meta(), {"input_ids": IDS}, tmp_path)
    plan = dpp.partition(found.layers, 3, "uniform", IDS, critic=None)
    found.layers.weights.fill(plan.stage_module(1), torch.device("cpu"))
    places = [{parameter.device.type for parameter in plan.stage_module(stage).parameters()} for stage in range(3)]
    assert places == [{"meta"}, {"cpu"}, {"meta"}]


def test_fresh_weights_are_those_of_the_library():
    """Standard deviation 0.02, norms of one, rotary frequencies that are not saved."""
    found = dpp.split_transformers(on_meta(), {"input_ids": IDS})
    whole = llama()
    trainer = dpp.Trainer(dpp.partition(found.layers, 3, "uniform", IDS), critic="head", device="cpu")
    trainer.build()
    state = {found.names[key]: tensor for key, tensor in trainer.export().state_dict().items()}
    assert state.keys() == whole.state_dict().keys()
    assert state["model.layers.1.mlp.up_proj.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(state["model.norm.weight"], torch.ones(32))
    whole.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(found.layers.eval()(IDS), whole.eval()(IDS).logits)


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "T5 encoder", "Mamba", "BERT", "ViT", "ModernBERT"])
def test_fresh_weights_have_the_spread_of_the_library(family):
    """Also where a rule is for a whole block (GPT-2's scaled projections) or for parameters of its own (Mamba)."""
    whole, inputs = model_of(family), inputs_of(family, padding=False)
    with torch.device("meta"):
        empty = model_of(family)
    found = dpp.split_transformers(empty, inputs)
    torch.manual_seed(1)
    found.layers.weights.fill(found.layers, torch.device("cpu"))
    state, expected = found.layers.state_dict(), whole.state_dict()
    for key, name in found.names.items():
        if expected[name].is_floating_point() and expected[name].numel() > 200:
            assert state[key].std() == pytest.approx(expected[name].std().item(), rel=0.35, abs=1e-3), name


def test_missing_tensors_are_named(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with refused("weight-missing", UsageError, "model.embed_tokens.weight"):
        dpp.split_transformers(on_meta(), {"input_ids": IDS}, tmp_path)
    with refused("weights-unreadable"):
        dpp.split_transformers(on_meta(), {"input_ids": IDS}, tmp_path / "nothing")


def test_a_network_on_the_meta_device_needs_weights():
    with torch.device("meta"):
        layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)]
    plan = dpp.partition(layers, 2, "uniform", torch.randn(2, 4))
    with pytest.raises(UsageError, match=r"on the meta device, and `Layers\.weights` does not say"):
        dpp.Trainer(plan, device="cpu").build()
