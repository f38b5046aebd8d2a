"""Load a saved delta and go on training it.

The optimiser starts anew. To resume a run exactly, with its optimiser and its random numbers, see `trainer_resume.py`.

python examples/continue_training.py
"""

import torch
import transformers as tf

import deltakit as dk

config = tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
texts = torch.randint(0, 100, (8, 9), generator=torch.Generator().manual_seed(1))


def fresh_model():
    # The same weights in each call, as from_pretrained gives them. `dk.load` refuses a model with other weights.
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(config)


def train(model, delta, steps):
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(texts, labels=texts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(texts, labels=texts).loss.item()


model = fresh_model()
delta = dk.attach(model, dk.LoRA(r=8, at="@block"))
print(f"first day: loss {train(model, delta, 30):.3f}")
delta.save("first-day-delta")

model = fresh_model()
delta = dk.load("first-day-delta", model)  # attached, and its parameters require gradients
print(f"loaded: loss {train(model, delta, 0):.3f}")
print(f"second day: loss {train(model, delta, 30):.3f}")
delta.save("second-day-delta", results={"loss": train(model, delta, 0)})
print(dk.inspect("second-day-delta"))
