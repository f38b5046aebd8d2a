"""Delta modules of layers of one size are copies of one of them, and differ in nothing from those that are built one by one."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.core import without_start_values
from deltakit.methods.lora import LoRADelta
from deltakit.ops import OutputMap
from deltakit.selection import BackboneIndex
from support.tiny_transformers import build

DTYPES = (torch.float32, torch.bfloat16)


class Blocks(nn.Module):
    """Layers of two sizes and two dtypes, each several times, which are not called."""

    def __init__(self, dtypes=DTYPES):
        super().__init__()
        layers = [nn.Linear(7, 11, dtype=dtype) for _ in range(3) for dtype in dtypes]
        self.layers = nn.ModuleList([*layers, nn.Linear(11, 7), nn.Linear(11, 7, bias=False)])

    def forward(self, x):
        return x


@pytest.fixture
def made(monkeypatch):
    """The paths of the targets for which a delta module was built, and not copied."""
    paths, usual = [], LoRADelta.__init__

    def noted(self, target, options):
        paths.append(target.path)
        usual(self, target, options)

    monkeypatch.setattr(LoRADelta, "__init__", noted)
    return paths


def delta_modules(delta):
    return [module for of_target in delta.modules_of("lora").values() for module in of_target]


def copied_and_built(monkeypatch, method):
    """Returns the delta modules of one model twice: as attaching makes them, and each built for itself."""
    found = []
    for classes in (dk.LoRA.copied, ()):
        monkeypatch.setattr(dk.LoRA, "copied", classes)
        torch.manual_seed(3)
        delta = dk.attach(Blocks((torch.float32,) if method.start != "kaiming" else DTYPES), method)
        found.append(delta_modules(delta))
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"dora": True}, {"invocation": [3, 5]}, {"frozen_a": True}, {"dropout": 0.5}, {"alpha": {"layers.0": 3, "*": 5}}]
    + [{"start": start} for start in ("gaussian", "pissa", "olora", "orthogonal", "mica")],
    ids=str,
)  # fmt: skip
def test_copies_are_what_is_built(monkeypatch, options):
    """Their start values too: of the random ones, or those computed from the weight of their own layer."""
    copied, built = copied_and_built(monkeypatch, dk.LoRA(r=2, at="layers.*", **options))
    assert len(copied) == len(built) > 4
    for copy, other in zip(copied, built, strict=True):
        assert type(copy) is type(other)
        assert list(vars(copy)) == list(vars(other))
        # More memory for the names of its attributes would be read at each target in each forward.
        assert sys.getsizeof(vars(copy)) == sys.getsizeof(vars(other))
        plain = {name: value for name, value in vars(copy).items() if isinstance(value, str | int | float)}
        assert plain == {name: vars(other)[name] for name in plain}
        assert (copy.view if hasattr(copy, "view") else None) == (other.view if hasattr(other, "view") else None)
        assert copy.training == other.training
        for (name, one), (_, two) in zip(copy.named_parameters(), other.named_parameters(), strict=True):
            assert one.dtype == two.dtype, name
            assert one.requires_grad == two.requires_grad, name
            assert torch.equal(one, two), name


def test_each_has_tensors_and_tables_of_its_own():
    delta = dk.attach(Blocks(), dk.LoRA(r=2, at="layers.*", dora=True))
    modules = delta_modules(delta)
    tables = [id(value) for module in modules for value in vars(module).values() if isinstance(value, dict | set)]
    assert len(set(tables)) == len(tables)
    starts = [parameter.data_ptr() for parameter in delta.parameters()]
    assert len(set(starts)) == len(starts)


def test_layers_are_built_once_for_each_size_and_dtype(made):
    dk.attach(Blocks(), dk.LoRA(r=2, at="layers.*"))
    assert made == ["layers.0", "layers.1", "layers.6"]


def test_a_subclass_builds_each():
    """It may look at more of a target than its size."""

    @dataclass(frozen=True, kw_only=True)
    class ByPath(dk.LoRA):
        def build_at(self, target):
            module = super().build_at(target)
            module.scaling = float(target.path[-1])
            return module

    delta = dk.attach(Blocks(), ByPath(r=2, at="layers.*"))
    assert [module.scaling for module in delta_modules(delta)] == [0, 1, 2, 3, 4, 5, 6, 7]


class Halved(nn.Linear):
    """A layer of another class."""


def quantized(model):
    for layer in (model.layers[0], model.layers[2]):
        layer.weight = nn.Parameter(torch.zeros(11, 7, dtype=torch.int8), requires_grad=False)


def of_a_class(model):
    model.layers[0], model.layers[2] = Halved(7, 11), Halved(7, 11)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.layers[2])


def on_another_device(model):
    model.layers[2] = nn.Linear(7, 11, device="meta")


def hooked_by_accelerate(model):
    model.layers[2]._hf_hook = object()


class OwnWeight(nn.Parameter):
    """As sharded and quantized weights are."""


def with_weights_of_a_class(model):
    for layer in (model.layers[0], model.layers[2]):
        layer.weight = OwnWeight(layer.weight.data, requires_grad=False)


CHANGES = [quantized, of_a_class, parametrized, on_another_device, hooked_by_accelerate, with_weights_of_a_class]


@pytest.mark.parametrize("change", CHANGES)
def test_other_layers_are_built_for_themselves(made, change):
    model = Blocks((torch.float32,))
    change(model)
    with without_start_values():
        dk.attach(model, dk.LoRA(r=2, at="layers.*"))
    assert "layers.2" in made
    assert "layers.4" not in made


def buffer(module):
    module.register_buffer("seen", torch.zeros(1))


def child(module):
    module.inner = nn.Linear(2, 2)


def hook(module):
    module.register_forward_hook(lambda *_: None)


def own_list(module):
    module.notes = []


def own_tensor(module):
    module.order = torch.arange(3)


def second_name(module):
    module.same = module.gain


def attribute_of_a_parameter(module):
    module.gain.mark = True


def hook_of_a_parameter(module):
    module.gain.register_hook(lambda grad: grad)


MORE = [None, buffer, child, hook, own_list, own_tensor, second_name, attribute_of_a_parameter, hook_of_a_parameter]


class Scaled(OutputMap):
    """Has a fixed factor, and more if asked."""

    def __init__(self, target, options):
        super().__init__(target)
        self.gain = nn.Parameter(torch.empty(self.size))
        self.fixed = nn.Parameter(torch.ones(self.size), requires_grad=False)
        self.register_parameter("none", None)
        if options.more is not None:
            options.more(self)
        self.set_start_values(target)

    def set_start_values(self, target):
        nn.init.ones_(self.gain)
        nn.init.constant_(self.fixed, 2)

    def forward(self, x, y):
        return y * self.gain * self.fixed / 2


@dataclass(frozen=True, kw_only=True)
class Scaling(dk.Method):
    """A method of somebody else's with copies."""

    more: Any = None
    kind = Scaled
    copied = (Scaled,)

    def build_at(self, target):
        return Scaled(target, self)


@pytest.mark.parametrize("more", MORE)
def test_another_method_with_copies(monkeypatch, more):
    made, usual = [], Scaled.__init__
    monkeypatch.setattr(Scaled, "__init__", lambda self, *args: (made.append(args[0].path), usual(self, *args))[1])
    index = BackboneIndex(model := Blocks())
    built = Scaling(more=more).build(index, [index.target(f"layers.{i}") for i in range(8)])
    # A copy would lack, double or share what a module has beside its parameters.
    assert len(made) == (3 if more is None else 8)
    for path, module in built.items():
        assert module.size == model.get_submodule(path).out_features
        assert next(name for name, p in module.named_parameters() if p.requires_grad) == "gain"
        assert not module.fixed.requires_grad
        assert module.none is None
        assert torch.equal(module.fixed, torch.full_like(module.fixed, 2))


class Reading(nn.Module):
    """Reads a weight directly and never calls its layer, so that LoRA patches the weight there."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)


def test_a_weight_that_is_read_directly_is_built_for_itself(made):
    dk.attach(Reading(), dk.LoRA(r=2, at=["called", "read"]))
    assert made == ["called", "read"]


def test_a_weight_that_is_read_directly_is_refused_as_ever():
    with pytest.raises(dk.OptionError, match=r"read: LoRA\(dropout=0.5\) drops inputs"):
        dk.attach(Reading(), dk.LoRA(r=2, at=["called", "read"], dropout=0.5))


def test_slices_of_one_layer_are_built_for_themselves(made):
    model = build("gpt2", transformers.AutoModel)
    delta = dk.attach(model, dk.LoRA(r=2, at="@attn.{q,v}"))
    assert len(made) == len(delta_modules(delta)) > 2
    assert {module.view.feature_slice.name for module in delta_modules(delta)} == {"q", "v"}


def test_a_conv1d_is_no_linear_layer(made):
    model = nn.ModuleList([nn.Linear(6, 6), Conv1D(6, 6), Conv1D(6, 6), nn.Linear(6, 6)])
    delta = dk.attach(model, dk.LoRA(r=2, at="*"))
    assert made == ["0", "1"]
    assert [module.view.flipped for module in delta_modules(delta)] == [False, True, True, False]


def test_sharded_weights_of_zero_3_do_not_show_the_size(made):
    """Each process keeps a part of all of them elsewhere, and an empty parameter in the layer."""
    model = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)])
    for layer in model:
        layer.weight.ds_shape = layer.weight.shape
        layer.weight.data = torch.empty(0)
    delta = dk.attach(model, dk.LoRA(r=2, at="*"))
    assert [(module.d_in, module.d_out) for module in delta_modules(delta)] == [(8, 16), (16, 8), (8, 16)]


def test_another_class_at_some_layers_is_built(monkeypatch, made):
    class Other(LoRADelta):
        pass

    usual = dk.LoRA.kind_at
    kind_at = lambda self, target: Other if target.path in "12" else usual(self, target)  # noqa: E731
    monkeypatch.setattr(dk.LoRA, "kind_at", kind_at)
    delta = dk.attach(nn.ModuleList(nn.Linear(5, 5) for _ in range(4)), dk.LoRA(r=2, at="*"))
    assert [type(module) for module in delta_modules(delta)] == [LoRADelta, Other, Other, LoRADelta]
    assert made == ["0", "1", "2"]


def test_a_tied_layer_is_refused_although_one_of_its_size_came_before():
    model = Blocks((torch.float32,))
    model.layers[2].weight = nn.Parameter(torch.zeros(11, 7))
    model.other = nn.Linear(7, 11)
    model.other.weight = model.layers[2].weight
    with pytest.raises(dk.TargetError, match="layers.2: its weight is tied to other"):
        dk.attach(model, dk.LoRA(r=2, at="layers.*"))
