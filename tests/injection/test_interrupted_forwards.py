"""Ctrl-C in a forward: torch runs no hook behind it, so the next call and `detach` must clear what it left."""

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import deltakit as dk
from support.interruptions import everything, interrupted, lines_of, unchanged
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build


class Encoder(nn.Module):
    """torch's own encoder, whose layers read weights directly."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.encoder(x)
        return self.head(x)


def encoder():
    torch.manual_seed(3)
    x = torch.randn(3, 7, 12)
    return Encoder().eval(), lambda model: model(x)


def plain():
    return Transformer().eval(), lambda model: model(ids())


def tiny(kind):
    model = build(kind)
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    return model, lambda m: m(input_ids=tokens).last_hidden_state


CASES = {
    "weight patch on attention": (encoder, dk.LoRA(r=2, at="encoder.layers.{0-1}.self_attn.in_proj_weight")),
    "weight patch on experts": (lambda: tiny("mixtral"), dk.LoRA(r=2, at="@ff.down")),
    "output hooks in an encoder": (encoder, dk.LoRA(r=2, at="linear1")),
    "prefix by mode, plain torch": (plain, dk.Prefix(tokens=3)),
    "prefix by mode, written out": (lambda: tiny("bloom"), dk.Prefix(tokens=3)),
    "prefix by mode, multi-head": (encoder, dk.Prefix(tokens=3, at="self_attn")),
    "soft prompt": (lambda: tiny("gpt2"), dk.SoftPrompt(tokens=3)),
    "low rank": (plain, dk.LoRA(r=2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", [True, False], ids=["the first forward", "a later forward"])
@torch.no_grad()
def test_the_next_forward_and_detach_clear_what_an_interrupted_one_left(case, first):
    make, method = CASES[case]
    model, run = make()
    before, bare = everything(model), run(model)
    delta = randomize(dk.attach(model, method))
    wanted = run(model)
    for line in lines_of(lambda: run(model), 9 if first else 19, model):
        if first:
            delta.detach()
            delta._record.checked = False
            delta.attach()
        interrupted(lambda: run(model), line, model=model)
        assert torch.equal(run(model), wanted), line
        assert not _get_current_function_mode_stack()
        interrupted(lambda: run(model), line, model=model)
        delta.detach()
        unchanged(before, everything(model))
        assert torch.equal(run(model), bare)
        delta.attach()
