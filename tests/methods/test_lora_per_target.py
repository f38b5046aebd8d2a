"""Ranks and alphas of LoRA that differ between targets: `LoRA(r={"layers.0": 4, "*": 2})`."""

import copy
import re

import pytest
import torch
from torch import nn

import deltakit as dk
from support.forged_files import forge
from support.models import Transformer, ids, randomize, same, snapshot
from support.peft_models import adapted, close, opened, outputs, wide

RANKS = {"layers.0": 4, "*": 2}
ALPHAS = {"q_proj": 3, "re:.*v_proj": 5}
EXPECTED = {
    "layers.0.self_attn.q_proj": (4, 3),
    "layers.0.self_attn.v_proj": (4, 5),
    "layers.1.self_attn.q_proj": (2, 3),
    "layers.1.self_attn.v_proj": (2, 5),
}


def attached(model, name=None, **options):
    return randomize(dk.attach(model, dk.LoRA(r=RANKS, alpha=ALPHAS, **options), name=name, train=()), 0.3)


def test_it_is_the_formula_at_each_target():
    model = Transformer().eval().double()
    by_hand = copy.deepcopy(model)
    delta = attached(model)
    assert delta.modules.keys() == EXPECTED.keys()
    for path, (r, alpha) in EXPECTED.items():
        (module,) = delta.modules[path]
        assert (module.A.shape, module.B.shape) == ((r, 20), (20, r))
        with torch.no_grad():
            by_hand.get_submodule(path).weight += alpha / r * module.B @ module.A
    torch.testing.assert_close(model(ids()), by_hand(ids()), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(ids()), delta.detach().backbone(ids()))


def test_it_equals_the_patterns_of_peft(tmp_path):
    """The file of deltakit, with one padded rank, and PEFT's own with patterns, on the same factors."""
    peft = pytest.importorskip("peft")
    model = wide("llama")
    lora = dk.LoRA(r={"layers.1.self_attn.q_proj": 3, "v_proj": 1, "*": 2}, alpha={"v_proj": 7, "*": 4})
    delta = randomize(dk.attach(model, lora), 0.3)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"layers.1.self_attn.q_proj": 3, "v_proj": 1},
        alpha_pattern={"v_proj": 7},
    )
    other = adapted(wide("llama"), config, tmp_path / "theirs")
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for path, (module,) in delta.modules.items():
            for factor in "AB":
                theirs[f"base_model.model.{path}.lora_{factor}.default.weight"].copy_(getattr(module, factor))
    close("llama", outputs("llama", model), outputs("llama", other))
    delta.save(tmp_path / "ours", format="peft")
    close("llama", outputs("llama", model), outputs("llama", opened(wide("llama"), tmp_path / "ours")))


def test_the_plan_the_delta_and_the_card_show_each_rank(tmp_path):
    model = Transformer().eval()
    lora = dk.LoRA(r={"layers.0": 4, "*": 2})
    for text in (repr(dk.plan(model, lora)), repr(dk.attach(model, lora))):
        assert re.search(r"lora r=4 alpha=16 +2 targets +\+320\n +layers\.0\.self_attn\.\{q_proj,v_proj\}\n", text)
        assert re.search(r"lora r=2 alpha=16 +2 targets +\+160\n +layers\.1\.self_attn\.\{q_proj,v_proj\}\n", text)
    card = (randomize(dk.deltas(model)[0]).save(tmp_path) / "README.md").read_text()
    assert "| `lora` | r=4, alpha=16," in card
    assert "| `lora` | r=2, alpha=16," in card


def test_it_is_saved_and_loaded(tmp_path):
    model = Transformer().eval()
    delta = attached(model)
    found = model(ids())
    delta.save(tmp_path)
    delta.detach()
    again = dk.load(tmp_path, model)
    assert torch.equal(model(ids()), found)
    assert again.methods == delta.methods
    # Its methods can be attached elsewhere.
    fresh = dk.attach(Transformer(), *again.methods)
    assert {path: module.summary() for path, (module,) in fresh.modules.items()} == {
        path: f"r={r} alpha={alpha}" for path, (r, alpha) in EXPECTED.items()
    }


def test_one_value_for_all_stays_one_method():
    (method,) = dk.attach(Transformer(), dk.LoRA(r={"*": 3}, exclude="layers.1")).methods
    assert method == dk.LoRA(r=3, exclude="layers.1")


def test_it_is_merged_and_comes_off():
    model = Transformer().eval()
    before = snapshot(model)
    delta = attached(model)
    found = model(ids())
    delta.merge()
    torch.testing.assert_close(model(ids()), found, rtol=1e-5, atol=1e-5)
    delta.unmerge().detach()
    same(before, snapshot(model))


def test_swapped_and_in_one_batch():
    model = Transformer().eval()
    bare = model(ids())
    one, other = attached(model, "a"), attached(model, "b")
    with dk.use(model, "a"):
        a = model(ids())
    with dk.use(model, "b"):
        b = model(ids())
    with dk.rows(model, ["a", None, "b"]):
        mixed = model(ids())
    torch.testing.assert_close(mixed, torch.stack([a[0], bare[1], b[2]]))
    one.swap(other)
    with dk.use(model, "a"):
        assert torch.equal(model(ids()), b)


def test_the_sum_has_at_each_target_the_ranks_that_it_needs():
    model = Transformer().eval()
    attached(model, "a")
    randomize(dk.attach(model, dk.LoRA(r=3, at="q_proj"), name="b", train=()), 0.3)
    both = model(ids())
    for delta in dk.deltas(model):
        delta.active = False
    total, error = dk.combine(model, {"a": 1.0, "b": 1.0}, name="sum")
    assert error == 0
    assert {path: len(module.A) for path, (module,) in total.modules.items()} == {
        "layers.0.self_attn.q_proj": 7,
        "layers.0.self_attn.v_proj": 4,
        "layers.1.self_attn.q_proj": 5,
        "layers.1.self_attn.v_proj": 2,
    }
    total.attach()
    torch.testing.assert_close(model(ids()), both, rtol=1e-5, atol=1e-5)


def test_ranks_of_a_fused_projection_and_of_parameters():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(6, 2)})
    lora = dk.LoRA(at=["in_proj_weight", "out_proj"], r={"in_proj_weight": 3, "a": 2})
    modules = dk.attach(model, lora).modules
    assert {path: len(module.A) for path, (module,) in modules.items()} == {"a.out_proj": 2, "a.in_proj_weight": 3}
    alone = nn.MultiheadAttention(6, 2)
    with pytest.raises(dk.OptionError, match=r"no selector matches in_proj_weight, so it has no r; add '\^' for all"):
        dk.attach(alone, dk.LoRA(at="in_proj_weight", r={"out_proj": 2}))
    assert dk.attach(alone, dk.LoRA(at="in_proj_weight", r={"^": 2})).num_parameters == 2 * (6 + 18)


REFUSED = {
    "a target without a rank": ({"layers.0": 4}, r"LoRA\(r={'layers.0': 4}\): no selector matches layers.1.self_attn.q_proj, so it has no r; add 'layers.1.self_attn.q_proj', or '\*' for all others"),
    "no module": ({"layers.9": 4, "*": 2}, r"LoRA\(r=.*\): selector 'layers.9' matches none of the 26 modules"),
    "no target": ({"mlp": 4, "*": 2}, r"'mlp' matches none of the 4 targets, such as layers.0.self_attn.q_proj; correct it, or omit it"),
    "behind another": ({"*": 4, "layers.0": 2}, r"'layers.0' has no effect, because '\*' stands before it .* so write it first"),
    "none": ({}, r"LoRA\(r={}\): expected at least one selector with a value, such as {'\*': 8}"),
    "zero": ({"*": 0}, r"LoRA\(r={'\*': 0}\): expected a rank of at least 1"),
    "too large": ({"layers.0": 21, "*": 2}, r"layers.0.self_attn.q_proj: rank 21 is above the layer's size 20 to 20"),
    "a malformed one": ({"{q": 4}, r"LoRA\(r={'{q': 4}\): selector '{q': an unbalanced brace"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    ranks, message = REFUSED[case]
    model = Transformer()
    before = snapshot(model)
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(model, dk.LoRA(r=ranks))
    same(before, snapshot(model))


def test_selectors_in_a_file_are_refused(tmp_path):
    """deltakit never writes them: the rank of each target would depend on how the reader's deltakit matches."""
    model = Transformer()
    folder = randomize(dk.attach(model, dk.LoRA(r=2))).save(tmp_path / "delta")
    forge(folder, config=lambda config: config["methods"][0].update(r={"*": 2}))
    with pytest.raises(dk.CheckpointError, match=r"damaged at methods\[0\].r: expected `int`, got `object`"):
        dk.load(folder, model, name="other")
