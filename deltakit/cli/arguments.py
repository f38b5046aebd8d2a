"""The arguments and options that several commands share, and what the shell completes in them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer


def _paths(incomplete: str) -> Iterator[str]:
    """Yields the folders and files that start like the text."""
    above, _, start = incomplete.rpartition("/")
    folder = Path(f"{above}/" if above or incomplete.startswith("/") else ".").expanduser()
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
            yield f"{incomplete.removesuffix(start)}{entry.name}{'/' if entry.is_dir() else ''}"


def not_empty(text: str) -> str:
    """Refuses an empty text, such as that of a variable of the shell that is not set."""
    if not text:
        raise typer.BadParameter("it is empty; write '.' for the working directory.")
    return text


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a Hub id or a config.json. Only the config is read, no weights.",
        autocompletion=_paths,
        callback=not_empty,
    ),
]
Delta = Annotated[
    str,
    typer.Argument(metavar="DELTA", help="A folder, a file or a Hub id.", autocompletion=_paths, callback=not_empty),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--class",
        metavar="CLASS",
        help="The class of transformers to build; by default the first of the config's architectures.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a web page, too.")]
# `deltakit.files.Written`, which cannot be imported without torch.
Format = Annotated[Literal["deltakit", "peft", "diffusers"], typer.Option("--to", help="The format to write.")]
Train = Annotated[
    list[str] | None,
    typer.Option("--train", metavar="SELECTOR", help="Modules of the model that would be trained in full, like @head."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="A branch, tag or commit of the delta's repository.")
]
Subfolder = Annotated[
    str | None,
    typer.Option("--subfolder", metavar="PATH", help="The folder or file in it that is the delta, if not at its top."),
]
