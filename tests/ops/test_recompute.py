"""A full weight update computed again in the backward pass: the same gradients, and no matrix kept for them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.ops import ComputedBy
from deltakit.ops.recompute import linear_with, recomputed
from support.functional import functional_and_own
from support.kind_methods import EVERY_KIND, by_hand, registered
from support.models import randomize

D_IN, D_OUT = 5, 7


@pytest.fixture(autouse=True)
def methods():
    with registered(*EVERY_KIND.values()):
        yield


def factors(dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((D_OUT, 3), (3, D_IN), (D_OUT,))]


def build(a, b, c):
    return torch.tanh(a @ b) * c[:, None]


@pytest.mark.parametrize("shape", [(5,), (11, 5), (2, 3, 5), (0, 5)], ids=str)
def test_gradients_are_those_of_autograd(shape):
    given = factors()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = linear_with(x, build, tuple(given))
    wanted = F.linear(x, build(*given))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, *given], g), torch.autograd.grad(wanted, [x, *given], g), rtol=1e-12, atol=1e-12
    )


def test_second_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *given: linear_with(x, build, given), (x, *factors()))


@pytest.mark.parametrize("asks", ["x", "a", "c", "none"])
def test_only_what_is_asked_for(asks):
    a, b, c = factors()
    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=asks == "x")
    for tensor, name in ((a, "a"), (b, "b"), (c, "c")):
        tensor.requires_grad_(name == asks)
    y = linear_with(x, build, (a, b, c))
    assert y.requires_grad is (asks != "none")
    if asks != "none":
        (asked,) = [t for t in (x, a, b, c) if t.requires_grad]
        g = torch.randn_like(y)
        (wanted,) = torch.autograd.grad(F.linear(x, build(a, b, c)), asked, g)
        y.backward(g)
        torch.testing.assert_close(asked.grad, wanted, rtol=1e-12, atol=1e-12)
        assert [t.grad is None for t in (x, a, b, c)] == [t is not asked for t in (x, a, b, c)]


def test_a_parameter_that_the_matrix_does_not_read():
    a, b, c = factors()
    unused = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(11, 5, dtype=torch.float64)
    linear_with(x, lambda a, b, c, _: build(a, b, c), (a, b, c, unused)).sum().backward()
    assert unused.grad is None or not unused.grad.any()
    assert a.grad.any()


def test_gradcheck():
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b, c: linear_with(x, build, (a, b, c)), (x, *factors()))


def test_a_change_between_forward_and_backward_is_an_error():
    given = factors()
    y = linear_with(torch.randn(11, 5, dtype=torch.float64), build, tuple(given))
    with torch.no_grad():
        given[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def saved(run):
    """The shapes of all tensors that the graph of a run keeps, and their storages."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return output, kept


def same_derivatives(found, wanted, given, *, graph, second, within):
    """Compares the derivatives of two outputs; the second ones within ten times as much."""
    g = torch.randn_like(wanted)
    ways = [torch.autograd.grad(y, given, g, create_graph=graph) for y in (found, wanted)]
    torch.testing.assert_close(*ways, rtol=within, atol=within)
    if second:
        again = [torch.autograd.grad(sum(part.square().sum() for part in way), given) for way in ways]
        torch.testing.assert_close(*again, rtol=10 * within, atol=10 * within)


class TestWeightMaps:
    def test_the_graph_keeps_no_product_of_full_rank(self):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
        delta = randomize(dk.attach(model, dk.RandLoRA(r=2, at="0")))
        x = torch.randn(67, D_IN, dtype=torch.float64)
        output, kept = saved(lambda: model(x))
        own = {p.data_ptr() for p in delta.parameters()}
        assert {t.data_ptr() for t in kept} - own == {x.data_ptr()}
        one_by_one = torch.cat([model(row[None]) for row in x])
        torch.testing.assert_close(one_by_one, output)

    @pytest.mark.parametrize(("d_in", "d_out"), [(D_IN, D_OUT), (D_OUT, D_IN)])
    def test_nor_with_few_tokens_the_large_factor(self, d_in, d_out):
        model = nn.Sequential(nn.Linear(d_in, d_out)).double()
        delta = randomize(dk.attach(model, dk.RandLoRA(r=2, at="0")))
        (module,) = delta.modules["0"]
        x = torch.randn(3, d_in, dtype=torch.float64, requires_grad=True)
        output, kept = saved(lambda: model(x))
        own = {p.data_ptr() for p in (*delta.parameters(), model[0].weight)}
        assert sum(t.numel() for t in kept if t.data_ptr() not in own) <= 3 * max(d_in, 6) + 6 * max(d_in, d_out)
        wanted = torch.autograd.grad(F.linear(x, model[0].weight + module.update()).sum(), [x, *delta.parameters()])
        torch.testing.assert_close(torch.autograd.grad(output.sum(), [x, *delta.parameters()]), wanted)

    @pytest.mark.parametrize("kind", ["weight_update", "new_weight"])
    def test_the_graph_keeps_no_matrix(self, kind):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
        delta = randomize(dk.attach(model, EVERY_KIND[kind](at="0")))
        x = torch.randn(11, D_IN, dtype=torch.float64)
        model(x)
        # Parameters are there anyway: no copy of them is kept.
        own = {p.data_ptr() for p in model.parameters()}
        _, kept = saved(lambda: model(x))
        others = [t for t in kept if t.data_ptr() not in own]
        assert others
        assert {t.data_ptr() for t in others} == {x.data_ptr()}
        # Written out plainly, such matrices are kept: what is tested for can be seen.
        (module,) = delta.modules["0"]
        _, plain = saved(lambda: F.linear(x, module.weight_update(model[0].weight.detach())))
        assert [t for t in plain if t.shape[-2:] in ((D_OUT, D_IN), (D_IN, D_OUT))]

    @pytest.mark.parametrize("scale", [1, -0.5])
    @pytest.mark.parametrize("kind", ["weight_update", "new_weight"])
    def test_gradients_are_those_of_the_formula(self, kind, scale):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
        delta = randomize(dk.attach(model, EVERY_KIND[kind](at="0")))
        delta.scale = scale
        (module,) = delta.modules["0"]
        x = torch.randn(11, D_IN, dtype=torch.float64, requires_grad=True)
        given = [x, *delta.parameters()]
        weight, bias = model[0].weight.detach(), model[0].bias.detach()
        update = module.weight_update(weight)
        wanted = F.linear(x, weight + scale * update, bias)
        found = model(x)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        if scale == 1:
            torch.testing.assert_close(found, by_hand(model[0], module, x), rtol=1e-12, atol=1e-12)
        g = torch.randn_like(wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found, given, g), torch.autograd.grad(wanted, given, g), rtol=1e-11, atol=1e-11
        )

    @pytest.mark.parametrize("kind", ["weight_update", "new_weight"])
    @pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
    @pytest.mark.parametrize("x_needs", [True, False])
    def test_one_node_computes_the_gradients_of_layer_and_update(self, kind, layer, x_needs):
        made = nn.Linear(D_IN, D_OUT) if layer == "Linear" else Conv1D(D_OUT, D_IN)
        model = nn.Sequential(made).double()
        delta = randomize(dk.attach(model, EVERY_KIND[kind](at="0")))
        delta.scale = 0.5
        (module,) = delta.modules["0"]
        x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=x_needs)
        given = [*delta.parameters(), *([x] if x_needs else [])]
        found = model(x)
        assert found.grad_fn.name() == "_RecomputedBackward"
        assert not [fn for fn, _ in found.grad_fn.next_functions if fn is not None and "Accumulate" not in fn.name()]
        weight = made.weight.detach() if layer == "Linear" else made.weight.detach().T
        wanted = F.linear(x, weight + 0.5 * module.weight_update(weight), made.bias.detach())
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        same_derivatives(found, wanted, given, graph=True, second=x_needs, within=1e-11)

    @pytest.mark.parametrize("kind", ["weight_update", "new_weight"])
    def test_a_trained_layer_keeps_its_own_node(self, kind):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
        randomize(dk.attach(model, EVERY_KIND[kind](at="0"), freeze=False))
        model.requires_grad_(True)
        x = torch.randn(3, D_IN, dtype=torch.float64)
        model(x).sum().backward()
        assert model[0].weight.grad is not None

    @pytest.mark.parametrize("kind", ["weight_update", "new_weight"])
    def test_gradcheck(self, kind):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
        delta = randomize(dk.attach(model, EVERY_KIND[kind](at="0")))
        x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
        model(x)
        assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *delta.parameters()))

    def test_the_backbone_s_weight_is_not_asked(self):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
        delta = randomize(dk.attach(model, EVERY_KIND["new_weight"](at="0")))
        model(torch.randn(3, D_IN, dtype=torch.float64)).sum().backward()
        assert model[0].weight.grad is None
        assert all(p.grad is not None for p in delta.parameters())


class TestRecomputed:
    @staticmethod
    def formula(x, w):
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w).conj(), n=5).tanh()

    @pytest.mark.parametrize("asks", ["x", "w", "both"])
    def test_gradients_are_those_of_autograd(self, asks):
        x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=asks != "w")
        w = torch.randn(5, dtype=torch.float64, requires_grad=asks != "x")
        given = [one for one in (x, w) if one.requires_grad]
        ways = [y(x, w) for y in (lambda *given: recomputed(self.formula, *given), self.formula)]
        assert torch.equal(*ways)
        g = torch.randn_like(x)
        torch.testing.assert_close(*(torch.autograd.grad(y, given, g) for y in ways), rtol=1e-12, atol=1e-12)

    def test_second_derivatives(self):
        given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (5,))]
        assert torch.autograd.gradgradcheck(lambda *given: recomputed(self.formula, *given), given)

    def test_only_the_inputs_are_kept(self):
        x, w = torch.randn(3, 5), torch.randn(5, requires_grad=True)
        _, kept = saved(lambda: recomputed(self.formula, x, w))
        assert {t.data_ptr() for t in kept} == {x.data_ptr(), w.data_ptr()}
        _, plain = saved(lambda: self.formula(x, w))
        assert {t.data_ptr() for t in plain} - {x.data_ptr(), w.data_ptr()}

    def test_inputs_that_depend_on_each_other(self):
        """A layer that is called twice: the second input depends on the parameter."""
        x, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64, requires_grad=True)
        ways = []
        for run in (lambda *given: recomputed(self.formula, *given), self.formula):
            y = run(run(x, w), w).square().sum()
            ways.append([torch.autograd.grad(y, w, create_graph=again, retain_graph=True) for again in (False, True)])
        torch.testing.assert_close(*ways, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("again", [False, True])
    def test_hooks_of_a_parameter_run_once(self, again):
        w = torch.randn(5, dtype=torch.float64, requires_grad=True)
        x = torch.randn(3, 5, dtype=torch.float64)
        (plain,) = torch.autograd.grad(self.formula(x, w).sum(), w)
        w.register_hook(lambda g: g / 2)
        (found,) = torch.autograd.grad(recomputed(self.formula, x, w).sum(), w, create_graph=again)
        torch.testing.assert_close(found, plain / 2)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_traces_and_inference_tensors(self):
        w = torch.randn(5, requires_grad=True)
        with torch.inference_mode():
            x = torch.randn(3, 5)
        recomputed(lambda x, w: x + w, x, w).sum().backward()
        assert torch.equal(w.grad, torch.full((5,), 3.0))
        module = nn.Linear(5, 5)
        module.forward = lambda x: recomputed(torch.mul, x, module.bias)
        traced = torch.jit.trace(module, torch.randn(3, 5))
        again = torch.randn(2, 5)
        assert torch.equal(traced(again), again * module.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_updates_reach_the_gradient_of_the_input(dtype):
    """Their sum with the weight, rounded to 16 bits, would be the weight."""
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    nn.init.ones_(model[0].weight)
    model.to(dtype)
    delta = dk.attach(model, EVERY_KIND["weight_update"](at="0"))
    (module,) = delta.modules["0"]
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(parameter.sign() * 2**-6 + 2**-6)
        update = module.weight_update(model[0].weight).float()
        assert 0 < update.abs().max() < 2**-8
    x = torch.randn(3, D_IN, dtype=dtype, requires_grad=True)
    (gx,) = torch.autograd.grad(model(x), x, torch.ones(3, D_OUT, dtype=dtype))
    with_update = (model[0].weight.float() + update).sum(0).expand(3, -1)
    torch.testing.assert_close(gx.float(), with_update, rtol=2**-8, atol=0)


class TestComputedBy:
    """The formula of a module with other tensors in the place of its parameters."""

    @staticmethod
    def attached(kind):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
        delta = randomize(dk.attach(model, kind))
        ((module,),) = delta.modules.values()
        return model, module

    @pytest.mark.parametrize("kind", [dk.LoHa(r=2, at="0"), dk.SAID(size=11, at="0"), dk.LoKr(at="0")], ids=repr)
    def test_a_copy_reads_the_other_tensors_and_the_module_keeps_its_own(self, kind):
        model, module = self.attached(kind)
        weight = model[0].weight.detach()
        function = ComputedBy(module, lambda own: own(weight))
        own = module.parameters_read()
        before = function(*own)
        others = [2 * parameter.detach() for parameter in own]
        found = function(*others)
        assert [id(p) for p in module.parameters_read()] == [id(p) for p in own]
        assert torch.equal(function(*own), before)
        with torch.no_grad():
            for parameter in own:
                parameter.mul_(2)
        torch.testing.assert_close(found, function(*own))
        assert not torch.allclose(found, before)

    def test_a_formula_may_ask_for_its_parameter_by_name(self):
        _, module = self.attached(dk.LoHa(r=2, at="0"))
        function = ComputedBy(module, lambda own: own.get_parameter("A1").sum())
        assert function(*(torch.zeros_like(p) for p in module.parameters_read())) == 0

    @pytest.mark.parametrize("reads", ["a bound method", "a tuple", "a closure", "both ways", "an empty child"])
    @pytest.mark.parametrize("again", [False, True])
    def test_a_formula_that_reads_its_parameters_elsewhere(self, reads, again):
        """A copy of the module does not reach what `__init__` has put elsewhere. The gradients are right all the same."""
        _, module = self.attached(dk.LoHa(r=2, at="0"))
        a = module.A1
        if reads == "an empty child":
            child = module.child = type("Empty", (nn.Module,), {"__len__": lambda self: 0})()
            child.A = nn.Parameter(torch.randn_like(a))
        bound = {
            "a bound method": module.get_parameter,
            "a tuple": lambda _, held=(a,): held[0],
            "a closure": lambda _: a,
        }.get(reads)
        formula = {
            "both ways": lambda own: own.A1 * a,
            "an empty child": lambda own: own.child.A * 3,
        }.get(reads, lambda own: bound("A1").tanh())
        function = ComputedBy(module, formula)
        x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
        asked = [x, *([module.child.A] if reads == "an empty child" else [a])]
        y = linear_with(x, function)
        wanted = F.linear(x, formula(module))
        same_derivatives(y, wanted, asked, graph=again, second=again, within=1e-12)

    @pytest.mark.parametrize("by", ["hook", "forward"])
    def test_what_an_engine_manages_reads_its_own_parameters(self, by):
        """FSDP2 and accelerate put the parameters into the module that they know, when it is called."""
        model, module = self.attached(dk.LoHa(r=2, at="0"))
        x, called = torch.randn(11, D_IN, dtype=torch.float64), []
        wanted = torch.autograd.grad(model(x).sum(), list(module.parameters()))
        plain = module.forward
        if by == "hook":
            module.register_forward_pre_hook(lambda known, _: called.append(known))
        else:
            module.forward = lambda *args: (called.append(module), plain(*args))[1]
        found = torch.autograd.grad(model(x).sum(), list(module.parameters()))
        assert called == [module, module]
        torch.testing.assert_close(found, wanted)

    def test_a_functional_call_of_what_has_hooks_is_an_error_and_never_silent(self):
        model, module = self.attached(dk.LoHa(r=2, at="0"))
        module.register_forward_hook(lambda *_: None)
        given = {
            name: value.detach().clone().requires_grad_()
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        x = torch.randn(3, D_IN, dtype=torch.float64)
        y = torch.func.functional_call(model, given, (x,))
        with pytest.raises(
            dk.StateError, match="the parameters of this forward are not those that its delta module has"
        ):
            y.sum().backward()

    @pytest.mark.parametrize("kind", [dk.HiRA(r=2, at="0"), dk.GLoRA(r=2, at="0")], ids=repr)
    @pytest.mark.parametrize("how", ["weight_norm", "parametrization"])
    def test_weights_that_are_computed_from_others(self, kind, how):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
        if how == "weight_norm":
            torch.nn.utils.parametrizations.weight_norm(model[0])
        else:
            torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
        delta = randomize(dk.attach(model, kind))
        x = torch.randn(11, D_IN, dtype=torch.float64)
        found, wanted = functional_and_own(model, delta, x, whole=True)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize(
        ("kind", "reads"),
        [
            (dk.LoHa(r=2, at="0"), ()),
            (dk.RandLoRA(r=2, at="0"), ()),
            (dk.HiRA(r=2, at="0"), ("weight",)),
            (dk.GLoRA(r=2, at="0"), ("weight", "bias")),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("changed", ["weight", "bias"])
    def test_only_a_change_of_what_is_read_is_an_error(self, kind, reads, changed):
        """Such as the step of an optimiser, for a trained bias, between a forward and its backward pass."""
        model, _ = self.attached(kind)
        y = model(torch.randn(11, D_IN, dtype=torch.float64))
        with torch.no_grad():
            model[0].get_parameter(changed).add_(1)
        if changed in reads:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()

    @pytest.mark.parametrize("kind", [dk.LoHa(r=2, at="0"), dk.HiRA(r=2, at="0")], ids=repr)
    def test_hooks_that_copy_what_is_saved_get_a_weight_once(self, kind):
        model, _ = self.attached(kind)
        x = torch.randn(11, D_IN, dtype=torch.float64, requires_grad=True)
        _, kept = saved(lambda: model(x))
        # In the layer's own node, which is not kept, and in the one that serves both.
        assert [t.shape[-2:] in ((D_OUT, D_IN), (D_IN, D_OUT)) for t in kept].count(True) == 2
