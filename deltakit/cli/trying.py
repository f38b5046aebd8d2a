"""Commands that train: the demo, and comparing methods on the user's own texts."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deltakit.cli.arguments import Html, Json, not_empty
from deltakit.cli.method_lines import known_method
from deltakit.cli.models import readable
from deltakit.cli.printing import as_json, check_place, console, write_page
from deltakit.errors import warn

_Model = Annotated[
    str | None,
    typer.Option("--model", help="A folder or Hub id; by default the encoder that deltakit[demo] installs."),
]
_Out = Annotated[Path, typer.Option("--out", help="Where to save the deltas.")]
_NoFull = Annotated[bool, typer.Option("--no-full", help="Leave out full fine-tuning, the slowest run.")]


def demo(
    *,
    model: _Model = None,
    examples: Annotated[int, typer.Option(min=1, help="The number of training requests, at most 4,000.")] = 900,
    epochs: Annotated[int, typer.Option(min=1, help="The number of passes over them.")] = 2,
    out: _Out = Path("demo-deltas"),
    no_full: _NoFull = False,
    json: Json = False,
    html: Html = None,
) -> None:
    """Fine-tune a real encoder with every kind of delta, and compare them (about two minutes)."""
    from deltakit.demo.run import bundled_model, prepare, run

    check_place("--html", html)
    check_place("--out", out, is_folder=True)
    place = model or bundled_model()
    with readable(place):
        task = prepare(place, examples)
        task.fresh()
    if len(task.train) < examples:
        warn(f"--examples {examples}: there are {len(task.train):,} training requests, all are used")
    report = run(
        task,
        model=shlex.quote(place),
        epochs=epochs,
        out=out,
        full=not no_full,
        console=_console(json),
    )
    if json:
        print(as_json(report.data()))
    if html is not None:
        write_page(html, report.html())


def compare(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder or a Hub id of an encoder or a decoder.", callback=not_empty),
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A CSV file, or a TSV file, with a line of column names.")
    ],
    *,
    text: Annotated[str, typer.Option(help="The column of the texts.")] = "text",
    label: Annotated[str, typer.Option(help="The column of the labels.")] = "label",
    methods: Annotated[
        str, typer.Option(help="The methods to compare, separated by commas.")
    ] = "lora,adapter,bitfit,ia3",
    epochs: Annotated[int, typer.Option(min=1, help="The number of passes over the texts.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="How often each method is trained, with other start values.")] = 1,
    test: Annotated[
        float, typer.Option("--held-out", min=0.01, max=0.9, help="The share of the rows that is held out.")
    ] = 0.2,
    out: Annotated[Path | None, typer.Option("--out", help="Where to save the deltas; by default nowhere.")] = None,
    no_full: _NoFull = False,
    json: Json = False,
    html: Html = None,
) -> None:
    """Compare methods on your own labelled texts: accuracy on held-out rows, parameters and time."""
    from deltakit.demo.comparing import compare as compared
    from deltakit.demo.own_texts import held_out, labels_of, read_texts
    from deltakit.demo.recipes import recipes_of
    from deltakit.demo.task import task_of

    names = [known_method(name.strip()) for name in methods.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("--methods: no method is named; write some, such as --methods lora,adapter.")
    if text == label:
        raise typer.BadParameter(f"--text and --label: both are {text!r}; name two columns.")
    check_place("--html", html)
    check_place("--out", out, is_folder=True)
    recipes = recipes_of(names, full=not no_full)
    for method in (method for recipe in recipes for method in recipe.methods if method.weighed):
        raise typer.BadParameter(f"--methods: {method.name} weighs other deltas, so it cannot be compared on its own.")
    rows = read_texts(data, text=text, label=label)
    learn, kept = held_out(rows, test)
    with readable(model):
        task = task_of(model, learn, kept, labels_of(rows))
        task.fresh()
    report = compared(
        task,
        recipes,
        model=shlex.quote(model),
        data=data.name,
        epochs=epochs,
        seeds=seeds,
        out=out,
        console=_console(json),
    )
    if json:
        print(as_json(report.data()))
    if html is not None:
        write_page(html, report.html())


def _console(json: bool) -> Console:
    """Returns the console of the standard output, or, if that gets JSON, of the standard error."""
    return Console(stderr=True, highlight=False) if json else console()
