"""OpenDelta's rules for the names in `modified_modules`, `exclude_modules` and `exclude`.

A plain name matches the end of a path at a dot. `[r]` and a regular expression match where its leftmost match ends with the
path and begins at a dot. A name matches what lies below only where a caller asks for it.
"""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from deltakit.core import above, own_modules
from deltakit.errors import OptionError
from deltakit.opendelta.common_names import common_names

Selectors = str | Sequence[str] | None


def as_list(names: Selectors) -> list[str]:
    """Returns names as a list, without empty ones. A single text is one name: OpenDelta would read its letters."""
    return [name for name in ([names] if isinstance(names, str) else names or ()) if name]


def matches(key: str, name: str) -> bool:
    """Returns whether a path ends with a name, or with what `[r]` and a regular expression match.

    >>> matches("a.0.attn.q", "q"), matches("a.10.attn.q", "0.attn.q"), matches("x.attn.c_attn", "attn")
    (True, False, False)
    >>> matches("a.0.attn.q", r"[r](\\d).attn.q"), matches("a.0.attn.q", "[r]attn"), matches("a.0.attn.q", "[r]attn.*")
    (True, False, True)

    Raises:
        OptionError: if the regular expression cannot be read.
    """
    if not name.startswith("[r]"):
        return key == name or (name != "" and key.endswith(f".{name}"))
    try:
        found = re.search(name[len("[r]") :], key)
    except re.error as error:
        raise OptionError(f"{name!r}: this is no regular expression: {error}; correct what follows [r]") from None
    return found is not None and found.end() == len(key) and (found.start() == 0 or key[found.start() - 1] == ".")


class Addresses:
    """The names by which OpenDelta knows the modules of a backbone.

    Args:
        common: whether modules with common names are known by these alone, as far as a name is found among them. If not, they
            are known by them to names with an "@", which have no other meaning.
    """

    def __init__(self, backbone: nn.Module, *, common: bool) -> None:
        self.common, self.names = common, common_names(backbone)
        self.paths = [path for path, _ in own_modules(backbone) if path]
        self.plain: set[str] = set()
        """Names that are compared with the model's own paths all the same."""

    @property
    def known(self) -> bool:
        """Whether the backbone has common names."""
        return bool(self.names)

    def keys(self, path: str, name: str) -> Iterable[str]:
        """Returns the names of a path to which another name is compared."""
        common = "@" in name or (self.common and name not in self.plain)
        inside = next((around for around in above(path) if around in self.names), "") if common else ""
        if inside:
            # Of a parameter: its module's names, and its own.
            return [f"{key}{path[len(inside) :]}" for key in self.names[inside]]
        return (path,)

    def has(self, path: str, name: str) -> bool:
        """Returns whether a path has a name."""
        return any(matches(key, name) for key in self.keys(path, name))

    def select(self, names: Iterable[str], exclude: Iterable[str]) -> dict[str, list[str]]:
        """Returns the paths that each name matches, without those that begin with an entry of `exclude`."""
        without = tuple(exclude)
        kept = [path for path in self.paths if not path.startswith(without)] if without else self.paths
        found = {}
        for name in names:
            found[name] = [path for path in kept if self.has(path, name)]
            if self.common and not found[name]:
                # A name that is not found among common names is one of the model's own: OpenDelta finds nothing then.
                self.plain.add(name)
                found[name] = [path for path in kept if self.has(path, name)]
        return found
