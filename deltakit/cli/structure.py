"""Commands on the structure of a model: its tree, plans, names and roles. None loads its weights."""

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deltakit.cli.arguments import Html, Json, Kind, Model, Train
from deltakit.cli.models import empty
from deltakit.cli.printing import as_json, present

if TYPE_CHECKING:
    from deltakit.core import Method

_How = Annotated[
    Literal["auto", "terminal", "browser"],
    typer.Option("--how", help="Where to show the modules; by default in the terminal if it can, else in the browser."),
]
_Port = Annotated[
    int,
    typer.Option("--port", min=0, max=65535, help="The port of this machine for the browser; 0 for one that is free."),
]
_Depth = Annotated[int | None, typer.Option("--depth", min=1, help="The number of levels to show below the root.")]

_Filter = Annotated[
    list[str] | None,
    typer.Option("--filter", metavar="SELECTOR", help="Show only what this selects, and the modules around it."),
]


def show(
    model: Model,
    *,
    methods: "tuple[Method, ...]",
    depth: _Depth = None,
    filter: _Filter = None,
    train: Train = None,
    kind: Kind = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Print the structure of a model as a tree, with equal parts folded.

    With a method, such as --lora "@attn.q", the tree has the delta that it would add.
    """
    from deltakit.delta import attach
    from deltakit.view import show as tree

    if train and not methods:
        raise typer.BadParameter(
            "--train: the tree shows what a delta would train; add a method, such as --lora default."
        )
    backbone = empty(model, kind)
    if methods:
        attach(backbone, *methods, train=train or ())
    view = tree(backbone, depth=depth, filter=filter or None)
    present(view, view.to_dict(), title=f"{type(backbone).__name__} of {model}", json=json, html=html)


def plan(
    model: Model,
    *,
    methods: "tuple[Method, ...]",
    train: Train = None,
    kind: Kind = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Print what methods would attach to a model: targets and numbers of parameters. It changes nothing.

    A selector that matches nothing is an error that lists similar names.
    """
    from deltakit.delta import plan as planned

    if not methods:
        raise typer.BadParameter("no method is given; add one or several, such as --lora default or --lora '@attn.q'.")
    found = planned(empty(model, kind), *methods, train=train)
    present(found, found.to_dict(), title=f"A plan for {model}", json=json, html=html)


def targets(model: Model, *, kind: Kind = None, json: Json = False, html: Html = None) -> None:
    """Print the names that modules with weights have, which are what selectors name: type, count, shape and where."""
    from deltakit.measuring import targets as census

    found = census(empty(model, kind))
    present(found, found.to_dict(), title=f"Targets in {model}", json=json, html=html)


def roles(model: Model, *, kind: Kind = None, json: Json = False, html: Html = None) -> None:
    """Print the modules of each role, such as @attn.q, on a model."""
    from deltakit.selection import roles as found

    table = found(empty(model, kind))
    data = {
        "backbone": table.owner,
        "roles": {role: list(paths) for role, paths in table.items()},
        "untold": table.untold,
    }
    present(table, data, title=f"Roles on {model}", json=json, html=html)


def pick(model: Model, *, how: _How = "auto", port: _Port = 0, kind: Kind = None, json: Json = False) -> None:
    """Choose modules of a model by ticking them, and print a line of Python that selects exactly these.

    Nothing else is printed on the standard output. If nothing was picked, the exit code is 1.
    """
    from deltakit.picking import picked

    if port and how == "terminal":
        raise typer.BadParameter("--port: only the browser has a port; leave it out, or write --how browser.")
    found = picked(empty(model, kind), how=how, port=port)
    if found is None:
        print("deltakit: nothing was picked", file=sys.stderr)
        raise typer.Exit(1)
    print(as_json({"names": found.names, "selectors": found.selectors, "line": found.line}) if json else found.line)
