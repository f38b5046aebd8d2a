"""LoRA on all linear layers but the head, as PEFT's `target_modules="all-linear"`.

python examples/all_linear.py
"""

import transformers as tf
from torch import nn

import deltakit as dk

config = tf.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
)
model = tf.LlamaForCausalLM(config)

# All modules (`**`) that are linear layers, without the head. The name of the class as text, "Linear", works too.
print(dk.plan(model, dk.LoRA(r=8, at="**", of=nn.Linear, exclude="@head")))

# The same by a role: a method on layers takes a container as the layers in it, and the head is in no block.
delta = dk.attach(model, dk.LoRA(r=8, at="@block"))
print(delta)
linear = {path for path, module in model.named_modules() if type(module) is nn.Linear}
print("linear layers without a LoRA:", sorted(linear - delta.modules.keys()))
