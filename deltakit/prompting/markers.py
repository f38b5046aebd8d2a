"""The special tokens that stand for slots and soft tokens in the text that the tokenizer gets."""

from typing import Any, NamedTuple

from deltakit.errors import OptionError
from deltakit.prompting.backbone_facts import Kind


class Marker(NamedTuple):
    """A special token: as text, and its id."""

    text: str
    id: int


class Markers(NamedTuple):
    """Those of the slots (none in causal templates, whose text ends there), and the one of soft tokens, if there are any.

    `in_decoder` says whether the slots are predicted behind the same tokens in the decoder's text (T5's sentinels).
    """

    slots: tuple[Marker, ...]
    soft: Marker | None
    in_decoder: bool


def find_markers(tokenizer: Any, kind: Kind, slots: int, *, soft: bool) -> Markers:
    """Returns the markers for a template.

    Args:
        slots: the number of slots.
        soft: whether there are soft tokens.

    Raises:
        OptionError: if the tokenizer has no token for them.
    """
    mask = _marker(tokenizer, getattr(tokenizer, "mask_token", None))
    sentinels = [_marker(tokenizer, f"<extra_id_{number}>") for number in range(slots)] if kind == "seq2seq" else []
    in_decoder = bool(sentinels) and sentinels[0] is not None
    found = sentinels if in_decoder else [mask] * slots if kind != "causal" else []
    if None in found:
        what = f"a sentinel <extra_id_{found.index(None)}>" if in_decoder else "a mask token"
        known = ", ".join(tokenizer.all_special_tokens[:8]) or "none"
        raise OptionError(
            f"Template: the slot of a template of kind {kind!r} needs {what}, and {type(tokenizer).__name__} has none (its "
            f"special tokens: {known}); pass the tokenizer of the backbone, or another kind="
        )
    return Markers(tuple(filter(None, found)), _soft_marker(tokenizer, mask) if soft else None, in_decoder)


def _soft_marker(tokenizer: Any, mask: Marker | None) -> Marker:
    # Any special token serves: the ids of soft tokens replace it. The tokenizer must only not join it with the text around.
    names = ("eos_token", "sep_token", "bos_token", "cls_token", "pad_token", "unk_token")
    choices = (_marker(tokenizer, getattr(tokenizer, name, None)) for name in names)
    found = mask or next(filter(None, choices), None)
    if found is None:
        raise OptionError(
            f"Template: {type(tokenizer).__name__} has no special token, and soft tokens need one to stand for them while the "
            "text is tokenized; add one: tokenizer.add_special_tokens({'pad_token': '<pad>'})"
        )
    return found


def _marker(tokenizer: Any, token: Any) -> Marker | None:
    """Returns a special token, or None if the tokenizer does not have it or would split it."""
    if token is None:
        return None
    ids = tokenizer(str(token), add_special_tokens=False)["input_ids"]
    own = tokenizer.convert_tokens_to_ids(str(token))
    # Metaspace may put an empty piece ahead of it.
    unknown = own is None or (own == getattr(tokenizer, "unk_token_id", None) and str(token) != tokenizer.unk_token)
    return Marker(str(token), own) if not unknown and own in ids and len(ids) <= 2 else None
