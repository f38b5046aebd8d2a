"""An option for every registered method, such as `--lora "@attn.q"`, for commands that show what it would do."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from deltakit.cli.method_lines import known_method, method_lines
from deltakit.cli.running import with_signature
from deltakit.errors import OptionError, did_you_mean, warn

if TYPE_CHECKING:
    from deltakit.core import Method

_DEFAULT = "default"
"""What stands for the default positions of a method."""
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="METHOD.OPTION=VALUE",
        help="An option of a method, like lora.r=16.",
        rich_help_panel="Methods: the value is a selector, or `default` for the default positions",
    ),
]


def with_methods(function: Callable[..., None]) -> Callable[..., None]:
    """Returns the function of a command with an option for each method. Its argument `methods` gets what they ask for."""
    own = [one for one in inspect.signature(function).parameters.values() if one.name != "methods"]
    names = {name.replace("-", "_"): name for name in method_lines()}

    @wraps(function)
    def run(**arguments: Any) -> None:
        selectors = {name: arguments.pop(key) for key, name in names.items()}
        settings = arguments.pop("settings")
        function(methods=chosen({name: of for name, of in selectors.items() if of}, settings or ()), **arguments)

    options = [_parameter("settings", _Settings), *(_parameter(key, _option(name)) for key, name in names.items())]
    return with_signature(run, inspect.Signature([*own, *options]))


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(name: str) -> Any:
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        metavar="SELECTOR",
        help=escape(method_lines()[name]),
        rich_help_panel="Methods: the value is a selector, or `default` for the default positions",
    )
    return Annotated[list[str] | None, option]


def chosen(selectors: Mapping[str, Sequence[str]], settings: Sequence[str]) -> "tuple[Method, ...]":
    """Returns the methods that a command line asks for.

    Args:
        selectors: for each method its selectors, or "default" alone for its default positions.
        settings: options of these methods, as "lora.r=16".

    Raises:
        BadParameter: if "default" stands beside a selector, a setting is malformed, is for no method here or gives an option
            that has a value, or an option is unknown or out of its range.
    """
    from deltakit.core import METHODS

    options: dict[str, dict[str, Any]] = {name: _positions(name, list(at)) for name, at in selectors.items()}
    for setting in settings:
        name, option, value = _setting(setting)
        if name not in options:
            here = ", ".join(options) or "none"
            what = f"add --{name.replace('_', '-')} with a selector or `default`; the methods here are {here}"
            raise typer.BadParameter(f"--set {setting}: {what}")
        known = [field.name for field in fields(METHODS[name])]
        if option not in known:
            what = f"{name} has no option {option!r}; it has {', '.join(known)}{did_you_mean(option, known)}"
            raise typer.BadParameter(f"--set {setting}: {what}")
        if option in options[name]:
            raise typer.BadParameter(f"--set {setting}: {name}.{option} has a value already, {options[name][option]!r}")
        options[name][option] = value
    return tuple(_made(name, given) for name, given in options.items())


def _positions(name: str, at: list[str]) -> dict[str, Any]:
    if _DEFAULT not in at:
        return {"at": at}
    if len(at) > 1:
        raise typer.BadParameter(
            f"--{name}: 'default' stands for the default positions; leave it or the other selectors out"
        )
    return {}


def _setting(setting: str) -> tuple[str, str, Any]:
    key, equals, text = setting.partition("=")
    name, dot, option = key.partition(".")
    if not (equals and dot and option):
        raise typer.BadParameter(f"--set {setting}: expected METHOD.OPTION=VALUE, such as lora.r=16")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return known_method(name), option, value


def _made(name: str, given: Mapping[str, Any]) -> "Method":
    from deltakit.core import METHODS

    kind = METHODS[name]
    # Some options have no default.
    added = {option: value for option, value in kind.example.items() if option not in given}
    if added:
        values = ", ".join(f"{option}={value!r}" for option, value in added.items())
        first = next(iter(added))
        warn(f"{name}: {values} is an example; pass your own with --set {name}.{first}=VALUE")
    try:
        return kind(**{**added, **given})
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error
