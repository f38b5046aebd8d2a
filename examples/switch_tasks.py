"""Keep several tasks on one model, and switch between them.

python examples/switch_tasks.py
"""

import torch
import transformers as tf

import deltakit as dk

torch.manual_seed(0)
config = tf.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
)
model = tf.LlamaForCausalLM(config).eval()
question = torch.randint(0, 100, (1, 7))


def answer():
    with torch.no_grad():
        return model(question).logits


def train(delta, target):
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    for _ in range(20):
        model(question, labels=torch.full_like(question, target)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


bare = answer()
# Each task is trained with the other one switched off: active and trainable are independent of each other.
for number, name in enumerate(("spelling", "topic")):
    delta = dk.attach(model, dk.LoRA(r=4, at="@block"), name=name)
    dk.use(model, name)
    train(delta, target=number)

for name in ("spelling", "topic", None):
    dk.use(model, name)
    print(f"{name or 'no task':8} next tokens {answer().argmax(-1)[0].tolist()}")
print("without a task, the bare model:", torch.equal(answer(), bare))

with dk.use(model, "topic"):  # for a block
    inside = answer().argmax(-1)[0].tolist()
print("inside the block:", inside)
print(dk.show(model))
