"""IDX files written here byte by byte, as http://yann.lecun.com/exdb/mnist describes them."""

import gzip
import struct

import pytest
import torch

from decoupled_pp.core.errors import UsageError
from decoupled_pp.data import open_data
from decoupled_pp.settings.sections import IdxData
from kit import refused

TRAIN = [[[0, 255, 10], [20, 30, 40]], [[1, 2, 3], [4, 5, 6]], [[7, 7, 7], [9, 9, 9]]]
TEST = [[[100, 0, 0], [0, 0, 200]]]


def images_file(images):
    header = struct.pack(">BBBBIII", 0, 0, 8, 3, len(images), 2, 3)
    return header + bytes(value for image in images for row in image for value in row)


def labels_file(labels):
    return struct.pack(">BBBBI", 0, 0, 8, 1, len(labels)) + bytes(labels)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images_file(TRAIN))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels_file([2, 0, 6]))
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb") as stream:
        stream.write(images_file(TEST))
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as stream:
        stream.write(labels_file([4]))
    return tmp_path


def open_folder(folder, **more):
    return open_data(IdxData(kind="idx", folder=str(folder), batch_size=3, **more), seed=0)


def test_every_value_is_read_and_normalised_with_the_training_statistics(folder):
    data = open_folder(folder)
    assert (data.info.form, data.info.shape, data.info.outputs) == ("image", (1, 2, 3), 7)
    real = torch.tensor(TRAIN, dtype=torch.float32)[:, None]
    mean, deviation = real.mean(), real.std(correction=0)
    images, labels = next(data.train.batches())
    order = [[2, 0, 6].index(label) for label in labels.tolist()]
    torch.testing.assert_close(images, (real[order] - mean) / deviation)
    ((images, labels),) = data.validation.batches()
    torch.testing.assert_close(images, (torch.tensor(TEST, dtype=torch.float32)[:, None] - mean) / deviation)
    assert labels.tolist() == [4] and labels.dtype == torch.int64


def test_augmentation_touches_training_only_and_keeps_labels_with_their_images(folder):
    plain, augmented = open_folder(folder), open_folder(folder, augment=True)
    for number in range(4):
        images, labels = next(plain.train.batches(number))
        changed, same_labels = next(augmented.train.batches(number))
        assert torch.equal(labels, same_labels)
        assert torch.equal(changed, next(augmented.train.batches(number))[0])
        for image, crop in zip(images, changed, strict=True):  # a crop shows this image's values or the padding
            assert set(crop.flatten().tolist()) <= {*image.flatten().tolist(), 0.0}
    assert torch.equal(next(plain.validation.batches())[0], next(augmented.validation.batches())[0])


def replace(name, content):
    def change(folder):
        path = folder / name
        path.write_bytes(content if content is not None else path.read_bytes()[:-10])
        return path

    return change


DAMAGED = "data-file-damaged"


@pytest.mark.parametrize(
    ("change", "code", "parts"),
    [
        (replace("train-images-idx3-ubyte", images_file(TRAIN)[:-4]), DAMAGED, ["truncated", "34 bytes", "found 30"]),
        (replace("train-images-idx3-ubyte", images_file(TRAIN) + b"x"), DAMAGED, ["too long", "34 bytes", "found 35"]),
        (replace("train-images-idx3-ubyte", images_file(TRAIN)[:7]), DAMAGED, ["truncated", "16 bytes", "found 7"]),
        (replace("train-images-idx3-ubyte", b"\x89PNG" + bytes(30)), DAMAGED, ["0x89504e47", "0x00000803"]),
        (replace("train-labels-idx1-ubyte", labels_file([1, 2])), "data-files-disagree", ["3 images", "2 labels"]),
        (replace("train-labels-idx1-ubyte", labels_file([])), DAMAGED, ["empty"]),
        (replace("t10k-images-idx3-ubyte.gz", None), DAMAGED, ["truncated", "gzip"]),
        (replace("t10k-images-idx3-ubyte.gz", b"this is no gzip"), DAMAGED, ["cannot be read"]),
        (replace("t10k-images-idx3-ubyte.gz", b""), DAMAGED, ["truncated"]),
    ],
)
def test_a_damaged_file_is_refused_at_open(folder, change, code, parts):
    path = change(folder)
    with refused(code, UsageError, str(path), *parts):
        open_folder(folder)


def test_a_large_gzip_that_breaks_off_says_how_much_there_was(folder):
    random = torch.randint(256, (3000, 2, 3), generator=torch.Generator().manual_seed(0)).tolist()
    content = gzip.compress(images_file(random))
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(content[: len(content) // 2])
    with refused("data-file-damaged", UsageError, "of 18016 bytes"):
        open_folder(folder)


def test_a_missing_file_names_file_and_setting(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with refused("data-file-missing", UsageError, "`data.folder`", "t10k-labels-idx1-ubyte"):
        open_folder(folder)
