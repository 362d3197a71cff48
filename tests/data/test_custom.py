"""The user's own data function."""

import torch

from decoupled_pp.core.datasets import Data, DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data import as_source, open_data
from decoupled_pp.settings.sections import FactoryData
from kit import refused


def make(settings, seed, width):
    batches = [(torch.full((settings.batch_size, width), float(seed)), torch.zeros(settings.batch_size))]
    return Data(DataInfo("vector", (width,), 1), as_source(batches, endless=True), as_source(batches))


def make_nothing(settings, seed):
    return None


def test_the_function_gets_section_seed_and_arguments():
    data = open_data(
        FactoryData(kind="factory", factory=f"{__name__}:make", arguments={"width": 3}, batch_size=2), seed=9
    )
    assert data.info.shape == (3,)
    assert torch.equal(next(data.train.batches(5))[0], torch.full((2, 3), 9.0))


def test_anything_but_data_is_refused():
    with refused("factory-wrong-result", UsageError, "NoneType"):
        open_data(FactoryData(kind="factory", factory=f"{__name__}:make_nothing"), seed=0)
