"""Deltas on backbones that accelerate offloads to the CPU or the disk."""

import copy

import accelerate
import pytest
import torch

import deltakit as dk
from support.models import Transformer, attached, ids, randomize

PLACES = {"embed": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "classifier": "disk"}


OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    "device_map": lambda model, folder: accelerate.dispatch_model(
        model, PLACES, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


METHODS = (dk.LoRA(r=3), dk.Adapter(size=2), dk.BitFit(), dk.Prefix(tokens=2))


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(
    "methods", [*((method,) for method in METHODS), METHODS], ids=lambda m: "+".join(x.name for x in m)
)
def test_a_delta_on_what_is_offloaded_is_trained_and_saved_as_on_what_is_not(offload, methods, tmp_path):
    torch.manual_seed(0)
    here = Transformer().eval()
    there = OFFLOADS[offload](copy.deepcopy(here), tmp_path / "weights")
    assert there.layers[1].self_attn.q_proj.weight.is_meta
    both = [(model, dk.attach(model, *methods)) for model in (here, there)]
    both[1][1].load_state_dict(randomize(both[0][1]).state_dict())
    for _ in range(2):
        for model, delta in both:
            model(ids()).square().mean().backward()
            with torch.no_grad():
                for parameter in delta.parameters():
                    parameter.sub_(parameter.grad)
                    parameter.grad = None
    for name, value in both[0][1].state_dict().items():
        torch.testing.assert_close(both[1][1].state_dict()[name], value)
    torch.manual_seed(0)
    fresh = Transformer().eval()
    dk.load(both[1][1].save(tmp_path / "delta"), fresh)
    torch.testing.assert_close(fresh(ids()), there(ids()))
    both[1][1].detach()
    both[0][1].detach()
    assert torch.equal(there(ids()), here(ids()))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_offloading_does_not_allow_is_an_error(offload, tmp_path):
    model = OFFLOADS[offload](Transformer().eval(), tmp_path / "weights")
    with pytest.raises(
        dk.StateError, match=r"train: classifier\.weight is offloaded by accelerate, and full training needs its values"
    ):
        dk.attach(model, dk.LoRA(r=3), train="@head")
    delta = attached(model, dk.LoRA(r=3))
    trained = model(ids())
    with pytest.raises(
        dk.StateError, match=r"layers\.\d\.self_attn\.q_proj\.weight: this weight is on the meta device"
    ):
        delta.merge()
    assert torch.equal(model(ids()), trained)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_delta_that_is_offloaded_with_its_backbone_runs_and_is_not_saved(offload, tmp_path):
    model = Transformer().eval()
    delta = attached(model, *METHODS[:3])
    expected = copy.deepcopy(model)(ids())
    OFFLOADS[offload](model, tmp_path / "weights")
    torch.testing.assert_close(model(ids()), expected)
    model.train()
    with pytest.raises(
        dk.StateError, match=r"q_proj: delta .delta. was offloaded with its backbone and would not be trained"
    ):
        model(ids())
    model.eval()
    with pytest.raises(
        dk.StateError, match=r"expected values to save, found a tensor on the meta device: .* attach aft"
    ):
        delta.save(tmp_path / "delta")
