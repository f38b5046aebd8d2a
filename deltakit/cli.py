"""The command line: each command parses, calls one function, and prints."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from deltakit.errors import DeltaError, HubError
from deltakit.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 1 after printing one line of error to the standard error.

    Args:
        arguments: the command line without the program's name; by default that of this process.
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except DeltaError as error:
        print(f"deltakit: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deltakit", description="Deltas for any frozen PyTorch backbone.")
    parser.add_argument("--version", action="version", version=f"deltakit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="fine-tune a real backbone with every kind of delta (about two minutes)")
    demo.add_argument("--model", help="a folder or Hub id; by default the encoder that deltakit[demo] installs")
    demo.add_argument(
        "--examples", type=_positive, default=1200, help="number of training requests, at most 4,000 (%(default)s)"
    )
    demo.add_argument("--epochs", type=_positive, default=2, help="number of passes over them (%(default)s)")
    demo.add_argument("--out", type=Path, default=Path("demo-deltas"), help="where to save the deltas (%(default)s)")
    demo.add_argument("--no-full", action="store_true", help="skip full fine-tuning, the slowest run")
    demo.set_defaults(command=_demo)
    tree = commands.add_parser("show", help="print the structure of a model, without loading its weights")
    tree.add_argument("model", help="a folder or Hub id with a config.json")
    tree.add_argument("--depth", type=_positive, help="number of levels to show below the root")
    tree.set_defaults(command=_show)
    table = commands.add_parser("roles", help="print the paths of each role on a model, without loading its weights")
    table.add_argument("model", help="a folder or Hub id with a config.json")
    table.set_defaults(command=_roles)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {number}")
    return number


def _console() -> Console:
    # rich assumes 80 cells for a file or a pipe, which would cut the lines of most trees.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _demo(options: argparse.Namespace) -> None:
    from deltakit.demo.run import run

    run(
        model=options.model,
        examples=min(options.examples, 4000),
        epochs=options.epochs,
        out=options.out,
        full=not options.no_full,
        console=_console(),
    )


def _show(options: argparse.Namespace) -> None:
    from deltakit.view import show

    _console().print(show(_empty(options.model), depth=options.depth))


def _roles(options: argparse.Namespace) -> None:
    from deltakit.selection import roles

    print(roles(_empty(options.model)))


def _empty(model: str) -> Any:
    """A transformers model on the meta device, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except (OSError, ValueError, ImportError) as error:
        raise HubError(
            f"{model}: transformers cannot build a model from it: {str(error).splitlines()[0]}; pass a folder or Hub id with "
            "a config.json whose model type the installed transformers knows"
        ) from error
