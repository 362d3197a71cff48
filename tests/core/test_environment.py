"""What the variables of a launcher say, and which of them are missing or wrong."""

import pytest

from decoupled_pp.core import environment
from decoupled_pp.core.errors import UsageError
from kit import refused

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """Leave these variables of a launcher and no others."""

    def leave(given):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return leave


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, (0, 1)),
        (WHOLE, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1)),
        ({"MASTER_ADDR": "left-over", "MASTER_PORT": "x"}, (0, 1)),
    ],
)
def test_rank_and_size(given, place, variables):
    variables(given)
    assert (environment.rank(), environment.world_size()) == place


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": ""}, "RANK is ''"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "2"}, "RANK is 2, and WORLD_SIZE 2"),
        ({"RANK": "1.0"}, "RANK is '1.0'"),
        ({"WORLD_SIZE": None}, "RANK is 1, and WORLD_SIZE 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
    ],
)
def test_half_a_launcher_is_named(change, named, variables):
    variables({name: value for name, value in (WHOLE | change).items() if value is not None})
    with refused("launcher-variables", UsageError, named):
        environment.rank()
        environment.world_size()
        environment.local_rank()
        environment.local_world_size()


def test_a_dpp_command_says_it_once_and_at_once(variables, tmp_path, capsys, monkeypatch):
    import kit

    variables({"RANK": "0", "WORLD_SIZE": "2"})
    monkeypatch.chdir(tmp_path)
    assert kit.dpp("train", "run.yaml") == 2
    kit.check_said(capsys.readouterr().err, "launcher-variables", "MASTER_ADDR is not set")
