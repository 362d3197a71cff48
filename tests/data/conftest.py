"""What tests of Hugging Face data sets share."""

import pytest


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Data sets are cached in the test's own folder, and load without progress bars."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
