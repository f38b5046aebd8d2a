"""What torch and transformers do around hooks: copies, export, autocast, moves between devices. Each once broke a hook library."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from support.backbone_inputs import inputs
from support.models import Transformer, attached, ids, method_of
from support.tiny_transformers import build


@pytest.mark.parametrize("at", ["^encoder.layer.0.output.LayerNorm", "^encoder.layer.0"], ids=["inside", "the block"])
def test_hidden_states_hold_a_delta_attached_after_they_were_first_asked_for(at):
    """transformers captures what a block returns by hooks that it installs at the first call that asks for it: a delta's
    hook that came after those would change what the next block gets, and not what the user gets."""
    model = build("bert")
    batch = inputs("bert", model)
    model(**batch, output_hidden_states=True)
    attached(model, dk.Adapter(size=3, at=at))
    given = []
    model.encoder.layer[1].register_forward_pre_hook(lambda block, args: given.append(args[0]))
    late = model(**batch, output_hidden_states=True).hidden_states[1]
    assert torch.equal(late, given[0])
    fresh = build("bert")
    dk.attach(fresh, dk.Adapter(size=3, at=at)).load_state_dict(dk.deltas(model)[0].state_dict())
    torch.testing.assert_close(late, fresh(**batch, output_hidden_states=True).hidden_states[1])


def test_a_reference_taken_before_attach_sees_the_delta():
    model = Transformer().eval()
    projection, x = model.layers[0].self_attn.q_proj, torch.randn(2, 20)
    before = projection(x)
    attached(model)
    assert not torch.equal(projection(x), before)


def test_copying_a_part_does_not_drag_the_whole_along():
    model = Transformer().eval()
    attached(model)
    part = copy.deepcopy(model.layers[0])
    x = torch.randn(2, 5, 20)
    assert torch.equal(part(x), model.layers[0](x))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    part(x)


def test_jit_trace_and_export():
    model = Transformer().eval()
    attached(model, dk.LoRA(r=3), dk.Adapter(size=2))
    exported = torch.export.export(model, (ids(),)).module()
    torch.testing.assert_close(exported(ids()), model(ids()))


@pytest.mark.parametrize("layer", [Conv1D(8, 8), Conv1D(6, 8), nn.Conv1d(3, 6, 1), nn.Linear(8, 6)], ids=str)
@pytest.mark.parametrize("method", [dk.HiRA(r=3, at="0"), dk.LoRA(r=3, dora=True, at="0")], ids=lambda m: m.name)
def test_export_of_methods_that_read_the_weight(method, layer):
    """Not with `strict`: then dynamo traces, which cannot trace the checks of shapes."""
    model, x = nn.Sequential(copy.deepcopy(layer)).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    attached(model, method)
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), model(x))


def test_autocast():
    model = Transformer().eval()
    attached(model, dk.LoRA(r=3), dk.Adapter(size=2), dk.BitFit())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids())
    torch.testing.assert_close(out.float(), model(ids()), rtol=0.1, atol=0.1)


def test_to_a_device_and_back():
    model = Transformer().eval()
    delta = attached(model, dk.LoRA(r=3), train="@head")
    output, before = model(ids()), copy.deepcopy(delta.state_dict())
    model.to("meta")
    assert all(parameter.is_meta for parameter in delta.parameters())
    assert output.shape == model.to_empty(device="cpu")(ids()).shape
    assert before.keys() == delta.state_dict().keys()


@pytest.mark.parametrize("method", ["lora", "said", "loha"])
def test_the_flop_counter_counts_a_training_step(method):
    model = Transformer()
    attached(model, method_of(method))
    with FlopCounterMode(display=False) as counter:
        model(ids()).sum().backward()
    assert counter.get_total_flops() > 0
