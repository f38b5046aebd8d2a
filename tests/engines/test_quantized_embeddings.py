"""Deltas on embeddings whose weights are quantized, and so neither have the shape of the embedding nor can be added to."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.models import randomize
from support.quantized_layers import embedding_of_bitsandbytes
from support.tiny_transformers import build

BITS = pytest.mark.parametrize("bits", [4, 8])
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 9]])


def llama(bits):
    model = build("llama", tf.AutoModelForCausalLM)
    embedding = nn.Embedding(model.config.vocab_size, model.config.hidden_size)
    model.model.embed_tokens = embedding_of_bitsandbytes(embedding, bits)
    return model, model.model.embed_tokens


@BITS
@pytest.mark.parametrize("options", [{}, {"init": "random"}, {"init_ids": [5, 6]}])
def test_a_soft_prompt_has_the_size_of_the_vectors(bits, options):
    model, embedding = llama(bits)
    vocabulary = embedding(torch.arange(embedding.num_embeddings)).detach()
    delta = dk.attach(model, dk.SoftPrompt(tokens=5, **options))
    (prompt,) = delta.parameters()
    assert prompt.shape == (5, embedding.embedding_dim)
    assert model(input_ids=IDS).logits.shape[:2] == IDS.shape
    if "init_ids" in options:
        assert torch.equal(prompt, vocabulary[[5, 6, 5, 6, 5]])
    elif not options:
        assert all((row == vocabulary).all(-1).any() for row in prompt)
    with pytest.raises(dk.OptionError, match=f"has the id {embedding.num_embeddings}, beyond the vocabulary of"):
        dk.plan(model, dk.SoftPrompt(init_ids=[embedding.num_embeddings]))


@BITS
def test_the_start_values_are_the_backbone_s_own(bits):
    """Not those with other deltas at the embedding."""
    model, embedding = llama(bits)
    own = embedding(torch.tensor([5])).detach()
    randomize(dk.attach(model, dk.LoRA(r=2, at="embed_tokens")))
    delta = dk.attach(model, dk.SoftPrompt(tokens=1, init_ids=[5]), name="prompt")
    assert torch.equal(next(iter(delta.parameters())), own)


@BITS
def test_lora_adds_to_what_the_embedding_gives(bits, tmp_path):
    model, embedding = llama(bits)
    bare = embedding(IDS).detach()
    delta = dk.attach(model, dk.LoRA(r=2, at="embed_tokens"))
    assert torch.equal(embedding(IDS), bare)
    randomize(delta)
    ((lora,),) = delta.modules.values()
    wanted = bare + lora.scaling * (lora.B @ lora.A)[:, IDS].movedim(0, -1)
    torch.testing.assert_close(embedding(IDS), wanted)
    model(input_ids=IDS).logits.sum().backward()
    assert all(parameter.grad.any() for parameter in delta.parameters())
    with pytest.raises(dk.TargetError, match="expected a floating-point weight of shape .* leave the delta attached"):
        delta.merge()
    # In a mixed batch too.
    with dk.rows(model, [delta.name, None]):
        torch.testing.assert_close(embedding(IDS), torch.stack([wanted[0], bare[1]]))


class Scaled(nn.Embedding):
    """As Gemma's and BART's."""

    embed_scale = 3.0

    def forward(self, input):
        return super().forward(input) * self.embed_scale


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = Scaled(50, 8)
        self.out = nn.Linear(8, 3)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        return self.out(self.embed(input_ids))


def test_an_embedding_that_scales_is_the_same_quantized_or_not(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = Model()
    randomize(dk.attach(model, dk.LoRA(r=2, at="embed"))).save(tmp_path)
    change = model(IDS) - (dk.deltas(model)[0].detach(), model(IDS))[1]
    quantization.quantize_(model.embed, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: True)
    model.requires_grad_(False)
    bare = model(IDS)
    dk.load(tmp_path, model)
    torch.testing.assert_close(model(IDS) - bare, change, rtol=1e-4, atol=1e-5)
    own = model.embed.weight.dequantize()[5]
    dk.deltas(model)[0].detach()
    (prompt,) = dk.attach(model, dk.SoftPrompt(tokens=1, init_ids=[5])).parameters()
    torch.testing.assert_close(prompt[0], own)
