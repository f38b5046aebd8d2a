"""Deltas on a GPU: the same promises as on the CPU. Machines without a GPU skip this file."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import deltakit as dk
from support.backbone_inputs import hidden, inputs
from support.models import WITHOUT_PARAMETERS, beside, method_of, randomize, same, snapshot
from support.tiny_transformers import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BACKBONES = ["bert", "gpt2", "llama", "t5", "bloom"]
NAMES = sorted({*dk.METHODS} - WITHOUT_PARAMETERS)
CASES = [(kind, name) for kind in BACKBONES for name in NAMES]

every_case = pytest.mark.parametrize(("kind", "name"), CASES)


def on_gpu(kind, dtype=torch.float32, name="lora"):
    """A backbone on the GPU, with what a method weighs, and its inputs."""
    model = beside(build(kind), method_of(name)).to("cuda", dtype).eval()
    return model, {name: value.to("cuda") for name, value in inputs(kind, model).items()}


def computed(model, call):
    return hidden(model(**call, use_cache=False))


@pytest.fixture(autouse=True)
def exact():
    """Kernels that give the same bits in every run."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@every_case
def test_detach_is_exact_after_training(kind, name):
    model, call = on_gpu(kind, name=name)
    before, output = snapshot(model), computed(model, call)
    delta = dk.attach(model, method_of(name))
    if dk.METHODS[name].identity:
        assert torch.equal(computed(model, call), output)
    start = {key: value.clone() for key, value in delta.state_dict().items()}
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    for _ in range(2):
        computed(model, call).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(value.is_cuda for value in delta.state_dict().values())
    assert any(not torch.equal(value, start[key]) for key, value in delta.state_dict().items())
    delta.detach()
    same(before, snapshot(model))
    assert torch.equal(computed(model, call), output)


@every_case
def test_a_delta_moves_between_devices(kind, name, tmp_path):
    model, call = on_gpu(kind, name=name)
    delta = dk.attach(model, method_of(name))
    randomize(delta)
    wanted = computed(model, call)
    delta.save(tmp_path)
    other = beside(build(kind), method_of(name)).eval()
    dk.load(tmp_path, other)
    found = computed(other, inputs(kind, other))
    assert torch.allclose(found, wanted.cpu(), atol=1e-4, rtol=1e-4)
    again = dk.load(tmp_path, on_gpu(kind, name=name)[0])
    assert torch.allclose(computed(again.backbone, call), wanted, atol=1e-5)
    model.cpu()
    assert torch.allclose(computed(model, inputs(kind, model)), wanted.cpu(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_autocast(name, dtype):
    model, call = on_gpu("llama", dtype, name)
    delta = dk.attach(model, method_of(name))
    randomize(delta)
    wide = copy.deepcopy(model).double()
    assert torch.allclose(computed(model, call).double(), computed(wide, call), atol=0.1, rtol=0.1)
    plain, call = on_gpu("llama", name=name)
    delta = dk.attach(plain, method_of(name))
    randomize(delta)
    with torch.autocast("cuda", dtype):
        output = computed(plain, call)
    output.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())


def test_lora_is_its_formula():
    layer = torch.nn.Linear(37, 53).to("cuda", torch.float64)
    model = torch.nn.Sequential(layer)
    delta = dk.attach(model, dk.LoRA(r=3, alpha=5, at="0"))
    randomize(delta)
    (module,) = delta.modules["0"]
    x = torch.randn(11, 37, device="cuda", dtype=torch.float64, requires_grad=True)
    output = model(x)
    formula = x @ layer.weight.mT + layer.bias + 5 / 3 * x @ module.A.mT @ module.B.mT
    assert torch.allclose(output, formula, atol=1e-10)
    g = torch.randn_like(output)
    ours = torch.autograd.grad(output, [x, module.A, module.B], g)
    wanted = torch.autograd.grad(formula, [x, module.A, module.B], g)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("name", ["lora", "adapter", "bitfit", "ia3", "prefix", "soft_prompt"])
def test_each_example_gets_its_own_delta(name):
    model, call = on_gpu("llama")
    deltas = [dk.attach(model, method_of(name), name=own) for own in ("a", "b")]
    for delta in deltas:
        randomize(delta)
    singly = []
    for row, own in enumerate(("a", None)):
        for delta in deltas:
            delta.active = delta.name == own
        alone = {key: value[row : row + 1] for key, value in call.items()}
        singly.append(model(**alone, use_cache=False).last_hidden_state)
    for delta in deltas:
        delta.active = True
    with dk.rows(model, ["a", None]):
        together = model(**call, use_cache=False).last_hidden_state
    assert torch.allclose(together, torch.cat(singly), atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "adapter", "bitfit", "ia3"])
def test_a_captured_cuda_graph_follows_the_values(name):
    model, call = on_gpu("bert")
    delta = dk.attach(model, method_of(name))
    call = {"input_ids": call["input_ids"]}
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(**call)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(**call).last_hidden_state
        randomize(delta)
        graph.replay()
        assert torch.allclose(output, model(**call).last_hidden_state, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name):
    torch.compiler.reset()
    model, call = on_gpu("llama", name=name)
    delta = dk.attach(model, method_of(name))
    randomize(delta)
    wanted = computed(model, call)
    compiled = torch.compile(model)
    assert torch.allclose(hidden(compiled(**call, use_cache=False)), wanted, atol=1e-3)
