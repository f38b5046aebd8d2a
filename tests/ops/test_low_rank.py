"""The fast form of LoRA's product against the formula: values, gradients, what is kept, and when it steps aside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.core import FeatureSlice, Target
from deltakit.ops import low_rank as lowrank
from deltakit.ops.fast_paths import fresh, frozen_weight
from support.models import randomize


def layer(kind, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    return (Conv1D(7, 5) if kind == "Conv1D" else nn.Linear(5, 7, bias=bias)).to(dtype)


def attached(module, **options):
    model = nn.Sequential(module)
    delta = randomize(dk.attach(model, dk.LoRA(r=3, at="0", **options)))
    (lora,) = delta.modules["0"]
    return model, lora


def formula(module, lora, x):
    """Section 4.1 of the paper, as it is written."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return F.linear(x, weight, module.bias) + lora.scaling * (x @ lora.A.T) @ lora.B.T


def fast(monkeypatch):
    """Makes falling back to the plain formula a failure."""
    monkeypatch.setattr(lowrank, "plain", lambda *_: pytest.fail("the plain formula ran"))


@pytest.mark.parametrize("asks", [True, False], ids=["x asks", "x does not"])
@pytest.mark.parametrize("shape", [(5,), (11, 5), (2, 3, 5), (0, 5)], ids=str)
@pytest.mark.parametrize(("kind", "bias"), [("Linear", True), ("Linear", False), ("Conv1D", True)])
def test_values_and_gradients(monkeypatch, kind, bias, shape, asks):
    fast(monkeypatch)
    module = layer(kind, bias)
    model, lora = attached(module)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=asks)
    inputs = [lora.A, lora.B, *([x] if asks else [])]
    wanted, found = formula(module, lora, x), model(x)
    torch.testing.assert_close(found, wanted)
    g = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, g), torch.autograd.grad(wanted, inputs, g))
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_second_derivatives(kind, frozen):
    module = layer(kind)
    model, lora = attached(module)
    module.weight.requires_grad_(not frozen)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def run(x, a, b):
        return torch.func.functional_call(model, {"0.delta_lora.A": a, "0.delta_lora.B": b}, (x,))

    inputs = (x, lora.A.detach().requires_grad_(), lora.B.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_weight_that_is_trained_too_gets_its_gradient():
    module = layer("Linear")
    model, lora = attached(module)
    module.weight.requires_grad_(True)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    inputs = [module.weight, lora.A, lora.B, x]
    wanted = torch.autograd.grad(formula(module, lora, x).square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), inputs), wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_parts_of_an_output(interleaved):
    module = nn.Linear(6, 18).double()
    rows = FeatureSlice("k", 3, 6, 2, 4) if interleaved else FeatureSlice("k", 1, 18, 6, 12)
    lora = dk.LoRA(r=2).build_at(Target("0", module, feature_slice=rows)).double()
    nn.init.normal_(lora.B)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 18, dtype=torch.float64)
    wanted = y + rows.spread(lora.scaling * (x @ lora.A.T) @ lora.B.T)
    torch.testing.assert_close(lora(x, y.clone(), module, False), wanted)
    inputs = [x, lora.A, lora.B]
    found = torch.autograd.grad(lora(x, y.clone(), module, False).square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), inputs))


def test_a_part_of_an_output_by_the_plain_formula():
    rows = FeatureSlice("k", 1, 18, 6, 12)
    lora = dk.LoRA(r=2).build_at(Target("0", nn.Linear(6, 18).double(), feature_slice=rows)).double()
    nn.init.normal_(lora.B)
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(18, 4, dtype=torch.float64).T
    wanted = y + rows.spread(lora.scaling * (x @ lora.A.T) @ lora.B.T)
    torch.testing.assert_close(lora(x, y, nn.Identity(), False), wanted)


def test_several_deltas_on_one_layer(monkeypatch):
    fast(monkeypatch)
    module = layer("Linear")
    model, first = attached(module)
    (second,) = randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name="second")).modules["0"]
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    wanted = formula(module, first, x) + second.scaling * (x @ second.A.T) @ second.B.T
    inputs = [x, first.A, first.B, second.A, second.B]
    found = torch.autograd.grad(model(x).square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), inputs))


def test_what_an_earlier_hook_holds_is_not_changed():
    module = layer("Linear")
    model, lora = attached(module)
    seen = []
    module.register_forward_hook(lambda *call: seen.append(call[2]), prepend=True)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), formula(module, lora, x))
    torch.testing.assert_close(seen[0], F.linear(x, module.weight, module.bias))


def test_in_half_precision_it_is_as_near_as_the_formula():
    module = layer("Linear", dtype=torch.bfloat16)
    model, lora = attached(module)
    assert lora.A.dtype is torch.bfloat16
    x = torch.randn(64, 5, dtype=torch.bfloat16, requires_grad=True)
    inputs = [x, lora.A, lora.B]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = F.linear(wide[0], module.weight.double(), module.bias.double())
    exact = exact + lora.scaling * (wide[0] @ wide[1].T) @ wide[2].T
    found, plain = model(x), formula(module, lora, x)
    assert (found - exact).abs().max() <= 1.1 * (plain - exact).abs().max()
    exact.sum().backward()
    for tensor, other in zip(torch.autograd.grad(found.sum(), inputs), wide, strict=True):
        torch.testing.assert_close(tensor.double(), other.grad, rtol=0.02, atol=0.05)


def test_factors_in_float32_on_a_layer_in_half_precision():
    module = layer("Linear", dtype=torch.bfloat16)
    model, lora = attached(module)
    lora.float()
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    output = model(x)
    output.sum().backward()
    assert (output.dtype, x.grad.dtype, lora.A.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", ["autocast", "vmap", "jvp", "grad", "trace"])
def test_it_steps_aside_for(transform):
    module = layer("Linear", dtype=torch.float32)
    model, lora = attached(module)
    x = torch.randn(4, 5)
    wanted = formula(module, lora, x)
    if transform == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
            assert output.dtype is torch.bfloat16
            output.float().sum().backward()
        torch.testing.assert_close(output.float(), wanted, rtol=0.05, atol=0.1)
    elif transform == "vmap":
        torch.testing.assert_close(torch.func.vmap(model)(x), wanted)
    elif transform == "jvp":
        found = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
        torch.testing.assert_close(
            found, torch.func.jvp(lambda x: formula(module, lora, x), (x,), (torch.ones_like(x),))[1]
        )
    elif transform == "grad":
        wanted = torch.func.grad(lambda x: formula(module, lora, x).square().sum())(x)
        torch.testing.assert_close(torch.func.grad(lambda x: model(x).square().sum())(x), wanted)
    else:
        traced = torch.jit.trace(model.requires_grad_(False), x)
        torch.testing.assert_close(traced(x[:2]), wanted[:2])


def kept(call):
    """The bytes that a forward keeps for the backward pass, each storage once, parameters left out."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    return sum(storages.values()), output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_its_input_and_the_product_with_a_and_nothing_else(dtype):
    model, _ = attached(nn.Linear(64, 96).to(dtype))
    x = torch.randn(2, 10, 64, dtype=dtype, requires_grad=True)
    bytes_kept, _ = kept(lambda: model(x))
    assert bytes_kept == dtype.itemsize * (20 * 64 + 20 * 3)


def test_inputs_kept_in_one_byte_a_value():
    exact, _ = attached(nn.Linear(64, 96))
    model, lora = attached(nn.Linear(64, 96), keep="int8")
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        other.data.copy_(one)
    x = torch.randn(2, 10, 64, requires_grad=True)
    bytes_kept, output = kept(lambda: model(x))
    assert bytes_kept == 20 * 64 + 4 * 20 + 4 * 20 * 3
    assert torch.equal(output, exact(x))
    output.square().sum().backward()
    found = [x.grad, lora.A.grad, lora.B.grad]
    x.grad = None
    exact(x).square().sum().backward()
    wanted = [x.grad, *(exact[0].delta_lora.A.grad, exact[0].delta_lora.B.grad)]
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2], wanted[2])
    assert 0 < (found[1] - wanted[1]).norm() / wanted[1].norm() < 0.01
    with pytest.raises(dk.StateError, match=r"LoRA\(keep='int8'\) rounded them"):
        torch.autograd.grad(model(x).square().sum(), lora.A, create_graph=True)


def test_an_input_that_changed_in_place_is_packed_anew():
    """The bytes go with the tensor, so that queries and values share them: those of its former values must not be used."""
    model, lora = attached(nn.Linear(61, 53), keep="int8")
    x = torch.randn(2, 11, 61)
    model(x)
    x.copy_(torch.randn_like(x))
    model(x).square().sum().backward()
    (wanted,) = torch.autograd.grad(formula(model[0], lora, x).square().sum(), lora.A)
    assert (lora.A.grad - wanted).norm() / wanted.norm() < 0.01


@pytest.mark.parametrize("graph", [True, False])
def test_a_layer_that_keeps_itself_out_of_autocast(graph):
    """Its output stays in float32, where autocast makes the products of the update bfloat16: these cannot be added in place."""

    class InFloat32(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    model, lora = attached(InFloat32(5, 7))
    x = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(graph):
        found = model(x)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, formula(model[0], lora, x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("again", [False, True])
def test_beside_a_weight_patch(again):
    """The layer's own gradient is then that of the sum."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8).double())
    first = randomize(dk.attach(model, dk.LoRA(r=2, at="0.weight"), name="patch"))
    second = randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name="by_output"))
    if again:
        second.detach().attach()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    parameters = [x, *first.parameters(), *second.parameters()]
    found = torch.autograd.grad(model(x).square().sum(), parameters)
    (one,), (two,) = (next(iter(delta.modules.values())) for delta in (first, second))
    weight = model[0].weight + one.scaling * one.B @ one.A + two.scaling * two.B @ two.A
    torch.testing.assert_close(model(x), F.linear(x, weight, model[0].bias))
    wanted = torch.autograd.grad(F.linear(x, weight, model[0].bias).square().sum(), parameters)
    torch.testing.assert_close(found, wanted)


def test_dropout_of_few_tokens_without_a_graph():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    randomize(dk.attach(model, dk.LoRA(r=4, at="0", dropout=0.5)))
    x = torch.randn(2, 64)
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_what_a_hook_on_all_modules_holds_stays():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    x, held = torch.randn(3, 8), []
    bare = model(x)
    randomize(dk.attach(model, dk.LoRA(r=2, at="0")))
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: held.append(output) if isinstance(module, torch.nn.Linear) else None
    )
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert torch.equal(held[0], bare)


@pytest.mark.parametrize("returned", ["hidden first", "the same twice", "its input beside"])
def test_what_a_layer_returns_inside_a_tuple_is_not_changed_in_place(returned):
    """The layer, its caller or its backward pass may hold it: only the output itself, behind a plain layer, is nobody's."""

    class Tuple(nn.Linear):
        def forward(self, x):
            y = torch.sigmoid(super().forward(x))
            self.was = y.detach().clone()
            return {"hidden first": (y, None), "the same twice": (y, y), "its input beside": (x, y)}[returned]

    model, lora = attached(Tuple(5, 5).double())
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    first, second = model(x)
    update = lora.scaling * (before @ lora.A.T) @ lora.B.T
    torch.testing.assert_close(first, (before if returned == "its input beside" else model[0].was) + update)
    if second is not None:
        assert torch.equal(second, model[0].was)
    assert torch.equal(x, before)
    first.square().sum().backward()


def test_an_output_is_changed_in_place_where_nobody_else_holds_it():
    module = layer("Linear")
    model, first = attached(module)
    (second,) = dk.attach(model, dk.LoRA(r=2, at="0"), name="second").modules["0"]
    (third,) = dk.attach(model, dk.Adapter(size=2, at="0"), name="third").modules["0"]
    (fourth,) = dk.attach(model, dk.LoRA(r=2, at="0"), name="fourth").modules["0"]
    assert fresh(module, first) == (module, True)
    assert fresh(module, second) == (module, False)
    assert fresh(module, fourth) == (None, False)
    assert fresh(third, first) == (None, False)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layers_own_gradient_is_taken_too_where_it_is_frozen(bias):
    module = layer("Linear", bias).requires_grad_(False)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    y = module(x)
    assert frozen_weight(module, x, y) is module.weight
    assert frozen_weight(None, x, y) is None
    assert frozen_weight(module, x.detach(), y) is None
    assert frozen_weight(module, x.float(), y) is None
    for parameter in module.parameters():
        parameter.requires_grad_()
        assert frozen_weight(module, x, y) is None
        parameter.requires_grad_(False)


def test_a_backward_pass_inside_autocast():
    """The forward ran without it."""
    model, _ = attached(layer("Linear").float())
    x = torch.randn(3, 5, requires_grad=True)
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    y = model(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(found, wanted)
