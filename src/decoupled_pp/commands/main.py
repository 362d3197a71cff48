"""The `dpp` command: train, evaluate, export, plan, bench."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from decoupled_pp import __version__
from decoupled_pp.core.errors import LAUNCHER_GONE, PeerError, TrainingError, UsageError

if TYPE_CHECKING:
    from decoupled_pp.settings.run import Settings

USAGE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 1 (training failed), 2 (bad input), 130 (Ctrl-C) or 143 (SIGTERM)."""
    from decoupled_pp.core import environment
    from decoupled_pp.training.watch import sigterm_ends

    with sigterm_ends(environment.rank()):
        code = _run(arguments)
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Run the command; what the user can mend is one line on stderr, what they cannot is a traceback."""
    from decoupled_pp.core import environment
    from decoupled_pp.training.watch import Terminated, is_termination

    rank, several = environment.rank(), environment.world_size() > 1
    try:
        chosen = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = chosen.run
        return command(chosen)
    except PeerError as error:
        if not error.fault.usage:  # bad input is said once, by the rank that found it
            fault, _, _ = str(error).partition("; ")  # that rank says the remedy
            _say(f"rank {rank}: ended because of rank {error.fault.rank}: {fault}")
        return USAGE if error.fault.usage else TERMINATED if is_termination(error.fault) else FAILED
    except UsageError as error:
        _say_once(error)
        return USAGE
    except Terminated as error:
        _say(str(error))
        return TERMINATED
    except TrainingError as error:
        _say(f"rank {rank}: {error}" if several else str(error))
        return FAILED
    except KeyboardInterrupt as error:
        if rank == 0:
            _say("; ".join(["interrupted", *map(str, error.args)]))
        return INTERRUPTED
    except Exception as error:  # of the user's own code, mostly: its traceback follows, this line says where in the run
        if where := getattr(error, "__notes__", []):
            _say(f"{'; '.join(where)}: {type(error).__name__}: {error}; its traceback follows")
        raise


def _say_once(fault: UsageError) -> None:
    """Say what is wrong with the input, unless another rank has found the same and said it."""
    from decoupled_pp.core import environment
    from decoupled_pp.links import first_to_report
    from decoupled_pp.settings.run import LinkSettings

    if environment.world_size() == 1 or first_to_report(str(fault), LinkSettings().timeout_seconds):
        _say(str(fault))


def _say(text: str) -> None:
    sys.stderr.write("dpp: " + " ".join(text.split()) + "\n")
    sys.stderr.flush()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line as with any other input."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dpp", description="Pipeline training with local critics: nothing flows back.")
    parser.add_argument("--version", action="version", version=f"dpp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a network through a decoupled pipeline")
    train.add_argument("config", help="YAML file with the settings (docs/configuration.md)")
    train.add_argument("--strategy", help="train by a baseline instead, e.g. 1f1b (short for --set strategy=1f1b)")
    train.add_argument("--ranks", type=int, help="start this many ranks here (default: one process for all stages)")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    train.add_argument("--overwrite", action="store_true", help="clear an existing run folder")
    train.add_argument("--max-restarts", type=int, default=0, help="start failed ranks again, from the last checkpoint")
    _add_overrides(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="held-out loss and accuracy of every exit of a run")
    evaluate.add_argument("folder", help="run folder")
    evaluate.add_argument(
        "--progressive",
        metavar="CONFIDENCE",
        help="leave at the first exit whose largest softmax is above this, e.g. 0.9; several: 0.8,0.9,0.95",
    )
    evaluate.add_argument("--ensemble", action="store_true", help="score the sum of all exits' logits")
    evaluate.add_argument(
        "--gradient-probe",
        type=int,
        nargs="?",
        const=8,
        default=0,
        metavar="N",
        help="cosine between local and true gradients of every stage, on N training micro-batches (default: 8)",
    )
    evaluate.add_argument("--picture", metavar="FILE", help="draw accuracy against FLOPs as a PNG")
    evaluate.add_argument("--json", metavar="FILE", help="write all of it as JSON, too")
    _add_overrides(evaluate)
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="write a run's network as plain safetensors")
    export.add_argument("folder", help="run folder")
    export.add_argument(
        "-o",
        "--output",
        required=True,
        help="file to write; of a transformers model a folder, unless it ends in .safetensors",
    )
    export.add_argument("--exit", type=int, help="a smaller network: the stages up to this one, and its critic")
    export.add_argument(
        "--tied", action="store_true", help="one weight again for embedding and output projection: the latter's"
    )
    export.set_defaults(run=_export)

    from decoupled_pp.commands import compare as comparison
    from decoupled_pp.commands import sweep
    from decoupled_pp.commands.bench import add_benchmarks
    from decoupled_pp.commands.plan.command import add_plan

    comparison.add_arguments(commands.add_parser("compare", help="train by several strategies and report on all"))
    sweep.add_arguments(commands.add_parser("sweep", help="variants of one configuration over seeds, in one table"))
    add_plan(commands.add_parser("plan", help="predict time, memory and traffic of every strategy, without running it"))
    add_benchmarks(commands.add_parser("bench", help="measure speed"))
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. training.steps=100"
    )


def _train(chosen: argparse.Namespace) -> int:
    from decoupled_pp.core import environment
    from decoupled_pp.settings.load import load_settings
    from decoupled_pp.training.job import check_ranks, run_rank

    if chosen.strategy is not None:
        chosen.set.append(f"strategy={chosen.strategy}")
    settings = load_settings(chosen.config, tuple(chosen.set))
    if environment.world_size() > 1 and chosen.ranks is not None:
        raise UsageError(f"--ranks {chosen.ranks} starts ranks, but a launcher has already done so; leave it out")
    check_ranks(settings, environment.world_size() if chosen.ranks is None else chosen.ranks)
    if chosen.max_restarts < 0:
        raise UsageError(f"--max-restarts {chosen.max_restarts} must not be below 0")
    if chosen.max_restarts and (chosen.ranks or 1) == 1:
        raise UsageError(
            f"--max-restarts {chosen.max_restarts} is for ranks that --ranks starts; give --ranks {settings.stages}, "
            "or give it to torchrun"
        )
    if chosen.ranks is not None and chosen.ranks > 1:
        return _launch_train(chosen, settings)
    with _saying_how_to_go_on(chosen, settings):
        outcome = run_rank(settings, resume=chosen.resume, overwrite=chosen.overwrite)
    if outcome.report.stopped:
        if outcome.rank == 0:
            ranks = environment.world_size()
            _say(f"{outcome.report.stopped} at step {outcome.report.steps}; saved. Go on with: {_again(chosen, ranks)}")
        return INTERRUPTED
    if outcome.rank == 0:
        from decoupled_pp.commands.tables import print_outcome

        print_outcome(outcome)
    return 0


@contextmanager
def _saying_how_to_go_on(chosen: argparse.Namespace, settings: Settings) -> Iterator[None]:
    """A failure in here ends with what is saved and how to go on, unless `_launch_train` says it for all ranks."""
    from decoupled_pp.core import environment

    try:
        yield
    except PeerError:
        raise
    except TrainingError as error:
        if environment.launched_by_dpp() and LAUNCHER_GONE not in str(error):
            raise
        raise type(error)(f"{error}; {_how_to_go_on(chosen, settings, environment.world_size())}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(chosen, settings, environment.world_size())) from None


def _how_to_go_on(chosen: argparse.Namespace, settings: Settings, ranks: int) -> str:
    """The newest checkpoint of the run, and the command that goes on from it."""
    from decoupled_pp.core import environment
    from decoupled_pp.run.checkpoints.parts import list_checkpoints, remove_incomplete, step_of
    from decoupled_pp.run.folder import CHECKPOINTS

    folder = settings.folder / CHECKPOINTS
    if not environment.under_torchrun():  # else another rank may still be writing
        remove_incomplete(folder)
    found = list_checkpoints(folder)
    if not found:
        return "no checkpoint was saved"
    return f"the checkpoint at step {step_of(found[-1])} is kept; go on with: {_again(chosen, ranks)}"


def _again(chosen: argparse.Namespace, ranks: int) -> str:
    """The command line that goes on with this run."""
    from decoupled_pp.core import environment

    if environment.under_torchrun() and not environment.launched_by_dpp():  # we do not know that command
        return f"the same command with --resume{' in place of --overwrite' if chosen.overwrite else ''}"
    words = ["dpp", "train", chosen.config, *(word for override in chosen.set for word in ("--set", override))]
    return shlex.join([*words, *(["--ranks", str(ranks)] if ranks > 1 else []), "--resume"])


def _launch_train(chosen: argparse.Namespace, settings: Settings) -> int:
    from decoupled_pp.commands.launcher import launch
    from decoupled_pp.run import folder as run_folder

    run_folder.check(settings.folder, resume=chosen.resume, overwrite=chosen.overwrite)  # sooner than the ranks can
    arguments = ["train", chosen.config, *(f"--set={override}" for override in chosen.set)]
    arguments += [flag for flag, given in (("--resume", chosen.resume), ("--overwrite", chosen.overwrite)) if given]
    grace_seconds = settings.links.timeout_seconds
    code = launch(arguments, chosen.ranks, max_restarts=chosen.max_restarts, grace_seconds=grace_seconds)
    if code not in (0, USAGE, INTERRUPTED):
        _say(_how_to_go_on(chosen, settings, chosen.ranks))
    return code


def _evaluate(chosen: argparse.Namespace) -> int:
    from decoupled_pp.commands.evaluate.finished_run import evaluate_run
    from decoupled_pp.commands.tables import print_evaluation
    from decoupled_pp.core.records import write_json
    from decoupled_pp.run.plots import plot_exits

    try:
        thresholds = [float(one) for one in chosen.progressive.split(",")] if chosen.progressive else []
    except ValueError:
        raise UsageError(f"--progressive {chosen.progressive!r} must be confidences such as 0.8,0.9") from None
    if chosen.gradient_probe < 0:
        raise UsageError(f"--gradient-probe {chosen.gradient_probe} must be a number of micro-batches")
    found = evaluate_run(
        Path(chosen.folder),
        tuple(chosen.set),
        _say,
        thresholds=thresholds,
        together=chosen.ensemble,
        gradients=chosen.gradient_probe,
    )
    print_evaluation(found)
    if chosen.json is not None:
        text = write_json(dataclasses.asdict(found), indent=2)
        Path(chosen.json).write_text(text + "\n", encoding="utf-8")
        print(chosen.json)
    if chosen.picture is not None:
        scored = [(c.flops, e.val_accuracy) for c, e in zip(found.costs, found.exits, strict=True)]
        early = [(row.flops, row.accuracy, row.threshold) for row in found.progressive]
        plot_exits([(x, y) for x, y in scored if y is not None], early, Path(chosen.picture))
        print(chosen.picture)
    return 0


def _export(chosen: argparse.Namespace) -> int:
    from decoupled_pp.commands.evaluate.finished_run import exit_module, export_folder
    from decoupled_pp.run.checkpoints.parts import export_safetensors

    if chosen.exit is not None and chosen.tied:
        raise UsageError("--tied goes with the whole network, not with --exit; leave one of the two out")
    if chosen.exit is not None:
        export_safetensors(exit_module(chosen.folder, chosen.exit), Path(chosen.output))
    else:
        export_folder(Path(chosen.folder), Path(chosen.output), tied=chosen.tied)
    print(chosen.output)
    return 0
