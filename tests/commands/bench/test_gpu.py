"""The GPU benchmark's code on the CPU with tiny sizes, and its FLOP formula against PyTorch's counter."""

import argparse
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from decoupled_pp.commands.bench import gpu, gpu_measure
from decoupled_pp.commands.bench.gpu_measure import Given, Shape, make_packets, make_stage, model_flops, stage_figures
from decoupled_pp.core.channels import Ends, Nowhere
from decoupled_pp.core.errors import UsageError

TINY = Shape(width=16, blocks=2, heads=2, sequence=12, batch=3, vocabulary=29)
CPU = torch.device("cpu")
TINY_ARGUMENTS = [
    "--device",
    "cpu",
    "--width",
    "16",
    "--blocks",
    "1",
    "--heads",
    "2",
    "--sequence",
    "8",
    "--batch",
    "2",
    "--vocabulary",
    "11",
    "--matmul",
    "32",
    "--steps",
    "3",
    "--warm-up",
    "2",
    "--repeats",
    "2",
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
    chosen = parsed(*TINY_ARGUMENTS, "--skip-tests", "--output", str(tmp_path / "out"))
    assert gpu.run_command(chosen) == 0

    raw = json.loads((tmp_path / "out" / "raw.json").read_text())
    figures = raw["eager"]["figures"]
    assert raw["shape"] == {"width": 16, "blocks": 1, "heads": 2, "sequence": 8, "batch": 2, "vocabulary": 11}
    assert raw["two_stages"]["against_plain_pytorch"] == {"bit_equal": True, "relative_difference": 0.0}
    assert raw["waits"] == {"found": None}
    assert raw["eager"]["peak_memory_bytes"] is None
    assert raw["eager"]["saved_activation_bytes_peak"] > 0
    assert len(figures["step_ms"]) == 2
    assert all(0 < share < 1 for share in figures["critic_time_share"])
    readme = (tmp_path / "out" / "README.md").read_text()
    assert raw["command"] in readme
    for part in ("torch: ", "stage, eager: tokens/s", "critic's share of FLOPs", "| bit-equal |"):
        assert part in readme
    assert "two stages, joined" in capsys.readouterr().out


def test_flops_are_what_pytorch_counts():
    """With attention in plain matrix products, of which FlopCounterMode knows backward too: equal to the last one."""
    stage = make_stage(TINY, CPU)
    (packet,) = make_packets(TINY, CPU, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.train(packet, Ends(Given([packet]), Nowhere()), lambda phase: None)
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


def test_a_wrong_pipeline_would_be_found():
    """The comparison with plain PyTorch is real: a pipeline that trains on other targets is far off."""
    run_joined = gpu_measure.run_joined

    def wrong(stages, packets):
        run_joined(stages, packets[::-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_measure, "run_joined", wrong)
        found = gpu_measure.compare_two_stages(TINY, CPU, steps=3)
    assert not found["bit_equal"]
    assert found["relative_difference"] > gpu.TOLERANCE


def test_tests_are_run_and_their_failure_counts(tmp_path):
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_it.py").write_text("def test_it():\n    assert 1 == 2\n")
    ended = gpu.run_tests(folder)
    results = {"tests": ended, "environment": {"cuda": None}}
    ((name, passed, detail),) = gpu.checks(results)
    assert (name, passed) == ("tests/gpu", False)
    assert "1 failed" in detail
    assert gpu.run_tests(None)["exit_code"] is None


def test_what_failed_is_in_the_table():
    results = {
        "shape": vars(TINY),
        "environment": {"cuda": "12", "device": "Some GPU"},
        "compiled": {"error": "NoTriton: a | b"},
        "two_stages": {
            "packets_per_second": {"plain": [1.0], "joined": [2.0]},
            "joined_over_plain": 2.0,
            "against_plain_pytorch": {"bit_equal": False, "relative_difference": 0.5},
        },
        "waits": {"found": "called a synchronizing CUDA operation"},
    }
    told = gpu.table(results)
    assert "| torch.compile | FAILED |" in told
    assert "| two stages train as plain PyTorch | FAILED | 0.5 of" in told
    assert "| FAILED | called a synchronizing CUDA operation |" in told
    assert "NoTriton: a / b" in told


@pytest.mark.parametrize("words", [["--steps", "0"], ["--width", "15"]])
def test_sizes_that_cannot_be(words):
    with pytest.raises(UsageError, match="at least 1"):
        gpu.run_command(parsed(*TINY_ARGUMENTS, *words))


def test_a_folder_name():
    assert gpu.slug("NVIDIA H200 NVL (80GB)") == "nvidia_h200_nvl_80gb"
