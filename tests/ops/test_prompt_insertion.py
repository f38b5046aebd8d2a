"""How a soft prompt enters a call: what is known of the text stack, the layout of ids, masks and positions."""

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.ops.prompt.insertion import _ones
from deltakit.ops.prompt.layout import Layout
from deltakit.ops.prompt.text_stack import stack_at
from deltakit.selection import BackboneIndex
from support.models import Transformer
from support.tiny_transformers import build


class Stack(Transformer):
    """A text stack with something outside its blocks from which positions may come."""

    def __init__(self, buffers=(), parameters=()):
        super().__init__()
        self.classifier = nn.Identity()
        for name, size in buffers:
            self.norm.register_buffer(name, torch.zeros(size))
        for name, size in parameters:
            self.norm.register_parameter(name, nn.Parameter(torch.zeros(size)))


@pytest.mark.parametrize(
    ("buffers", "parameters", "positions"),
    [
        ([], [], "relative"),
        ([("table", (5, 20))], [], "unknown"),
        ([], [("table", (5, 20))], "unknown"),
        ([("table", (5, 20))], [("other", (5, 20))], "unknown"),
    ],
)
def test_a_table_outside_the_blocks_may_hold_positions(buffers, parameters, positions):
    index = BackboneIndex(Stack(buffers, parameters))
    assert stack_at(index, "", 0).positions == positions
    assert stack_at(index, "", 1).positions == "unknown"


def test_a_cache_without_a_length_gets_no_mask_of_ones():
    """Lists of keys and values, as models outside of transformers have them."""
    ids = torch.tensor([[5, 6], [7, 8]])
    layout = Layout(3, 0, lengths=(3, 1))
    assert torch.equal(_ones({}, ids, layout, cached=False), torch.ones_like(ids))
    assert _ones({"past_key_values": [(ids, ids)]}, ids, layout, cached=True) is None


def test_a_mask_that_cannot_grow_names_the_model():
    model = build("llama", tf.AutoModel)
    dk.attach(model, dk.SoftPrompt(tokens=2))
    with pytest.raises(
        dk.StateError, match=r"LlamaModel: a soft prompt cannot .* under a mask of shape \(1, 1, 2, 2\)"
    ):
        model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2))
