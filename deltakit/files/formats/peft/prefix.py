"""Reads PEFT's prefix tuning. Its keys and values enter through `past_key_values`, so the positions of the text start after
them: deltakit's Prefix(shift=True)."""

from typing import Any, TypedDict

from deltakit.errors import CheckpointError, warn
from deltakit.files.formats.format import Parts
from deltakit.files.formats.peft.keys import PROMPT
from deltakit.files.formats.peft.prompt import prompting
from deltakit.files.formats.source import Source


class _Sizes(TypedDict):
    """Of keys and values: with grouped queries, PEFT counts their heads and not those of the queries."""

    num_layers: int
    num_attention_heads: int
    token_dim: int
    num_transformer_submodules: int


def read_prefix(source: Source, parts: Parts) -> None:
    """Adds the keys and values of an adapter to the parts.

    Raises:
        CheckpointError: if the config is damaged, the tensor does not fit, or the prefix is one of an encoder and a decoder.
    """
    config, vectors = prompting(source)
    sizes: _Sizes = source.options(_Sizes, {})
    if sizes["num_transformer_submodules"] != 1:
        raise CheckpointError(
            f"{source.folder}: this prefix of PEFT is one of an encoder and a decoder, where PEFT counts it among the "
            "positions of the decoder's text, which deltakit does not; train a Prefix of deltakit"
        )
    tokens, layers, heads = config["num_virtual_tokens"], sizes["num_layers"], sizes["num_attention_heads"]
    d = sizes["token_dim"]
    if min(tokens, layers, heads, d) < 1 or d % heads or tuple(vectors.shape) != (tokens, 2 * layers * d):
        raise CheckpointError(
            f"{source.folder}: {PROMPT} has shape {tuple(vectors.shape)}, and the config says {tokens} tokens, {layers} "
            f"layers and {d} features in {heads} heads; save or download it again"
        )
    _warn_of_window(source)
    pairs = vectors.view(tokens, layers, 2, heads, d // heads).permute(1, 2, 3, 0, 4)
    states = [{"key": pair[0].contiguous(), "value": pair[1].contiguous()} for pair in pairs]
    parts.add_in_order("prefix", {"tokens": tokens, "shift": True}, states)


def _warn_of_window(source: Source) -> None:
    details: Any = getattr(source.backbone, "config", None)
    window = getattr(details, "sliding_window", None)
    if isinstance(window, int) and getattr(details, "use_sliding_window", True):
        warn(
            f"{source.folder}: in PEFT only the first {window} tokens see this prefix, in layers with a sliding window; here "
            "all tokens do"
        )
