"""The GPU benchmark's code on the CPU with tiny sizes, and its FLOP formula against PyTorch's counter."""

import argparse
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.gpu_measure import (
    FixedInlet,
    StageSize,
    make_packets,
    make_stage,
    model_flops,
    stage_figures,
)
from decoupled_pp.core.channels import Ends, Nowhere
from decoupled_pp.core.errors import UsageError
from kit import refused

TINY = StageSize(width=16, blocks=2, heads=2, sequence=12, batch=3, vocabulary=29)
CPU = torch.device("cpu")
TINY_ARGUMENTS = [
    "--device=cpu",
    "--width=16",
    "--blocks=1",
    "--heads=2",
    "--sequence=8",
    "--batch=2",
    "--vocabulary=11",
    "--matmul=32",
    "--steps=3",
    "--warm-up=2",
    "--repeats=2",
    "--no-compile",
]


def parsed(*words):
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.run_command(parsed()) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "no CUDA device here" in told
    assert "--device cpu" in told


def test_the_whole_command_on_the_cpu(tmp_path, capsys):
    chosen = parsed(*TINY_ARGUMENTS, "--output", str(tmp_path / "out"))
    assert gpu.run_command(chosen) == 0

    raw = json.loads((tmp_path / "out" / "raw.json").read_text())
    figures = raw["eager"]["figures"]
    assert raw["shape"] == {"width": 16, "blocks": 1, "heads": 2, "sequence": 8, "batch": 2, "vocabulary": 11}
    assert raw["eager"]["peak_memory_bytes"] is None
    assert raw["eager"]["saved_activation_bytes_peak"] > 0
    assert len(figures["step_ms"]) == 2
    assert all(0 < share < 1 for share in figures["critic_time_share"])
    readme = (tmp_path / "out" / "README.md").read_text()
    assert raw["command"] in readme
    for part in ("torch: ", "stage, eager: tokens/s", "critic's share of FLOPs"):
        assert part in readme
    assert "two stages, joined" in capsys.readouterr().out


def test_flops_are_what_pytorch_counts():
    """With attention in plain matrix products, of which FlopCounterMode knows backward too: equal to the last one."""
    stage = make_stage(TINY, CPU)
    (packet,) = make_packets(TINY, CPU, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.train(packet, Ends(FixedInlet([packet]), Nowhere()), lambda phase: None)
    assert counter.get_total_flops() == sum(model_flops(TINY).values())


def test_flops_of_the_parts():
    matrices = [p for n, p in make_stage(TINY, CPU).trunk.named_parameters() if p.dim() == 2 and "norm" not in n]
    flops = model_flops(TINY)
    assert flops["trunk"] == 6 * TINY.tokens * sum(p.numel() for p in matrices)
    assert flops["critic"] == 6 * TINY.tokens * TINY.width * TINY.vocabulary
    assert flops["attention"] == 2 * 12 * TINY.sequence * TINY.width * TINY.tokens


def test_figures():
    phases = {"forward": 1.0, "wait_out": 0.5, "critic": 1.0, "backward": 1.5, "step": 0.5}
    figures = stage_figures({"phase_seconds": [phases]}, TINY, matmul_rate=1e6)
    whole = sum(model_flops(TINY).values())
    assert figures["step_ms"] == [4500.0]
    assert figures["tokens_per_second"] == [TINY.tokens / 4.5]
    assert figures["fraction_of_matmul"] == [pytest.approx(whole / 4.5 / 1e6)]
    assert figures["critic_time_share"] == [0.25]
    assert figures["optimizer_time_share"] == [0.125]


def test_a_compiler_that_does_not_work_is_in_the_table_and_fails_the_command(tmp_path, monkeypatch):
    measure_stage = gpu.measure_stage

    def measure(*arguments, compiled, **amount):
        if compiled:
            raise RuntimeError("no Triton: a | b")
        return measure_stage(*arguments, compiled=False, **amount)

    monkeypatch.setattr(gpu, "measure_stage", measure)
    words = [word for word in TINY_ARGUMENTS if word != "--no-compile"]
    assert gpu.run_command(parsed(*words, f"--output={tmp_path}")) == 1
    table = (tmp_path / "README.md").read_text()
    assert "| stage, compiled | not measured | RuntimeError: no Triton: a / b |" in table
    assert "| two stages, joined / one after the other |" in table


@pytest.mark.parametrize("option", ["--steps 0", "--width 15"])
def test_sizes_that_cannot_be(option):
    with refused("option-out-of-range", UsageError, option):
        gpu.run_command(parsed(*TINY_ARGUMENTS, *option.split()))


def test_a_folder_name():
    assert gpu.slug("NVIDIA H200 NVL (80GB)") == "nvidia_h200_nvl_80gb"
