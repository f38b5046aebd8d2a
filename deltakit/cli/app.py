"""The program: its commands, and what it says of a command line that it cannot read."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import typer
from rich.markup import escape

from deltakit.cli import catalogue, saved, structure, trying
from deltakit.cli.method_options import with_methods
from deltakit.cli.running import STOPPED, guarded
from deltakit.errors import did_you_mean
from deltakit.version import __version__


class _Command(NamedTuple):
    """A command: its function, whose docstring is its help, and lines that show its use."""

    name: str
    run: Callable[..., None]
    examples: Sequence[str]


_LOOKING = (
    _Command(
        "show",
        with_methods(structure.show),
        (
            "show meta-llama/Llama-3.2-1B",
            "show my-model --depth 3 --html tree.html",
            'show my-model --filter "@attn.q"',
            'show my-model --lora "@attn.q"',
        ),
    ),
    _Command(
        "plan",
        with_methods(structure.plan),
        (
            "plan my-model --lora default",
            'plan my-model --lora "@attn.{q,v}" --adapter "@ff" --set lora.r=16',
            'plan my-model --lora "layers.{0-11}/@attn.q" --train "@head" --json',
        ),
    ),
    _Command("targets", structure.targets, ("targets my-model", "targets my-model --json")),
    _Command("roles", structure.roles, ("roles my-model", "roles bert-base-uncased --json")),
    _Command("pick", structure.pick, ("pick my-model", "pick meta-llama/Llama-3.2-1B --how browser --port 8123")),
    _Command("methods", catalogue.methods, ("methods", "methods lora adapter --json")),
)
_SAVED = (
    _Command("inspect", saved.inspect, ("inspect my-delta", "inspect user/loras --subfolder style --json")),
    _Command(
        "convert",
        saved.convert,
        ("convert my-delta my-adapter --to peft", "convert user/adapter my-delta --to deltakit --model my-model"),
    ),
    _Command("merge", saved.merge, ("merge my-model my-delta merged", "merge bert-base-uncased user/my-delta merged")),
    _Command(
        "push", saved.push, ("push my-delta user/my-delta", 'push my-delta user/my-delta --private --message "v2"')
    ),
)
_TRYING = (
    _Command("demo", trying.demo, ("demo", "demo --html demo.html", "demo --model my-encoder --examples 400")),
    _Command(
        "compare",
        trying.compare,
        (
            "compare my-encoder reviews.csv",
            "compare my-encoder reviews.tsv --text review --label stars --methods lora,ia3",
            "compare my-encoder reviews.csv --seeds 3 --html report.html",
        ),
    ),
)
_PANELS = {"Models and methods": _LOOKING, "Saved deltas": _SAVED, "Trying it out": _TRYING}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: fine. 1: a model, a file, the network or this machine is not as the command needs it, or a check fails. 2: the command
    line is wrong, whatever the files are: an unknown name, a bad value, options that contradict each other. A selector that
    matches nothing is 1, because another model may have it. With 1 and 2 the standard error says why, in one line; only
    without a command there is the help on the standard output. 130: Ctrl-C.

    Args:
        arguments: the command line without the program's name; by default that of this process.
    """
    command = typer.main.get_command(program())
    try:
        code = command.main(
            args=None if arguments is None else list(arguments), prog_name="deltakit", standalone_mode=False
        )
    except typer.Abort:
        print("deltakit: stopped", file=sys.stderr)
        return 1
    except Exception as error:
        # Releases of typer have this error in different modules, and export only one of the classes derived from it.
        if not hasattr(error, "format_message"):
            raise
        print(f"deltakit: {_unreadable(error)}", file=sys.stderr)
        return 2
    if code == STOPPED:
        # typer ends with it, too, without a line, where Ctrl-C comes before the command.
        print("\ndeltakit: stopped", file=sys.stderr)
    return code if isinstance(code, int) else 0


def program() -> typer.Typer:
    """Returns the program with all commands."""
    app = typer.Typer(
        help="Attaches small trainable deltas (LoRA, adapters, prompts and others) to frozen PyTorch models.",
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_start)
    for panel, commands in _PANELS.items():
        for name, run, examples in commands:
            lines = "\n\n".join(f"  deltakit {escape(example)}" for example in examples)
            app.command(name, epilog=f"Examples:\n\n{lines}", rich_help_panel=panel)(guarded(run))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"deltakit {__version__}")
        raise typer.Exit()


def _start(
    context: typer.Context,
    _: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        # With rich, typer prints the help itself and returns "".
        print(context.get_help(), end="")
        raise typer.Exit(2)


def _unreadable(error: Exception) -> str:
    """Returns what to say of a command line that typer cannot read."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "deltakit"
    options = getattr(error, "possibilities", None)
    # typer's own words list all similar options.
    message = getattr(error, "message", "") if options else error.format_message()  # type: ignore[attr-defined]
    hint = did_you_mean(getattr(error, "option_name", ""), options or ())
    line = " ".join(f"{message.rstrip('.') if hint else message}{hint}".split())
    return f"{line}{'' if line.endswith(('.', '?')) else '.'} See {command} --help"
