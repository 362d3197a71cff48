"""`dpp sample`: continues a text with the language model of a run or of an export."""

from __future__ import annotations

import argparse
import sys

from decoupled_pp.commands.arguments import check_at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp sample`."""
    parser.add_argument("folder", help="run folder, or a folder that dpp export wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate; default: 200")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="softmax temperature, 0: the likeliest token; default: 0.8"
    )
    parser.add_argument("--top-k", type=int, help="choose among this many likeliest tokens; default: among all")
    parser.add_argument("--seed", type=int, default=0, help="of the choices; default: 0")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Prints the prompt and its continuation."""
    check_at_least(chosen, tokens=1, temperature=0, seed=0)
    if chosen.top_k is not None:
        check_at_least(chosen, top_k=1)
    import torch

    from decoupled_pp.core.threads import choose_threads
    from decoupled_pp.models.generation import generate
    from decoupled_pp.run.saved import load, open_saved

    info = open_saved(chosen.folder).with_text()
    assert info.encode is not None and info.decode is not None  # `with_text` sees to it
    torch.set_num_threads(choose_threads(None, 1).count)
    prompt = info.encode(chosen.prompt)
    generator = torch.Generator().manual_seed(chosen.seed)
    module = load(chosen.folder)
    made = generate(module, prompt, chosen.tokens, info.shape[0], chosen.temperature, generator, chosen.top_k)
    sys.stdout.write(info.decode(prompt + made) + "\n")
    return 0
