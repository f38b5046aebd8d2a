"""Hidden states in whatever a module is given and gives."""

import collections

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

import deltakit as dk
from deltakit.core.activations import hidden_input, hidden_output, replace_hidden

X, Y, IDS = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([1])
Pair = collections.namedtuple("Pair", "mask hidden")


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((X,), {}), ((), {"hidden_states": X}), ((), {"mask": IDS, "input": X}), ((None,), {"odd": X}), (("s", X), {})],
)
def test_inputs(args, kwargs):
    assert hidden_input(args, kwargs) is X


@pytest.mark.parametrize(
    "output",
    [
        X,
        (X, 1),
        (IDS, X),
        [X, 1],
        Pair(IDS, X),
        {"a": IDS, "b": X},
        BaseModelOutput(last_hidden_state=X, attentions=(Y,)),
    ],
)
def test_outputs(output):
    assert hidden_output(output) is X
    replaced = replace_hidden(output, Y)
    assert type(replaced) is type(output)
    assert hidden_output(replaced) is Y
    assert hidden_output(output) is X


def test_a_model_output_keeps_its_attributes_and_keys_together():
    replaced = replace_hidden(BaseModelOutput(last_hidden_state=X, hidden_states=(X,)), Y)
    assert replaced.last_hidden_state is replaced["last_hidden_state"] is replaced[0] is Y


def test_without_a_tensor():
    with pytest.raises(dk.TargetError, match="no tensor among the arguments .* found int, mask=str"):
        hidden_input((1,), {"mask": "x"})
    with pytest.raises(dk.TargetError, match="found no arguments"):
        hidden_input((), {})
    for output in (None, (IDS,), {"a": 1}):
        with pytest.raises(dk.TargetError, match="no floating-point tensor in the result of the target"):
            hidden_output(output)
