"""What tests share: faults by code with one golden file of texts; tiny networks, their batches, and short runs."""

import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from decoupled_pp import BatchSource, Data, DataInfo
from decoupled_pp.commands.main import build_parser, main
from decoupled_pp.core.errors import UsageError

# ------------------------------------------------------------------------------------------------------------- faults

TEXTS = Path(__file__).parent / "fault_texts.json"
"""Code of a fault -> the texts that tests have seen with it, paths and measured numbers left out."""

SEEN = {}
"""The same, of this session; `pytest --update-texts` writes it into the file."""


@contextmanager
def refused(code, kind=UsageError, *parts):
    """The block raises an error of this code; its text is in the golden file.

    Args:
        code: Of the error.
        kind: Its class.
        *parts: What the text must contain, such as the value that this test gave.

    Yields:
        What `pytest.raises` yields.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code}: {caught.value}"
    check_text(code, str(caught.value), *parts)


def check_text(code, text, *parts):
    """Hold a fault's text to the golden file."""
    assert "\n" not in text, "a fault is one line"
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    SEEN.setdefault(code, set()).add(_normal(text))


def check_said(text, code, *parts):
    """Hold what a `dpp` process said, one line, to the golden file; `code` is that of the fault it says."""
    assert text.startswith("dpp: ") and text.endswith("\n"), text
    check_text(code, text.removeprefix("dpp: ").removesuffix("\n"), *parts)


def _normal(text):
    """The text without what differs from machine to machine and from run to run."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}[^\s'\",;:]*", "PATH", text)
    text = re.sub(r"checkpoint at step \d+", "checkpoint at step #", text)  # the newest one there was: a matter of time
    return re.sub(r"\d+\.\d+", "#.#", text)


def written_texts():
    """What the golden file holds."""
    return {code: set(texts) for code, texts in json.loads(TEXTS.read_text()).items()} if TEXTS.exists() else {}


def write_texts(seen):
    """Add to the golden file; texts of codes that were seen are replaced."""
    kept = {code: sorted(texts) for code, texts in sorted((written_texts() | seen).items())}
    TEXTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ networks and batches


def tanh_layers(count, width):
    """As many layers, each linear with a tanh."""
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)]


def tanh_network(count, width, classes):
    """`tanh_layers` and a linear head, always with the same weights."""
    torch.manual_seed(1)
    return nn.Sequential(*tanh_layers(count, width), nn.Linear(width, classes))


def vector_batches(count, size, width, classes):
    """Micro-batches of random vectors (size, width) and classes (size,), always the same."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, width, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


class Points(BatchSource):
    """Random images of ten classes; batch k is always the same."""

    def __init__(self, size, count):
        self.size, self.count = size, count

    def batches(self, start=0):
        number = start
        while self.count is None or number < self.count:
            generator = torch.Generator().manual_seed(number)
            target = torch.randint(10, (self.size,), generator=generator)
            yield torch.randn(self.size, 1, 8, 8, generator=generator) + target.view(-1, 1, 1, 1) / 10, target
            number += 1


def points(settings, seed):
    """A data factory, `kit:points`, for runs whose ranks should not spend seconds on importing scikit-learn."""
    return Data(DataInfo("image", (1, 8, 8), 10), Points(settings.batch_size, None), Points(settings.batch_size, 2))


# --------------------------------------------------------------------------------------------------------------- runs


def ignore(records):
    """An observer that shows nothing."""


def weights(trainer):
    """Copies of all weights and buffers of this process's stages and their critics, by stage, part and name."""
    found = {}
    for stage in trainer.stages:
        for part, module in (("trunk", stage.trunk), ("critic", stage.critic)):
            state = module.state_dict() if module is not None else {}
            found |= {f"{stage.index}.{part}.{name}": tensor.clone() for name, tensor in state.items()}
    return found


def states(trainer):
    """All that training changes, by stage and name, copied."""
    return {stage.index: state(stage) for stage in trainer.stages}


def state(stage):
    """Weights, buffers, critic, optimizer state, learning rates and random stream of one stage."""
    found = {f"model.{name}": tensor for name, tensor in stage.trunk.state_dict().items()}
    if stage.critic is not None:
        found |= {f"critic.{name}": tensor for name, tensor in stage.critic.state_dict().items()}
    names = {parameter: name for name, parameter in stage.named_parameters("here").items()}
    for number, optimizer in enumerate(stage.all_optimizers):
        found[f"rate.{number}"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
        for parameter, values in optimizer.state.items():
            found |= {
                f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value)
                for key, value in values.items()
                if value is not None
            }
    found["random stream"] = stage.body.random.state
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def merged(parts):
    """The states of all ranks as those of one process."""
    return {index: one for part in parts for index, one in part.items()}


def assert_equal_states(ours, theirs):
    """The states of all stages are bit-equal."""
    assert not differences(ours, theirs)


def differences(ours, theirs):
    """Names of what is not bit-equal in two nested dictionaries of tensors."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return [] if torch.equal(ours, theirs) and ours.dtype == theirs.dtype else ["differs"]
    if ours is None or theirs is None:
        return ["missing"]
    return [
        f"{key}: {found}"
        for key in sorted({*ours, *theirs}, key=str)
        for found in differences(ours.get(key), theirs.get(key))
    ]


def run_dpp(*words):
    """Run a `dpp` command in this process as its front end does, but let its faults through; returns the exit code."""
    words = [str(word) for word in words]
    chosen = build_parser(words).parse(words)
    return chosen.run(chosen)


def dpp(*arguments):
    """Run a `dpp` command in this process; its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code
    return None


def dpp_in_rank(folder, *arguments):
    """Run a `dpp` command in a rank of `ranks.launch`, with `folder` as its working directory; its exit code."""
    os.chdir(folder)
    return dpp(*arguments)
