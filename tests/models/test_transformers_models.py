"""`model.kind: huggingface`: trained like any other network, exported to a folder that its own library loads."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from families import inputs_of, model_of
from safetensors.torch import load_file

import decoupled_pp as dpp
from decoupled_pp.commands.evaluate.finished_run import open_run
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data import open_data
from decoupled_pp.models import build_model
from decoupled_pp.settings.sections import HuggingFaceModel
from kit import dpp as command
from kit import dpp_in_rank, refused
from ranks import launch, values

transformers = pytest.importorskip("transformers")

TEXT = DataInfo("tokens", (16,), 256)
IMAGES = DataInfo("image", (1, 16, 16), 10)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
RUN = """
name: tiny
stages: 2
cut: [2, 2]
threads: 1
model:
  kind: huggingface
  type: gpt2
  config: {n_embd: 32, n_layer: 2, n_head: 2, n_positions: 32, bos_token_id: 0, eos_token_id: 0}
data: {kind: python_source, batch_size: 2, context: 16}
training: {steps: 3}
validation: {batches: 1}
logging: {tensorboard: false}
"""


def model(**settings):
    return HuggingFaceModel(kind="huggingface", **settings)


def test_fresh_models_fit_the_data():
    """Vocabulary, classes and image size come from the data, the head from their form."""
    layers = build_model(model(type="llama", config=SIZES), TEXT).eval()
    assert layers(torch.zeros(3, 9, dtype=torch.int64)).shape == (3, 9, 256)
    layers = build_model(model(type="vit", config=SIZES | {"patch_size": 8}), IMAGES).eval()
    assert layers(torch.zeros(3, 1, 16, 16)).shape == (3, 10)


def test_pretrained_weights_are_loaded(tmp_path):
    whole = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=256, **GPT2)).eval()
    whole.save_pretrained(tmp_path)
    tokens = torch.randint(0, 256, (2, 16))
    layers = build_model(model(path=str(tmp_path)), TEXT).eval()
    assert torch.equal(layers(tokens), whole(tokens).logits)
    fresh = build_model(model(path=str(tmp_path), pretrained=False), TEXT).eval()
    assert not torch.equal(fresh(tokens), whole(tokens).logits)


def test_tied_weights_are_exported_tied_by_choice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RUN)
    refreshed = ["--set", "checkpoint.every=1", "--set", "checkpoint.refresh_tied=true"]
    assert command("train", "tiny.yaml", *refreshed) == 0
    for name, more in (("apart", ()), ("tied", ("--tied",))):
        assert command("export", "runs/tiny", "-o", name, *more) == 0
    apart, tied = (transformers.AutoModelForCausalLM.from_pretrained(name) for name in ("apart", "tied"))
    assert apart.lm_head.weight is not apart.transformer.wte.weight
    assert not torch.equal(apart.lm_head.weight, apart.transformer.wte.weight)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert torch.equal(tied.lm_head.weight, apart.lm_head.weight)
    assert command("export", "runs/tiny", "-o", "plain.safetensors", "--tied") == 2
    untied = ["--set", "model.config.tie_word_embeddings=false", "--overwrite"]
    assert command("train", "tiny.yaml", *untied) == 0
    assert command("export", "runs/tiny", "-o", "never", "--tied") == 2
    assert "splitting a GPT2LMHeadModel unties no weights" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_network_that_no_rank_has_whole_is_the_network(tmp_path, monkeypatch, tied):
    """On the meta device, two ranks from shards on disk, against one process with the whole pretrained model."""
    monkeypatch.chdir(tmp_path)
    whole = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=256, **GPT2))
    whole.save_pretrained("pretrained", max_shard_size="20KB")
    (tmp_path / "tiny.yaml").write_text(RUN.replace("type: gpt2", "path: pretrained"))
    more = ["--tied"] if tied else []
    assert command("train", "tiny.yaml", "--set", "training.steps=4", "--set", "name=whole") == 0
    assert command("export", "runs/whole", "-o", "whole", *more) == 0
    by_stage = ["train", "tiny.yaml", "--set", "model.meta=true"]
    for steps, *how in ((2,), (4, "--resume")):
        arguments = [*by_stage, "--set", f"training.steps={steps}", *how]
        results = launch(dpp_in_rank, str(tmp_path), *arguments, size=2, folder=tmp_path / "logs")
        assert values(results) == [0, 0], results
    assert command("export", "runs/tiny", "-o", "shards", *more) == 0
    assert not (tmp_path / "runs/tiny/model.safetensors").exists()
    assert len(list(Path("shards").glob("*.safetensors"))) == 2
    one, other = (transformers.GPT2LMHeadModel.from_pretrained(name) for name in ("whole", "shards"))
    assert one.config.tie_word_embeddings == other.config.tie_word_embeddings == tied
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert command("export", "runs/tiny", "-o", "file.safetensors") == 0
    assert torch.equal(load_file("file.safetensors")["lm_head.weight"], ours["lm_head.weight"])


@pytest.mark.parametrize("given", [{"start_from": "x.safetensors"}, {"strategy": "1f1b"}, {"sample": {"prompt": "a"}}])
def test_what_needs_the_whole_network_is_refused(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RUN)
    ((key, value),) = given.items()
    assert command("train", "tiny.yaml", "--set", "model.meta=true", "--set", f"{key}={json.dumps(value)}") == 2
    assert f"`{key}` needs the whole network in one process" in capsys.readouterr().err


def test_a_run_is_exported_for_its_own_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RUN)
    assert command("train", "tiny.yaml") == 0
    assert command("export", "runs/tiny", "-o", "exported") == 0
    again = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    settings, _ = open_run(tmp_path / "runs" / "tiny")
    layers = build_model(settings.model, TEXT).eval()
    from decoupled_pp.run.folder import load_weights

    load_weights(tmp_path / "runs" / "tiny", layers)
    tokens = torch.randint(0, 256, (2, 16))
    assert torch.equal(again(tokens).logits, layers(tokens))
    assert again.generate(tokens[:1], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 18)


@pytest.mark.parametrize(
    ("settings", "info", "code"),
    [
        ({"config": SIZES | {"vocab_size": 100}}, TEXT, "vocabulary-too-small"),
        ({"config": SIZES}, DataInfo("vector", (4,), 2), "model-head-unknown"),
        ({"config": SIZES, "head": "causal_lm"}, DataInfo("vector", (4,), 2), "model-data-mismatch"),
    ],
)
def test_what_does_not_fit_is_named(settings, info, code):
    with refused(code):
        build_model(model(type="llama", **settings), info)


@pytest.mark.parametrize(("key", "value"), [("path", "./tests/models"), ("type", "no-such-family")])
def test_a_model_that_is_not_there_is_named(key, value):
    with pytest.raises(UsageError, match=f"`model.{key}` '{value}'") as caught:  # the rest is the library's own text
        build_model(model(**{key: value}), TEXT)
    assert (caught.value.code, caught.value.key) == ("model-not-loadable", f"model.{key}")


def test_one_origin_is_needed():
    for given in ({}, {"path": "a", "type": "b"}):
        with pytest.raises(ValueError, match=r"give either `model.path` or `model.type`"):
            model(**given)


ENCODER = """
name: encoder
stages: 2
cut: [2, 2]
threads: 1
model:
  kind: huggingface
  type: bert
  config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2, pad_token_id: 0}
data: {kind: huggingface, path: json, data_files: {train: rows.jsonl}, text_column: said, batch_size: 4, context: 12,
       tokenizer: tokenizer}
training: {steps: 3}
validation: {batches: 2}
logging: {tensorboard: false}
"""


@pytest.fixture
def encoder_run(tmp_path, monkeypatch):
    """A folder with rows of text, the tokenizer of a masked language model, and a run on both."""
    datasets, tokenizers = pytest.importorskip("datasets"), pytest.importorskip("tokenizers")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    words = [f"w{n}" for n in range(20)]
    rows = [{"said": " ".join(words[(n + k) % 20] for k in range(2 + n % 9)), "kind": n % 3} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate([*special, *words])}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run.yaml").write_text(ENCODER)
    return tmp_path


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_masked_language_model_is_trained_and_exported(encoder_run, meta, tied):
    """BERT's decoder has a bias under two names, which a config without ties would part."""
    changed = ["--set", "data.target=masked_tokens", "--set", f"model.meta={str(meta).lower()}"]
    assert command("train", "run.yaml", *changed, "--set", "optimizer.lr=0.1") == 0
    assert command("export", "runs/encoder", "-o", "exported", *(["--tied"] if tied else [])) == 0
    loaded = transformers.AutoModelForMaskedLM.from_pretrained("exported").eval()
    trained = load_file("runs/encoder/model.safetensors")
    for name in ("decoder.weight", "decoder.bias", "bias"):
        ours = loaded.cls.predictions.get_parameter(name)
        assert torch.equal(ours, trained[f"cls.predictions.{name}"]) and bool(ours.any())
    table = loaded.bert.embeddings.word_embeddings.weight
    assert torch.equal(table, loaded.cls.predictions.decoder.weight) == tied


def test_the_datas_tokenizer_is_exported_with_a_fresh_model(encoder_run):
    """Without it, the library would make up one of five tokens."""
    assert command("train", "run.yaml", "--set", "data.label_column=kind") == 0
    for name, tokenizer in (("folder", "tokenizer"), ("file", "tokenizer/tokenizer.json")):
        changed = ["--set", "data.label_column=kind", "--set", f"data.tokenizer={tokenizer}", "--overwrite"]
        assert command("train", "run.yaml", *changed) == 0
        assert command("export", "runs/encoder", "-o", name) == 0
        loaded = transformers.AutoTokenizer.from_pretrained(name)
        assert loaded("w1 w7")["input_ids"] == [6, 12]


def test_natural_mistakes_are_named():
    with refused("unknown-model-config", UsageError, "'hidden_sizee'", "did you mean 'hidden_size'"):
        build_model(model(type="llama", config=SIZES | {"hidden_sizee": 3}), TEXT)
    whole, ids = model_of("Llama"), torch.zeros(2, 8, dtype=torch.int64)
    with refused("bad-sample"):
        dpp.split_transformers(whole, ids)
    found = dpp.split_transformers(whole, {"input_ids": ids})
    with refused("split-for-other-inputs", UsageError, "2 tensors"):
        found.layers((ids, ids))
    with refused("not-a-layer-list", UsageError, "pass the .layers"):
        dpp.partition(found, 2, "uniform", ids)


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DeBERTa v2, classifier", "T5 encoder", "GPT-2", "Gemma"])
def test_a_split_model_is_saved_for_its_own_library(tmp_path, family):
    split, inputs = model_of(family), inputs_of(family)
    found = dpp.split_transformers(split, inputs)
    with torch.no_grad():
        for parameter in found.layers.parameters():  # as if trained: weights that were one are two now
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = found.layers.eval()(tuple(inputs.values()))
        dpp.save_transformers(split, found, tmp_path)
        result = type(split).from_pretrained(tmp_path).eval()(**inputs)
    logits = result.logits if "logits" in result else result.last_hidden_state
    assert torch.equal(logits, expected)


def test_padding_is_the_tokenizers(encoder_run):
    """A classifier that looks for the last token must know what padding is."""
    info = DataInfo("sentences", (12,), 3, vocabulary=256, pad=7)
    sizes = {key: value for key, value in GPT2.items() if not key.endswith("id")}
    layers = build_model(model(type="gpt2", config=sizes), info).eval()
    ids = torch.randint(8, 256, (1, 9))
    padded, mask = (torch.nn.functional.pad(one, (0, 3), value=fill) for one, fill in ((ids, 7), (ids > 0, False)))
    with torch.no_grad():
        alone, beside = layers((ids, ids > 0)), layers((padded, mask))
    assert torch.allclose(alone, beside, atol=1e-6)
    with refused("pad-token-mismatch", UsageError, "pad_token_id 3", "7"):
        build_model(model(type="gpt2", config={**sizes, "pad_token_id": 3}), info)
    with refused("model-fails-on-sample", UsageError, "input_ids (2, 100)"):
        build_model(model(type="gpt2", config=sizes), DataInfo("tokens", (100,), 256))


def test_only_a_classifier_may_have_another_shape(encoder_run):
    config = transformers.BertConfig(
        vocab_size=25, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.BertForSequenceClassification(config).save_pretrained("pretrained")
    info = DataInfo("sentences", (12,), 3, vocabulary=25, pad=0)
    with refused("model-config-mismatch"):
        build_model(model(path="pretrained", config={"intermediate_size": 48}), info)


@pytest.mark.parametrize("critic", [{"critic_overlap": 1}, {"critic": {"kind": "head", "weights": "network"}}])
def test_critics_that_copy_weights_need_them(tmp_path, monkeypatch, capsys, critic):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RUN)
    changed = [word for key, value in critic.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert command("train", "tiny.yaml", "--set", "model.meta=true", *changed) == 2
    assert "weights of a later stage, which are not here" in capsys.readouterr().err
    fresh = ["--set", 'critic={"kind": "auglocal", "depth": 2}']
    assert command("train", "tiny.yaml", "--set", "model.meta=true", *fresh) == 0


def test_sentences_are_classified_and_the_classifier_exported(encoder_run):
    """Its own data, again through its own library: the loss of the last exit is that of the run."""
    assert command("train", "run.yaml", "--set", "data.label_column=kind") == 0
    assert command("export", "runs/encoder", "-o", "exported") == 0
    settings, _ = open_run(encoder_run / "runs" / "encoder")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("exported").eval()
    assert loaded.config.num_labels == 3 and loaded.config.vocab_size == 25
    logits, labels = [], []
    for (ids, mask), label in islice(open_data(settings.data, settings.seed).validation.batches(), 2):
        with torch.no_grad():
            logits.append(loaded(input_ids=ids, attention_mask=mask).logits)
        labels.append(label)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    summary = json.loads((encoder_run / "runs" / "encoder" / "summary.json").read_text())
    assert summary["exits"][-1]["val_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_a_classifier_for_other_classes_is_made_anew(encoder_run):
    """The rest of a pretrained model stays."""
    config = transformers.BertConfig(
        vocab_size=25, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=7
    )
    whole = transformers.BertForSequenceClassification(config)
    whole.save_pretrained("pretrained")
    info = DataInfo("sentences", (12,), 3, vocabulary=25)
    layers = build_model(model(path="pretrained"), info).eval()
    state = layers.state_dict()
    assert state["exit.model.classifier.weight"].shape == (3, 16)
    query = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(state["block0.block.attention.self.query.weight"], whole.bert.state_dict()[query])
