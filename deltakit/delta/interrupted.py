"""Steps that one Ctrl-C does not leave half done."""

from collections.abc import Callable
from functools import wraps

from deltakit.core import Attachment

Step = Callable[[Attachment], None]


def finished(step: Step) -> Step:
    """Makes a step run once more if it is interrupted or fails, and then raise what came up.

    For steps that can be repeated and take milliseconds. A second Ctrl-C within these ends them half done; the next call
    finishes them.
    """

    @wraps(step)
    def whole(attachment: Attachment) -> None:
        try:
            step(attachment)
        except BaseException:
            step(attachment)
            raise

    return whole
