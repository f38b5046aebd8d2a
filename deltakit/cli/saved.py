"""Commands on saved deltas: what they are, other formats, merged models, and the Hub."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from deltakit.cli.arguments import Delta, Format, Html, Json, Kind, Revision, Subfolder, not_empty
from deltakit.cli.models import class_of, empty, loaded, readable
from deltakit.cli.printing import present
from deltakit.errors import CheckpointError, OptionError

_COMPANIONS = (
    *(
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.model",
        "chat_template*",
    ),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
"""The files beside a model's weights that turn texts, images and sounds into its inputs."""


def inspect(
    delta: Delta, *, revision: Revision = None, subfolder: Subfolder = None, json: Json = False, html: Html = None
) -> None:
    """Print what a saved delta is, of any format that deltakit reads: methods, options, targets and size."""
    from deltakit.delta import inspect as inspected

    found = inspected(delta, revision=revision, subfolder=subfolder)
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in found.tensors.items()
    }
    data = {
        **{name: getattr(found, name) for name in ("source", "format", "name", "base", "base_class")},
        "methods": [
            {"name": m.name, "options": dict(m.options), "targets": list(m.targets), "values": m.num_values}
            for m in found.methods
        ],
        "fully_trained": list(found.fully_trained),
        "values": found.num_values,
        "bytes": found.num_bytes,
        "notes": list(found.notes),
        "tensors": tensors,
    }
    present(found, data, title=f"The delta in {found.source}", json=json, html=html)


def convert(
    delta: Delta,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    *,
    to: Format,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A folder or Hub id of the backbone; by default the one that the delta names."),
    ] = None,
    kind: Kind = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
) -> None:
    """Write a saved delta in the format of another library. Of its model it reads only the config."""
    from deltakit.delta import convert as converted
    from deltakit.delta import inspect as inspected
    from deltakit.files import Access, find_folder

    found = inspected(delta, revision=revision, subfolder=subfolder)
    model = model or found.base
    if model is None:
        raise OptionError(f"{delta} does not say which model it is for; add --model with a folder or Hub id")
    place = find_folder(delta, Access(revision=revision, subfolder=subfolder))
    folder = converted(place, out, empty(model, kind or _known(found.base_class)), to=to, where=found.source)
    print(f"{found.source} ({found.format}) is now in {folder} ({to})")


def merge(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder or a Hub id. Its weights are loaded.", callback=not_empty)
    ],
    delta: Delta,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, which must be empty or not there.")],
    *,
    kind: Kind = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
) -> None:
    """Write a plain model with a saved delta in its weights, and its tokenizer, for any program that reads models."""
    from deltakit.delta import inspect as inspected
    from deltakit.delta import load

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"{out}: something is here already; pass a folder that is empty or not there")
    found = inspected(delta, revision=revision, subfolder=subfolder)
    backbone, missing = loaded(model, kind or _known(found.base_class))
    held = load(delta, backbone, revision=revision, subfolder=subfolder)
    absent = sorted(missing - set(held.fully_trained))
    if absent:
        raise CheckpointError(
            f"{model}: it has no values for {', '.join(absent[:5])}, and neither has the delta; pass the model that the delta "
            f"was trained on, or name a class without them with --class (this is a {type(backbone).__name__})"
        )
    plain: Any = held.merge_and_unload()
    plain.save_pretrained(out)
    copied = _copy_companions(model, out)
    print(f"{model} with {found.source} in its weights is in {out}, with {', '.join(copied) or 'no tokenizer'}")


def push(
    delta: Annotated[
        str, typer.Argument(metavar="DELTA", help="The folder or file of a saved delta.", callback=not_empty)
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="The Hub repository, such as user/my-delta.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="The commit message.")] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="The branch, created if it is not there.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="HF_TOKEN", help="The Hub's access token; by default that of the login."),
    ] = None,
) -> None:
    """Upload a saved delta to the Hub, in one commit. The repository is created if it is not there.

    Log in with `hf auth login` before. Of a folder only the files of the delta are uploaded.
    """
    from deltakit.delta import inspect as inspected
    from deltakit.files import find_folder, is_repository, upload

    if not is_repository(repository):
        raise typer.BadParameter(f"REPO: {repository!r} is no Hub id, such as user/my-delta.")
    # Nothing that `load` would refuse is uploaded.
    inspected(Path(delta))
    place = find_folder(Path(delta))
    with TemporaryDirectory() as stage:
        for file in _files_of(place):
            target = Path(stage, file.relative_to(place if place.is_dir() else place.parent))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        url = upload(
            Path(stage), repository, private=private or None, token=token, commit_message=message, revision=revision
        )
    print(url)


def _files_of(place: Path) -> list[Path]:
    """Returns the files of a delta in a folder, with its model card; or the file that it is."""
    from deltakit.files import format_of

    if not place.is_dir():
        return [place]
    kind = format_of(place)
    patterns = dict.fromkeys([*kind.files, *kind.late_files, "README.md"])
    return [file for pattern in patterns for file in sorted(place.glob(pattern)) if file.is_file()]


def _known(base_class: str | None) -> str | None:
    """Returns the class that a delta names, if transformers has it."""
    return base_class if base_class and class_of(base_class) is not None else None


def _copy_companions(model: str, out: Path) -> list[str]:
    """Copies the tokenizer and alike, and returns the names of the files."""
    from deltakit.files import Access, is_repository

    with readable(model):
        on_hub = not Path(model).exists() and is_repository(model)
        folder: Any = Access().copy(model, _COMPANIONS, None) if on_hub else Path(model)
    files = {file.name: file for pattern in _COMPANIONS for file in sorted(folder.glob(pattern)) if file.is_file()}
    for name, file in files.items():
        shutil.copyfile(file, out / name)
    return list(files)
