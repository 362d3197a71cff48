"""Text files: bytes, tokenizers, the standard library."""

import json
import sys
from itertools import islice

import pytest
import torch

from decoupled_pp.core.errors import UsageError
from decoupled_pp.data import open_data, text
from decoupled_pp.data.vocabulary import open_vocabulary
from decoupled_pp.settings.sections import PythonSourceData, TextData
from kit import refused

MIXED = "Grüße, 世界! 🙂 the then\n\n  the\t"


def gpt2_symbols():
    """GPT-2's printable stand-ins for the 256 bytes (its `bytes_to_unicode`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


@pytest.fixture
def gpt2(tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    tokens = [*gpt2_symbols(), "th", "the", "Ġthe", "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    return folder


def open_text(tmp_path, pattern="*.txt", **more):
    arguments = {"context": 4, "batch_size": 2, "validation_fraction": 0.25, **more}
    return open_data(TextData(kind="text", files=[str(tmp_path / pattern)], **arguments), seed=0)


def validation_text(data):
    return "".join(data.info.decode(x.flatten().tolist()) for x, _ in data.validation.batches())


def train_text(data, epochs=20):
    batches = islice(data.train.batches(), epochs)
    return "\n".join(data.info.decode(row.tolist()) for x, _ in batches for row in x)


def test_bytes_round_trip_and_any_broken_text_decodes():
    vocabulary = open_vocabulary(None)
    assert vocabulary.size == 256 and vocabulary.decode(vocabulary.encode(MIXED)) == MIXED
    assert vocabulary.decode([0xC3]) == "\ufffd"


def test_gpt2_files_merge_as_written_and_round_trip_every_byte(gpt2):
    vocabulary = open_vocabulary(str(gpt2))
    assert vocabulary.size == 260
    assert vocabulary.decode(vocabulary.encode(MIXED)) == MIXED
    assert vocabulary.encode("the the") == [257, 258]  # "the", "Ġthe"
    assert vocabulary.encode(" then")[0] == 258 and vocabulary.encode("t")[0] == ord("t")
    for code in range(0x80, 0x800, 7):
        assert vocabulary.decode(vocabulary.encode(chr(code))) == chr(code)


def test_a_tokenizer_file_is_used_without_its_truncation_and_special_tokens(gpt2, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE.from_file(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 259)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = open_vocabulary(str(tmp_path / "tokenizer.json"))
    assert vocabulary.encode(MIXED) == open_vocabulary(str(gpt2)).encode(MIXED)
    assert vocabulary.decode(vocabulary.encode(MIXED)) == MIXED


def test_tokenizer_faults_are_one_line(gpt2, tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for path, code in [
        ("nowhere", "tokenizer-not-found"),
        ("broken.json", "tokenizer-unusable"),
        ("empty", "tokenizer-not-found"),
    ]:
        with refused(code, UsageError, path):
            open_vocabulary(str(tmp_path / path))
    (gpt2 / "encoder.json").write_text(json.dumps({"t": 0, "h": 1, "th": 2, "e": 3, "the": 4, "Ġ": 5, "Ġthe": 6}))
    with refused("tokenizer-unusable", UsageError, "252 of the 256"):
        open_vocabulary(str(gpt2))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with refused("extra-missing", UsageError, "tokenizers"):
        open_vocabulary(str(gpt2))


def test_several_files_are_held_out_as_files(tmp_path):
    letters = "abcdefgh"
    for letter in letters:
        (tmp_path / f"{letter}.txt").write_text(letter * 40)
    data = open_text(tmp_path)
    held = set(validation_text(data))
    assert len(held) == 2 and set(train_text(data, 300)) - {"\n"} == set(letters) - held
    assert validation_text(open_text(tmp_path)) == validation_text(data)


def test_of_one_file_the_tail_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 75 + "y" * 25)
    data = open_text(tmp_path)
    assert validation_text(data) == "y" * 24 and set(train_text(data)) == {"x", "\n"}


def test_a_tokenizer_gives_the_same_text_as_bytes(tmp_path, gpt2):
    (tmp_path / "a.txt").write_text("the cat, then the dog. " * 40)
    plain, coded = open_text(tmp_path), open_text(tmp_path, tokenizer=str(gpt2))
    assert (plain.info.outputs, coded.info.outputs) == (256, 260)
    assert "then the dog. the cat, " in validation_text(coded)
    assert coded.info.encode(" the") == [258]


def test_text_faults_are_found_and_named(tmp_path, gpt2, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the text names it
    with refused("data-file-missing", UsageError, "*.nothing"):
        open_text(tmp_path, "*.nothing")
    (tmp_path / "a.txt").write_bytes(b"\xff" * 100)
    open_text(tmp_path)  # bytes need not be text
    with refused("data-file-not-utf8", UsageError, "a.txt", "byte 0"):
        next(open_text(tmp_path, tokenizer=str(gpt2)).train.batches())
    with refused("too-little-data", UsageError, "validation text has 25 tokens"):
        open_text(tmp_path, context=30)
    with refused("too-little-data", UsageError, "training text has 75 tokens"):
        open_text(tmp_path, context=80)


def test_python_source_is_this_library_without_tests_and_resumes_exactly():
    data = open_data(PythonSourceData(kind="python_source", batch_size=4, context=64), seed=5)
    assert (data.info.form, data.info.shape, data.info.outputs) == ("tokens", (64,), 256)
    straight = list(islice(data.train.batches(), 12))
    for (x, y), (again_x, again_y) in zip(straight[7:], data.train.batches(7), strict=False):
        assert torch.equal(x, again_x) and torch.equal(y, again_y)
        assert x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    sample = b"".join(bytes(row.tolist()) for x, _ in islice(data.train.batches(), 500) for row in x)
    assert b"def " in sample and b"import " in sample
    assert next(data.train.batches(10**9))[0].shape == (4, 64)


def test_python_source_skips_packages_and_tests_and_refuses_an_empty_library(tmp_path, monkeypatch):
    for name in ("a.py", "b/c.py", "test/d.py", "site-packages/e.py", "b/tests/f.py", "b/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    assert text.find_python_source(tmp_path) == [tmp_path / "a.py", tmp_path / "b/c.py"]
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path / "b/tests/nothing"))
    with refused("data-file-missing", UsageError, "0 .py files"):
        open_data(PythonSourceData(kind="python_source"), seed=0)
