"""LST against its formula in float64; what the backward pass needs; generation; encoder-decoders and mixed batches."""

import copy

import pytest
import torch
import transformers as tf
from torch.utils.checkpoint import checkpoint

import deltakit as dk
from support.backbone_inputs import inputs
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build


def ladder_of(delta):
    (found,) = (module for modules in delta.modules.values() for module in modules if hasattr(module, "rungs"))
    return found


def by_hand(model, ladder, text):
    """Section 3 of the paper, beside the frozen model's own forward."""
    x = model.embed(text)
    s = x @ ladder.first.weight.T + ladder.first.bias
    for block, rung in zip(model.layers, ladder.rungs, strict=True):
        x = block(x)
        g = 1 / (1 + torch.exp(-rung.alpha / 0.1))
        s = g * s + (1 - g) * (x @ rung.down.weight.T + rung.down.bias)
        s = s + rung.out(torch.nn.functional.gelu(rung.up(rung.norm(s))))
    return model.classifier(model.norm(x + ladder.last(ladder.norm(s))).mean(1))


def test_equals_the_formula_in_float64():
    model = Transformer(blocks=3).double().eval()
    twin = copy.deepcopy(model)
    delta = randomize(dk.attach(model, dk.LST(size=7)))
    found, wanted = model(ids()), by_hand(twin, ladder_of(delta), ids())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_autocast():
    model = Transformer(blocks=3)
    delta = randomize(dk.attach(model, dk.LST(size=7)))
    wanted = model(ids())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids())
    found.float().sum().backward()
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)
    assert all(parameter.grad is not None for parameter in delta.parameters())


def test_the_backbone_s_blocks_keep_no_graph():
    model = build("llama", tf.AutoModelForCausalLM)
    randomize(dk.attach(model, dk.LST()))
    blocks = list(model.model.layers)
    asked = []

    def note(module, args, output):
        asked.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    for path, module in dk.select(model, "**").items():
        if "layers." in path and module is not blocks[-1]:
            module.register_forward_hook(note)
    assert model(**inputs("llama", model)).logits.requires_grad
    assert len(asked) > 10 * len(blocks)
    assert not any(asked)


def bytes_kept(method):
    """The bytes that a forward keeps for the backward pass, each storage once, without parameters."""
    model = build("llama", tf.AutoModelForCausalLM, num_hidden_layers=4).train()
    dk.attach(model, method)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.model(torch.arange(3, 90).view(3, 29)).last_hidden_state
    assert out.requires_grad
    return sum(kept.values())


def test_training_keeps_less_than_lora_s():
    ladder, lora = bytes_kept(dk.LST()), bytes_kept(dk.LoRA(r=8))
    print(f"kept for the backward pass: LST {ladder:,} bytes, LoRA {lora:,} bytes")
    assert ladder < lora / 3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_generates_with_a_cache_as_without(kind):
    encoder_decoder = kind in ("t5", "bart")
    model = build(kind, tf.AutoModelForSeq2SeqLM if encoder_decoder else tf.AutoModelForCausalLM)
    batch = {k: v for k, v in inputs(kind, model).items() if k != "decoder_input_ids"}
    randomize(dk.attach(model, dk.LST()))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**batch, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), rtol=1e-3, atol=1e-4)


def test_stands_beside_the_decoder_of_an_encoder_decoder():
    model = build("t5", tf.AutoModelForSeq2SeqLM)
    delta = dk.attach(model, dk.LST())
    assert all(path.startswith("decoder.block") for path in delta.modules)
    both = dk.attach(model, dk.LST(at="@block"), name="both")
    assert sum(hasattr(module, "rungs") for found in both.modules.values() for module in found) == 2


def test_checkpointing_inside_blocks_and_around_them():
    """transformers checkpoints inside the calls of blocks. Around them the last block would run again, and the others not."""
    model = build("llama", tf.AutoModelForCausalLM).train()
    delta = randomize(dk.attach(model, dk.LST()))
    model(**inputs("llama", model)).logits.square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in delta.parameters()]
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model(**inputs("llama", model)).logits.square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in delta.parameters()], wanted)

    plain = Transformer().train()
    randomize(dk.attach(plain, dk.LST()))
    x = plain.embed(ids())
    for block in plain.layers:
        x = checkpoint(block, x, use_reentrant=False)
    with pytest.raises(dk.TargetError, match="switch off gradient checkpointing around whole blocks"):
        x.sum().backward()


def test_every_second_block(tmp_path):
    model = Transformer(blocks=5).eval()
    delta = randomize(dk.attach(model, dk.LST(every=2)))
    assert sorted(delta.modules) == ["layers.0", "layers.2", "layers.4"]
    wanted = model(ids())
    delta.save(tmp_path)
    delta.detach()
    dk.load(tmp_path, model)
    assert torch.equal(model(ids()), wanted)


def test_mixed_batches_and_scale():
    model = Transformer().eval()
    wanted = [model(ids())]
    for name in "ab":
        delta = randomize(dk.attach(model, dk.LST(size=5), name=name, train=()))
        wanted.append(model(ids()))
        delta.active = False
    for delta in dk.deltas(model):
        delta.active = True
    with dk.rows(model, ["b", None, "a"]):
        found = model(ids())
    torch.testing.assert_close(found, torch.stack([wanted[2][0], wanted[0][1], wanted[1][2]]))
    dk.deltas(model)[1].detach()
    dk.deltas(model)[0].scale = 0.0
    assert torch.equal(model(ids()), wanted[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, r"LST\(reduction=0\): expected at least 1"),
        ({"size": 0}, r"LST\(size=0\): expected at least 1"),
        ({"every": 0}, r"LST\(every=0\): expected at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.LST(**options)


def test_targets_that_cannot_be():
    with pytest.raises(dk.RoleError, match="lst: Sequential has no blocks that repeat"):
        dk.attach(torch.nn.Sequential(torch.nn.Linear(3, 3)), dk.LST())
    model = Transformer()
    dk.attach(model, dk.LST(at="mlp.up_proj"))
    with pytest.raises(dk.TargetError, match="LST reads modules whose inputs and outputs are alike"):
        model(ids())


def test_deltas_below_get_no_gradient_through_the_ladder():
    """With a loss that is linear in the last block's output, their gradients are those without the ladder."""
    model = Transformer()
    lora = randomize(dk.attach(model, dk.LoRA(r=2, at="layers.0.mlp.up_proj")))
    found = []
    for ladder in (None, dk.LST(size=5)):
        if ladder is not None:
            randomize(dk.attach(model, ladder, name="ladder"))
        x = model.embed(ids())
        for block in model.layers:
            x = block(x)
        model.zero_grad()
        (x * torch.linspace(-1, 1, 20)).sum().backward()
        found.append([parameter.grad.clone() for parameter in lora.parameters()])
    torch.testing.assert_close(*found)
