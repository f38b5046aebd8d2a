"""The default positions that many methods have: the layers of queries and values, as in LoRA's paper (section 4.2)."""

QUERIES_AND_VALUES = (("attn.q", "attn.qkv"), ("attn.v", "attn.kv"))
"""Of a fused projection only the queries and values."""

INPUTS_OF_QUERIES_AND_VALUES = (("attn.qkv", "attn.q"), ("attn.qkv", "attn.kv", "attn.v"))
"""For input maps, which change the input of a fused projection as a whole."""
