"""Weighted sums of deltas, against weights changed by hand."""

import pytest
import torch

import deltakit as dk
from support.models import Transformer, ids, randomize


def updates(delta):
    found = {}
    for path, modules in delta.modules.items():
        for module in modules:
            for name, value in module.weight_updates(delta.backbone.get_submodule(path)).items():
                found[f"{path}.{name}"] = found.get(f"{path}.{name}", 0) + value.double()
    return found


def summed(parts):
    total = {}
    for weight, delta in parts:
        for name, value in updates(delta).items():
            total[name] = total.get(name, 0) + weight * value
    return total


def two(model, one, other):
    first, second = dk.attach(model, one, name="a"), dk.attach(model, other, name="b")
    return randomize(first), randomize(second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dk.LoRA(r=2), dk.LoRA(r=3, alpha=5)),
        (dk.LoRA(r=2, at="q_proj"), dk.LoRA(r=2, at=["q_proj", "v_proj"])),
        (dk.BitFit(at="fc"), dk.BitFit(at="fc")),
        (dk.LoRA(r=2, at="embed"), dk.LoRA(r=3, at="embed")),
    ],
    ids=["ranks", "places", "bitfit", "embedding"],
)
def test_sums_are_exact(one, other, tmp_path):
    model = Transformer().eval()
    if one.name == "bitfit":
        one = other = dk.BitFit(at="**.q_proj")
        for layer in model.layers:
            layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(20))
    first, second = two(model, one, other)
    delta, error = dk.combine(model, {"a": 0.7, second: -0.3}, name="mix")
    assert error == 0
    assert (delta.attached, first.attached, second.attached) == (False, True, True)
    wanted, found = summed([(0.7, first), (-0.3, second)]), updates(delta)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    first.detach(), second.detach()
    delta.attach()
    attached = model(ids())
    fresh = Transformer().eval()
    fresh.load_state_dict(dk.base_state_dict(model), strict=False)
    delta.detach()
    delta.attach()
    assert torch.equal(model(ids()), attached)
    assert sorted(dk.load(delta.save(tmp_path), model, name="again", attach=False).modules) == sorted(delta.modules)


def test_a_rank_loses_as_little_as_can_be():
    model = Transformer().eval()
    first, second = two(model, dk.LoRA(r=3, at="q_proj"), dk.LoRA(r=4, at="q_proj"))
    delta, error = dk.combine(model, {"a": 1, "b": 2}, rank=2)
    lost = whole = 0.0
    for name, value in summed([(1, first), (2, second)]).items():
        value = value.detach()
        values = torch.linalg.svdvals(value)
        lost, whole = lost + values[2:].square().sum(), whole + values.square().sum()
        torch.testing.assert_close((updates(delta)[name] - value).norm(), values[2:].norm(), rtol=1e-4, atol=1e-5)
    assert error == pytest.approx(float((lost / whole).sqrt()), rel=1e-6)
    assert 0 < error < 1


def test_a_delta_by_half_is_half_of_it():
    model = Transformer().eval()
    delta = randomize(dk.attach(model, dk.LoRA(r=2), name="a"))
    half, _ = dk.combine(model, {"a": 0.5})
    for name, value in updates(delta).items():
        torch.testing.assert_close(updates(half)[name], value / 2)


@pytest.mark.parametrize(
    ("method", "weights", "error", "message"),
    [
        (dk.Adapter(size=2), {"a": 1.0}, dk.TargetError, "Adapter is not linear in its parameters"),
        (dk.Prefix(tokens=2), {"a": 1.0}, dk.TargetError, "Prefix.* is not linear in its parameters"),
        (dk.LoRA(r=2), {"c": 1.0}, dk.OptionError, "no delta named 'c' is attached; the attached deltas are 'a'"),
        (dk.LoRA(r=2), {}, dk.OptionError, "expected at least one delta"),
        (
            dk.LoRA(r=2),
            {"a": float("nan")},
            dk.OptionError,
            "expected a dictionary of finite numbers, found a dictionary with the number nan",
        ),
    ],
)
def test_bad_input(method, weights, error, message):
    model = Transformer().eval()
    dk.attach(model, method, name="a")
    with pytest.raises(error, match=message):
        dk.combine(model, weights)


def test_what_is_fully_trained_has_no_sum():
    model = Transformer().eval()
    dk.attach(model, dk.LoRA(r=2), name="a", train="norm")
    with pytest.raises(dk.StateError, match=r"fully trains norm\.weight"):
        dk.combine(model, {"a": 1.0})
