"""Merging a delta into the weights and taking it out again, and what merging refuses."""

import contextlib

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Kinds, Transformer, a_layer_of_each_kind, attached, randomize, same, snapshot
from support.tiny_transformers import build


def test_merging_into_what_is_no_parameter_is_an_error():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)))
    delta = dk.attach(model, dk.LoRA(r=2, at="0"))
    with pytest.raises(
        dk.TargetError, match=r"0\.weight: the backbone has no parameter of this name to merge into.*weight_norm"
    ):
        delta.merge()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_merged_and_hooked_agree(dtype, tolerance):
    model, x = a_layer_of_each_kind()
    model = model.to(dtype)
    before = snapshot(model)
    delta = attached(model, dk.LoRA(r=3, at=Kinds.NAMES))
    hooked = model(x)
    assert (delta.merge().backbone(x) - hooked).abs().max() <= tolerance * hooked.abs().max()
    delta.detach()
    same(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype):
    """Rounding the update before it is added, or adding in the weight's own dtype, would move many weights by a step."""
    layer = nn.Linear(61, 53).to(dtype)
    delta = attached(nn.ModuleDict({"layer": layer}), dk.LoRA(r=3, alpha=5, at="layer"))
    a, b = delta.state_dict().values()
    was = layer.weight.detach().clone()
    update = 5 / 3 * b.float() @ a.float()
    wanted = (was.float() + update).to(dtype)
    assert (was + update.to(dtype) != wanted).float().mean() > 0.01
    delta.merge()
    assert torch.equal(layer.weight, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_merged_is_bare_inside_detached_and_merged_again_behind_it(dtype):
    """A forgotten merge would leave the delta running by its hooks, and a wrong copy would keep unmerge() from the weights
    as they were."""
    layer = nn.Linear(61, 53).to(dtype)
    delta = attached(nn.ModuleDict({"layer": layer}), dk.LoRA(r=3, at="layer"))
    bare = layer.weight.detach().clone()
    merged = delta.merge().backbone["layer"].weight.detach().clone()
    assert not torch.equal(bare, merged)
    for raises in (False, True):
        with contextlib.suppress(ZeroDivisionError), delta.detached():
            assert torch.equal(layer.weight, bare)
            assert not delta.merged
            1 / (not raises)
        assert (delta.attached, delta.merged) == (True, True)
        assert torch.equal(layer.weight, merged)
    delta.unmerge()
    assert torch.equal(layer.weight, bare)


def test_two_updates_of_one_weight_in_one_delta_add_up():
    """The second must not take the place of the first."""
    model = nn.ModuleDict({"layer": nn.Linear(7, 5).double()})
    delta = attached(model, dk.LoRA(r=2, at="layer"), dk.LoRA(r=3, at="layer.weight"))
    x = torch.randn(3, 7).double()
    hooked = model["layer"](x)
    delta.merge()
    torch.testing.assert_close(model["layer"](x), hooked)


def test_what_is_merged_cannot_be_switched_off():
    """It would stay in the weights."""
    delta = attached(Transformer()).merge()
    with pytest.raises(dk.StateError, match=r"is merged into the weights: unmerge\(\) it before changing active"):
        delta.active = False
    assert delta.active
    delta.active = True


def test_merging_refuses_what_it_would_harm():
    model = build("gpt2", tf.AutoModelForCausalLM)
    delta = attached(model, dk.LoRA(r=3, at="wte", untie=True))
    with pytest.raises(dk.StateError, match=r"wte\.weight is tied to lm_head\.weight: merging would change both"):
        delta.merge()
    delta.detach()
    one = attached(model, dk.LoRA(r=3, at="@attn.qkv"))
    two = attached(model, dk.LoRA(r=2, at="@attn.qkv"), name="two")
    one.merge()
    with pytest.raises(dk.StateError, match="delta 'delta' is merged into it; unmerge.. that delta first"):
        two.merge()
    two.active = False
    with pytest.raises(
        dk.StateError,
        match="only a delta that is attached, active and not merged can be merged; it is attached, not active",
    ):
        two.merge()
    with pytest.raises(dk.StateError, match="'two' is not merged"):
        two.unmerge()


def test_the_bare_state_while_merged():
    model = Transformer().eval()
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    delta = randomize(dk.attach(model, dk.LoRA(r=2))).merge()
    torch.testing.assert_close(dk.base_state_dict(model), bare, rtol=0, atol=0)
    with pytest.raises(dk.StateError, match=r"q_proj\.weight: delta 'delta' is merged into this weight, and unmerging"):
        model.load_state_dict(bare)
    # As a part of a larger module, whose names have its own in front.
    with pytest.raises(
        dk.StateError, match=r"inner\.layers\..*q_proj\.weight: delta 'delta' is merged into this weight"
    ):
        nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{name}": value for name, value in bare.items()})
    delta.unmerge()
    model.load_state_dict(bare)


def test_a_part_of_a_delta_is_missing_under_any_prefix():
    """A damaged checkpoint of a larger module would load strictly, with the delta half old and half new."""
    model = nn.ModuleDict({"inner": Transformer().eval()})
    attached(model["inner"])
    state = model.state_dict()
    part = {name: value for name, value in state.items() if "layers.0.self_attn.q_proj.delta_lora" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*inner\.layers\.0\.self_attn\.q_proj\.delta_lora\.A"):
        model.load_state_dict(part)
    model.load_state_dict({name: value for name, value in state.items() if "delta_lora" not in name})


METHODS = {
    "lora": dk.LoRA(r=2, at="0"),
    "bitfit": dk.BitFit(at="0"),
    "scale": dk.IA3(at="0"),
    "input scale": dk.IA3(at="0", side="input"),
    "adapter": dk.Adapter(size=3, at="0"),
    "patch": dk.LoRA(r=2, at="0.weight"),
}


class TestBesideAnotherDelta:
    """A merged delta acts before all others at its target: with some of them that gives another function."""

    def outputs(self, first, second, merged):
        model = nn.Sequential(nn.Linear(7, 5)).double().eval()
        deltas = [dk.attach(model, method, name=name) for name, method in (("first", first), ("second", second))]
        for delta in deltas:
            randomize(delta)
        x = torch.randn(3, 7).double()
        before = model(x)
        deltas[merged].merge()
        return model(x), before

    @pytest.mark.parametrize(
        ("first", "second", "merged"),
        [
            (dk.LoRA(r=2, at="0"), dk.LoRA(r=3, at="0"), 1),
            (dk.BitFit(at="0"), dk.LoRA(r=3, at="0"), 1),
            (dk.LoRA(r=3, at="0"), dk.Adapter(size=3, at="0"), 0),
            (dk.LoRA(r=3, at="0"), dk.IA3(at="0"), 0),
            (dk.IA3(at="0", side="input"), dk.BitFit(at="0"), 1),
        ],
        ids=["two LoRA", "after a bias", "before an adapter", "before a scale", "a bias after an input scale"],
    )
    def test_it_is_the_same_function(self, first, second, merged):
        found, wanted = self.outputs(first, second, merged)
        torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("back", ["attach", "activate"])
    def test_a_delta_that_comes_back_beside_a_merged_one_is_refused(self, back):
        model = nn.Sequential(nn.Linear(7, 5)).double()
        adapter, lora = (
            dk.attach(model, dk.Adapter(size=3, at="0"), name="a"),
            dk.attach(model, dk.LoRA(r=2, at="0"), name="b"),
        )
        if back == "attach":
            adapter.detach()
        else:
            adapter.active = False
        lora.merge()
        with pytest.raises(
            dk.StateError, match=r"0: delta 'a' has a Adapter here, and with 'b' merged .* unmerge\(\) 'b' first"
        ):
            if back == "attach":
                adapter.attach()
            else:
                adapter.active = True
        lora.unmerge()
        if back == "attach":
            adapter.attach()
        else:
            adapter.active = True

    @pytest.mark.parametrize(
        ("first", "second", "merged"),
        [
            (dk.Adapter(size=3, at="0"), dk.LoRA(r=3, at="0"), 1),
            (dk.IA3(at="0"), dk.LoRA(r=3, at="0"), 1),
            (dk.LoRA(r=3, at="0"), dk.IA3(at="0", side="input"), 1),
        ],
        ids=["after an adapter", "after a scale", "an input scale beside LoRA"],
    )
    def test_or_it_is_refused(self, first, second, merged):
        with pytest.raises(
            dk.StateError, match=r"0: delta '(first|second)' has a \w+ here, and with '(first|second)' merged"
        ):
            self.outputs(first, second, merged)

    @pytest.mark.parametrize("merged", [0, 1])
    @pytest.mark.parametrize("second", METHODS)
    @pytest.mark.parametrize("first", METHODS)
    def test_each_pair_is_the_same_function_or_refused(self, first, second, merged):
        try:
            found, wanted = self.outputs(METHODS[first], METHODS[second], merged)
        except (dk.StateError, dk.TargetError) as error:
            assert "together compute something else" in str(error) or "cannot be merged" in str(error)
        else:
            torch.testing.assert_close(found, wanted)


def test_a_weight_of_another_shape_cannot_be_merged_into():
    model = nn.Sequential(nn.Linear(5, 7))
    delta = attached(model, dk.LoRA(r=2, at="0"))
    model[0].weight = nn.Parameter(torch.zeros(9, 5))
    wanted = r"shape \(7, 5\) to merge into, found torch\.float32 \(9, 5\); leave the delta attached$"
    with pytest.raises(dk.TargetError, match=wanted):
        delta.merge()


class Int8Linear(nn.Linear):
    """A weight that a layer scales itself, in a plain parameter of eight bits."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        codes = torch.randint(-127, 127, (d_out, d_in), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 127, self.bias)


def test_a_weight_of_whole_numbers_cannot_be_merged_into():
    model = nn.Sequential(Int8Linear(5, 7))
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="0"), train=()))
    wanted = r"^0\.weight: expected a floating-point weight of shape \(7, 5\) to merge into, found torch\.int8 \(7, 5\); leave"
    with pytest.raises(dk.TargetError, match=wanted):
        delta.merge()
