"""Train a delta in an `accelerate` loop. Three lines are new, marked `# 1` to `# 3`.

Attach before `accelerator.prepare`, so that DDP or FSDP2 synchronises the delta's gradients.

    accelerate launch examples/accelerate_loop.py
"""

import torch
import transformers as tf
from accelerate import Accelerator

import deltakit as dk


def fresh_model():
    # In your code: tf.AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


accelerator = Accelerator(cpu=not torch.cuda.is_available())
# Two kinds of texts, with different words.
labels = torch.arange(256) % 2
texts = torch.randint(5, 50, (256, 9)) + 50 * labels[:, None]

model = fresh_model()
delta = dk.attach(model, dk.LoRA(r=8), train="@head")  # 1
accelerator.print(delta)  # 2

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
batches = torch.utils.data.DataLoader(list(zip(texts, labels, strict=True)), batch_size=32, shuffle=True)
prepared, optimizer, batches = accelerator.prepare(model, optimizer, batches)
prepared.train()
for epoch in range(2):
    for text, label in batches:
        loss = prepared(text, labels=label).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

# Every process must call save: with FSDP2 each holds only a shard of the delta.
delta.save("accelerate-delta")  # 3
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    other = fresh_model().eval()
    dk.load("accelerate-delta", other)
    same = torch.equal(other(texts).logits.argmax(1), model.cpu().eval()(texts).logits.argmax(1))
    print("loaded onto a fresh backbone, same predictions:", same)
accelerator.end_training()
