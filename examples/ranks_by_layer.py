"""Different ranks for different layers, and for different projections.

python examples/ranks_by_layer.py
"""

import transformers as tf

import deltakit as dk

config = tf.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=1000
)
model = tf.LlamaForCausalLM(config)

# The first selector that matches a layer, or a module around it, counts. `*` is the rest.
delta = dk.attach(model, dk.LoRA(r={"layers.{0-3}": 4, "q_proj": 8, "*": 16}, alpha=16))
print(delta)
for path, (lora,) in delta.modules.items():
    print(f"{path:35} rank {len(lora.A):2}")
delta.detach()

# A selector that decides nothing raises an error: a rank that you wrote is never ignored.
try:
    dk.attach(model, dk.LoRA(r={"layers.{0-3}": 4, "k_proj": 8, "*": 16}))
except dk.OptionError as error:
    print("error:", error)
