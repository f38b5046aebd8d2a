"""The command line: each command parses, calls one function, and prints."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from deltakit.errors import DeltaError, HubError, OptionError
from deltakit.files import Written, is_repository
from deltakit.version import __version__

_UNBUILDABLE = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What transformers raises for a config that it cannot read or build a model from: config.json may hold anything."""


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
    methods = commands.add_parser("methods", help="print the methods: what they change, where, and what they can do")
    methods.add_argument("names", nargs="*", metavar="NAME", help="only these, such as lora; by default all")
    methods.set_defaults(command=_methods)
    _add_file_commands(commands)
    return parser


def _add_file_commands(commands: Any) -> None:
    contents = commands.add_parser("inspect", help="print what a saved delta is, of any format that deltakit reads")
    contents.add_argument("delta", help="a folder, file or Hub id")
    contents.set_defaults(command=_inspect)
    other = commands.add_parser("convert", help="write a saved delta in the format of another library")
    other.add_argument("delta", help="a folder, file or Hub id")
    other.add_argument("out", type=Path, help="the folder to write")
    other.add_argument("--to", required=True, choices=get_args(Written), help="the format to write")
    other.add_argument("--model", help="a folder or Hub id of the backbone; by default the one that the delta names")
    other.add_argument(
        "--class", dest="kind", help="the class of transformers that the backbone has, if its config names another"
    )
    other.set_defaults(command=_convert)
    for command in (contents, other):
        command.add_argument("--revision", help="a branch, tag or commit of the Hub repository")
        command.add_argument("--subfolder", help="the folder or file in it that is the delta, if it is not at the top")


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


def _methods(options: argparse.Namespace) -> None:
    from deltakit.delta import method_rows
    from deltakit.view import MethodTable

    _console().print(MethodTable(method_rows(options.names)), soft_wrap=True)


def _inspect(options: argparse.Namespace) -> None:
    from deltakit.delta import inspect

    print(inspect(options.delta, revision=options.revision, subfolder=options.subfolder))


def _convert(options: argparse.Namespace) -> None:
    from deltakit.delta import convert, inspect
    from deltakit.files import Access, find_folder

    found = inspect(options.delta, revision=options.revision, subfolder=options.subfolder)
    if options.kind is not None and _class_of(options.kind) is None:
        raise OptionError(
            f"--class {options.kind}: transformers has no model of that name; use one such as BertForSequenceClassification"
        )
    model = options.model or found.base
    if model is None:
        raise OptionError(f"{options.delta} does not say which model it is for; add --model with a folder or Hub id")
    place = find_folder(options.delta, Access(revision=options.revision, subfolder=options.subfolder))
    folder = convert(
        place, options.out, _empty(model, options.kind or found.base_class or "*"), to=options.to, where=found.source
    )
    print(f"{found.source} ({found.format}) is now in {folder} ({options.to})")


def _empty(model: str, architecture: str | None = None) -> Any:
    """A transformers model on the meta device, without its weights.

    Args:
        architecture: the name of its class, "*" for the one that its config names; None for the model without a head.

    Raises:
        HubError: if there is no config, or transformers cannot build a model from it.
        OptionError: if the class is one of another kind of model.
    """
    import torch
    import transformers

    if not is_repository(model) and not Path(model).exists():
        raise HubError(f"{model}: no such folder, and this is not a Hub id such as 'user/model'; check the path")
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        if architecture == "*":
            architecture = next(iter(config.architectures or ()), None)
        named = _class_of(architecture or "")
        if named is None or isinstance(config, named.config_class or object):
            with torch.device("meta"):
                return transformers.AutoModel.from_config(config) if named is None else named(config)
    except _UNBUILDABLE as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise HubError(
            f"{model}: transformers cannot build a model from it: {why}; pass a folder or Hub id with a config.json whose "
            "model type the installed transformers knows"
        ) from error
    raise OptionError(
        f"{model}: its config is a {type(config).__name__}, and {architecture} needs a {named.config_class.__name__}; pass "
        "the delta's own backbone as --model, and its class as --class"
    )


def _class_of(name: str) -> Any:
    """Returns the class of transformers' models that has this name, or None. The name may come from a file."""
    import transformers

    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None
