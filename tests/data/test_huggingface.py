"""Hugging Face data sets written here to disk, loaded and streamed, without a network."""

import json
import sys
from itertools import islice

import pytest
import torch

from decoupled_pp.core.errors import UsageError
from decoupled_pp.data import open_data
from decoupled_pp.settings.sections import HuggingFaceData
from kit import refused

datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.usefixtures("own_cache")

TEXTS = [f"row {n}: " + "abcdefgh"[n % 8] * (n % 13) for n in range(60)]


@pytest.fixture
def jsonl(tmp_path):
    files = {}
    for split, texts in (("train", TEXTS), ("held", TEXTS[:20])):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"body": text, "n": at}) + "\n" for at, text in enumerate(texts)))
        files[split] = str(path)
    return files


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    for label, name in enumerate(["cat", "dog"]):
        (folder / "train" / name).mkdir(parents=True)
        for n in range(5):
            Image.new("RGB", (6, 4), (label * 255, n * 10, 0)).save(folder / "train" / name / f"{n}.png")
    return folder


def open_hf(path="json", seed=0, **more):
    return open_data(HuggingFaceData(kind="huggingface", path=path, batch_size=4, context=8, **more), seed)


def test_loaded_and_streamed_text_are_the_same_text(jsonl):
    more = {"data_files": jsonl, "text_column": "body", "validation_split": "held"}
    loaded, streamed = open_hf(**more), open_hf(**more, streaming=True, shuffle_buffer=10)
    assert loaded.info.shape == streamed.info.shape == (8,) and loaded.info.outputs == streamed.info.outputs == 256
    ours, theirs = list(loaded.validation.batches()), list(streamed.validation.batches())
    assert len(ours) == len(theirs)
    for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    text = "".join(loaded.info.decode(x.flatten().tolist()) for x, _ in ours)
    assert ("\n".join(TEXTS[:20]) + "\n").startswith(text) and len(text) > 150


@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_equals_never_stopping_over_epochs(jsonl, streaming):
    data = open_hf(
        data_files=jsonl, text_column="body", validation_split="held", streaming=streaming, shuffle_buffer=10
    )
    straight = list(islice(data.train.batches(), 70))  # an epoch has about 27 batches
    for start in (1, 40, 66):
        for (x, y), (again_x, again_y) in zip(straight[start:], data.train.batches(start), strict=False):
            assert torch.equal(x, again_x) and torch.equal(y, again_y)
    assert not torch.equal(
        straight[0][0],
        next(
            open_hf(
                data_files=jsonl, text_column="body", validation_split="held", streaming=streaming, seed=1
            ).train.batches()
        )[0],
    )


def test_a_stream_has_another_order_in_every_epoch(pictures):
    streamed = open_hf(str(pictures), image_column="image", validation_split="train", streaming=True)
    batches = [x for x, _ in islice(streamed.train.batches(), 6)]  # an epoch of 10 images has 2 whole batches of 4
    epochs = [torch.cat(batches[at : at + 2]) for at in (0, 2, 4)]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_rows_are_held_out_when_there_is_no_validation_split(jsonl):
    data = open_hf(data_files={"train": jsonl["train"]}, text_column="body", validation_fraction=0.2)
    held = "".join(data.info.decode(x.flatten().tolist()) for x, _ in data.validation.batches())
    rows = held.split("\n")[:-1]  # the last row may be cut
    assert len(rows) in (11, 12) and all(row in TEXTS for row in rows)
    train = "|".join(data.info.decode(row.tolist()) for x, _ in islice(data.train.batches(), 1000) for row in x)
    trained = {text for text in TEXTS if text[:7] in train and text[6] == ":"}  # "row 10:" and up name one row
    assert len(trained) >= 36 and not trained.intersection(rows)


def test_images_are_scaled_and_keep_their_labels(pictures):
    data = open_hf(str(pictures), image_column="image", validation_fraction=0.3)
    assert (data.info.form, data.info.shape, data.info.outputs) == ("image", (3, 4, 6), 2)
    train, held = list(islice(data.train.batches(), 1)), list(data.validation.batches())
    seen = []
    for images, labels in train + held:
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        raw = ((images + 1) * 127.5).round().int()
        assert torch.equal(raw, raw[:, :, :1, :1].expand_as(raw))
        assert torch.equal(raw[:, 0, 0, 0], labels.int() * 255) and not raw[:, 2].any()
        seen += [(int(label), int(green)) for label, green in zip(labels, raw[:, 1, 0, 0], strict=True)]
    assert len(set(seen)) == len(seen) == 4 + 3, "no image is in both parts"
    again = next(open_hf(str(pictures), image_column="image", validation_fraction=0.3).train.batches())
    assert torch.equal(again[0], train[0][0])


def test_streamed_images_are_the_loaded_ones(pictures):
    more = {"image_column": "image", "validation_split": "train"}
    loaded, streamed = open_hf(str(pictures), **more), open_hf(str(pictures), **more, streaming=True)
    for ours, theirs in zip(loaded.validation.batches(), streamed.validation.batches(), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    straight = list(islice(streamed.train.batches(), 4))
    assert torch.equal(next(streamed.train.batches(3))[0], straight[3][0])


def test_an_image_of_another_size_is_refused(pictures):
    from PIL import Image

    Image.new("RGB", (5, 4)).save(pictures / "train" / "dog" / "9.png")
    data = open_hf(str(pictures), image_column="image", validation_split="train")
    with refused("images-differ-in-size", UsageError, "5x4", "6x4"):
        list(data.validation.batches())


@pytest.mark.parametrize(
    ("more", "code", "part"),
    [
        ({"path": "/nowhere/at/all", "text_column": "body"}, "data-not-loadable", "/nowhere/at/all"),
        ({"path": "./nowhere", "text_column": "body"}, "data-not-loadable", "./nowhere"),
        ({"text_column": "text"}, "unknown-column", "`data.text_column` 'text'"),
        ({"text_column": "body", "train_split": "big"}, "unknown-split", "`data.train_split` 'big'"),
        ({"text_column": "body", "validation_split": "big"}, "unknown-split", "`data.validation_split` 'big'"),
        ({"text_column": "body", "streaming": True}, "stream-without-validation", "`data.streaming`"),
        ({"image_column": "body"}, "unknown-column", "`data.label_column` 'label'"),
        ({"image_column": "body", "label_column": "n"}, "wrong-column-type", "`data.image_column` 'body' holds str"),
        ({"image_column": "n", "label_column": "body"}, "wrong-column-type", "`data.label_column` 'body'"),
    ],
)
def test_faults_are_found_at_open(jsonl, more, code, part):
    with refused(code, UsageError, part):
        open_hf(**{"data_files": jsonl, **more})


def test_files_that_are_not_there_are_named():
    with pytest.raises(UsageError, match=r"`data\.data_files`") as caught:  # the library adds its own
        open_hf(data_files={"train": "/nowhere/a.jsonl"}, text_column="body")
    assert caught.value.code == "data-not-loadable" and "\n" not in str(caught.value)


def test_a_text_column_without_text_is_refused(jsonl):
    data = open_hf(data_files=jsonl, text_column="n", validation_split="held")
    with refused("wrong-column-type", UsageError, "int, not text"):
        next(data.train.batches())


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("extra-missing", UsageError, "datasets"):
        open_hf(data_files={"train": "rows.jsonl"}, text_column="body")
