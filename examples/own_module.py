"""LoRA on a module of your own, by the names of its layers. Any `nn.Module` will do.

python examples/own_module.py
"""

import torch
from torch import nn

import deltakit as dk


class Mixer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.narrow(torch.tanh(self.widen(x)))


class Forecast(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(5, 32)
        self.mixers = nn.ModuleList(Mixer(32) for _ in range(3))
        self.say = nn.Linear(32, 2)

    def forward(self, x):
        x = self.read(x)
        for mixer in self.mixers:
            x = mixer(x)
        return self.say(x)


torch.manual_seed(0)
model, x = Forecast(), torch.randn(64, 5)
target = torch.stack([x.sum(1), x.prod(1)], dim=1)
before = model(x)

# `plan` shows what would be attached, and changes nothing. A name that matches nothing raises an error.
method = dk.LoRA(r=4, at="mixers.{1-2}.{widen,narrow}")
print(dk.plan(model, method))

delta = dk.attach(model, method)
print(dk.show(model))
optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
for step in range(100):
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 33 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

delta.detach()
print("after detach, the outputs of the untouched model:", torch.equal(model(x), before))
