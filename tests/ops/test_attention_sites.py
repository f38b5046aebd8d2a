"""Where attention is, and how many heads of which size it has, read from attributes and projections."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import deltakit as dk
from deltakit.core import Target
from deltakit.ops.attention.sites import Heads, attends, heads_of


def attention(**attributes):
    """A module with these attributes: those that are named so as layers of this size."""
    module = nn.Module()
    for name, value in attributes.items():
        layer = name in {"q_proj", "k_proj", "v_proj", "kv_a_proj", "qkv", "kv"}
        setattr(module, name, nn.Linear(24, value) if layer else value)
    return heads_of(Target("attn", module))


@pytest.mark.parametrize("name", ["num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads"])
def test_each_name_of_the_number_of_heads(name):
    assert attention(**{name: 4}, k_proj=24, v_proj=24) == Heads(4, 6, 6)
    assert attention(config=SimpleNamespace(**{name: 4}), k_proj=24, v_proj=24) == Heads(4, 6, 6)


@pytest.mark.parametrize(
    "name",
    ["head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "dim_head", "d_kv"],
)
def test_each_name_of_the_size_of_a_head(name):
    assert attention(**{name: 8}, k_proj=24, v_proj=48) == Heads(3, 8, 16)
    assert attention(**{name: 8}, num_heads=6, k_proj=24, v_proj=24) == Heads(3, 8, 8)


@pytest.mark.parametrize("name", ["num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads"])
def test_fewer_heads_of_keys_in_a_fused_projection(name):
    assert attention(num_heads=4, qkv=72) == Heads(4, 6, 6)
    assert attention(num_heads=4, head_dim=6, qkv=48, **{name: 2}) == Heads(2, 6, 6)


def test_latent_attention_names_its_sizes():
    """DeepSeek: keys and values of two sizes, projected up from one latent vector."""
    assert attention(num_heads=4, qk_head_dim=6, v_head_dim=5, kv_a_proj=9) == Heads(4, 6, 5)


def test_keys_and_values_in_one_projection():
    assert attention(num_heads=4, kv=48) == Heads(4, 6, 6)


def test_heads_of_keys_that_are_repeated_before_they_meet_the_queries():
    """JetMoE says that no head is shared, and repeats those that it projects."""
    assert attention(num_heads=8, head_dim=6, num_key_value_groups=1, k_proj=24, v_proj=24) == Heads(8, 6, 6)
    assert attention(num_heads=8, head_dim=6, num_key_value_groups=2, k_proj=24, v_proj=24) == Heads(4, 6, 6)
    assert attention(num_heads=6, head_dim=6, num_key_value_groups=1, k_proj=24, v_proj=24) == Heads(4, 6, 6)


@pytest.mark.parametrize("attributes", [{"num_heads": True}, {"num_heads": 4.0}, {"head_dim": 6}, {"k_proj": 24}])
def test_sizes_that_cannot_be_told_are_an_error(attributes):
    with pytest.raises(dk.TargetError, match="attn: the number and size of heads of this Module cannot be determined"):
        attention(**attributes, q_proj=24)


class Softmax(nn.Module):
    def forward(self, x):
        return self.mix(x).softmax(-1)

    def mix(self, x):
        return x


class SoftmaxAttention(Softmax):
    """Says attention, and multiplies nothing."""


class WrittenOutAttention(Softmax):
    def mix(self, x):
        return x @ x


class WrittenOut(WrittenOutAttention):
    """Attends, and does not say so."""


class BatchedAttention(Softmax):
    def mix(self, x):
        return torch.bmm(x, x)


class AddedAttention(Softmax):
    def mix(self, x):
        return torch.baddbmm(x, x, x)


class ByTorch(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class ByTorchWithProjections(nn.Module):
    def forward(self, x):
        return F.multi_head_attention_forward(x, x, x)


class ByTheInterface(nn.Module):
    def forward(self, x):
        return ALL_ATTENTION_FUNCTIONS.get_interface("eager", None)(x)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Softmax, False),
        (SoftmaxAttention, False),
        (WrittenOut, False),
        (WrittenOutAttention, True),
        (BatchedAttention, True),
        (AddedAttention, True),
        (ByTorch, True),
        (ByTorchWithProjections, True),
        (ByTheInterface, True),
    ],
)
def test_what_attends(kind, wanted):
    assert attends(kind()) is wanted
