"""Modules with deltas that the user or a library replaces, removes or passes over: the next forward says so."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer, attached, ids, same, snapshot

GONE = "delta 'delta': classifier is no longer in the backbone"


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


@pytest.fixture
def model():
    return Transformer().eval()


def test_a_forward_says_once_that_a_target_was_replaced(model):
    attached(model, dk.LoRA(r=2), dk.BitFit(at="classifier"))
    assert not warnings_of(lambda: model(ids()))
    model.classifier = nn.Linear(20, 5)
    (said,) = warnings_of(lambda: model(ids()))
    assert said.startswith(GONE)
    assert not warnings_of(lambda: model(ids()))
    # As an error it is raised until somebody reacts.
    model.layers[0].self_attn.q_proj = nn.Linear(20, 20)
    for _ in range(2):
        with pytest.raises(dk.DeltaWarning, match=r"q_proj is no longer in the backbone \(1 such modules\)"):
            model(ids())


@pytest.mark.parametrize(
    "change", ["before the first forward", "between two attaches", "in a copy", "after unpickling"]
)
def test_it_is_noticed_whenever_it_happens(model, change):
    delta = attached(model, dk.LoRA(r=2), dk.BitFit(at="classifier"))
    if change != "before the first forward":
        model(ids())
    if change == "in a copy":
        model = copy.deepcopy(model)
    if change == "after unpickling":
        model = pickle.loads(pickle.dumps(model))
    model.classifier = nn.Linear(20, 5)
    if change == "between two attaches":
        dk.attach(model, dk.Adapter(size=2), name="other")
    assert [said[: len(GONE)] for said in warnings_of(lambda: model(ids()))] == [GONE]
    del delta


def test_what_is_removed_with_the_module_around_it():
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 3).eval(), torch.randn(2, 5, 12)
    before = snapshot(model)
    layers = model.layers
    delta = attached(model, dk.LoRA(r=2, at="layers.{0-2}.self_attn.in_proj_weight"))
    model.layers = model.layers[:1]
    (said,) = warnings_of(lambda: model(x))
    assert r"layers.1.self_attn is no longer in the backbone (2 such modules)" in said
    delta.detach()
    model.layers = layers
    same(before, snapshot(model))


class Reads(nn.Module):
    """Reads the weight of its layer, which is never called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight)


def test_weight_patches_of_a_removed_module_go_with_the_delta():
    model = nn.Sequential(Reads())
    before, (old,) = snapshot(model), model
    delta = attached(model, dk.LoRA(r=2, at="0.layer.weight"))
    model[0] = Reads()
    delta.detach()
    assert not old._forward_hooks
    assert not old._forward_pre_hooks
    model[0] = old
    same(before, snapshot(model))


class Fused(nn.Module):
    """Attention whose queries and keys can be computed by one layer, as in diffusers."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)

    def fuse(self):
        self.to_qk = nn.Linear(7, 14)

    def forward(self, x):
        q, k = self.to_qk(x).chunk(2, -1) if hasattr(self, "to_qk") else (self.to_q(x), self.to_k(x))
        return self.to_out(q * k)


def test_targets_that_are_passed_over_are_an_error():
    model, x = nn.Sequential(Fused(), nn.Linear(7, 5)), torch.ones(1, 7)
    delta = attached(model, dk.LoRA(r=2, at="{to_q,to_out}"))
    model(x)
    model[0].fuse()
    for _ in range(2):
        with pytest.raises(dk.TargetError, match=r"0\.to_q: delta 'delta' did nothing here"):
            model(x)
    delta.detach()
    model(x)


def test_modules_that_are_added_and_harmless_are_not_reported():
    model, x = nn.Sequential(Fused(), nn.Linear(7, 5)), torch.ones(1, 7)
    attached(model, dk.LoRA(r=2, at="to_out"))
    model(x)
    model[0].fuse()
    model.extra = nn.Linear(2, 2)
    assert not warnings_of(lambda: nn.Sequential.forward(model[:2], x))
    model[1] = nn.Sequential(model[1])
    del model.extra
    assert not warnings_of(lambda: model(x))


def test_wrapping_a_target_in_place_is_no_replacement(model):
    """As checkpoint wrappers and FSDP1 do."""
    attached(model, dk.LoRA(r=2))
    output = model(ids())
    model.layers[0].self_attn.q_proj = Wrapper(model.layers[0].self_attn.q_proj)
    assert not warnings_of(lambda: model(ids()))
    assert torch.equal(model(ids()), output)


class Wrapper(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, input):
        return self.inside(input)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization():
    model, x = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), torch.randn(2, 7)
    attached(model, dk.LoRA(r=2, at="0"), dk.BitFit(at="2"))
    output = model(x)
    other = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    (said,) = warnings_of(lambda: other(x))
    assert "delta 'delta': 0 is no longer in the backbone (2 such modules)" in said
    assert torch.equal(model(x), output)


def test_a_half_attached_delta_is_an_error(model):
    """Two interruptions can leave one: its forwards would be wrong."""
    delta = attached(model, dk.LoRA(r=2))
    before = model(ids())
    guard = next(hook for hook in model._forward_pre_hooks.values() if type(hook).__name__ == "TargetGuard")
    from deltakit.core import RunningCall

    guard.changing = RunningCall()
    with pytest.raises(dk.StateError, match=r"was interrupted, .* detach\(\): deltakit.deltas\(model\) has its handle"):
        model(ids())
    dk.deltas(model)[0].detach()
    delta.attach()
    assert torch.equal(model(ids()), before)


def test_the_printout_says_what_was_replaced(model):
    delta = attached(model, dk.LoRA(r=2, at=["classifier", "q_proj"]), train="norm")
    before = repr(delta)
    assert "no longer" not in before
    head, norm = model.classifier, model.norm
    model.classifier, model.norm = nn.Linear(20, 3), nn.LayerNorm(20)
    gone = "no longer in the backbone: replaced or removed"
    for handle in (delta, dk.deltas(model)[0]):
        lines = repr(handle).splitlines()
        assert any(line.startswith("      layers.") and line.endswith(".self_attn.q_proj") for line in lines)
        said = " ".join(line for line in lines if gone in line)
        assert "classifier" in said
        assert "norm" in said
        assert "      classifier" not in lines
    model.classifier, model.norm = head, norm
    assert repr(delta) == before


def test_modules_beside_the_targets_may_be_exchanged():
    """Such as the head of another task. A target that this forward leaves out was called before."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.extra, self.head = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x, extra=True):
            x = self.base(x)
            return self.head(self.extra(x) if extra else x)

    model, x = Net(), torch.randn(2, 3)
    attached(model, dk.LoRA(r=2, at=["base", "extra"]))
    model(x)
    model.head = nn.Linear(3, 5)
    assert not warnings_of(lambda: model(x, extra=False))
