"""Delta modules of layers of one size are copies of one of them, and differ in nothing from those that are built one by one."""

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.core import without_start_values
from deltakit.methods.lora import LoRADelta
from deltakit.ops import OutputMap
from deltakit.selection import BackboneIndex

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
    [{}, {"dora": True}, {"invocation": [3, 5]}, {"gate": True}, {"frozen_a": True}, {"dropout": 0.5}, {"alpha": {"layers.0": 3, "*": 5}}]
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


@pytest.mark.parametrize("change", [quantized, of_a_class, parametrized, on_another_device, hooked_by_accelerate])
def test_other_layers_are_built_for_themselves(made, change):
    model = Blocks((torch.float32,))
    change(model)
    with without_start_values():
        dk.attach(model, dk.LoRA(r=2, at="layers.*"))
    assert "layers.2" in made
    assert "layers.4" not in made


class Scaled(OutputMap):
    """Has a fixed factor that the file does not hold, and a buffer if asked."""

    def __init__(self, target, options):
        super().__init__(target)
        self.gain = nn.Parameter(torch.empty(self.size))
        self.fixed = nn.Parameter(torch.ones(self.size), requires_grad=False)
        self.register_parameter("none", None)
        if options.buffer:
            self.register_buffer("seen", torch.zeros(1))
        self.set_start_values(target)

    def set_start_values(self, target):
        nn.init.ones_(self.gain)
        nn.init.constant_(self.fixed, 2)

    def forward(self, x, y):
        return y * self.gain * self.fixed / 2


@dataclass(frozen=True, kw_only=True)
class Scaling(dk.Method):
    """A method of somebody else's with copies."""

    buffer: bool = False
    kind = Scaled
    copied = (Scaled,)

    def build_at(self, target):
        return Scaled(target, self)


@pytest.mark.parametrize("buffer", [False, True])
def test_another_method_with_copies(monkeypatch, buffer):
    made, usual = [], Scaled.__init__
    monkeypatch.setattr(Scaled, "__init__", lambda self, *args: (made.append(args[0].path), usual(self, *args))[1])
    index = BackboneIndex(model := Blocks())
    built = Scaling(buffer=buffer).build(index, [index.target(f"layers.{i}") for i in range(8)])
    # A module with buffers is not copied.
    assert len(made) == (8 if buffer else 3)
    for path, module in built.items():
        assert module.size == model.get_submodule(path).out_features
        assert [name for name, p in module.named_parameters() if p.requires_grad] == ["gain"]
        assert module.none is None
        assert torch.equal(module.fixed, torch.full_like(module.fixed, 2))


def test_a_tied_layer_is_refused_although_one_of_its_size_came_before():
    model = Blocks((torch.float32,))
    model.layers[2].weight = nn.Parameter(torch.zeros(11, 7))
    model.other = nn.Linear(7, 11)
    model.other.weight = model.layers[2].weight
    with pytest.raises(dk.TargetError, match="layers.2: its weight is tied to other"):
        dk.attach(model, dk.LoRA(r=2, at="layers.*"))
