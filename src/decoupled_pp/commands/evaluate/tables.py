"""The tables that `dpp evaluate` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from decoupled_pp.commands.evaluate.exits import Evaluation
from decoupled_pp.commands.tables import judge_of, shown


def print_evaluation(found: Evaluation, console: Console | None = None) -> None:
    """Prints scores and costs of the exits, and early exit, the ensemble and gradients if they were asked for."""
    console = console or Console()
    console.print(_exits(found))
    if found.progressive:
        console.print(_early_exits(found))
    if found.ensemble is not None:
        accuracy = shown(found.ensemble.accuracy, ".2f", 100)
        console.print(f"all exits together: held-out loss {found.ensemble.loss:.4f}, accuracy {accuracy} %")
    if found.cosines:
        console.print(_gradients(found))


def _exits(found: Evaluation) -> Table:
    table = Table("exit", "judged by", "held-out loss", "accuracy %", "parameters", "MFLOPs/sample")
    for one, cost in zip(found.exits, found.costs, strict=True):
        table.add_row(
            str(one.stage),
            judge_of(one, found.exits),
            shown(one.val_loss, ".4f"),
            shown(one.val_accuracy, ".2f", 100),
            f"{cost.parameters:,}",
            f"{cost.flops / 1e6:,.2f}",
        )
    return table


def _early_exits(found: Evaluation) -> Table:
    table = Table("leaves above", "accuracy %", "MFLOPs/sample", "of the whole network", "leave at exit, %")
    for row in found.progressive:
        table.add_row(
            f"{row.threshold:g}",
            f"{100 * row.accuracy:.2f}",
            f"{row.flops / 1e6:,.2f}",
            f"{100 * row.share_of_flops:.1f} %",
            " / ".join(f"{100 * share:.1f}" for share in row.left),
        )
    return table


def _gradients(found: Evaluation) -> Table:
    table = Table("stage", "cosine of local and true gradient", "least .. greatest", "norm, local / true")
    for cosine in found.cosines:
        span = f"{cosine.low:.3f} .. {cosine.high:.3f}"
        table.add_row(str(cosine.stage), f"{cosine.mean:.3f}", span, f"{cosine.norm_ratio:.2f}")
    return table
