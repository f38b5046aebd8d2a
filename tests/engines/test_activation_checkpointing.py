"""Gradients where activations are computed again in the backward pass."""

import copy
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import deltakit as dk
from deltakit.injection.checkpointed_blocks import InputGradients, NewlyCheckpointed
from deltakit.injection.tables import ours
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

    def forward(self, x, shift):
        return torch.tanh(self.layer(x)) + shift


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter")
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {}], ids=["reentrant", "not said"])
def test_a_block_whose_input_requires_no_gradients(options):
    """Its deltas would get none. Torch takes checkpointing for reentrant where nothing is said; and the input that is made to
    require gradients must not push the other arguments out."""
    model = nn.ModuleList([ShiftedBlock()]).train()
    delta = attached(model, dk.LoRA(r=2, at="0.layer"))
    x, shift = torch.randn(3, 7), torch.randn(3, 7)
    wanted = torch.autograd.grad(model[0](x, shift).pow(3).sum(), list(delta.parameters()))
    model[0].gradient_checkpointing = True
    model[0]._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, **options)
    model[0](x, shift).pow(3).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in delta.parameters()], list(wanted))


def test_gradients_stop_at_the_lowest_delta():
    model = build("bert")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    dk.attach(model, dk.LoRA(r=3, at="encoder.layer.1/@attn.q"))
    hooks = [len(layer._forward_pre_hooks) for layer in model.encoder.layer]
    assert hooks == [0, 1]


class Blocks(nn.Module):
    """Calls two blocks."""

    def __init__(self):
        super().__init__()
        self.list = nn.ModuleList([ShiftedBlock(), ShiftedBlock()])

    def forward(self, x, shift):
        for block in self.list:
            x = block(x, shift)
        return x


def hooks_of(model):
    kinds = (NewlyCheckpointed, InputGradients)
    return [len(ours(module, kinds)) for module in (model[0], *model[0].list)]


def checkpointed(block, on=True):
    block.gradient_checkpointing = on
    block._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)


def test_blocks_get_their_hooks_once_they_are_checkpointed():
    """A hook on each block would take time in every forward. So the module that calls them has one, and looks."""
    model = nn.ModuleList([Blocks()]).train()
    delta = attached(model, dk.LoRA(r=2, at="*.layer"))
    x, shift = torch.randn(3, 7), torch.randn(3, 7)
    wanted = torch.autograd.grad(model[0](x, shift).pow(3).sum(), list(delta.parameters()))
    assert hooks_of(model) == [1, 0, 0]
    checkpointed(model[0].list[0])
    with torch.no_grad():
        model.eval()[0](x, shift)
    assert hooks_of(model) == [1, 0, 0]
    model.train()[0](x, shift).pow(3).sum().backward()
    assert hooks_of(model) == [1, 1, 0]
    torch.testing.assert_close([parameter.grad for parameter in delta.parameters()], list(wanted))
    # What is checkpointed when a delta is attached needs no look.
    checkpointed(model[0].list[0], on=False)
    checkpointed(model[0].list[1])
    delta.detach()
    assert hooks_of(model) == [0, 0, 0]
    delta.attach()
    assert hooks_of(model) == [1, 0, 1]


def test_a_copy_looks_for_its_own_checkpointed_blocks():
    model = nn.ModuleList([Blocks()]).train()
    attached(model, dk.LoRA(r=2, at="*.1.layer"))
    twin = copy.deepcopy(model)
    checkpointed(twin[0].list[1])
    twin[0](torch.randn(3, 7), torch.randn(3, 7)).sum().backward()
    assert (hooks_of(twin), hooks_of(model)) == ([1, 0, 1], [1, 0, 0])
