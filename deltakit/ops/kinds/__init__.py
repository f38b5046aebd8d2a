"""The kinds of delta module. A method author derives from one of them and writes the functions below.

output_map    forward(x, y) -> y'          adapters, BitFit, IA3
input_map     into(x) -> x'                IA3 before the feed-forward output
low_rank      factors() -> (A, B)          LoRA
weight_map    weight_update(W) -> dW, or new_weight(W) -> W'
call_context  enter and leave around a call: prefixes, soft prompts

A kind implements `Delta.scale`, mixed batches, feature slices, channels-first layers, dtypes, merging and the check that the
target is called.
"""
