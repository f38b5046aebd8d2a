"""Backbones with the module names of a UNet and a text encoder, files of LoRAs for them, and the formula of their outputs."""

import torch
from torch import nn

TEXT = {
    "encoder.layers.0.self_attn.q_proj": lambda: nn.Linear(6, 6),
    "encoder.layers.0.self_attn.out_proj": lambda: nn.Linear(6, 6),
    "encoder.layers.1.mlp.fc1": lambda: nn.Linear(6, 11),
}
ATTENTION = "attentions.0.transformer_blocks.0.attn1"
UNET = {
    "conv_in": lambda: nn.Conv2d(4, 10, 3, padding=1),
    "time_embedding.linear_1": lambda: nn.Linear(10, 13),
    "down_blocks.0.resnets.0.conv1": lambda: nn.Conv2d(10, 14, 3, padding=1),
    "down_blocks.0.resnets.0.norm1": lambda: nn.GroupNorm(2, 10),
    "down_blocks.0.resnets.1.conv_shortcut": lambda: nn.Conv2d(10, 14, 1),
    "down_blocks.0.downsamplers.0.conv": lambda: nn.Conv2d(10, 10, 3, stride=2),
    f"down_blocks.1.{ATTENTION}.to_q": lambda: nn.Linear(14, 22, bias=False),
    f"down_blocks.1.{ATTENTION}.to_out.0": lambda: nn.Linear(22, 14),
    "down_blocks.1.attentions.1.proj_in": lambda: nn.Conv2d(14, 18, 1),
    "mid_block.attentions.0.proj_in": lambda: nn.Linear(14, 18),
    "mid_block.resnets.1.time_emb_proj": lambda: nn.Linear(13, 14),
    "up_blocks.0.resnets.2.conv2": lambda: nn.Conv2d(14, 10, (3, 5), padding=(1, 2)),
    "up_blocks.0.upsamplers.0.conv": lambda: nn.Conv2d(10, 10, 3, padding=1),
}


class Layers(nn.Module):
    """Modules at given paths. Each one gets an input of its own, and the outputs stand behind each other."""

    def __init__(self, modules):
        super().__init__()
        torch.manual_seed(1)
        for path, build in modules.items():
            owner = self
            for name in path.split(".")[:-1]:
                owner = owner._modules.setdefault(name, nn.Module())
            owner.add_module(path.rpartition(".")[2], build().double())
        self.paths = list(modules)
        self.eval()

    def forward(self):
        return torch.cat(
            [self.get_submodule(path)(input_of(self.get_submodule(path))).flatten() for path in self.paths]
        )


def input_of(module):
    width = (
        module.in_features
        if isinstance(module, nn.Linear)
        else getattr(module, "in_channels", None) or module.num_channels
    )
    shape = (2, 3, width) if isinstance(module, nn.Linear) else (2, width, 5, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def unet():
    return Layers(UNET)


def text():
    return Layers(TEXT)


def factors(model, r=3, flatten=()):
    """Random factors A and B of each linear layer and convolution, as diffusers and kohya shape them, by path."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for path in model.paths:
        weight = model.get_submodule(path).weight
        if weight.ndim < 2:
            continue
        a = torch.randn(r, *weight.shape[1:], generator=generator, dtype=torch.float64)
        b = torch.randn(weight.shape[0], r, *[1] * (weight.ndim - 2), generator=generator, dtype=torch.float64)
        found[path] = (a.flatten(1), b.flatten(1)) if path in flatten else (a, b)
    return found


@torch.no_grad()
def expected(build, pairs, scale_of=lambda path: 1.0, updates=()):
    """The outputs of a fresh model with the updates in its weights."""
    model = build()
    for path, (a, b) in pairs.items():
        weight = model.get_submodule(path).weight
        weight += scale_of(path) * torch.einsum("or,r...->o...", b.flatten(1), a).reshape(weight.shape)
    for name, update in dict(updates).items():
        model.get_parameter(name).add_(update)
    return model()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
