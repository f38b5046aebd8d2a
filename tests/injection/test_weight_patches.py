"""Weight patches: a forward reads a weight without calling the layer that holds it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import deltakit as dk
from deltakit.injection.weight_patch import PatchHook, _refuse_recomputing, hide_sum, show_sum
from support.backbone_inputs import inputs
from support.changed_weights import check_against_changed_weights
from support.models import randomize
from support.tiny_transformers import COMMON, build


def test_what_a_class_reads_itself_is_adapted_by_a_weight_patch():
    config = tf.MambaConfig(hidden_size=24, num_hidden_layers=2, state_size=4, **COMMON)
    model = tf.AutoModel.from_config(config).eval().double()
    ids = torch.randint(3, 97, (2, 7))
    targets = [f"layers.{i}.mixer.{name}" for i in (0, 1) for name in ("out_proj", "x_proj", "conv1d", "in_proj")]
    method = dk.LoRA(r=2, at="{out_proj,x_proj,conv1d,in_proj}")
    check_against_changed_weights(model, lambda m: m(ids).last_hidden_state, method, targets)
    plan = repr(dk.plan(model, method))
    assert "mixer.{out_proj,x_proj,conv1d}  weight patch" in plan.replace(
        "conv1d,x_proj,out_proj", "out_proj,x_proj,conv1d"
    )
    assert "layers.{0-1}.mixer.in_proj\n" in plan


def test_an_embedding_with_a_forward_of_its_own_is_adapted_by_a_weight_patch():
    model = build("gemma3_text").double()
    ids = torch.randint(3, 97, (2, 7))
    check_against_changed_weights(
        model, lambda m: m(input_ids=ids).last_hidden_state, dk.LoRA(r=2, at="embed_tokens"), ["embed_tokens"]
    )


def test_recomputed_blocks():
    model = build("mixtral", tf.AutoModelForCausalLM).train()
    batch = inputs("mixtral", model)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at=["@ff.down", "@attn.q"])))

    def gradients():
        model.zero_grad()
        model(**batch).logits.square().sum().backward()
        return [p.grad.clone() for p in delta.parameters()]

    plain = gradients()
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        for a, b in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_layer_whose_weight_is_only_read_is_passed_over_by_what_needs_it_called():
    class ReaderAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))
            self.out_proj = nn.Linear(6, 6)

        def forward(self, x):
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            h = nn.functional.scaled_dot_product_attention(q, k, v)
            return nn.functional.linear(h, self.out_proj.weight, self.out_proj.bias)

    model = nn.Sequential(ReaderAttention())
    delta = dk.attach(model, dk.Adapter(size=2))
    assert list(delta.modules) == ["0"]
    randomize(delta)
    model(torch.randn(2, 3, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())


class Tree(nn.Module):
    """A module that calls itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x, depth=2):
        return torch.tanh((self(x, depth - 1) + self(x, 0) if depth else x) @ self.weight.T)


def test_a_tensor_that_stood_in_the_place_of_a_weight_stands_there_again():
    """Other libraries too let a plain attribute shadow a parameter; it must not be lost with the first patch."""
    holder = nn.Linear(5, 3)
    other = holder.__dict__["weight"] = torch.randn(3, 5)
    show_sum(holder, "weight", "delta", lambda weight: torch.ones(3, 5))
    assert torch.equal(holder.weight, other + 1)
    hide_sum(holder, "delta")
    assert holder.weight is other


def test_forwards_with_weight_patches_nest():
    model, x = Tree().eval(), torch.randn(2, 6)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="weight")))
    attached = model(x)
    delta.merge()
    torch.testing.assert_close(attached, model(x))
    delta.unmerge()
    assert not any(name.startswith("_deltakit") for name in vars(model))


def test_forwards_with_weight_patches_in_threads():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True), 2).eval()
    randomize(dk.attach(model, dk.LoRA(r=2)))
    x = torch.randn(1, 5, 24)

    def run(_):
        with torch.no_grad():
            return model(x)

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(output, expected) for output in pool.map(run, range(200)))


@pytest.mark.parametrize(("holder", "named"), [("inner.proj", "inner.proj"), ("", "Linear")])
def test_a_weight_without_values_is_an_error(holder, named):
    hook, update = PatchHook("delta", holder), torch.zeros(2, 2)
    with pytest.raises(dk.TargetError, match=f"^{named}: this weight is offloaded and has no values here"):
        hook._fitting(nn.Linear(2, 2), update, update.to("meta"))
    assert hook._fitting(nn.Linear(2, 2), update, update.half()).dtype is torch.half
    assert hook._fitting(nn.Linear(2, 2), update.to("meta"), update.to("meta")).is_meta


def test_a_weight_in_a_block_that_is_computed_again_is_refused():
    scope, block = nn.Module(), GradientCheckpointingLayer()
    scope.add_module("block", block)
    block.proj = nn.Linear(2, 2)
    _refuse_recomputing(scope, "block.proj")
    block.gradient_checkpointing = True
    with pytest.raises(dk.StateError, match=r"block\.proj: gradient checkpointing recomputes its block"):
        _refuse_recomputing(scope, "block.proj")
    # What is computed again as a whole reads its weights with the sum.
    _refuse_recomputing(block, "proj")
    with torch.no_grad():
        _refuse_recomputing(scope, "block.proj")
    _refuse_recomputing(scope.eval(), "block.proj")


@pytest.mark.parametrize("rows_first", [True, False])
def test_threads_with_and_without_a_patch_do_not_mix(rows_first):
    # All threads read one attribute: a mixed batch without the delta would get the weight of the other thread's forward.
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, 28, dropout=0, batch_first=True), 1).eval()
    before = [sorted(vars(module)) for module in model.modules()]
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="self_attn.out_proj.weight"), name="patched"))
    x, inside, go_on = torch.randn(2, 7, 20), threading.Event(), threading.Event()

    def wait(module, args):
        inside.set()
        go_on.wait()

    def forward(mixed):
        with torch.no_grad():
            if not mixed:
                return model(x)
            with dk.rows(model, [None, None]):
                return model(x)

    wanted = forward(rows_first)
    handle = model.layers[0].self_attn.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(forward, rows_first)
        inside.wait()
        try:
            with pytest.raises(dk.StateError, match="seen by all threads.*let them take one lock, or detach the delta"):
                forward(not rows_first)
        finally:
            go_on.set()
        assert torch.equal(first.result(), wanted)
    handle.remove()
    forward(not rows_first)
    delta.detach()
    assert [sorted(vars(module)) for module in model.modules()] == before
