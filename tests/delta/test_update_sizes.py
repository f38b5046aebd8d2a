"""`delta.show()`: the norms are those of the formula, and the target that changed more has the larger figure."""

import json
import math
import re

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.delta.update_sizes import UpdateSize, UpdateSizes
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build


def sizes(delta, **options):
    return {(size.path, size.method): size for size in delta.show(**options).sizes}


def test_lora_s_norms_are_those_of_the_formula():
    model = Transformer()
    weights = {path: module.weight.detach().double() for path, module in dk.select(model, "q_proj").items()}
    delta = randomize(dk.attach(model, dk.LoRA(r=3, alpha=6, at="q_proj")))
    delta.scale = 0.5
    for path, (module,) in delta.modules.items():
        update = 0.5 * 6 / 3 * module.B.detach().double() @ module.A.detach().double()
        size = sizes(delta)[path, "lora"]
        assert size.update == pytest.approx(float(update.norm()), rel=1e-5)
        assert size.weight == pytest.approx(float(weights[path].norm()), rel=1e-5)
        assert size.ratio == pytest.approx(float(update.norm() / weights[path].norm()), rel=1e-5)


def test_an_untrained_delta_has_changed_nothing_and_training_shows():
    model = Transformer()
    delta = dk.attach(model, dk.LoRA(r=3))
    assert {size.ratio for size in delta.show().sizes} == {0.0}
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.5)
    model(ids()).square().mean().backward()
    optimizer.step()
    assert all(size.ratio > 0 for size in delta.show().sizes)


def test_the_larger_b_has_the_larger_figure_and_bar():
    model = Transformer()
    delta = randomize(dk.attach(model, dk.LoRA(r=3, at="v_proj")))
    large = delta.modules["layers.1.self_attn.v_proj"][0]
    large.B.data.mul_(20)
    first, second = delta.show().sizes
    assert second.ratio > 5 * first.ratio
    assert [size.path for size in delta.show(top=1).sizes] == ["layers.1.self_attn.v_proj"]
    assert str(delta.show(top=1)).endswith("\n  and 1 more")
    small_line, large_line = str(delta.show()).splitlines()[2:]
    assert large_line.startswith("  ██████████  ")
    assert small_line.count("█") < 3
    assert "linear-gradient(to right,rgba(56,139,253,.45) 100%" in delta.show().html()


def test_feature_slices_are_compared_with_their_part_of_the_weight():
    model = build("gpt2")
    weight = model.h[0].attn.c_attn.weight.detach().double()  # [in, 3 * out]
    delta = randomize(dk.attach(model, dk.LoRA(r=3)))
    found = sizes(delta)
    for place, letter in ((0, "q"), (2, "v")):
        own = weight[:, 24 * place : 24 * (place + 1)]
        assert found[f"h.0.attn.c_attn[{letter}]", "lora"].weight == pytest.approx(float(own.norm()), rel=1e-5)


def test_methods_without_a_weight_form_and_full_training():
    model = Transformer()
    delta = dk.attach(model, dk.LoRA(r=3, at="q_proj"), dk.Adapter(size=5), train="classifier")
    before = model.classifier.weight.detach().double().clone()
    with torch.no_grad():
        model.classifier.weight.mul_(1.25)
    found = sizes(delta)
    assert {size.ratio for (_, method), size in found.items() if method == "adapter"} == {None}
    assert found["classifier.weight", "fully trained"].ratio == pytest.approx(0.25)
    assert found["classifier.weight", "fully trained"].weight == pytest.approx(float(before.norm()), rel=1e-5)
    text = str(delta.show())
    assert "- : AdapterDelta does not change weights" in text
    delta.detach()
    assert sizes(delta) == found
    delta.attach().active = False
    assert sizes(delta) == found


def tensors(model, path):
    """Copies of the parameters at a path, which may be that of a parameter."""
    (found,) = dk.select(model, path).values()
    named = {"": found} if isinstance(found, nn.Parameter) else dict(found.named_parameters(recurse=False))
    return {name: parameter.detach().clone() for name, parameter in named.items()}


@pytest.mark.parametrize(
    "method", [dk.LoRA(r=3), dk.LoRA(r=3, dora=True), dk.LoHa(r=2), dk.LNTuning(), dk.IA3(), dk.OFT(), dk.BitFit()]
)
def test_merging_changes_the_weights_by_these_norms(method):
    model = Transformer()
    if isinstance(method, dk.BitFit):
        method = dk.BitFit(at="up_proj")
        nn.init.normal_(model.layers[0].mlp.up_proj.bias)
    delta = randomize(dk.attach(model, method))
    before = sizes(delta)
    own = {path: tensors(model, path) for path, _ in before}
    delta.merge()
    merged = sizes(delta)
    for (path, name), size in before.items():
        moved = [value - own[path][n] for n, value in tensors(model, path).items()]
        assert size.update == pytest.approx(math.hypot(*(float(m.norm()) for m in moved)), rel=1e-3, abs=1e-6)
        assert merged[path, name].update == pytest.approx(size.update, rel=1e-3, abs=1e-6)
        assert merged[path, name].weight == pytest.approx(size.weight, rel=1e-5)


def test_what_has_no_values_or_is_gone():
    with torch.device("meta"):
        empty = Transformer()
    (first, *_) = dk.attach(empty, dk.LoRA(r=3)).show().sizes
    assert (first.update, first.ratio) == (None, None)
    model = Transformer()
    delta = dk.attach(model, dk.LoRA(r=3, at="q_proj"))
    model.layers[0].self_attn = nn.Identity()
    found = sizes(delta)["layers.0.self_attn.q_proj", "lora"]
    assert (found.ratio, found.why) == (None, "it is no longer in the backbone")


def test_json_and_bad_options():
    delta = randomize(dk.attach(Transformer(), dk.LoRA(r=3), dk.Prefix(tokens=2)))
    data = json.loads(json.dumps(delta.show().to_dict()))
    assert {target["method"] for target in data["targets"]} == {"lora", "prefix"}
    with pytest.raises(dk.OptionError, match=r"show\(top=0\): expected at least 1; omit it for all targets"):
        delta.show(top=0)


def test_ratios_far_above_one_are_multiples():
    for ratio, figure in {
        0.0123: "1.23 %",
        9.99: "999 %",
        10.0: "x10",
        310.4: "x310",
        31_000.0: "x31K",
        math.inf: "inf %",
        math.nan: "nan %",
    }.items():
        found = UpdateSizes("d", (UpdateSize("a", "lora", ratio, 1.0), UpdateSize("b", "lora", 0.5, 1.0)))
        assert figure in re.split(" {2,}", str(found).splitlines()[2])
        assert figure in found.html()


def test_a_width():
    delta = randomize(dk.attach(Transformer(), dk.LoRA(r=3, at="v_proj")))
    full = str(delta.show()).splitlines()
    longest = max(map(len, full[1:]))
    assert str(delta.show(width=longest)).splitlines() == full
    # First the bars go, then the starts of the names.
    narrower = str(delta.show(width=longest - 1)).splitlines()[1:]
    assert "█" not in "".join(narrower)
    assert [line.split()[-1] for line in narrower[1:]] == [f"layers.{n}.self_attn.v_proj" for n in (0, 1)]
    fitting = str(delta.show(width=50)).splitlines()[1:]
    assert max(map(len, fitting)) <= 50
    assert [line.split()[0] for line in fitting] == [line.split()[0] for line in narrower]
    assert all(line.split()[-1].startswith("…") and line.endswith(".v_proj") for line in fitting[1:])
    # Figures stay where there is too little room.
    assert "%" in str(delta.show(width=1))
    assert delta.show(width=50).to_dict() == delta.show().to_dict()
    with pytest.raises(dk.OptionError, match=r"show\(width=0\): expected at least 1"):
        delta.show(width=0)
