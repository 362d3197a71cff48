"""`dpp bench` is for a checkout of the repository."""

import pytest

from decoupled_pp.commands import bench
from kit import refused, run_dpp


@pytest.mark.parametrize("words", [["schedule", "--ranks", "2"], ["wan"], []])
def test_where_only_the_package_is_installed(words, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_CHECKOUT", tmp_path)
    with refused("benchmark-not-installed"):
        run_dpp("bench", *words)
