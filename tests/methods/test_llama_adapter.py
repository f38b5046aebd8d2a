"""LLaMA-Adapter against its formula in float64 and PEFT's on the same weights, in every way to attend that it serves."""

import peft
import pytest
import torch
import transformers as tf

import deltakit as dk
from support.backbone_inputs import hidden, inputs
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build


def attached(model, **options):
    return randomize(dk.attach(model, dk.LlamaAdapter(**{"tokens": 3, **options})), 1.0)


def test_equals_the_formula_in_float64():
    model = Transformer(blocks=1).double().eval()
    delta = attached(model)
    (module,) = delta.modules["layers.0.self_attn"]
    attention, x = model.layers[0].self_attn, torch.randn(2, 7, 20, dtype=torch.float64)
    found = attention(x)[0]
    delta.detach()
    q, k, v = (attention.heads(layer(x)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    key, value = (layer(module.prompt).view(3, 4, 5).transpose(0, 1) for layer in (attention.k_proj, attention.v_proj))
    own = (q @ k.mT / 5**0.5).softmax(-1) @ v
    wanted = own + module.gate * (q @ key.mT / 5**0.5).softmax(-1) @ value
    wanted = attention.o_proj(wanted.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_equals_peft_on_the_same_weights_and_reads_its_files(kind, tmp_path):
    # PEFT takes the number of key heads from the sizes of layers, which is right only for heads of this size.
    sizes = {"num_hidden_layers": 3, "head_dim": 6}
    model = build(kind, tf.AutoModelForCausalLM, **sizes)
    text = torch.arange(3, 10)[None].repeat(2, 1)
    bare = model(text).logits
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "adaption_gate" in name:
                parameter.fill_(0.7)
    expected = theirs(input_ids=text).logits
    assert (expected - bare).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path)
    model = build(kind, tf.AutoModelForCausalLM, **sizes)
    delta = dk.load(tmp_path, model)
    assert sorted(delta.modules) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    torch.testing.assert_close(model(text).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gpt_neox", "t5", "bart", "vit", "distilbert"])
def test_everywhere_identity_effect_gradients_and_exact_detach(kind):
    # torch rounds otherwise where weights require gradients.
    model = build(kind).requires_grad_(False)
    batch = inputs(kind, model)
    before = hidden(model(**batch))
    delta = dk.attach(model, dk.LlamaAdapter(tokens=3))
    assert torch.equal(hidden(model(**batch)), before)
    output = hidden(model(**batch)) if randomize(delta, 1.0) else None
    assert (output - before).abs().max() > 1e-3
    output.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in delta.parameters())
    delta.detach()
    assert torch.equal(hidden(model(**batch)), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_kernels_agree_beside_a_prefix(implementation):
    model = build("llama").double()
    model.set_attn_implementation("eager")
    batch = inputs("llama", model, padding="right")
    attached(model)
    randomize(dk.attach(model, dk.Prefix(tokens=2)))
    wanted = hidden(model(**batch))
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(hidden(model(**batch)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_generates_with_a_cache_as_without(kind):
    model = build(kind, tf.AutoModelForSeq2SeqLM if kind == "t5" else tf.AutoModelForCausalLM)
    batch = {k: v for k, v in inputs(kind, model).items() if k != "decoder_input_ids"}
    attached(model)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached, plain = (model.generate(**batch, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("make", [lambda: Transformer().eval(), lambda: build("llama")], ids=["torch", "interface"])
def test_mixed_batches_and_scale(make):
    model = make()
    text = torch.randint(3, 31, (3, 7), generator=torch.Generator().manual_seed(1))
    call = lambda: model(text) if isinstance(model, Transformer) else model(text).last_hidden_state  # noqa: E731
    wanted = [call()]
    for name in "ab":
        delta = randomize(dk.attach(model, dk.LlamaAdapter(tokens=3), name=name, train=()), 1.0)
        wanted.append(call())
        delta.active = False
    for delta in dk.deltas(model):
        delta.active = True
    with dk.rows(model, ["b", None, "a"]):
        found = call()
    torch.testing.assert_close(found, torch.stack([wanted[2][0], wanted[0][1], wanted[1][2]]), rtol=1e-4, atol=1e-5)
    dk.deltas(model)[1].detach()
    dk.deltas(model)[0].scale = 0.0
    assert torch.equal(call(), wanted[0])


def test_the_upper_layers(tmp_path):
    model = Transformer(blocks=5).eval()
    delta = attached(model, layers=2)
    assert sorted(delta.modules) == ["layers.3.self_attn", "layers.4.self_attn"]
    wanted = model(ids())
    delta.save(tmp_path)
    delta.detach()
    dk.load(tmp_path, model)
    assert torch.equal(model(ids()), wanted)


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (Transformer, lambda: dk.LlamaAdapter(tokens=0), r"LlamaAdapter\(tokens=0\): expected at least 1"),
        (Transformer, lambda: dk.LlamaAdapter(layers=0), r"LlamaAdapter\(layers=0\): expected at least 1"),
        (Transformer, lambda: dk.LlamaAdapter(at="mlp"), "this MLP has no attention in it, and llama_adapter needs one"),
        (lambda: build("bloom"), lambda: dk.LlamaAdapter(), "llama_adapter: BloomModel has no attention that it can serve"),
        (lambda: build("bloom"), lambda: dk.LlamaAdapter(at="@attn"), "h.0.self_attention: .*llama_adapter"),
        (lambda: torch.nn.Linear(2, 3), lambda: dk.LlamaAdapter(), "llama_adapter: Linear has no attention"),
    ],
)  # fmt: skip
def test_bad_options_and_targets(make, method, message):
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(make(), method())
