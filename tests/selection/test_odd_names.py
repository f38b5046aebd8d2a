"""Modules and parameters whose names have characters that mean something in a selector."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deltakit as dk
from deltakit.core import fold
from support.models import randomize
from support.tiny_transformers import build

ODD = ["a[b]", "a,b", "a b", "{a", "a}", "*", "**", "a/b", "@attn", "q@", "^a", "^", "re:a", "[r]a", "0-3", "{q,v}", "ключ", " a", "a ", "a!", "a:b", "x[q]", "[q]"]  # fmt: skip


def model_of(names):
    """A block for each name, each with a linear layer for each name, applied one after the other."""

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:
                block = nn.Module()
                for inner in names:
                    block.add_module(inner, nn.Linear(5, 5))
                self.add_module(name, block)

        def forward(self, x):
            for block in self.children():
                for layer in block.children():
                    x = torch.tanh(layer(x))
            return x

    return Blocks()


@pytest.mark.parametrize("name", ODD)
def test_a_full_path_means_exactly_that_module(name):
    model = model_of([name, "q", "0"])
    for path, module in model.named_modules():
        if path:
            assert list(dk.select(model, path).items()) == [(path, module)]
            assert list(dk.select(model, [path, "q.0"])) == sorted(
                {path, "q.0"}, key=list(dict(model.named_modules())).index
            )
    assert dk.select(model, f"q.{name}.weight") == {f"q.{name}.weight": model.q._modules[name].weight}


@pytest.mark.parametrize("name", ODD)
def test_a_name_alone_means_all_modules_of_this_name(name):
    model = model_of([name, "q"])
    # At the root it is a full path, so it means that module alone.
    assert list(dk.select(model, name)) == [name]
    inner = nn.ModuleDict({"0": model, "1": model_of([name, "q"])})
    assert list(dk.select(inner, f"q.{name}")) == [f"0.q.{name}", f"1.q.{name}"]


@pytest.mark.parametrize("name", ODD)
def test_attach_print_save_and_load(name, tmp_path):
    model, other = model_of([name, "q"]), model_of([name, "q"])
    other.load_state_dict(model.state_dict())
    x, method = torch.randn(3, 5), dk.LoRA(r=2, at=[f"{name}.{name}", f"q.{name}", f"q.{name}.bias"][:2])
    bare = model(x)
    assert dk.plan(model, method).paths == {"lora": [f"{name}.{name}", f"q.{name}"]}
    delta = randomize(dk.attach(model, method, train=f"{name}.q"))
    assert list(delta.modules) == [f"{name}.{name}", f"q.{name}"]
    for paths in (delta.modules, delta.fully_trained):
        labels = fold(paths)
        assert all(f"      {label}" in str(delta) for label in labels)
        assert set(dk.select(model, labels)) == set(paths)
    assert str(dk.show(model))
    assert str(dk.roles(model))
    again = dk.load(delta.save(tmp_path), other)
    assert list(again.modules) == list(delta.modules)
    assert again.fully_trained == delta.fully_trained == [f"{name}.q.weight", f"{name}.q.bias"]
    assert torch.equal(model(x), other(x))
    delta.detach()
    assert torch.equal(model(x), bare)


names = st.text(st.sampled_from("ab01-[]{},*/@^!: q"), min_size=1, max_size=4) | st.sampled_from(ODD)


def is_braced(name):
    """A name that is a folded label itself: beside the names that it stands for, both would be printed alike."""
    return "{" in name and "}" in name


@settings(max_examples=200)
@given(
    names=st.lists(names.filter(lambda name: not is_braced(name)), min_size=1, max_size=4, unique=True), data=st.data()
)
def test_folded_paths_select_exactly_what_was_folded(names, data):
    model = model_of(names)
    paths = [path for path, _ in model.named_modules() if path]
    chosen = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    assert sorted(dk.select(model, list(fold(chosen)))) == sorted(chosen)


def test_lines_of_the_tree_fold_plain_names_only():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q", "v", "a,b", "0-3", "0", "1")})
    lines = str(dk.show(model)).splitlines()
    assert [line.split("(")[0].split("── ")[1].strip() for line in lines[1:-2]] == ["q,v,0,1", "a,b", "0-3"]


@pytest.mark.parametrize("name", ["", "a.b"])
def test_names_that_torch_refuses_are_refused(name):
    model = nn.Sequential(nn.Linear(2, 3))
    model[0]._modules[name] = nn.Linear(3, 3)
    for call in (
        lambda: dk.select(model, "0"),
        lambda: dk.attach(model, dk.LoRA(r=1, at="0")),
        lambda: dk.roles(model),
    ):
        with pytest.raises(
            dk.TargetError, match=r"0: it holds a module or parameter named '.*', which cannot be part of a path"
        ):
            call()


def test_a_miss_says_how_to_write_special_names():
    model = model_of(["a/b", "q"])
    with pytest.raises(dk.SelectorError, match="write a name with special characters with its full path, or as 're:'"):
        dk.select(model, "b/a")
    assert list(dk.select(model, r"re:.*a/b")) == ["a/b", "a/b.a/b", "q.a/b"]


def test_parameters_whose_names_give_one_word_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("a b", nn.Parameter(torch.randn(5, 7)))
            self.register_parameter("a,b", nn.Parameter(torch.randn(5, 7)))

        def forward(self, x):
            return x @ (self._parameters["a b"] + self._parameters["a,b"]).T

    model = nn.Sequential(Two())
    with pytest.raises(
        dk.StateError, match="its delta module would be named 'delta_lora_a_b', as that of another parameter"
    ):
        dk.attach(model, dk.LoRA(r=2, at=["0.a b", "0.a,b"]))
    assert list(model.state_dict()) == ["0.a b", "0.a,b"]
    first = dk.attach(model, dk.LoRA(r=2, at="0.a b"))
    dk.attach(model, dk.LoRA(r=2, at="0.a,b"), name="second")
    assert list(first.modules) == ["0.a b"]


@pytest.mark.parametrize("selector", ["re:a{99999999999999999999}", "re:" + "(" * 1500 + ")" * 1500])
def test_expressions_that_cannot_be_compiled(selector):
    with pytest.raises(dk.SelectorError, match="invalid regular expression"):
        dk.select(nn.Sequential(nn.Linear(2, 3)), selector)


def test_a_container_named_like_a_slice_means_the_layers_in_it():
    model = nn.Sequential()
    model.add_module("a[q]", nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    model.add_module("out", nn.Linear(6, 3))
    for method in (dk.LoRA(r=2, at="a[q]"), dk.BitFit(at="a[q]"), dk.IA3(at="a[q]")):
        assert dk.plan(model, method).paths == {method.name: ["a[q].0", "a[q].2"]}


def test_a_role_means_the_layers_in_a_container_named_like_a_slice():
    model, plain = build("bert"), build("bert")
    for layer in model.encoder.layer:
        layer._modules["attention[q]"] = layer._modules.pop("attention")
    expected = [
        path.replace("attention.", "attention[q].") for path in dk.plan(plain, dk.LoRA(r=2, at="@attn")).paths["lora"]
    ]
    assert dk.plan(model, dk.LoRA(r=2, at="@attn")).paths["lora"] == expected
