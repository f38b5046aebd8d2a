"""The names that role inference knows. Where models use one name for two things, shapes decide."""

import re

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
            "project_{}",
            "{}_attn",
            "{}_head",
        )
    )
    | {word, f"{word}s", f"{word}_proj", f"{word}_projection", f"{word}_layer", f"{word}_dense", f"{word}_linear"}
    | {f"proj_{word}", f"to_{word}", f"projection_{word}", f"linear_{word}", "queries" if letter == "q" else word}
    for letter, word in _LETTERS.items()
}
"""Names of the projections to queries, keys and values, by letter. All names in this file are lower case."""

LATENT = {
    "q_a": frozenset({"q_a_proj", "wq_a", "q_down_proj"}),
    "q": frozenset({"q_b_proj", "wq_b", "q_up_proj"}),
    "kv_a": frozenset({"kv_a_proj_with_mqa", "kv_a_proj", "wkv_a", "kv_down_proj"}),
    "kv": frozenset({"kv_b_proj", "wkv_b", "kv_up_proj"}),
}
"""Names in latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): projections to the latent and from it."""

KEYED = frozenset({"query_key", "qk", "qk_proj"})
"""Names of one projection whose output serves as queries and as keys (Reformer)."""

AFFIXED = re.compile(r"^(?P<before>.*_)?(?P<word>query|key|value)(?P<after>_.*)?$")
"""Names of projections with a prefix or suffix, which mark a second set (Longformer, LiLT)."""

FUSED = frozenset(
    {"c_attn", "query_key_value", "qkv", "qkv_proj", "wqkv", "to_qkv", "qkv_linear", "in_proj", "att_proj", "attn_qkv"}
    | {"queries_keys_values", "proj_qkv", "w_qkv", "qkv_layer"}
)
"""Names of one projection to queries, keys and values; beside a separate one to queries, to keys and values only."""

FUSED_KV = frozenset(
    {"kv", "kv_proj", "to_kv", "key_value", "kv_linear", "c_attn", "keys_values", "wkv", "w_kv", "proj_kv"}
)

OUTPUTS = frozenset(
    {"o", "o_proj", "out_proj", "out", "out_lin", "c_proj", "proj", "wo", "to_out", "dense", "projection", "linear_out"}
    | {"o_linear", "output", "final_linear", "output_projection", "proj_out", "o_lin", "out_projection", "output_proj"}
    | {
        "attention_out",
        "projection_layer",
        "post",
        "post_proj",
        "o_b_proj",
        "w_o",
        "final",
        "output_linear",
        "output_dense",
    }
)
"""Names of the projection back to the hidden states, in an attention module."""

GATES = frozenset({"gate_proj", "wi_0", "gate", "w_gate", "fc1_g", "linear_gate", "gate_linear"})
"""Names of the gate projection of a gated feed-forward part; its activation multiplies the up projection's output."""

FUSED_GATES = ("gate_up", "up_gate", "gate_and_up")

EXPERTS = {
    "gate_up_proj": "gate_up",
    "gate_up": "gate_up",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "input_linear": "gate_up",
    "output_linear": "down",
    "w_in": "up",
    "w_out": "down",
}
"""Names of the 3-d parameters of a mixture of experts (or of modules that hold one each), and their roles."""

HEADS = frozenset(
    {"classifier", "score", "lm_head", "qa_outputs", "classification_head", "head", "heads", "fc", "fc_out"}
    | {"pre_classifier", "ctc_head"}
)
"""Names of output heads at the root of a backbone."""


def says_attention(class_name: str) -> bool:
    """Returns whether a class is named attention.

    >>> says_attention("BertSelfAttention"), says_attention("Wav2Vec2Attn"), says_attention("MambaMixer")
    (True, True, False)
    """
    return "attention" in class_name.lower() or class_name.lower().endswith("attn")


def says_feed_forward(class_name: str) -> bool:
    """Returns whether a class is named a feed-forward part.

    >>> says_feed_forward("LlamaMLP"), says_feed_forward("EvollaFeedForward"), says_feed_forward("LlamaDecoderLayer")
    (True, True, False)
    """
    return class_name.lower().endswith(("mlp", "ffn", "feedforward"))


CROSS = ("cross", "encdec", "encoder_attn", "encoder_attention", "token_to_image", "image_to_token", "x_attn")
"""Parts of the names of cross-attention."""


def says_cross(path: str) -> bool:
    """Returns whether a path names cross-attention.

    >>> says_cross("decoder.layers.0.encoder_attn"), says_cross("decoder.layers.0.self_attn")
    (True, False)
    """
    names = [component.lower() for component in path.split(".")]
    return any(any(word in name for word in CROSS) for name in names)
