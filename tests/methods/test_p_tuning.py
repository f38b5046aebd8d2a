"""P-tuning against its formula in float64 and PEFT's encoders on the same weights; what its files have; anchors."""

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build

ENCODERS = pytest.mark.parametrize("encoder", ["mlp", "lstm"])


def encoder_of(delta):
    (modules,) = (found for path, found in delta.modules.items() if path.endswith(("embed", "embed_tokens", "wte")))
    return modules[0].shared.encoder


def prompt_of(delta):
    return next(value for name, value in delta.state_dict().items() if name.endswith(".prompt"))


def test_the_seeds_own_call_has_as_many_parameters():
    """PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=128) at width 1024: 300,288."""
    model = nn.ModuleDict({"embed": nn.Embedding(7, 1024)})
    options = {"at": "embed", "tokens": 20, "hidden": 128, "prepend": False}
    assert dk.attach(model, dk.PTuning(**options)).num_parameters == 300_288
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=20, encoder_hidden_size=128, token_dim=1024, num_transformer_submodules=1
    )
    theirs = peft.PromptEncoder(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 300_288


@ENCODERS
def test_equals_the_formula_in_float64(encoder):
    model = Transformer().double().eval()
    delta = dk.attach(model, dk.PTuning(tokens=5, encoder=encoder, hidden=7))
    own = encoder_of(randomize(delta))
    x = own.embedding
    if encoder == "lstm":
        x = torch.cat([both(x, own.lstm, "l0"), both(x.flip(0), own.lstm, "l0_reverse").flip(0)], 1)
        x = torch.cat([both(x, own.lstm, "l1"), both(x.flip(0), own.lstm, "l1_reverse").flip(0)], 1)
    *inner, last = (layer for layer in own.mlp if isinstance(layer, nn.Linear))
    for layer in inner:
        x = (x @ layer.weight.mT + layer.bias).clamp_min(0)
    torch.testing.assert_close(prompt_of(delta), (x @ last.weight.mT + last.bias).detach(), rtol=1e-12, atol=1e-12)


def both(x, lstm, which):
    """One direction of one layer of an LSTM, written out."""
    w, u, b, c = (getattr(lstm, f"{name}_{which}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = cell = torch.zeros(u.shape[1], dtype=x.dtype)
    found = []
    for row in x:
        i, f, g, o = (w @ row + b + u @ h + c).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.tanh()
        found.append(h)
    return torch.stack(found)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@ENCODERS
def test_equals_peft_on_the_same_weights(encoder):
    model = build("llama", tf.AutoModelForCausalLM)
    text = torch.arange(3, 10)[None].repeat(2, 1)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_hidden_size=7,
        encoder_reparameterization_type=encoder.upper(),
    )
    theirs = peft.get_peft_model(model, config)
    values = theirs.prompt_encoder["default"].state_dict()
    expected = theirs(input_ids=text).logits[:, 5:]
    delta = dk.attach(theirs.base_model, dk.PTuning(tokens=5, encoder=encoder, hidden=7))
    names = {"embedding.weight": "embedding", "lstm_head": "lstm", "mlp_head": "mlp"}
    for old, new in names.items():
        values = {name.replace(old, new, 1): value for name, value in values.items()}
    encoder_of(delta).load_state_dict(values)
    torch.testing.assert_close(theirs.base_model(text).logits, expected, rtol=1e-5, atol=1e-6)


@ENCODERS
def test_a_file_has_the_vectors_and_no_encoder(encoder, tmp_path):
    model, fresh, plain = Transformer().eval(), Transformer().eval(), Transformer().eval()
    fresh.load_state_dict(model.state_dict())
    plain.load_state_dict(model.state_dict())
    delta = dk.attach(model, dk.PTuning(tokens=5, encoder=encoder, anchors={0: 7, 3: 11}))
    randomize(delta).save(tmp_path)
    assert {name: tuple(value.shape) for name, value in delta.state_dict().items()} == {
        "embed.p_tuning.prompt": (7, 20)
    }
    loaded = dk.load(tmp_path, fresh)
    assert torch.equal(fresh(ids()), model(ids()))
    assert [tuple(parameter.shape) for parameter in loaded.parameters()] == [(7, 20)]
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    dk.attach(plain, dk.SoftPrompt.from_delta(loaded), train=())
    assert torch.equal(plain(ids()), model(ids()))


def test_anchors_are_the_embeddings_of_their_tokens():
    model = Transformer().eval()
    delta = dk.attach(model, dk.PTuning(tokens=3, anchors={4: 13, 1: 5}))
    prompt = prompt_of(delta)
    assert torch.equal(prompt[[4, 1]], model.embed.weight[[13, 5]])
    assert torch.equal(prompt[[0, 2, 3]], encoder_of(delta).mlp(encoder_of(delta).embedding))
    model(ids()).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in delta.parameters())
    assert model.embed.weight.grad is None


def test_trained_tokens_among_ordinary_ones():
    """The authors' templates: trained tokens anywhere, and ordinary tokens between them."""
    model = build("gpt2", tf.AutoModelForCausalLM)
    delta = dk.attach(model, dk.PTuning(tokens=3, prepend=False), train=())
    prompt = prompt_of(delta)
    text = torch.tensor([[5, 97, 6, 98, 99, 7]])
    ours = model(text).logits
    delta.detach()
    x = model.get_input_embeddings()(text.clamp(max=96))
    x[0, [1, 3, 4]] = prompt
    torch.testing.assert_close(ours, model(inputs_embeds=x).logits)


def test_a_plain_prompt_and_a_computed_one_in_one_batch():
    model = Transformer().eval()
    wanted = []
    for name, method in (("a", dk.PTuning(tokens=5)), ("b", dk.SoftPrompt(tokens=5))):
        delta = randomize(dk.attach(model, method, name=name, train=()))
        wanted.append(model(ids()))
        delta.active = False
    for delta in dk.deltas(model):
        delta.active = True
    with dk.rows(model, ["a", "b", "b"]):
        found = model(ids())
    torch.testing.assert_close(found[:2], torch.stack([wanted[0][0], wanted[1][1]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, r"PTuning\(tokens=0\): expected at least 1"),
        ({"encoder": "gru"}, r"PTuning\(encoder='gru'\): expected 'mlp', 'lstm' or None"),
        ({"hidden": 0}, r"PTuning\(hidden=0\): expected at least 1"),
        ({"dropout": 1.0}, r"PTuning\(dropout=1.0\): expected a probability"),
        ({"tokens": 2, "anchors": {3: 5}}, "expected token ids by places from 0 to 2 in a prompt of 2 trained tokens"),
        ({"encoder": None, "anchors": {0: 5}}, "anchors need an encoder"),
        ({"anchors": {0: 31}}, r"embed: PTuning\(anchors=...\) has the id 31, beyond the vocabulary of 31"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.attach(Transformer(), dk.PTuning(**options))
