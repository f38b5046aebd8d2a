"""What stands on a backbone beside the hooks of deltas."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltakit as dk
from deltakit.injection.backbone_guards import InputGradients


def block(training=True, checkpointing=True, **options):
    module = nn.Linear(2, 2).train(training)
    module.gradient_checkpointing = checkpointing
    if options:
        module._gradient_checkpointing_func = partial(checkpoint, **options)
    return module


def test_inputs_require_gradients_under_reentrant_checkpointing():
    x, more = torch.zeros(3, 2), object()
    for module in (block(use_reentrant=True), block(), block(preserve_rng_state=False)):
        found = InputGradients()(module, (x, more))
        assert found[0].requires_grad
        assert torch.equal(found[0], x)
        assert found[1:] == (more,)
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (block(use_reentrant=False), (torch.zeros(3, 2),)),
        (block(training=False), (torch.zeros(3, 2),)),
        (block(checkpointing=False), (torch.zeros(3, 2),)),
        (nn.Linear(2, 2), (torch.zeros(3, 2),)),
        (block(), ()),
        (block(), (None,)),
        (block(), (torch.zeros(3, 2, requires_grad=True),)),
        (block(), (torch.zeros(3, 2, dtype=torch.long),)),
    ],
)
def test_other_inputs_stay(module, args):
    assert InputGradients()(module, args) is None


def test_inputs_stay_where_no_gradients_are_recorded():
    with torch.no_grad():
        assert InputGradients()(block(), (torch.zeros(3, 2),)) is None


@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_makes_nested_tensors_as_before(nested):
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    with_delta, without = (nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested) for _ in range(2))
    delta = dk.attach(nn.ModuleList([with_delta, without]), dk.LoRA(r=2, at="0.layers.0.linear1"))
    assert [with_delta.use_nested_tensor, without.use_nested_tensor] == [False, nested]
    delta.detach()
    assert [with_delta.use_nested_tensor, without.use_nested_tensor] == [nested, nested]
