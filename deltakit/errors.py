"""All errors that deltakit raises on purpose. Each message says where, what happened, and what to do.

    DeltaError
    ├── SelectorError          a selector is malformed, or matches nothing
    ├── RoleError              a role does not exist, or the backbone has no sure answer for it
    ├── OptionError            an option is out of its range or of the wrong type
    ├── TargetError            a method cannot be attached to this module
    ├── StateError             the call does not fit the current state of a delta or its backbone
    ├── CheckpointError        a folder is missing, is no delta, is damaged, or does not fit the backbone
    │   └── BackboneMismatch   the delta was trained on another backbone
    └── HubError               a repository of the Hub cannot be read or written

Warnings are `DeltaWarning`; `warnings.simplefilter("error", deltakit.DeltaWarning)` turns them into errors.
"""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 4_000


def printable(text: str) -> str:
    """Returns a text of one line that a terminal shows as it is: other characters are written as escapes.

    Names of modules, deltas and models come from other people's files. An escape sequence in one could clear the screen, and
    a mark for right-to-left text or a line break could hide what follows.

    >>> print(printable("q_proj\\x1b[2J"), printable("käse\\n"))
    q_proj\\x1b[2J käse\\n
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def encodable(text: str) -> str:
    """Returns a text with escapes for what the standard output cannot write, such as names in a terminal without Unicode."""
    # A program without a console has no stdout at all.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text if text.isascii() else text.encode(encoding, "backslashreplace").decode(encoding)


class DeltaError(Exception):
    """Base of every error that deltakit raises on purpose."""

    def __str__(self) -> str:
        # Not that of KeyError, which is the repr.
        text = Exception.__str__(self)
        # A damaged file may have names of millions of characters.
        more = len(text) - _LONGEST
        return printable(text if more <= 0 else f"{text[:_LONGEST]}... and {more:,} more characters")


class SelectorError(DeltaError, ValueError):
    """A selector is malformed, or matches nothing."""


class RoleError(DeltaError, KeyError):
    """A role does not exist, or the structure of the backbone has no sure answer for it.

    It is a `KeyError` because a table of roles raises it for a role that it does not have.
    """


class OptionError(DeltaError, ValueError):
    """An option is out of its range or of the wrong type."""


class TargetError(DeltaError, TypeError):
    """A method cannot be attached to this module or parameter."""


class StateError(DeltaError, RuntimeError):
    """The call does not fit the current state of a delta or of its backbone."""


class CheckpointError(DeltaError, ValueError):
    """A folder is missing, is no delta, is damaged, or does not fit the backbone."""


class BackboneMismatch(CheckpointError):
    """The delta was trained on a backbone with another structure or other weights."""


class HubError(DeltaError, OSError):
    """A repository of the Hub cannot be read or written."""


class DeltaWarning(UserWarning):
    """Something that may be intended but is often a mistake."""

    def __str__(self) -> str:
        return printable(super().__str__())


def warn(message: str) -> None:
    """Warns at the line of the user's code that led here: the innermost one outside deltakit, torch and what wraps functions.

    A fixed `stacklevel` would point into deltakit as soon as a function is called by another one or gets a decorator.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DeltaWarning, stacklevel=level)


_NOT_THE_USERS = ("deltakit", "torch", "contextlib", "jaxtyping", "beartype")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean ...?" with the known name that is spelled most like one, or "".

    >>> did_you_mean("lorra", ["lora", "adapter"]), did_you_mean("x", ["lora"])
    ('; did you mean lora?', '')
    """
    found = get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def no_such_delta(where: str, name: object, attached: Iterable[str]) -> OptionError:
    """Returns the error for a name that no attached delta has.

    Args:
        where: the function that was called.
        attached: the names of the attached deltas.
    """
    known = ", ".join(map(repr, attached))
    what = f"the attached deltas are {known}" if known else "none is: attach or load one first"
    return OptionError(f"{where}: no delta named {name!r} is attached; {what}")
