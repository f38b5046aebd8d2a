"""Products with a sparse update: the dense formula in float64, its derivatives, and what keeps to the dense formula."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltakit as dk
from deltakit.methods import shira
from deltakit.ops import sparse_product
from support.models import attached
from support.peft_layers import conv1d, linear
from support.processes import in_a_process

pytestmark = pytest.mark.skipif(not sparse_product._WORKS, reason="torch has no sparse products here")

D_IN, D_OUT, MANY = 37, 53, 2 * sparse_product._TOKENS + 3
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def taken(monkeypatch):
    """Counts the sparse products; with `taken.dense()` none is taken any more."""

    class Taken(list):
        def dense(self):
            monkeypatch.setattr(shira, "sparse_entries", lambda *_: None)

    counts, add_sparse = Taken(), shira.add_sparse

    def counted(*given):
        counts.append(given)
        return add_sparse(*given)

    monkeypatch.setattr(shira, "add_sparse", counted)
    return counts


def adapted(make=linear, dtype=torch.float64, **options):
    layer = make(D_IN, D_OUT).to(dtype)
    model = nn.Sequential(nn.Identity(), layer, nn.ReLU(inplace=True)).eval()
    return model, attached(model, dk.SHiRA(at="1", r=1, **options))


def inputs(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(*shape, D_IN, dtype=dtype, requires_grad=True)


def results(model, delta, x):
    y = model(x)
    return y, *torch.autograd.grad(y.square().sum(), [x, *delta.parameters()])


@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (MANY,), (0,)], ids=str)
@pytest.mark.parametrize("make", [linear, conv1d])
def test_outputs_and_gradients_are_those_of_the_dense_formula(taken, make, shape, scale):
    model, delta = adapted(make)
    delta.scale = scale
    x = inputs(*shape)
    found = results(model, delta, x)
    assert len(taken) == (x.numel() > 0)
    taken.dense()
    torch.testing.assert_close(found, results(model, delta, x), **CLOSE)


@pytest.mark.parametrize("make", [linear, conv1d])
def test_second_derivatives(taken, make):
    model, delta = adapted(make)
    model[2] = nn.Tanh()
    (values,) = delta.parameters()
    x = inputs(2)
    values.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, values: torch.func.functional_call(model, {name(delta, model): values}, (x,)), (x, values)
    )
    assert taken


def name(delta, model):
    (own,) = delta.parameters()
    return next(path for path, parameter in model.named_parameters() if parameter is own)


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batches_of_gradients(taken, way):
    model, delta = adapted()
    x, g = inputs(3), torch.randn(5, 3, D_OUT, dtype=torch.float64)
    asked = [x, *delta.parameters()]
    each = [torch.autograd.grad(model(x), asked, one) for one in g]
    y = model(x)
    if way == "vmap":
        found = torch.func.vmap(lambda one: torch.autograd.grad(y, asked, one, retain_graph=True))(g)
    else:
        found = torch.autograd.grad(y, asked, g, is_grads_batched=True)
    assert len(taken) == 6
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each, strict=True))), **CLOSE)


@pytest.mark.parametrize("asks", ["x", "values", "none"])
def test_only_what_is_asked_for(taken, asks):
    model, delta = adapted()
    (values,) = delta.parameters()
    x = inputs(3).requires_grad_(asks == "x")
    values.requires_grad_(asks == "values")
    y = model(x)
    assert taken
    assert y.requires_grad is (asks != "none")
    if asks != "none":
        y.sum().backward()
    assert [one.grad is not None for one in (x, values)] == [asks == "x", asks == "values"]


def test_nothing_of_the_size_of_the_weight_or_the_output_is_kept(taken):
    model, _ = adapted()
    model[2] = nn.Identity()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
        model(inputs(7))
    assert taken
    own = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert [t.shape for t in held if t.data_ptr() not in own] == [(7, D_IN)]


def test_checkpointing_and_bfloat16(taken):
    model, delta = adapted()
    x = inputs(7)
    found = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), [x, *delta.parameters()])
    assert len(taken) == 2
    torch.testing.assert_close(found, results(model, delta, x)[1:], **CLOSE)
    taken.clear()
    model, delta = adapted(dtype=torch.bfloat16)
    assert results(model, delta, inputs(7, dtype=torch.bfloat16))[0].dtype is torch.bfloat16
    assert not taken


def test_a_backward_pass_under_autocast(taken):
    model, delta = adapted(dtype=torch.float32)
    x = inputs(7, dtype=torch.float32)
    loss = model(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, [x, *delta.parameters()])
    torch.testing.assert_close(found, results(model, delta, x)[1:])
    assert len(taken) == 2


CHANGES = {
    "order": lambda module: module.places.copy_(module.places.flip(1)),
    "int64": lambda module: setattr(module, "places", module.places.long()),
    "strides": lambda module: setattr(module, "places", module.places.T.contiguous().T),
    "a slice": lambda module: setattr(module, "places", module.places.repeat_interleave(3, dim=1)[:, ::3]),
    "an inference tensor": lambda module: setattr(module, "places", inference(module.places)),
    "hooks": lambda module: module.register_forward_hook(lambda *_: None),
    "a subclass": lambda module: setattr(module, "__class__", type("Other", (shira.SHiRADelta,), {})),
    "a replaced formula": lambda module: setattr(module, "weight_update", lambda w: 0 * SHIRA(module, w)),
    "another dtype": lambda module: setattr(module.values, "data", module.values.data.float()),
}
SHIRA = shira.SHiRADelta.weight_update


def inference(places):
    with torch.inference_mode():
        return places.clone()


@pytest.mark.parametrize("change", CHANGES)
def test_what_keeps_to_the_dense_formula(taken, change):
    model, delta = adapted()
    (module,) = delta.modules["1"]
    CHANGES[change](module)
    x = inputs(3)
    found = results(model, delta, x)
    assert not taken
    dense = module.weight_update(model[1].weight) + model[1].weight
    torch.testing.assert_close(found[0], nn.functional.linear(x, dense, model[1].bias).relu(), **CLOSE)


def test_many_entries_keep_to_the_dense_formula(taken, monkeypatch):
    model, delta = adapted()
    assert len(*delta.parameters()) * 21 < D_IN * D_OUT < len(*delta.parameters()) * 22
    for most, count in ((22, 0), (21, 1)):
        monkeypatch.setattr(sparse_product, "_DENSEST", most)
        results(model, delta, inputs(3))
        assert len(taken) == count


def test_only_the_first_delta_at_a_layer_is_added_so(taken):
    model, delta = adapted()
    second = attached(model, dk.SHiRA(at="1", r=1), name="second")
    x = inputs(3)
    found = results(model, second, x)
    assert len(taken) == 1
    weight = model[1].weight + sum(one.modules["1"][0].weight_update(model[1].weight) for one in (delta, second))
    torch.testing.assert_close(found[0], nn.functional.linear(x, weight, model[1].bias).relu(), **CLOSE)


def test_global_hooks_see_the_calls_of_delta_modules(taken):
    model, delta = adapted()
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.append(module))
    results(model, delta, inputs(3))
    hook.remove()
    assert delta.modules["1"][0] in seen
    assert not taken


def test_under_another_default_device(taken):
    model, delta = adapted()
    with torch.device("meta"):
        found = results(model, delta, torch.ones(3, D_IN, dtype=torch.float64, device="cpu").requires_grad_())
    assert taken
    assert found[-1].device.type == "cpu"


@pytest.mark.parametrize(("row", "place"), [(0, -1), (0, D_OUT), (1, -1), (1, D_IN)])
@pytest.mark.parametrize("index", [0, 5, -1])
def test_places_outside_of_the_weight_are_errors(taken, index, row, place):
    """And no memory outside of it is read."""
    model, delta = adapted()
    (module,) = delta.modules["1"]
    module.places[row, index] = place
    with pytest.raises(dk.StateError, match=f"places outside of a weight of {D_OUT} to {D_IN}; load its state again"):
        model(inputs(3))
    assert not taken


def test_places_that_change_before_the_backward_pass(taken):
    model, delta = adapted()
    loss = model(inputs(3)).sum()
    delta.modules["1"][0].places.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("hooked", [False, True])
def test_places_whose_change_torch_does_not_see(taken, hooked):
    """Gradients are those at the saved places where hooks save a copy, else at the new ones; never at both."""
    model, delta = adapted()
    model[2] = nn.Identity()
    (module,) = delta.modules["1"]
    x, g, old = inputs(3), torch.randn(3, D_OUT, dtype=torch.float64), module.places.clone()
    copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t) if hooked else nullcontext()
    with copies:
        y = model(x)
    assert taken
    index = torch.randperm(D_IN * D_OUT)[: old.shape[1]].sort().values
    new = torch.stack((index // D_IN, index % D_IN)).int()
    module.places.data.copy_(new)
    gx, found = torch.autograd.grad(y, [x, module.values], g)
    rows, columns = (old if hooked else new).long()
    torch.testing.assert_close(found, (g.mT @ x)[rows, columns], **CLOSE)
    weight = model[1].weight.index_put((rows, columns), module.values, accumulate=True)
    torch.testing.assert_close(gx, g @ weight, **CLOSE)


def test_places_that_are_outside_in_the_backward_pass(taken):
    model, delta = adapted()
    loss = model(inputs(3)).sum()
    delta.modules["1"][0].places.data.fill_(10**8)
    with pytest.raises(IndexError):
        loss.backward()
    assert taken


def test_a_place_that_is_there_twice_adds_up(taken):
    model, delta = adapted()
    delta.modules["1"][0].places[:, 1] = delta.modules["1"][0].places[:, 0]
    x = inputs(3)
    found = results(model, delta, x)
    assert taken
    taken.dense()
    torch.testing.assert_close(found, results(model, delta, x), **CLOSE)


def test_there_is_no_warning_of_torch():
    """Its warning of sparse matrices comes once in a process."""
    code = """
        import warnings, torch, deltakit as dk
        warnings.simplefilter("error")
        model = torch.nn.Sequential(torch.nn.Linear(37, 53))
        dk.attach(model, dk.SHiRA(at="0", r=1))
        model(torch.ones(3, 37, requires_grad=True)).sum().backward()
        print("none")
    """
    assert in_a_process(code) == "none"


@pytest.mark.parametrize("how", ["expanded", "transposed", "sliced"])
def test_gradients_of_any_strides(taken, how):
    model, delta = adapted()
    model[2] = nn.Identity()
    x, weight = inputs(3), torch.randn(D_OUT, 3, dtype=torch.float64)
    loss = {
        "expanded": lambda y: y.sum(),
        "transposed": lambda y: (y.mT * weight).sum(),
        "sliced": lambda y: y[::2].sum(),
    }
    found = torch.autograd.grad(loss[how](model(x)), [x, *delta.parameters()])
    assert taken
    taken.dense()
    torch.testing.assert_close(found, torch.autograd.grad(loss[how](model(x)), [x, *delta.parameters()]), **CLOSE)


def test_inputs_of_any_strides(taken):
    model, delta = adapted()
    x = torch.randn(D_IN, 3, 5, dtype=torch.float64).permute(2, 1, 0)[:, ::2].requires_grad_()
    found = results(model, delta, x)
    assert taken
    taken.dense()
    torch.testing.assert_close(found, results(model, delta, x), **CLOSE)
