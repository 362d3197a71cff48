"""Text for encoders: masked tokens, and sentences with a class, padded to the longest of their batch."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from decoupled_pp.core.criterion import IGNORED
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data import open_data
from decoupled_pp.data.masking import masked
from decoupled_pp.data.vocabulary import open_vocabulary
from decoupled_pp.settings.sections import HuggingFaceData, PythonSourceData, TextData
from kit import refused

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = [f"w{n}" for n in range(20)]
TEXTS = [" ".join(WORDS[(n + k) % 20] for k in range(n % 9)) for n in range(50)]


@pytest.fixture
def tokenizer(tmp_path):
    """Words, with BERT's special tokens: [CLS] words [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: at for at, word in enumerate([*special, *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return str(path)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    listed = [{"said": text, "kind": at % 3, "n": at} for at, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(one) + "\n" for one in listed))
    return str(path)


def sentences(rows, tokenizer, **more):
    settings = {"data_files": {"train": rows}, "text_column": "said", "label_column": "kind"}
    settings |= {"batch_size": 4, "validation_fraction": 0.2}
    settings |= {"path": "json", "context": 8}
    return open_data(HuggingFaceData(kind="huggingface", tokenizer=tokenizer, **(settings | more)), 0)


def test_sentences_are_padded_to_the_longest_of_their_batch(rows, tokenizer):
    data = sentences(rows, tokenizer)
    assert (data.info.form, data.info.outputs, data.info.vocabulary) == ("sentences", 3, 25)
    seen, widths = 0, set()
    for (ids, mask), labels in data.validation.batches():
        assert ids.shape == mask.shape and ids.shape[1] == mask.sum(1).max() <= 8
        assert torch.equal(ids != 0, mask)  # id 0 is [PAD]
        assert (ids[:, 0] == 2).all()
        for row, length, label in zip(ids, mask.sum(1), labels, strict=True):
            assert row[length - 1] == 3  # a sentence that is cut keeps its end
            words = [WORDS[token - 5] for token in row[1 : length - 1]]
            at = [i for i, text in enumerate(TEXTS) if text.split()[:6] == words]
            assert int(label) in {i % 3 for i in at}
        seen, widths = seen + len(labels), widths | {ids.shape[1]}
    assert seen == 10 and len(widths) > 1


def test_a_stream_of_sentences_is_the_same_sentences(rows, tokenizer):
    named = datasets.load_dataset("json", data_files={"train": rows})["train"].class_encode_column("kind")
    folder = rows.removesuffix(".jsonl")
    Path(folder).mkdir()
    named.to_parquet(f"{folder}/t.parquet")
    named.select(range(10)).to_parquet(f"{folder}/h.parquet")
    files = {"train": f"{folder}/t.parquet", "held": f"{folder}/h.parquet"}
    more = {"path": "parquet", "data_files": files, "validation_split": "held"}
    loaded, streamed = sentences(rows, tokenizer, **more), sentences(rows, tokenizer, **more, streaming=True)
    for (ours, label), (theirs, other) in zip(loaded.validation.batches(), streamed.validation.batches(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and torch.equal(label, other)


def test_sentences_resume_at_any_batch(rows, tokenizer):
    data = sentences(rows, tokenizer)
    straight = list(islice(data.train.batches(), 25))
    for (x, y), (again_x, again_y) in zip(straight[13:], data.train.batches(13), strict=False):
        assert torch.equal(y, again_y) and all(torch.equal(a, b) for a, b in zip(x, again_x, strict=True))


def test_masking_is_berts():
    """80 % masked, 10 % any other token, 10 % as they were; the targets are the tokens that were chosen."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1000, (200, 500), generator=generator)
    inputs, targets = masked(tokens, 4, 1000, 0.15, generator)
    chosen = targets != IGNORED
    assert torch.equal(inputs[~chosen], tokens[~chosen]) and torch.equal(targets[chosen], tokens[chosen])
    assert float(chosen.float().mean()) == pytest.approx(0.15, abs=0.003)
    assert float((inputs[chosen] == 4).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((inputs[chosen] == tokens[chosen]).float().mean()) == pytest.approx(0.1, abs=0.01)
    lonely, wanted = masked(tokens[:1, :1], 4, 1000, 1e-9, generator)  # a batch without a target would have no loss
    assert int((wanted != IGNORED).sum()) == 1 and lonely.shape == (1, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_masked_tokens_are_a_function_of_the_batch_number(rows, tokenizer, streaming):
    settings = {"data_files": {"train": rows, "held": rows}, "text_column": "said", "validation_split": "held"}
    data = open_data(
        HuggingFaceData(
            kind="huggingface",
            path="json",
            tokenizer=tokenizer,
            target="masked_tokens",
            context=8,
            batch_size=2,
            streaming=streaming,
            **settings,
        ),
        0,
    )
    assert data.info.form == "masked_tokens" and data.info.encode is None
    straight = list(islice(data.train.batches(), 30))
    for (x, y), (again_x, again_y) in zip(straight[7:], data.train.batches(7), strict=False):
        assert torch.equal(x, again_x) and torch.equal(y, again_y)
    once, twice = (list(data.validation.batches()) for _ in range(2))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(once, twice, strict=True))
    assert any((x == 4).any() for x, _ in once)


def test_a_tokenizer_may_be_a_models_folder(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
    )
    made.save_pretrained(tmp_path / "model")
    ours, theirs = open_vocabulary(tokenizer), open_vocabulary(str(tmp_path / "model"))
    assert (ours.size, ours.mask, ours.pad) == (theirs.size, theirs.mask, theirs.pad) == (25, 4, 0)
    assert ours.encode("w1 w7") == theirs.encode("w1 w7") == [6, 12]
    assert ours.sentences(3)("w1 w7") == theirs.sentences(3)("w1 w7") == [2, 6, 3]


def test_a_run_is_planned_for_the_longest_sentence(rows, tokenizer):
    """Whatever the first micro-batch is like: cut and memory are judged by `context`."""
    from decoupled_pp.settings.run import Settings
    from decoupled_pp.training.prepare import prepare

    data = {"kind": "huggingface", "path": "json", "data_files": {"train": rows}, "text_column": "said"}
    data |= {"label_column": "kind", "tokenizer": tokenizer, "batch_size": 4, "context": 30}
    bert = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {"kind": "huggingface", "type": "bert", "config": bert}
    _, info, plan = prepare(
        Settings.model_validate({"name": "a", "cut": "uniform", "model": model, "data": data, "training": {"steps": 1}})
    )
    assert [tuple(tensor.shape) for tensor in plan.sample] == [(4, 30), (4, 30)] and info.pad == 0


def test_labels_may_be_yes_and_no(tmp_path, tokenizer):
    path = tmp_path / "flags.jsonl"
    path.write_text("".join(json.dumps({"said": text, "flag": at % 2 == 0}) + "\n" for at, text in enumerate(TEXTS)))
    _, labels = next(sentences(str(path), tokenizer, label_column="flag").train.batches())
    assert labels.dtype == torch.int64 and set(labels.tolist()) <= {0, 1}


def test_a_tokenizer_cuts_where_it_would(tokenizer, tmp_path):
    left = tokenizers.Tokenizer.from_file(tokenizer)
    left.enable_truncation(99, direction="left")
    left.save(str(tmp_path / "left.json"))
    assert open_vocabulary(str(tmp_path / "left.json")).sentences(4)("w1 w2 w3 w4") == [2, 8, 9, 3]
    assert open_vocabulary(tokenizer).sentences(4)("w1 w2 w3 w4") == [2, 6, 7, 3]
    with refused("context-too-small"):
        open_vocabulary(tokenizer).sentences(2)


def test_what_cannot_be_is_refused(rows, tokenizer, tmp_path):
    with refused("no-mask-token"):
        open_data(PythonSourceData(kind="python_source", target="masked_tokens"), 0)
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    bare.save(str(tmp_path / "bare.json"))
    with refused("no-padding-token"):
        sentences(rows, str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="names the same column"):
        sentences(rows, tokenizer, label_column="said")
    with refused("wrong-column-type", UsageError, "'n' holds int"):
        next(sentences(rows, tokenizer, text_column="n").train.batches())
    with pytest.raises(ValueError, match="is for text without labels"):
        sentences(rows, tokenizer, target="masked_tokens")
    with pytest.raises(UsageError, match="the hub gives none") as caught:  # the rest is the library's own text
        open_data(TextData(kind="text", files=[rows], tokenizer="no-such-model"), 0)
    assert caught.value.code == "tokenizer-not-found"
