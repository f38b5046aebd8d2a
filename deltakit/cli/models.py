"""The models of transformers that commands get: without their weights, or loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from deltakit.errors import DeltaError, HubError, OptionError, warn

_UNBUILDABLE = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What transformers raises for a config that it cannot read or build a model from: config.json may hold anything."""


@contextmanager
def readable(model: str) -> Iterator[Any]:
    """Gives transformers, without its messages. What it raises while it reads the model becomes an error of one line.

    Args:
        model: the folder, file or Hub id.

    Raises:
        HubError: if there is no such folder, or transformers cannot read the model.
    """
    from deltakit.files import is_repository

    if not is_repository(model) and not Path(model).exists():
        raise HubError(f"{model}: no such folder, and this is not a Hub id such as 'user/model'; check the path")
    _check_config(model)
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    except (*_UNBUILDABLE, SafetensorError) as error:
        if isinstance(error, (DeltaError, typer.BadParameter)):
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise HubError(
            f"{model}: transformers cannot build a model from it: {why}; pass a folder or Hub id with a config.json whose "
            "model type the installed transformers knows"
        ) from error


def _check_config(model: str) -> None:
    """Says in plain words, and at once, that a folder or repository is not there or has no config."""
    from deltakit.files import fetch_config, formats_in

    place = Path(model)
    if not place.exists():
        fetch_config(model)
    if place.is_dir() and not (place / "config.json").is_file():
        found = "".join(f"; it is a delta ({kind.name}): deltakit inspect shows it" for kind in formats_in(place)[:1])
        raise HubError(f"{place}: there is no config.json in this folder{found or '; pass the folder of a model'}")


def empty(model: str, kind: str | None = None) -> Any:
    """Returns a model on the meta device, without its weights.

    Args:
        model: a folder, a Hub id or a config file.
        kind: the name of its class; None for the first of the config's architectures.

    Raises:
        HubError: if there is no config, or transformers cannot build a model from it.
        BadParameter: if the class does not exist.
        OptionError: if it is one of another kind of model.
    """
    import torch

    with readable(model) as transformers:
        config, named = _config(model, kind)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config) if named is None else named._from_config(config)


def loaded(model: str, kind: str | None = None) -> tuple[Any, set[str]]:
    """Returns a model with its weights in the dtype of its files, and the names of parameters that the files do not have.

    Args:
        model: a folder or a Hub id.
        kind: as for `empty`.

    Raises:
        HubError: if it cannot be read.
        BadParameter, OptionError: as `empty` does.
    """
    with readable(model) as transformers:
        _, named = _config(model, kind)
        found, info = (named or transformers.AutoModel).from_pretrained(model, dtype="auto", output_loading_info=True)
    return found, set(info["missing_keys"])


def _config(model: str, kind: str | None) -> tuple[Any, Any]:
    """Returns the config, and the class of the model or None for the one without a head."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    architectures = list(config.architectures or ())
    wanted = kind or next(iter(architectures), "")
    named = class_of(wanted)
    if named is None:
        if kind is not None:
            raise typer.BadParameter(
                f"--class {kind}: transformers has no model of that name; use one such as BertForSequenceClassification."
            )
        what = (
            f"the class that its config names, {wanted}, is not in transformers"
            if wanted
            else "its config names no class"
        )
        warn(f"{model}: {what}, so this is the model without a head; name one with --class")
    elif not isinstance(config, named.config_class or object):
        raise OptionError(
            f"{model}: its config is a {type(config).__name__}, and {wanted} needs a {named.config_class.__name__}; pass "
            "the delta's own backbone as --model, and its class as --class"
        )
    return config, named


def class_of(name: str) -> Any:
    """Returns the class of transformers' models that has this name, or None. The name may come from a file."""
    import transformers

    kind = getattr(transformers, name, None) if name else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None
