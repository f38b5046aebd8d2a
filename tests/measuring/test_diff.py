"""`dk.diff`: every change that was made is told once, with the figures that torch computes, and nothing else is."""

import copy
import json

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer, attached
from support.quantized_layers import KINDS


def changes(a, b):
    return {(c.kind, c.before, c.after): c for c in dk.diff(a, b).changes}


def test_equal_models():
    model = Transformer()
    found = dk.diff(model, copy.deepcopy(model))
    total = len(model.state_dict())
    assert (found.changes, found.same, found.total) == ((), total, total)
    assert str(found) == "Transformer -> Transformer: no difference"
    assert not dk.diff(model, model.state_dict()).changes


def test_frozen_tensors_are_equal_too():
    model = nn.Sequential(nn.Linear(5, 7))
    frozen = copy.deepcopy(model).requires_grad_(False)
    found = dk.diff(model, frozen)
    assert [change.kind for change in found.changes] == ["trainable"]
    assert (found.same, found.total) == (2, 2)


def test_values_in_repeated_blocks_share_a_row():
    model = Transformer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            layer.mlp.up_proj.weight.add_(torch.randn(28, 20), alpha=0.1 * (number + 1))
        model.norm.bias[3] = -7.5
    found = {change.where: change for change in dk.diff(before, model).changes}
    assert set(found) == {("layers.{0-1}.mlp.up_proj.weight",), ("norm.bias",)}
    assert {change.kind for change in found.values()} == {"values"}
    after = model.state_dict()
    names = [f"layers.{number}.mlp.up_proj.weight" for number in (0, 1)]
    moved = {name: after[name].double() - before[name].double() for name in names}
    ratios = [float(moved[name].norm() / before[name].double().norm()) for name in names]
    row = found[("layers.{0-1}.mlp.up_proj.weight",)]
    assert row.largest == pytest.approx(max(float(change.abs().max()) for change in moved.values()), rel=1e-5)
    assert row.relative == pytest.approx((min(ratios), max(ratios)), rel=1e-5)
    # The bias was zero: it has no relative norm.
    assert (found[("norm.bias",)].largest, found[("norm.bias",)].relative) == (7.5, None)
    assert f"{len(after) - 3} of {len(after)} tensors are equal" in str(dk.diff(before, model))


def test_modules_types_shapes_dtypes_and_flags():
    model = Transformer()
    other = copy.deepcopy(model)
    del other.norm
    other.extra = nn.Sequential(nn.Linear(2, 3))
    for layer in other.layers:
        layer.mlp.requires_grad_(False)
        layer.norm_1 = nn.Identity()
    other.classifier = nn.Linear(20, 5)
    other.embed.half()
    found = changes(model, other)
    assert found["removed", "LayerNorm", ""].where == ("norm",)
    assert found["added", "", "Sequential"].where == ("extra",)
    assert found["type", "LayerNorm", "Identity"].where == ("layers.{0-1}.norm_1",)
    assert found["trainable", "trainable", "frozen"].where == ("layers.{0-1}.mlp.{up_proj,down_proj}.{weight,bias}",)
    assert found["shape", "[3, 20]", "[5, 20]"].where == ("classifier.weight",)
    assert found["dtype", "float32", "float16"].where == ("embed.weight",)
    # What is inside an added or removed module is not listed again; that of a module of another type is.
    assert found["removed", "[20]", ""].where == ("layers.{0-1}.norm_1.{weight,bias}",)
    assert not any("extra.0" in path or path.startswith("norm.") for change in found.values() for path in change.paths)


def test_a_delta():
    model = Transformer()
    before = copy.deepcopy(model)
    delta = attached(model, dk.LoRA(r=2, at="q_proj"))
    found = changes(before, model)
    assert found["added", "", "LoRADelta"].where == ("layers.{0-1}.self_attn.q_proj.delta_lora",)
    assert {key[0] for key in found} == {"added", "trainable"}
    trained = copy.deepcopy(model)
    attached_again = dk.deltas(trained)[0]
    attached_again.modules["layers.0.self_attn.q_proj"][0].B.data.mul_(3)
    (only,) = dk.diff(model, trained).changes
    assert only.paths == ("layers.0.self_attn.q_proj.delta_lora.B",)
    assert only.relative == pytest.approx((2, 2), rel=1e-4)
    delta.detach()
    assert not dk.diff(before, model).changes


def test_state_dicts():
    a = {"x": torch.ones(3), "gone": torch.ones(2), "flag": torch.tensor([True, False])}
    b = {"x": torch.ones(3), "new": torch.ones(2, 5), "flag": torch.tensor([True, True])}
    found = changes(a, b)
    assert found["removed", "[2]", ""].paths == ("gone",)
    assert found["added", "", "[2, 5]"].paths == ("new",)
    assert found["values", "", ""].paths == ("flag",)
    assert str(dk.diff(a, b)).startswith(
        "state dict of 3 tensors -> state dict of 3 tensors: 1 of 3 tensors are equal\n"
    )


def test_what_is_no_number_and_large_integers():
    a = {"nan": torch.tensor([float("nan"), 1.0]), "inf": torch.tensor([1.0, 2.0]), "int": torch.tensor([2**53 - 1])}
    b = {
        "nan": torch.tensor([float("nan"), 1.0]),
        "inf": torch.tensor([1.0, float("inf")]),
        "int": torch.tensor([2**53 - 2]),
    }
    found = {change.paths: change for change in dk.diff(a, b).changes}
    assert set(found) == {("inf",), ("int",)}
    assert (found["inf",].largest, found["int",].largest) == (float("inf"), 1)
    data = json.loads(json.dumps(dk.diff(a, b).to_dict(), allow_nan=False))
    assert [change["largest"] for change in data["changes"]] == [None, 1]


def test_values_that_are_not_there():
    with torch.device("meta"):
        empty = nn.Linear(3, 5)
    (only,) = dk.diff(nn.Linear(3, 5), empty).changes
    assert (only.kind, only.largest, only.where) == ("values", None, ("{weight,bias}",))
    assert " unknown " in str(dk.diff(nn.Linear(3, 5), empty))


@pytest.mark.parametrize("kind", ["gptq", "bitsandbytes_4bit"])
def test_packed_weights(kind):
    plain = nn.Linear(64, 128)
    one, same = (KINDS[kind](plain, torch.float32) for _ in range(2))
    other = KINDS[kind](nn.Linear(64, 128), torch.float32)
    assert not dk.diff(nn.Sequential(one), nn.Sequential(same)).changes
    assert any("weight" in path for c in dk.diff(nn.Sequential(one), nn.Sequential(other)).changes for path in c.paths)


def test_what_is_no_model():
    with pytest.raises(dk.OptionError, match=r"diff\(a=...\): expected a torch.nn.Module or a dictionary of tensors"):
        dk.diff([nn.Linear(2, 3)], nn.Linear(2, 3))


def test_selectors_stand_below_the_rows_where_lines_are_too_long():
    a, b = Transformer(), Transformer()
    full = str(dk.diff(a, b))
    longest = max(map(len, full.splitlines()))
    assert str(dk.diff(a, b, width=longest)) == full
    found = dk.diff(a, b, width=longest - 1)
    head, *lines = str(found).splitlines()[1:]
    assert "where" not in head
    assert [line.strip() for line in lines if line.startswith("      ")] == [w for c in found.changes for w in c.where]
    assert [line.split()[0] for line in lines if not line.startswith("      ")] == [c.kind for c in found.changes]
    assert found.to_dict() == dk.diff(a, b).to_dict()
    # None is cut: they can still be copied.
    assert str(dk.diff(a, b, width=1)) == str(found)
    assert found == dk.diff(a, b)
    with pytest.raises(dk.OptionError, match=r"diff\(width=0\): expected at least 1; omit it for lines of any length"):
        dk.diff(a, b, width=0)
    with pytest.raises(dk.OptionError, match=r"diff\(a=...\): expected a torch.nn.Module or a dictionary of tensors"):
        dk.diff([nn.Linear(2, 3)], nn.Linear(2, 3))
