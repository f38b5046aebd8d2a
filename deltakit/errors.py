"""The one tree of errors. Each message gives the path, what was expected, what was found and what to do.

    DeltaError
    ├── SelectorError          a selector is malformed, or selects nothing
    ├── RoleError              the backbone's structure does not answer a role
    ├── OptionError            a method's option is out of its range
    ├── TargetError            a module that a method cannot serve
    ├── StateError             a call that does not fit the delta's present state
    ├── CheckpointError        a file that is not a delta, is damaged, or does not fit
    │   └── BackboneMismatch   a delta that was trained on another backbone
    └── HubError               a repository that cannot be read or written

Warnings are `DeltaWarning`; `warnings.simplefilter("error", deltakit.DeltaWarning)` makes errors of them.
"""

from collections.abc import Iterable


class DeltaError(Exception):
    """Base of every error that deltakit raises on purpose."""


class SelectorError(DeltaError, ValueError):
    """A selector that cannot be read, or that selects nothing."""


class RoleError(DeltaError, LookupError):
    """A role that the structure of the backbone does not answer for sure."""


class OptionError(DeltaError, ValueError):
    """An option of a method that is out of its range or of the wrong type."""


class TargetError(DeltaError, TypeError):
    """A module that a method cannot serve."""


class StateError(DeltaError, RuntimeError):
    """A call that does not fit the present state of a delta or of its backbone."""


class CheckpointError(DeltaError, ValueError):
    """A folder or file that is not a delta, is damaged, or does not fit the backbone."""


class BackboneMismatch(CheckpointError):
    """A delta that was trained on a backbone of another structure or with other weights."""


class HubError(DeltaError, OSError):
    """A repository of the Hub that cannot be read or written."""


class DeltaWarning(UserWarning):
    """Something that can be meant, but is often a mistake."""


def no_such_delta(where: str, name: object, attached: Iterable[str]) -> OptionError:
    """The error for a name that no attached delta has."""
    return OptionError(
        f"{where}: no delta named {name!r} is attached; there are {', '.join(map(repr, attached)) or 'none'}"
    )
