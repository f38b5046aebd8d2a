"""Train a new classifier beside the delta, and save both in one file.

python examples/train_the_head.py
"""

import warnings

import torch
import transformers as tf

import deltakit as dk


def fresh_model():
    # In your code: tf.AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


# Two kinds of texts, with different words.
labels = torch.arange(32) % 2
texts = torch.randint(5, 50, (32, 9)) + 50 * labels[:, None]

model = fresh_model()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    dk.attach(model, dk.LoRA(r=4)).detach()
print("without train=:", *(warning.message for warning in caught))

delta = dk.attach(model, dk.LoRA(r=4), train="@head")
print(delta)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(30):
    model(texts, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.eval()
print(f"accuracy: {(model(texts).logits.argmax(1) == labels).float().mean():.0%}")
delta.save("head-delta")
other = fresh_model().eval()
dk.load("head-delta", other)
print("loaded with its head, same predictions:", torch.equal(other(texts).logits, model(texts).logits))
