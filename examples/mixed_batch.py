"""Three deltas in one batch: each example has its own, or none.

python examples/mixed_batch.py
"""

import torch
import transformers as tf

import deltakit as dk

torch.manual_seed(0)
config = tf.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
)
model = tf.LlamaForCausalLM(config).eval()

# Three methods, three tasks. Random values stand for training.
methods = {"spelling": dk.LoRA(r=4), "topic": dk.Adapter(size=8), "facts": dk.Prefix(tokens=3)}
for name, method in methods.items():
    delta = dk.attach(model, method, name=name)
    for parameter in delta.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

texts = torch.randint(3, 100, (4, 7))
tasks = ["spelling", None, "facts", "topic"]
with dk.rows(model, tasks):  # also in training, and in generate
    together = model.generate(texts, max_new_tokens=5, do_sample=False, pad_token_id=0)

for row, (task, text) in enumerate(zip(tasks, texts, strict=True)):
    with dk.use(model, task):
        alone = model.generate(text[None], max_new_tokens=5, do_sample=False, pad_token_id=0)
    print(f"{task!s:8} {together[row, 7:].tolist()}, as alone: {torch.equal(together[row], alone[0])}")
