"""`interactive_modify=True`: the modules to modify are picked by hand."""

import re
from collections.abc import Sequence

from torch import nn

from deltakit.core import own_modules
from deltakit.errors import OptionError
from deltakit.opendelta.matching import matches
from deltakit.picking import picked


def picked_names(backbone: nn.Module, interactive_modify: bool | int, where: str) -> list[str]:
    """Lets the user pick modules, and returns names that match these alone by OpenDelta's rules.

    Args:
        interactive_modify: True, or the port of this machine to show the picker at in the browser.
        where: the class that asks, for messages.

    Raises:
        OptionError: if nothing was picked, or there is nothing to show the picker in.
    """
    found = picked(backbone, port=0 if interactive_modify is True else interactive_modify, waits=True)
    if found is None:
        raise OptionError(
            f"{where}(interactive_modify={interactive_modify}): nothing was picked, so nothing is attached; pick modules, or "
            "name them in modified_modules="
        )
    return only_these(found.names, [path for path, _ in own_modules(backbone)])


def only_these(paths: Sequence[str], among: Sequence[str]) -> list[str]:
    """Returns names that match exactly these paths: the paths, and regular expressions where a path is the end of another.

    >>> only_these(["encoder.q", "q"], ["q", "encoder.q"])
    ['encoder.q', '[r]^q']
    """
    ends = {path[place + 1 :] for path in among for place, character in enumerate(path) if character == "."}
    return [f"[r]^{re.escape(path)}" if path in ends or not matches(path, path) else path for path in paths]
