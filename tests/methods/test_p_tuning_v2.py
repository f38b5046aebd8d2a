"""P-tuning v2: the prefix under its own name, its defaults, and its dropout."""

import copy

import pytest
import torch

import deltakit as dk
from support.models import Transformer, ids, randomize


def test_is_a_prefix_with_the_same_values():
    model = Transformer().eval()
    twin = copy.deepcopy(model)
    one, other = randomize(dk.attach(model, dk.PTuningV2(tokens=3))), dk.attach(twin, dk.Prefix(tokens=3))
    values = {name.replace("p_tuning_v2", "prefix"): value for name, value in one.state_dict().items()}
    other.load_state_dict(values)
    assert torch.equal(model(ids()), twin(ids()))
    plain = dk.PTuningV2()
    assert (plain.tokens, plain.reparam, plain.dropout) == (20, False, 0.1)


def test_training_drops_values_and_files_have_them_all():
    model = Transformer()
    delta = randomize(dk.attach(model, dk.PTuningV2(tokens=101, dropout=0.25)), 1.0)
    module = delta.modules["layers.0.self_attn"][0]
    torch.manual_seed(0)
    dropped, _ = module.key_value()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], module.key[kept] / 0.75)
    assert 0.2 < 1 - kept.float().mean() < 0.3
    assert torch.equal(delta.state_dict()["layers.0.self_attn.p_tuning_v2.key"], module.key)
    delta.backbone.eval()
    assert module.key_value()[0] is module.key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, r"PTuningV2\(tokens=0\)"),
        ({"dropout": 1.0}, r"PTuningV2\(dropout=1.0\): expected a probability in \[0, 1\)"),
        ({"at": "mlp"}, "this MLP has no attention in it, and p_tuning_v2 needs one"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(dk.DeltaError, match=message):
        dk.attach(Transformer(), dk.PTuningV2(**options))
