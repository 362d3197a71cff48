"""CIFAR-10 records written here byte by byte."""

import pytest
import torch

from decoupled_pp.core.errors import UsageError
from decoupled_pp.data import open_data
from decoupled_pp.settings.sections import CifarBinaryData
from kit import refused


def record(label, red, green, blue):
    return bytes([label]) + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


@pytest.fixture
def folder(tmp_path):
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(
            record(number, 10 * number, 100, 200 - number) + record(number - 1, number, 50, 0)
        )
    (tmp_path / "test_batch.bin").write_bytes(record(9, 1, 2, 3) + bytes([0]) + bytes(range(256)) * 12)
    return tmp_path


def open_folder(folder):
    return open_data(CifarBinaryData(kind="cifar_binary", folder=str(folder), batch_size=10), seed=0)


def test_every_value_is_read_and_normalised_per_channel(folder):
    data = open_folder(folder)
    assert (data.info.form, data.info.shape, data.info.outputs) == ("image", (3, 32, 32), 10)
    colours = [c for n in range(1, 6) for c in ((10 * n, 100, 200 - n), (n, 50, 0))]
    labels = [label for n in range(1, 6) for label in (n, n - 1)]
    real = torch.tensor(colours, dtype=torch.float32)
    mean, deviation = real.mean(0), real.std(0, correction=0)
    images, got = next(data.train.batches())
    expected = sorted(zip(labels, ((real - mean) / deviation).tolist(), strict=True))
    found = sorted(zip(got.tolist(), images[:, :, 31, 0].tolist(), strict=True))
    assert [label for label, _ in found] == [label for label, _ in expected]
    torch.testing.assert_close(torch.tensor([c for _, c in found]), torch.tensor([c for _, c in expected]))
    ((images, got),) = data.validation.batches()
    raw = (images * deviation[:, None, None] + mean[:, None, None]).round().int()
    assert got.tolist() == [9, 0] and raw[0, :, 0, 0].tolist() == [1, 2, 3]
    assert torch.equal(raw[1].flatten(), torch.arange(256, dtype=torch.int32).repeat(12))


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (record(1, 1, 1, 1)[:-1], "data-file-damaged", "3072 bytes"),
        (b"", "data-file-damaged", "0 bytes"),
        (record(1, 1, 1, 1) + record(10, 1, 1, 1), "data-file-damaged", "record 1 has label 10"),
        (None, "data-file-missing", "`data.folder`"),
    ],
)
def test_a_damaged_file_is_refused_at_open(folder, content, code, part):
    path = folder / "data_batch_4.bin"
    path.unlink() if content is None else path.write_bytes(content)
    with refused(code, UsageError, str(path), part):
        open_folder(folder)
