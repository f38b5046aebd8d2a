"""Low-rank updates where a fast path once differed from the formula y + s B A x."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.ops.fast_paths import frozen_weight
from deltakit.ops.int8_inputs import packed, unpacked
from support.models import randomize
from support.processes import in_a_process

D_IN, D_OUT = 7, 5


def attached(layer=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(D_IN, D_OUT))
    return model, randomize(dk.attach(model, dk.LoRA(r=2, at="0", **options), name="a"))


class TestInputsOfOneByte:
    @pytest.mark.parametrize(
        ("dtype", "size"),
        [(torch.bfloat16, 1), (torch.float16, 1), (torch.float16, 3e-4), (torch.float16, 1e-6), (torch.float32, 1)],
        ids=str,
    )
    def test_no_value_is_off_by_more_than_half_a_unit(self, dtype, size):
        """A scale that was rounded to 16 bits gave integers of 128, which are -128 in 8 bits."""
        torch.manual_seed(0)
        x = torch.cat([torch.randn(500, 64), torch.full((1, 64), 1.40625)]).mul(size).to(dtype)
        values, scale = packed(x)
        assert ((unpacked(values, scale) - x.float()).abs() <= 0.501 * scale).all()

    def test_the_gradient_is_off_by_a_percent(self):
        model, delta = attached(nn.Linear(64, 48), keep="int8")
        model.to(torch.bfloat16)
        x = torch.randn(256, 64)
        # One large feature, as in language models: each token's unit is that of this feature.
        x[:, 3] += 45
        x = x.bfloat16()
        (a, b) = delta.parameters()
        model(x).sum().backward()
        wanted = (b.float().T @ torch.ones(48, 256)) @ x.float() * 8
        assert ((a.grad.float() - wanted).norm() / wanted.norm()) < 0.02

    def test_an_input_buffer_that_is_filled_again(self):
        """By numpy or `.data`, which torch does not count."""
        model, delta = attached(keep="int8")
        exact, same = attached()
        x = torch.zeros(3, D_IN)
        shared = x.numpy()
        for step in range(3):
            shared[:] = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(step)).numpy()
            grads = [
                torch.autograd.grad(one(x).sum(), list(own.parameters()))
                for one, own in ((model, delta), (exact, same))
            ]
            torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)

    def test_inputs_of_inference_mode(self):
        model, delta = attached(keep="int8")
        with torch.inference_mode():
            x = torch.randn(3, D_IN)
        model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in delta.parameters())

    def test_layers_with_one_input_share_what_is_kept(self):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(D_IN, D_IN), nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT)])
        randomize(dk.attach(model, dk.LoRA(r=2, at=["1", "2"], keep="int8")))
        x = model[0](torch.randn(3, D_IN, requires_grad=True))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one):
            model[1](x), model[2](x)
        assert len({one.data_ptr() for one in kept if one.dtype is torch.int8}) == 1


class TestRows:
    def test_a_delta_that_was_attached_again_and_another_with_dropout(self):
        """After a call in evaluation, a call in training ran the second delta twice and the first not at all."""
        model, a = attached()
        model.eval()
        b = randomize(dk.attach(model, dk.LoRA(r=2, at="0", dropout=0.5), name="b"))
        a.detach().attach()
        x = torch.randn(2, 3, D_IN)
        bare, (factor_a, factor_b) = F.linear(x, model[0].weight, model[0].bias), a.parameters()
        wanted = bare[0] + 8 * x[0] @ factor_a.T @ factor_b.T
        with dk.rows(model, [a.name, "b"]):
            with torch.no_grad():
                torch.testing.assert_close(model(x)[0], wanted)
            model.train()
            ways = torch.stack([model(x) for _ in range(400)])
            model.eval()
            alone = model(x)
        torch.testing.assert_close(ways[:, 0], wanted.expand(400, -1, -1), rtol=1e-4, atol=1e-4)
        # Dropout is right on average, and its updates are those of one call.
        first, second = b.parameters()
        torch.testing.assert_close(alone[1], bare[1] + 8 * x[1] @ first.T @ second.T)
        torch.testing.assert_close(ways[:, 1].mean(0), alone[1], rtol=0.3, atol=0.3 * float(alone.detach().abs().max()))

    @pytest.mark.parametrize("graph", [False, True])
    def test_outputs_of_another_dtype(self, graph):
        class Wide(nn.Linear):
            def forward(self, x):
                return super().forward(x).float()

        model, a = attached(Wide(D_IN, D_OUT, dtype=torch.bfloat16))
        b = randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name="b"))
        x = torch.randn(2, 1, D_IN).bfloat16()
        with torch.set_grad_enabled(graph):
            each = []
            for other, row in ((b, x[:1]), (a, x[1:])):
                other.active = False
                each.append(model(row))
                other.active = True
            found = dk.rows(model, [a.name, "b"])(x)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, torch.cat(each), rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("method", [dk.Adapter(size=3, at="0"), dk.LoRA(r=2, at="0", dropout=0.1)], ids=repr)
    def test_a_training_step_after_inference_in_one_block(self, method):
        model = nn.Sequential(nn.Linear(D_IN, D_OUT))
        delta = randomize(dk.attach(model, method))
        x = torch.randn(2, 3, D_IN)
        with dk.rows(model, [delta.name, None]):
            with torch.inference_mode():
                model(x)
            model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in delta.parameters())


class TestOtherLayers:
    def test_a_subclass_of_conv1d_keeps_its_own_function(self):
        kept = []

        class Squashed(Conv1D):
            def forward(self, x):
                kept.append(torch.sigmoid(super().forward(x)))
                return kept[-1]

        model, delta = attached(Squashed(D_OUT, D_IN))
        a, b = delta.parameters()
        x = torch.randn(3, D_IN, requires_grad=True)
        found = model(x)
        wanted = torch.sigmoid(x @ model[0].weight + model[0].bias) + 8 * x @ a.T @ b.T
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(kept[0], torch.sigmoid(x @ model[0].weight + model[0].bias))
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), [x, a, b]) for y in (found, wanted)))

    def test_complex_layers(self):
        """In a process without checks of shapes: their annotations know real numbers alone."""
        code = f"""
            import torch, deltakit as dk
            import torch.nn.functional as F
            torch.manual_seed(0)
            layer = torch.nn.Linear({D_IN}, {D_OUT}, dtype=torch.complex64)
            model = torch.nn.Sequential(layer, torch.nn.Linear({D_OUT}, {D_OUT}))
            a, b = dk.attach(model, dk.LoRA(r=2, at="0")).parameters()
            torch.nn.init.normal_(b)
            x = torch.randn(3, {D_IN}, dtype=torch.complex64, requires_grad=True)
            wanted = F.linear(x, layer.weight, layer.bias) + 8 * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            one, two = (torch.autograd.grad(y.abs().square().sum(), [x, a, b]) for y in (layer(x), wanted))
            print(torch.allclose(layer(x), wanted), [torch.allclose(*pair, rtol=1e-4) for pair in zip(one, two)])
        """
        assert in_a_process(code) == "True [True, True, True]"

    @pytest.mark.parametrize("tokens", [1, 3, 40])
    def test_factors_of_two_dtypes(self, tokens):
        model, delta = attached()
        ((module,),) = delta.modules.values()
        module.B = nn.Parameter(module.B.double())
        with torch.no_grad():
            x = torch.randn(tokens, D_IN)
            wanted = F.linear(x, model[0].weight, model[0].bias) + 8 * x @ module.A.T @ module.B.float().T
            torch.testing.assert_close(model(x), wanted)


class Squashing(TorchFunctionMode):
    """Changes the input of a linear layer with this number of features."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and isinstance(args[1], nn.Parameter) and args[1].shape == (D_OUT, D_IN):
            args = torch.tanh(args[0]), *args[1:]
        return func(*args, **(kwargs or {}))


class TestReplacedCodeOfAllLinearLayers:
    """Quantizers of activations put code of their own in the place of torch's. The gradient of x goes through it."""

    @pytest.fixture(params=["forward", "F.linear", "mode"])
    def replaced(self, request, monkeypatch):
        forward, linear = nn.Linear.forward, F.linear
        if request.param == "forward":
            monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, torch.tanh(x)))
        elif request.param == "F.linear":
            monkeypatch.setattr(F, "linear", lambda x, *of: linear(torch.tanh(x) if len(of) > 1 else x, *of))
        with Squashing() if request.param == "mode" else nullcontext():
            yield

    @pytest.mark.parametrize("method", [dk.LoRA(r=2, at="0"), dk.LoHa(r=2, at="0")], ids=lambda m: m.name)
    def test_gradients(self, method, replaced):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D_IN, D_OUT))
        delta = randomize(dk.attach(model, method))
        update = delta.modules["0"][0].weight_updates(model[0])["weight"].detach()
        x = torch.randn(3, D_IN, requires_grad=True)
        wanted = torch.tanh(x) @ model[0].weight.T + model[0].bias + x @ update.T
        found = model(x)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (found, wanted)))

    def test_a_default_device_changes_nothing(self):
        model, _ = attached()
        x = torch.randn(3, D_IN, requires_grad=True)
        with torch.device("cpu"):
            assert "LowRank" in model(x).grad_fn.name()
            assert frozen_weight(model[0], x, x) is model[0].weight
        with Squashing():
            assert frozen_weight(model[0], x, x) is None


def test_what_a_hook_of_the_first_of_two_keeps_is_not_changed():
    model, _ = attached()
    randomize(dk.attach(model, dk.LoRA(r=3, at="0"), name="b"))
    kept = []
    first = next(model[0].children())
    first.register_forward_hook(lambda module, args, output: kept.append((output, output.detach().clone())))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(torch.randn(3, D_IN))
    assert len(kept) == 2
    assert all(torch.equal(*pair) for pair in kept)


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize(
    "change",
    [
        lambda module, name: prune.l1_unstructured(module, name, 0.5),
        lambda module, name: parametrize.register_parametrization(module, name, nn.Tanh()),
    ],
    ids=["pruned", "parametrized"],
)
def test_factors_that_are_computed_from_other_parameters(change, name):
    model, delta = attached()
    ((module,),) = delta.modules.values()
    before = getattr(module, name).detach().clone()
    change(module, name)
    x = torch.randn(3, D_IN)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(x)
            wanted = F.linear(x, model[0].weight, model[0].bias) + 8 * x @ module.A.T @ module.B.T
            torch.testing.assert_close(found, wanted)
    assert not torch.equal(getattr(module, name), before)


def test_a_randlora_is_exported_for_any_number_of_tokens():
    model = nn.Sequential(nn.Linear(8, 8))
    randomize(dk.attach(model, dk.RandLoRA(r=3, at="0")))
    sizes = ({0: torch.export.Dim("tokens", min=2, max=500)},)
    exported = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=sizes, strict=False).module()
    for tokens in (2, 90):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(exported(x), model(x))
