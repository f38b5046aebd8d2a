"""What delta modules are told of the backbone's call: ids, mask and the length of the cache; and that they forget it."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.core.backbone_call import current_call
from deltakit.methods.adapter import AdapterDelta
from support.backbone_inputs import inputs
from support.models import Transformer, ids, same, snapshot
from support.tiny_transformers import build


@pytest.fixture
def calls(monkeypatch):
    """Every call that adapters see from here on."""
    seen = []

    def forward(adapter, x, y):
        seen.append(current_call())
        return y

    monkeypatch.setattr(AdapterDelta, "reads_call", True)
    monkeypatch.setattr(AdapterDelta, "forward", forward)
    return seen


def test_a_call_is_known_in_its_time_and_no_longer(calls):
    """A block that is called alone afterwards would else go on with the ids of another batch."""
    model = Transformer()
    before = snapshot(model)
    delta = dk.attach(model, dk.Adapter(size=2))
    model(ids())
    assert {id(call) for call in calls} == {id(calls[0])}
    assert torch.equal(calls[0].ids, ids())
    assert (calls[0].mask, calls[0].start) == (None, 0)
    with pytest.raises(dk.StateError, match="the ids and the mask of the call are not known here"):
        model.layers[0](torch.randn(2, 3, 20))
    with pytest.raises(IndexError):
        model(ids() + 1000)
    with pytest.raises(dk.StateError, match="are not known here"):
        current_call()
    delta.detach()
    same(before, snapshot(model))


def test_a_filled_cache_counts(calls):
    """A step of `generate` is at the place behind all that is cached, and has the mask of all of it."""
    model = build("gpt2", tf.AutoModelForCausalLM)
    dk.attach(model, dk.Adapter(size=2))
    batch = inputs("gpt2", model)
    cache = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=True).past_key_values
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    model(input_ids=batch["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
    assert (calls[0].start, calls[-1].start) == (0, 7)
    assert torch.equal(calls[-1].ids, batch["input_ids"][:, :1])
    assert torch.equal(calls[-1].mask, mask)


@pytest.mark.parametrize("x", [torch.tensor([[3, 5, 7]]), torch.ones(1, 3, 20)], ids=["ids", "vectors"])
def test_ids_under_any_name(calls, x):
    """A model of the user's own may call its ids what it likes; what is in floating point is none."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(11, 20), nn.Linear(20, 7)

        def forward(self, text):
            return self.layer(text if text.is_floating_point() else self.table(text))

    model = Own()
    dk.attach(model, dk.Adapter(size=2, at="layer"))
    model(x)
    assert (calls[0].ids is x) is not x.is_floating_point()
