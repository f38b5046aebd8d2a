"""The building blocks of methods: low-rank products, attention with a prefix, prompt insertion, sizes and dtypes."""

from deltakit.ops.attention.function_mode import PrefixMode, close
from deltakit.ops.attention.interface import install_prefixes
from deltakit.ops.attention.kernel import AttentionPrefix, joined, joined_by_rows, live_prefixes
from deltakit.ops.attention.sites import Heads, attends, enters_by_interface, heads_of
from deltakit.ops.low_rank import Product, add_low_rank, fresh, of_few_tokens
from deltakit.ops.low_rank_batched import add_by_rows, shared_work
from deltakit.ops.low_rank_sum import sum_of_products
from deltakit.ops.prompt.insertion import Insertion, grown_mask, insert, layout_for, trimmed
from deltakit.ops.prompt.text_stack import input_embeddings, stack_at, text_stack
from deltakit.ops.sizes import like, output_size, sizes

__all__ = [
    "AttentionPrefix",
    "Heads",
    "Insertion",
    "PrefixMode",
    "Product",
    "add_by_rows",
    "add_low_rank",
    "attends",
    "close",
    "enters_by_interface",
    "fresh",
    "grown_mask",
    "heads_of",
    "input_embeddings",
    "insert",
    "install_prefixes",
    "joined",
    "joined_by_rows",
    "layout_for",
    "like",
    "live_prefixes",
    "of_few_tokens",
    "output_size",
    "shared_work",
    "sizes",
    "stack_at",
    "sum_of_products",
    "text_stack",
    "trimmed",
]
