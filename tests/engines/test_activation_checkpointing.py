"""Gradients where activations are computed again in the backward pass."""

from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import deltakit as dk
from support.backbone_inputs import hidden, inputs
from support.models import attached
from support.tiny_transformers import build


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(kind, reentrant):
    model = build(kind)
    batch = inputs(kind, model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.config.use_cache = False
    delta = attached(model, dk.LoRA(r=3), dk.Adapter(size=2))
    first = hidden(model(**batch))
    # A fixed direction: the squares of normalised states add up to a constant, whose gradient is rounding alone.
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(5))
    (first * direction).sum().backward()
    gradients = [parameter.grad.clone() for parameter in delta.parameters()]
    for parameter in delta.parameters():
        parameter.grad = None
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    (hidden(model(**batch)) * direction).sum().backward()
    for parameter, gradient in zip(delta.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * max(g.abs().max() for g in gradients)


class ShiftedBlock(GradientCheckpointingLayer):
    """A block with a second positional argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x, shift=0):
        return torch.tanh(self.layer(x)) + shift


def checkpointed(block, **options):
    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, **options)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter")
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {}], ids=["reentrant", "not said"])
def test_a_block_whose_input_requires_no_gradients(options):
    """Its deltas would get none. Torch takes checkpointing for reentrant where nothing is said; and the input that is made to
    require gradients must not push the other arguments out."""
    model = nn.ModuleList([ShiftedBlock()]).train()
    delta = attached(model, dk.LoRA(r=2, at="0.layer"))
    x, shift = torch.randn(3, 7), torch.randn(3, 7)
    wanted = torch.autograd.grad(model[0](x, shift).pow(3).sum(), list(delta.parameters()))
    checkpointed(model[0], **options)
    model[0](x, shift).pow(3).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in delta.parameters()], list(wanted))


def test_gradients_stop_at_the_lowest_delta():
    model = build("bert")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    dk.attach(model, dk.LoRA(r=3, at="encoder.layer.1/@attn.q"))
    hooks = [len(layer._forward_pre_hooks) for layer in model.encoder.layer]
    assert hooks == [0, 1]


class Stack(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Holding(nn.Module):
    """Runs the blocks of a module that it does not call, or calls the second of two modules that share them."""

    def __init__(self, shared):
        super().__init__()
        blocks = nn.ModuleList([ShiftedBlock(), ShiftedBlock()])
        self.first = Stack(blocks)
        self.second = Stack(blocks) if shared else None

    def forward(self, x):
        return self.first.forward(x) if self.second is None else self.second(x)


# Dynamo itself looks at the gradient of what a block returns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("call", ["model", "forward", "compiled"])
@pytest.mark.parametrize("shared", [False, True], ids=["not called", "shared"])
def test_blocks_that_are_checkpointed_after_attach(call, shared):
    """Nothing but the blocks themselves is sure to run before them, and to know by then that they are checkpointed."""
    torch._dynamo.reset()
    model = Holding(shared).train()
    delta = attached(model, dk.LoRA(r=2, at="*.layer"))
    x = torch.randn(3, 7)
    wanted = torch.autograd.grad(model(x).pow(3).sum(), list(delta.parameters()))
    for block in model.first.blocks:
        checkpointed(block, use_reentrant=True)
    run = {"model": model, "forward": model.forward, "compiled": torch.compile(model, backend="aot_eager")}[call]
    run(x).pow(3).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in delta.parameters()], list(wanted))
