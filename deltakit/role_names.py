"""The one vocabulary of names that roles are inferred with. Shapes decide wherever a name is used for two things."""

_LETTERS = {"q": "query", "k": "key", "v": "value"}

PROJECTIONS = {
    letter: frozenset(
        pattern.format(letter)
        for pattern in (
            "{}",
            "{}_proj",
            "to_{}",
            "{}_lin",
            "w{}",
            "w_{}",
            "linear_{}",
            "{}_linear",
            "proj_{}",
            "{}_attn",
        )
    )
    | {word, f"{word}s", f"{word}_proj", f"{word}_projection", f"{word}_layer", f"{word}_dense", f"proj_{word}"}
    for letter, word in _LETTERS.items()
}
"""Names of the projections to queries, keys and values, by letter."""

FUSED = frozenset({"c_attn", "query_key_value", "qkv", "qkv_proj", "Wqkv", "wqkv", "to_qkv", "qkv_linear", "in_proj"})
"""Names of one projection to queries, keys and values together; beside a projection to queries: to keys and values."""

FUSED_KV = frozenset({"kv", "kv_proj", "to_kv", "key_value", "kv_linear", "c_attn"})

OUTPUTS = frozenset(
    {"o", "o_proj", "out_proj", "out", "out_lin", "c_proj", "proj", "wo", "to_out", "dense", "projection", "linear_out"}
    | {"o_linear", "output", "final_linear", "output_projection", "proj_out", "o_lin", "out_projection"}
)
"""Names of the projection back to the hidden states, in an attention module."""

GATES = frozenset({"gate_proj", "wi_0", "gate", "w_gate", "fc1_g", "linear_gate", "gate_linear"})
"""Names of the projection whose activation multiplies the other one's output, in a gated feed-forward part."""

FUSED_GATES = ("gate_up", "up_gate", "gate_and_up")

HEADS = frozenset(
    {"classifier", "score", "lm_head", "qa_outputs", "classification_head", "head", "fc", "fc_out", "pre_classifier"}
)
"""Names of what turns hidden states into answers, at the root of a backbone."""


def says_attention(class_name: str) -> bool:
    """Whether a class calls itself attention.

    >>> says_attention("BertSelfAttention"), says_attention("Wav2Vec2Attn"), says_attention("MambaMixer")
    (True, True, False)
    """
    return "attention" in class_name.lower() or class_name.lower().endswith("attn")


def says_cross(path: str) -> bool:
    """Whether a path names attention from one stack to another.

    >>> says_cross("decoder.layers.0.encoder_attn"), says_cross("decoder.layers.0.self_attn")
    (True, False)
    """
    names = [component.lower() for component in path.split(".")]
    return any("cross" in name or "encdec" in name or name in ("encoder_attn", "encoder_attention") for name in names)
