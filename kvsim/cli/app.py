"""The program, its shared arguments, and what an error looks like to the user."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.errors import ConfigError, KvsimError

if TYPE_CHECKING:
    from kvsim.trace.access import Trace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Replay real attention through a simulated memory hierarchy, against published cache policies.\n\n"
    "Example: kvsim run demo --policy h2o --budget 20%",
)
trace_app = typer.Typer(no_args_is_help=True, help="Look at, export and check traces.", rich_markup_mode=None)
app.add_typer(trace_app, name="trace")

TraceArg = Annotated[
    str, typer.Argument(metavar="TRACE", help='A .kvtrace folder, or "demo" for the one that comes with kvsim.')
]
Out = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write.")]
INTERRUPTED = 130


def main() -> None:
    """Entry point: errors of input end in three lines and exit code 2, an interrupt in 130."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(args=arguments, standalone_mode=False)
    except KvsimError as error:
        if debug:
            raise
        code = 2
        _fail(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:  # usage errors are click's, which typer may carry with it
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            code = 2
        elif type(error).__name__ == "Abort":  # what typer makes of an interrupt
            code = INTERRUPTED
        elif isinstance(error, MemoryError) and not debug:
            code = 2
            what = f"there is not enough memory: {str(error) or type(error).__name__}"
            _fail(ConfigError(what, hint="a parameter, a budget or a page size may be far too large"))
        elif "no locator available" in str(error) and not debug:  # numba's words, when it has no place to write to
            code = 2
            what = "compiled code cannot be kept: neither kvsim's own folder nor the home folder is writable"
            _fail(ConfigError(what, hint="set NUMBA_CACHE_DIR to a folder that is"))
        else:
            raise
    if code == INTERRUPTED:  # typer makes this code of most interrupts
        typer.echo("interrupted; nothing is left half-written", err=True)
    sys.exit(code or 0)


def _fail(error: KvsimError) -> None:
    typer.echo(f"error: {error.what}", err=True)
    for line in (error.where and f"in {error.where}", error.hint):
        if line:
            typer.echo(f"  {line}", err=True)


def open_named(name: str) -> Trace:
    from kvsim.trace import open_trace

    return open_trace(name)


def say_problems(problems: list[str], otherwise: str) -> None:
    """Print what is broken and end with exit code 2, or that nothing is."""
    for problem in problems:
        typer.echo(f"broken: {problem}")
    if problems:
        raise typer.Exit(2)
    typer.echo(otherwise)
