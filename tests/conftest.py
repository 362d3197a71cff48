"""Every test: one torch thread, seeded generators, and nothing left behind (threads, process group, environment)."""

import os

# Read once, when huggingface_hub is imported: no test asks the network, where each name that is missing costs seconds.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import threading

import numpy
import pytest
import torch
import torch.distributed as dist

import kit
import ranks


def pytest_addoption(parser):
    parser.addoption("--update-texts", action="store_true", help="write the texts of faults into the golden file")


def pytest_configure(config):
    """`-W error` (as CI runs the tests) holds in launched ranks as well; one process alone writes the golden file."""
    ranks.warnings_are_errors = "error" in (config.getoption("pythonwarnings") or ())
    if config.getoption("--update-texts") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--update-texts writes one file: leave -n out")


@pytest.fixture(autouse=True)
def _texts_of_faults(request):
    """Every fault text that a test has seen is one of the golden file."""
    kit.SEEN.clear()
    yield
    if request.config.getoption("--update-texts"):
        kit.write_texts({code: texts | kit.written_texts().get(code, set()) for code, texts in kit.SEEN.items()})
        return
    golden = kit.written_texts()
    new = [f"{code}: {text}" for code, texts in kit.SEEN.items() for text in texts - golden.get(code, set())]
    if new:
        pytest.fail(f"not in {kit.TEXTS.name} (pytest --update-texts adds them): {'; '.join(new)}", pytrace=False)


@pytest.fixture(autouse=True)
def _same_start():
    """One thread, so that sums are added in one order; one seed, so that a failure comes back."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    left = [*_left_threads(threads), *_left_process_group(), *_changed_environment(environment)]
    if left:
        pytest.fail(f"left behind: {'; '.join(left)}", pytrace=False)


def _left_threads(before):
    ours = [t for t in threading.enumerate() if t not in before and (not t.daemon or t.name.startswith("dpp-"))]
    for thread in ours:
        thread.join(1.0)  # one that is on its way out is no leak
    return [f"thread {thread.name}" for thread in ours if thread.is_alive()]


def _left_process_group():
    if not dist.is_initialized():
        return []
    dist.destroy_process_group()
    return ["an initialised process group"]


def _changed_environment(before):
    # pytest's, torch's at its first optimizer, scikit-learn's at its import
    not_ours = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
    changed = {key for key in {*before, *os.environ} - not_ours if before.get(key) != os.environ.get(key)}
    for key in changed:
        if key in before:
            os.environ[key] = before[key]
        else:
            del os.environ[key]
    return [f"environment variable {key}" for key in sorted(changed)]
