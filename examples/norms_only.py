"""Train only the norms: a few hundred parameters, saved as differences from the model's own.

python examples/norms_only.py
"""

import torch
import transformers as tf

import deltakit as dk

torch.manual_seed(0)
config = tf.ViTConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
)
model = tf.ViTForImageClassification(config)

# LNTuning adds a trained difference to each weight and bias of a norm, so it can be switched off, summed and merged.
delta = dk.attach(model, dk.LNTuning(), train="@head")
print(delta)

labels = torch.arange(32) % 2
images = torch.randn(32, 3, 16, 16) + labels[:, None, None, None]
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(20):
    loss = model(pixel_values=images, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss after 20 steps: {loss.item():.3f}")
print("norms alone:", sum(p.numel() for site in delta.modules.values() for m in site for p in m.parameters()))
