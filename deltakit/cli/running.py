"""How the function of a command runs: its errors are one line each, and other libraries print nothing."""

import errno
import gc
import inspect
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer

from deltakit.errors import DeltaError, DeltaWarning, printable

STOPPED = 128 + signal.SIGINT
"""The exit code that shells give to a program that was stopped by Ctrl-C."""
_Debug = Annotated[bool, typer.Option("--debug", help="Print the whole traceback of an error.")]


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """Returns the function of a command with the option `--debug`. An error ends it with exit code 1 and one line.

    Ctrl-C ends it with the exit code `STOPPED`.
    """

    @wraps(function)
    def run(*, debug: bool, **arguments: Any) -> None:
        with _only_own_words(), _rare_collections():
            try:
                function(**arguments)
            except (typer.Exit, typer.Abort):
                raise
            except typer.BadParameter:
                if debug:
                    traceback.print_exc()
                raise
            except KeyboardInterrupt as error:
                raise typer.Exit(STOPPED) from error
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.EPIPE:
                    raise
                if debug:
                    traceback.print_exc()
                print(f"deltakit: {_line(error)}", file=sys.stderr)
                raise typer.Exit(1) from error

    own = inspect.signature(function)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)
    return with_signature(run, own.replace(parameters=[*own.parameters.values(), option]))


def with_signature(function: Callable[..., None], signature: inspect.Signature) -> Callable[..., None]:
    """Returns the function after giving it the signature from which typer reads arguments and options."""
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return function


def _line(error: Exception) -> str:
    if isinstance(error, DeltaError):
        return " ".join(str(error).split("\\n"))
    if isinstance(error, OSError) and error.strerror:
        # Such as a full disk, or a file that the user may not read.
        return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    what = printable(next(iter(str(error).splitlines()), ""))
    return f"{type(error).__name__}: {what}; deltakit did not expect this: report it with what --debug prints"


@contextmanager
def _only_own_words() -> Iterator[None]:
    """Prints deltakit's own warnings as one line each, and nothing of other libraries."""
    # Libraries read these when they are imported.
    for name, value in {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}.items():
        os.environ.setdefault(name, value)
    # Such as torchao's, on compiled parts that do not fit this torch.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DeltaWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"deltakit: warning: {message}", file=sys.stderr)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Lets the garbage collector run at every 100,000th new object, in the place of every 700th.

    A command imports torch, whose objects stay: to walk them again and again took 0.3 of the 2.6 s of `deltakit inspect`.
    """
    before = gc.get_threshold()
    # 0 switches it off.
    gc.set_threshold(max(100_000, before[0]) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
