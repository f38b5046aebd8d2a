"""`dk.account`: the bytes are those that torch itself has: parameters, gradients, a real optimiser's state, saved tensors."""

import json
from functools import partial

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import CLASSES, WIDTH, Transformer, ids, same, snapshot
from support.quantized_layers import KINDS
from support.tiny_transformers import build


def attached():
    model = Transformer()
    return model, dk.attach(model, dk.LoRA(r=3), train="classifier")


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def stepped(model, make):
    """A real optimiser after a real step."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    model(ids()).square().mean().backward()
    optimizer.step()
    return optimizer


def state_bytes(optimizer):
    return nbytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))


def test_counts_are_those_of_torch():
    model, delta = attached()
    parts = dk.account(model).parts
    of_delta = {id(p) for modules in delta.modules.values() for m in modules for p in m.parameters()}
    own = [p for p in model.parameters() if id(p) not in of_delta]
    wanted = {
        "backbone_frozen": [p for p in own if not p.requires_grad],
        "backbone_trainable": [p for p in own if p.requires_grad],
        "delta_trainable": [p for p in model.parameters() if id(p) in of_delta],
        "delta_frozen": [],
        "gradients": [p for p in model.parameters() if p.requires_grad],
        "buffers": [],
    }
    for name, tensors in wanted.items():
        assert (parts[name].count, parts[name].bytes) == (sum(t.numel() for t in tensors), nbytes(tensors)), name
    # The classifier's own values, to restore them.
    assert parts["kept"].count == CLASSES * WIDTH + CLASSES
    assert sum(parts[n].count for n in list(wanted)[:3]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        partial(torch.optim.AdamW, amsgrad=True),
        torch.optim.SGD,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_s_state_is_that_of_a_real_step(make, dtype):
    model, _ = attached()
    model.to(dtype)
    before = snapshot(model)
    measured = dk.account(model, optimizer=make).parts["optimizer_state"]
    same(before, snapshot(model))
    assert all(p.grad is None for p in model.parameters())
    real = stepped(model, make)
    assert measured.bytes == state_bytes(real)
    live = dk.account(model, optimizer=real).parts["optimizer_state"]
    assert (live.bytes, live.count) == (measured.bytes, measured.count)


def test_an_optimizer_before_its_first_step_is_measured_with_its_own_groups():
    model, delta = attached()
    optimizer = torch.optim.AdamW(delta.parameter_groups(up={"lr": 1e-2}), lr=1e-3, amsgrad=True)
    measured = dk.account(model, optimizer=optimizer).parts["optimizer_state"]
    assert not optimizer.state
    model(ids()).square().mean().backward()
    optimizer.step()
    assert measured.bytes == state_bytes(optimizer) > 0


def test_what_cannot_be_measured_is_unknown():
    model, _ = attached()
    for make in (torch.optim.Adafactor, partial(torch.optim.AdamW, fused=True), torch.optim.LBFGS):
        account = dk.account(model, optimizer=make)
        part = account.parts["optimizer_state"]
        assert part.bytes is None
        assert part.note.partition(":")[2].startswith(" unknown before its first step")
        assert "without optimizer state" in str(account)
    real = stepped(model, partial(torch.optim.Adafactor, lr=1e-3))
    assert dk.account(model, optimizer=real).parts["optimizer_state"].bytes == state_bytes(real)


def test_a_function_that_returns_no_optimizer():
    with pytest.raises(
        dk.OptionError, match=r"account\(optimizer=...\): expected a function that returns an optimizer"
    ):
        dk.account(Transformer(), optimizer=lambda parameters: parameters)
    with pytest.raises(dk.OptionError, match=r"it cannot be called with a list of parameters alone: .*; pass a class"):
        dk.account(Transformer(), optimizer=lambda: None)


def test_on_the_meta_device():
    model, _ = attached()
    with torch.device("meta"):
        empty, _ = attached()
    one, other = (dk.account(m, optimizer=torch.optim.AdamW).to_dict() for m in (model, empty))
    assert one == other
    assert dk.account(empty, inputs=ids()).parts["activations"].bytes > 0
    one, other = (dk.account(m.layers[0].mlp, inputs=torch.randn(3, 20)).to_dict() for m in (model, empty))
    assert one == other


def test_tied_weights_count_once():
    model = build("t5")
    found = dk.account(model)
    assert found.parts["backbone_trainable"].count == sum(p.numel() for p in model.parameters())
    every = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    assert found.tied.count == every - sum(p.numel() for p in model.parameters()) > 0
    assert found.tied.note == "{encoder,decoder}.embed_tokens.weight = shared.weight"


def test_activations_are_the_saved_tensors():
    """One linear layer saves its input, and ReLU its output, which the next layer saves as its input: once."""
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(11, 5)
    found = dk.account(model, inputs=x).parts["activations"]
    assert found.bytes == 4 * 11 * (5 + 7)
    model.requires_grad_(False)
    assert dk.account(model, inputs=x).parts["activations"].bytes == 0


def test_a_forward_with_inputs_changes_nothing():
    model = nn.Sequential(nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5), nn.Dropout(0.5))
    before, random = snapshot(model), torch.random.get_rng_state()
    for inputs in (torch.randn(2, 3, 7), [torch.randn(2, 3, 7)], {"input": torch.randn(2, 3, 7)}):
        random = torch.random.get_rng_state()
        assert dk.account(model, inputs=inputs).parts["activations"].bytes
        assert torch.equal(random, torch.random.get_rng_state())
    same(before, snapshot(model))
    with pytest.raises(
        dk.OptionError, match=r"account\(inputs=...\): the forward of the Sequential raised RuntimeError: "
    ):
        dk.account(model, inputs=torch.randn(2, 5, 7))
    same(before, snapshot(model))


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("gptq", 64 * 128 // 2),
        # A scale in 8 bits for each block of 64, the table of 16 values, and that of 256 for the scales, with their own scale
        # and mean.
        ("bitsandbytes_4bit", 64 * 128 // 2 + 128 + 4 * (16 + 256 + 1 + 1)),
        ("bitsandbytes_8bit", 64 * 128 + 4 * 128),
    ],
)
def test_packed_weights(kind, stored):
    plain = nn.Linear(64, 128)
    model = nn.Sequential(KINDS[kind](plain, torch.float32), nn.Linear(128, 3)).requires_grad_(False)
    found = dk.account(model)
    assert found.quantized.count == 64 * 128
    assert found.quantized.bytes == stored
    own = [found.parts[name].count for name in ("backbone_frozen", "backbone_trainable")]
    assert sum(own) == 64 * 128 + 128 + 3 * 128 + 3
    assert "8,192 values are stored in " in str(found)


def test_sharded_parameters():
    """One of four processes, without the others: torch's fake process group."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        model = nn.Linear(5, 8)
        for name in ("weight", "bias"):
            whole = getattr(model, name).detach()
            setattr(model, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
        found = dk.account(model, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    finally:
        destroy_process_group()
    part = found.parts["backbone_trainable"]
    assert (part.count, part.bytes, part.local) == (48, 192, 48)
    assert found.parts["optimizer_state"].local == 48
    assert "in this process" in str(found)


def test_text_and_json():
    model, _ = attached()
    account = dk.account(model, optimizer=torch.optim.AdamW, inputs=ids())
    assert json.loads(json.dumps(account.to_dict()))["bytes"] == account.bytes
    assert "AdamW, after its first step" in account._repr_mimebundle_()["text/html"]
    assert "?" not in str(account)


def test_the_share_of_the_deltas_is_that_of_a_plan():
    model, _ = attached()
    # A frozen delta is no part of the backbone.
    dk.attach(model, dk.LoRA(r=2, at="@attn.o"), name="b").trainable = False
    plan = str(dk.plan(Transformer(), dk.LoRA(r=3)))
    part, total = plan.rpartition(", ")[2].split(" of ")
    assert dk.account(model).parts["delta_trainable"].note == f"{part} of the backbone's {total}"
