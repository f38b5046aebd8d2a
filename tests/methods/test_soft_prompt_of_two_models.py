"""A soft prompt on a module that holds two models: each of them gets a prompt of its own, or the one that `at=` names."""

import copy

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import randomize
from support.tiny_transformers import build

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 9]])
WORDS = "embeddings.word_embeddings"


class Two(nn.Module):
    """Two encoders of one's own, whose input embeddings may be tied."""

    def __init__(self, first="bert", second="roberta", *, tied=False):
        super().__init__()
        self.q, self.d = build(first), build(second)
        nn.init.normal_(self.d.get_input_embeddings().weight)
        if tied:
            self.d.embeddings.word_embeddings.weight = self.q.embeddings.word_embeddings.weight

    def forward(self, input_ids):
        return self.q(input_ids)[0].mean(1) @ self.d(input_ids)[0].mean(1).T


@pytest.mark.parametrize("second", ["roberta", "bert", "tied"])
def test_each_model_gets_its_own_prompt(second, tmp_path):
    model = Two(second="bert", tied=True) if second == "tied" else Two(second=second)
    alone = copy.deepcopy(model)
    delta = dk.attach(model, dk.SoftPrompt(tokens=3))
    assert set(delta.modules) == {f"q.{WORDS}", "q", f"d.{WORDS}", "d"}
    randomize(delta)
    vectors = {name.partition(".")[0]: parameter for name, parameter in delta.named_parameters()}
    assert [parameter.shape for parameter in vectors.values()] == [(3, model.q.config.hidden_size)] * 2
    for name, prompt in vectors.items():
        encoder = getattr(alone, name)
        (own,) = dk.attach(encoder, dk.SoftPrompt(tokens=3)).parameters()
        own.data.copy_(prompt)
        torch.testing.assert_close(getattr(model, name)(IDS)[0], encoder(IDS)[0])
    score = model(IDS)
    score.sum().backward()
    assert all(parameter.grad.any() for parameter in vectors.values())
    delta.save(tmp_path)
    delta.detach()
    dk.load(tmp_path, model)
    assert torch.equal(model(IDS), score)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["q", "d"])
def test_at_names_one_of_them(name, tied):
    model = Two(second="bert", tied=tied)
    bare = {n: getattr(model, n)(IDS)[0] for n in ("q", "d")}
    delta = dk.attach(model, dk.SoftPrompt(tokens=3, at=f"{name}.{WORDS}"))
    assert set(delta.modules) == {f"{name}.{WORDS}", name}
    assert {n for n in bare if not torch.equal(getattr(model, n)(IDS)[0], bare[n])} == {name}


def test_what_is_no_embedding_names_one_that_is():
    with pytest.raises(dk.TargetError, match=rf"^d: .* found a RobertaModel; omit at=, or write at='d\.{WORDS}'"):
        dk.plan(Two(), dk.SoftPrompt(at="d"))


def test_an_encoder_decoder_has_one_prompt():
    assert dk.attach(build("t5"), dk.SoftPrompt(tokens=3)).num_parameters == 3 * build("t5").config.d_model
