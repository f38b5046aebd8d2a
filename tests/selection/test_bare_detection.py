"""What is found on a backbone does not depend on deltas, hooks or engines that are on it already."""

import accelerate
import pytest
import torch
from torch import nn

import deltakit as dk
from support import backbone_zoo
from support.models import attached
from support.tiny_transformers import build

METHODS = {
    "lora": dk.LoRA(r=2),
    "adapter": dk.Adapter(size=2),
    "bitfit": dk.BitFit(),
    "ia3": dk.IA3(),
    "prefix": dk.Prefix(tokens=2),
    "soft_prompt": dk.SoftPrompt(tokens=2),
}
BACKBONES = (
    *("gpt2", "bloom", "gpt_neox", "bert", "t5", "llama", "mixtral", "mamba", "vit", "resnet"),
    "torch.nn.Transformer",
)


def found(model):
    """All that selection says: roles, and for each method its targets with how it enters each of them."""
    answers = {"roles": dict(dk.roles(model))}
    for name, method in METHODS.items():
        try:
            planned = dk.plan(model, method)
        except dk.DeltaError as error:
            answers[name] = str(error)
        else:
            answers[name] = {path: entry(module) for path, module in planned.built[0].items()}
    return answers


def entry(module):
    facts = {name: getattr(module, name, None) for name in ("size", "axis", "feature_slice", "view", "heads")}
    tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in module.named_parameters()}
    return type(module), module.part, module.weight_read, facts, tensors, getattr(module, "insertion", None)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    model, _ = backbone_zoo.build(request.param)
    return model, found(model)


@pytest.mark.parametrize("first", METHODS)
def test_a_delta_that_is_there_already_changes_no_answer(backbone, first):
    """With a prefix on it, GPT-2's fused projection was measured wrong, so LoRA adapted all of `c_attn`."""
    model, bare = backbone
    try:
        delta = dk.attach(model, METHODS[first])
    except dk.DeltaError:
        pytest.skip("it has no place for this method")
    try:
        assert found(model) == bare
        if first == "prefix":
            delta.active = False
            assert found(model) == bare
    finally:
        delta.detach()


def test_merged_deltas_change_no_answer():
    model = build("gpt2")
    bare = found(model)
    dk.attach(model, METHODS["prefix"])
    dk.attach(model, METHODS["lora"], METHODS["bitfit"], name="merged").merge()
    assert found(model) == bare


def test_a_parameter_is_read_where_it_was_read_before_its_layer_had_a_delta():
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    (bare,) = dk.plan(model, dk.LoRA(r=2, at="0.weight")).built
    dk.attach(model, dk.BitFit(at="0"))
    (again,) = dk.plan(model, dk.LoRA(r=2, at="0.weight")).built
    assert again["0.weight"].weight_read == bare["0.weight"].weight_read


def with_hooks(model):
    def broken(*_):
        raise AssertionError("the user's hooks are for the user's calls")

    for module in model.modules():
        module.register_forward_pre_hook(broken)
        module.register_forward_hook(broken)
        module.register_full_backward_hook(broken)


def with_accelerate(model):
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))


def with_compiled_blocks(model):
    for module in model.modules():
        module.compile(backend="eager")


def with_own_forwards(model):
    for module in model.modules():
        module.forward = module.forward


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "bert"])
@pytest.mark.parametrize("change", [with_hooks, with_accelerate, with_compiled_blocks, with_own_forwards])
def test_hooks_and_engines_change_no_answer(kind, change):
    """accelerate's forward is a partial for the original module; GPT-2 dispatched by it had no feature slices."""
    model = build(kind)
    bare = found(model)
    change(model)
    assert found(model) == bare


def test_global_hooks_are_not_called():
    model = build("gpt2")
    bare, called = found(model), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(_))
    try:
        assert found(model) == bare
    finally:
        handle.remove()
    assert not called


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_the_mode_around_changes_no_answer(mode):
    model = build("gpt2")
    bare = dict(dk.roles(model))
    with mode():
        assert dict(dk.roles(model)) == bare


def test_a_lora_beside_a_prefix_is_saved_and_loaded(tmp_path):
    model, fresh = build("gpt2"), build("gpt2")
    dk.attach(model, dk.Prefix(tokens=2))
    delta = attached(model, dk.LoRA(r=2), name="second")
    assert "h.0.attn.c_attn[q]" in delta.modules
    delta.save(tmp_path)
    assert dk.load(tmp_path, fresh).modules.keys() == delta.modules.keys()
