"""Backbones of quantized linear layers: int4 packed as GPTQ and AWQ pack it, and those of bitsandbytes."""

import warnings

import pytest
import torch
from torch import nn

from support.tiny_transformers import build


def pack(codes, dim):
    """Int4 codes, eight of them in an int32 along a dimension, with zeros at the end."""
    codes = codes.movedim(dim, -1).long()
    codes = nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (codes << torch.arange(0, 32, 4)).sum(-1).to(torch.int32).movedim(-1, dim)


def unpack(packed, dim, size):
    codes = (packed.movedim(dim, -1).unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return codes.flatten(-2)[..., :size].movedim(-1, dim)


class PackedLinear(nn.Module):
    """A linear layer without a `weight`: `qweight` and `qzeros` in int32 and `scales` are buffers, as is the bias."""

    packed_along = 0

    def __init__(self, linear, dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().T
        low, high = weight.amin(0), weight.amax(0)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        codes = (weight / scales + zeros).round().clamp(0, 15)
        self.register_buffer("qweight", pack(codes, self.packed_along))
        self.register_buffer("qzeros", pack(zeros[None], 1))
        self.register_buffer("scales", scales[None].to(dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, input):
        size = (self.in_features, self.out_features)[self.packed_along]
        codes = unpack(self.qweight, self.packed_along, size) - unpack(self.qzeros, 1, self.out_features)
        y = input @ (codes * self.scales).to(input.dtype)
        return y if self.bias is None else y + self.bias


class GPTQLike(PackedLinear):
    pass


class AWQLike(PackedLinear):
    packed_along = 1


def of_bitsandbytes(linear, dtype, bits):
    with warnings.catch_warnings():
        # Of torch.jit, while it is imported.
        warnings.simplefilter("ignore")
        layers = pytest.importorskip("bitsandbytes").nn
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if bits == 8:
        layer = layers.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        layer = layers.Linear4bit(*sizes, quant_type="nf4", compute_dtype=dtype)
    layer.load_state_dict(linear.state_dict())
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    # It is quantized as it is moved.
    return layer.to("cpu")


KINDS = {
    "gptq": GPTQLike,
    "awq": AWQLike,
    "bitsandbytes_8bit": lambda linear, dtype: of_bitsandbytes(linear, dtype, 8),
    "bitsandbytes_4bit": lambda linear, dtype: of_bitsandbytes(linear, dtype, 4),
}


def quantized_backbone(kind, architecture, dtype=torch.float32, change=None):
    """A tiny backbone with its blocks' linear layers quantized, and the rest in the dtype that is computed in.

    `change` is called with the modules of the blocks, before they are quantized.
    """
    model = build(architecture).to(dtype)
    for path, module in model.named_modules():
        if change is not None and ".layer" in f".{path}":
            change(module)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layer" in f".{path}":
            model.set_submodule(path, KINDS[kind](linear.float(), dtype))
    model.requires_grad_(False)
    return model


def embedding_of_bitsandbytes(embedding, bits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = pytest.importorskip("bitsandbytes").nn
    layer = {4: layers.Embedding4bit, 8: layers.Embedding8bit}[bits](*embedding.weight.shape)
    layer.load_state_dict(embedding.state_dict())
    # As in `of_bitsandbytes`; moving the whole layer on a CPU drops the scales of 8 bits.
    layer.weight = layer.weight.to("cpu")
    return layer
