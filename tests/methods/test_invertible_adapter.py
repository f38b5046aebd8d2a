"""InvertibleAdapter: its formula in float64, its inverse, its positions, and the number of its parameters."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Round(nn.Module):
    """An embedding and an output embedding with nothing in between."""

    def __init__(self, size=7):
        super().__init__()
        self.embed, self.head = nn.Embedding(31, size), nn.Linear(size, 31, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(self.embed(x))


def test_the_map_is_the_papers_and_its_inverse_undoes_it():
    model = Round().double().eval()
    before = model(ids())
    delta = randomize(dk.attach(model, dk.InvertibleAdapter()))
    (module,), p = delta.modules["embed"], dict(delta.named_parameters())
    p = {name.rpartition(".")[2]: value for name, value in p.items()}
    x = model.embed.weight[ids()]
    one, two = x[..., :3], x[..., 3:]

    def bottleneck(name, x):
        hidden = torch.relu(x @ p[f"{name}_down"].T + p[f"{name}_down_bias"])
        return hidden @ p[f"{name}_up"].T + p[f"{name}_up_bias"]

    one = one + bottleneck("F", two)
    two = two + bottleneck("G", one)
    mapped = model.embed(ids())
    assert not torch.allclose(mapped, x)
    torch.testing.assert_close(mapped, torch.cat((one, two), -1), **CLOSE)
    torch.testing.assert_close(module.shared(mapped, inverse=True), x, **CLOSE)
    torch.testing.assert_close(model(ids()), before, **CLOSE)
    assert (
        delta.num_parameters == sum(v.numel() for v in p.values()) == (2 * 4 + 2 + 3 * 2 + 3) + (1 * 3 + 1 + 4 * 1 + 4)
    )
    delta.scale = 0.5
    assert not torch.allclose(model(ids()), before)


@pytest.mark.parametrize(
    ("kind", "auto", "expected"),
    [
        ("llama", tf.AutoModelForCausalLM, ["model.embed_tokens", "lm_head"]),
        ("bert", tf.AutoModelForMaskedLM, ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]),
        ("bert", tf.AutoModelForSequenceClassification, ["bert.embeddings.word_embeddings"]),
        ("t5", tf.AutoModelForSeq2SeqLM, ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    ],
)
def test_positions(kind, auto, expected):
    model = build(kind, auto)
    found = dk.plan(model, dk.InvertibleAdapter()).paths["invertible_adapter"]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_and_its_decoder_share_one_map(kind, tmp_path):
    """They look up ids in embeddings of their own, whose weight is that of a third one that nothing calls."""
    model = build(kind, tf.AutoModelForSeq2SeqLM).requires_grad_(False)
    base = model.base_model
    embeddings = [base.encoder.embed_tokens, base.decoder.embed_tokens]
    x, before = ids(), [embedding(ids()) for embedding in embeddings]
    call = {"input_ids": x, "decoder_input_ids": x.flip(1)}
    plain = model(**call).logits
    delta = dk.attach(model, dk.InvertibleAdapter())
    assert torch.equal(model(**call).logits, plain)
    coupling = randomize(delta, 0.05).modules["lm_head"][0].shared
    for embedding, vectors in zip(embeddings, before, strict=True):
        torch.testing.assert_close(embedding(x), coupling(vectors, inverse=False))
        assert not torch.equal(embedding(x), vectors)
    changed = model(**call).logits
    assert len(delta.state_dict()) == 8
    delta.save(tmp_path)
    delta.detach()
    dk.load(tmp_path, model)
    assert torch.equal(model(**call).logits, changed)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_selected_input_embedding_comes_with_those_that_share_its_weight(kind):
    """The model calls those of its encoder and its decoder, and not the selected one."""
    model = build(kind, tf.AutoModelForSeq2SeqLM)
    call = {"input_ids": ids(), "decoder_input_ids": ids().flip(1)}
    plain = model(**call).logits
    both = randomize(dk.attach(model, dk.InvertibleAdapter(at="shared")))
    assert [path.rpartition(".")[2] for path in both.modules] == ["shared", "embed_tokens", "embed_tokens"]
    assert not torch.allclose(model(**call).logits, plain)
    both.detach()
    one = randomize(dk.attach(model, dk.InvertibleAdapter(at="encoder.embed_tokens")))
    assert len(one.modules) == 1
    assert not torch.allclose(model(**call).logits, plain)


def test_a_file_has_the_parameters_once(tmp_path):
    model, fresh = Round().eval(), Round().eval()
    fresh.load_state_dict(model.state_dict())
    delta = randomize(dk.attach(model, dk.InvertibleAdapter(reduction=1, activation="tanh")))
    delta.scale = 1.0
    model.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    fresh.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    delta.save(tmp_path)
    loaded = dk.load(tmp_path, fresh)
    assert len(loaded.state_dict()) == 8
    assert torch.equal(fresh(ids()), model(ids()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reduction": 0}, r"InvertibleAdapter\(reduction=0\): expected at least 1; 2 is usual"),
        ({"activation": "step"}, r"InvertibleAdapter\(activation='step'\): expected one of gelu, gelu_tanh, relu"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(dk.OptionError, match=text):
        dk.InvertibleAdapter(**options)


def test_targets_of_different_sizes():
    with pytest.raises(dk.OptionError, match="has 20 features and .*down_proj has 28, and one map is for all"):
        dk.attach(Transformer(), dk.InvertibleAdapter(at=["q_proj", "down_proj"]))
    with pytest.raises(dk.OptionError, match="embed: InvertibleAdapter needs two features or more"):
        dk.attach(Round(1), dk.InvertibleAdapter())
