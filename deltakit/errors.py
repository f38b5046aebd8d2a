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

from collections.abc import Iterable


class DeltaError(Exception):
    """Base of every error that deltakit raises on purpose."""


class SelectorError(DeltaError, ValueError):
    """A selector is malformed, or matches nothing."""


class RoleError(DeltaError, LookupError):
    """A role does not exist, or the structure of the backbone has no sure answer for it."""


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


def no_such_delta(where: str, name: object, attached: Iterable[str]) -> OptionError:
    """Returns the error for a name that no attached delta has.

    Args:
        where: the function that was called.
        attached: the names of the attached deltas.
    """
    return OptionError(
        f"{where}: no delta named {name!r} is attached; the attached deltas are {', '.join(map(repr, attached)) or 'none'}"
    )
