"""OpenDelta's logger: messages of level INFO on stderr."""

import logging
import sys
from collections.abc import Mapping
from typing import TextIO

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR
NAME = "opendelta"


# Python 3.10 has no StreamHandler[TextIO].
class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what `sys.stderr` is now, and not to what it was when the handler was made: notebooks replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def get_logger(name: str | None = None, verbosity: str = "info") -> logging.Logger:
    """Returns the logger with a name, whose messages go to stderr unless the program has set handlers for "opendelta"."""
    root = logging.getLogger(NAME)
    if not root.handlers:
        root.addHandler(_Stderr())
        root.propagate = False
        root.setLevel(get_log_levels_dict().get(verbosity, INFO))
    return root if name is None or not name.startswith(f"{NAME}.") else logging.getLogger(name)


def get_log_levels_dict() -> Mapping[str, int]:
    """Returns the levels by name."""
    return {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": logging.CRITICAL}


def get_verbosity() -> int:
    """Returns the level from which messages are shown."""
    return get_logger().level


def set_verbosity(verbosity: int) -> None:
    """Sets the level from which messages are shown."""
    get_logger().setLevel(verbosity)


def set_verbosity_debug() -> None:
    """Shows all messages."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Shows messages from INFO on, which is the default."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Shows messages from WARNING on."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Shows messages from ERROR on."""
    set_verbosity(ERROR)
