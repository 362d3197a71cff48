"""The `dpp` command: the table of its subcommands, its exit codes, and faults in one line."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from io import TextIOWrapper

from decoupled_pp import __version__
from decoupled_pp.commands.subcommands import Parser, Subcommand
from decoupled_pp.commands.terminal import FAILED, INTERRUPTED, TERMINATED, USAGE, say
from decoupled_pp.core import environment, threads
from decoupled_pp.core.errors import PeerError, ReportedError, UsageError, text_of
from decoupled_pp.core.waiting import end_at_once

_ROOM = "decoupled_pp.commands"
SUBCOMMANDS = (
    Subcommand("train", "train a network through a decoupled pipeline", f"{_ROOM}.train"),
    Subcommand("evaluate", "held-out loss and accuracy of every exit of a run", f"{_ROOM}.evaluate.command"),
    Subcommand("export", "write a run's network as plain safetensors", f"{_ROOM}.export"),
    Subcommand("sample", "continue a text with a run's language model", f"{_ROOM}.sample"),
    Subcommand("compare", "train by several strategies and report on all", f"{_ROOM}.compare.command"),
    Subcommand("sweep", "variants of one configuration over seeds, in one table", f"{_ROOM}.sweep.command"),
    Subcommand("plan", "predict time, memory and traffic of every strategy, without running it", f"{_ROOM}.plan"),
    Subcommand("bench", "measure speed", f"{_ROOM}.bench"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 0, 1 (training failed), 2 (bad input), 130 (Ctrl-C) or 143 (SIGTERM)."""
    if isinstance(sys.stdout, TextIOWrapper):  # a path may hold letters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _run(sys.argv[1:] if arguments is None else arguments)
    if code and environment.reaches_others():
        end_at_once(code)
    sys.exit(code)


def build_parser(words: Collection[str] | None = None) -> Parser:
    """Builds the parser; subcommands that are not among the words of the command line have no arguments yet."""
    parser = Parser(prog="dpp", description="Pipeline training with local critics: nothing flows back.", words=words)
    parser.add_argument("--version", action="version", version=f"dpp {__version__}")
    parser.add_table(SUBCOMMANDS, metavar="COMMAND")
    return parser


def _run(words: Sequence[str]) -> int:
    """Runs the command and returns its exit code; a fault that the user cannot mend keeps its traceback."""
    if "torch" not in sys.modules:  # else a script called us, and may have told its torch how many threads to take
        threads.own_process.set()
    with ExitStack() as signals:
        try:
            chosen = build_parser(words).parse(words)  # --help ends here, before torch is imported
            from decoupled_pp.training.watch import sigterm_ends

            # Until the end of this block, so that SIGTERM does not cut a failing rank's last words short.
            signals.enter_context(sigterm_ends(environment.rank()))
            return int(chosen.run(chosen))
        except ReportedError as error:
            error.speak({})  # deeper layers may have set a script's names; here settings have their keys
            return _report(error)
        except KeyboardInterrupt as error:
            if environment.rank() == 0:
                say("; ".join(["interrupted", *map(str, error.args)]))
            return INTERRUPTED
        except Exception as error:
            # Mostly an error of the user's own code: its traceback follows, this line says where in the run it was.
            if notes := getattr(error, "__notes__", []):
                say(f"{'; '.join(notes)}: {type(error).__name__}: {text_of(error)}; its traceback follows")
            raise


def _report(error: ReportedError) -> int:
    """Says a fault in one line, and returns the exit code."""
    if isinstance(error, UsageError):
        if _is_first_to_find(error):
            say(str(error))
        return USAGE
    from decoupled_pp.training.watch import Terminated

    if isinstance(error, PeerError):
        return _report_peer(error)
    if isinstance(error, Terminated):
        say(str(error))
        return TERMINATED
    several = environment.world_size() > 1
    say(f"rank {environment.rank()}: {error}" if several else str(error))
    return FAILED


def _report_peer(error: PeerError) -> int:
    """Says that another rank's fault ended this one; bad input and the remedy are left to the rank that found it."""
    from decoupled_pp.training.watch import is_termination

    if error.fault.usage:
        return USAGE
    fault, _, _ = str(error).partition("; ")
    say(f"rank {environment.rank()}: ended because of rank {error.fault.rank}: {fault}")
    if error.fault.code == "interrupted":
        return INTERRUPTED
    return TERMINATED if is_termination(error.fault) else FAILED


def _is_first_to_find(fault: UsageError) -> bool:
    """Returns whether no other rank has reported bad input yet."""
    if not environment.reaches_others():
        return True
    from decoupled_pp.links import first_to_report
    from decoupled_pp.settings.run import LinkSettings

    return first_to_report(str(fault), LinkSettings().timeout_seconds)
