"""Parameters that all targets of a method share (`Method.build_shared`): one of each, wherever they are counted."""

import copy
import json
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from deltakit.core import DeltaModule, Target
from deltakit.ops import InputMap, LowRank, OutputMap, WeightMap, like
from support.kind_methods import registered
from support.models import randomize, same, snapshot
from support.tiny_transformers import build

SIZE = 7


class Bank(nn.Module):
    """A vector of gains that are one at the start, and one of shifts."""

    def __init__(self, **new):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(SIZE, **new))
        self.shift = nn.Parameter(torch.zeros(SIZE, **new))


class SharedOutputDelta(OutputMap):
    tags: ClassVar = {"shared": "bank"}

    def forward(self, x, y):
        return y * (1 + self.shared.gain) + self.shared.shift

    def linear_update(self, layer):
        gain = self.shared.gain
        return gain[:, None] * layer.weight, gain * layer.bias + self.shared.shift


class SharedInputDelta(InputMap):
    tags: ClassVar = {"shared": "bank"}

    def into(self, x):
        return x * (1 + self.shared.gain) + 0 * self.shared.shift

    def linear_update(self, layer):
        return layer.weight * self.shared.gain, None


class SharedLowRankDelta(LowRank):
    tags: ClassVar = {"shared": "bank"}

    def factors(self):
        return (1 + self.shared.shift)[None], self.shared.gain[:, None]


class SharedWeightDelta(WeightMap):
    tags: ClassVar = {"shared": "bank"}

    def weight_update(self, weight):
        return weight * self.shared.gain + self.shared.shift[:, None] * weight


@dataclass(frozen=True, kw_only=True)
class Banked(dk.Method):
    """One bank for all targets, which have nothing of their own."""

    name: ClassVar[str] = "test_shared"
    form: str = "output"

    FORMS: ClassVar = {
        "output": SharedOutputDelta,
        "input": SharedInputDelta,
        "low_rank": SharedLowRankDelta,
        "weight": SharedWeightDelta,
    }

    def kind_at(self, target: Target) -> type[DeltaModule]:
        return self.FORMS[self.form]

    def build_at(self, target: Target) -> DeltaModule:
        return self.FORMS[self.form](target)

    def build_shared(self, index, targets) -> nn.Module:
        return Bank(**like(targets[0]))


every_form = pytest.mark.parametrize("form", Banked.FORMS)


@pytest.fixture(autouse=True)
def methods():
    with registered(Banked):
        yield


def three():
    return nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(3))).double()


def attached(model, form="output", **options):
    return dk.attach(model, Banked(at=["0", "1", "2"], form=form), **options)


@every_form
def test_counted_once(form):
    model = three()
    plan = dk.plan(model, Banked(at=["0", "1", "2"], form=form))
    delta = attached(model, form)
    assert plan.num_parameters == delta.num_parameters == 2 * SIZE
    assert [name for name, _ in delta.named_parameters()] == ["0.test_shared.shared.gain", "0.test_shared.shared.shift"]
    assert {id(p) for p in delta.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    modules = [module for own in delta.modules.values() for module in own]
    assert len({id(module.shared) for module in modules}) == 1
    (group,) = delta.parameter_groups(bank={"lr": 0.5})
    assert group["tag"] == "bank"
    assert len(group["params"]) == 2
    torch.optim.AdamW([group])


@every_form
def test_it_is_one_bank_in_forwards_gradients_and_steps(form):
    model = three()
    x = torch.randn(5, SIZE, dtype=torch.float64)
    bare = model(x)
    delta = attached(model, form)
    assert torch.equal(model(x), bare)
    randomize(delta)
    loss = model(x).square().sum()
    found = torch.autograd.grad(loss, list(delta.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in found)

    # The same through three separate banks, whose gradients add up.
    apart = copy.deepcopy(model)
    dk.deltas(apart)[0].detach()
    parts = []
    for path in ("0", "1", "2"):
        part = dk.attach(apart, Banked(at=path, form=form), name=f"n{path}")
        part.load_state_dict(
            {
                f"{path}.test_shared.shared.{name}": value
                for name, value in zip(("gain", "shift"), delta.state_dict().values(), strict=True)
            }
        )
        parts.append(list(part.parameters()))
    other = apart(x).square().sum()
    torch.testing.assert_close(loss, other)
    wanted = [sum(torch.autograd.grad(other, pair, retain_graph=True)) for pair in zip(*parts, strict=True)]
    torch.testing.assert_close(list(found), wanted)


@every_form
def test_rows_merging_and_autocast(form):
    model = three().eval()
    x = torch.randn(3, 5, SIZE, dtype=torch.float64)
    bare = model(x)
    delta = randomize(attached(model, form))
    output = model(x)
    with dk.rows(model, ["delta", None, "delta"]):
        torch.testing.assert_close(model(x), torch.stack([output[0], bare[1], output[2]]))
    with torch.no_grad(), dk.rows(model, ["delta", None, "delta"]):
        first = model(x)
        randomize(delta)
        second = model(x)
    assert not torch.allclose(first[0], second[0])
    output = model(x)
    if form != "input":
        torch.testing.assert_close(delta.merge().backbone(x), output)
        delta.unmerge()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x.float()).float().square().sum()
    loss.backward()
    assert all(
        parameter.grad.any() for parameter in delta.parameters() if form != "input" or parameter.grad.abs().sum()
    )


@every_form
def test_copies_keep_sharing(form):
    model = three()
    x = torch.randn(5, SIZE, dtype=torch.float64)
    before = snapshot(model)
    delta = randomize(attached(model, form))
    output = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (own,) = dk.deltas(twin)
        modules = [module for held in own.modules.values() for module in held]
        assert len({id(module.shared) for module in modules}) == 1
        assert modules[0].shared is not next(iter(delta.modules.values()))[0].shared
        assert own.num_parameters == 2 * SIZE
        assert torch.equal(twin(x), output)
        randomize(own)
        changed = twin(x)
        assert not torch.allclose(changed, output)
        twin.float()
        assert {p.dtype for module in modules for p in module.shared.parameters()} == {torch.float32}
        torch.testing.assert_close(twin(x.float()).double(), changed, rtol=1e-4, atol=1e-4)
        own.detach()
    assert torch.equal(model(x), output)
    delta.detach()
    same(before, snapshot(model))
    assert torch.equal(delta.attach().backbone(x), output)


@every_form
def test_one_entry_in_the_file(form, tmp_path):
    model = three()
    fresh = copy.deepcopy(model)
    delta = randomize(attached(model, form))
    delta.save(tmp_path)
    assert list(load_file(tmp_path / "delta_model.safetensors")) == [
        "0.test_shared.shared.gain",
        "0.test_shared.shared.shift",
    ]
    loaded = dk.load(tmp_path, fresh)
    x = torch.randn(5, SIZE, dtype=torch.float64)
    assert torch.equal(fresh(x), model(x))
    randomize(loaded)
    assert not torch.allclose(fresh(x), model(x))
    assert loaded.num_parameters == 2 * SIZE


def test_two_deltas_have_banks_of_their_own():
    model = three()
    one, two = attached(model, name="one"), attached(model, name="two")
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    x = torch.randn(5, SIZE, dtype=torch.float64)
    randomize(two)
    output = model(x)
    randomize(one)
    one.swap(two)
    one.active = False
    swapped = model(x)
    one.active, two.active = True, False
    assert torch.allclose(model(x), output)
    assert not torch.allclose(swapped, output)


class TestPrefix:
    def test_one_embedding_and_one_inner_layer_for_all_layers(self, tmp_path):
        model = build("t5").double()
        call = {"input_ids": torch.randint(3, 97, (2, 7)), "decoder_input_ids": torch.randint(3, 97, (2, 5))}
        delta = dk.attach(model, dk.Prefix(tokens=3, reparam=True, hidden=11))
        names = [name for name, _ in delta.named_parameters()]
        held = [name for name in names if ".shared." in name]
        assert len(held) == 3
        assert len({name.partition(".prefix.")[0] for name in held}) == 1
        inner = 3 * 24 + 24 * 11 + 11
        heads = 2 * 4 * 5
        assert delta.num_parameters == inner + len(delta.modules) * (11 * heads + heads)
        randomize(delta)
        output = model(**call).last_hidden_state
        model(**call).last_hidden_state.square().sum().backward()
        assert all(parameter.grad is not None for parameter in delta.parameters())
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**call).last_hidden_state, output)
        assert dk.deltas(twin)[0].num_parameters == delta.num_parameters
        delta.save(tmp_path)
        assert not [name for name in load_file(tmp_path / "delta_model.safetensors") if "shared" in name]
        assert json.loads((tmp_path / "delta_config.json").read_text())["methods"][0]["reparam"] is False
        delta.detach()
        dk.load(tmp_path, model)
        torch.testing.assert_close(model(**call).last_hidden_state, output)


class TestSoftPrompt:
    def test_one_prompt_for_three_embeddings(self, tmp_path):
        model = build("t5").double()
        fresh = copy.deepcopy(model)
        call = {"input_ids": torch.randint(3, 97, (2, 7)), "decoder_input_ids": torch.randint(3, 97, (2, 5))}
        delta = dk.attach(model, dk.SoftPrompt(tokens=3))
        ((name, prompt),) = delta.named_parameters()
        assert name.endswith("soft_prompt.shared.prompt")
        assert prompt.shape == (3, 24)
        assert sum("PromptVectors" in type(m).__name__ for own in delta.modules.values() for m in own) == 3
        randomize(delta)
        delta.save(tmp_path)
        (key,) = load_file(tmp_path / "delta_model.safetensors")
        assert key.endswith("soft_prompt.prompt")
        loaded = dk.load(tmp_path, fresh)
        assert torch.equal(fresh(**call).last_hidden_state, model(**call).last_hidden_state)
        assert loaded.num_parameters == 72
        twin = copy.deepcopy(model)
        assert dk.deltas(twin)[0].num_parameters == 72
        assert torch.equal(twin(**call).last_hidden_state, model(**call).last_hidden_state)
