"""In-place operations of the backbone behind, before and beside a delta: as without it, and as the formula says."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from support.models import randomize

WIDTH = 7


def masked(y, x):
    return y.masked_fill_(torch.arange(y.shape[-1]) % 3 == 0, 0.5)


def index_assigned(y, x):
    y[..., 0] = 0
    return y


def a_slice_added_to(y, x):
    y[..., 2:5].add_(1.5)
    return y


def narrowed(y, x):
    y.narrow(-1, 1, 3).mul_(2)
    return y


def increased(y, x):
    y += x.sum(-1, keepdim=True)
    return y


def viewed(y, x):
    return y.view(-1).relu_().view(y.shape)


FORMS = {
    "relu_": lambda y, x: y.relu_(),
    "nn.ReLU": lambda y, x: nn.ReLU(inplace=True)(y),
    "mul_": lambda y, x: y.mul_(0.3),
    "+=": increased,
    "masked_fill_": masked,
    "index": index_assigned,
    "slice add_": a_slice_added_to,
    "narrow mul_": narrowed,
    "dropout": lambda y, x: F.dropout(y, 0.4, training=True, inplace=True),
    "sigmoid_": lambda y, x: y.sigmoid_(),
    "copy_": lambda y, x: y.copy_(x.sum(-1, keepdim=True).expand_as(y) * y.detach().clone()),
    "view relu_": viewed,
    "chain": lambda y, x: F.gelu(index_assigned(y.mul_(2).add_(1), x)).mul_(3),
}

LAYERS = {
    "linear": lambda: nn.Linear(5, WIDTH),
    "no bias": lambda: nn.Linear(5, WIDTH, bias=False),
    "conv1d": lambda: Conv1D(WIDTH, 5),
}

METHODS = {
    "lora": lambda: [dk.LoRA(r=3, at="0")],
    "int8": lambda: [dk.LoRA(r=3, at="0", keep="int8")],
    "dropped": lambda: [dk.LoRA(r=3, at="0", dropout=0.3)],
    "two": lambda: [dk.LoRA(r=3, at="0"), dk.LoRA(r=2, at="0")],
    "adapter": lambda: [dk.Adapter(size=3, at="0")],
    "bitfit": lambda: [dk.BitFit(at="0")],
    "ia3": lambda: [dk.IA3(at="0", side="output")],
    "ia3 input": lambda: [dk.IA3(at="0", side="input")],
    "lora, then ia3": lambda: [dk.LoRA(r=3, at="0"), dk.IA3(at="0", side="output")],
    "bitfit, then lora": lambda: [dk.BitFit(at="0"), dk.LoRA(r=3, at="0")],
}


def with_deltas(layer, methods):
    model = nn.Sequential(layer).double()
    deltas = [randomize(dk.attach(model, method, name=f"d{k}")) for k, method in enumerate(methods)]
    return model, deltas


def gradients(run, x, deltas):
    """The output and all gradients of a run; dropout draws the same in each."""
    torch.manual_seed(3)
    output = run(x)
    inputs = [*([x] if x.requires_grad else []), *(p for delta in deltas for p in delta.parameters())]
    direction = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return output.detach(), torch.autograd.grad((output * direction).sum(), inputs, allow_unused=True)


def alike(change, model, deltas, x):
    """Behind a copy of the output nothing of the delta is changed in place: the same values and gradients, then."""
    found = gradients(lambda x: change(model(x), x), x, deltas)
    torch.testing.assert_close(found, gradients(lambda x: change(model(x).clone(), x), x, deltas))
    return found[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_behind_a_delta(form, method):
    # Only LoRA knows the layer that it is at.
    for layer in LAYERS.values() if method in ("lora", "two") else [LAYERS["linear"]]:
        model, deltas = with_deltas(layer(), METHODS[method]())
        for shape, asks in (((11, 5), True), ((2, 3, 5), False)):
            x = torch.randn(shape, dtype=torch.float64, requires_grad=asks)
            output = alike(FORMS[form], model, deltas, x)
            with torch.no_grad():
                torch.manual_seed(3)
                torch.testing.assert_close(FORMS[form](model(x), x), output)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("form", FORMS)
def test_behind_lora_where_it_is_computed_again(form, reentrant):
    model, deltas = with_deltas(LAYERS["linear"](), METHODS["two"]())
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    change = FORMS[form]
    found = []
    for again in (True, False):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        output = (
            checkpoint(lambda x: change(model(x), x), x, use_reentrant=reentrant)
            if again
            else change(model(x).clone(), x)
        )
        # Reentrant checkpointing refuses `torch.autograd.grad`.
        output.square().sum().backward()
        found.append([x.grad, *(p.grad for delta in deltas for p in delta.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", FORMS)
def test_lora_against_the_formula(form):
    model, (delta,) = with_deltas(LAYERS["linear"](), METHODS["lora"]())
    (lora,) = delta.modules["0"]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    layer, change = model[0], FORMS[form]

    def formula(x):
        y = F.linear(x, layer.weight, layer.bias) + lora.scaling * (x @ lora.A.T) @ lora.B.T
        return change(y, x)

    torch.testing.assert_close(
        gradients(lambda x: change(model(x), x), x, [delta]), gradients(formula, x, [delta]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", [True, False])
def test_behind_the_deltas_of_a_mixed_batch(form, grad):
    model, deltas = with_deltas(LAYERS["linear"](), METHODS["two"]())
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=grad)
    change = FORMS[form]
    with dk.rows(model, ["d0", None, "d1"]), torch.set_grad_enabled(grad):
        if grad:
            alike(change, model, deltas, x)
        else:
            torch.manual_seed(3)
            found = change(model(x), x)
            torch.manual_seed(3)
            torch.testing.assert_close(found, change(model(x).clone(), x))


def test_an_image_model_with_activations_in_place():
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(inplace=True), nn.Conv2d(7, 5, 1), nn.Hardswish(True)
    )
    deltas = [randomize(dk.attach(model, dk.LoRA(r=2, at=["0", "3"]), dk.BitFit(at=["0", "1"]), dk.IA3(at="3")))]
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    found = gradients(model.eval(), x, deltas)
    model[2].inplace = model[4].inplace = False
    torch.testing.assert_close(found, gradients(model, x, deltas))


def test_the_sum_is_no_view():
    model, _ = with_deltas(LAYERS["linear"](), METHODS["two"]())
    output = model(torch.randn(4, 5, dtype=torch.float64))
    assert not output._is_view()
    assert output.grad_fn.name() == "_LowRankBackward"


class Residual(nn.Module):
    """Adds a layer's output to its input in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        x = x * 1
        x += self.layer(x)
        return x.relu_()


@pytest.mark.parametrize(
    ("method", "works"),
    [(dk.LoRA(r=2, at="layer"), False), (dk.LoRA(r=2, at="layer", keep="int8"), True), (dk.BitFit(at="layer"), True)],
    ids=["exact", "int8", "bitfit"],
)
def test_an_input_that_changes_in_place_later(method, works):
    """The gradient of A needs the input: torch says so, as it does for a trained layer. In one byte a copy is kept."""
    model = Residual().double()
    randomize(dk.attach(model, method))
    x = torch.randn(4, 5, dtype=torch.float64)
    if works:
        model(x).sum().backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()


class Recorder(TorchDispatchMode):
    """Keeps the result of every matrix product, as selective checkpointing does."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.kept.append((result, result.clone()))
        return result


@pytest.mark.parametrize("names", [None, ["d0"]], ids=["plain", "rows"])
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_dispatch_mode_keeps_is_not_changed(grad, names):
    model, _ = with_deltas(LAYERS["linear"](), METHODS["lora"]())
    for tokens in (1, 29):
        x = torch.randn(1, tokens, 5, dtype=torch.float64)
        with torch.set_grad_enabled(grad), dk.rows(model, names) if names else nullcontext(), Recorder() as mode:
            model(x)
        assert mode.kept
        assert all(torch.equal(result, was) for result, was in mode.kept)


def test_selective_checkpointing_that_saves_products():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)).double()
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at=["0", "2"])))

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    found = gradients(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts), x, [delta])
    torch.testing.assert_close(found, gradients(model, x, [delta]))
