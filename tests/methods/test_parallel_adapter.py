"""Parallel adapters against the paper's formula, on modules and on pairs of layers."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltakit as dk
from support.models import attached, randomize, same, snapshot
from support.tiny_transformers import build


def formula(delta, x, factor=4.0):
    """s (f(x W_d + b_d) W_u + b_u), section 4 of the paper."""
    down, up = delta.down, delta.up
    return factor * (torch.relu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias)


@pytest.mark.parametrize("scaling", [2.5, "learned", "channel"])
def test_it_is_its_formula(scaling):
    layer = nn.Linear(7, 11).double()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    y = layer(x)
    attached(nn.ModuleDict({"layer": layer}), dk.ParallelAdapter(size=3, scaling=scaling, at="layer"))
    delta = layer.delta_parallel_adapter
    assert (delta.down.weight.shape, delta.up.weight.shape) == ((3, 7), (11, 3))
    factor = scaling if isinstance(scaling, float) else delta.gain
    if scaling != 2.5:
        assert delta.gain.shape == ((1,) if scaling == "learned" else (11,))
    torch.testing.assert_close(layer(x), y + formula(delta, x, factor), rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """A gated feed-forward part that is no module of its own, with a norm behind it."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(7, 13), nn.Linear(7, 13), nn.Linear(13, 7)
        self.norm = nn.LayerNorm(7)

    def forward(self, x):
        return self.norm(x + self.inner(x))

    def inner(self, x):
        return self.down(torch.relu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("source", ["up", "gate", ["gate"]])
def test_a_pair_reads_the_input_of_the_first_and_adds_to_the_output_of_the_last(source):
    block = Block().double()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    y = block.inner(x)
    delta = attached(block, dk.ParallelAdapter(size=3, at="down", source=source))
    torch.testing.assert_close(block(x), block.norm(x + y + formula(block.down.delta_parallel_adapter, x)))
    assert delta.num_parameters == 3 * 7 + 3 + 7 * 3 + 7


PAIRS = {
    "bert": ("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense"),
    "opt": ("decoder.layers.{}.fc1", "decoder.layers.{}.fc2"),
    "albert": ("encoder.albert_layer_groups.0.albert_layers.{}.ffn", "encoder.albert_layer_groups.0.albert_layers.{}.ffn_output"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_default_positions_where_the_feed_forward_part_is_no_module(name):
    """The outputs equal those of hooks that are written here by hand."""
    model = build(name).double()
    twin = copy.deepcopy(model)
    delta = attached(model, dk.ParallelAdapter(size=3))
    first, last = PAIRS[name]
    for i in range(1 if name == "albert" else 2):
        seen = []
        (own,) = delta.modules[last.format(i)]
        twin.get_submodule(first.format(i)).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        twin.get_submodule(last.format(i)).register_forward_hook(
            lambda m, args, y, own=own, seen=seen: y + formula(own, seen.pop())
        )
    ids = torch.randint(3, 97, (2, 7))
    torch.testing.assert_close(model(ids).last_hidden_state, twin(ids).last_hidden_state, rtol=1e-12, atol=1e-12)
    assert set(delta.modules) == {path.format(i) for path in PAIRS[name] for i in range(1 if name == "albert" else 2)}
    assert "parallel_adapter size=3 scaling=4 relu" in repr(delta)
    assert delta.modules[first.format(0)][0].summary() == f"input for {last.format(0)}"


@pytest.mark.parametrize(
    ("name", "path"), [("llama", "layers.{}.mlp"), ("gpt2", "h.{}.mlp"), ("mixtral", "layers.{}.mlp")]
)
def test_default_positions_where_it_is_a_module(name, path):
    assert list(dk.attach(build(name), dk.ParallelAdapter(size=3)).modules) == [path.format(i) for i in (0, 1)]


@pytest.mark.parametrize(
    ("make", "path"),
    [
        # Its residual and its norm are inside, and the paper adds before the norm.
        (lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=97, d_model=24, n_layer=2, n_head=4, d_inner=52)), "layer.{}.ff.layer_{}"),
        # It is an nn.Sequential, which would call the delta module as one of its own.
        (lambda: tf.CTRLModel(tf.CTRLConfig(vocab_size=97, n_embd=24, n_layer=2, n_head=4, dff=52)), "h.{}.ffn.{}"),
    ],
)  # fmt: skip
def test_feed_forward_modules_that_an_adapter_cannot_be_on(make, path):
    model = make().eval()
    delta = attached(model, dk.ParallelAdapter(size=3))
    ends = (1, 2) if "layer_" in path else (0, 2)
    assert set(delta.modules) == {path.format(i, j) for i in (0, 1) for j in ends}
    model(torch.randint(3, 97, (2, 7)))


def test_a_source_may_be_the_norm_before_the_part():
    """As AdapterHub's parallel adapters on Llama, which read the residual stream."""
    model = build("llama").double()
    twin = copy.deepcopy(model)
    delta = attached(model, dk.ParallelAdapter(size=3, at="mlp", source="post_attention_layernorm"))
    for i in (0, 1):
        (own,), seen = delta.modules[f"layers.{i}.mlp"], []
        layer = twin.layers[i]
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        layer.mlp.register_forward_hook(lambda m, args, y, own=own, seen=seen: y + formula(own, seen.pop()))
    ids = torch.randint(3, 97, (2, 7))
    torch.testing.assert_close(model(ids).last_hidden_state, twin(ids).last_hidden_state, rtol=1e-12, atol=1e-12)


@pytest.fixture
def pair():
    model = build("bert").double()
    return model, attached(model, dk.ParallelAdapter(size=3)), torch.randint(3, 97, (3, 7))


def test_pairs_in_mixed_batches(pair):
    model, delta, ids = pair
    full = model(ids).last_hidden_state
    other = attached(model, dk.ParallelAdapter(size=5), name="other")
    delta.active = False
    rest = model(ids).last_hidden_state
    other.active = False
    bare = model(ids).last_hidden_state
    delta.active = other.active = True
    with dk.rows(model, ["delta", None, "other"]):
        mixed = model(ids).last_hidden_state
    torch.testing.assert_close(mixed, torch.stack([full[0], bare[1], rest[2]]))
    with dk.rows(model, ["other", "other", None]):
        torch.testing.assert_close(model(ids).last_hidden_state, torch.stack([rest[0], rest[1], bare[2]]))
    held = [
        module.handover._held
        for own in (delta, other)
        for m in own.modules.values()
        for module in m
        if hasattr(module, "handover")
    ]
    assert held == [{}] * 4
    delta.scale = 0.5
    assert not torch.allclose(model(ids).last_hidden_state, mixed)


def test_pairs_in_copies_and_threads(pair):
    model, delta, ids = pair
    full = model(ids).last_hidden_state
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    randomize(delta)
    for twin in twins:
        assert torch.equal(twin(ids).last_hidden_state, full)
    found = {}

    def run(number):
        torch.manual_seed(number)
        own = torch.randint(3, 97, (1 + number, 5))
        with torch.no_grad():
            found[number] = all(
                torch.equal(model(own).last_hidden_state, again) for again in [model(own).last_hidden_state] * 9
            )

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_pairs_under_checkpointing_and_after_an_interrupted_forward(pair):
    model, delta, ids = pair
    model(ids).last_hidden_state.square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in delta.parameters()]
    model.zero_grad()
    for layer in model.encoder.layer:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    model(ids).last_hidden_state.square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in delta.parameters()], wanted)
    output = model(ids).last_hidden_state

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.encoder.layer[0].intermediate.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:1])
    hook.remove()
    assert torch.equal(model(ids).last_hidden_state, output)


def test_pairs_are_saved_and_removed(tmp_path):
    model = build("bert")
    fresh, before = copy.deepcopy(model), snapshot(model)
    method = dk.ParallelAdapter(size=3, at="@ff.down", source="@ff.up", exclude="layer.0/@ff.down")
    delta = attached(model, method)
    assert set(delta.modules) == {f"encoder.layer.1.{part}.dense" for part in ("intermediate", "output")}
    ids = torch.randint(3, 97, (2, 7))
    delta.save(tmp_path)
    dk.load(tmp_path, fresh)
    assert torch.equal(fresh(ids).last_hidden_state, model(ids).last_hidden_state)
    delta.detach()
    same(before, snapshot(model))


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (Block, {"at": ["up", "down"], "source": "up"}, "up: it is a target of this ParallelAdapter and the source of another"),
        (Block, {"at": "norm", "source": ["gate", "up"]}, "norm: source= matches 2 modules .* such as gate and up; name one"),
        (lambda: nn.ModuleDict({"a": nn.Conv2d(3, 5, 1)}), {"at": "a"}, "a: ParallelAdapter works on modules whose features"),
        (lambda: nn.ModuleDict({"a": nn.Embedding(3, 5)}), {"at": "a"}, "a: ParallelAdapter changes .* takes ids; leave it out"),
        (
            lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)}),
            {"at": "b", "source": "a.out_proj"},
            "a.out_proj: ParallelAdapter reads its input, but it is never called",
        ),
        (Block, {"at": "down", "source": "up.weight"}, "up.weight: ParallelAdapter reads its input, but it is only a part"),
    ],
)  # fmt: skip
def test_bad_targets_change_nothing(unchecked, make, method, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(model, dk.ParallelAdapter(size=3, **method))
    same(before, snapshot(model))


def test_a_source_that_is_called_after_its_target():
    block = Block()
    dk.attach(block, dk.ParallelAdapter(size=3, at="gate", source="down"))
    with pytest.raises(
        dk.TargetError, match="gate was called, and down, whose input its delta reads, was not called before"
    ):
        block(torch.randn(2, 7))


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), "all", 1e39])
def test_bad_scaling(unchecked, scaling):
    with pytest.raises(dk.OptionError, match=r"ParallelAdapter\(scaling="):
        dk.ParallelAdapter(scaling=scaling)


def test_an_input_of_another_shape_is_no_parallel_input():
    model = nn.Sequential(nn.Linear(7, 5), nn.Flatten(0, 1), nn.Linear(5, 3))
    dk.attach(model, dk.ParallelAdapter(size=3, at="2", source="0"))
    with pytest.raises(
        dk.TargetError, match=r"output of shape \(10, 3\) .* 7 features, and found an input of shape \(2, 5, 7\)"
    ):
        model(torch.randn(2, 5, 7))
