"""Train a delta in a plain PyTorch loop. Three lines are new, marked `# 1` to `# 3`.

python examples/plain_loop.py
"""

import torch
import transformers as tf

import deltakit as dk


def fresh_model():
    # In your code: tf.AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2). A new head is
    # random. The seed makes it the same in each call: `dk.load` refuses a model with other weights.
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


# Two kinds of texts, with different words.
labels = torch.arange(256) % 2
texts = torch.randint(5, 50, (256, 9)) + 50 * labels[:, None]
train, valid = range(192), range(192, 256)

model = fresh_model()
delta = dk.attach(model, dk.LoRA(r=8), train="@head")  # 1
print(delta)  # 2

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
model.train()
for epoch in range(4):
    for rows in torch.utils.data.DataLoader(train, batch_size=32, shuffle=True):
        loss = model(texts[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

delta.save("plain-loop-delta")  # 3

model.eval()
predicted = model(texts[valid]).logits.argmax(1)
print(f"accuracy: {(predicted == labels[valid]).float().mean():.0%}")
other = fresh_model().eval()
dk.load("plain-loop-delta", other)
same = torch.equal(other(texts[valid]).logits.argmax(1), predicted)
print("loaded onto a fresh backbone, same predictions:", same)
