"""Prints the results of `dpp evaluate` as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from decoupled_pp.commands.evaluate.exits import Evaluation
from decoupled_pp.commands.tables import percent, score_cells


def print_evaluation(found: Evaluation) -> None:
    """Prints scores and costs of the exits; early exit, the ensemble of exits and the gradient probe if asked for."""
    console = Console()
    console.print(_costs_table(found))
    if found.progressive:
        console.print(_early_exit_table(found))
    if found.ensemble is not None:
        accuracy = percent(found.ensemble.accuracy)
        console.print(f"ensemble of all exits: held-out loss {found.ensemble.loss:.4f}, accuracy {accuracy} %")
    if found.depth is not None:
        console.print(found.depth.text, highlight=False, soft_wrap=True)
    if found.cosines:
        console.print(_gradients_table(found))


def _costs_table(found: Evaluation) -> Table:
    """Returns one row per exit: its scores, and what it costs to leave there."""
    table = Table("exit", "judged by", "held-out loss", "accuracy %", "parameters", "MFLOPs/sample")
    for one, cost in zip(found.exits, found.costs, strict=True):
        cells = score_cells(one, last=one is found.exits[-1])
        table.add_row(*cells, f"{cost.parameters:,}", _mega(cost.flops))
    return table


def _early_exit_table(found: Evaluation) -> Table:
    """Returns one row per confidence above which samples leave."""
    table = Table("confidence", "accuracy %", "MFLOPs/sample", "of the whole network", "leave per exit, %")
    for row in found.progressive:
        table.add_row(
            f"{row.threshold:g}",
            percent(row.accuracy),
            _mega(row.flops),
            f"{100 * row.share_of_flops:.1f} %",
            " / ".join(f"{100 * share:.1f}" for share in row.left),
        )
    return table


def _gradients_table(found: Evaluation) -> Table:
    """Returns one row per stage: how its local gradient lies to the true one."""
    table = Table("stage", "cosine of local and true gradient", "least .. greatest", "norm, local / true")
    for one in found.cosines:
        table.add_row(str(one.stage), f"{one.mean:.3f}", f"{one.low:.3f} .. {one.high:.3f}", f"{one.norm_ratio:.2f}")
    return table


def _mega(flops: float) -> str:
    return f"{flops / 1e6:,.2f}"
