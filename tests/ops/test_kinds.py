"""What each kind of delta module brings to a method: one table over small methods of every kind."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.core import Target, hidden_output
from deltakit.ops import InputMap, LowRank, OutputMap, WeightMap
from support.kind_methods import EVERY_KIND, KINDS, ON_WEIGHTS, Affine, Around, AroundDelta, by_hand, registered, values
from support.models import STYLES, Calls, Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build

each_kind = pytest.mark.parametrize("kind", KINDS)
every_kind = pytest.mark.parametrize("kind", EVERY_KIND)


@pytest.fixture(autouse=True)
def methods():
    with registered(*EVERY_KIND.values()):
        yield
    assert not AroundDelta.opened


class One(nn.Module):
    """A single target, called with whatever it is given."""

    def __init__(self, layer):
        super().__init__()
        self.target = layer

    def forward(self, x):
        return self.target(x)


class Two(nn.Module):
    """Two linear layers of unequal sizes with a nonlinear function between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 11)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


LINEAR = {
    "linear": lambda: nn.Linear(5, 7),
    "no bias": lambda: nn.Linear(5, 7, bias=False),
    "conv1d": lambda: Conv1D(7, 5),
}


def on(layer, kind, **options):
    """A model of one target in float64, and its delta module, with values that show."""
    torch.manual_seed(3)
    model = One(layer).double().eval()
    with torch.no_grad():
        layer.weight.normal_()
    delta = randomize(dk.attach(model, EVERY_KIND[kind](at="target", **options)))
    return model, delta, delta.modules["target"][0]


class TestScale:
    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
    @pytest.mark.parametrize("scale", [0, 0.5, -1, 2, 1])
    @pytest.mark.parametrize("layer", LINEAR)
    @each_kind
    def test_it_interpolates_between_bare_and_formula(self, kind, layer, scale, grad):
        model, delta, module = on(LINEAR[layer](), kind)
        x = torch.randn(3, 13, 5, dtype=torch.float64)
        with delta.detached():
            bare = model(x)
        whole = by_hand(model.target, module, x)
        assert (whole - bare).abs().max() > 0.1
        delta.scale = scale
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), bare + scale * (whole - bare), rtol=1e-12, atol=1e-12)
            # A token or a few take another way.
            torch.testing.assert_close(model(x[0, :1]), (bare + scale * (whole - bare))[0, :1], rtol=1e-12, atol=1e-12)

    @each_kind
    def test_zero_is_the_bare_model_bit_exactly(self, kind):
        model, delta, _ = on(nn.Linear(5, 7), kind)
        x = torch.randn(3, 5, dtype=torch.float64)
        delta.scale = 0
        with delta.detached():
            bare = model(x)
        assert torch.equal(model(x), bare)

    @pytest.mark.parametrize("scale", [0.5, -1, 2])
    @each_kind
    def test_merging_takes_it_along(self, kind, scale):
        model, delta, _ = on(nn.Linear(5, 7), kind)
        x = torch.randn(3, 5, dtype=torch.float64)
        delta.scale = scale
        output = model(x)
        torch.testing.assert_close(delta.merge().backbone(x), output, rtol=1e-12, atol=1e-12)

    def test_a_call_context_has_none(self):
        model, delta, module = on(nn.Linear(5, 7), "call_context")
        with pytest.raises(dk.StateError, match="target: a Around .* has no scale"):
            delta.scale = 0.5
        x = torch.randn(3, 5, dtype=torch.float64)
        torch.testing.assert_close(model(x), by_hand(model.target, module, x))


class TestMixedBatch:
    NAMES = ("a", None, "b", "a", "b")

    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
    @pytest.mark.parametrize("scale", [1, -0.5])
    @each_kind
    def test_each_example_as_if_alone(self, kind, scale, grad):
        model = Two().double().eval()
        x = torch.randn(5, 13, 5, dtype=torch.float64)
        bare = model(x)
        at = {"a": ["first", "second"], "b": "second"}
        held = {name: randomize(dk.attach(model, KINDS[kind](at=at[name]), name=name)) for name in at}
        held["b"].scale = scale
        alone = {None: bare}
        for name in held:
            other = held["b" if name == "a" else "a"]
            other.active = False
            alone[name] = model(x)
            other.active = True
        assert not torch.allclose(alone["a"], alone["b"])
        with torch.set_grad_enabled(grad), dk.rows(model, self.NAMES) as mixed:
            found = mixed(x)
        for place, name in enumerate(self.NAMES):
            torch.testing.assert_close(found[place], alone[name][place], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], bare[1])

    @each_kind
    def test_gradients_as_if_alone(self, kind):
        model = Two().double()
        x = torch.randn(3, 13, 5, dtype=torch.float64)
        held = [randomize(dk.attach(model, KINDS[kind](at=["first", "second"]), name=name)) for name in "ab"]
        parameters = [p for delta in held for p in delta.parameters()]
        with dk.rows(model, ["a", "b", "a"]) as mixed:
            found = torch.autograd.grad(mixed(x).square().sum(), parameters)
        held[1].active = False
        loss = model(x[[0, 2]]).square().sum()
        held[0].active, held[1].active = False, True
        wanted = torch.autograd.grad(loss + model(x[1:2]).square().sum(), parameters)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)

    def test_what_belongs_to_no_delta_has_no_examples(self):
        delta = dk.LoRA(r=2).build_at(Target("0", nn.Linear(5, 7)))
        assert delta.record is None
        assert delta.batch is None
        assert delta.takes_part

    @each_kind
    def test_a_delta_that_no_example_names_takes_no_part(self, kind):
        model = Two().double().eval()
        x = torch.randn(3, 13, 5, dtype=torch.float64)
        bare = model(x)
        for name in "ab":
            randomize(dk.attach(model, KINDS[kind](at="second"), name=name))
        with dk.rows(model, [None, None, None]):
            assert torch.equal(model(x), bare)

    def test_what_acts_on_the_whole_batch_is_refused(self):
        model, _, _ = on(nn.Linear(5, 7), "call_context")
        refused = pytest.raises(dk.StateError, match=r"acts on the whole batch at target \(Around\)")
        with refused, dk.rows(model, ["delta"]):
            pass

    @pytest.mark.parametrize("kind", ["weight_update", "new_weight"])
    def test_what_patches_a_weight_is_refused(self, kind):
        model, _, _ = on(nn.Embedding(13, 5), kind)
        with (
            pytest.raises(dk.StateError, match="patches a weight, which all examples share, at target"),
            dk.rows(model, ["delta"]),
        ):
            pass


class TestFeatureSlices:
    LAYOUTS: ClassVar = (("gpt2", "h.0.attn.c_attn"), ("gpt_neox", "layers.0.attention.query_key_value"))

    @pytest.mark.parametrize("letter", "qkv")
    @pytest.mark.parametrize(("architecture", "path"), LAYOUTS)
    @pytest.mark.parametrize("kind", ["output", *ON_WEIGHTS])
    def test_it_changes_its_own_features_alone(self, kind, architecture, path, letter):
        model = build(architecture).double()
        layer = model.get_submodule(path)
        x = torch.randn(2, 7, 24, dtype=torch.float64)
        bare = layer(x)
        delta = randomize(dk.attach(model, KINDS[kind](at=f"{path}[{letter}]")))
        (module,) = delta.modules[f"{path}[{letter}]"]
        heads = {"gpt2": 1, "gpt_neox": 4}[architecture]
        place = torch.arange(72).view(heads, 3, -1)[:, "qkv".index(letter)].flatten()
        weight = layer.weight.detach().T if architecture == "gpt2" else layer.weight.detach()
        part = type(module).formula(weight[place], layer.bias.detach()[place], values(module), x)
        found = layer(x)
        torch.testing.assert_close(found[..., place], part, rtol=1e-11, atol=1e-11)
        rest = torch.tensor([i for i in range(72) if i not in place])
        assert torch.equal(found[..., rest], bare[..., rest])
        delta.scale = -0.5
        torch.testing.assert_close(layer(x)[..., place], 1.5 * bare[..., place] - 0.5 * part, rtol=1e-11, atol=1e-11)
        delta.merge()
        torch.testing.assert_close(layer(x)[..., place], 1.5 * bare[..., place] - 0.5 * part, rtol=1e-11, atol=1e-11)
        assert torch.equal(layer(x)[..., rest], bare[..., rest])
        delta.detach()
        assert torch.equal(layer(x), bare)

    @pytest.mark.parametrize("kind", ["output", *ON_WEIGHTS])
    def test_in_a_mixed_batch(self, kind):
        model = build("gpt2").double()
        x = ids(3, 7)
        bare = model(input_ids=x).last_hidden_state
        randomize(dk.attach(model, KINDS[kind](at="h.0.attn.c_attn[v]"), name="a"))
        whole = model(input_ids=x).last_hidden_state
        with dk.rows(model, [None, "a", None]):
            found = model(input_ids=x).last_hidden_state
        torch.testing.assert_close(found, torch.stack([bare[0], whole[1], bare[2]]), rtol=1e-11, atol=1e-11)

    def test_an_input_has_no_slices(self):
        model = build("gpt2")
        with pytest.raises(
            dk.TargetError, match=r"h\.0\.attn\.c_attn\[q\]: Turn changes the input.*write at='h\.0\.attn\.c_attn'"
        ):
            dk.attach(model, KINDS["input"](at="h.0.attn.c_attn[q]"))


class TestChannelsFirst:
    LAYERS: ClassVar = {
        "conv2d": (lambda: nn.Conv2d(3, 7, (2, 3), stride=(1, 2), padding=(1, 0)), (2, 3, 5, 11)),
        "conv1d": (lambda: nn.Conv1d(3, 7, 5, dilation=2), (2, 3, 13)),
        "conv3d": (lambda: nn.Conv3d(3, 5, (1, 2, 3)), (2, 3, 2, 5, 7)),
        "groups": (lambda: nn.Conv2d(6, 10, (2, 3), groups=2), (2, 6, 5, 7)),
        "batch_norm": (lambda: nn.BatchNorm2d(3), (2, 3, 5, 7)),
    }

    @staticmethod
    def plain(layer, weight, x, bias=None):
        if isinstance(layer, nn.BatchNorm2d):
            return layer(x)
        return layer._conv_forward(x, weight.view_as(layer.weight), layer.bias if bias is None else bias)

    @pytest.mark.parametrize("scale", [1, -0.5])
    @pytest.mark.parametrize("layer", LAYERS)
    @each_kind
    def test_equals_the_formula(self, kind, layer, scale):
        make, shape = self.LAYERS[layer]
        if layer == "batch_norm" and kind in ON_WEIGHTS:
            with pytest.raises(
                dk.TargetError, match="target: .* works on Linear, Conv1D, Embedding and Conv1d to Conv3d"
            ):
                dk.attach(One(make()), KINDS[kind](at="target"))
            return
        model, delta, module = on(make(), kind)
        x = torch.randn(shape, dtype=torch.float64)
        with delta.detached():
            bare = model(x)
        p, target = values(module), model.target
        matrix = target.weight.detach().view(len(target.weight), -1)
        if kind == "output":
            new = (bare.movedim(1, -1) * p["w"] + p["v"]).movedim(-1, 1)
        elif kind == "input":
            with delta.detached():
                new = self.plain(target, matrix, (x.movedim(1, -1) @ p["turn"].T).movedim(-1, 1))
        else:
            # A matrix times unit vectors is the matrix, and times zero it is the bias alone.
            eye = torch.eye(matrix.shape[1], dtype=torch.float64)
            bias = type(module).formula(matrix, target.bias.detach(), p, torch.zeros_like(eye[0]))
            changed = type(module).formula(matrix, target.bias.detach(), p, eye) - bias
            new = self.plain(target, changed.T, x, bias)
        delta.scale = scale
        # A scaled input map in front of a linear layer is a scaled change of the output.
        linear = bare + scale * (new - bare)
        torch.testing.assert_close(model(x), linear, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("kind", ["output", *ON_WEIGHTS])
    def test_convolutions_merge(self, kind):
        model, delta, _ = on(self.LAYERS["conv2d"][0](), kind)
        x = torch.randn(2, 3, 5, 11, dtype=torch.float64)
        output = model(x)
        torch.testing.assert_close(delta.merge().backbone(x), output, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("kind", ["output", "input", "low_rank"])
    def test_mixed_batch(self, kind):
        model, _, _ = on(self.LAYERS["conv2d"][0](), kind)
        x = torch.randn(3, 3, 5, 11, dtype=torch.float64)
        whole = model(x)
        (delta,) = dk.deltas(model)
        with delta.detached():
            bare = model(x)
        with dk.rows(model, ["delta", None, None]):
            found = model(x)
        torch.testing.assert_close(found, torch.stack([whole[0], bare[1], bare[2]]), rtol=1e-11, atol=1e-11)


class TestCalls:
    @pytest.mark.parametrize("style", STYLES)
    @each_kind
    def test_every_way_of_calling_and_returning(self, kind, style):
        model = Calls(style).double()
        delta = randomize(dk.attach(model, KINDS[kind](at="target")))
        x = torch.randn(2, 3, 7, dtype=torch.float64)
        wanted = by_hand(model.target, delta.modules["target"][0], x)
        torch.testing.assert_close(model(x), wanted, rtol=1e-11, atol=1e-11)
        delta.scale = 0.5
        with dk.rows(model, ["delta", None]):
            found = model(x)
        delta.detach()
        bare = model(x)
        torch.testing.assert_close(found, torch.stack([(bare[0] + wanted[0]) / 2, bare[1]]), rtol=1e-11, atol=1e-11)
        assert type(model.target(x)) is type(Calls(style).double().target(x))

    @every_kind
    def test_a_target_that_is_never_called_is_an_error(self, kind):
        class Reader(One):
            def forward(self, x):
                return nn.functional.linear(x, getattr(self, "tar" + "get").weight)

        model = Reader(nn.Linear(5, 7))
        delta = dk.attach(model, EVERY_KIND[kind](at="target"))
        x = torch.randn(3, 5)
        if kind == "call_context":
            model(x)
            return
        hint = (
            "at='target.weight'" if kind in ON_WEIGHTS else "exclude= for this module, because .* has no weight patch"
        )
        with pytest.raises(dk.TargetError, match=rf"target: delta 'delta' did nothing here.*{hint}"):
            model(x)
        delta.detach()
        model(x)

    def test_a_context_is_closed_after_an_exception(self):
        model, _, _ = on(nn.Linear(5, 7), "call_context")
        model.target.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(3, 5, dtype=torch.float64))
        assert not AroundDelta.opened


def in_dtype(kind, layer, own):
    """A model of one linear layer in a dtype with a delta in another, and its delta module."""
    torch.manual_seed(3)
    model = One(nn.Linear(5, 7)).to(layer)
    delta = randomize(dk.attach(model, KINDS[kind](at="target")))
    (module,) = delta.modules["target"]
    module.to(own)
    return model, delta, module


class TestDtypes:
    PAIRS: ClassVar = ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32))

    @pytest.mark.parametrize("scale", [1, 0.5])
    @pytest.mark.parametrize(("layer", "own"), PAIRS, ids=str)
    @each_kind
    def test_the_output_keeps_the_layers_dtype(self, kind, layer, own, scale):
        model, delta, module = in_dtype(kind, layer, own)
        x = torch.randn(3, 5).to(layer)
        wanted = by_hand(model.target, module, x)
        with delta.detached():
            bare = model(x)
        delta.scale = scale
        found = model(x)
        assert found.dtype is layer
        torch.testing.assert_close(found.double(), bare + scale * (wanted - bare), rtol=3e-2, atol=3e-2)
        found.float().square().sum().backward()
        for parameter in delta.parameters():
            assert parameter.dtype is own
            assert parameter.grad.dtype is own
            assert parameter.grad.any()

    @pytest.mark.parametrize(("layer", "own"), PAIRS, ids=str)
    @each_kind
    def test_untrained_it_is_the_identity_in_any_dtype(self, kind, layer, own):
        model = One(nn.Linear(5, 7)).to(layer)
        x = torch.randn(3, 5).to(layer)
        bare = model(x)
        (module,) = dk.attach(model, KINDS[kind](at="target")).modules["target"]
        module.to(own)
        assert torch.equal(model(x), bare)

    @pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
    @pytest.mark.parametrize("scale", [1, 0.5])
    @pytest.mark.parametrize(("layer", "own"), [(torch.float32, torch.float32), *PAIRS[:2]], ids=str)
    @each_kind
    def test_autocast(self, kind, layer, own, scale, mixed):
        model, delta, module = in_dtype(kind, layer, own)
        x = torch.randn(3, 5).to(layer)
        wanted = by_hand(model.target, module, x)
        with delta.detached():
            bare = model(x)
        delta.scale = scale
        wanted = bare + scale * (wanted - bare)
        with torch.autocast("cpu", torch.bfloat16):
            if mixed:
                with dk.rows(model, ["delta", None, "delta"]):
                    found = model(x)
                wanted[1] = bare[1]
            else:
                found = model(x)
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=5e-2, atol=5e-2)
        # Behind autocast, as torch advises.
        found.float().square().sum().backward()
        for parameter in delta.parameters():
            assert parameter.grad.dtype is own
            assert parameter.grad.any()

    @pytest.mark.parametrize("scale", [1, 0.5])
    def test_a_map_that_autocast_computes_in_another_dtype(self, scale):
        """Its product is in bfloat16, and what it stands behind, a norm, gives float32."""

        class Product(OutputMap):
            def __init__(self, target):
                super().__init__(target)
                self.matrix = nn.Parameter(torch.eye(self.size))

            def forward(self, x, y):
                return y @ self.matrix

        class Products(dk.Method):
            name = "test_product"
            kind = Product

        with registered(Products):
            model = One(nn.LayerNorm(7))
            delta = randomize(dk.attach(model, Products(at="target")))
            x = torch.randn(3, 7)
            wanted = model(x)
            delta.scale = scale
            with torch.autocast("cpu", torch.bfloat16):
                found = model(x)
        assert found.dtype is torch.float32
        if scale == 1:
            torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


class TestMerging:
    @pytest.mark.parametrize("layer", ["linear", "conv1d"])
    @each_kind
    def test_it_equals_the_forward_and_comes_off_bit_exact(self, kind, layer):
        model, delta, _ = on(LINEAR[layer](), kind)
        x = torch.randn(3, 5, dtype=torch.float64)
        output, before = model(x), snapshot(model)
        merged = delta.merge().backbone(x)
        assert not any(
            torch.equal(value, before["values"][name])
            for name, value in snapshot(model)["values"].items()
            if name == "target.weight"
        )
        torch.testing.assert_close(merged, output, rtol=1e-12, atol=1e-12)
        same(before, snapshot(delta.unmerge().backbone))
        assert torch.equal(model(x), output)

    @each_kind
    def test_half_precision_comes_off_bit_exact(self, kind):
        model, delta, _ = on(nn.Linear(5, 7), kind)
        model.to(torch.bfloat16)
        before = snapshot(model)
        delta.merge().unmerge()
        same(before, snapshot(model))

    @pytest.mark.parametrize("kind", ["low_rank", "weight_update", "new_weight", "output"])
    def test_embeddings(self, kind):
        torch.manual_seed(1)
        model = One(nn.Embedding(13, 5)).double().eval()
        if kind == "output":
            # A shift of every row has no place to go to.
            randomize(delta := dk.attach(model, Affine(at="target")))
            with pytest.raises(
                dk.TargetError, match="target: a Embedding without a bias has nothing to merge Affine into"
            ):
                delta.merge()
            return
        delta = randomize(dk.attach(model, KINDS[kind](at="target")))
        (module,) = delta.modules["target"]
        numbers = torch.tensor([[0, 3, 12], [7, 7, 1]])
        matrix = model.target.weight.detach().T
        one_hot = nn.functional.one_hot(numbers, 13).double()
        wanted = type(module).formula(matrix, torch.zeros(5, dtype=torch.float64), values(module), one_hot)
        torch.testing.assert_close(model(numbers), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(delta.merge().backbone(numbers), wanted, rtol=1e-12, atol=1e-12)

    def test_a_call_context_is_no_change_of_weights(self):
        model, delta, _ = on(nn.Linear(5, 7), "call_context")
        before = snapshot(model)
        with pytest.raises(
            dk.TargetError,
            match="target: AroundDelta does not change weights, so it cannot be merged; leave the delta attached",
        ):
            delta.merge()
        same(before, snapshot(model))

    @pytest.mark.parametrize("base", [OutputMap, InputMap])
    def test_a_map_that_does_not_say_how_cannot_be_merged(self, base):
        class Bent(base):
            def __init__(self, target):
                super().__init__(target)
                self.v = nn.Parameter(torch.ones(self.size))

            def forward(self, x, y=None):
                return torch.tanh((x if y is None else y) * self.v)

        class Bends(dk.Method):
            name = "test_bend"
            kind = Bent

        with registered(Bends):
            delta = dk.attach(One(nn.Linear(5, 7)), Bends(at="target"))
            with pytest.raises(
                dk.TargetError,
                match="target: Bent does not change weights, so it cannot be merged; leave the delta attached",
            ):
                delta.merge()

    @pytest.mark.parametrize(
        "kinds", [("output", "low_rank"), ("low_rank", "weight_update"), ("output", "new_weight")], ids="-".join
    )
    def test_several_methods_of_one_delta_on_one_weight(self, kinds):
        model = One(nn.Linear(5, 7)).double().eval()
        delta = randomize(dk.attach(model, *(KINDS[kind](at="target") for kind in kinds)))
        x = torch.randn(3, 5, dtype=torch.float64)
        delta.scale = 0.5
        output, before = model(x), snapshot(model)
        torch.testing.assert_close(delta.merge().backbone(x), output, rtol=1e-12, atol=1e-12)
        same(before, snapshot(delta.unmerge().backbone))

    @pytest.mark.parametrize(
        "kinds",
        [
            ("low_rank", "output"),
            ("new_weight", "output"),
            ("input", "weight_update"),
            ("low_rank", "input"),
            ("input", "output"),
        ],
        ids="-".join,
    )
    def test_methods_whose_changes_do_not_add_up_are_not_merged(self, kinds):
        model = One(nn.Linear(5, 7)).double().eval()
        delta = randomize(dk.attach(model, *(KINDS[kind](at="target") for kind in kinds)))
        model(torch.randn(3, 5, dtype=torch.float64))
        before = snapshot(model)
        with pytest.raises(
            dk.TargetError, match=r"target\.weight: \w+ and \w+ follow each other here.*leave the delta attached"
        ):
            delta.merge()
        same(before, snapshot(model))

    def test_slices_of_one_weight_do_not_meet(self):
        model = build("gpt2").double()
        x = ids(3, 7)
        delta = dk.attach(model, KINDS["low_rank"](at="h.0.attn.c_attn[q]"), KINDS["output"](at="h.0.attn.c_attn[k]"))
        output = model(input_ids=x).last_hidden_state
        randomize(delta)
        assert not torch.allclose(model(input_ids=x).last_hidden_state, output)
        output = model(input_ids=x).last_hidden_state
        found = delta.merge().backbone(input_ids=x).last_hidden_state
        torch.testing.assert_close(found, output, rtol=1e-11, atol=1e-11)


class TestOrder:
    @staticmethod
    def chain(kind, layer, modules, x):
        """The formula of two delta modules in their order: maps follow each other, updates of the weight add up."""
        weight, bias = layer.weight.detach(), layer.bias.detach()
        one, two = modules
        bare = x @ weight.T + bias
        if kind == "output":
            first = by_hand(layer, one, x)
            return first * two.w + two.v
        if kind == "input":
            return x @ one.turn.T @ two.turn.T @ weight.T + bias
        if kind == "call_context":
            y = (x + one.before + two.before) @ weight.T + bias
            return (y * (1 + one.behind) + one.behind**2) * (1 + two.behind) + two.behind**2
        return by_hand(layer, one, x) + by_hand(layer, two, x) - bare

    @every_kind
    def test_they_apply_in_the_order_of_first_attachment(self, kind):
        torch.manual_seed(3)
        model = One(nn.Linear(5, 7)).double()
        x = torch.randn(3, 5, dtype=torch.float64)
        one, two = (randomize(dk.attach(model, EVERY_KIND[kind](at="target"), name=name)) for name in ("one", "two"))
        modules = [delta.modules["target"][0] for delta in (one, two)]
        wanted = self.chain(kind, model.target, modules, x).detach()
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(model(x), wanted, **close)
        one.detach().attach()
        torch.testing.assert_close(model(x), wanted, **close)
        two.detach().attach()
        torch.testing.assert_close(model(x), wanted, **close)
        one.active = False
        torch.testing.assert_close(model(x), by_hand(model.target, modules[1], x), **close)
        one.active = True
        one.detach()
        torch.testing.assert_close(model(x), by_hand(model.target, modules[1], x), **close)
        if kind in ("output", "input", "call_context"):
            other = self.chain(kind, model.target, modules[::-1], x)
            assert not torch.allclose(other, wanted)

    def test_weight_maps_see_the_bare_weight_and_not_each_other(self):
        model = One(nn.Embedding(13, 5)).double()
        numbers = torch.tensor([[0, 3, 12], [7, 7, 1]])
        bare = model(numbers)
        one, two = (randomize(dk.attach(model, KINDS["new_weight"](at="target"), name=name)) for name in ("one", "two"))
        two.active = False
        first = model(numbers)
        one.active, two.active = False, True
        second = model(numbers)
        one.active = True
        torch.testing.assert_close(model(numbers), first + second - bare, rtol=1e-12, atol=1e-12)


class TestCopies:
    @every_kind
    def test_deepcopy_pickle_and_detach(self, kind):
        model = Two().eval()
        x = torch.randn(3, 5)
        before, bare = snapshot(model), model(x)
        delta = dk.attach(model, EVERY_KIND[kind](at=["first", "second"]))
        assert torch.equal(model(x), bare)
        randomize(delta)
        output = model(x)
        assert not torch.allclose(output, bare)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        randomize(delta)
        for twin in twins:
            assert torch.equal(twin(x), output)
            (own,) = dk.deltas(twin)
            assert not {id(p) for p in own.parameters()} & {id(p) for p in delta.parameters()}
            randomize(own)
            assert not torch.allclose(twin(x), output)
            own.detach()
            same(before, snapshot(twin))
            assert torch.equal(twin(x), bare)
        delta.detach()
        same(before, snapshot(model))
        assert torch.equal(model(x), bare)

    @every_kind
    def test_files(self, kind, tmp_path):
        model = Two().eval()
        fresh = copy.deepcopy(model)
        delta = randomize(dk.attach(model, EVERY_KIND[kind](at=["first", "second"])))
        delta.save(tmp_path)
        x = torch.randn(3, 5)
        loaded = dk.load(tmp_path, fresh)
        assert torch.equal(fresh(x), model(x))
        assert loaded.state_dict().keys() == delta.state_dict().keys()

    @every_kind
    def test_swap(self, kind):
        model = Two().eval()
        x = torch.randn(3, 5)
        one = randomize(dk.attach(model, EVERY_KIND[kind](at=["first", "second"])))
        first = model(x)
        one.detach()
        two = randomize(dk.attach(model, EVERY_KIND[kind](at=["first", "second"])))
        second = model(x)
        two.swap(one)
        assert torch.equal(model(x), first)
        two.swap(one)
        assert torch.equal(model(x), second)


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    @every_kind
    def test_gradients_are_the_same(self, kind, reentrant):
        model = Two().double()
        delta = randomize(dk.attach(model, EVERY_KIND[kind](at=["first", "second"])))
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        wanted = torch.autograd.grad(model(x).square().sum(), [x, *delta.parameters()])
        output = checkpoint(model, x, use_reentrant=reentrant)
        output.square().sum().backward()
        found = [tensor.grad for tensor in (x, *delta.parameters())]
        torch.testing.assert_close(found, list(wanted), rtol=1e-12, atol=1e-12)

    @every_kind
    def test_saved_tensors_on_the_cpu(self, kind):
        model = Two().double()
        delta = randomize(dk.attach(model, EVERY_KIND[kind](at=["first", "second"])))
        x = torch.randn(3, 5, dtype=torch.float64)
        wanted = torch.autograd.grad(model(x).square().sum(), list(delta.parameters()))
        with torch.autograd.graph.save_on_cpu():
            loss = model(x).square().sum()
        found = torch.autograd.grad(loss, list(delta.parameters()))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    @each_kind
    def test_transforms_of_torch_func(self, kind):
        model = Two().double()
        delta = randomize(dk.attach(model, KINDS[kind](at=["first", "second"])))
        x = torch.randn(3, 5, dtype=torch.float64)
        by_id = {id(p): name for name, p in model.named_parameters()}
        own = {by_id[id(p)]: p for p in delta.parameters()}

        def loss(parameters):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        wanted = torch.autograd.grad(model(x).square().sum(), list(own.values()))
        found = torch.func.grad(loss)({name: p.detach() for name, p in own.items()})
        torch.testing.assert_close(list(found.values()), list(wanted), rtol=1e-11, atol=1e-11)


class TestRefused:
    @pytest.mark.parametrize(
        ("base", "missing"),
        [
            (OutputMap, r"forward\(x, y\)"),
            (InputMap, r"into\(x\)"),
            (LowRank, r"factors\(\)"),
            (WeightMap, "overrides neither weight_update nor new_weight"),
        ],
    )
    def test_what_the_author_did_not_write(self, base, missing):
        class Empty(base):
            def __init__(self, target):
                super().__init__(target)
                self.v = nn.Parameter(torch.ones(1))

        class Empties(dk.Method):
            name = "test_empty"
            kind = Empty

        with registered(Empties):
            model = One(nn.Linear(5, 7))
            dk.attach(model, Empties(at="target"))
            with pytest.raises(NotImplementedError, match=f"Empty .*{missing}"):
                model(torch.randn(3, 5))

    @pytest.mark.parametrize("kind", ["output", "input"])
    def test_a_parameter_is_not_called(self, kind):
        model = One(nn.Linear(5, 7))
        with pytest.raises(
            dk.TargetError, match=r"target\.weight: this is a parameter, and test_\w+ has nothing to patch there"
        ):
            dk.attach(model, KINDS[kind](at="target.weight"))

    def test_ids_have_no_features(self):
        with pytest.raises(
            dk.TargetError, match="target: Turn changes the input features of a module, but an embedding takes ids"
        ):
            dk.attach(One(nn.Embedding(13, 5)), KINDS["input"](at="target"))

    def test_an_input_of_integers(self):
        class Rounds(nn.Linear):
            def forward(self, x):
                return super().forward(x.to(self.weight.dtype))

        model = One(Rounds(5, 7))
        dk.attach(model, KINDS["input"](at="target"))
        with pytest.raises(
            dk.TargetError, match=r"Turn: expected hidden states as the input of this Rounds, found torch.int64"
        ):
            model(torch.ones(3, 5, dtype=torch.int64))

    @pytest.mark.parametrize("kind", ["output", "input"])
    def test_features_at_another_place(self, kind):
        class Flips(nn.Linear):
            def forward(self, x):
                return super().forward(x.mT).mT

        model = One(Flips(5, 7))
        dk.attach(model, KINDS[kind](at="target"))
        with pytest.raises(dk.TargetError, match=r"expected [57] features at dimension -1"):
            model(torch.randn(2, 5, 3))

    @pytest.mark.parametrize("kind", ON_WEIGHTS)
    def test_a_module_without_a_weight(self, kind):
        with pytest.raises(dk.TargetError, match="found MultiheadAttention"):
            dk.attach(One(nn.MultiheadAttention(12, 3)), KINDS[kind](at="target"))

    def test_names_are_gone_behind_the_block(self):
        with registered():
            pass
        assert Around.name in dk.METHODS


class TestParameters:
    """Weights that no module is called for, as stacks of experts or alone."""

    class Stack(nn.Module):
        def __init__(self, transposed):
            super().__init__()
            self.is_transposed = transposed
            self.weight = nn.Parameter(torch.randn(5, 7))

        def forward(self, x):
            return x @ (self.weight if self.is_transposed else self.weight.T)

    @pytest.mark.parametrize("transposed", [True, False])
    @pytest.mark.parametrize("kind", ON_WEIGHTS)
    def test_equals_the_formula_and_merges(self, kind, transposed):
        model = One(self.Stack(transposed)).double().eval()
        delta = randomize(dk.attach(model, KINDS[kind](at="target.weight")))
        (module,) = delta.modules["target.weight"]
        weight = model.target.weight.detach()
        weight = weight.T if transposed else weight
        x = torch.randn(3, weight.shape[1], dtype=torch.float64)
        bare = x @ weight.T
        wanted = type(module).formula(weight, torch.zeros(len(weight), dtype=torch.float64), values(module), x)
        assert (wanted - bare).abs().max() > 0.1
        torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
        delta.scale = -0.5
        torch.testing.assert_close(model(x), 1.5 * bare - 0.5 * wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(delta.merge().backbone(x), 1.5 * bare - 0.5 * wanted, rtol=1e-12, atol=1e-12)
        delta.detach()
        assert torch.equal(model(x), bare)


def test_every_kind_on_a_transformer():
    torch.manual_seed(0)
    model = Transformer().eval()
    bare = model(ids())
    before = snapshot(model)
    delta = dk.attach(model, *(method(at="*.q_proj") for name, method in KINDS.items()))
    assert torch.equal(model(ids()), bare)
    randomize(delta)
    assert not torch.allclose(model(ids()), bare)
    hidden_output(model(ids())).sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    delta.detach()
    model.zero_grad()
    same(before, snapshot(model))
