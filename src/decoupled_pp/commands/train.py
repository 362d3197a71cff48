"""`dpp train`: trains a configured network, in this process or on ranks that it starts."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from decoupled_pp.commands.arguments import add_overrides, check_at_least, flag
from decoupled_pp.commands.terminal import FAILED, INTERRUPTED, USAGE, phases_shown, say
from decoupled_pp.core import environment
from decoupled_pp.core.errors import LAUNCHER_GONE, PeerError, TrainingError, UsageError

if TYPE_CHECKING:
    from decoupled_pp.settings.run import Settings


logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp train`."""
    parser.add_argument("config", help="YAML file with the settings (docs/configuration.md)")
    parser.add_argument("--strategy", help="train by a baseline instead, e.g. 1f1b (short for --set strategy=1f1b)")
    parser.add_argument("--ranks", type=int, help="start this many ranks here (default: one process for all stages)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    parser.add_argument("--overwrite", action="store_true", help="clear an existing run folder")
    parser.add_argument(
        "--max-restarts", type=int, default=0, help="start failed ranks again, from the last checkpoint"
    )
    add_overrides(parser, "override a setting, e.g. training.steps=100")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Trains in this process, or starts ranks that train; returns the exit code."""
    from decoupled_pp.settings.load import load_settings
    from decoupled_pp.training.ranks import check_ranks

    if chosen.strategy is not None:
        chosen.set.append(f"strategy={chosen.strategy}")
    settings = load_settings(chosen.config, tuple(chosen.set))
    if environment.world_size() > 1 and chosen.ranks is not None:
        raise UsageError(
            f"--ranks {chosen.ranks} starts ranks, but a launcher has already done so; leave it out",
            code="launcher-refused",
        )
    check_ranks(settings, environment.world_size() if chosen.ranks is None else chosen.ranks)
    check_at_least(chosen, max_restarts=0)
    if chosen.max_restarts and (chosen.ranks or 1) == 1:
        raise UsageError(
            f"--max-restarts {chosen.max_restarts} is for ranks that --ranks starts; give --ranks {settings.stages}, "
            "or give it to torchrun",
            code="option-without-effect",
        )
    with phases_shown():
        if chosen.ranks is not None and chosen.ranks > 1:
            return _launch(chosen, settings)
        return _train(chosen, settings)


def _train(chosen: argparse.Namespace, settings: Settings) -> int:
    """Trains as the rank that this process is."""
    logger.info("loading PyTorch")
    from decoupled_pp.commands.tables import print_outcome
    from decoupled_pp.training import watch
    from decoupled_pp.training.job import run_rank

    with _saying_how_to_go_on(chosen, settings):
        outcome = run_rank(settings, resume=chosen.resume, overwrite=chosen.overwrite)
    report = outcome.report
    if report.stopped:
        is_asked_for = report.stopped == watch.INTERRUPTED
        if outcome.rank == 0:
            again = _resuming_command(chosen, environment.world_size())
            say(f"{report.stopped} at step {report.steps}; saved. Go on with: {again}")
        elif not is_asked_for:
            say(f"rank {outcome.rank}: {report.stopped} at step {report.steps}; saved")
        return INTERRUPTED if is_asked_for else FAILED
    if outcome.rank == 0:
        print_outcome(outcome)
    return 0


def _launch(chosen: argparse.Namespace, settings: Settings) -> int:
    """Starts the ranks and waits for them."""
    from decoupled_pp.commands.launcher import launch
    from decoupled_pp.run import folder as run_folder

    # The ranks check this too, but only once they have started, which takes seconds.
    run_folder.check(settings.folder, resume=chosen.resume, overwrite=chosen.overwrite)
    logger.info("starting %d ranks", chosen.ranks)
    arguments = ["train", chosen.config, *(f"--set={override}" for override in chosen.set)]
    arguments += [flag(name) for name in ("resume", "overwrite") if getattr(chosen, name)]
    grace_seconds = settings.links.timeout_seconds
    code = launch(arguments, chosen.ranks, max_restarts=chosen.max_restarts, grace_seconds=grace_seconds)
    if code not in (0, USAGE, INTERRUPTED):
        say(_how_to_go_on(chosen, settings, chosen.ranks))
    return code


@contextmanager
def _saying_how_to_go_on(chosen: argparse.Namespace, settings: Settings) -> Iterator[None]:
    """Adds to a failure what is saved and how to go on, unless `_launch` says it once for all ranks."""
    try:
        yield
    except PeerError:
        raise
    except TrainingError as error:
        if environment.launched_by_dpp() and LAUNCHER_GONE not in str(error):
            raise
        remedy = _how_to_go_on(chosen, settings, environment.world_size())
        raise type(error)(f"{error.text}; {remedy}", code=error.code, key=error.key) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(chosen, settings, environment.world_size())) from None


def _how_to_go_on(chosen: argparse.Namespace, settings: Settings, ranks: int) -> str:
    """Names the newest checkpoint of the run, and the command that goes on from it."""
    from decoupled_pp.run.checkpoints.parts import list_checkpoints, remove_incomplete, step_of
    from decoupled_pp.run.folder import CHECKPOINTS
    from decoupled_pp.run.in_progress import running

    folder = settings.folder / CHECKPOINTS
    # Under torchrun another rank may still be writing, and a folder that this run was refused is another run's.
    if not environment.under_torchrun() and running(settings.folder) is None:
        remove_incomplete(folder)
    found = list_checkpoints(folder)
    if not found:
        return "no checkpoint was saved"
    return f"the checkpoint at step {step_of(found[-1])} is kept; go on with: {_resuming_command(chosen, ranks)}"


def _resuming_command(chosen: argparse.Namespace, ranks: int) -> str:
    """Returns the command line that goes on with this run."""
    if environment.under_torchrun() and not environment.launched_by_dpp():  # torchrun's own arguments are unknown here
        return f"the same command with --resume{' in place of --overwrite' if chosen.overwrite else ''}"
    words = ["dpp", "train", chosen.config]
    for override in chosen.set:
        words += ["--set", override]
    words += ["--ranks", str(ranks)] if ranks > 1 else []
    return shlex.join([*words, "--resume"])
