"""What the methods that change weights refuse, and faults of other implementations that they do not have."""

import re

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Transformer, attached, ids, randomize
from support.tiny_transformers import build
from support.weight_methods import CASES, chain, with_options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.VeRA(r=0), r"VeRA(r=0): expected a rank of at least 1"),
        (lambda: dk.VeRA(start=0), "VeRA(start=0): expected a finite number that is not zero"),
        (lambda: dk.VeRA(seed=-1), "VeRA(seed=-1): expected a seed of at least 0"),
        (lambda: dk.VeRA(sizes=(0, 3)), "VeRA(sizes=(0, 3)): expected an input and an output size of at least 1"),
        (lambda: dk.VeRA(dropout=1.0), "VeRA(dropout=1.0): expected a probability in [0, 1)"),
        (lambda: dk.LoHa(r=0), "LoHa(r=0): expected a rank of at least 1"),
        (lambda: dk.LoHa(alpha=-1), "LoHa(alpha=-1): expected a finite number of at least 0"),
        (lambda: dk.LoKr(factor=0), "LoKr(factor=0): expected at least 1, or -1"),
        (lambda: dk.LoKr(left=(0, 1)), "LoKr(left=(0, 1)): expected two sizes of at least 1"),
        (lambda: dk.HiRA(r=0), "HiRA(r=0): expected a rank of at least 1"),
        (lambda: dk.MiSS(mini=0), "MiSS(mini=0): expected at least 1"),
        (lambda: dk.MiSS(bat=True, mini=3), "MiSS(bat=True) has neither mini nor dropout"),
        (lambda: dk.DeLoRA(strength=0), "DeLoRA(strength=0): expected a finite number above 0"),
        (lambda: dk.DeLoRA(start="one"), "DeLoRA(start='one')"),
        (lambda: dk.GraLoRA(r=3), "GraLoRA(r=3, k=2): expected a k of at least 1, and an r that it divides"),
        (lambda: dk.GraLoRA(hybrid=-1), "GraLoRA(hybrid=-1): expected a rank of at least 0"),
        (lambda: dk.RandLoRA(r=0), "RandLoRA(r=0): expected a rank of at least 1"),
        (lambda: dk.RandLoRA(bases="dense"), "RandLoRA(bases='dense')"),
        (lambda: dk.VBLoRA(top=0), "VBLoRA(top=0): expected at least 1"),
        (lambda: dk.VBLoRA(vectors=1), "VBLoRA(vectors=1, top=2): expected at least as many vectors as top"),
    ],
)
def test_bad_options(unchecked, make, message):
    with pytest.raises(dk.OptionError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (dk.VeRA, peft.VeraConfig, {"r": "r", "start": "d_initial", "seed": "projection_prng_key"}),
        (dk.LoHa, peft.LoHaConfig, {"r": "r", "alpha": "alpha"}),
        (
            dk.LoKr,
            peft.LoKrConfig,
            {"r": "r", "alpha": "alpha", "factor": "decompose_factor", "both": "decompose_both"},
        ),
        (dk.HiRA, peft.HiraConfig, {"r": "r"}),
        (dk.MiSS, peft.MissConfig, {"r": "r"}),
        (dk.DeLoRA, peft.DeloraConfig, {"r": "r", "strength": "delora_lambda"}),
        (dk.GraLoRA, peft.GraloraConfig, {"r": "r", "alpha": "alpha", "k": "gralora_k", "hybrid": "hybrid_r"}),
        (dk.RandLoRA, peft.RandLoraConfig, {"r": "r", "alpha": "randlora_alpha", "seed": "projection_prng_key"}),
        (dk.VBLoRA, peft.VBLoRAConfig, {"r": "r", "vectors": "num_vectors", "length": "vector_length", "top": "topk"}),
    ],
    ids=lambda kind: getattr(kind, "__name__", ""),
)
def test_the_defaults_are_those_of_peft(ours, theirs, options):
    assert {name: getattr(ours(), name) for name in options} == {o: getattr(theirs(), t) for o, t in options.items()}


def experts():
    return build("mixtral", tf.AutoModelForCausalLM)


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (Transformer, dk.VeRA(r=2, sizes=(20, 19)), "VeRA(sizes=(20, 19)): the largest target has 20 to 20 features; use at least"),
        (Transformer, dk.RandLoRA(r=2, sizes=(9, 30), at="up_proj"), "RandLoRA(sizes=(9, 30)): the largest target has 20 to 28"),
        (Transformer, dk.LoKr(left=(3, 2)), "q_proj: LoKr(left=(3, 2)) does not divide its 20 output features; use other sizes"),
        (Transformer, dk.HiRA(r=21), "q_proj: rank 21 is above the layer's size 20 to 20; use HiRA(r=20) or less"),
        (Transformer, dk.DeLoRA(r=21), "q_proj: rank 21 is above the layer's size 20 to 20; use DeLoRA(r=20) or less"),
        (Transformer, dk.MiSS(r=21), "does not fit a layer of 20 to 20 features; use an r of at most 20 and a mini that divides 20"),
        (Transformer, dk.MiSS(r=3, mini=7), "does not fit a layer of 20 to 20 features"),
        (Transformer, dk.MiSS(r=3, bat=True), "expects sizes that r divides, and the layer has 20 to 20 features; use another r"),
        (Transformer, dk.GraLoRA(r=3, k=3), "GraLoRA(k=3) expects sizes that k divides, and the layer has 20 to 20 features"),
        (Transformer, dk.VBLoRA(length=8), "VBLoRA(length=8) expects sizes that it divides, and the layer has 20 to 20 features"),
        (Transformer, dk.VeRA(r=2, at="norm_1"), "norm_1: VeRA works on Linear, Conv1D"),
        (Transformer, dk.LoHa(r=2, at="norm_1"), "norm_1: LoHa works on Linear, Conv1D"),
        (experts, dk.VeRA(r=2, at="experts.gate_up_proj"), "VeRA changes one matrix, and this is a stack of them; use LoRA"),
        (lambda: build("gpt2", tf.AutoModelForCausalLM), dk.LoHa(r=2, at="lm_head"), "an update of this module alone would make the two differ; write at='lm_head.weight'"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), dk.VeRA(r=2, dropout=0.1, at="out_proj"), "a.out_proj: VeRA(dropout=0.1) drops inputs"),
    ],
)  # fmt: skip
def test_bad_targets(make, method, message):
    with pytest.raises(dk.DeltaError, match=re.escape(message)):
        dk.attach(make(), method)


@pytest.mark.parametrize("method", [dk.LoHa(r=2), dk.HiRA(r=2)], ids=["loha", "hira"])
def test_stacks_of_experts(method):
    model = experts()
    x = torch.randint(3, 90, (2, 5))
    bare = model(x).logits
    delta = randomize(dk.attach(model, with_options(method, at="experts.gate_up_proj")), 0.5)
    with torch.no_grad():
        changed = model(x).logits
        assert not torch.allclose(changed, bare)
        delta.merge()
        torch.testing.assert_close(model(x).logits, changed, rtol=1e-4, atol=1e-5)


def test_the_same_frozen_factors_on_other_targets():
    """By default their numbers depend on the largest target, as PEFT's do; `sizes` fixes them."""
    model = Transformer()

    def factors(**options):
        delta = dk.attach(model, dk.VeRA(r=3, **options), name="other")
        (module,), *_ = delta.modules.values()
        shared = module.shared
        delta.detach()
        return shared.A[:, :20], shared.B[:20]

    wide = factors(at=["q_proj", "down_proj"])
    assert not torch.equal(factors(at="q_proj")[0], wide[0])
    for own, other in zip(factors(at="q_proj", sizes=(28, 20)), wide, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(("start", "largest"), [("random", 100), ("zero", 1e9)])
def test_the_first_gradients_of_delora_are_of_the_size_of_lora(start, largest):
    """With B = 0, as in PEFT, the normalization divides the first gradient of B by 1e-4."""

    def norm(method):
        torch.manual_seed(0)
        model = Transformer()
        delta = dk.attach(model, method)
        model(ids()).square().sum().backward()
        return max(float(parameter.grad.norm()) for parameter in delta.parameters())

    ratio = norm(dk.DeLoRA(r=3, strength=1, start=start)) / norm(dk.LoRA(r=3, alpha=3))
    assert ratio < largest
    assert start == "random" or ratio > 1000


def test_lokr_builds_no_kronecker_product_on_linear_layers(monkeypatch):
    model = Transformer()
    attached(model, dk.LoKr(r=2))
    monkeypatch.setattr(torch, "kron", lambda *_: pytest.fail("it was built"))
    model(ids()).sum().backward()


@pytest.mark.parametrize("name", ["LoHa", "HiRA", "MiSS, bat"])
def test_the_full_update_is_not_kept_for_the_backward_pass(name):
    case = CASES[name]
    model, _ = chain(case)
    randomize(dk.attach(model, with_options(case.ours, at="first")))
    x = torch.randn(2, case.sizes[0], dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.first(x)
    weight = model.first.weight
    assert not [t for t in kept if t.shape == weight.shape and t.data_ptr() != weight.data_ptr()]


@pytest.mark.parametrize("name", ["VeRA", "RandLoRA", "VBLoRA", "MiSS"])
def test_what_all_targets_share_is_there_once(name):
    case = CASES[f"{name}, uniform" if name == "RandLoRA" else name]
    model = nn.ModuleList([chain(case)[0] for _ in range(3)])
    delta = dk.attach(model, with_options(case.ours, at="first"))
    held = {id(module.shared) for (module,) in delta.modules.values()}
    assert len(held) == 1
    assert len([name for name in delta.state_dict() if "shared" in name]) == (name == "VBLoRA")


def test_sums_of_two_low_rank_methods_at_one_target(tmp_path):
    model = Transformer().double()
    one = attached(model, dk.LoRA(r=2), dk.VeRA(r=3), name="one")
    two = attached(model, dk.VeRA(r=3), name="two")
    bare = torch.zeros(())
    for delta, weight in ((one, 0.5), (two, 2.0)):
        delta.scale = weight
    expected = model(ids())
    combined, error = dk.combine(model, {"one": 0.5, "two": 2.0})
    assert error < 1e-12
    one.detach(), two.detach()
    bare = model(ids())
    combined.attach()
    torch.testing.assert_close(model(ids()), expected, rtol=1e-10, atol=1e-10)
    combined.save(tmp_path)
    combined.detach()
    assert torch.equal(model(ids()), bare)
    dk.load(tmp_path, model)
    torch.testing.assert_close(model(ids()), expected, rtol=1e-10, atol=1e-10)


def test_sums_of_miss_of_different_sizes():
    model = Transformer().double()
    attached(model, dk.MiSS(r=3, at="up_proj"), name="one"), attached(model, dk.MiSS(r=5, at="up_proj"), name="two")
    combined = dk.combine(model, {"one": 1.0, "two": 1.0}).delta
    assert [method.name for method in combined.methods] == ["lora"]
    attached(model, dk.MiSS(r=2, bat=True, at="up_proj"), name="three")
    with pytest.raises(dk.TargetError, match="MiSS.bat=True. has no weighted sums with others than of the same r"):
        dk.combine(model, {"one": 1.0, "three": 1.0})


@pytest.mark.parametrize("sizes", [[(1400, 1100), (1100, 1400)], [(1400, 1400)]], ids=["wide and tall", "one layer"])
def test_frozen_factors_that_are_larger_than_any_weight_are_loaded(sizes, tmp_path):
    """A load refuses to create tensors that nothing gives a reason for, and these are as wide and tall as no layer is."""
    model = nn.ModuleList([nn.Linear(*size) for size in sizes])
    delta = randomize(dk.attach(model, dk.RandLoRA(r=100, at="*")))
    expected = model[0](torch.ones(1, 1400))
    delta.save(tmp_path)
    delta.detach()
    dk.load(tmp_path, model)
    assert torch.equal(model[0](torch.ones(1, 1400)), expected)
