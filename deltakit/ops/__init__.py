"""The building blocks of methods: low-rank products, attention with a prefix, prompt insertion, sizes and dtypes."""

from deltakit.ops.attention.attention_targets import attention_targets
from deltakit.ops.attention.beside import AttentionBeside, BesideMode
from deltakit.ops.attention.first_block import FRONT, first_block_only, nothing_handed_on, refuse_without_first_block
from deltakit.ops.attention.function_mode import PrefixMode
from deltakit.ops.attention.gated_prefix import GatedPrefix
from deltakit.ops.attention.interface import install_prefixes
from deltakit.ops.attention.kernel import AttentionPrefix, joined, joined_per_example
from deltakit.ops.attention.mode_stack import EntersMode, enter_prefix_mode
from deltakit.ops.attention.sites import attends, calls_fused_attention, enters_by_interface, heads_of
from deltakit.ops.blocks import block_size_for
from deltakit.ops.bottleneck import ACTIVATIONS, Bottleneck, BottleneckMethod
from deltakit.ops.fastfood import Fastfood, key_of_name
from deltakit.ops.few_tokens import WHOLE_LAYERS
from deltakit.ops.forwards import has_own_forward, refuse_max_norm
from deltakit.ops.handover import Handover, InputTap
from deltakit.ops.kinds.activated_low_rank import ActivatedLowRank
from deltakit.ops.kinds.call_context import CallContext
from deltakit.ops.kinds.gated_low_rank import GatedLowRank
from deltakit.ops.kinds.input_map import InputMap
from deltakit.ops.kinds.low_rank import LowRank
from deltakit.ops.kinds.maps import in_own_dtype, on_own_examples
from deltakit.ops.kinds.normed_low_rank import NormedLowRank
from deltakit.ops.kinds.output_map import OutputMap
from deltakit.ops.kinds.weighing import Weighing
from deltakit.ops.kinds.weight_map import WeightMap
from deltakit.ops.low_rank_starts import STARTS_WITH_A_PRODUCT, difference, kaiming_uniform, start_factors
from deltakit.ops.low_rank_sum import sum_of_products
from deltakit.ops.module_copy import ComputedBy
from deltakit.ops.one_text import refuse_two_texts
from deltakit.ops.option_checks import check_alpha, check_dropout
from deltakit.ops.prompt.delta_modules import PromptVectorsDelta
from deltakit.ops.prompt.layout import inserted_layout
from deltakit.ops.prompt.method import PromptMethod
from deltakit.ops.prompt.positions import PositionsDelta
from deltakit.ops.prompt.start_vectors import start_vectors
from deltakit.ops.prompt.started import StartedPrompt
from deltakit.ops.prompt.text_stack import input_embeddings, stack_at, text_stack
from deltakit.ops.recompute import Layer, add_linear_with, layer_beside, linear_with, recomputed
from deltakit.ops.seeded import Draw, Seeded, SeededPlaces, normal, seeded_places, uniform
from deltakit.ops.sizes import input_size, kernel_of, largest_sizes, like, matrix_shape, matrix_sizes, sizes, stack_of
from deltakit.ops.sparse_product import add_sparse, are_inside, sparse_entries
from deltakit.ops.unfilled import unfilled_linear
from deltakit.ops.usual_positions import INPUTS_OF_QUERIES_AND_VALUES, QUERIES_AND_VALUES
from deltakit.ops.weighing_method import WeighingMethod
from deltakit.ops.weight_method import (
    LowRankMethod,
    WeightMethod,
    check_patch_dropout,
    check_rank,
    check_seed,
    check_weight,
    drawn_sizes,
)
from deltakit.ops.weighted_sum import take_weighted_sum

__all__ = [
    "ACTIVATIONS",
    "FRONT",
    "INPUTS_OF_QUERIES_AND_VALUES",
    "QUERIES_AND_VALUES",
    "STARTS_WITH_A_PRODUCT",
    "WHOLE_LAYERS",
    "ActivatedLowRank",
    "AttentionBeside",
    "AttentionPrefix",
    "BesideMode",
    "Bottleneck",
    "BottleneckMethod",
    "CallContext",
    "ComputedBy",
    "Draw",
    "EntersMode",
    "Fastfood",
    "GatedLowRank",
    "GatedPrefix",
    "Handover",
    "InputMap",
    "InputTap",
    "Layer",
    "LowRank",
    "LowRankMethod",
    "NormedLowRank",
    "OutputMap",
    "PositionsDelta",
    "PrefixMode",
    "PromptMethod",
    "PromptVectorsDelta",
    "Seeded",
    "SeededPlaces",
    "StartedPrompt",
    "Weighing",
    "WeighingMethod",
    "WeightMap",
    "WeightMethod",
    "add_linear_with",
    "add_sparse",
    "are_inside",
    "attends",
    "attention_targets",
    "block_size_for",
    "calls_fused_attention",
    "check_alpha",
    "check_dropout",
    "check_patch_dropout",
    "check_rank",
    "check_seed",
    "check_weight",
    "difference",
    "drawn_sizes",
    "enter_prefix_mode",
    "enters_by_interface",
    "first_block_only",
    "has_own_forward",
    "heads_of",
    "in_own_dtype",
    "input_embeddings",
    "input_size",
    "inserted_layout",
    "install_prefixes",
    "joined",
    "joined_per_example",
    "kaiming_uniform",
    "kernel_of",
    "key_of_name",
    "largest_sizes",
    "layer_beside",
    "like",
    "linear_with",
    "matrix_shape",
    "matrix_sizes",
    "normal",
    "nothing_handed_on",
    "on_own_examples",
    "recomputed",
    "refuse_max_norm",
    "refuse_two_texts",
    "refuse_without_first_block",
    "seeded_places",
    "sizes",
    "sparse_entries",
    "stack_at",
    "stack_of",
    "start_factors",
    "start_vectors",
    "sum_of_products",
    "take_weighted_sum",
    "text_stack",
    "unfilled_linear",
    "uniform",
]
