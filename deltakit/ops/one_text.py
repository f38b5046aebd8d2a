"""What methods refuse that look at the text of a backbone."""

import inspect

from deltakit.core import BackboneView
from deltakit.errors import TargetError


def refuse_two_texts(index: BackboneView, method: str, what: str) -> None:
    """Refuses a backbone with an encoder and a decoder: which of its two texts a delta module is in is not known.

    Args:
        method: the name of the method, for the error message.
        what: what it does in a text, such as "ReFT counts positions".

    Raises:
        TargetError: if it is one.
    """
    if "decoder_input_ids" in inspect.signature(type(index.backbone).forward).parameters:
        raise TargetError(
            f"{method}: {index.owner} has an encoder and a decoder, and {what} in the one text of a backbone; attach it to "
            "the encoder alone, or use another method"
        )
