"""Law 2: N stages in one process == N processes over gloo; every parameter, buffer, critic and optimizer state."""

import pytest
from cases import differences, merged, train

from ranks import launch, values


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("case", ["gpt with dropout", "resnet"])
def test_ranks_equal_one_process(case, stages, tmp_path):
    options = {"accumulate": 2, "clip_norm": 0.5, "capacity": 2}
    together = train(case, stages, 6, **options)

    apart = merged(values(launch(_train, case, stages, options, size=stages, folder=tmp_path)))

    assert differences(together, apart) == []
    assert set(apart) == set(range(stages))


def _train(case, stages, options):
    return train(case, stages, 6, **options)
