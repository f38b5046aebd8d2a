"""What the decoder of an encoder-decoder reads whose slots are mask tokens in the encoder's text, such as BART's.

The decoder writes the encoder's text again, so it reads that text one token later. transformers makes this from `input_ids`,
which a template with trained vectors replaces by `inputs_embeds`. OpenPrompt's such templates raise an error on these models.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from deltakit.errors import TargetError


def needs_decoder_text(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Returns whether a model has a decoder, and nothing in a batch says what it reads."""
    given = any(batch.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and not given


def one_later(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the ids of the encoder's text [batch, length] as the decoder reads them.

    Raises:
        TargetError: if the model does not say how it shifts them.
    """
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise TargetError(
            f"{type(model).__name__}: it has no prepare_decoder_input_ids_from_labels(), which says what its decoder reads; "
            "use a ManualTemplate, or pass decoder_input_ids in the batch"
        )
    found: Tensor = shift(ids)
    return found
