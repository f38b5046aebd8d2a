"""LoRA and prefixes with the gates of UniPELT: their formulas in float64, the contract of all methods, and what they refuse."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import deltakit as dk
import test_contract
import test_contract_together
from support import models
from support.backbone_inputs import inputs
from support.models import Transformer, attached, ids, randomize
from support.tiny_transformers import build

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
GATED = {"lora": {"gate": True, "r": 3, "alpha": 5}, "prefix": {"gate": True, "tokens": 3}}
KINDS = ("bert", "gpt2", "t5", "bloom", "llama", "gpt_neox")
"""In the order of the ways into attention: by transformers' interface, and by torch's functions (BLOOM)."""


def states(model, batch):
    return model(**batch).last_hidden_state


def contract(module):
    """The tests of a contract suite that need nothing but a method and a backbone."""
    known = {"model", "name", "tmp_path"}
    found = [one for name, one in vars(module).items() if name.startswith("test_")]
    return [one for one in found if "name" in (own := inspect.signature(one).parameters) and own.keys() <= known]


PROMISES = [(one, torch.float32) for one in contract(test_contract)]
PROMISES += [(one, torch.float64) for one in contract(test_contract_together)]


@pytest.mark.parametrize(("promise", "dtype"), PROMISES, ids=[one.__name__ for one, _ in PROMISES])
@pytest.mark.parametrize("name", GATED)
def test_the_contract_of_all_methods(name, promise, dtype, monkeypatch, tmp_path):
    if promise.__name__ == "test_attached_and_untrained_is_the_identity" and not dk.METHODS[name].identity:
        return
    monkeypatch.setitem(models.NEEDED, name, GATED[name])
    torch.manual_seed(5)
    given = {"model": Transformer().to(dtype).eval(), "name": name, "tmp_path": tmp_path}
    promise(**{key: given[key] for key in inspect.signature(promise).parameters})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", GATED)
def test_checkpointing(name, reentrant, monkeypatch):
    monkeypatch.setitem(models.NEEDED, name, GATED[name])
    test_contract.test_gradients_under_checkpointing(Transformer().eval(), name, reentrant)


def gate_of(x, gate):
    """The gate of each example of x [examples, ..., d], written out."""
    values = 1 / (1 + (-(x @ gate.weight[0] + gate.bias)).exp())
    return values.flatten(1).mean(1) if values.ndim > 1 else values


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (3, 2, 5, 7)])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_its_formula(shape, rslora):
    layer, x = nn.Linear(7, 11).double(), torch.randn(shape, dtype=torch.float64)
    model = nn.ModuleDict({"layer": layer})
    plain = layer(x)
    delta = dk.attach(model, dk.LoRA(r=3, alpha=5, rslora=rslora, gate=True, at="layer"))
    assert torch.equal(layer(x), plain)
    (module,) = randomize(delta).modules["layer"]
    assert delta.num_parameters == 3 * 7 + 11 * 3 + 7 + 1
    assert str(delta).count("r=3 ") == str(delta).count(" gate") == 1
    gate = gate_of(x, module.gate).view(-1, *[1] * (len(shape) - 1))
    change = 5 / (3**0.5 if rslora else 3) * gate * (x @ module.A.T @ module.B.T)
    torch.testing.assert_close(layer(x), plain + change, **CLOSE)
    delta.scale = -0.5
    torch.testing.assert_close(layer(x), plain - 0.5 * change, **CLOSE)


def test_lora_in_a_fused_projection():
    model = build("gpt2").double()
    layer, x = model.h[0].attn.c_attn, torch.randn(2, 5, 24, dtype=torch.float64)
    plain = layer(x)
    delta = attached(model, dk.LoRA(r=3, alpha=3, gate=True))
    expected = plain.clone()
    for name, start in (("q", 0), ("v", 48)):
        (module,) = delta.modules[f"h.0.attn.c_attn[{name}]"]
        gate = gate_of(x, module.gate)[:, None, None]
        expected[..., start : start + 24] += gate * (x @ module.A.T @ module.B.T)
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_dropout_drops_inputs_of_the_update_and_not_of_the_gate():
    layer, x = nn.Linear(7, 11).double(), torch.randn(3, 5, 7, dtype=torch.float64)
    model = nn.ModuleDict({"layer": layer}).train()
    (module,) = attached(model, dk.LoRA(r=3, alpha=3, gate=True, dropout=0.5, at="layer")).modules["layer"]
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    plain = x @ layer.weight.T + layer.bias
    expected = plain + gate_of(x, module.gate)[:, None, None] * (dropped @ module.A.T @ module.B.T)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", GATED)
def test_gates_start_near_a_half(name):
    model = nn.TransformerEncoderLayer(700, 4, 8) if name == "prefix" else nn.ModuleDict({"q_proj": nn.Linear(700, 8)})
    at = {} if name == "prefix" else {"at": "q_proj"}
    delta = dk.attach(model, dk.METHODS[name](**GATED[name], **at))
    (module,) = next(iter(delta.modules.values()))
    assert module.gate.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not module.gate.bias.any()


@pytest.mark.parametrize("reparam", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_multiplies_the_keys_and_values_of_each_example(kind, reparam):
    """The prefix without a gate is compared with attention that is written out (`test_prefix.py`)."""
    model = build(kind).double()
    batch = inputs(kind, model)
    plain = copy.deepcopy(model)
    delta = attached(model, dk.Prefix(tokens=3, gate=True, reparam=reparam))
    seen = {}
    for path in delta.modules:
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: seen.update({path: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    found = states(model, batch)
    other = dk.attach(plain, dk.Prefix(tokens=3))
    for row in range(len(found)):
        for path, (module,) in delta.modules.items():
            gate = gate_of(seen[path], module.gate)[row]
            assert 0.01 < gate < 0.99
            (twin,) = other.modules[path]
            for own, value in zip((twin.key, twin.value), module.trained(), strict=True):
                own.data.copy_(gate * value)
        single = states(plain, batch)
        torch.testing.assert_close(found[row], single[row], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found[row - 1], single[row - 1], rtol=1e-6)


@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_attention(batch_first):
    """It has the examples in the second dimension, or, unbatched, none."""
    layer = nn.MultiheadAttention(12, 3, batch_first=batch_first).double().eval()
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    attached(nn.ModuleDict({"attention": layer}), dk.Prefix(tokens=2, gate=True))
    together = layer(x, x, x)[0]
    examples = x if batch_first else x.transpose(0, 1)
    alone = torch.stack([layer(one, one, one)[0] for one in examples])
    torch.testing.assert_close(together if batch_first else together.transpose(0, 1), alone, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_beside_a_prefix_without_a_gate(kind):
    model = build(kind).double()
    batch = inputs(kind, model, padding="none")
    gated, plain = (attached(model, dk.Prefix(tokens=n, gate=n == 3), name=f"n{n}") for n in (3, 2))
    both = states(model, batch)
    for (module,) in gated.modules.values():
        # A gate of one.
        module.gate.weight.data.zero_()
        module.gate.bias.data.fill_(100.0)
    open_gate = states(model, batch)
    assert not torch.allclose(both, open_gate)
    twin = build(kind).double()
    third = dk.attach(twin, dk.Prefix(tokens=5))
    for path, (module,) in third.modules.items():
        parts = [delta.modules[path][0].trained() for delta in (gated, plain)]
        for own, value in zip((module.key, module.value), zip(*parts, strict=True), strict=True):
            own.data.copy_(torch.cat(value, 1))
    torch.testing.assert_close(open_gate, states(twin, batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("name", GATED)
def test_rows_of_beams(kind, name):
    """Beam search has several rows in turn for each name."""
    model = build(kind).double()
    batch = inputs(kind, model, padding="none")
    batch = {key: value.repeat_interleave(2, 0) for key, value in batch.items()}
    batch["input_ids"] = torch.randint(3, 90, batch["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    deltas = [attached(model, dk.METHODS[name](**GATED[name]), name=label) for label in ("one", "two")]
    together = dk.rows(model, ["two", "one"])(**batch).last_hidden_state
    for delta, rows in zip(deltas, (slice(2, 4), slice(0, 2)), strict=True):
        dk.use(model, delta.name)
        torch.testing.assert_close(together[rows], states(model, batch)[rows], rtol=1e-9, atol=1e-9)


def test_nothing_is_kept_behind_a_call():
    model = build("bert")
    delta = attached(model, dk.Prefix(tokens=2, gate=True))
    states(model, inputs("bert", model)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in delta.parameters())
    assert all(module.gates.look() is None for (module,) in delta.modules.values())
    pickle.dumps(model)


def test_a_forward_without_hooks_is_refused():
    model = build("bert")
    attached(model, dk.Prefix(tokens=2, gate=True))
    attention = model.encoder.layer[0].attention.self
    with pytest.raises(
        dk.StateError, match=r"ran without its hooks, .*; call the module itself instead of its forward"
    ):
        attention.forward(torch.randn(2, 5, 24))
    attention(torch.randn(2, 5, 24))


@pytest.mark.parametrize("name", GATED)
def test_a_saved_delta_has_its_gate(name, tmp_path):
    model = build("bert")
    options = {"reparam": True, "hidden": 5} if name == "prefix" else {}
    attached(model, dk.METHODS[name](**GATED[name], **options)).save(tmp_path)
    batch = inputs("bert", model)
    wanted = states(model, batch)
    fresh = build("bert")
    loaded = dk.load(tmp_path, fresh)
    torch.testing.assert_close(states(fresh, batch), wanted, rtol=1e-5, atol=1e-6)
    assert loaded.methods[0].gate
    assert sum(key.endswith("gate.weight") for key in loaded.state_dict()) == len(loaded.modules)


@pytest.mark.parametrize("name", GATED)
def test_reduced_precision(name):
    """Deltas in another dtype than the layer, and autocast."""
    model = Transformer().eval()
    before = model(ids())
    delta = attached(model, dk.METHODS[name](**GATED[name]))
    wanted = model(ids())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids())
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)
    for module in delta.modules.values():
        module[0].double()
    torch.testing.assert_close(model(ids()), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, wanted)


def test_together_they_are_unipelt():
    model = build("bert")
    batch = inputs("bert", model)
    methods = dk.LoRA(r=8, alpha=8, gate=True), dk.Adapter(size=2, gate=True), dk.Prefix(tokens=10, gate=True)
    delta = attached(model, *methods)
    assert not torch.allclose(states(model, batch), states(delta.detach().backbone, batch))
    assert str(delta).count(" gate") == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.LoRA(gate=True, dora=True), r"LoRA\(dora=..., gate=...\): omit one of the two"),
        (lambda: dk.LoRA(gate=True, keep="int8"), r"LoRA\(gate=True, keep='int8'\): .*; use keep='exact'"),
        (lambda: dk.Prefix(gate=True, relative_positions="first_block"), r"Prefix\(gate=True, relative_positions='first_block'\): omit one"),
        (lambda: dk.attach(nn.ModuleDict({"c": nn.Conv1d(4, 6, 3)}), dk.LoRA(r=2, gate=True, at="c")), "c: the gate of .* reads the hidden states that enter a linear layer, and this is a Conv1d; use gate=False"),
        (lambda: dk.attach(nn.ModuleDict({"e": nn.Embedding(4, 6)}), dk.LoRA(r=2, gate=True, at="e")), "e: the gate of .* and this is a Embedding; use gate=False"),
        (lambda: dk.attach(nn.ModuleDict({"c": nn.MultiheadAttention(8, 2)}), dk.LoRA(r=2, gate=True, at="in_proj_weight")), "c.in_proj_weight: this is a parameter"),
    ],
)  # fmt: skip
def test_refused(make, message):
    with pytest.raises(dk.DeltaError, match=message):
        make()


def test_what_has_no_gates_is_not_written(tmp_path):
    model = build("gpt2")
    with pytest.raises(dk.CheckpointError, match=r"c_attn\[q\] has a gate, and PEFT has no LoRA with one; save it in"):
        attached(model, dk.LoRA(gate=True)).save(tmp_path, format="peft")
    prefix = attached(build("gpt2"), dk.Prefix(gate=True, shift=True))
    with pytest.raises(dk.CheckpointError, match="its prefix has a gate, and PEFT has none with one"):
        prefix.save(tmp_path, format="peft")
